"""Asks a curve's model about images without a label. __main__.py calls it; next_labels.py chooses among the answers. Takes torch.

Images are decoded and resized as in training (trainer.export has the rules); what cannot be read is left out and counted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataio.codecs.image.decode import Decoder
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from dataio.formats import images_below
from trainer.curve.next_labels import POOL, Floats, Pool, chosen, margins_of, rows_of
from trainer.export.model_folder import Exported, load_export
from trainer.models.features import features_of
from trainer.runs.folder import RunFolder
from trainer.tasks.score_log import parts_of

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What came of a folder of images."""

    rows: list[tuple[int, str, str, str]]
    """(rank, image, guess, margin): images by their path inside the folder."""
    images: int
    unreadable: int


def asked(folder: str, model: RunFolder, count: int, on_batch: Callable[[int, int], None] = lambda done, of: None) -> Asked:
    """The `count` images below `folder` to label next, by the model in `model`. ValueError if there are none, or if the model's task has no
    probabilities of classes."""
    names = [os.path.relpath(path, folder) for path in sorted(images_below(folder))]
    if not names:
        raise ValueError(f"--unlabelled {folder} holds no image (.jpg, .png, .webp, ...); give the folder of the images without a label")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exported = load_export(model, device)
    if not parts_of(exported.task):
        raise ValueError("--unlabelled: this model's task says nothing in probabilities, so it cannot tell of which images it is unsure")
    pool, guesses, unreadable = Pool(POOL * count), dict[int, str](), 0
    seen: list[int] = []  # the pool's places count the images that could be read
    for start, margins, features, words, places in _batches(folder, names, exported, device):
        guesses |= {len(seen) + number: word for number, word in enumerate(words)}
        seen += places
        pool.add(margins, features)
        on_batch(min(start + BATCH, len(names)), len(names))
    unreadable = len(names) - len(seen)
    kept, margins, features = pool.taken()
    order = chosen(margins, features, count)
    rows = rows_of([names[seen[place]] for place in kept], [guesses[int(place)] for place in kept], margins, order)
    return Asked(rows=rows, images=len(names), unreadable=unreadable)


def _batches(
    folder: str, names: Sequence[str], exported: Exported, device: torch.device
) -> Iterator[tuple[int, Floats, Floats, list[str], list[int]]]:
    """(start, margins (n,), features (n, f), guesses, places among `names`) of the images that can be read."""
    height, width = exported.image_size
    fit = "crop" if exported.fit == "refuse" else exported.fit  # an image that is only asked about need not have the size
    decoder = Decoder(
        height=height, width=width, fit=fit, background=exported.background, max_pixels=exported.max_image_pixels, batch_size=BATCH
    )
    with decoder, torch.inference_mode():
        for start in range(0, len(names), BATCH):
            encoded, places = [], []
            for place in range(start, min(start + BATCH, len(names))):
                try:
                    encoded.append(read_regular(os.path.join(folder, names[place]), MAX_IMAGE_BYTES))
                    places.append(place)
                except OSError:
                    continue
            if not encoded:
                continue
            decoded = decoder.decode(encoded)
            bad = {index for index, _ in decoded.bad}
            good = [index for index in range(len(encoded)) if index not in bad]
            images = torch.from_numpy(decoded.images[good]).permute(0, 3, 1, 2).to(device)  # (n, 3, H, W) uint8
            if not good:
                continue
            with features_of(exported.model) as features:
                outputs = exported.model(exported.preprocess(images)).float().cpu()
            margins = _margins(exported, outputs)
            answers = exported.task.answers(outputs, top=1)
            words = [exported.task.sentence(answer) for answer in answers]
            yield start, margins, features.taken().cpu().numpy(), words, [places[index] for index in good]


def _nearest_to_a_toss(logits: Tensor) -> Floats:
    """(n, labels) -> (n,): of several labels the margin of the one of which the model is least sure."""
    found: Floats = (2 * logits.sigmoid() - 1).abs().amin(1).numpy()
    return found


def _margins(exported: Exported, outputs: Tensor) -> Floats:
    """(n,): the smallest margin of an image's targets, at the temperatures that the run fitted."""
    found = np.ones(len(outputs), dtype=np.float32)
    for part in parts_of(exported.task):
        temperature = exported.temperatures[part.name].value if part.name in exported.temperatures else 1.0
        logits = outputs[:, part.start : part.stop] / temperature
        found = np.minimum(found, margins_of(logits.softmax(1).numpy()) if part.kind == "label" else _nearest_to_a_toss(logits))
    return found
