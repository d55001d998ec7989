"""Which of the searched settings mattered: how much of the scores' variance at the first rung each explains by itself. Pure.

At the first rung all trials are scored after the same number of epochs. Of a number the scores are explained by a parabola in its place on
the axis, of a choice by the mean of each value. What any such curve would explain of scores in a random order is taken off, and the chance
that a random order does as well is told: with a dozen trials most of what looks important is none. A trial that diverged counts as the
worst."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.search.space import Axis

FEWEST = 8
"""Trials from which on anything is said."""
ORDERS = 2000
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matters:
    """What one setting explains."""

    key: str
    share: float
    """Of the variance, from 0 to 1, beyond what chance explains."""
    chance: float
    """How often scores in a random order are explained as well."""


def importance(axes: Sequence[Axis], trials: Sequence[tuple[Mapping[str, Any], float | None]]) -> tuple[Matters, ...]:
    """The settings, the most important first. `trials`: values and score of each. Empty for too few, or if all scores are equal."""
    known = [score for _, score in trials if score is not None]
    if len(trials) < FEWEST or not known:
        return ()
    scores = np.array([min(known) if score is None else score for _, score in trials], dtype=np.float64)
    if np.ptp(scores) == 0:
        return ()
    found = [_matters(axis, [values[axis.key] for values, _ in trials], scores) for axis in axes]
    return tuple(sorted((each for each in found if each is not None), key=lambda each: (-each.share, each.chance, each.key)))


def _matters(axis: Axis, values: Sequence[Any], scores: Values) -> Matters | None:
    basis = _basis(axis, values)
    if basis.shape[1] >= len(scores) or basis.shape[1] < 2:
        return None
    q, _ = np.linalg.qr(basis)
    centred = scores - scores.mean()
    explained = _explained(q, centred)
    shuffle = random.Random(axis.key)
    orders = np.array([shuffle.sample(range(len(scores)), len(scores)) for _ in range(ORDERS)])
    by_chance = _explained(q, centred[orders].T)
    usual = float(by_chance.mean())
    share = max(0.0, (float(explained) - usual) / (1.0 - usual)) if usual < 1 else 0.0
    # Rounded: the same trials give the same file on any machine. One is added to both, as the order that was seen is one of them.
    chance = (1 + int(np.sum(by_chance >= explained - 1e-9))) / (1 + ORDERS)
    return Matters(key=axis.key, share=round(share, 4), chance=round(chance, 4))


def _basis(axis: Axis, values: Sequence[Any]) -> Values:
    """Columns whose combinations may explain the scores; the first is constant."""
    if axis.values:
        present = [value for value in axis.values if value in values]
        extra = [value for value in dict.fromkeys(values) if value not in axis.values]  # the run's own, which is none of them
        columns = [[float(value == each) for value in values] for each in (*present, *extra)]
        return np.array([[1.0] * len(values), *columns[1:]], dtype=np.float64).T
    places = [axis.place(value) for value in values]
    usable = np.array([0.5 if place is None else min(1.5, max(-0.5, place)) for place in places], dtype=np.float64)
    return np.stack([np.ones_like(usable), usable, usable**2], axis=1)


def _explained(q: Values, centred: Values) -> Any:
    """Share of the variance that lies in the space of q's columns."""
    inside = q.T @ centred
    return (inside**2).sum(axis=0) / (centred**2).sum(axis=0)
