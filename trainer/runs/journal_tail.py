"""Reads a run's journal in bounded steps: its beginning and its end, then new events. For callers that look at many runs (status) or for a
long time (watch). cluster.journal.read_journal reads every event, and describes how a journal is written.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.journal import LATEST, in_order
from cluster.storage import Entry, Storage, open_regular
from dataio.foreign import json_of

Event = dict[str, Any]

FOLLOW_BYTES = 4 << 20  # read at once from a growing journal; the rest follows in the next call
_SEGMENT = re.compile(r".+-\d{6,}\.json")
_HEAD_BYTES = 16 << 10  # holds the first driver's `run_started`
_HEAD_SEGMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """Some of a journal's events, in their order."""

    events: list[Event]
    is_whole: bool
    """Whether these are all events; if not, those in the middle are missing."""


class JournalTail:
    """One run's journal. Call `excerpt` first; then `follow` gives what has come since."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage, self._run = storage, run
        self._offset, self._rest, self._inode = 0, b"", -1  # of journal.jsonl: the position, a line that is not complete yet
        self._seen: set[str] = set()  # segments seen on a remote storage

    def excerpt(self, *, tail_bytes: int, tail_segments: int) -> Excerpt:
        """The first 16 KiB and the last `tail_bytes` of a local journal, or the first 2 and the last `tail_segments` objects of a remote
        one. FileNotFoundError if there is no journal; another OSError if it cannot be read."""
        if self._storage.is_local:
            return self._local(tail_bytes)
        segments = self._segments()
        if not segments:
            raise FileNotFoundError(f"{self._run}/journal is empty")
        # Sorted by time, because names tell the writer, not the time. An object has the time of its upload: that of its event, unless there
        # was an outage.
        segments.sort(key=lambda entry: (entry.modified, entry.name))
        head, tail = segments[:_HEAD_SEGMENTS], segments[_HEAD_SEGMENTS:]
        tail = tail[max(0, len(tail) - tail_segments) :]
        self._seen = {entry.name for entry in segments}
        return Excerpt(events=self._read(head + tail), is_whole=len(head) + len(tail) == len(segments))

    def follow(self) -> list[Event]:
        """The events written since `excerpt` or the last call. A journal that does not exist (yet) has none."""
        if not self._storage.is_local:
            fresh = [entry for entry in self._segments() if entry.name not in self._seen]
            events = self._read(fresh)
            self._seen |= {entry.name for entry in fresh}
            return events
        try:
            file = open_regular(self._path)
        except FileNotFoundError:
            return []
        with file:
            descriptor = file.fileno()
            status = os.fstat(descriptor)
            if status.st_ino != self._inode or status.st_size < self._offset:  # another file replaced it
                self._inode, self._offset, self._rest = status.st_ino, 0, b""
            data = os.pread(descriptor, FOLLOW_BYTES, self._offset)
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return _events(lines)

    def _local(self, tail_bytes: int) -> Excerpt:
        with open_regular(self._path) as file:
            descriptor = file.fileno()
            status = os.fstat(descriptor)
            is_whole = status.st_size <= _HEAD_BYTES + tail_bytes
            head = os.pread(descriptor, _HEAD_BYTES + tail_bytes if is_whole else _HEAD_BYTES, 0)
            tail = b"" if is_whole else os.pread(descriptor, tail_bytes, status.st_size - tail_bytes)
        self._inode, self._offset = status.st_ino, len(head) if is_whole else status.st_size - tail_bytes + len(tail)
        lines = head.split(b"\n")
        if not is_whole:
            del lines[-1]  # cut off, as is the tail's first line
            lines += tail.split(b"\n")[1:]
        self._rest = lines.pop() if lines else b""
        # A last line without its end: the writer was killed within it, or is still writing it. Only a complete one counts as an event.
        last = _events([self._rest])
        if last:
            self._rest = b""
        return Excerpt(events=_events(lines) + last, is_whole=is_whole)

    @property
    def _path(self) -> str:
        return self._storage.at(f"{self._run}/journal.jsonl")

    def _segments(self) -> list[Entry]:
        return [entry for entry in self._storage.list(f"{self._run}/journal") if _SEGMENT.fullmatch(entry.name)]

    def _read(self, segments: Iterable[Entry]) -> list[Event]:
        read = ((entry.name, _event(self._storage.read(f"{self._run}/journal/{entry.name}"))) for entry in segments)
        return in_order((name, event) for name, event in read if event is not None)


def _events(lines: Iterable[bytes]) -> list[Event]:
    """Parses events; a line that a killed writer left half written is none."""
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        event = json_of(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str) or not isinstance(event.get("time"), int | float):
        return None
    return event if abs(event["time"]) < LATEST else None
