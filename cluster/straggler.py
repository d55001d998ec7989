"""Detects a rank that slows down the others. It compares each rank's own work on a step, without its wait for others: with a collective in
every step, all ranks take equally long. The coordinator passes every beat to `StragglerWatch.hear` and reports what it finds. Pure, no
clock.
"""

import statistics
from dataclasses import dataclass

_KEPT = 0.8
"""The weight that a rank's average keeps per step: it follows a change within about ten steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StragglerLimits:
    """When a rank counts as a straggler: its own work on a step takes more than `ratio` times the others' for `steps` steps in a row."""

    ratio: float = 1.5
    steps: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """An episode of a rank begins or ends."""

    rank: int
    begins: bool
    steps_done: int
    """That rank's steps so far."""
    own_seconds: float
    """Its own work on a step, averaged."""
    others_seconds: float
    """The median of the other ranks' averages."""

    @property
    def ratio(self) -> float:
        return self.own_seconds / self.others_seconds


@dataclass(kw_only=True, slots=True)
class _Rank:
    steps_done: int
    total_seconds: float
    average: float | None = None
    slow_since: int | None = None
    """Steps it had done when it was first seen to be slow."""
    is_reported: bool = False


class StragglerWatch:
    """Watches one attempt's ranks. A straggler's average is more than `ratio` times the median of the others' for `steps` steps in a
    row."""

    def __init__(self, world_size: int, *, ratio: float = 1.5, steps: int = 20) -> None:
        if not ratio > 1:
            raise ValueError(f"cluster.faults.straggler_ratio={ratio} must be above 1: 1 is as fast as the others; 1.5 is the default")
        self._world_size, self._ratio, self._needed = world_size, ratio, steps
        self._ranks: dict[int, _Rank] = {}

    @property
    def skew(self) -> float:
        """The slowest rank's average over the median of all; 1 if fewer than two are known."""
        averages = [rank.average for rank in self._ranks.values() if rank.average is not None]
        middle = statistics.median(averages) if averages else 0.0
        return max(averages) / middle if len(averages) > 1 and middle > 0 else 1.0

    def hear(self, rank: int, steps_done: int, own_seconds: float) -> Straggler | None:
        """Take in a rank's steps and its own work on them, both counted since it started: `own_seconds` is the sum over its steps, so a
        lost beat loses nothing. Returns the beginning or the end of an episode, each once; else None."""
        known = self._ranks.get(rank)
        if known is None:
            self._ranks[rank] = _Rank(steps_done=steps_done, total_seconds=own_seconds)
            return None
        new = steps_done - known.steps_done
        if new <= 0:
            return None
        each = max(0.0, own_seconds - known.total_seconds) / new
        known.steps_done, known.total_seconds = steps_done, own_seconds
        kept = _KEPT**new
        known.average = each if known.average is None else kept * known.average + (1 - kept) * each
        others = [other.average for number, other in self._ranks.items() if number != rank and other.average is not None]
        if len(others) < self._world_size - 1 or not others:
            return None
        middle = statistics.median(others)
        said = Straggler(rank=rank, begins=True, steps_done=steps_done, own_seconds=known.average, others_seconds=middle)
        if middle <= 0 or known.average <= self._ratio * middle:
            known.slow_since = None
            if known.is_reported and middle > 0:
                known.is_reported = False
                return Straggler(rank=rank, begins=False, steps_done=steps_done, own_seconds=known.average, others_seconds=middle)
            return None
        if known.slow_since is None:
            known.slow_since = steps_done
        if known.is_reported or steps_done - known.slow_since < self._needed:
            return None
        known.is_reported = True
        return said
