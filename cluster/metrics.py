"""Every metric that a run exports: one table of names, types, units and meanings, and a registry for each process.

Ranks and the coordinator write metrics; exporter serves them. Dashboards, alerts, docs/metrics.md and tests import METRICS, so names
cannot drift apart. Names follow Prometheus: prefix `finetune_`, base units, `_total` on counters. Labels are run, rank and attempt, plus
one more where the table says so; the namespace is a label of the targets (targets.py). The table lists that label's values, or limits how
many a run may declare when it begins; values are never sample ids or paths. So the largest possible number of series is known before
anything runs (`most_series`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from cluster.names import KINDS, PREFIX
from cluster.text import shown

LABELS = ("run", "rank", "attempt")

STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
SAVE_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)

MOST_MEASURES = 64
"""Largest number of measures of a task."""
OTHER = "other"
"""Label value for everything that a row does not list."""
FAILURE_KINDS = (*KINDS, OTHER)
RESTART_KINDS = ("infrastructure", "preempted", "hang", "numbers", "grow", OTHER)
"""Reasons for ending an attempt that another one follows: a failure, a node's notice (preempted), room for more workers (grow)."""
REASONS = (
    "empty",
    "unknown format",
    "truncated",
    "damaged",
    "too large",
    "animated",
    "unsupported",
    "wrong size",
    "undecodable",
    "no image",
    "unreadable",
    "bad label",
    OTHER,
)
"""From dataio.codecs.image.sniff.KINDS."""
CAUSES = (
    "steps",
    "data_wait",
    "exchange_wait",
    "checkpoint_stall",
    "evaluation",
    "start_up",
    "compile",
    "recovery",
    "resize",
    "hang",
    "lost_work",
    OTHER,
)
"""From trainer.runs.summary.accounting."""
RUNNING = "running"
TAKEN_OVER = "taken_over"
ENDS = ("finished", "failed", "stopped", TAKEN_OVER)
"""How a run's command ends: all steps done, given up, stopped on request, because another command goes on with the run. A command that is
killed says nothing."""
STATES = (RUNNING, *ENDS, OTHER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A row of the table."""

    name: str
    """Without the prefix."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    owner: Literal["rank", "coordinator"] = "rank"
    label: str = ""
    """One more label besides run, rank and attempt."""
    values: tuple[str, ...] = ()
    """All values of that label; OTHER is one of them."""
    declared: int = 0
    """For a label whose values only the run knows: the most that it may declare (Metrics.declare). OTHER is extra."""
    info: tuple[str, ...] = ()
    """More labels of a gauge that is always 1 and has one series (Metrics.describe)."""
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def series(self) -> int:
        """The most series that one process exports for this row. A histogram has one for each bucket, including the unbounded one, and
        one each for sum and count."""
        if self.kind == "histogram":
            return len(self.buckets) + 3
        return self.declared + 1 if self.declared else max(1, len(self.values))

    @property
    def unit(self) -> str:
        """Taken from the name: seconds, bytes, ratio, watts, or what is counted."""
        words = self.name.removesuffix("_total").split("_")
        if "per" in words:
            return f"{words[words.index('per') - 1]}/{words[-1]}"
        if words[-1] in ("seconds", "bytes", "ratio", "watts", "steps", "samples"):
            return words[-1]
        if self.name in _UNITS:
            return _UNITS[self.name]
        return words[-1] if self.kind == "counter" else ""


_UNITS = {
    "step": "steps",
    "checkpoint_commit_step": "steps",
    "epoch": "epochs",
    "workers": "ranks",
    **dict.fromkeys(("loss", "test_loss", "validation_loss"), "nats"),
}
"""Units of names that do not contain theirs."""


METRICS: tuple[Metric, ...] = (
    Metric(name="start_time_seconds", kind="gauge", help="Unix time at which this rank started."),
    Metric(name="steps_total", kind="counter", help="Optimiser steps done by this rank in this attempt."),
    Metric(name="step", kind="gauge", help="Global step, counted over all attempts."),
    Metric(name="epoch", kind="gauge", help="Epoch as a fraction: global step over steps per epoch."),
    Metric(name="samples_total", kind="counter", help="Samples this rank trained on."),
    Metric(name="tokens_total", kind="counter", help="Tokens of the texts this rank trained on, without those that pad; 0 of images."),
    Metric(name="padded_tokens_total", kind="counter", help="Tokens this rank trained on with those that pad a batch; 0 of images."),
    Metric(name="loss", kind="gauge", help="Mean training loss of the newest logged step."),
    Metric(name="learning_rate", kind="gauge", help="Learning rate of the newest logged step."),
    Metric(name="gradient_norm", kind="gauge", help="L2 norm of a step's gradient, before any clipping, every few seconds."),
    Metric(
        name="unlabelled_used_ratio",
        kind="gauge",
        help="Of the images without labels, those whose guess counts by more than one half, over all ranks, in the newest logged step.",
    ),
    Metric(
        name="unlabelled_weight_ratio",
        kind="gauge",
        help="Mean of what guesses at images without labels count, over all ranks, in the newest logged step.",
    ),
    Metric(name="images_per_second", kind="gauge", help="Images this rank trained on a second, over the newest logged interval."),
    Metric(name="step_seconds", kind="histogram", help="Wall time of a step.", buckets=STEP_BUCKETS),
    Metric(name="data_wait_seconds_total", kind="counter", help="Time steps waited for a batch."),
    Metric(name="compute_seconds_total", kind="counter", help="Time spent in forward, backward and the optimiser."),
    Metric(
        name="forward_backward_seconds_total",
        kind="counter",
        help="Time spent in forward and backward, measured on the device where it is a GPU.",
    ),
    Metric(
        name="optimizer_seconds_total",
        kind="counter",
        help="Time spent in the optimiser's update, measured on the device where it is a GPU.",
    ),
    Metric(
        name="mfu_ratio",
        kind="gauge",
        help="FLOP/s of this rank's model over its device's peak: a data sheet's for known GPUs, else what --profile measured.",
    ),
    Metric(name="reduce_seconds_total", kind="counter", help="Time steps waited for other ranks' gradients."),
    Metric(
        name="straggler_skew_ratio",
        kind="gauge",
        help="The slowest rank's own work on a step over the ranks' median; 1 where all are equally fast.",
        owner="coordinator",
    ),
    Metric(name="planned_steps", kind="gauge", help="Steps that the whole run does."),
    Metric(name="evaluation_seconds_total", kind="counter", help="Time spent in evaluation."),
    Metric(name="checkpoint_stall_seconds_total", kind="counter", help="Time steps waited for a checkpoint."),
    Metric(
        name="checkpoint_stage_seconds",
        kind="histogram",
        help="Time to write one checkpoint's files, off the step path.",
        buckets=SAVE_BUCKETS,
    ),
    Metric(
        name="quarantined_samples_total",
        kind="counter",
        help="Samples this rank set aside because they could not be read.",
        label="reason",
        values=REASONS,
    ),
    Metric(name="test_accuracy_ratio", kind="gauge", help="Top-1 accuracy on the test split, 0 to 1."),
    Metric(name="test_loss", kind="gauge", help="Mean loss on the test split."),
    Metric(
        name="test_measure",
        kind="gauge",
        help="A measure of the run's task on the test split, by its name: accuracy, map, ...; what is best, and its unit, the task says.",
        label="measure",
        declared=MOST_MEASURES,
    ),
    Metric(
        name="validation_accuracy_ratio",
        kind="gauge",
        help="Top-1 accuracy on the validation split, 0 to 1; the test split's follows at the end.",
    ),
    Metric(name="validation_loss", kind="gauge", help="Mean loss on the validation split."),
    Metric(
        name="validation_measure",
        kind="gauge",
        help="A measure of the run's task on the validation split, by its name.",
        label="measure",
        declared=MOST_MEASURES,
    ),
    Metric(
        name="decode_seconds_total",
        kind="counter",
        help="Time this rank's loader spent on reading and decoding, in its own threads; all at the start where images are cached.",
    ),
    Metric(
        name="read_bytes_total",
        kind="counter",
        help="Memory of the row groups this rank read; one that is read again counts again.",
    ),
    Metric(
        name="read_wait_seconds_total",
        kind="counter",
        help="Time the making of batches waited for reads of a streamed data set; steps wait only where batches ran out.",
    ),
    Metric(name="loader_memory_bytes", kind="gauge", help="Images this rank's loader holds: decoded, or row groups held or being read."),
    Metric(name="host_memory_bytes", kind="gauge", help="Resident memory of this rank's process, shared libraries included."),
    Metric(name="device_memory_bytes", kind="gauge", help="Largest memory of its GPU that this rank's tensors have taken."),
    Metric(name="gpu_utilization_ratio", kind="gauge", help="Share of time in which a kernel ran on this rank's GPU (NVML)."),
    Metric(name="gpu_power_watts", kind="gauge", help="Power this rank's GPU draws (NVML)."),
    Metric(name="gpu_memory_used_bytes", kind="gauge", help="Memory in use on this rank's GPU, by anybody (NVML)."),
    Metric(name="workers", kind="gauge", help="Ranks of the current attempt.", owner="coordinator"),
    Metric(name="checkpoint_commit_step", kind="gauge", help="Step of the newest committed checkpoint.", owner="coordinator"),
    Metric(name="checkpoint_commit_time_seconds", kind="gauge", help="Unix time of the newest commit.", owner="coordinator"),
    Metric(
        name="checkpoint_commit_seconds",
        kind="histogram",
        help="Time from the last rank's receipt to the commit.",
        owner="coordinator",
        buckets=SAVE_BUCKETS,
    ),
    Metric(name="checkpoint_bytes", kind="gauge", help="Size of the newest committed checkpoint.", owner="coordinator"),
    Metric(name="checkpoint_failures_total", kind="counter", help="Checkpoints that could not be committed.", owner="coordinator"),
    Metric(
        name="restarts_total",
        kind="counter",
        help="Attempts after the first, by what ended the one before.",
        owner="coordinator",
        label="kind",
        values=RESTART_KINDS,
    ),
    Metric(
        name="rollbacks_total",
        kind="counter",
        help="Attempts that went back to a checkpoint because of wrong numbers: NaN, a spike, weights that differ between ranks.",
        owner="coordinator",
    ),
    Metric(
        name="failures_total",
        kind="counter",
        help="Failures of attempts by kind.",
        owner="coordinator",
        label="kind",
        values=FAILURE_KINDS,
    ),
    Metric(
        name="run_quarantined_samples", kind="gauge", help="Distinct samples set aside over all ranks and attempts.", owner="coordinator"
    ),
    Metric(
        name="run_seconds",
        kind="gauge",
        help="Wall time of the run's drivers by what it went to: steps, data_wait, start_up, recovery, ...; adds up to all of it.",
        owner="coordinator",
        label="cause",
        values=CAUSES,
    ),
    Metric(
        name="storage_waiting_seconds",
        kind="gauge",
        help="For how long the storage has not answered the driver; 0 once it does again. It appears with a run's first outage.",
        owner="coordinator",
    ),
    Metric(name="goodput_ratio", kind="gauge", help="Useful step time over wall time, 0 to 1.", owner="coordinator"),
    Metric(
        name="run_state",
        kind="gauge",
        help="1 for the state that the run is in, 0 for the others. A run that is killed stays `running` in what was read last.",
        owner="coordinator",
        label="state",
        values=STATES,
    ),
    Metric(
        name="run_state_time_seconds",
        kind="gauge",
        help="Unix time at which the run came into the state: the latest one tells which state was the last. `taken_over` bears the time "
        "at which its own command began, so that what the command that took over says is later.",
        owner="coordinator",
        label="state",
        values=STATES,
    ),
    Metric(
        name="run_info",
        kind="gauge",
        help="Always 1; whose run it is, and what it trains.",
        owner="coordinator",
        info=("owner", "task", "device"),
    ),
)

_TABLE = {metric.name: metric for metric in METRICS}


def most_series(owner: Literal["rank", "coordinator"]) -> int:
    """The most series that one process exports. A run of N ranks has at most N * most_series("rank") + most_series("coordinator") at a
    time."""
    return sum(metric.series for metric in METRICS if metric.owner == owner)


class Metrics:
    """One process's metrics in its own registry. A gauge appears when it is first set. Counters and histograms start at zero, those with a
    label at every value: Prometheus sees no increase in a series that begins with 1.

    A label whose values the run declares takes only those; any other value counts as OTHER. Names come from the data, and become what
    `shown` makes of them: valid UTF-8 on one line."""

    def __init__(self, run: str, rank: int | str, attempt: int, owner: Literal["rank", "coordinator"] = "rank") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` doubles the series and nobody reads it
        self.registry = CollectorRegistry()
        self._labels = (shown(run), str(rank), str(attempt))
        self._collectors: dict[str, Any] = {}
        self._children: dict[tuple[str, str, str], Any] = {}  # by name, kind and the label's value: looked up in every step
        self._values = {metric.name: frozenset(metric.values) for metric in METRICS}  # allowed values of a row's own label
        for metric in METRICS:
            if metric.owner == owner:
                self._collectors[metric.name] = self._register(metric)

    def declare(self, name: str, values: Sequence[str]) -> None:
        """Declare the values of the row's own label in this run: once, before any is set. Values beyond the row's limit count as OTHER."""
        metric = _TABLE[name]
        assert metric.declared, f"the values of {name} are listed in the table"
        assert not self._values[name], f"the values of {name} were declared before"
        self._values[name] = frozenset(list(dict.fromkeys(map(shown, values)))[: metric.declared]) | {OTHER}

    def add(self, name: str, amount: float = 1.0, label: str = "") -> None:
        """Increase a counter. `label`: the value of the row's own label."""
        self._child(name, "counter", label).inc(amount)

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._child(name, "gauge", label).set(value)

    def unset(self, name: str, label: str = "") -> None:
        """Remove a gauge until it is set again: its value is no longer known."""
        self._child(name, "gauge", label)
        del self._children[name, "gauge", label]
        self._collectors[name].remove(*self._labels, *([shown(label)] if label else []))

    def describe(self, name: str, labels: Mapping[str, str]) -> None:
        """Set an info gauge, which is always 1, with these labels; those that are not given are empty."""
        info = _TABLE[name].info
        assert labels.keys() <= set(info), f"{name} takes the labels {info}, got {sorted(labels)}"
        self._collectors[name].labels(*self._labels, *(shown(labels.get(label, "")) for label in info)).set(1)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._child(name, "histogram", "").observe(value)

    def _register(self, metric: Metric) -> Any:
        names = (*LABELS, *([metric.label] if metric.label else []), *metric.info)
        match metric.kind:
            case "counter":
                collector: Any = Counter(metric.full_name, metric.help, names, registry=self.registry)
            case "gauge":
                collector = Gauge(metric.full_name, metric.help, names, registry=self.registry)
            case "histogram":
                collector = Histogram(metric.full_name, metric.help, names, registry=self.registry, buckets=metric.buckets)
        if metric.kind != "gauge":
            for value in metric.values or ("",):
                collector.labels(*self._labels, *([value] if value else []))
        return collector

    def _child(self, name: str, kind: str, label: str) -> Any:
        known = self._children.get((name, kind, label))
        if known is not None:
            return known
        metric = _TABLE[name]
        assert not metric.info, f"{name} is described, not set"
        assert metric.kind == kind, f"{name} is a {metric.kind}, not a {kind}"
        assert bool(metric.label) == bool(label), f"{name} takes the label {metric.label!r}, got the value {label!r}"
        if label and label != OTHER and shown(label) not in self._values[name]:
            return self._child(name, kind, OTHER)
        child = self._collectors[name].labels(*self._labels, *([shown(label)] if label else []))
        self._children[name, kind, label] = child
        return child
