"""Whether an image is unlike anything seen in training: it lies far from the training images that the model remembers, or speaks to none of
its classes. Pure. trainer.rank.novelty makes the record at a run's end, trainer.export keeps it, `trainer.predict` asks it.

Distance: to the NEIGHBOUR-th nearest of the remembered training images, by features of length 1 (Sun et al. 2022). Energy: the logarithm
of the sum of the exponentials of a label's logits (Liu et al. 2020), of several labels the sum of log(1 + exp) (Wang et al. 2021). An image
is told if its distance is above its threshold or its energy below. Both thresholds lie at the same quantile of held-out images, chosen so
that FALSE_ALARMS of those would be told.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.tasks.score_log import parts_of
from trainer.tasks.task import Task

NEIGHBOUR = 5
FALSE_ALARMS = 0.02
FEWEST = 50
"""Held-out images from which thresholds are taken."""
MOST_BYTES = 4 * 2**20
"""Of the remembered features, in float16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """From where on an image is told."""

    distance: float
    energy: float
    false_alarms: float
    """The share of the held-out images that these thresholds tell."""
    split: str
    """The split that those are of."""
    count: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Thresholds":
        """ValueError if `value` did not come from `to_json`."""
        try:
            numbers = {name: float(value[name]) for name in ("distance", "energy", "false_alarms")}
            return cls(**numbers, split=str(value["split"]), count=int(value["count"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the thresholds of novelty are damaged ({type(error).__name__}: {error})") from None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Novelty:
    """What a model remembers of its training images."""

    remembered: Tensor  # (m, features) float16
    thresholds: Thresholds

    def told(self, task: Task, outputs: Tensor, features: Tensor) -> Tensor:
        """(n,) bool: unlike anything seen in training."""
        far = distances(features, self.remembered) > self.thresholds.distance
        return far | (energies(task, outputs) < self.thresholds.energy)


def most_remembered(features: int) -> int:
    """How many images with that many features take MOST_BYTES."""
    return max(1, MOST_BYTES // (2 * features))


def distances(features: Tensor, remembered: Tensor) -> Tensor:
    """(n, f) and (m, f) -> (n,) float32: to the NEIGHBOUR-th nearest."""
    between = torch.cdist(features.float(), remembered.float())  # (n, m)
    return between.kthvalue(min(NEIGHBOUR, len(remembered)), dim=1).values


def energies(task: Task, outputs: Tensor) -> Tensor:
    """(n, outputs) -> (n,) float32, the higher the more familiar; 0 where no output is a logit."""
    outputs = outputs.float()
    total = outputs.new_zeros(len(outputs))
    for part in parts_of(task):
        logits = outputs[:, part.start : part.stop]
        total = total + (logits.logsumexp(1) if part.kind == "label" else F.softplus(logits).sum(1))
    return total


def thresholds_of(distance: Tensor, energy: Tensor, *, split: str) -> Thresholds | None:
    """Thresholds from the distances and energies, (n,) each, of held-out images; None if there are too few."""
    count = len(distance)
    if count < FEWEST or not bool((distance.isfinite() & energy.isfinite()).all()):
        return None
    ranks = torch.maximum(_rank(distance), _rank(-energy))  # (n,) the stranger of the two
    allowed = int(FALSE_ALARMS * count)
    place = int(ranks.sort(descending=True).values[allowed])  # the largest rank that is not told
    far = float(distance.sort().values[place])
    low = float(energy.sort(descending=True).values[place])
    told = ((distance > far) | (energy < low)).float().mean()
    return Thresholds(distance=far, energy=low, false_alarms=float(told), split=split, count=count)


def _rank(values: Tensor) -> Tensor:
    """(n,) int64: how many are smaller."""
    return torch.searchsorted(values.sort().values, values)
