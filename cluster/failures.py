"""What went wrong, and what to do about it: pure functions over small values.

`launch` turns an exception into a `Failure` with `classify`; `controller` asks `decide` and acts. Nothing here sleeps, retries or prints.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.config import FaultPolicy

Kind = Literal["infrastructure", "preempted", "data", "user"]

# A collective's error says that a peer went away; the peer's own failure is the cause. Texts of gloo, NCCL and c10d's TCPStore.
_PEER_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "nccl communicator was aborted",
    "ncclremoteerror",
    "ncclsystemerror",
    "socket timeout",
    "timed out waiting",
    "the client socket has failed",
    "application timeout",
)
_RAY_LOST = frozenset(
    {
        "ActorDiedError",
        "ActorUnavailableError",
        "WorkerCrashedError",
        "NodeDiedError",
        "OutOfMemoryError",
        "WorkerHealthCheckTimeoutError",
        "WorkerHealthCheckFailedError",
        "ObjectLostError",
        "OwnerDiedError",
        "LocalRayletDiedError",
        "RaySystemError",
        "WorkerGroupStartupFailedError",
        "WorkerGroupStartupTimeoutError",
        "RaytrainWorkerDied",
        "CoordinatorLost",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why an attempt ended early."""

    kind: Kind
    rank: int | None
    message: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The failures of this run so far, as far as the policy cares."""

    failures: int = 0
    """Attempts lost to infrastructure, this one included."""
    without_progress: int = 0
    """Attempts in a row, this one included, after which the newest commit was the same as before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    delay_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Raise:
    reason: str


def classify(name: str, message: str, *, rank: int | None = None, traceback: str = "", bases: tuple[str, ...] = ()) -> Failure:
    """The failure that an exception of class `name` (with base classes `bases`) on `rank` stands for."""
    names = {name, *bases}
    text = message.lower()
    kind: Kind
    if names & {"TooManyBadSamples", "CorruptShard"}:
        kind = "data"
    elif names & {"PreemptionError", "ActorPreemptedError"}:
        kind = "preempted"
    elif names & _RAY_LOST or (names & {"RuntimeError", "DistBackendError", "DistNetworkError"} and any(t in text for t in _PEER_LOST)):
        kind = "infrastructure"
    else:
        kind = "user"
    return Failure(kind=kind, rank=rank, message=message.strip() or name, traceback=traceback)


def root_cause(failures: list[Failure]) -> Failure:
    """The failure of several ranks that explains the others: a user's or data error before a dead process, a dead process before the
    broken connections it left behind; the lowest rank of equals."""
    assert failures

    def weight(failure: Failure) -> tuple[int, int]:
        order = {"data": 0, "user": 1, "preempted": 2, "infrastructure": 3}[failure.kind]
        echo = failure.kind == "infrastructure" and any(t in failure.message.lower() for t in _PEER_LOST)
        return order + echo, failure.rank if failure.rank is not None else 1 << 30

    return min(failures, key=weight)


def decide(failure: Failure, history: History, policy: FaultPolicy) -> Retry | Raise:
    """Retry or raise. A user's or data error is raised at once: the same code on the same data fails again."""
    match failure.kind:
        case "user":
            return Raise(reason="the training code raised an exception, which a retry would meet again")
        case "data":
            return Raise(reason="the data are outside their limit, which a retry would meet again")
        case "preempted" | "infrastructure":
            pass
    if failure.kind == "infrastructure" and history.failures > policy.max_failures:
        return Raise(
            reason=f"{history.failures} attempts failed, more than cluster.faults.max_failures={policy.max_failures}; "
            "mend the cluster, then give the same command again: the run goes on from its newest checkpoint"
        )
    if history.without_progress >= policy.max_failures_without_progress:
        return Raise(
            reason=f"{history.without_progress} attempts in a row committed nothing new "
            f"(cluster.faults.max_failures_without_progress={policy.max_failures_without_progress}): a crash loop; "
            "see the first failure above, or checkpoint more often with --train.checkpoint-every"
        )
    repeats = max(0, history.without_progress - 1)
    return Retry(delay_seconds=0.0 if repeats == 0 else min(30.0, policy.backoff_seconds * 2 ** (repeats - 1)))
