"""Asks the processes of a running run for their /metrics, over HTTP. Called by status and watch, which work without the answers too.
cluster/metrics.py defines the figures.
"""

import http.client
import ipaddress
import json
import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.names import FILE_SD, PREFIX
from trainer.runs.folder import RunFolder

PATIENCE_SECONDS = 1.0
ASKED_RANKS = 64  # maximum; a larger run's ranks are asked in turns of this many
ASKED_AT_ONCE = 16
_ANSWER_BYTES = 4 << 20

Figures = Mapping[str, float]
"""Metric name without its prefix -> value; metrics with labels of their own are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a process of a run serves its metrics."""

    rank: int | None
    """None means the coordinator."""
    address: str
    """host:port."""


def rank_places(events: Iterable[Mapping[str, Any]]) -> list[Place]:
    """The ranks of the newest attempt that can be reached from here, according to the journal."""
    found: dict[int, Place] = {}
    attempt = -1
    for event in events:
        if event["event"] == "attempt_started":
            attempt = event.get("attempt", -1)
            found = {}
        if event["event"] == "worker_registered" and event.get("attempt") == attempt:
            rank, address = event.get("rank"), event.get("metrics_address")
            if isinstance(rank, int) and isinstance(address, str) and address and not _is_elsewhere(address, event.get("host")):
                found[rank] = Place(rank=rank, address=address)
    return [found[rank] for rank in sorted(found)]


def coordinator_place(folder: RunFolder) -> Place | None:
    """From the run's file for Prometheus, which a local storage has. None if there is no file, or the coordinator has ended."""
    if not folder.storage.is_local:
        return None
    try:
        groups = json.loads(folder.read(FILE_SD) or b"[]")
        for group in groups:
            if group["labels"]["rank"] == "coordinator":
                return Place(rank=None, address=str(group["targets"][0]))
    except (OSError, ValueError, LookupError, TypeError):  # only Prometheus needs the file intact
        return None
    return None


def ask_all(places: Sequence[Place], run: str, *, patience_seconds: float = PATIENCE_SECONDS) -> dict[int | None, Figures]:
    """The figures of those that answer in time, by rank."""
    if not places:
        return {}
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(places))) as pool:
        answers = pool.map(lambda place: ask(place.address, run, patience_seconds=patience_seconds), places)
        return {place.rank: answer for place, answer in zip(places, answers, strict=True) if answer is not None}


def ask(address: str, run: str, *, patience_seconds: float = PATIENCE_SECONDS) -> Figures | None:
    """The figures of the process at `address`; None if nobody answers there, or a process that is not of `run`."""
    from prometheus_client.parser import text_string_to_metric_families

    host, _, port = address.rpartition(":")
    try:
        # Uses neither redirects nor the environment's proxies: the address belongs to the process itself.
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=patience_seconds)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read(_ANSWER_BYTES).decode() if response.status == 200 else ""
        finally:
            connection.close()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (OSError, ValueError, http.client.HTTPException):
        return None
    figures = {
        sample.name.removeprefix(PREFIX): sample.value
        for sample in samples
        if sample.labels.get("run") == run and sample.labels.keys() <= {"run", "rank", "attempt"} and math.isfinite(sample.value)
    }
    return figures or None


def _is_elsewhere(address: str, host: object) -> bool:
    """Whether `address` is another machine's loopback."""
    name = address.rpartition(":")[0].strip("[]")
    try:
        is_loopback = ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_loopback = name == "localhost"
    return is_loopback and host != socket.gethostname()
