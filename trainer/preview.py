"""The command line `python -m trainer.preview DIR --SETTING VALUE ...`: a sheet of training images as the model gets them. Takes the
settings of `trainer.run` and refuses what that refuses; starts nothing.

A row is an image, a column an epoch, after the plain image. Crop and flip come from the loader's codec, everything else from the functions
that a step calls (trainer.learn), the picture from undoing the normalisation. Where the batch matters (mixing, an augmentation of the
user's own), each image is taken out of the batch in which it is in that epoch.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cluster.text import shown
from dataio.batch import Batch, Ids
from dataio.codecs.codec import Codec
from dataio.codecs.make import make_codec
from dataio.loader import BAD, Loader
from dataio.manifest import Manifest
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import Dataset
from dataio.quarantine import BadSample
from dataio.scan import look_at
from trainer.drive.data import open_data
from trainer.learn.augment.batches import augmented
from trainer.learn.augment.mix import make_mix
from trainer.learn.build import preprocess_of, views_of
from trainer.learn.own import own_augment
from trainer.models.normalise import mean_and_std
from trainer.settings.cli import DIR_RECIPE, Invocation, SettingsLine, check, fail, parse_line
from trainer.settings.length import length_of
from trainer.settings.photos import Choice, choice_of
from trainer.settings.programs import program
from trainer.settings.rules import validate, worker_count
from trainer.settings.say import Terminal, complain, say
from trainer.settings.spec import order_of
from trainer.settings.tree import RunConfig

SMALLEST_SIDE, LARGEST_SIDE = 64, 224
"""Pixels of an image in the sheet: smaller ones are enlarged by whole numbers, so that their pixels stay pixels."""
GAP, HEADING, NAME_WIDTH = 4, 16, 110
MOST_SAMPLES, MOST_EPOCHS = 64, 32
STEPS_AT_ONCE = 1000

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Write a sheet of training images as the model gets them: a row for each image, a column for each epoch.

    All other arguments are those of a run: DIR as the first word, --config, and its settings.
    """

    samples: int = 8
    """Images to show: the first of the run's first step."""
    epochs: int = 6
    """Epochs to show, after a column of the images as they are."""
    out: str = "preview.png"
    """The PNG file to write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An image as it is, and as the model gets it in each epoch, (H, W, 3) each; with the name of its class, if it has one."""

    plain: Pixels
    epochs: tuple[Pixels, ...]
    name: str


def main(argv: Sequence[str]) -> int:
    """Write the sheet and return 0; 1 if it cannot be written. Exits with 2 (SystemExit) for what a run would refuse."""
    try:
        invocation, line = parse_line(argv, Arguments, prog=program("preview"))
        check(invocation.config)
        _check_arguments(line)
        if invocation.takes_dir_recipe:
            say(f"settings of the recipe {DIR_RECIPE}; flags change them")
        dataset, choice = opened(invocation)
        for said in choice.said:
            say(said)
        config = settled(choice.config, dataset, from_recipes=invocation.from_recipes)
        previewer = Previewer(config, dataset, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rows = previewer.rows(line.samples, line.epochs)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        complain(f"error: {error}")
        return 1
    if previewer.bad:
        complain(f"{len(previewer.bad)} of the images cannot be read; they are black here, and left out of training")
    try:
        sheet(rows).save(line.out, "PNG", optimize=True)
    except OSError as error:
        complain(f"error: --out {line.out} cannot be written: {error.strerror or error}")
        return 1
    height, width = rows[0].epochs[0].shape[:2]
    say(f"{line.out}: {len(rows)} images as they are, and in epochs 1 to {line.epochs} as the model gets them, {width}x{height} pixels")
    return 0


def opened(invocation: Invocation) -> tuple[Dataset, Choice]:
    """The data, converted first if necessary, and the settings with what the rule for photographs chooses for them, as a run has them."""

    def choice_for(manifest: Manifest) -> Choice:
        config, workers = invocation.config, worker_count(invocation.config) or max(1, torch.cuda.device_count())
        return choice_of(config, manifest, given=invocation.given, recipes=invocation.recipes, workers=workers)

    seen = look_at(invocation.config.data).manifest
    _, dataset = open_data(choice_for(seen).config if seen is not None else invocation.config, Terminal())
    return dataset, choice_for(dataset.manifest)


def _check_arguments(line: Arguments) -> None:
    for name, value, most in (("samples", line.samples, MOST_SAMPLES), ("epochs", line.epochs, MOST_EPOCHS)):
        if not 1 <= value <= most:
            raise ValueError(f"--{name} {value} does not fit on a sheet; use 1 to {most}")
    if Path(line.out).suffix.lower() != ".png":
        raise ValueError(f"--out {line.out} is no PNG file; give it a name such as preview.png")


def settled(config: RunConfig, dataset: Dataset, *, from_recipes: frozenset[str] = frozenset()) -> RunConfig:
    """With what follows from the data, as a new run on this machine has it. ValueError if the settings do not fit the data."""
    workers = worker_count(config) or max(1, torch.cuda.device_count())
    virtual_ranks = config.train.virtual_ranks or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), workers=str(workers))
    return length_of(config, dataset.manifest, workers=workers, from_recipes=from_recipes).config


class Previewer:
    """A run's training images as its model gets them."""

    def __init__(self, config: RunConfig, dataset: Dataset, device: torch.device) -> None:
        """ValueError if the data do not fit the settings."""
        self._config, self._order = config, order_of(config, dataset.manifest)
        data = dataclasses.replace(config.data, cache="none", backend="auto")
        self.bad: list[BadSample] = []
        """Images that could not be read so far."""
        self._loader = Loader(
            dataset,
            data,
            order=self._order,
            virtual_ranks=range(self._order.virtual_ranks),
            device=device,
            seed=config.train.seed,
            on_bad=self.bad.append,
        )
        validate(config, shape=self._loader.shape)
        row, size = self._loader.row, self._order.batch_per_virtual_rank
        self._codec: Codec = make_codec(row, data, device=device, cache="none", threads=1, batch_size=size, table_bytes=0)
        train = config.train
        self._views, self._own = views_of(config), own_augment(config.data.augment, train.seed)
        self._mix = make_mix(seed=train.seed, mixup=train.mixup, cutmix=train.cutmix)
        self._preprocess = preprocess_of(config).to(device)

    def rows(self, samples: int, epochs: int) -> tuple[Row, ...]:
        """The first `samples` images of the run's first step, in its first `epochs` epochs."""
        ids = np.concatenate([self._order.samples(0, 0, rank) for rank in range(self._order.virtual_ranks)])[:samples]
        views = [self.in_epoch(epoch, ids) for epoch in range(epochs)]
        names = self._names(ids)
        plain = self._shown(self._plain(ids))
        return tuple(Row(plain=plain[n], epochs=tuple(view[n] for view in views), name=names[n]) for n in range(len(ids)))

    def in_epoch(self, epoch: int, ids: Ids) -> Pixels:
        """(n, H, W, 3): these images as the model gets them in `epoch`."""
        if self._mix is None and self._own is None:  # then an image does not depend on its batch
            return self._shown(self._augmented(epoch, 0, 0, ids))
        found: dict[int, Pixels] = {}
        for step, virtual_rank, those in places(self._order, epoch, ids):
            batch = self._order.samples(epoch, step, virtual_rank)
            seen = self._augmented(epoch, epoch * self._order.steps_per_epoch + step, virtual_rank, batch)
            shown_too = self._shown(seen[torch.from_numpy(np.flatnonzero(np.isin(batch, those))).to(seen.device)])
            found |= dict(zip(batch[np.isin(batch, those)].tolist(), shown_too, strict=True))
        return np.stack([found[each] for each in ids.tolist()])

    def _augmented(self, epoch: int, step: int, virtual_rank: int, ids: Ids) -> Tensor:
        """(n, 3, H, W) uint8: a virtual rank's batch as the step makes it."""
        stored = self._plain(ids).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        cropped = self._codec.batch(stored, np.arange(len(ids)), ids, seed=self._config.train.seed, epoch=epoch)
        batch = Batch(samples=cropped, targets={}, ids=ids, epoch=epoch, step=step, virtual_rank=virtual_rank)
        share_of = self._first_together(virtual_rank)
        return augmented(batch, views=self._views, own=self._own, mix=self._mix, share_of=share_of)[0]

    def _first_together(self, virtual_rank: int) -> int:
        """The first of the virtual ranks that go through the model together with this one."""
        ranks, workers = self._order.virtual_ranks, worker_count(self._config) or 1
        if self._config.train.reduction == "tree":
            return virtual_rank
        blocks = [blocks_of_virtual_ranks(ranks, workers, each) for each in range(workers)]
        return next(block.start for block in blocks if virtual_rank in block)

    def _plain(self, ids: Ids) -> Tensor:
        """(n, 3, H, W) uint8 as stored."""
        with closing(self._loader.evaluate("train", ids, self._order.batch_per_virtual_rank)) as batches:
            return torch.cat([batch.samples for batch in batches])

    def _names(self, ids: Ids) -> list[str]:
        target = next((target for target in self._loader.targets if target.kind == "label"), None)
        if target is None:
            return [""] * len(ids)
        with closing(self._loader.evaluate("train", ids, len(ids))) as batches:
            labels = [label for batch in batches for label in batch.targets[target.name].tolist()]
        return ["" if label == BAD else target.classes[label] for label in labels]

    def _shown(self, samples: Tensor) -> Pixels:
        """(n, H, W, 3): through the model's own preprocessing, and its normalisation undone."""
        mean, std = (torch.tensor(each, device=samples.device).view(1, 3, 1, 1) for each in mean_and_std(self._config))
        inputs = self._preprocess(samples)  # what the network gets
        pixels: Pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return pixels


def places(order: Order, epoch: int, ids: Ids) -> Iterator[tuple[int, int, Ids]]:
    """Where in an epoch samples are: (step in the epoch, virtual rank, those of `ids` that are there), until all are found."""
    left = len(ids)
    for start in range(0, order.steps_per_epoch, STEPS_AT_ONCE):
        steps = range(start, min(start + STEPS_AT_ONCE, order.steps_per_epoch))
        for virtual_rank in range(order.virtual_ranks):
            for step, batch in zip(steps, order.lane(epoch, steps, virtual_rank), strict=True):
                if len(those := ids[np.isin(ids, batch)]):
                    left -= len(those)
                    yield step, virtual_rank, those
        if not left:
            return


def sheet(rows: Sequence[Row]) -> Image.Image:
    """All rows as one picture, under a line that names the columns."""
    columns = [tuple(map(_cell, (row.plain, *row.epochs))) for row in rows]
    side = max(max(cell.size) for cells in columns for cell in cells)
    names = NAME_WIDTH if any(row.name for row in rows) else 0
    width, height = names + (side + GAP) * len(columns[0]) + GAP, HEADING + (side + GAP) * len(rows) + GAP
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for number in range(len(columns[0])):
        pen.text((names + GAP + number * (side + GAP), 1), f"epoch {number}" if number else "as it is", fill="black", font=font)
    for line, (row, cells) in enumerate(zip(rows, columns, strict=True)):
        top = HEADING + GAP + line * (side + GAP)
        pen.text((GAP, top), shown(row.name, 18), fill="black", font=font)
        for number, cell in enumerate(cells):
            picture.paste(cell, (names + GAP + number * (side + GAP), top))
    return picture


def _cell(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    times = -(-SMALLEST_SIDE // max(image.size))
    if times > 1:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
