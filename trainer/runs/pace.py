"""How fast a run does its steps, as it has measured itself: from its ranks' figures, or from the times in its journal. Called by watch,
which estimates the time left. Pure.

The settings are no help here: a step has fewer images than `data.batch_size` where an epoch's remainder is spread or the data are few, and
a run may have chosen the batch itself.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.runs.live import Figures


def steps_per_second(ranks: Sequence[Figures]) -> float | None:
    """Of the newest logged interval. A rank's images a second over the images that its steps have on average; the median of the ranks,
    since all of them do the same steps."""
    found = [
        said["images_per_second"] * said["steps_total"] / said["samples_total"]
        for said in ranks
        if said.get("images_per_second", 0) > 0 and said.get("steps_total", 0) > 0 and said.get("samples_total", 0) > 0
    ]
    return statistics.median(found) if found else None


def planned_steps(ranks: Sequence[Figures]) -> int | None:
    """The steps of the whole run, as the ranks know them."""
    return next((int(said["planned_steps"]) for said in ranks if said.get("planned_steps", 0) > 0), None)


class JournalPace:
    """The pace of the newest attempt by the events that name a step, testing and saving included."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        match event:
            case {"event": "attempt_started"}:
                self._first = self._last = None
            case {"event": "first_step" | "evaluation" | "checkpoint_committed", "step": int(step), "time": float(time) | int(time)}:
                self._first = self._first or (time, step)
                if step > (self._last or self._first)[1]:
                    self._last = (time, step)

    def remaining_seconds(self, total_steps: int, now: float) -> float | None:
        """None if no two events say how fast it is, or if it is late by its own pace."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        seconds = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        left = (total_steps - self._last[1]) * seconds - max(0.0, now - self._last[0])
        return left if left > 0 else None
