"""Claims about classify, exit_failure, root_cause, counted and decide."""

import pickle
import signal
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import FaultPolicy
from cluster.failures import (
    BadNumbers,
    Failure,
    FailureCounts,
    Kind,
    Raise,
    RankError,
    Retry,
    WeightsDiffer,
    classify,
    counted,
    counts_of,
    decide,
    described,
    exit_failure,
    root_cause,
    skipped_steps,
)

KINDS: tuple[Any, ...] = get_args(Kind)


def foreign(name: str, message: str, *bases: str) -> RankError:
    """An exception of a class that is not ours; `name` begins with its package unless it is Python's."""
    package, _, own = name.rpartition(".")
    return RankError(name=own, bases=bases, message=message, traceback="", package=package)


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("ray.ActorDiedError", "The actor died unexpectedly", "infrastructure"),
        ("ray.WorkerHealthCheckFailedError", "worker gone", "infrastructure"),
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242", "infrastructure"),
        ("torch.DistBackendError", "NCCL communicator was aborted on rank 1", "infrastructure"),
        ("RuntimeError", "shape '[3]' is invalid for input of size 4", "user"),
        ("ZeroDivisionError", "division by zero", "user"),
        ("ray.PreemptionError", "node is drained", "preempted"),
        ("mine.ActorDiedError", "of somebody else's, called like Ray's", "user"),
        ("DataOutage", "of somebody else's, who says nothing", "user"),
    ],
)
def test_a_foreign_exception_is_told_by_its_name_and_text(name: str, message: str, kind: str) -> None:
    assert classify(foreign(name, message)).kind == kind
    assert classify(foreign("mine.Mine", message, name, "Exception")).kind == kind  # a subclass counts as its base


def test_what_a_foreign_class_calls_failure_kind_is_nothing_to_us() -> None:
    class Theirs(Exception):
        failure_kind = 7

    assert classify(described(Theirs("x"))).kind == "user"


def test_the_cause_is_the_user_error_not_the_broken_connection_it_left_behind() -> None:
    echo = classify(foreign("RuntimeError", "Connection closed by peer"), 0)
    dead = classify(foreign("ray.ActorDiedError", "killed"), 1)
    user = classify(foreign("ZeroDivisionError", "division by zero"), 2)
    assert root_cause([echo, dead]) == dead
    assert root_cause([echo, dead, user]) == user
    assert root_cause([echo]) == echo


@given(st.sampled_from(["user", "data", "storage"]), st.integers(0, 100), st.integers(0, 100))
def test_user_and_data_errors_and_refusals_are_never_retried(kind: str, failures: int, without_progress: int) -> None:
    failure = Failure(kind=kind, rank=0, message="m")  # type: ignore[arg-type]
    assert isinstance(decide(failure, FailureCounts(failures=failures, without_progress=without_progress), FaultPolicy()), Raise)


def test_a_reason_says_what_to_do_about_what_is_known_and_blames_the_code_for_the_rest() -> None:
    def reason(**facts: Any) -> str:
        decision = decide(Failure(rank=0, message="m", **facts), FailureCounts(failures=1, without_progress=3), FaultPolicy())
        assert isinstance(decision, Raise)
        return decision.reason

    again = "then give the same command again: the run goes on from its newest checkpoint"
    assert reason(kind="storage") == f"the storage refuses, and would refuse a retry too; mend it, {again}"
    assert reason(kind="storage", fix="free some space") == f"the storage refuses, and would refuse a retry too; free some space, {again}"
    assert reason(kind="user") == "the training code raised an exception, which a retry would meet again"
    assert reason(kind="user", is_explained=True, fix="lower it") == "a retry would meet it again; lower it"
    assert "see the first failure above, take it out, or checkpoint" in reason(kind="infrastructure", fix="take it out")
    assert "see the first failure above, or checkpoint" in reason(kind="infrastructure")


def travelled(error: Exception) -> Failure:
    """As the driver meets it: in words, through a pipe."""
    return classify(pickle.loads(pickle.dumps(described(error))), 0)


@given(step=st.integers(0, 2**62), loss=st.floats(), reason=st.text())
def test_the_bad_step_reaches_the_driver(step: int, loss: float, reason: str) -> None:
    error = BadNumbers(step, loss, reason)
    failure = travelled(error)
    assert (failure.kind, failure.step) == ("numbers", step)
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.reason, str(again)) == (step, reason, str(error))


@given(steps_done=st.integers(0, 10**6), hashes=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=9))
def test_weights_that_differ_blame_no_batch(steps_done: int, hashes: list[int]) -> None:
    error = WeightsDiffer(steps_done, (1,), tuple(hashes))
    failure = travelled(error)
    assert (failure.kind, failure.step) == ("numbers", None)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_message_names_the_rank_whose_weights_differ_and_all_hashes() -> None:
    assert str(WeightsDiffer(200, (1,), (5, -1, 5))) == (
        "after 200 steps the weights of rank 1 differ from the others': "
        "rank 0 0000000000000005, rank 1 ffffffffffffffff, rank 2 0000000000000005"
    )
    assert "the weights of ranks 0, 1 differ, and no majority says which are right" in str(WeightsDiffer(200, (0, 1), (5, 6)))


def test_wrong_numbers_are_the_cause_of_the_connections_that_break_with_their_rank() -> None:
    echo = classify(foreign("RuntimeError", "Connection closed by peer"), 0)
    bad = travelled(BadNumbers(3, float("nan"), "the loss is nan"))
    assert root_cause([echo, bad]) == bad
    dead, hung = exit_failure(1, -9), Failure(kind="hang", rank=2, message="no step for 60 s")
    assert root_cause([echo, dead, hung]) == hung


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM])
def test_a_process_ended_by_a_signal_is_infrastructure_and_named(number: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"], stderr=subprocess.DEVNULL)
    failure = exit_failure(3, done.returncode)
    assert (failure.kind, failure.rank) == ("infrastructure", 3)
    assert failure.message.startswith(f"killed ({number.name})")
    if number is signal.SIGKILL:
        assert failure.message == "killed (SIGKILL): by hand, or by the kernel for want of memory"


@given(st.integers(-200, 255))
def test_any_exit_without_an_exception_is_infrastructure(exit_code: int) -> None:
    failure = exit_failure(None, exit_code)
    assert failure.kind == "infrastructure"
    assert failure.message.startswith("killed (" if exit_code < 0 else f"ended with exit status {exit_code}")


# --- the policy -----------------------------------------------------------------------------------------------------------------------

policies = st.builds(
    FaultPolicy,
    max_failures=st.integers(0, 6),
    max_failures_without_progress=st.integers(1, 6),
    max_preemptions=st.integers(0, 6),
    max_hangs=st.integers(0, 6),
    max_rollbacks=st.integers(0, 6),
)
BUDGETS = {"infrastructure": "max_failures", "preempted": "max_preemptions", "hang": "max_hangs", "numbers": "max_rollbacks"}


def failed(kind: Any, step: int | None = None) -> Failure:
    return Failure(kind=kind, rank=0, message="m", step=step)


def drive(kinds: list[tuple[Any, bool]], policy: FaultPolicy, *, steps: bool = True) -> tuple[FailureCounts, Raise | None, int]:
    """(counts, why it gave up, failures met) of a run whose attempts end so: (kind, was there progress). Bad steps are new ones."""
    counts = FailureCounts()
    for number, (kind, progressed) in enumerate(kinds, start=1):
        failure = failed(kind, number if kind == "numbers" and steps else None)
        counts = counted(counts, failure, progressed=progressed)
        decision = decide(failure, counts, policy)
        if isinstance(decision, Raise):
            return counts, decision, number
        assert 0 <= decision.delay_seconds <= 30
        assert decision.skip_step == failure.step
    return counts, None, len(kinds)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=25, max_size=40), policies, st.booleans())
def test_any_sequence_of_failures_ends_within_the_sum_of_the_budgets(
    kinds: list[tuple[Any, bool]], policy: FaultPolicy, steps: bool
) -> None:
    budgets = policy.max_failures + policy.max_preemptions + policy.max_hangs + policy.max_rollbacks  # 24 at most
    _, raised, met = drive(kinds, policy, steps=steps)
    assert raised is not None
    assert met <= budgets + 1


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), max_size=40), policies)
def test_a_run_gives_up_for_the_first_budget_that_is_spent_and_says_which(kinds: list[tuple[Any, bool]], policy: FaultPolicy) -> None:
    counts, raised, met = drive(kinds, policy)
    seen = [kind for kind, _ in kinds[:met]]
    in_a_row = 0
    for index, (kind, progressed) in enumerate(kinds[:met]):
        in_a_row = 0 if progressed else in_a_row + (kind in ("infrastructure", "hang"))
        key = BUDGETS.get(kind)
        over = key is None or seen[: index + 1].count(kind) > getattr(policy, key)
        loops = kind in ("infrastructure", "hang") and in_a_row >= policy.max_failures_without_progress
        assert (raised is not None and index == met - 1) == (over or loops)
        if raised is not None and index == met - 1 and key is not None:
            named = f"cluster.faults.{key}={getattr(policy, key)};" if over else "max_failures_without_progress"
            assert named in raised.reason
    assert (counts.failures, counts.preemptions, counts.hangs, counts.rollbacks) == tuple(seen.count(kind) for kind in BUDGETS)


@given(st.lists(st.sampled_from(["preempted", "numbers"]), max_size=60), st.integers(1, 3))
def test_preemptions_and_wrong_numbers_are_no_crash_loop(kinds: list[str], in_a_row: int) -> None:
    policy = FaultPolicy(max_failures_without_progress=in_a_row, max_preemptions=100, max_rollbacks=100)
    counts, raised, _ = drive([(kind, False) for kind in kinds], policy)
    assert (raised, counts.failures, counts.without_progress) == (None, 0, 0)


def test_a_preemption_between_two_failures_does_not_hide_a_crash_loop() -> None:
    policy = FaultPolicy(max_failures=100, max_failures_without_progress=3)
    kinds = ["infrastructure", "preempted", "hang", "preempted", "infrastructure"]
    _, raised, met = drive([(kind, False) for kind in kinds], policy)
    assert met == 5
    assert raised is not None
    assert "crash loop" in raised.reason


@given(st.integers(1, 10**6), st.integers(0, 3))
def test_a_bad_batch_is_left_out(step: int, before: int) -> None:
    counts = FailureCounts(rollbacks=before, skipped=frozenset(range(-before, 0)))
    decision = decide(failed("numbers", step), counted(counts, failed("numbers", step), progressed=False), FaultPolicy(max_rollbacks=4))
    assert decision == Retry(delay_seconds=0.0, skip_step=step)


def test_wrong_numbers_that_no_other_batch_mends_say_what_may() -> None:
    policy = FaultPolicy(max_rollbacks=3)
    first = decide(failed("numbers", 0), FailureCounts(rollbacks=1), policy)
    again = decide(failed("numbers", 7), FailureCounts(rollbacks=2, skipped=frozenset({7})), policy)
    often = decide(failed("numbers", 9), FailureCounts(rollbacks=4), policy)
    for decision, cause in ((first, "the first step of the run"), (again, "step 7 was left out already"), (often, "max_rollbacks=3")):
        assert isinstance(decision, Raise)
        for words in (cause, "--optim.lr", "--optim.clip-norm", "--train.precision fp32"):
            assert words in decision.reason
    differ = decide(failed("numbers"), FailureCounts(rollbacks=4), policy)
    assert isinstance(differ, Raise)
    assert "faulty memory, GPU or node" in differ.reason


def test_a_new_driver_knows_the_batches_left_out_and_forgets_what_a_person_has_seen_to() -> None:
    events = [
        {"event": "run_started", "time": 1.0},
        {"event": "attempt_failed", "time": 2.0, "kind": "infrastructure"},
        {"event": "attempt_failed", "time": 3.0, "kind": "numbers"},
        {"event": "batch_skipped", "time": 3.5, "step": 40, "reason": "the loss is nan"},
        {"event": "batch_skipped", "time": 9.5, "step": 57, "reason": "a spike"},
    ]
    assert skipped_steps(events) == {40, 57}
    assert counts_of(events) == FailureCounts(rollbacks=2, skipped=frozenset({40, 57}))
    assert counts_of([]) == FailureCounts()


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 10), st.integers(1, 10))
def test_retries_end_within_both_budgets(failures: int, without_progress: int, budget: int, in_a_row: int) -> None:
    policy = FaultPolicy(max_failures=budget, max_failures_without_progress=in_a_row)
    failure = Failure(kind="infrastructure", rank=0, message="m")
    decision = decide(failure, FailureCounts(failures=failures, without_progress=without_progress), policy)
    assert isinstance(decision, Raise) == (failures > budget or without_progress >= in_a_row)
    if isinstance(decision, Retry):
        assert 0 <= decision.delay_seconds <= 30


def test_the_first_failure_is_retried_at_once_and_repeats_wait_longer() -> None:
    policy = FaultPolicy(max_failures=100, max_failures_without_progress=100, backoff_seconds=1.0)
    failure = Failure(kind="infrastructure", rank=0, message="m")
    delays = [decide(failure, FailureCounts(failures=n, without_progress=n), policy) for n in (1, 2, 3, 4, 20)]
    assert delays == [Retry(delay_seconds=seconds) for seconds in (0.0, 1.0, 2.0, 4.0, 30.0)]
