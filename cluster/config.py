"""How many processes, where, and what is done when one fails. Read by cluster, written by the command line (`--cluster.*`).

The rules of a setting stand beside it, in `Annotated`: docs/extending.md says how they are written, trainer.settings.rules keeps them.
None of these settings changes what is computed: a run may go on with other ones.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Interval, MinLen


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPolicy:
    """Budgets for failures of one run, one for each kind. A user's exception and data outside their limit are never retried."""

    max_failures: Annotated[int, Ge(0), "0 gives up at the first failure"] = 8
    """Attempts lost to infrastructure (a killed worker, a lost node) before the run gives up."""
    max_failures_without_progress: Annotated[int, Ge(0)] = 3
    """Attempts in a row that committed nothing new: a crash loop."""
    max_preemptions: Annotated[int, Ge(0), "0 gives up at the first one"] = 64
    """Attempts that a preempted node ended before the run gives up; they are no failures and count nowhere else."""
    max_hangs: Annotated[int, Ge(0), "0 gives up at the first one"] = 3
    """Attempts that were ended because a rank hung."""
    max_rollbacks: Annotated[int, Ge(0), "0 gives up at the first NaN or spike"] = 3
    """Times a run may go back to a checkpoint for wrong numbers (NaN, a loss spike, weights that differ between ranks), over all its
    drivers."""
    backoff_seconds: Annotated[float, Ge(0)] = 1.0
    """Wait before the second attempt in a row without progress; doubles each time, 30 s at most."""
    straggler_ratio: Annotated[float, Gt(1), "1 is as fast as the others, 1.5 is the default"] = 1.5
    """A rank is a straggler when its own work on a step takes this many times the median of the others'..."""
    straggler_steps: Annotated[int, Ge(1), "20 is the default"] = 20
    """...for this many steps in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster and everything that is not the model or the data."""

    address: str = ""
    """A Ray cluster to join (`auto`, host:port, ray://...); empty takes RAY_ADDRESS, or starts a local Ray for this run."""
    allow_unauthenticated: bool = False
    """Join a Ray head that other machines can reach though it asks for no token."""
    gpus_per_worker: Annotated[int, Ge(-1), "-1 takes one where there are GPUs"] = -1
    """-1 takes one where the cluster has GPUs and none elsewhere."""
    cpus_per_worker: Annotated[int, Ge(0), "0 shares the CPUs evenly"] = 0
    """0 shares the cluster's CPUs evenly among the workers."""
    threads_per_worker: Annotated[int, Ge(0), "0 takes the CPUs of a worker"] = 0
    """torch threads of a worker; part of the run's identity, as results depend on it. 0 takes the CPUs of a worker."""
    metrics_host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """Address that metrics and service discovery listen on."""
    discovery_port: Annotated[int, Interval(ge=0, le=65535), "0 takes a free port"] = 0
    """Port of Prometheus service discovery (http_sd); 0 takes a free one and prints it."""
    keep_checkpoints: Annotated[int, Ge(2), "with one, a single damaged checkpoint would lose the run"] = 3
    """Committed checkpoints kept; at least 2, so that one bad checkpoint never loses the run."""
    heartbeat_seconds: Annotated[float, Interval(gt=0, le=2.0), "1 is the default; who is silent for 5 s is taken for lost"] = 1.0
    """How often a rank tells the coordinator where it is, outside the step path, and hears what to do; less often where there are more than
    400 ranks. What cannot wait, as a rank's end or the agreement on a stop, does not."""
    object_store_limit_bytes: Annotated[int, Ge(0)] = 2 << 30
    """A data set that only the driver can read travels through Ray's object store up to this size."""
    hang_seconds: Annotated[float, Gt(0), "60 is the default"] = 60.0
    """Ranks that live and get nothing done for so long (and for ten times their longest step) are killed, their stacks kept in the journal,
    and the run goes on from its newest checkpoint. Stopped processes (SIGSTOP) are noticed after 5 s."""
    start_seconds: Annotated[float, Gt(0), "600 is the default"] = 600.0
    """The same for the way to the first step: data, weights, process group."""
    placement_seconds: Annotated[float, Gt(0), "300 is the default"] = 300.0
    """How long the cluster may take to find room for the workers, or with `--workers N:M` for N of them."""
    grow_after_seconds: Annotated[float, Ge(0), "0 grows at once"] = 30.0
    """With `--workers N:M`: room for more workers must have been there for so long before the run takes it, at its next commit. To be less
    than an autoscaler's idle timeout."""
    preemption_notice: str = ""
    """A file whose appearance on a node says that the node is about to go (a spot instance's hook makes it): the run commits and leaves
    it."""
    mtbf_hours: Annotated[float, Gt(0), "24 is the default"] = 24.0
    """Expected hours between failures of one worker; `--train.checkpoint-every auto` starts from it and learns from what fails."""
    storage_retry_seconds: Annotated[float, Ge(0), "0 tries once"] = 20.0
    """How long an operation on a remote storage that fails is tried again before it counts as an outage."""
    spill_dir: str = ""
    """Folder on each node for checkpoints that wait out an outage of the storage, the newest two of a rank; empty takes one in the system's
    temporary folder."""
    stop_grace_seconds: Annotated[float, Ge(0)] = 60.0
    """Time a stopped run has to commit; then it is stopped all the same."""
    faults: FaultPolicy = field(default_factory=FaultPolicy)
