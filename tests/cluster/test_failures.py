"""Claims about classify, root_cause and decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import FaultPolicy
from cluster.failures import Failure, History, Raise, Retry, classify, decide, root_cause


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("ActorDiedError", "The actor died unexpectedly", "infrastructure"),
        ("WorkerHealthCheckFailedError", "worker gone", "infrastructure"),
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242", "infrastructure"),
        ("DistBackendError", "NCCL communicator was aborted on rank 1", "infrastructure"),
        ("RuntimeError", "shape '[3]' is invalid for input of size 4", "user"),
        ("ZeroDivisionError", "division by zero", "user"),
        ("TooManyBadSamples", "7 of 100 samples are bad", "data"),
        ("CorruptShard", "train-00000.parquet: row group 3", "data"),
        ("PreemptionError", "node is drained", "preempted"),
    ],
)
def test_an_exception_is_told_by_what_it_means_for_a_retry(name: str, message: str, kind: str) -> None:
    assert classify(name, message).kind == kind


def test_a_subclass_counts_as_its_base() -> None:
    assert classify("MyTooManyBadSamples", "bad", bases=("TooManyBadSamples", "ValueError")).kind == "data"


def test_the_cause_is_the_user_error_not_the_broken_connection_it_left_behind() -> None:
    echo = classify("RuntimeError", "Connection closed by peer", rank=0)
    dead = classify("ActorDiedError", "killed", rank=1)
    user = classify("ZeroDivisionError", "division by zero", rank=2)
    assert root_cause([echo, dead]) == dead
    assert root_cause([echo, dead, user]) == user
    assert root_cause([echo]) == echo


@given(st.sampled_from(["user", "data"]), st.integers(0, 100), st.integers(0, 100))
def test_user_and_data_errors_are_never_retried(kind: str, failures: int, without_progress: int) -> None:
    failure = Failure(kind=kind, rank=0, message="m")  # type: ignore[arg-type]
    assert isinstance(decide(failure, History(failures=failures, without_progress=without_progress), FaultPolicy()), Raise)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 10), st.integers(1, 10))
def test_retries_end_within_both_budgets(failures: int, without_progress: int, budget: int, in_a_row: int) -> None:
    policy = FaultPolicy(max_failures=budget, max_failures_without_progress=in_a_row)
    failure = Failure(kind="infrastructure", rank=0, message="m")
    decision = decide(failure, History(failures=failures, without_progress=without_progress), policy)
    assert isinstance(decision, Raise) == (failures > budget or without_progress >= in_a_row)
    if isinstance(decision, Retry):
        assert 0 <= decision.delay_seconds <= 30


def test_the_first_failure_is_retried_at_once_and_repeats_wait_longer() -> None:
    policy = FaultPolicy(max_failures=100, max_failures_without_progress=100, backoff_seconds=1.0)
    failure = Failure(kind="infrastructure", rank=0, message="m")
    delays = [decide(failure, History(failures=n, without_progress=n), policy) for n in (1, 2, 3, 4, 20)]
    assert delays == [Retry(delay_seconds=seconds) for seconds in (0.0, 1.0, 2.0, 4.0, 30.0)]
