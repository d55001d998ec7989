"""Where Prometheus finds a run: the list of its processes, as a pure function, and how that list is published.

The coordinator says who is there; exporter.py has the HTTP server and the file's format."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.exporter import serve_discovery, write_file_sd
from cluster.names import FILE_SD
from cluster.roster import RankInfo
from cluster.storage import Storage

ScrapeTarget = dict[str, Any]
"""{"targets": [host:port], "labels": {...}}, as http_sd and file_sd have it."""


def targets_of(run: str, attempt: int, infos: Mapping[int, RankInfo], coordinator: str) -> list[ScrapeTarget]:
    """The ranks of an attempt, those that serve metrics, and the coordinator at `coordinator`."""
    ranks = [_target(run, infos[rank].metrics_address, str(rank), attempt) for rank in sorted(infos) if infos[rank].metrics_address]
    return [*ranks, _target(run, coordinator, "coordinator", 0)]


def _target(run: str, address: str, rank: str, attempt: int) -> ScrapeTarget:
    return {"targets": [address], "labels": {"run": run, "rank": rank, "attempt": str(attempt)}}


class Discovery:
    """Publishes a run's targets: over HTTP as they are now, and in the run's folder, where that is local, as of the last write()."""

    def __init__(
        self, storage: Storage, run: str, host: str, port: int, listed: Callable[[], list[ScrapeTarget]], registry: CollectorRegistry
    ) -> None:
        """`listed` gives the targets of now; `registry` is served too, at /metrics. ValueError where the port stays taken."""
        self._path = storage.at(f"{run}/{FILE_SD}") if storage.is_local else None
        self._listed = listed
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._server = serve_discovery(host, port, listed, registry)

    @property
    def address(self) -> str:
        """host:port."""
        return self._server.address

    def write(self) -> None:
        """A full disk costs monitoring its file, not the run its rank."""
        if self._path is None:
            return
        with self._writing, contextlib.suppress(OSError):
            targets = [] if self._closed.is_set() else self._listed()  # in here: what is written last is the newest
            write_file_sd(self._path, targets)

    def close(self) -> None:
        """End the server; nobody is listed any more."""
        self._closed.set()
        self._server.close()
        self.write()
