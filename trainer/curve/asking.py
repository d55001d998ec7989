"""Asks a curve's model about images or texts without a label. __main__.py calls it; next_labels.py chooses among the answers. Takes torch.

Images are decoded and resized, and texts become tokens, as in training (trainer.export has the rules); what cannot be read is left out and
counted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dataio.codecs.image.decode import Decoder
from dataio.codecs.text.tokens import TextFacts, Tokenizer, padded_rows
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from dataio.formats import images_below
from trainer.curve.next_labels import POOL, Floats, Pool, Seen, ToLabel, margins_of, to_label
from trainer.export.model_folder import Exported, TextExport, load_export
from trainer.inference.texts import texts_of
from trainer.models.features import features_of
from trainer.runs.folder import RunFolder
from trainer.tasks.score_log import parts_of

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What came of the samples without a label."""

    rows: list[ToLabel]
    """Images and texts of files by their path inside the folder, texts of a table by the table and the row."""
    samples: int
    unreadable: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Samples as the model is asked about them."""

    samples: Tensor
    """(n, 3, H, W) uint8 or (n, T) int32, those that could be read; n may be 0."""
    names: Sequence[str]
    """Of the n."""
    texts: Sequence[str]
    """Of the n; empty ones for images."""
    count: int
    """With those that could not be read."""


def asked(given: str, model: RunFolder, count: int, on_batch: Callable[[int], None] = lambda done: None, *, text_column: str = "") -> Asked:
    """The `count` samples to label next, by the model in `model`: of the images below the folder `given`, or of the texts of a folder or a
    table. `on_batch` is told how many were asked about. ValueError if there are none, or if the model's task has no probabilities of
    classes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exported = load_export(model, device, may_be_of_texts=True)
    if not parts_of(exported.task):
        raise ValueError(
            "--unlabelled: this model's task says nothing in probabilities, so it cannot tell of which "
            f"{exported.task.info.unit} it is unsure"
        )
    batches = _images(given, exported) if exported.texts is None else _texts(given, exported.texts, text_column)
    pool, done, unreadable = Pool(POOL * count), 0, 0
    for batch in batches:
        done += batch.count
        unreadable += batch.count - len(batch.names)
        if batch.names:
            with torch.inference_mode(), features_of(exported.model) as features:
                outputs = exported.model(exported.preprocess(batch.samples.to(device))).float().cpu()
            guesses = [exported.task.sentence(answer) for answer in exported.task.answers(outputs, top=1)]
            seen = [Seen(name=name, guess=guess, text=text) for name, guess, text in zip(batch.names, guesses, batch.texts, strict=True)]
            pool.add(seen, _margins(exported, outputs), features.taken().cpu().numpy())
        on_batch(done)
    return Asked(rows=to_label(pool, count), samples=done, unreadable=unreadable)


def _images(folder: str, exported: Exported) -> Iterator[_Batch]:
    paths = sorted(images_below(folder))
    if not paths:
        raise ValueError(f"--unlabelled {folder} holds no image (.jpg, .png, .webp, ...); give the folder of the images without a label")
    height, width = exported.image_size
    fit = "crop" if exported.fit == "refuse" else exported.fit  # an image that is only asked about need not have the size
    decoder = Decoder(
        height=height, width=width, fit=fit, background=exported.background, max_pixels=exported.max_image_pixels, batch_size=BATCH
    )
    with decoder:
        for start in range(0, len(paths), BATCH):
            encoded, read = [], []
            for path in paths[start : start + BATCH]:
                try:
                    encoded.append(read_regular(path, MAX_IMAGE_BYTES))
                    read.append(path)
                except OSError:
                    continue
            count = len(paths[start : start + BATCH])
            if not encoded:
                yield _Batch(samples=torch.empty(0), names=(), texts=(), count=count)
                continue
            decoded = decoder.decode(encoded)
            bad = {index for index, _ in decoded.bad}
            good = [index for index in range(len(encoded)) if index not in bad]
            yield _Batch(
                samples=torch.from_numpy(decoded.images[good]).permute(0, 3, 1, 2),
                names=[os.path.relpath(read[index], folder) for index in good],
                texts=[""] * len(good),
                count=count,
            )


def _texts(given: str, form: TextExport, text_column: str) -> Iterator[_Batch]:
    tokenizer = Tokenizer(form.tokenizer, max_tokens=form.max_tokens, too_long=form.too_long, where="the model's folder")
    is_folder, texts = os.path.isdir(given), texts_of([given], text_column=text_column)
    while part := list(islice(texts, BATCH)):
        facts = tokenizer.facts([each.data for each in part])
        good = [(each.key, fact) for each, fact in zip(part, facts, strict=True) if not each.error and isinstance(fact, TextFacts)]
        yield _Batch(
            samples=torch.from_numpy(padded_rows([fact for _, fact in good])),
            names=[os.path.relpath(key, given) if is_folder else key for key, _ in good],
            texts=[fact.text for _, fact in good],
            count=len(part),
        )


def _nearest_to_a_toss(logits: Tensor) -> Floats:
    """(n, labels) -> (n,): of several labels the margin of the one of which the model is least sure."""
    found: Floats = (2 * logits.sigmoid() - 1).abs().amin(1).numpy()
    return found


def _margins(exported: Exported, outputs: Tensor) -> Floats:
    """(n,): the smallest margin of a sample's targets, at the temperatures that the run fitted."""
    found = np.ones(len(outputs), dtype=np.float32)
    for part in parts_of(exported.task):
        temperature = exported.temperatures[part.name].value if part.name in exported.temperatures else 1.0
        logits = outputs[:, part.start : part.stop] / temperature
        found = np.minimum(found, margins_of(logits.softmax(1).numpy()) if part.kind == "label" else _nearest_to_a_toss(logits))
    return found
