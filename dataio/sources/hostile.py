"""Reads foreign bytes as if an attacker had written them: tar archives (called by cifar), tables and the files that they name (called by
table). Pickles are read by pickled.

Archive members are streamed and never extracted by path, and sizes are limited. A table is streamed too, row by row, with a limit on the
row length; the files it names must lie in its folder.
"""

import csv
import errno
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dataio.foreign import MAX_ARCHIVE_BYTES, MAX_IMAGE_BYTES, MAX_MEMBER_BYTES, MAX_ROW_BYTES, MAX_TABLE_BYTES, open_regular, read_regular
from dataio.sources.source import ACCEPTED, SourceError

MAX_MEMBERS = 1000
MAX_HEADER_BYTES = 1 << 20
"""What an archive may say between two members."""
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_MEMBERS = (*CIFAR_TRAIN, "test_batch", "batches.meta")


def read_batches(files: Iterable[Path]) -> dict[str, bytes]:
    members = {}
    for file in files:
        try:
            members[file.name] = read_regular(file, MAX_MEMBER_BYTES)
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror}") from error
    return members


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes in all, and more than was allowed since the last `allow`: protection against
    decompression bombs, and against headers that have no end."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._left, self._limit, self._allowed = stream, limit, limit, limit

    def readable(self) -> bool:
        return True

    def allow(self, size: int) -> None:
        self._allowed = size

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        self._allowed -= len(data)
        if self._left < 0:
            raise SourceError(f"the archive unpacks to more than {self._limit} bytes; a CIFAR-10 archive has 186 MB")
        if self._allowed < 0:
            raise SourceError(f"the archive says more than {MAX_HEADER_BYTES} bytes about one member; this is no CIFAR-10 archive")
        return data


def read_archive(path: Path) -> dict[str, bytes]:
    """Reads the expected members of a CIFAR-10 archive, front to back. Other members are skipped or, if they are an attack, refused."""
    try:
        with open_regular(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            plain: Any = gzip.GzipFile(fileobj=file) if packed else file
            limited = _Limited(plain, MAX_ARCHIVE_BYTES)
            members = _members(path, limited)
            limited.allow(MAX_ARCHIVE_BYTES)
            while limited.read(1 << 20):  # gzip's checksum is at its end, after the last byte that tar reads
                pass
    except SourceError:
        raise
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OverflowError, ValueError) as error:
        raise SourceError(f"{path} is no readable tar archive ({error}); get it again") from error
    except zlib.error as error:
        raise SourceError(f"{path} is damaged ({error}); get it again") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if not members:
        raise SourceError(f"{path} holds no CIFAR-10 batches (data_batch_1, ..., test_batch, batches.meta); {ACCEPTED}")
    return members


def _members(path: Path, limited: _Limited) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=limited, mode="r|") as archive:
        limited.allow(MAX_HEADER_BYTES)
        count = 0
        while (member := archive.next()) is not None:
            count += 1
            if count > MAX_MEMBERS:
                raise SourceError(f"{path} has more than {MAX_MEMBERS} members; a CIFAR-10 archive has 9")
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all
            limited.allow(member.size + MAX_HEADER_BYTES)
            place = PurePosixPath(member.name)
            if place.is_absolute() or ".." in place.parts:
                raise SourceError(f"{path}: member {member.name!r} points out of the archive; this is no CIFAR-10 archive")
            if place.name not in CIFAR_MEMBERS:
                continue
            if not member.isreg() or member.issparse():
                raise SourceError(f"{path}: member {member.name!r} is a link or a device, not a file")
            if place.name in members:
                raise SourceError(f"{path}: there are two members named {place.name}")
            if member.size > MAX_MEMBER_BYTES:
                raise SourceError(f"{path}: member {member.name!r} claims {member.size} bytes; a batch has at most {MAX_MEMBER_BYTES}")
            content = archive.extractfile(member)
            assert content is not None
            members[place.name] = content.read()
    return members


def table_rows(path: Path, delimiter: str, *, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of each row of a table in UTF-8, the header first; empty lines are skipped. With `errors`
    "surrogateescape" bytes that are not UTF-8 stay in their cells, for whoever judges the cells one by one."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_TABLE_BYTES:
                raise SourceError(f"{path} has more than {MAX_TABLE_BYTES} bytes, the most of a table; a row an image takes some 50")
            yield from _rows(path, file, delimiter, errors)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def text_bytes(path: Path, most_bytes: int) -> bytes:
    """The whole of a small table, which is to be hashed as well as read. Raises FileNotFoundError, and SourceError for anything else."""
    try:
        return read_regular(path, most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def rows_of_text(path: Path | str, content: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """`table_rows` of a table that was read already."""
    return _rows(path, io.BytesIO(content), delimiter)


def _rows(path: Path | str, file: BinaryIO, delimiter: str, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    line, row_bytes = 0, 0

    def lines() -> Iterator[str]:
        nonlocal line, row_bytes
        while raw := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            row_bytes += len(raw)
            if row_bytes > MAX_ROW_BYTES:  # an unclosed quotation mark swallows all following lines
                raise SourceError(f"{path}, line {line}: the row has more than {MAX_ROW_BYTES} bytes; is a quotation mark left open?")
            if b"\0" in raw:
                raise SourceError(f"{path}, line {line}: there is a NUL byte, which is in no text; save the table as text in UTF-8")
            try:
                yield raw.removeprefix(b"\xef\xbb\xbf" if line == 1 else b"").decode(errors=errors)
            except UnicodeDecodeError as error:
                found = raw[error.start : error.start + 4]
                raise SourceError(f"{path}, line {line}: {found!r} is not UTF-8; save the table in UTF-8") from None

    try:
        first = 1
        for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
            if cells:
                yield first, cells
            first, row_bytes = line + 1, 0
    except csv.Error as error:
        raise SourceError(f"{path}, line {line}: {error}; write the table as the csv module does, quoted where needed") from error


def read_below(folder: Path, name: str, most_bytes: int | None = None) -> bytes:
    """The bytes of a file that a table names, below the table's `folder`. Raises OSError, also for a file that is not regular, larger than
    `most_bytes`, or a link out of the folder."""
    root = os.path.realpath(folder)
    where = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, where]) != root:
        raise OSError(errno.EACCES, "leads out of the table's folder")
    return read_regular(where, MAX_IMAGE_BYTES if most_bytes is None else most_bytes)
