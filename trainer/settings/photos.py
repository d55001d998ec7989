"""Chooses what a run on photographs needs and its user did not say: size, fit, batch, epochs and rates, by one rule from what is known of
the images. Called by trainer.drive.problems and start.py, for the run and its dry run alike. Pure, but for reading the shipped recipe.

The rule is for data given as DIR, for `--config photos`, and for a folder whose images have several sizes while no setting says how to
bring them to one (without the rule that is an error, so it changes no run that ever worked). It sets what the recipe `photos` sets, then
what TABLE has for that many images. A setting that the user gives is never changed. The idea is BiT's hyper-rule (Kolesnikov et al. 2020):
few numbers suffice, chosen by the size of the data alone.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from dataio.manifest import Manifest, image_size_of
from trainer.settings.fields import replaced, settings
from trainer.settings.toml import load
from trainer.settings.tree import RunConfig
from trainer.settings.units import number

RECIPE = "photos"
SHAPE = frozenset({"data.image_size", "data.fit"})
"""Settings that say how images of several sizes come to one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What suits at least this many training images."""

    images: int
    batch_size: int
    epochs: int


TABLE = (
    Row(images=0, batch_size=16, epochs=15),
    Row(images=500, batch_size=32, epochs=15),
    Row(images=1_000, batch_size=32, epochs=12),
    Row(images=5_000, batch_size=64, epochs=8),
    Row(images=50_000, batch_size=128, epochs=5),
    Row(images=500_000, batch_size=256, epochs=3),
)
"""From some 470 steps for a hundred images to some 6,000 for half a million."""
LEAST_SEEN = 7_500
"""Images that a run learns from at least, each as often as that takes: 20 epochs of few are over too early (docs/photographs.md)."""
MOST_EVALUATIONS = 20
"""Where the epochs of few images are many and short."""
RATES_AT_32 = {"sgd": 0.01, "adamw": 3e-4}
"""`optim.lr` for a batch of 32 images; it grows with the batch (Goyal et al. 2017)."""
WARMUP_FRACTION = 0.1
MOST_PAD = 8
SMALL_SIDE = 64
ENLARGED_SIDE = 96
"""What a network that was pretrained on larger images gets where all of them have SMALL_SIDE pixels or less: it divides each side by 32,
and nearly nothing would be left."""
_FOLDS = re.compile(r"(timm/)?(wide_)?res(net|next)\d+(_\d+x\d+d|_2)?(\..*)?")
"""Networks whose own stem does that, at a lower price (trainer.models.stem)."""
CHOSEN = (
    *("data.batch_size", "train.epochs", "optim.lr", "optim.warmup_fraction", "data.pad"),
    *("train.eval_every_epochs", "train.checkpoint_every", "model.image_size", "model.interpolation"),
)
"""What follows from the images' number and size; the rest is the recipe's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The settings with what the rule chose."""

    config: RunConfig
    takes_recipe: bool = False
    """The rule took the recipe, which nobody had named."""
    chosen: Mapping[str, Any]
    """The settings that the rule set, by dotted name, other than those of a recipe that the user took."""
    said: tuple[str, ...] = ()
    """What the user should know, a line each."""


def row_of(images: int) -> Row:
    """The last row of TABLE that asks for no more images, with the epochs of LEAST_SEEN where these are more. `images`: at least 1."""
    row = max((row for row in TABLE if row.images <= images), key=lambda row: row.images)
    return row if row.images else replace(row, epochs=-(-LEAST_SEEN // images))


def is_for(config: RunConfig, manifest: Manifest, *, given: Set[str], recipes: tuple[str, ...]) -> bool:
    """Whether the rule applies. `given`: the settings that flags set; `recipes`: the names of all `--config`, and of the recipe of DIR."""
    if recipes:
        return recipes == (RECIPE,)
    return len(manifest.image_sizes) > 1 and not SHAPE & given and config.data.fit == "refuse" and not config.data.image_size


def choice_of(
    config: RunConfig,
    manifest: Manifest,
    *,
    given: Set[str],
    recipes: tuple[str, ...],
    workers: int | None = None,
    saved: RunConfig | None = None,
) -> Choice:
    """`config` with what the rule chooses for these data; as it is where the rule does not apply. `workers`: virtual ranks, if the settings
    name none. `saved`: the settings of the run that this one goes on with, if it is known; it keeps what was chosen for it."""
    count = manifest.splits["train"].count if "train" in manifest.splits else 0
    if not count or not is_for(config, manifest, given=given, recipes=recipes):
        return Choice(config=config, chosen={})
    takes_recipe = not recipes
    wanted: dict[str, Any] = {}
    if takes_recipe:
        of_recipe = settings(load(RECIPE, RunConfig()))
        wanted = {key: value for key, value in of_recipe.items() if value != settings(RunConfig())[key]}
    if saved is None:
        side = min(image_size_of(manifest, _with(config, {key: value for key, value in wanted.items() if key not in given}).data))
        wanted |= _by_data(count, side, given, config, workers or 1)
    else:
        known = settings(saved)
        wanted |= {key: known[key] for key in (*wanted, *CHOSEN)}
    chosen = {key: value for key, value in wanted.items() if key not in given}
    if "optim.warmup_steps" in given:
        chosen.pop("optim.warmup_fraction", None)
    config = _with(config, chosen)
    return Choice(config=config, takes_recipe=takes_recipe, chosen=chosen, said=tuple(_said(config, manifest, count, chosen, takes_recipe)))


def _with(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    for key, value in values.items():
        config = replaced(config, key, value)
    return config


def _by_data(images: int, side: int, given: Set[str], config: RunConfig, workers: int) -> dict[str, Any]:
    row = row_of(images)
    ranks = config.train.virtual_ranks or workers
    batch = config.data.batch_size if "data.batch_size" in given else -(-row.batch_size // ranks) * ranks
    name = config.optim.name if "optim.name" in given else "sgd"
    epochs = config.train.epochs if "train.epochs" in given else row.epochs
    every = max(1, -(-epochs // MOST_EVALUATIONS))
    lr = float(f"{RATES_AT_32[name] * batch / 32:.3g}")
    wanted: dict[str, Any] = dict(zip(CHOSEN, (batch, row.epochs, lr, WARMUP_FRACTION, min(MOST_PAD, side // 8)), strict=False))
    if every > 1:  # an epoch is too short for an evaluation and a checkpoint of its own
        wanted |= {"train.eval_every_epochs": every, "train.checkpoint_every": every * -(-images // batch)}
    if "model.image_size" not in given and is_enlarged(side, config):
        wanted |= {"model.image_size": ENLARGED_SIDE, "model.interpolation": "bicubic"}
    return wanted


def is_enlarged(side: int, config: RunConfig) -> bool:
    """Whether images of `side` pixels are too small for the network as it was pretrained."""
    model = config.model
    return side <= SMALL_SIDE and model.weights != "none" and not (model.stem == "auto" and _FOLDS.fullmatch(model.name))


def _said(config: RunConfig, manifest: Manifest, count: int, chosen: Mapping[str, Any], takes_recipe: bool) -> list[str]:
    sizes = len(manifest.image_sizes)
    height, width = image_size_of(manifest, config.data)
    what = f"{number(count)} training images of {number(sizes)} size{'' if sizes == 1 else 's'}"
    numbers = {key: value for key in CHOSEN if isinstance(value := chosen.get(key), int | float) and key != "model.image_size"}
    by_count = ", ".join(f"{key}={value:g}" for key, value in numbers.items())
    lines = [f"chosen for {what}: {by_count}; flags change them"] if by_count else []
    if takes_recipe:
        shape = f"{'cropped' if config.data.fit == 'crop' else 'resized'} to {width} x {height} pixels"
        lines.insert(0, f"the images have several sizes: they are {shape}, and the run takes the recipe {RECIPE}")
    if chosen.get("model.image_size"):
        lines.append(f"the network was pretrained on larger images: it sees these enlarged, by model.image_size={config.model.image_size}")
    return lines
