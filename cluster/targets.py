"""Lists a run's processes for Prometheus, as a pure function, and publishes the list.

The coordinator calls it and knows who is there; exporter.py has the HTTP server and the file's format."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.exporter import serve_discovery, write_file_sd
from cluster.names import FILE_SD
from cluster.roster import RankInfo
from cluster.storage import Storage
from cluster.text import shown

ScrapeTarget = dict[str, Any]
"""{"targets": [host:port], "labels": {...}}, the format of http_sd and file_sd."""


def targets_of(run: str, attempt: int, infos: Mapping[int, RankInfo], coordinator: str) -> list[ScrapeTarget]:
    """The ranks of an attempt that serve metrics, and the coordinator at `coordinator`."""
    ranks = [_target(run, infos[rank].metrics_address, str(rank), attempt) for rank in sorted(infos) if infos[rank].metrics_address]
    return [*ranks, _target(run, coordinator, "coordinator", 0)]


def _target(run: str, address: str, rank: str, attempt: int) -> ScrapeTarget:
    return {"targets": [address], "labels": {"run": shown(run), "rank": rank, "attempt": str(attempt)}}


class Discovery:
    """Publishes a run's targets: the current ones over HTTP, and those of the last write() in the run's folder, if it is local."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        host: str,
        port: int,
        listed: Callable[[], list[ScrapeTarget]],
        registry: CollectorRegistry,
        *,
        may_move: bool = False,
    ) -> None:
        """`listed` returns the current targets; `registry` is served too, at /metrics. ValueError if the port stays taken, unless it
        `may_move` to a free one: `problem` then says why."""
        self._path = storage.at(f"{run}/{FILE_SD}") if storage.is_local else None
        self._listed = listed
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self.problem = ""
        try:
            self._server = serve_discovery(host, port, listed, registry)
        except ValueError as error:
            if not may_move or port == 0:
                raise
            self.problem = str(error)
            self._server = serve_discovery(host, 0, listed, registry)

    @property
    def address(self) -> str:
        """host:port."""
        return self._server.address

    def write(self) -> None:
        """Write the file. With a full disk, monitoring loses its file, but the run continues."""
        if self._path is None:
            return
        with self._writing, contextlib.suppress(OSError):
            targets = [] if self._closed.is_set() else self._listed()  # under the lock, so that the last write is the newest
            write_file_sd(self._path, targets)

    def close(self) -> None:
        """End the server; no process is listed from now on."""
        self._closed.set()
        self._server.close()
        self.write()
