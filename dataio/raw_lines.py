"""Keeps the lines that C libraries print themselves off a command's terminal: libpng's "iCCP: known incorrect sRGB profile" and its kin,
which name no file. Called by the image codec around each batch that it decodes. What is wrong with an image is told by its key and reason,
in the quarantine; what a library merely remarks is of no use to anybody.

The libraries print to the C library's variable `stderr`. While a batch is decoded, it points to a file in memory; the lines of image
libraries are then dropped, and all others passed on. Descriptor 2 stays what it is: what Python prints meanwhile, and the output of
processes that another thread starts, go where they should.

Only commands do so (`begin`, by dataio.terminal). The output of a rank goes to a log, and a library that aborts the process says why there.
"""

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

_OF_IMAGE_LIBRARIES = re.compile(
    rb"libpng (warning|error):|Corrupt JPEG data|Premature end of JPEG|Warning: unknown JFIF|TIFF\w*:|\w+: Warning, |\[ ?(WARN|ERROR|INFO):"
)
_UNBUFFERED = 2
_lock = threading.Lock()
_is_on = False
_users = 0
_stderr: "_Stderr | None" = None
"""Once one batch was decoded. It stays, as a thread may be in the middle of a line."""


def begin() -> None:
    """From now on lines are kept off: this process is a command, with people at its terminal."""
    global _is_on
    _is_on = True


@contextlib.contextmanager
def kept_off() -> Iterator[None]:
    """Whatever image libraries print meanwhile, in any thread, is not seen. Does nothing in a process that has not begun it."""
    global _users, _stderr
    if not _is_on:
        yield
        return
    with _lock:
        _stderr = _stderr or _Stderr()
        if _users == 0:
            _stderr.divert()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and (others := without_image_libraries(_stderr.restored())):
                with contextlib.suppress(OSError):
                    os.write(2, others)


def without_image_libraries(text: bytes) -> bytes:
    """The lines that no image library has printed."""
    return b"".join(line for line in text.splitlines(keepends=True) if not _OF_IMAGE_LIBRARIES.match(line))


class _Stderr:
    """The C library's variable `stderr`, and a file in memory to which it can point."""

    def __init__(self) -> None:
        libc: Any = ctypes.CDLL(None)
        libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_char_p]
        libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t]
        self._variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self._real = self._variable.value
        self._memory = os.memfd_create("lines of C libraries")
        self._stream = libc.fdopen(self._memory, b"w")
        libc.setvbuf(self._stream, None, _UNBUFFERED, 0)

    def divert(self) -> None:
        self._variable.value = self._stream

    def restored(self) -> bytes:
        """Point it back. Returns what was printed meanwhile."""
        self._variable.value = self._real
        size = os.lseek(self._memory, 0, os.SEEK_CUR)
        if not size:
            return b""
        text = os.pread(self._memory, size, 0)
        os.lseek(self._memory, 0, os.SEEK_SET)
        return text
