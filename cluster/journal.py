"""The run's journal: one JSON object per event, append-only. Driver, coordinator and workers write it; the report, a restarted coordinator
and people read it.

A local journal is `<run>/journal.jsonl`. Each line is one O_APPEND write, so any number of processes can share the file. An object store
cannot append, so there each event is a numbered object `<run>/journal/<writer>-000001.json`; only one process at a time uses a writer's
name.

A failing storage blocks nobody. A thread writes the events, in order, and tries again until each is written. A caller waits for its own
event, so that it is durable when `write` returns, but only while the storage answers promptly: once it does not, events wait in memory.

Readers get the events in the order in which they happened (`in_order`), not in that of the wall clock, which may be set at any time."""

import atexit
import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.redact import redacted
from cluster.storage import Entry, Storage, is_outage, make_dirs, write_all
from cluster.text import shown

Event = dict[str, Any]

_SEGMENT = re.compile(r"(.+)-(\d{6,})\.json")
_WRITER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OF_GENERATION = re.compile(r".*-g(\d{4,})")
_UP = "up"  # in a segment: the writer's monotonic clock, which all processes of a host share

BACKLOG_EVENTS = 10_000
"""Events kept in memory during an outage; beyond that the oldest are lost, and `events_lost` counts them."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
PROMPT_SECONDS = 1.0
"""How long a caller waits for its event to be written. After that nobody waits until all events are written."""
EXIT_SECONDS = 10.0
"""How long a process that ends in an outage waits for the storage to take its last events."""
IDLE_SECONDS = 2.0
"""After this time without an event the writing thread ends; the next event starts another one."""
READS_AT_ONCE = 16
READ_BYTES = 1 << 20

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
        up: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remote storage is not asked for anything before the first event."""
        if not _WRITER.fullmatch(writer):
            raise ValueError(f"writer={writer!r} is not a name; use letters, digits, '.', '_' and '-'")
        self._storage, self._run, self._writer = storage.without_retries(), run, writer
        self._clock, self._pause, self._up = clock, pause, up
        self._changed = threading.Condition()
        self._backlog: deque[str] = deque()
        self._taken, self._done = 0, 0  # events handed in; written or lost
        self._lost = 0
        self._is_out = False
        self._is_writing = False  # the thread lives
        self._segments = -1  # the newest segment's number; -1: not looked up yet
        if storage.is_local:
            try:
                make_dirs(storage.at(run))
            except OSError as error:
                if not is_outage(error):
                    raise  # in an outage the first event makes the folder

    @classmethod
    def open(cls, storage: Storage, run: str, writer: str, clock: Callable[[], float] = time.time) -> "Journal":
        return cls(storage, run, writer, clock)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the current time. A failing storage does not block the caller: the event waits, see the module."""
        line = self._line(event, **fields)
        with self._changed:
            self._backlog.append(line)
            self._taken += 1
            mine = self._taken
            if len(self._backlog) > BACKLOG_EVENTS:
                self._backlog.popleft()
                self._done += 1
                self._lost += 1
            if not self._is_writing:
                self._is_writing = True
                threading.Thread(target=self._write_all, name="journal", daemon=True).start()
            self._changed.notify_all()
            if not self._is_out and not self._changed.wait_for(lambda: self._done >= mine or self._is_out, PROMPT_SECONDS):
                self._go_out("it is slow")

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until every event is written; False after `timeout_seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._backlog, timeout_seconds)

    # The thread

    def _write_all(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._backlog, IDLE_SECONDS):
                    self._is_writing = False
                    return
                line = self._backlog[0]
            try:
                self._put(line)  # outside the lock: a failure may take seconds
            except Exception as error:  # an event that is not written holds up those behind it, and nothing else
                with self._changed:
                    self._go_out(str(error))
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            with self._changed:
                self._wrote(line)

    def _wrote(self, line: str) -> None:
        if self._backlog and self._backlog[0] is line:
            self._backlog.popleft()
            self._done += 1
        else:
            self._lost -= 1  # counted as lost to make room for a newer one, but written after all
        if self._lost and not self._backlog:
            self._backlog.append(self._line("events_lost", count=self._lost, writer=self._writer))
            self._taken += 1
            self._lost = 0
        if not self._backlog and self._is_out:
            self._is_out = False
            atexit.unregister(self.flush)
        self._changed.notify_all()

    def _go_out(self, why: str) -> None:
        """From now on nobody waits for the storage."""
        if self._is_out:
            return
        self._is_out = True
        self._changed.notify_all()
        log.warning("journal of %s: %d event(s) wait for the storage: %s", shown(self._run), len(self._backlog), shown(why))
        atexit.register(self.flush, EXIT_SECONDS)

    def _put(self, line: str) -> None:
        if self._storage.is_local:
            self._append(line)
            return
        if self._segments < 0:
            found = (_SEGMENT.fullmatch(entry.name) for entry in self._storage.list(f"{self._run}/journal"))
            self._segments = max((int(match[2]) for match in found if match and match[1] == self._writer), default=0)
        # A number is reused for other content only if its write never succeeded as far as we know.
        self._storage.write_atomic(f"{self._run}/journal/{self._writer}-{self._segments + 1:06d}.json", line.encode())
        self._segments += 1

    def _line(self, event: str, **fields: Any) -> str:
        up = {} if self._storage.is_local else {_UP: round(self._up(), 6)}  # the lines of a file have their order
        return json.dumps({"time": self._clock(), "event": event, **redacted(_jsonable(fields)), **up}, separators=(",", ":"))

    def _append(self, line: str) -> None:
        path = self._storage.at(f"{self._run}/journal.jsonl")
        try:
            descriptor = os.open(path, _APPEND, 0o644)
        except FileNotFoundError:
            make_dirs(os.path.dirname(path))
            descriptor = os.open(path, _APPEND, 0o644)
        try:
            # Any writer's line may be cut short by a full disk or a kill; the next line then starts on a new line.
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, ("\n" * is_torn + line + "\n").encode())
        finally:
            os.close(descriptor)


_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND


class JournalReader:
    """Reads a run's journal again and again; each line and each object is read once. Safe to use from several threads.

    A remote journal costs one listing a call, and one read for each new event."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage, self._run = storage, run
        self._reading = threading.Lock()
        self._file = _GrowingFile(storage.at(f"{run}/journal.jsonl"))
        self._copied: list[Event] | None = None  # a remote journal.jsonl, which only a copy from a disk can have made
        self._segments: dict[str, _Segment] = {}
        self._known: list[Event] = []

    @property
    def known(self) -> list[Event]:
        """What the last call of `read` returned; this never waits."""
        return self._known

    def read(self) -> list[Event]:
        """All events in their order. Half-written events of a killed writer are skipped. An OSError loses nothing that was read."""
        with self._reading:
            lines = self._file.read() if self._storage.is_local else self._read_copied()
            self._read_segments()
            segments = in_order((name, segment.event) for name, segment in self._segments.items() if segment.event is not None)
            self._known = _joined(lines, segments)
            return self._known

    def _read_copied(self) -> list[Event]:
        if self._copied is None:
            try:
                self._copied = _events(self._storage.read(f"{self._run}/journal.jsonl").split(b"\n"))
            except FileNotFoundError:
                self._copied = []
        return self._copied

    def _read_segments(self) -> None:
        entries = [entry for entry in self._storage.list(f"{self._run}/journal") if _SEGMENT.fullmatch(entry.name)]
        there = {entry.name for entry in entries}
        self._segments = {name: segment for name, segment in self._segments.items() if name in there}
        # An object is written again if the answer to its first upload was lost.
        fresh = [entry for entry in entries if entry.name not in self._segments or self._segments[entry.name].entry != entry]
        fresh.reverse()
        errors: list[Exception] = []

        def fetch() -> None:
            while fresh and not errors:
                try:
                    entry = fresh.pop()
                except IndexError:
                    return  # another thread took the last one
                try:
                    data = self._storage.read(f"{self._run}/journal/{entry.name}")
                except FileNotFoundError:
                    continue  # deleted since the listing
                except Exception as error:
                    errors.append(error)
                    return
                self._segments[entry.name] = _Segment(entry=entry, event=_event(data))

        # Daemons, unlike a pool's threads: the program's end does not wait for a storage that is silent.
        helpers = [threading.Thread(target=fetch, daemon=True) for _ in range(min(READS_AT_ONCE, len(fresh)) - 1)]
        for helper in helpers:
            helper.start()
        fetch()
        for helper in helpers:
            helper.join()
        if errors:
            raise errors[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    entry: Entry
    event: Event | None
    """None if the object holds no event."""


class _GrowingFile:
    """A local journal of which only the new bytes are read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._forget(-1)

    def _forget(self, inode: int) -> None:
        self._inode, self._offset, self._rest = inode, 0, b""
        self._events: list[Event] = []

    def read(self) -> list[Event]:
        """All events. The last line counts if it is complete but for its end."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            self._forget(-1)
            return []
        try:
            status = os.fstat(descriptor)
            if status.st_ino != self._inode or status.st_size < self._offset:  # another file
                self._forget(status.st_ino)
            while data := os.pread(descriptor, READ_BYTES, self._offset):
                self._offset += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._events += _events(lines)
        finally:
            os.close(descriptor)
        return self._events + _events([self._rest])


def read_journal(storage: Storage, run: str) -> list[Event]:
    """All events in their order (`in_order`). Half-written events of a killed writer are skipped. Who reads again has a JournalReader."""
    return JournalReader(storage, run).read()


def last_attempt(events: Iterable[Event]) -> int:
    """The highest attempt number in a journal, 0 if there is none. The numbering continues over all drivers of a run."""
    return max((event["attempt"] for event in events if event["event"] == "attempt_started"), default=0)


# --- the order of events ------------------------------------------------------------------------------------------------------------------


def in_order(segments: Iterable[tuple[str, Event]]) -> list[Event]:
    """The events of a remote journal in the order in which they happened. `segments`: names of objects, each with its event.

    The wall clock decides nothing that something better is known of: it may have been wrong, and set in the middle of a run.
    - The events of one writer are in the order of their numbers.
    - All events of a driver and its coordinator, who have one generation, come before those of the next generation. So a later attempt
      never comes before an earlier one.
    - Within a generation the monotonic clock of their host decides. Segments of older releases lack it, and have only the time.

    A local journal's lines need none of this: they are in the order in which they were written."""
    writers: dict[str, list[tuple[int, Event]]] = {}
    for name, event in segments:
        match = _SEGMENT.fullmatch(name)
        if match is not None:
            writers.setdefault(match[1], []).append((int(match[2]), event))
    told = {writer: [event for _, event in sorted(numbered, key=lambda one: one[0])] for writer, numbered in sorted(writers.items())}
    generations = _generations(told)
    by_time = {generations[writer] for writer, events in told.items() if any(_UP not in event for event in events)}
    placed: list[tuple[int, float, Event]] = []
    for writer, events in told.items():
        generation = generations[writer]
        at = -math.inf
        for event in events:
            at = max(at, float(event["time"] if generation in by_time else event[_UP]))
            placed.append((generation, at, event))
    placed.sort(key=lambda one: one[:2])  # stable: equal ones of a writer keep their order
    return [{key: value for key, value in event.items() if key != _UP} for _, _, event in placed]


def _generations(told: Mapping[str, Sequence[Event]]) -> dict[str, int]:
    """The generation of each writer. A coordinator's name has it, a driver's events may. Any other driver is that of the coordinator that
    began next after it; if none did, it is the newest."""
    known: dict[str, int] = {}
    for writer, events in told.items():
        named = _OF_GENERATION.fullmatch(writer)
        said = [event["generation"] for event in events if isinstance(event.get("generation"), int)]
        if named or said:
            known[writer] = int(named[1]) if named else said[0]
    begun = sorted((float(told[writer][0]["time"]), generation) for writer, generation in known.items() if _OF_GENERATION.fullmatch(writer))
    newest = max(known.values(), default=0)

    def guess(events: Sequence[Event]) -> int:
        later = [generation for time, generation in begun if time >= float(events[0]["time"])]
        return later[0] if later else newest + 1

    return {writer: known[writer] if writer in known else guess(events) for writer, events in told.items()}


def _joined(lines: list[Event], segments: list[Event]) -> list[Event]:
    """Both parts of a journal, if its run was copied from one kind of storage to another, perhaps there and back: the segments come where
    the file goes on without them. The generations of the drivers say where that is, or else the time."""
    if not lines or not segments:
        return lines or segments

    def generations(events: list[Event]) -> list[int]:
        return [event["generation"] for event in events if isinstance(event.get("generation"), int)]

    if generations(lines) and generations(segments):
        newest = max(generations(segments))
        later = [index for index, event in enumerate(lines) if isinstance(event.get("generation"), int) and event["generation"] > newest]
    else:
        later = [index for index, event in enumerate(lines) if float(event["time"]) > float(segments[-1]["time"])]
    at = min(later, default=len(lines))
    begins = [index for index in range(at, -1, -1) if index < len(lines) and lines[index]["event"] == "run_started"]
    at = begins[0] if later and begins and not generations(lines[begins[0] : at]) else at  # a driver begins before it names its generation
    return [*lines[:at], *segments, *lines[at:]]


def _events(lines: Iterable[bytes]) -> list[Event]:
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    """None for what a killed writer left half written."""
    try:
        event = json.loads(line.decode(errors="replace"))
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
