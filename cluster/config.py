"""How many processes, where, and what is done when one fails. Read by cluster, written by the command line (`--cluster.*`)."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPolicy:
    """Budgets for failures of one run. A user's exception is never retried."""

    max_failures: int = 8
    """Attempts lost to infrastructure (a killed worker, a lost node) before the run gives up."""
    max_failures_without_progress: int = 3
    """Attempts in a row that committed nothing new: a crash loop."""
    backoff_seconds: float = 1.0
    """Wait before the second attempt in a row without progress; doubles each time, 30 s at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster and everything that is not the model or the data."""

    address: str = ""
    """A Ray cluster to join (`auto`, host:port, ray://...); empty takes RAY_ADDRESS, or starts a local Ray for this run."""
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
    heartbeat_seconds: float = 0.25
    """How often a rank tells the coordinator where it is, outside the step path."""
    object_store_limit_bytes: int = 2 << 30
    """A data set that only the driver can read travels through Ray's object store up to this size."""
    stop_grace_seconds: float = 60.0
    """Time a stopped run has to commit; then it is stopped all the same."""
    faults: FaultPolicy = field(default_factory=FaultPolicy)
