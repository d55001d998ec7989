"""Temporary folders that belong to a living process. A folder is removed only when it is certain that nobody owns it any more.

Called by belongings.py for a run's folder; whoever keeps a folder in a place that other containers and hosts may share can use it.

The owner holds a lock (flock) on the file `owner` in the folder as long as it lives; the kernel frees the lock when the owner dies, however
that happens. Process ids would not do: two containers that share /tmp do not share process ids, so the owner's id in one may be free, or
somebody else's, in the other. A folder whose lock cannot be taken, or that has no `owner`, stays.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

OWNER = "owner"
_UNFINISHED = "new-"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedFolder:
    """A folder that this process owns until it removes it or ends."""

    path: str
    lock: int
    """Descriptor of the locked file. Processes that are executed do not inherit it."""

    def remove(self) -> None:
        """Delete the folder with its content, the lock last."""
        remove_owned(Path(self.path))
        os.close(self.lock)


def new_folder(parent: str, prefix: str) -> OwnedFolder:
    """Make a folder `parent/prefix...` that only this user can read. OSError if it cannot be made or locked."""
    unfinished = tempfile.mkdtemp(prefix=f"{_UNFINISHED}{prefix}", dir=parent)
    try:
        lock = os.open(f"{unfinished}/{OWNER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # From here on the folder can be found, and it has its lock already.
            path = f"{parent}/{os.path.basename(unfinished).removeprefix(_UNFINISHED)}"
            os.rename(unfinished, path)
        except BaseException:
            os.close(lock)
            raise
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return OwnedFolder(path=path, lock=lock)


def remove_abandoned(parent: str, prefix: str) -> list[str]:
    """Remove the folders `parent/prefix...` of this user whose owners are dead. Returns their paths."""
    return [str(folder) for folder in Path(parent).glob(f"{prefix}*") if _is_removed(folder)]


def is_owned(folder: Path) -> bool:
    """Whether the folder's owner lives, or may live."""
    try:
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # no owner is known, or it is another user's
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or this file system has no locks
        return True
    finally:
        os.close(lock)
    return False


def _is_removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with contextlib.suppress(OSError):
            folder.rmdir()  # what is left of a removal that was cut short: a folder in use is never empty
            return True
        if not is_owned(folder):
            remove_owned(folder)
            return True
    return False


def remove_owned(folder: Path) -> None:
    """Delete a folder that is this process's, or whose owner is dead; its lock last, so that anybody can finish a removal that is cut
    short."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != OWNER:
                with contextlib.suppress(OSError):
                    entry.unlink()
    with contextlib.suppress(OSError):
        (folder / OWNER).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
