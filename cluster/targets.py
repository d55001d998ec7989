"""Lists a run's processes for Prometheus, as a pure function, publishes the list, and takes it back at the run's end.

The coordinator calls it and knows who is there; exporter.py has the HTTP server and the file's format, shared_port.py the port that several
runs share, readers.py who has read what."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.exporter import LEFTOVER_SECONDS, serve_discovery, write_file_sd
from cluster.names import FILE_SD
from cluster.readers import Readers
from cluster.roster import RankInfo
from cluster.shared_port import SharedPort
from cluster.storage import Storage
from cluster.target_list import is_of_another, take_back
from cluster.text import shown

ScrapeTarget = dict[str, Any]
"""{"targets": [host:port], "labels": {...}}, the format of http_sd and file_sd."""


def targets_of(run: str, attempt: int, infos: Mapping[int, RankInfo], coordinator: str, namespace: str = "") -> list[ScrapeTarget]:
    """The ranks of an attempt that serve metrics, and the coordinator at `coordinator`. Prometheus gives every series of a target, and its
    `up`, the target's labels: `namespace`, unless it is empty, tells two users' runs of one name apart."""
    whose = {"namespace": shown(namespace)} if namespace else {}
    ranks = [_target(whose, run, infos[rank].metrics_address, str(rank), attempt) for rank in sorted(infos) if infos[rank].metrics_address]
    return [*ranks, _target(whose, run, coordinator, "coordinator", 0)]


def _target(whose: Mapping[str, str], run: str, address: str, rank: str, attempt: int) -> ScrapeTarget:
    return {"targets": [address], "labels": {**whose, "run": shown(run), "rank": rank, "attempt": str(attempt)}}


class Discovery:
    """Publishes a run's targets: the current ones over HTTP, and those of the last write() in the run's folder, if it is local.

    The end has three steps, since what Prometheus has not read it does not know: it reads the last values (mark, retire), then that there
    is nothing left to scrape (retire), then the server ends (close)."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        host: str,
        port: int,
        listed: Callable[[str], list[ScrapeTarget]],
        registry: CollectorRegistry,
        *,
        may_move: bool = False,
        note: Path | None = None,
        wait_seconds: float = LEFTOVER_SECONDS,
    ) -> None:
        """`listed` returns the current targets, of which `registry` is one, at the address that it is given. `port` is shared with other
        runs on this machine; 0 takes a free one, not shared. ValueError if the port stays with somebody else, unless the run `may_move` to
        a free one: `problem` then says why. `note` is a file that tells the reaper which list to take back where the driver is killed."""
        self._path = storage.at(f"{run}/{FILE_SD}") if storage.is_local else None
        self._listed, self._note = listed, note
        self._writing, self._has_written = threading.Lock(), False
        self._closed = threading.Event()
        self._readers = Readers()
        self._marked_at = 0.0
        self._shared: SharedPort | None = None
        self.problem = ""
        self._server = serve_discovery(host, 0, self.targets, registry, heard=self._readers.heard)
        if port == 0:
            return
        try:
            self._shared = SharedPort(host, port, self.targets, self._readers.heard, wait_seconds)
        except ValueError as error:
            if not may_move:
                self._server.close()
                raise
            self.problem = str(error)

    @property
    def address(self) -> str:
        """host:port at which Prometheus asks for the targets."""
        return self._shared.address if self._shared is not None else self._server.address

    def targets(self) -> list[ScrapeTarget]:
        """What is published now."""
        return [] if self._closed.is_set() else self._listed(self._server.address)

    def write(self) -> None:
        """Write the file, and tell whoever has the shared port. With a full disk, monitoring loses its file, but the run continues."""
        if self._shared is not None:
            self._shared.changed()
        if self._path is None:
            return
        with self._writing, contextlib.suppress(OSError):  # under the lock, so that the last write is the newest
            if self._closed.is_set():
                take_back(self._path, self._server.address)  # unless it is another driver's by now
                return
            if self._has_written and is_of_another(self._path, self._server.address):
                return  # by another command, which has taken the run over
            self._has_written = True
            write_file_sd(self._path, self.targets())
            if self._note is not None:
                self._note.write_text(json.dumps({"file": os.path.abspath(self._path), "address": self._server.address}))

    def mark(self) -> float:
        """Values that Prometheus is to read at all events are set. Returns for how many seconds at most retire() will wait; 0 where nobody
        reads this run."""
        now = time.monotonic()
        self._marked_at = self._marked_at or now
        scraped, listed = self._readers.due_seconds("/metrics", self._marked_at), self._readers.due_seconds("/sd", now)
        return scraped + listed

    def retire(self) -> None:
        """Once Prometheus has read what was marked, take all processes off the list, and let it read that."""
        self._readers.wait("/metrics", self._marked_at)
        self._closed.set()
        self.write()
        if self._shared is None or self._shared.is_holder:  # else the holder goes on to answer, without this run
            self._readers.wait("/sd", time.monotonic())

    def close(self) -> None:
        """End the server; no process is listed from now on."""
        self._closed.set()
        if self._shared is not None:
            self._shared.close()
        self._server.close()
        self.write()
