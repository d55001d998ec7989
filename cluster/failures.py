"""Classifies failures and decides what to do about them: pure functions over small values.

A rank describes its exception with `described`. `launch` turns that into a `Failure` with `classify`, and a dead process with
`exit_failure`. `controller` counts with `counted`, asks `decide` and acts. Nothing here sleeps, retries or prints.

Our own exception classes declare what they mean for a retry, in the class attribute `failure_kind`, one of Kind. This also holds for
classes in dataio and trainer, which this module does not import; an instance may have its own. Foreign exceptions (torch, Ray, pyarrow,
DALI, Python, the operating system) have rows in the table of foreign.py.
"""

import signal
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import FaultPolicy
from cluster.foreign import Row, row_of
from cluster.names import KINDS as KINDS
from cluster.names import Kind as Kind

# Signals whose cause is worth explaining.
_SIGNALS = {
    signal.SIGKILL: "by hand, or by the kernel for want of memory",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "a crash in native code, a failing memory or a full /dev/shm",
    signal.SIGABRT: "native code gave up; its last words are on stderr",
    signal.SIGILL: "native code for another kind of CPU",
    signal.SIGFPE: "a crash in native code",
}


class BadNumbers(ArithmeticError):
    """A step produced numbers from which training cannot continue. `step`: the step whose batch to leave out; `loss`: its value."""

    failure_kind = "numbers"

    def __init__(self, step: int, loss: float, reason: str) -> None:
        super().__init__(step, loss, reason)
        self.step, self.loss, self.reason = step, loss, reason

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


class WeightsDiffer(ArithmeticError):
    """After `steps_done` steps the ranks' weights are not bit-identical. `ranks` differ from the majority; without a majority, all are
    named."""

    failure_kind = "numbers"

    def __init__(self, steps_done: int, ranks: tuple[int, ...], hashes: tuple[int, ...]) -> None:
        super().__init__(steps_done, ranks, hashes)
        self.steps_done, self.ranks, self.hashes = steps_done, ranks, hashes

    def __str__(self) -> str:
        hashes = ", ".join(f"rank {rank} {value & (1 << 64) - 1:016x}" for rank, value in enumerate(self.hashes))
        named = ", ".join(map(str, self.ranks))
        if len(self.ranks) == len(self.hashes):
            who = f"the weights of ranks {named} differ, and no majority says which are right"
        else:
            who = f"the weights of rank{'s' if len(self.ranks) > 1 else ''} {named} differ from the others'"
        return f"after {self.steps_done} steps {who}: {hashes}"


class CheckpointNotSaved(OSError):
    """The last checkpoint of an attempt could not be saved, so that its last steps would be lost. It is infrastructure, and those steps
    are done again, unless the storage has refused it and would refuse it again (`is_refused`)."""

    failure_kind: Kind = "infrastructure"

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        if is_refused:
            self.failure_kind = "storage"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankError:
    """An exception in a form that can travel: what can be said about it where its class cannot be imported."""

    name: str
    bases: tuple[str, ...]
    """Names of its base classes, each after its top package unless it is Python's own: "torch.DistError", "RuntimeError"."""
    message: str
    """Begins with the class's name."""
    traceback: str
    package: str = ""
    """The class's top package; "" if it is Python's own."""
    errno: int | None = None
    """An OSError's number."""
    failure_kind: Kind | None = None
    """What the exception declares; None for a foreign one."""
    step: int | None = None
    """For BadNumbers only."""
    cause: "RankError | None" = None
    """What it was raised from, explicitly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why an attempt ended early."""

    kind: Kind
    rank: int | None
    message: str
    traceback: str = ""
    step: int | None = None
    """For bad numbers: the step whose batch caused them. None if no batch is to blame, as with weights that differ between ranks."""
    fix: str = ""
    """What the user can do, if the message does not say it."""
    is_explained: bool = False
    """Message and fix say what happened: a traceback adds nothing."""
    is_echo: bool = False
    """It says that another process is gone, whose own failure is the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureCounts:
    """Failures of this run so far, one count for each budget of the policy."""

    failures: int = 0
    """Attempts lost to infrastructure, including this one."""
    preemptions: int = 0
    hangs: int = 0
    rollbacks: int = 0
    """Attempts ended by wrong numbers, including this one; batches that earlier drivers of the run left out count too."""
    skipped: frozenset[int] = frozenset()
    """Steps whose batches have been left out since."""
    without_progress: int = 0
    """Attempts in a row, including this one, that were lost to infrastructure or a hang without a new commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Try again after `delay_seconds`, from the newest commit, without the batch of `skip_step` if it is set."""

    delay_seconds: float
    skip_step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Raise:
    reason: str


_MOST_CAUSES = 8


def described(error: BaseException, *, _depth: int = 0) -> RankError:
    """Describe `error`. Its `failure_kind` counts only if it is one of Kind, because a foreign class may have an attribute of that name."""
    kind = getattr(error, "failure_kind", None)
    preempted = _package(type(error)) == "ray" and getattr(error, "preempted", False) is True
    cause = error.__cause__ if _depth < _MOST_CAUSES else None
    number = error.errno if isinstance(error, OSError) else None
    return RankError(
        name=type(error).__name__,
        bases=tuple(_qualified(base) for base in type(error).__mro__[1:]),
        message=f"{type(error).__name__}: {error}",
        traceback="" if _depth else "".join(traceback.format_exception(error)).strip(),
        package=_package(type(error)),
        errno=number if isinstance(number, int) else None,
        failure_kind="preempted" if preempted else kind if kind in KINDS else None,
        step=error.step if isinstance(error, BadNumbers) else None,
        cause=described(cause, _depth=_depth + 1) if cause is not None else None,
    )


def is_refusal(error: BaseException) -> bool:
    """Whether the storage, a disk or credentials refuse for good what `error` reports: a retry would meet it again."""
    return classify(described(error)).kind == "storage"


def _package(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    return "" if package == "builtins" else package


def _qualified(kind: type) -> str:
    return f"{package}.{kind.__name__}" if (package := _package(kind)) else kind.__name__


def classify(error: RankError, rank: int | None = None) -> Failure:
    """The failure behind an exception on `rank`. An exception that nobody knows means what the one means that it was raised from; if
    nobody knows that either, it is the user's."""
    failure = Failure(kind="user", rank=rank, message=error.message.strip() or error.name, traceback=error.traceback, step=error.step)
    told: RankError | None = error
    while told is not None:
        if told.failure_kind is not None:
            return replace(failure, kind=told.failure_kind, is_explained=told is error)
        if (row := _row(told)) is not None:
            explained = row.kind != "user" or row.is_explained
            return replace(failure, kind=row.kind, fix=row.fix, is_echo=row.is_echo, is_explained=explained)
        told = told.cause
    return failure


def _row(error: RankError) -> Row | None:
    own = f"{error.package}.{error.name}" if error.package else error.name
    return row_of({own, *error.bases}, error.errno, error.message)


def unwrapped(error: BaseException) -> tuple[BaseException, str]:
    """What Ray's wrappers hold, and the traceback that they quote: the exception of a task, of a worker's function, of a health check,
    of the controller. Known by their attributes: this module does not import Ray."""
    quoted = ""
    for _ in range(_MOST_CAUSES):
        inside = getattr(error, "_base_exc", None)
        quoted = quoted or str(getattr(error, "_traceback_str", ""))
        if inside is None and hasattr(error, "as_instanceof_cause"):  # RayTaskError
            quoted = quoted or str(error)
            inside = getattr(error, "cause", None)
        if inside is None:
            inside = getattr(error, "controller_failure", None) or getattr(error, "health_check_failure", None)
        if not isinstance(inside, BaseException) or inside is error:
            break
        error = inside
    return error, quoted


def sentence_of(error: BaseException) -> str | None:
    """What a driver that ends by `error` says instead of a traceback: what was lost or refused, and what to do. None if the exception is
    no known failure of the cluster or the storage, so that its traceback, or its own words, are what helps."""
    cause, _ = unwrapped(error)
    told = described(cause)
    failure = classify(told)
    if failure.kind not in ("infrastructure", "preempted", "hang", "storage"):
        return None
    words = failure.message.splitlines()[0].rstrip(" .:")
    if told.failure_kind is not None:  # ours: the sentence is whole without its class's name
        words = words.removeprefix(f"{told.name}: ")
    if told.package == "ray" or any(base.startswith("ray.") for base in told.bases):
        words = f"Ray is lost, or a process of Ray's that this run needs ({words})"
    return f"{words}; {_mended(failure.fix)}{AGAIN}"


def exit_failure(rank: int | None, exit_code: int) -> Failure:
    """The failure of a process that ended without a reported exception. `exit_code` follows subprocess: -N for signal N."""
    if exit_code < 0:
        try:
            name, why = signal.Signals(-exit_code).name, _SIGNALS.get(signal.Signals(-exit_code), "")
        except ValueError:  # a real-time signal has no name
            name, why = f"signal {-exit_code}", ""
        message = f"killed ({name})" + (f": {why}" if why else "")
    elif exit_code > 0:
        message = f"ended with exit status {exit_code} and no exception: os._exit or a native library's exit()"
    else:
        message = "ended with exit status 0 before its work was done"
    return Failure(kind="infrastructure", rank=rank, message=message)


def root_cause(failures: list[Failure]) -> Failure:
    """The failure of several ranks that explains the others. A data or user error, a storage that refuses or wrong numbers come before a
    dead process, and a dead process before the broken connections it left behind; among equals the lowest rank wins."""
    assert failures

    def weight(failure: Failure) -> tuple[int, int]:
        order = {"data": 0, "user": 1, "storage": 2, "numbers": 3, "preempted": 4, "hang": 5, "infrastructure": 6}[failure.kind]
        return order + failure.is_echo, failure.rank if failure.rank is not None else 1 << 30

    return min(failures, key=weight)


def counted(counts: FailureCounts, failure: Failure, *, progressed: bool) -> FailureCounts:
    """`counts` with `failure` added. `progressed`: the newest commit is newer than before the attempt.

    Neither a preemption, which is nobody's fault, nor wrong numbers, which have their own budget, add to the attempts without progress."""
    without_progress = 0 if progressed else counts.without_progress + (failure.kind in ("infrastructure", "hang"))
    return replace(
        counts,
        failures=counts.failures + (failure.kind == "infrastructure"),
        preemptions=counts.preemptions + (failure.kind == "preempted"),
        hangs=counts.hangs + (failure.kind == "hang"),
        rollbacks=counts.rollbacks + (failure.kind == "numbers"),
        without_progress=without_progress,
    )


def decide(failure: Failure, counts: FailureCounts, policy: FaultPolicy) -> Retry | Raise:
    """Decide between retrying and raising; `counts` already includes `failure`. A user's or data error is raised at once: the same code
    on the same data fails again. So is a refusal by the storage: somebody must mend it first."""
    match failure.kind:
        case "user":
            met = "the training code raised an exception, which a retry would meet again"
            if failure.is_explained:
                met = "a retry would meet it again"
            return Raise(reason=met + (f"; {failure.fix}" if failure.fix else ""))
        case "storage":
            return Raise(reason=f"the storage refuses, and would refuse a retry too; {_mended(failure.fix or 'mend it')}{AGAIN}")
        case "data":
            return Raise(reason="the data are outside their limit, which a retry would meet again")
        case "preempted":
            if counts.preemptions > policy.max_preemptions:
                return _spent("preemptions", counts.preemptions, "max_preemptions", policy.max_preemptions, f"{AGAIN} {_OTHER_NODES}")
            return Retry(delay_seconds=0.0)
        case "numbers":
            return _decide_numbers(failure, counts, policy)
        case "infrastructure":
            if counts.failures > policy.max_failures:
                return _spent("attempts failed", counts.failures, "max_failures", policy.max_failures, f"mend the cluster, then {AGAIN}")
        case "hang":
            if counts.hangs > policy.max_hangs:
                fix = f"see the stacks of all ranks in the run's journal.jsonl, mend what hangs, then {AGAIN}"
                return _spent("attempts hung", counts.hangs, "max_hangs", policy.max_hangs, fix)
    if counts.without_progress >= policy.max_failures_without_progress:
        return Raise(
            reason=f"{counts.without_progress} attempts in a row committed nothing new "
            f"(cluster.faults.max_failures_without_progress={policy.max_failures_without_progress}): a crash loop; "
            f"see the first failure above, {failure.fix and failure.fix + ', '}or checkpoint more often with --train.checkpoint-every"
        )
    repeats = max(0, counts.without_progress - 1)
    return Retry(delay_seconds=0.0 if repeats == 0 else min(30.0, policy.backoff_seconds * 2 ** (repeats - 1)))


AGAIN = "give the same command again: the run goes on from its newest checkpoint"
"""What to do once the cause is mended."""
_OTHER_NODES = "(on nodes that stay longer, or with a larger --cluster.faults.max-preemptions)"
_CALMER = (
    "try a lower --optim.lr, --optim.clip-norm 1, a longer --optim.warmup-steps or --train.precision fp32, as a new run (--run NEW_NAME)"
)


def _mended(fix: str) -> str:
    return f"{fix}, then " if fix else ""


def _spent(what: str, count: int, key: str, limit: int, fix: str) -> Raise:
    return Raise(reason=f"{count} {what}, more than cluster.faults.{key}={limit}; {fix}")


def _decide_numbers(failure: Failure, counts: FailureCounts, policy: FaultPolicy) -> Retry | Raise:
    """Roll back, and leave out the bad batch. If another batch cannot help, say what might."""
    if failure.step == 0:
        return Raise(reason=f"the first step of the run is bad already, so that no checkpoint and no other batch helps; {_CALMER}")
    if failure.step in counts.skipped:
        return Raise(reason=f"the batch of step {failure.step} was left out already, and the step is bad again; {_CALMER}")
    if counts.rollbacks > policy.max_rollbacks:
        if failure.step is None:
            fix = "a rank named each time has a faulty memory, GPU or node: take it out, then " + AGAIN
        else:
            fix = f"the run diverges, whatever the batch: {_CALMER}"
        return _spent("times numbers were wrong", counts.rollbacks, "max_rollbacks", policy.max_rollbacks, fix)
    return Retry(delay_seconds=0.0, skip_step=failure.step)


# --- failures of earlier drivers, read from the run's journal -----------------------------------------------------------------------------


def counts_of(events: Iterable[Mapping[str, Any]]) -> FailureCounts:
    """What a new driver must know about the earlier ones: the batches left out. The other counts start at zero, because a person who
    runs the command again has dealt with the cluster."""
    skipped = skipped_steps(events)
    return FailureCounts(rollbacks=len(skipped), skipped=skipped)


def skipped_steps(events: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """Steps whose batches a run leaves out, from its `batch_skipped` events."""
    return frozenset(int(event["step"]) for event in events if event["event"] == "batch_skipped")
