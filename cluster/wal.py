"""A write-ahead log: records that a process leaves for the one that takes its place. The coordinator's memory of its run.

coordinator.py writes it and says what a record holds. The file lies on the local disk of the driver's node. It has to survive the death of
the process that writes it, not that of the machine, which would take the driver along; so nothing is synced, and a record costs
microseconds.

    length (4 bytes) | CRC-32 of the record (4 bytes) | record

A process that dies in the middle of a write leaves a torn record at the end, which is ignored. Each process writes a file of its own, which
replaces the one before by a rename, so that no two ever write into one."""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from cluster.storage import write_all

_HEAD = struct.Struct("<II")


def read_log(path: Path) -> list[bytes] | None:
    """All whole records, in order; None if there is no such file. OSError if it cannot be read."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    records, at = [], 0
    while at + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, at)
        record = content[at + _HEAD.size : at + _HEAD.size + length]
        if len(record) < length or zlib.crc32(record) != checksum:
            break
        records.append(bytes(record))
        at += _HEAD.size + length
    return records


class Log:
    """One process's log. It has no lock: the owner holds its own around every call. Every method may raise OSError; then the file must be
    given up by discard(), because a half-written record hides everything behind it."""

    def __init__(self, path: Path) -> None:
        """Writes nothing yet; begin() does."""
        self._path = path
        self._descriptor: int | None = None
        self.size_bytes = 0

    def begin(self, records: Iterable[bytes]) -> None:
        """Begin anew with these records, in place of the file that is there."""
        self._close()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._descriptor, self.size_bytes = descriptor, 0
        try:
            for record in records:
                self.append(record)
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink()
            raise

    def append(self, record: bytes) -> None:
        assert self._descriptor is not None, "begin() comes first"
        frame = _HEAD.pack(len(record), zlib.crc32(record)) + record
        write_all(self._descriptor, frame)
        self.size_bytes += len(frame)

    def discard(self) -> None:
        """Remove the file: a successor must not take an incomplete log for the whole. Works on a full disk."""
        self._close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def close(self) -> None:
        """Write no more; the file stays."""
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
