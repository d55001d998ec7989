"""Explains a finished model's answers: where in the image each comes from. trainer.models.cam makes the maps. explain_texts.py explains
answers to texts.

`explain` does so for the test samples that the report shows. Rank 0 calls it at a run's end (trainer.rank.finishing), since the report and
its caller import no torch. `Explainer` does it for `trainer.predict`. Nothing here may cost a finished run its model:
what cannot be explained is said in the file, and the report repeats it.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from cluster.beat import EXPORTING
from cluster.storage import Storage
from trainer.export.model_folder import Exported, text_export
from trainer.learn.build import Learner
from trainer.learn.ema import Ema
from trainer.learn.gradients import evaluating
from trainer.models.architecture import one_line
from trainer.models.cam import Layer, NoPlacesError, explained, find_layer
from trainer.rank.data import RankData
from trainer.rank.this_rank import ThisRank
from trainer.report.overlay import overlay, sized
from trainer.report.thumbnails import rows_to_show
from trainer.tasks.explained import answer_score
from trainer.tasks.explanations import EXPLANATIONS_FILE, AboutMaps, Explanations
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

BATCH = 16
DRAWN_SIDE = 256  # pixels; larger images keep their size


def explain(me: ThisRank, storage: Storage, learner: Learner, data: RankData, *, ema: Ema | None, step: int) -> None:
    """Write explanations.parquet into the run's folder: `train.explain` samples at most, those first that the report shows first. Without
    the predictions of `step`, of which the report says what is wrong with them, there are none."""
    run, most = me.config.run, me.config.train.explain
    if not most:
        return
    try:
        encoded = me.waits.call(lambda: storage.read(f"{run}/{PREDICTIONS_FILE}"), PREDICTIONS_FILE)
        found = Predictions.from_parquet(encoded or b"")
    except (FileNotFoundError, ValueError):  # they could not be written, which the journal says
        return
    if found.about.step != step:
        return

    def on_batch() -> None:
        me.heartbeat.tick(EXPORTING)

    texts = text_export(me.config, data.dataset.manifest.texts)
    if texts is None:
        written = explanations(found, learner, data, ema=ema, most=most, on_batch=on_batch).to_parquet()
    else:
        from trainer.rank.explain_texts import highlights  # here: no run on images waits for tokenizers

        written = highlights(found, learner, data, texts, ema=ema, most=most, on_batch=on_batch).to_parquet()
    try:
        me.waits.call(lambda: storage.write_atomic(f"{run}/{EXPLANATIONS_FILE}", written), EXPLANATIONS_FILE)
    except OSError as error:
        me.tell("explanations_not_written", message=str(error))


def explanations(
    found: Predictions, learner: Learner, data: RankData, *, ema: Ema | None, most: int, on_batch: Callable[[], None] = lambda: None
) -> Explanations:
    """Maps of `most` samples of the predictions at most. In float32, whatever the run's precision: a gradient has more to lose."""
    split, task = data.dataset.split(found.about.split), learner.task
    rows = rows_to_show(found, split, len(task.targets[0].classes))[:most]
    rows.sort(key=lambda row: int(found.ids[row]))  # as they lie in the split
    said = found.answers[rows] if found.is_classification else None
    maps: list[npt.NDArray[np.uint8]] = []
    layer, note, done = None, "", 0
    with ema.applied() if ema is not None else nullcontext(), evaluating(learner.model):
        for batch in data.loader.evaluate(found.about.split, found.ids[rows], batch_size=BATCH) if rows else ():
            answers = None if said is None else torch.from_numpy(said[done : done + len(batch.ids)]).to(learner.device)

            def score(outputs: Tensor, answers: Tensor | None = answers) -> Tensor:
                return answer_score(task, outputs, answers)

            try:
                images = learner.preprocess(batch.samples)
                layer = layer or find_layer(learner.model, images, lambda outputs: answer_score(task, outputs))
                maps.append(as_bytes(explained(learner.model, images, score, layer)))
            except (NoPlacesError, RuntimeError) as error:  # a network of the user's own may do what has no gradient
                note, maps, rows = one_line(error), [], []
                break
            done += len(batch.ids)
            on_batch()
    return _recorded(found, learner, data, layer, found.ids[rows], maps, note)


class Explainer:
    """Draws where an exported model's answers come from, for `trainer.predict --explain`: PNG files, each the image as the model saw it and
    the same with its map."""

    def __init__(self, exported: Exported, folder: Path, device: torch.device) -> None:
        """Makes the folder. NoPlacesError if the model keeps no places; OSError if the folder cannot be made."""
        self._task, self._model, self._preprocess = exported.task, exported.model, exported.preprocess
        self._folder, self._device, self._count = folder, device, 0
        noise = torch.randint(0, 256, (1, 3, *exported.image_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self._layer = find_layer(self._model, self._preprocess(noise.to(device)), self._score)
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, images: npt.NDArray[np.uint8], names: Sequence[str]) -> list[str]:
        """Explain decoded images (n, H, W, 3). Returns the files, which are numbered over all calls and end in the names' last parts."""
        files = []
        for start in range(0, len(images), BATCH):
            some = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).to(self._device)
            maps = as_bytes(explained(self._model, self._preprocess(some), self._score, self._layer))
            for image, heat, name in zip(images[start:], maps, names[start:], strict=False):
                files.append(self._save(Image.fromarray(image), heat, name))
        return files

    def _save(self, image: Image.Image, heat: npt.NDArray[np.uint8], name: str) -> str:
        side = max(DRAWN_SIDE, *image.size)
        plain, mapped = sized(image, side), overlay(image, heat, side=side)
        both = Image.new("RGB", (plain.width + mapped.width, plain.height))
        both.paste(plain, (0, 0))
        both.paste(mapped, (plain.width, 0))
        self._count += 1
        kept = re.sub(r"[^\w.-]+", "_", Path(name).stem, flags=re.ASCII)[:80]
        file = self._folder / f"{self._count:05d}-{kept}.png"
        both.save(file)
        return str(file)

    def _score(self, outputs: Tensor) -> Tensor:
        return answer_score(self._task, outputs)


def as_bytes(maps: Tensor) -> npt.NDArray[np.uint8]:
    """Maps from 0 to 1 in steps of 1/255, on the host."""
    rounded: npt.NDArray[np.uint8] = (maps * 255).round().to(torch.uint8).cpu().numpy()
    return rounded


def _recorded(
    found: Predictions,
    learner: Learner,
    data: RankData,
    layer: Layer | None,
    ids: npt.NDArray[np.int64],
    maps: list[npt.NDArray[np.uint8]],
    note: str,
) -> Explanations:
    grid = layer.grid if layer is not None else (1, 1)
    about = AboutMaps(
        step=found.about.step,
        split=found.about.split,
        dataset_fingerprint=found.about.dataset_fingerprint,
        method=layer.method if layer is not None else "",
        layer=layer.module if layer is not None else "",
        grid=grid,
        image_hw=data.loader.image_size,
        fit=learner.config.data.fit,
        note=note,
    )
    return Explanations(about=about, ids=ids, maps=np.concatenate([np.zeros((0, *grid), dtype=np.uint8), *maps]))
