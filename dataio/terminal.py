"""Makes a command's standard input, output and error safe to use. Every command calls `prepare_output` first, before anything is opened.

Three things are provided for. A daemon may start a command with these descriptors closed: the next file that is opened would take their
numbers, and get what is printed. The output may go away while the command runs: a closed terminal, a `| tee` that died first, a full disk.
And it may not be able to show every character: `LC_ALL=C`, or a file name that is not valid UTF-8.
"""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from dataio.raw_lines import begin
from dataio.text import printable

_BUSY_SECONDS = 5.0


def prepare_output(*, survive: bool = False) -> None:
    """Open closed descriptors 0 to 2 as /dev/null, and show characters that the output cannot take as escapes. With `survive`, output
    that cannot be written any more is dropped and the command goes on: its work does not depend on who reads along."""
    begin()
    reopened = [descriptor for descriptor in range(3) if _reopen(descriptor)]
    if sys.stdout is None or 1 in reopened:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None or 2 in reopened:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = prepared(sys.stdout, survive=survive), prepared(sys.stderr, survive=survive)


def prepared(stream: TextIO, *, survive: bool) -> TextIO:
    """`stream` with escapes for what it cannot encode; with `survive`, one that drops what it cannot write. A stream that is no file, as
    tests set it, stays as it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if not survive:
        stream.reconfigure(errors="backslashreplace")
        return stream
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    stream.flush()
    # Each line goes out as a whole: a log is read while the command runs, and there is nothing to flush at its end.
    raw = io.BufferedWriter(_Lasting(descriptor))  # type: ignore[type-var]
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def tell(text: str, stream: TextIO) -> None:
    """The only way by which the commands of dataio print: names and messages of a source move no cursor, and any terminal can encode
    them."""
    print(encodable(printable(text), stream), file=stream, flush=True)


def encodable(text: str, stream: Any) -> str:
    """`text` with escapes for what `stream` cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Lasting(io.RawIOBase):
    """Writes to a descriptor for as long as that works, then to nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process has made the terminal or pipe non-blocking, and its reader is slow
            if select.select([], [self._descriptor], [], _BUSY_SECONDS)[1]:
                return self.write(data)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk may have room again
                _point_to_nothing(self._descriptor)
        return len(data)


def _point_to_nothing(descriptor: int) -> None:
    """Whoever writes there from now on, native code too, has no error."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)


def _reopen(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        _point_to_nothing(descriptor)
        return True
    return False
