"""How many processes, where, and what is done when one fails. Read by cluster, written by the command line (`--cluster.*`)."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPolicy:
    """Budgets for failures of one run, one for each kind. A user's exception and data outside their limit are never retried."""

    max_failures: int = 8
    """Attempts lost to infrastructure (a killed worker, a lost node) before the run gives up."""
    max_failures_without_progress: int = 3
    """Attempts in a row that committed nothing new: a crash loop."""
    max_preemptions: int = 64
    """Attempts that a preempted node ended before the run gives up; they are no failures and count nowhere else."""
    max_hangs: int = 3
    """Attempts that were ended because a rank hung."""
    max_rollbacks: int = 3
    """Times a run may go back to a checkpoint for wrong numbers (NaN, a loss spike, weights that differ between ranks), over all its
    drivers."""
    backoff_seconds: float = 1.0
    """Wait before the second attempt in a row without progress; doubles each time, 30 s at most."""
    straggler_ratio: float = 1.5
    """A rank is a straggler when its own work on a step takes this many times the median of the others'..."""
    straggler_steps: int = 20
    """...for this many steps in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster and everything that is not the model or the data."""

    address: str = ""
    """A Ray cluster to join (`auto`, host:port, ray://...); empty takes RAY_ADDRESS, or starts a local Ray for this run."""
    allow_unauthenticated: bool = False
    """Join a Ray head that other machines can reach though it asks for no token."""
    gpus_per_worker: int = -1
    """-1 takes one where the cluster has GPUs and none elsewhere."""
    cpus_per_worker: int = 0
    """0 shares the cluster's CPUs evenly among the workers."""
    threads_per_worker: int = 0
    """torch threads of a worker; part of the run's identity, as results depend on it. 0 takes the CPUs of a worker."""
    metrics_host: str = "127.0.0.1"
    """Address that metrics and service discovery listen on."""
    discovery_port: int = 0
    """Port of Prometheus service discovery (http_sd); 0 takes a free one and prints it."""
    keep_checkpoints: int = 3
    """Committed checkpoints kept; at least 2, so that one bad checkpoint never loses the run."""
    heartbeat_seconds: float = 1.0
    """How often a rank tells the coordinator where it is, outside the step path, and hears what to do; less often where there are more than
    400 ranks. What cannot wait, as a rank's end or the agreement on a stop, does not."""
    object_store_limit_bytes: int = 2 << 30
    """A data set that only the driver can read travels through Ray's object store up to this size."""
    hang_seconds: float = 60.0
    """Ranks that live and get nothing done for so long (and for ten times their longest step) are killed, their stacks kept in the journal,
    and the run goes on from its newest checkpoint. Stopped processes (SIGSTOP) are noticed after 5 s."""
    start_seconds: float = 600.0
    """The same for the way to the first step: data, weights, process group."""
    placement_seconds: float = 300.0
    """How long the cluster may take to find room for the workers, or with `--workers N:M` for N of them."""
    grow_after_seconds: float = 30.0
    """With `--workers N:M`: room for more workers must have been there for so long before the run takes it, at its next commit. To be less
    than an autoscaler's idle timeout."""
    preemption_notice: str = ""
    """A file whose appearance on a node says that the node is about to go (a spot instance's hook makes it): the run commits and leaves
    it."""
    mtbf_hours: float = 24.0
    """Expected hours between failures of one worker; `--train.checkpoint-every auto` starts from it and learns from what fails."""
    storage_retry_seconds: float = 20.0
    """How long an operation on a remote storage that fails is tried again before it counts as an outage."""
    spill_dir: str = ""
    """Folder on each node for checkpoints that wait out an outage of the storage, the newest two of a rank; empty takes one in the system's
    temporary folder."""
    stop_grace_seconds: float = 60.0
    """Time a stopped run has to commit; then it is stopped all the same."""
    faults: FaultPolicy = field(default_factory=FaultPolicy)
