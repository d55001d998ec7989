"""What a server tells Prometheus: one table of names, types and meanings, and their registry. `front` counts, docs/serve.md shows them.

Names follow those of a run (cluster/metrics.py): prefix `finetune_`, base units, `_total` on counters, and no label whose values a stranger
could make. They are the server's own registry, and not Ray's metrics, for two reasons: Ray would put `ray_` before each name, and a
deployment's replicas would each count apart. `front` has one replica, and so each number is the whole server's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from cluster.names import PREFIX
from cluster.text import shown

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
GONE = "gone"
"""In place of a status: the client left before it had an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A metric."""

    name: str
    """Without the prefix."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


REQUESTS = Row(
    name="serve_requests_total",
    kind="counter",
    labels=("route", "status"),
    help="Requests by route (predict, health, model, metrics, other) and by the status that was answered; `gone`: the client left first.",
)
REQUEST_SECONDS = Row(
    name="serve_request_seconds",
    kind="histogram",
    buckets=SECONDS,
    help="Time from the first line of a request for an answer to that answer (200), reading and waiting included.",
)
BATCH_SECONDS = Row(
    name="serve_batch_seconds",
    kind="histogram",
    buckets=SECONDS,
    help="Time that a replica took for a batch: decoding, preparation, the network.",
)
BATCH_IMAGES = Row(name="serve_batch_images", kind="histogram", buckets=IMAGES, help="Images of a batch.")
QUEUED = Row(name="serve_queued_requests", kind="gauge", help="Requests under way: being read, waiting, or computed.")
MOST_QUEUED = Row(name="serve_max_queued_requests", kind="gauge", help="How many may be under way; the next one is answered 503.")
READY = Row(name="serve_ready", kind="gauge", help="1 if the model answers, 0 before it does and while it does not.")
START_TIME = Row(name="serve_start_time_seconds", kind="gauge", help="Unix time at which the server started.")
MODEL_INFO = Row(
    name="serve_model_info",
    kind="gauge",
    labels=("trained_by", "model_sha256", "file_sha256"),
    help="Always 1; which run's model is served, and the first 16 digits of its weights' and its file's SHA-256.",
)
ROWS = (REQUESTS, REQUEST_SECONDS, BATCH_SECONDS, BATCH_IMAGES, QUEUED, MOST_QUEUED, READY, START_TIME, MODEL_INFO)
_CLASSES: Mapping[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Meters:
    """The metrics of one server."""

    def __init__(self, *, most_queued: int, queued: Callable[[], int], is_ready: Callable[[], bool], start_time: float) -> None:
        """`start_time`: Unix seconds. The functions are asked at each scrape."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # as in cluster/metrics.py
        self._registry = CollectorRegistry()
        self._made: Mapping[Row, Any] = {row: self._make(row) for row in ROWS}
        self._made[MOST_QUEUED].set(most_queued)
        self._made[QUEUED].set_function(queued)
        self._made[READY].set_function(lambda: float(is_ready()))
        self._made[START_TIME].set(start_time)

    def answered(self, route: str, status: str) -> None:
        """Count a request."""
        self._made[REQUESTS].labels(route, status).inc()

    def took(self, seconds: float) -> None:
        """Count an image or a text that was answered."""
        self._made[REQUEST_SECONDS].observe(seconds)

    def computed(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._made[BATCH_IMAGES].observe(images)
        self._made[BATCH_SECONDS].observe(seconds)

    def serves(self, trained_by: str, model_sha256: str, file_sha256: str) -> None:
        """Say which model it is."""
        self._made[MODEL_INFO].labels(shown(trained_by), shown(model_sha256)[:16], shown(file_sha256)[:16]).set(1)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def _make(self, row: Row) -> Any:
        buckets = {"buckets": row.buckets} if row.buckets else {}
        return _CLASSES[row.kind](row.full_name, row.help, row.labels, registry=self._registry, **buckets)


def table() -> str:
    """The rows as docs/serve.md shows them."""
    labels = {row: ", ".join(f"`{label}`" for label in row.labels) for row in ROWS}
    lines = [f"| `{row.full_name}` | {row.kind} | {labels[row]} | {row.help} |" for row in ROWS]
    return "\n".join(["| metric | type | label | meaning |", "|---|---|---|---|", *lines])
