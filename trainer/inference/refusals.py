"""Says apart what a user has to mend before a job of answers can go on, and what passes, or is the machine's: a ValueError, with which the
command ends with status 2, and an OSError, with which it ends with 1. Called by `job` and `shard`.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.storage import Storage, StorageRefused

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_USERS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    }
)


def is_refusal(error: Exception) -> bool:
    """Whether the same command would fail again until somebody has mended something."""
    return isinstance(error, ValueError | StorageRefused) or (isinstance(error, OSError) and error.errno in _USERS)


def in_words(error: Exception) -> str:
    """The error without Python's way of writing it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """What `what` is read for in the block: ValueError with `fix` for a refusal; other errors as they are."""
    try:
        yield
    except OSError as error:
        if is_refusal(error):
            raise ValueError(f"{what} cannot be read ({in_words(error)}); {fix}") from error
        raise


@contextmanager
def writing_to(out: Storage) -> Iterator[None]:
    """The block reads and writes --out: a refusal is a ValueError that says so, and a disk without room an OSError that does."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(f"--out {out.address} has no room ({error.strerror}): make some") from error
        if is_refusal(error):
            raise ValueError(f"--out {out.address} cannot be used ({in_words(error)}); name a folder that you may write to") from error
        raise
