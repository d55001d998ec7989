"""The loop around one run's attempts: run, decide, retry or raise. Called by trainer/drive/drive.py; `failures.decide` makes the
decisions."""

import time
from collections.abc import Callable
from dataclasses import replace

from cluster.config import FaultPolicy
from cluster.failures import Failure, FailureCounts, Raise, Retry, counted, decide


class RunFailed(Exception):
    """The policy gave up. `failure` is the cause, `reason` why it was not retried."""

    def __init__(self, failure: Failure, *, reason: str, attempts: int) -> None:
        where = f"rank {failure.rank}: " if failure.rank is not None else ""
        super().__init__(f"{where}{failure.message}\nnot retried: {reason}")
        self.failure, self.reason, self.attempts = failure, reason, attempts


def run_attempts(
    attempt: Callable[[int], Failure | None],
    *,
    first_attempt: int,
    committed_step: Callable[[], int],
    policy: FaultPolicy,
    on_failure: Callable[[int, Failure, FailureCounts], None],
    on_skip: Callable[[int, Failure], None] = lambda step, failure: None,
    counts: FailureCounts | None = None,
    stopping: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run `attempt(number)` until it returns None; returns the number of restarts. Raises RunFailed when the policy says so.

    `committed_step()` is the newest commit's step (-1: none): only commits survive, so they measure progress.
    A failure while `stopping()` ends the loop: the user asked for the end, and the commits are kept.
    `counts` is what earlier drivers of the run left (failures.counts_of). `on_skip(step, failure)` is called before the next attempt with a
    step whose batch all later attempts must leave out.
    """
    counts = counts or FailureCounts()
    number = first_attempt
    before = committed_step()
    while (failure := attempt(number)) is not None:
        now = committed_step()
        counts = counted(counts, failure, progressed=now > before)
        before = now
        on_failure(number, failure, counts)
        if stopping():
            break
        match decide(failure, counts, policy):
            case Raise(reason=reason):
                raise RunFailed(failure, reason=reason, attempts=number - first_attempt + 1)
            case Retry(delay_seconds=seconds, skip_step=step):
                if step is not None:
                    on_skip(step, failure)
                    counts = replace(counts, skipped=counts.skipped | {step})
                sleep(seconds)
        number += 1
    return number - first_attempt
