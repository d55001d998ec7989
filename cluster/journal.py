"""The run's journal: one JSON object per event, append-only. Driver, coordinator and workers write it; the report, a restarted coordinator
and people read it.

A local journal is `<run>/journal.jsonl`. Each line is one O_APPEND write, so any number of processes can share the file. An object store
cannot append, so there each event is a numbered object `<run>/journal/<writer>-000001.json`; only one process at a time uses a writer's
name.

A failing storage blocks nobody. On a local storage the events wait for the next write. On a remote storage the first failure costs its
caller one try; from then on events go to a buffer in memory, and a thread retries until all of them are written, in order."""

import atexit
import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cluster.redact import redacted
from cluster.storage import Storage, make_dirs, write_all
from cluster.text import shown

_SEGMENT = re.compile(r"(.+)-(\d{6,})\.json")
_WRITER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

BACKLOG_EVENTS = 10_000
"""Events kept in memory during an outage; beyond that the oldest are lost, and `events_lost` counts them."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
EXIT_SECONDS = 10.0
"""How long a process that ends in an outage waits for the storage to take its last events."""

log = logging.getLogger(__name__)

LATEST = 1e12
"""No event has a later time, in unix seconds; neither infinity nor a number that is none has."""


class Journal:
    """One writer's handle. Safe to use from several threads."""

    def __init__(
        self,
        storage: Storage,
        run: str,
        writer: str,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        if not _WRITER.fullmatch(writer):
            raise ValueError(f"writer={writer!r} is not a name; use letters, digits, '.', '_' and '-'")
        self._storage, self._run, self._writer, self._clock, self._pause = storage.without_retries(), run, writer, clock, pause
        self._changed = threading.Condition()
        self._backlog: deque[str] = deque()
        self._lost = 0
        self._is_out = False
        self._segments = 0
        if storage.is_local:
            make_dirs(storage.at(run))
        else:
            found = (_SEGMENT.fullmatch(entry.name) for entry in storage.list(f"{run}/journal"))
            self._segments = max((int(match[2]) for match in found if match and match[1] == writer), default=0)

    @classmethod
    def open(cls, storage: Storage, run: str, writer: str, clock: Callable[[], float] = time.time) -> "Journal":
        return cls(storage, run, writer, clock)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the current time. A failing storage does not block the caller: the event waits, see the module."""
        line = self._line(event, **fields)
        with self._changed:
            self._backlog.append(line)
            if len(self._backlog) > BACKLOG_EVENTS:
                self._backlog.popleft()
                self._lost += 1
            if self._is_out:
                return
            try:
                self._flush()
            except OSError as error:
                log.warning("journal of %s: %d event(s) wait for the storage: %s", shown(self._run), len(self._backlog), shown(error))
                if not self._storage.is_local:
                    self._is_out = True
                    threading.Thread(target=self._flush_later, name="journal", daemon=True).start()
                    atexit.register(self.flush, EXIT_SECONDS)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until no event waits for a remote storage; False after `timeout_seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_out, timeout_seconds)

    def _flush_later(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            self._pause(pause)
            with self._changed:
                line = self._backlog[0]
            try:
                self._write_segment(line)  # outside the lock: a failure may take seconds
            except OSError:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = 0.0
            with self._changed:
                self._segments += 1
                if self._backlog[0] is line:
                    self._backlog.popleft()
                else:
                    self._lost -= 1  # counted as lost to make room for a newer one, but written after all
                if self._lost and not self._backlog:
                    self._backlog.append(self._line("events_lost", count=self._lost, writer=self._writer))
                    self._lost = 0
                if not self._backlog:
                    self._is_out = False
                    self._changed.notify_all()
                    atexit.unregister(self.flush)
                    return

    def _flush(self) -> None:
        while self._backlog:
            if self._storage.is_local:
                self._append(self._backlog[0])
            else:
                self._write_segment(self._backlog[0])
                self._segments += 1
            self._backlog.popleft()

    def _write_segment(self, line: str) -> None:
        # A number is reused for other content only if its write never succeeded as far as we know.
        self._storage.write_atomic(f"{self._run}/journal/{self._writer}-{self._segments + 1:06d}.json", line.encode())

    def _line(self, event: str, **fields: Any) -> str:
        return json.dumps({"time": self._clock(), "event": event, **redacted(_jsonable(fields))}, separators=(",", ":"))

    def _append(self, line: str) -> None:
        descriptor = os.open(self._storage.at(f"{self._run}/journal.jsonl"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Any writer's line may be cut short by a full disk or a kill; the next line then starts on a new line.
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, ("\n" * is_torn + line + "\n").encode())
        finally:
            os.close(descriptor)


def read_journal(storage: Storage, run: str) -> list[dict[str, Any]]:
    """All events, ordered by time. Half-written events of a killed writer are skipped."""
    texts = []
    if storage.exists(f"{run}/journal.jsonl"):
        texts += storage.read(f"{run}/journal.jsonl").decode(errors="replace").split("\n")
    for entry in storage.list(f"{run}/journal"):
        if _SEGMENT.fullmatch(entry.name):
            texts.append(storage.read(f"{run}/journal/{entry.name}").decode(errors="replace"))
    events = [event for text in texts if (event := _event(text)) is not None]
    return sorted(events, key=lambda event: float(event["time"]))


def last_attempt(events: list[dict[str, Any]]) -> int:
    """The highest attempt number in a journal, 0 if there is none. The numbering continues over all drivers of a run."""
    return max((event["attempt"] for event in events if event["event"] == "attempt_started"), default=0)


def _event(text: str) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), int | float)
    return event if is_event and abs(event["time"]) < LATEST else None


def _jsonable(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null, and turn unknown types into text."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case dict():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case _:
            return str(value)
