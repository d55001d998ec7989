"""Every metric that a run exports: one table of names, types, units and meanings, and a registry for each process.

Ranks and the coordinator write; exporter serves; dashboards, alerts and tests import METRICS, so that a name cannot drift. Names follow
Prometheus: prefix `finetune_`, base units, `_total` on counters. Labels are run, rank and attempt, and `reason` or `kind` where the table
says so; never sample ids or paths."""

from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

PREFIX = "finetune_"
LABELS = ("run", "rank", "attempt")

STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
SAVE_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A row of the table."""

    name: str
    """Without the prefix."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    owner: Literal["rank", "coordinator"] = "rank"
    label: str = ""
    """One more label beside run, rank and attempt."""
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


METRICS: tuple[Metric, ...] = (
    Metric(name="start_time_seconds", kind="gauge", help="Unix time at which this rank started."),
    Metric(name="steps_total", kind="counter", help="Optimiser steps done by this rank in this attempt."),
    Metric(name="step", kind="gauge", help="Global step, counted over all attempts."),
    Metric(name="epoch", kind="gauge", help="Epoch as a fraction: global step over steps per epoch."),
    Metric(name="samples_total", kind="counter", help="Samples this rank trained on."),
    Metric(name="loss", kind="gauge", help="Mean training loss of the newest logged step."),
    Metric(name="learning_rate", kind="gauge", help="Learning rate of the newest logged step."),
    Metric(name="images_per_second", kind="gauge", help="Images this rank trained on a second, over the newest logged interval."),
    Metric(name="step_seconds", kind="histogram", help="Wall time of a step.", buckets=STEP_BUCKETS),
    Metric(name="data_wait_seconds_total", kind="counter", help="Time steps waited for a batch."),
    Metric(name="compute_seconds_total", kind="counter", help="Time spent in forward, backward and the optimiser."),
    Metric(name="reduce_seconds_total", kind="counter", help="Time steps waited for other ranks' gradients."),
    Metric(
        name="straggler_skew_ratio",
        kind="gauge",
        help="The slowest rank's own work on a step over the ranks' median; 1 where all are equally fast.",
        owner="coordinator",
    ),
    Metric(name="evaluation_seconds_total", kind="counter", help="Time spent in evaluation."),
    Metric(name="checkpoint_stall_seconds_total", kind="counter", help="Time steps waited for a checkpoint."),
    Metric(
        name="checkpoint_stage_seconds",
        kind="histogram",
        help="Time to write one checkpoint's files, off the step path.",
        buckets=SAVE_BUCKETS,
    ),
    Metric(
        name="quarantined_samples_total", kind="counter", help="Samples this rank set aside because they could not be read.", label="reason"
    ),
    Metric(name="test_accuracy_ratio", kind="gauge", help="Top-1 accuracy on the test split, 0 to 1."),
    Metric(name="test_loss", kind="gauge", help="Mean loss on the test split."),
    Metric(name="device_memory_bytes", kind="gauge", help="Largest device memory this rank has held."),
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
    Metric(name="restarts_total", kind="counter", help="Attempts after the first.", owner="coordinator"),
    Metric(name="failures_total", kind="counter", help="Failures of attempts and workers by kind.", owner="coordinator", label="kind"),
    Metric(
        name="run_quarantined_samples", kind="gauge", help="Distinct samples set aside over all ranks and attempts.", owner="coordinator"
    ),
    Metric(
        name="run_seconds",
        kind="gauge",
        help="Wall time of the run's drivers by what it went to: steps, data_wait, start_up, recovery, ...; adds up to all of it.",
        owner="coordinator",
        label="cause",
    ),
    Metric(name="goodput_ratio", kind="gauge", help="Useful step time over wall time, 0 to 1.", owner="coordinator"),
)

_TABLE = {metric.name: metric for metric in METRICS}


class Metrics:
    """One process's metrics in a registry of its own. A gauge appears when it is first set; counters and histograms start at zero."""

    def __init__(self, run: str, rank: int | str, attempt: int, owner: Literal["rank", "coordinator"] = "rank") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` doubles the series and nobody reads it
        self.registry = CollectorRegistry()
        self._labels = (run, str(rank), str(attempt))
        self._collectors: dict[str, Any] = {}
        for metric in METRICS:
            if metric.owner == owner:
                self._collectors[metric.name] = self._register(metric)

    def add(self, name: str, amount: float = 1.0, label: str = "") -> None:
        """Raise a counter. `label`: the value of the row's own label."""
        self._child(name, "counter", label).inc(amount)

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._child(name, "gauge", label).set(value)

    def observe(self, name: str, value: float) -> None:
        """Put a value into a histogram."""
        self._child(name, "histogram", "").observe(value)

    def _register(self, metric: Metric) -> Any:
        names = (*LABELS, metric.label) if metric.label else LABELS
        match metric.kind:
            case "counter":
                collector: Any = Counter(metric.full_name, metric.help, names, registry=self.registry)
            case "gauge":
                collector = Gauge(metric.full_name, metric.help, names, registry=self.registry)
            case "histogram":
                collector = Histogram(metric.full_name, metric.help, names, registry=self.registry, buckets=metric.buckets)
        if metric.kind != "gauge" and not metric.label:
            collector.labels(*self._labels)
        return collector

    def _child(self, name: str, kind: str, label: str) -> Any:
        metric = _TABLE[name]
        assert metric.kind == kind, f"{name} is a {metric.kind}, not a {kind}"
        assert bool(metric.label) == bool(label), f"{name} takes the label {metric.label!r}, got the value {label!r}"
        return self._collectors[name].labels(*self._labels, *([label] if label else []))
