"""The samples that a run could not read, over all its ranks and attempts; each counts once. The file also has those that were left out
before the run, marked by their `stage`: they are kept, and do not count. `Quarantined` is pure, the coordinator's State holds one.
`QuarantineFile` keeps quarantine.jsonl like it, at a price that grows with the samples and not with their square."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.names import QUARANTINE
from cluster.storage import Storage, make_dirs, write_all

REWRITE_SECONDS = 5.0
"""Shortest time between two versions of the file on a storage that cannot append, unless the samples have doubled meanwhile."""

Record = Mapping[str, Any]
"""{"key", "reason", "split", "sample_id"}"""
STAGE = "stage"
"""Key of a record that was made before the run; the value names what made it. Its sample_id counts in other data than the run's."""


class Quarantined:
    """Records, identified by split and id."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._earlier: list[Record] = []
        self._records: list[Record] = []
        self._known: set[tuple[str, int]] = set()
        self.add(records)

    @classmethod
    def from_lines(cls, content: bytes) -> "Quarantined":
        """From the file; a line that was cut short is left out, and its sample counts when it is met again."""
        found = cls()
        for line in content.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if isinstance(record, dict) and STAGE in record:
                    found._earlier.append(record)
                else:
                    found.add([record])
        return found

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Record]) -> list[Record]:
        """Add records; returns the new ones."""
        new = []
        for record in records:
            identity = record["split"], record["sample_id"]
            if identity not in self._known:
                self._known.add(identity)
                self._records.append(dict(record))
                new.append(record)
        return new

    def to_lines(self, since: int = 0) -> bytes:
        """One JSON object per line, in the order in which they were added, without the first `since`. The whole file, since 0, begins with
        those of an earlier stage."""
        records = self._records[since:] if since else [*self._earlier, *self._records]
        return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()


class QuarantineFile:
    """A run's quarantine.jsonl. A local file is appended to. An object store cannot append: there a new version is written when the samples
    have doubled, or every REWRITE_SECONDS, or when flush() asks. Safe to use from several threads.

    `content(since)` returns the number of samples, and the lines of all but the first `since`. `on_problem(message)` is told when the file
    cannot be written; a later version will hold everything."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        *,
        content: Callable[[int], tuple[int, bytes]],
        on_problem: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._path = storage.without_retries(), f"{run}/{QUARANTINE}"
        self._content, self._on_problem, self._clock = content, on_problem, clock
        self._writing = threading.Lock()
        self._written = 0  # samples in the file
        self._tried, self._tried_at = 0, -REWRITE_SECONDS  # the newest try to write it, well or not
        self._can_append = False  # this process has written the whole file, and nothing has failed since
        self._timer: threading.Timer | None = None
        self._closed = False

    def added(self, count: int) -> None:
        """There are `count` samples now. The file has them at once, or soon."""
        with self._writing:
            if count <= self._written:
                return
            if self._can_append or count >= 2 * self._tried or self._clock() - self._tried_at >= REWRITE_SECONDS:
                self._write()
            else:
                self._write_in(REWRITE_SECONDS)

    def taken_over(self, count: int) -> None:
        """A coordinator that died may have left the file incomplete."""
        if count:
            with self._writing:
                self._write_in(0.0)

    def flush(self) -> None:
        """Write what the file lacks."""
        with self._writing:
            is_due = self._timer is not None
            self._stop_timer()
            if is_due:
                self._write()

    def close(self) -> None:
        """Write what the file lacks, and nothing after that."""
        self.flush()
        with self._writing:
            self._closed = True
            self._stop_timer()

    def _write_in(self, seconds: float) -> None:
        if self._timer is None and not self._closed:
            self._timer = threading.Timer(seconds, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self) -> None:
        self._stop_timer()
        count, lines = self._content(self._written if self._can_append else 0)
        self._tried, self._tried_at = count, self._clock()
        try:
            if self._can_append:
                append_local(self._storage.at(self._path), lines)
            else:
                self._storage.write_atomic(self._path, lines)
                self._can_append = self._storage.is_local
        except OSError as error:
            self._can_append = False  # a part of the lines may be there
            self._on_problem(str(error))
            self._write_in(REWRITE_SECONDS)
        else:
            self._written = count


def append_local(path: str, lines: bytes) -> None:
    make_dirs(os.path.dirname(path))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        write_all(descriptor, lines)
    finally:
        os.close(descriptor)
