"""Reads foreign bytes as if an attacker had written them: tar archives and pickles (called by cifar), tables and the files that they name
(called by table).

Archive members are streamed and never extracted by path, sizes are limited, and the unpickler builds nothing but numbers, text, lists,
dicts and checked uint8 arrays. A table is streamed too, row by row, with a limit on the row length; the files it names must lie in its
folder.
"""

import csv
import errno
import gzip
import io
import math
import os
import pickle
import pickletools
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from dataio.sources.source import ACCEPTED, SourceError, text_of

MAX_MEMBER_BYTES = 256 << 20
MAX_ARCHIVE_BYTES = 1 << 30
MAX_ROW_BYTES = 1 << 20
MAX_IMAGE_BYTES = 256 << 20
CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_MEMBERS = (*CIFAR_TRAIN, "test_batch", "batches.meta")


def read_batches(files: Iterable[Path]) -> dict[str, bytes]:
    members = {}
    for file in files:
        if file.stat().st_size > MAX_MEMBER_BYTES:
            raise SourceError(f"{file} has {file.stat().st_size} bytes, a CIFAR-10 batch at most {MAX_MEMBER_BYTES}")
        members[file.name] = file.read_bytes()
    return members


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes: protection against decompression bombs."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(f"the archive unpacks to more than {self._limit} bytes; a CIFAR-10 archive has 186 MB")
        return data


def read_archive(path: Path) -> dict[str, bytes]:
    """Reads the expected members of a CIFAR-10 archive, front to back. Other members are skipped or, if they are an attack, refused."""
    members: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            plain: Any = gzip.GzipFile(fileobj=file) if packed else file
            limited = _Limited(plain, MAX_ARCHIVE_BYTES)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    if place.is_absolute() or ".." in place.parts:
                        raise SourceError(f"{path}: member {member.name!r} points out of the archive; this is no CIFAR-10 archive")
                    if place.name not in CIFAR_MEMBERS:
                        continue
                    if not member.isreg():
                        raise SourceError(f"{path}: member {member.name!r} is a link or a device, not a file")
                    if place.name in members:
                        raise SourceError(f"{path}: there are two members named {place.name}")
                    if member.size > MAX_MEMBER_BYTES:
                        raise SourceError(
                            f"{path}: member {member.name!r} claims {member.size} bytes; a batch has at most {MAX_MEMBER_BYTES}"
                        )
                    content = archive.extractfile(member)
                    assert content is not None
                    members[place.name] = content.read()
            while limited.read(1 << 20):  # gzip's checksum is at its end, after the last byte that tar reads
                pass
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OverflowError) as error:
        raise SourceError(f"{path} is no readable tar archive ({error}); get it again") from error
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise SourceError(f"{path} is damaged ({error}); get it again") from error
        raise
    if not members:
        raise SourceError(f"{path} holds no CIFAR-10 batches (data_batch_1, ..., test_batch, batches.meta); {ACCEPTED}")
    return members


def table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of each row of a table in UTF-8, the header first; empty lines are skipped."""
    line, row_bytes = 0, 0

    def lines() -> Iterator[str]:
        nonlocal line, row_bytes
        with open(path, "rb") as file:
            while raw := file.readline(MAX_ROW_BYTES + 1):
                line += 1
                row_bytes += len(raw)
                if row_bytes > MAX_ROW_BYTES:  # an unclosed quotation mark swallows all following lines
                    raise SourceError(f"{path}, line {line}: the row has more than {MAX_ROW_BYTES} bytes; is a quotation mark left open?")
                if b"\0" in raw:
                    raise SourceError(f"{path}, line {line}: there is a NUL byte, which is in no text; save the table as text in UTF-8")
                try:
                    yield raw.removeprefix(b"\xef\xbb\xbf" if line == 1 else b"").decode()
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


def read_below(folder: Path, name: str) -> bytes:
    """The bytes of a file that a table names, below the table's `folder`. Raises OSError, also for a file that is not regular or a link out
    of the folder."""
    root = os.path.realpath(folder)
    where = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, where]) != root:
        raise OSError(errno.EACCES, "leads out of the table's folder")
    descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK, opening a pipe would wait for its writer
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if facts.st_size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"{facts.st_size} bytes; an image has at most {MAX_IMAGE_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_IMAGE_BYTES)
    finally:
        os.close(descriptor)


# What CIFAR batches may contain; everything else is refused. All callables here are instances without attributes of their own, so a pickle
# can neither reach code nor change any.

_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET
    PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
_ARRAY_LIMIT = 1 << 20  # images a batch


class _Dtype:
    """Stands in for numpy.dtype in a pickle: remembers the requested type, creates nothing."""

    __slots__ = ("name",)

    def __init__(self, name: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which a single byte does not have


class _Array:
    """Stands in for an ndarray until its state has been checked."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array's state is not (version, shape, dtype, order, bytes)")
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


class _Allowed:
    """One allowed global of a pickle."""

    __slots__ = ("_name",)
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name} of {self._name}")

    def __call__(self, *args: object) -> object:
        match self._name, args:
            case "_reconstruct", (_Allowed(), _, _):
                return _Array()
            case "dtype", (name, *_):
                return _Dtype(text_of(name) if isinstance(name, bytes | str) else name)
            case "_frombuffer", (raw, dtype, shape, order):
                array = _Array()
                array.value = _array(raw, dtype, shape, order)
                return array
            case "encode", (str(text), "latin1" | b"latin1"):  # how Python 3 writes bytes for Python 2
                return text.encode("latin1")
        raise pickle.UnpicklingError(f"calls {self._name} with unexpected arguments")


_GLOBALS = {
    (module, name): _Allowed(name)
    for name, modules in {
        "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
        "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"),
        "ndarray": ("numpy",),
        "dtype": ("numpy",),
        "encode": ("_codecs",),
    }.items()
    for module in modules
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refers to {module}.{name}") from None


def load_cifar_pickle(name: str, raw: bytes) -> dict[str, Any]:
    """The dict of a CIFAR batch; texts are bytes or str, arrays (n, m) uint8. Raises SourceError that names what was refused."""
    try:
        count = 0
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(f"uses the opcode {opcode.name}")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:  # would allocate a memo of gigabytes
                raise pickle.UnpicklingError(f"numbers a memo entry {argument}")
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise SourceError(f"{name} is not a CIFAR-10 batch: its pickle is refused ({error}), nothing of it was executed") from error
    if not isinstance(content, dict) or not all(isinstance(key, bytes | str) for key in content):
        raise SourceError(f"{name} is not a CIFAR-10 batch: it holds a {type(content).__name__}, not a dict of named values")
    return {text_of(key): value.value if isinstance(value, _Array) else value for key, value in content.items()}


def _array(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "|u1", "uint8"):
        raise pickle.UnpicklingError(f"holds an array of {getattr(dtype, 'name', dtype)!r:.40}, not of uint8")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(side) is int and 0 <= side <= _ARRAY_LIMIT for side in shape):
        raise pickle.UnpicklingError(f"holds an array of shape {shape!r:.60}")
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape):
        raise pickle.UnpicklingError(f"holds an array of shape {shape} without its bytes")
    return np.frombuffer(bytes(raw), np.uint8).reshape(shape, order="F" if order in ("F", b"F") else "C")
