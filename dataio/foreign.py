"""Opens foreign files as if an attacker had put them there: regular files only, and no more bytes than the reader can hold.

Called by the sources, by `parquet` and `remote` for the files of a converted folder, and by the trainer's small commands for files that a
user names. A pipe, a device, a socket or an endless file of /proc is refused instead of read for ever. LIMITS is the one table of what is
read at most; docs/security.md shows it. What the bytes mean is for the readers.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_IMAGE_BYTES = 256 << 20
MAX_MANIFEST_BYTES = 256 << 20
MAX_SETTINGS_BYTES = 1 << 20
"""A TOML file, or a list of class names."""
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TABLE_BYTES = 1 << 30
MAX_CORRECTIONS_BYTES = 64 << 20
"""Of data.corrections: a million rows."""
MAX_ROW_BYTES = 1 << 20
MAX_TEXT_FILE_BYTES = 1 << 24
"""Of one text; the codec takes less."""
MAX_MEMBER_BYTES = 256 << 20
"""A member of an archive."""
MAX_ARCHIVE_BYTES = 1 << 30
"""All that an archive unpacks to."""


def open_regular(path: str | Path) -> io.BufferedReader:
    """Opens a regular file, through links too. OSError for anything else, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """The whole of a regular file. OSError if it is none, or has more than `most_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # The size is checked before anything is read; files of /proc say 0, so what is read is checked too.
        data = b"" if size > most_bytes else file.read(most_bytes + 1)
    if size > most_bytes or len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes, the most that is read of such a file", str(path))
    return data


def json_of(data: bytes | str) -> Any:
    """`json.loads`, whose only failure is a ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
