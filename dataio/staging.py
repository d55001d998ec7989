"""The folder that a conversion works in: locked against others, and published by one rename. Called by dataio.conversion."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

STATE_NAME = "conversion.json"
"""Whose work it is, in the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` against other conversions, creating it if needed. The kernel releases the lock when the process ends in any way."""
    while True:
        with contextlib.suppress(FileExistsError):  # mkdir's own exist_ok checks again, and fails if the folder was removed since
            folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another conversion published or removed it meanwhile
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (
                    errno.ENOSYS,
                    errno.ENOTSUP,
                    errno.ENOLCK,
                ):  # a file system without locks: here the user must avoid two conversions at once
                    raise
            try:
                held = os.path.samestat(os.fstat(descriptor), folder.stat())
            except FileNotFoundError:
                held = False
            if held:
                yield
                return
            # else another conversion finished and renamed it while this one waited
        finally:
            os.close(descriptor)


def publish(staging: Path, dest: Path) -> None:
    """Renames the complete staging folder to `dest`, replacing what is there; then deletes the sidecar files, which are useless now."""
    sync_folder(staging)
    if dest.exists():
        old = dest.with_name(f"{dest.name}.old-{os.getpid()}")
        dest.rename(old)
        staging.rename(dest)
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    else:
        staging.rename(dest)
    for path in [*dest.glob("*.part.json"), dest / STATE_NAME]:
        path.unlink()
    sync_folder(dest)
    sync_folder(dest.parent)


def write_text(path: Path, text: str) -> None:
    """Writes atomically: the file holds all of `text`, or does not exist."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
