"""Claims about run_attempts, with attempts that are plain functions."""

from collections.abc import Callable

import pytest

from cluster.config import FaultPolicy
from cluster.controller import RunFailed, run_attempts
from cluster.failures import Failure, FailureCounts, Raise, decide

LOST = Failure(kind="infrastructure", rank=1, message="worker killed")
BUG = Failure(kind="user", rank=0, message="ZeroDivisionError: division by zero", traceback="Traceback ...")


def drive(outcomes: list[tuple[int, Failure | None]], policy: FaultPolicy | None = None, stopping: Callable[[], bool] = lambda: False):
    """Run attempts whose outcomes are (step committed by then, failure); what happened."""
    committed, seen, slept = [-1], [], []

    def attempt(number: int) -> Failure | None:
        step, failure = outcomes[number - 1]
        committed[0] = step
        return failure

    def on_failure(number: int, failure: Failure, counts: FailureCounts) -> None:
        seen.append((number, failure.kind, counts))

    restarts = run_attempts(
        attempt,
        first_attempt=1,
        committed_step=lambda: committed[0],
        policy=policy or FaultPolicy(),
        on_failure=on_failure,
        stopping=stopping,
        sleep=slept.append,
    )
    return restarts, seen, slept


def test_an_attempt_that_ends_well_is_the_only_one() -> None:
    assert drive([(10, None)]) == (0, [], [])


def test_a_lost_worker_is_retried_and_told() -> None:
    restarts, seen, _ = drive([(5, LOST), (10, None)])
    assert restarts == 1
    assert seen == [(1, "infrastructure", FailureCounts(failures=1, without_progress=0))]


def test_a_users_exception_is_raised_with_its_traceback() -> None:
    with pytest.raises(RunFailed, match="division by zero") as caught:
        drive([(5, BUG), (10, None)])
    assert caught.value.failure.traceback == "Traceback ..."
    assert caught.value.attempts == 1


def test_progress_between_failures_resets_the_crash_loop_count() -> None:
    policy = FaultPolicy(max_failures=100, max_failures_without_progress=2)
    restarts, _, _ = drive([(step, LOST) for step in range(1, 20)] + [(20, None)], policy)
    assert restarts == 19


def test_a_crash_loop_stops_with_its_cause() -> None:
    policy = FaultPolicy(max_failures=100, max_failures_without_progress=3, backoff_seconds=1.0)
    with pytest.raises(RunFailed, match="crash loop") as caught:
        drive([(5, LOST)] * 10, policy)
    assert caught.value.attempts == 4  # the first one made progress, then three in a row did not
    assert "worker killed" in str(caught.value)


def test_a_failure_while_stopping_ends_the_run_without_a_retry() -> None:
    restarts, seen, slept = drive([(5, LOST), (10, None)], stopping=lambda: True)
    assert (restarts, len(seen), slept) == (0, 1, [])


def test_a_bad_batch_is_told_before_the_next_attempt_and_never_twice() -> None:
    told: list[object] = []
    skip: set[int] = set()

    def attempt(number: int) -> Failure | None:
        told.append(("attempt", number, frozenset(skip)))
        bad = [step for step in (10, 25) if step not in skip]
        return Failure(kind="numbers", rank=0, message="NaN", step=bad[0]) if bad else None

    def on_skip(step: int, failure: Failure) -> None:
        told.append(("skip", step, failure.message))
        skip.add(step)

    restarts = run_attempts(
        attempt,
        first_attempt=4,
        committed_step=lambda: 5,
        policy=FaultPolicy(max_rollbacks=2),
        on_failure=lambda number, failure, counts: told.append(("failed", number, counts.rollbacks)),
        on_skip=on_skip,
        sleep=lambda seconds: None,
    )
    assert restarts == 2
    assert told == [
        ("attempt", 4, frozenset()),
        ("failed", 4, 1),
        ("skip", 10, "NaN"),
        ("attempt", 5, {10}),
        ("failed", 5, 2),
        ("skip", 25, "NaN"),
        ("attempt", 6, {10, 25}),
    ]


@pytest.mark.parametrize("step", [0, 30])
def test_a_batch_that_is_not_worth_another_try_is_not_left_out(step: int) -> None:
    """The first step, and a budget that earlier drivers have used up."""
    failure = Failure(kind="numbers", rank=0, message="NaN", step=step)
    earlier = FailureCounts(rollbacks=3, skipped=frozenset({1, 2, 3}))
    assert isinstance(decide(failure, FailureCounts(rollbacks=4), FaultPolicy()), Raise)
    with pytest.raises(RunFailed, match=r"lower --optim\.lr"):
        run_attempts(
            lambda number: failure,
            first_attempt=1,
            committed_step=lambda: 5,
            policy=FaultPolicy(max_rollbacks=3),
            on_failure=lambda number, failure, counts: None,
            on_skip=lambda step, failure: pytest.fail("left out"),
            counts=earlier,
        )
