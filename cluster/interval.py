"""Chooses how many steps lie between checkpoints: enough that saving costs little, few enough that a failure costs little. It uses Young's
and Daly's formula with this run's measured checkpoints, steps and failures.

trainer/rank/saving.py asks `SharedInterval` after which steps to save, the same on all ranks. trainer/drive/plan.py uses `steps_between`,
trainer/drive/attempt.py `observed_failures`.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # the driver needs only steps_between and observed_failures, and no torch
    import torch
    import torch.distributed as dist
    from torch import Tensor

AUTO = -1
"""Value of `train.checkpoint_every` that leaves the interval to IntervalChooser."""
FIRST_STEPS = 50
"""Steps before an automatic run's first checkpoint, before anything is measured."""
DEFAULT_STEPS = 500
MAX_STALL = 0.01
"""Largest fraction of the time that checkpoints may take."""
_WINDOW = 20
_MAY_BE_FAILURES = ("attempt_failed", "attempt_paused")
_ENDS = (*_MAY_BE_FAILURES, "run_finished", "run_stopped", "run_failed", "run_taken_over")


def steps_between(every: int, steps_per_epoch: int) -> int | None:
    """`train.checkpoint_every` in steps: 0 means one per epoch, and at least one every 500 steps. None if AUTO leaves it to
    measurements."""
    return None if every == AUTO else every or min(steps_per_epoch, DEFAULT_STEPS)


def optimal_interval_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """The seconds of work between checkpoints that lose the least time, if each checkpoint costs `stall_seconds` and failures come every
    `mtbf_seconds` on average. Daly's higher-order estimate (J. T. Daly 2006, "A higher order estimate of the optimum checkpoint interval
    for restart dumps"), whose first term is Young's sqrt(2 * stall * mtbf)."""
    if not (stall_seconds >= 0 and mtbf_seconds > 0):
        raise ValueError(f"stall_seconds={stall_seconds} must be at least 0 and mtbf_seconds={mtbf_seconds} above 0")
    if stall_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    x = stall_seconds / (2 * mtbf_seconds)
    return max(0.0, math.sqrt(2 * stall_seconds * mtbf_seconds) * (1 + math.sqrt(x) / 3 + x / 9) - stall_seconds)


def mean_time_between_failures(prior_seconds: float, observed_seconds: float, failures: int) -> float:
    """Combines the prior, weighted as one failure, with the observations: (prior + observed) / (1 + failures)."""
    return (prior_seconds + observed_seconds) / (1 + failures)


class IntervalChooser:
    """Proposes the number of steps between checkpoints from one rank's measurements.

    `mtbf_hours` is the prior for one worker: W workers fail W times as often. `failures` and `observed_seconds` are the run's until now
    (`observed_failures`); `stepped` counts on from there.
    """

    def __init__(
        self, *, workers: int, steps_per_epoch: int, mtbf_hours: float = 24.0, failures: int = 0, observed_seconds: float = 0.0
    ) -> None:
        assert workers >= 1
        assert steps_per_epoch >= 1
        self._prior_seconds, self._failures, self._observed_seconds = mtbf_hours * 3600 / workers, failures, observed_seconds
        self._steps_per_epoch = steps_per_epoch
        self._stalls: deque[float] = deque(maxlen=_WINDOW)
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._writes: deque[float] = deque(maxlen=_WINDOW)

    def stepped(self, seconds: float) -> None:
        """A step took `seconds`, including the wait for data."""
        self._steps.append(seconds)
        self._observed_seconds += seconds

    def saved(self, stall_seconds: float) -> None:
        """A checkpoint blocked the steps for `stall_seconds`."""
        self._stalls.append(stall_seconds)

    def staged(self, seconds: float) -> None:
        """A checkpoint was staged in the background for `seconds`. Safe to call from another thread."""
        self._writes.append(seconds)

    @property
    def mtbf_seconds(self) -> float:
        """Estimate for the whole run at this point."""
        return mean_time_between_failures(self._prior_seconds, self._observed_seconds, self._failures)

    def propose(self) -> int:
        """Steps between checkpoints, from 1 to one epoch. Large enough that stalls take at most 1 % of the time and that a checkpoint is
        finished before the next begins. An epoch's end always has a checkpoint."""
        if not self._stalls or not self._steps:
            return min(FIRST_STEPS, self._steps_per_epoch)
        step_seconds = max(statistics.median(self._steps), 1e-9)
        stall_seconds = statistics.median(self._stalls)
        writes = list(self._writes)
        wanted = optimal_interval_seconds(stall_seconds, self.mtbf_seconds)
        least = max(stall_seconds * (1 - MAX_STALL) / MAX_STALL, statistics.median(writes) if writes else 0.0)
        return max(1, min(math.ceil(max(wanted, least) / step_seconds), self._steps_per_epoch))


def observed_failures(events: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """(failures, seconds in which attempts ran) from a run's journal: what an IntervalChooser starts from. It counts the failures that
    checkpoints help against: lost processes, preemptions (announced or not), hangs, a dead driver. An attempt without an end in the
    journal lasts until the last event before the next one."""
    failures, seconds = 0, 0.0
    began: float | None = None
    newest = 0.0
    for event in events:
        name, now = event["event"], float(event["time"])
        if name == "run_started":
            if began is not None:
                seconds += newest - began
                failures += 1  # the previous driver died with its attempt
            began = None
        elif name == "attempt_started":
            if began is not None:
                seconds += newest - began
            began = now
        elif began is not None and name in _ENDS:
            seconds += now - began
            began = None
            failures += name in _MAY_BE_FAILURES and event.get("kind") in ("infrastructure", "preempted", "hang")
        newest = now
    return failures, seconds + (newest - began if began is not None else 0.0)


class SharedInterval:
    """Decides after which steps to save: every `every` steps, or, with AUTO, as rank 0's chooser proposes.

    All ranks must save after the same steps. Rank 0 broadcasts its proposal right after a save, which all ranks reach, and they read it
    when the next step is done. It has long arrived by then, so nobody waits for it.
    """

    def __init__(
        self,
        every: int,
        *,
        start_step: int,
        steps_per_epoch: int,
        chooser: IntervalChooser | None = None,
        world_size: int = 1,
        device: "torch.device | None" = None,
        group: Any = None,
    ) -> None:
        """`every`: as train.checkpoint_every. `chooser`: with AUTO, rank 0's; other ranks have none. `start_step`: steps done when this
        attempt began."""
        self._every = steps_between(every, steps_per_epoch)
        self._chooser, self._world_size, self._device, self._group = chooser, world_size, device, group
        self._saved_at = start_step
        self._steps = min(FIRST_STEPS, steps_per_epoch)
        self._coming: tuple[Tensor, dist.Work] | None = None
        self._aside = _side_stream(device) if device is not None and device.type == "cuda" else None

    @property
    def steps(self) -> int:
        """Steps between checkpoints, as far as this rank knows."""
        return self._every or self._steps

    def due(self, steps_done: int) -> bool:
        """Whether to save now. Call it after every step, on all ranks."""
        if self._every is not None:
            return steps_done % self._every == 0
        if self._coming is not None and steps_done > self._saved_at:
            self._steps, self._coming = self._read(*self._coming), None
        return steps_done - self._saved_at >= self._steps

    def saved(self, steps_done: int) -> None:
        """All ranks took a checkpoint after `steps_done` steps, for whatever reason; the next interval starts here."""
        self._saved_at = steps_done
        if self._every is not None:
            return
        proposal = self._chooser.propose() if self._chooser is not None else 0
        if self._world_size == 1:
            assert self._chooser is not None, "rank 0 has no chooser"
            self._steps = proposal
            return
        import torch
        import torch.distributed as dist

        value = torch.full((), proposal, dtype=torch.int64, device=self._device)  # not tensor(), which would wait for a GPU
        self._coming = (value, cast(dist.Work, dist.broadcast(value, src=0, group=self._group, async_op=True)))

    def _read(self, value: "Tensor", work: "dist.Work") -> int:
        if self._aside is None:
            work.wait()
            return int(value)
        import torch

        with torch.cuda.stream(self._aside):  # waits for the broadcast, which follows the saved step, and not for the step after it
            work.wait()
            return int(value)


def _side_stream(device: "torch.device") -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
