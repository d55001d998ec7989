"""Writes the coordinator's events into the run's journal, in order and each once, also over a restart of the coordinator.

State.untold holds the events, and the log keeps them, until `told` says that the journal has them. A coordinator that takes over looks
which of them its predecessor had written already. A storage that cannot even be looked at when it takes over holds up nobody: a thread of
its own tries again until it can."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Sequence

from cluster.journal import Journal, read_journal
from cluster.state import Event
from cluster.storage import Storage

OPEN_PAUSE_SECONDS = 2.0


class Outbox:
    """See the module. Safe to use from several threads.

    `untold(serial)` returns the events after this one that the journal may lack, in order; `told(serial)` is called when it has all up to
    this one. The caller of `write` holds no lock that they need."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        writer: str,
        *,
        untold: Callable[[int], Sequence[Event]],
        told: Callable[[int], None],
        now: Callable[[], float],
    ) -> None:
        self._storage, self._run, self._writer, self._now = storage, run, writer, now
        self._untold, self._told = untold, told
        self._writing = threading.Lock()
        self._handed = self._confirmed = 0
        self._journal: Journal | None = None
        self._opened, self._closed = threading.Event(), threading.Event()
        self._inherited = untold(0)
        if not self._open():
            threading.Thread(target=self._open_later, name="journal-open", daemon=True).start()

    def write(self) -> None:
        """Write the new events. A failing storage blocks the caller for one try at most: see journal.py."""
        if self._handed == self._confirmed and not self._untold(self._handed):
            return
        with self._writing:
            if self._journal is None:
                return
            for event in self._untold(self._handed):
                self._journal.write(event.event, **{**event.fields, "time": event.time})
                self._handed = event.serial
            if self._handed > self._confirmed and self._journal.flush(0.0):
                self._confirmed = self._handed
                self._told(self._handed)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until the storage has all events; False after `timeout_seconds`."""
        self._opened.wait(timeout_seconds)
        self.write()
        with self._writing:
            journal = self._journal
        if journal is None or not journal.flush(timeout_seconds):
            return False
        self.write()
        return True

    def close(self) -> None:
        """Give up opening the journal."""
        self._closed.set()
        self._opened.set()

    def _open_later(self) -> None:
        while not self._closed.wait(OPEN_PAUSE_SECONDS):
            if self._open():
                return self.write()
        return None

    def _open(self) -> bool:
        try:
            journal = Journal.open(self._storage, self._run, self._writer, self._now)
            handed = newest_written(self._inherited, written_by(self._storage, self._run, self._writer)) if self._inherited else 0
        except OSError:
            return False
        with self._writing:
            self._journal, self._handed = journal, handed
        self._opened.set()
        return True


def newest_written(inherited: Sequence[Event], lines: Callable[[int], set[tuple[float, str]]]) -> int:
    """Serial of the newest of the `inherited` events that the journal has; 0 if it has none. They were written in order."""
    there = lines(len(inherited))
    return max((event.serial for event in inherited if (event.time, event.event) in there), default=0)


def written_by(storage: Storage, run: str, writer: str) -> Callable[[int], set[tuple[float, str]]]:
    """Looks up (time, name) of the journal's events. On an object store, only the newest `count` of this writer and a few more."""

    def lines(count: int) -> set[tuple[float, str]]:
        if storage.is_local:
            return {(event["time"], event["event"]) for event in read_journal(storage, run)}
        mine = re.compile(rf"{re.escape(writer)}-(\d{{6,}})\.json")
        found = sorted((int(match[1]), entry.name) for entry in storage.list(f"{run}/journal") if (match := mine.fullmatch(entry.name)))
        newest = [_parsed(storage.read(f"{run}/journal/{name}")) for _, name in found[-count - 8 :]]
        return {key for key in newest if key is not None}

    return lines


def _parsed(content: bytes) -> tuple[float, str] | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        event = json.loads(content)
        return event["time"], event["event"]
    return None
