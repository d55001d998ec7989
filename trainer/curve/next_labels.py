"""Which samples to label next: those of which the model is least sure, and among these such as differ from each other. Pure, numpy only.
asking.py asks the model; __main__.py writes the list.

Uncertainty alone picks many copies of one hard case, diversity alone picks odd samples that teach nothing. So the POOL times as many
samples of the smallest margin (the difference of the two highest probabilities, Scheffer et al. 2001) are taken, and of those the wanted
number one after the other, each the one that lies farthest from all taken before, its distance counting by how unsure the model is
(k-center greedy, Sener and Savarese 2018; the weighing after Ash et al. 2020). Ties fall to the sample that was given first, so the list is
a function of the samples and of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

POOL = 10
DEFAULT = 100

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A sample that the model was asked about."""

    name: str
    guess: str
    """What the model takes it for."""
    text: str = ""
    """Of a text, as people read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToLabel:
    """A line of label-next.csv."""

    rank: int
    """From 1, the first to label."""
    name: str
    guess: str
    margin: str
    text: str = ""


class Pool:
    """The most uncertain of any number of samples, in bounded memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._seen: dict[int, Seen] = {}
        self._places: Ints = np.zeros(0, dtype=np.int64)
        self._margins: Floats = np.zeros(0, dtype=np.float32)
        self._features: list[Floats] = []

    def add(self, seen: Sequence[Seen], margins: Floats, features: Floats) -> None:
        """The next n samples: margins (n,), features (n, f)."""
        places = range(self._count, self._count + len(margins))
        self._seen.update(zip(places, seen, strict=True))
        self._places = np.concatenate([self._places, np.array(places, dtype=np.int64)])
        self._margins = np.concatenate([self._margins, margins])
        self._features += list(features)
        self._count += len(margins)
        if len(self._margins) > 4 * self._most:
            self._keep()

    def taken(self) -> tuple[list[Seen], Floats, Floats]:
        """(samples, margins, features) of the `most` samples of smallest margin, the smallest first."""
        self._keep()
        features = np.stack(self._features) if self._features else np.zeros((0, 0), dtype=np.float32)
        return [self._seen[place] for place in self._places.tolist()], self._margins, features

    def _keep(self) -> None:
        order = np.lexsort((self._places, self._margins))[: self._most]
        self._places, self._margins = self._places[order], self._margins[order]
        self._features = [self._features[each] for each in order.tolist()]
        self._seen = {place: self._seen[place] for place in self._places.tolist()}


def margins_of(probabilities: npt.NDArray[np.floating]) -> Floats:
    """(n, classes) -> (n,): the highest probability minus the second."""
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities), dtype=np.float32)
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return (two[:, 1] - two[:, 0]).astype(np.float32)


def chosen(margins: Floats, features: Floats, count: int) -> list[int]:
    """At most `count` places among n samples, in the order in which to label them. margins: (n,), ascending; features: (n, f)."""
    if not len(margins):
        return []
    unsure = np.maximum(1 - margins.astype(np.float64), 1e-6)  # (n,)
    points = features.astype(np.float64)
    taken = [0]
    distance = _distances(points, points[0])  # (n,) to the nearest that is taken
    left = np.ones(len(margins), dtype=bool)
    left[0] = False
    while len(taken) < min(count, len(margins)):
        gain = np.where(left, distance * unsure, -1.0)
        best = int(gain.argmax())
        taken.append(best)
        left[best] = False
        distance = np.minimum(distance, _distances(points, points[best]))
    return taken


def _distances(points: npt.NDArray[np.float64], one: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.sqrt(np.square(points - one).sum(axis=1))
    return found


def to_label(pool: Pool, count: int) -> list[ToLabel]:
    """At most `count` samples of the pool, in the order in which to label them."""
    seen, margins, features = pool.taken()
    return [
        ToLabel(rank=rank, name=seen[place].name, guess=seen[place].guess, margin=f"{margins[place]:.4f}", text=seen[place].text)
        for rank, place in enumerate(chosen(margins, features, count), start=1)
    ]
