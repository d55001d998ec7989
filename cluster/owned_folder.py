"""Private folders whose owner is known to live or not, also across containers that share a disk and do not see each other's processes.

A folder holds a file that its owner keeps locked (flock). The kernel drops the lock when the owner's last process is gone, however it died,
so a folder whose lock can be taken is nobody's. Process ids would not do: they mean nothing in another container.

launch.py keeps Ray's folders this way, spill.py the checkpoints on a node's disk. Both remove what dead owners left. A file system without
locks loses only that: a folder there holds no lock file, and is removed by its owner or never.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile

LOCK_FILE = ".owner"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class OwnedFolder:
    """A folder that nobody else removes while this object, or a process forked from its maker, lives."""

    def __init__(self, path: str, lock: int | None) -> None:
        """Use `create`. `lock`: the open, locked file; None on a file system without locks."""
        self.path = path
        self._lock = lock

    def remove(self) -> None:
        """Remove the folder with all it holds, then give up the lock. Again: nothing happens."""
        remove_content(self.path)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def create(prefix: str, parent: str | None = None) -> OwnedFolder:
    """A new folder `parent`/`prefix`XXXXXXXX that only this user can read. `parent`: the system's temporary folder if None."""
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        try:
            lock = os.open(f"{path}/{LOCK_FILE}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # remove_abandoned took it for one whose maker had died at this point
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(f"{path}/{LOCK_FILE}")):
                return OwnedFolder(path, lock)
            os.close(lock)
        except OSError as error:
            os.close(lock)
            if error.errno in _NO_LOCKS:
                os.unlink(f"{path}/{LOCK_FILE}")
                return OwnedFolder(path, None)
            if error.errno not in (*_HELD, errno.ENOENT):  # somebody is removing it
                raise


def is_abandoned(folder: str) -> bool:
    """Whether the owner of `folder` is dead. False for what is not a folder of this user with a lock file, which says nothing."""
    lock = _take(folder)
    if lock is None:
        return False
    os.close(lock)
    return True


def remove_abandoned(pattern: str) -> list[str]:
    """Remove the folders of dead owners that match the glob `pattern`; returns their paths. Also removes empty folders, whose makers died
    before they could lock them."""
    removed = []
    for folder in sorted(glob.glob(pattern, include_hidden=True)):
        lock = _take(folder)
        if lock is not None:
            try:
                remove_content(folder)  # with the lock held: nobody can take the folder for its own meanwhile
            finally:
                os.close(lock)
            removed.append(folder)
        elif not os.path.lexists(f"{folder}/{LOCK_FILE}"):
            with contextlib.suppress(OSError):  # not empty: made by other means, or by an older version
                os.rmdir(folder)
                removed.append(folder)
    return removed


def remove_content(folder: str) -> None:
    """Delete a folder that is this process's or nobody's; its lock last, so that anybody can finish a removal that is cut short."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name != LOCK_FILE and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK_FILE:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def _take(folder: str) -> int | None:
    """The locked lock file of an abandoned folder; None if the folder is owned, or is not one of this user's own."""
    try:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        lock = os.open(f"{folder}/{LOCK_FILE}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
