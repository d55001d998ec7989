"""Settings of the cluster: how many processes, where they run, and what happens when one fails. Read by cluster, set on the command line
(`--cluster.*`).

Each setting carries its rules in `Annotated`. docs/extending.md describes how to write them; trainer.settings.rules enforces them. None of
these settings changes what is computed, so a run may continue with different ones.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Interval, MinLen


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPolicy:
    """Failure budgets of one run, one for each kind. A user's exception, data outside their limit and a storage that refuses are never
    retried."""

    max_failures: Annotated[int, Ge(0), "0 gives up at the first failure"] = 8
    """Attempts lost to infrastructure (a killed worker, a lost node) before the run gives up."""
    max_failures_without_progress: Annotated[int, Ge(0)] = 3
    """Attempts in a row without a new commit: a crash loop."""
    max_preemptions: Annotated[int, Ge(0), "0 gives up at the first one"] = 64
    """Attempts ended by a preempted node before the run gives up; they are no failures and count in no other budget."""
    max_hangs: Annotated[int, Ge(0), "0 gives up at the first one"] = 3
    """Attempts ended because a rank hung."""
    max_rollbacks: Annotated[int, Ge(0), "0 gives up at the first NaN or spike"] = 3
    """How often a run may go back to a checkpoint for wrong numbers (NaN, a loss spike, weights that differ between ranks), over all its
    drivers."""
    backoff_seconds: Annotated[float, Ge(0)] = 1.0
    """Wait before the second attempt in a row without progress; doubles each time, up to 30 s."""
    straggler_ratio: Annotated[float, Gt(1), "1 is as fast as the others, 1.5 is the default"] = 1.5
    """A rank is a straggler when its own work on a step takes this many times the median of the others'..."""
    straggler_steps: Annotated[int, Ge(1), "20 is the default"] = 20
    """...for this many steps in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster, and everything else that is neither model nor data."""

    address: str = ""
    """A Ray cluster to join (`auto`, host:port, ray://...); empty uses RAY_ADDRESS, or starts a local Ray for this run."""
    allow_unauthenticated: bool = False
    """Join a Ray head that other machines can reach even if it asks for no token."""
    gpus_per_worker: Annotated[int, Ge(-1), "-1 takes one where there are GPUs"] = -1
    """-1 takes one where the cluster has GPUs and none elsewhere."""
    cpus_per_worker: Annotated[int, Ge(0), "0 shares the CPUs evenly"] = 0
    """0 shares the cluster's CPUs evenly among the workers."""
    threads_per_worker: Annotated[int, Ge(0), "0 takes the CPUs of a worker"] = 0
    """torch threads of a worker; part of the run's identity, as results depend on it. 0 takes the CPUs of a worker."""
    metrics_host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """Address on which metrics and service discovery listen."""
    discovery_port: Annotated[int, Interval(ge=0, le=65535), "0 takes a free port"] = 0
    """Port of Prometheus service discovery (http_sd), which the runs on a machine share; 0 takes a free one for this run alone and prints
    it."""
    metrics_namespace: str = ""
    """Prometheus's label `namespace`, which tells the runs of several users apart; empty takes the pod's in Kubernetes, and the user's name
    elsewhere."""
    keep_checkpoints: Annotated[int, Ge(2), "with one, a single damaged checkpoint would lose the run"] = 3
    """Committed checkpoints kept; at least 2, so that one bad checkpoint never loses the run."""
    heartbeat_seconds: Annotated[float, Interval(gt=0, le=2.0), "1 is the default; who is silent for 5 s is taken for lost"] = 1.0
    """How often a rank reports its position to the coordinator and gets orders, outside the step path; less often above 400 ranks. A
    rank's end and the agreement on a stop do not wait for it."""
    object_store_limit_bytes: Annotated[int, Ge(0)] = 2 << 30
    """A data set that only the driver can read is sent through Ray's object store up to this size."""
    hang_seconds: Annotated[float, Gt(0), "60 is the default"] = 60.0
    """Ranks that live but make no progress for this long (and for ten times their longest step) are killed, their stacks go into the
    journal, and the run continues from its newest checkpoint. Stopped processes (SIGSTOP) are detected after 5 s."""
    start_seconds: Annotated[float, Gt(0), "600 is the default"] = 600.0
    """The same limit for each part of the way to the first step: data, weights, process group, compiling. Decoding counts as progress."""
    placement_seconds: Annotated[float, Gt(0), "300 is the default"] = 300.0
    """How long the cluster may take to find room for the workers; with `--workers N:M`, for N of them."""
    grow_after_seconds: Annotated[float, Ge(0), "0 grows at once"] = 30.0
    """With `--workers N:M`: room for more workers must exist for this long before the run takes it, at its next commit. Choose less than
    an autoscaler's idle timeout."""
    preemption_notice: str = ""
    """A file on a node that announces that the node is about to go (a spot instance's hook creates it): the run commits and leaves the
    node."""
    mtbf_hours: Annotated[float, Gt(0), "24 is the default"] = 24.0
    """Expected hours between failures of one worker; `--train.checkpoint-every auto` starts from it and adapts to the failures it sees."""
    storage_retry_seconds: Annotated[float, Ge(0), "0 tries once"] = 20.0
    """How long a failing operation on a remote storage is retried before it counts as an outage."""
    spill_dir: str = ""
    """Folder on each node for checkpoints that the storage does not take now (an outage, expired keys, and, if the folder is on another
    disk, a full or stalled local storage), the newest two of each rank; empty uses a folder in the system's temporary directory."""
    stop_grace_seconds: Annotated[float, Ge(0)] = 60.0
    """Time that a stopped run has to commit; after it, the run stops anyway."""
    faults: FaultPolicy = field(default_factory=FaultPolicy)
