"""Lets a finished model remember training images, so that `trainer.predict` can tell what is unlike all of them. Rank 0 calls it at a run's
end (trainer.rank.finishing). trainer.tasks.novelty does the arithmetic, trainer.export keeps the result.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from trainer.learn.build import Learner
from trainer.learn.ema import Ema
from trainer.learn.gradients import evaluating
from trainer.models.features import features_of
from trainer.models.vision import head_of
from trainer.rank.data import RankData
from trainer.tasks.novelty import Novelty, distances, energies, most_remembered, thresholds_of

BATCH = 64
MOST_HELD_OUT = 300
"""Images of the held-out split from which the thresholds are taken."""


def novelty_of(
    learner: Learner, data: RankData, *, ema: Ema | None, most: int, on_batch: Callable[[], None] = lambda: None
) -> Novelty | None:
    """Remember `most` training images at most, at equal steps through the split, by the features of the model, or of `ema`; None without
    any, or with too few held-out images. The thresholds come from the validation split, or without one from the test split: neither was
    trained on."""
    splits = data.dataset.manifest.splits
    held_out = next((name for name in ("validation", "test") if name in splits and splits[name].count), "")
    if not most or not held_out:
        return None
    most = min(most, most_remembered(head_of(learner.model)[1].weight.shape[1]))
    with ema.applied() if ema is not None else nullcontext(), evaluating(learner.model):
        remembered, _ = _seen(learner, data, "train", most, on_batch)
        features, energy = _seen(learner, data, held_out, MOST_HELD_OUT, on_batch)
    if not len(remembered):
        return None
    remembered = remembered.half()
    thresholds = thresholds_of(distances(features, remembered), energy, split=held_out)
    return Novelty(remembered=remembered, thresholds=thresholds) if thresholds is not None else None


def _seen(learner: Learner, data: RankData, split: str, most: int, on_batch: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Features (n, f) and energies (n,) of at most `most` images of a split, on the host; without those that cannot be read."""
    count = data.dataset.manifest.splits[split].count
    ids = np.arange(count, dtype=np.int64)[:: -(-count // most)] if count else np.zeros(0, dtype=np.int64)
    found = [(torch.zeros((0, head_of(learner.model)[1].weight.shape[1])), torch.zeros(0))]
    with features_of(learner.model) as features, torch.inference_mode():  # in float32, as `trainer.predict` asks the model
        for batch in data.loader.evaluate(split, ids, batch_size=BATCH):
            outputs = learner.model(learner.preprocess(batch.samples))
            readable = (batch.samples != 0).flatten(1).any(1).cpu()  # a bad sample's row holds zeros
            found.append((features.taken().cpu()[readable], energies(learner.task, outputs).cpu()[readable]))
            on_batch()
    return torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])
