"""Reads data sets on an object store or another remote file system: named files, and ranges of them, with retries.

Called by parquet (`open_dataset` of a URI; the ranges that hold footers and row groups) and by convert for locations that are URIs. Reads
are idempotent, so a temporary failure is retried for `retry_seconds`; after that it is an outage (DataOutage). What the storage refuses is
not retried (DataRefused). Parquet and stream decide which ranges to read, when, and how many at a time.

It takes any URI that pyarrow opens: s3://bucket/prefix, gs://, abfs://, hdfs://. S3 takes its credentials, region and endpoint from the
environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL), from a profile or the machine's role, or from the
URI's query.
"""

import datetime
import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from dataio.foreign import MAX_MANIFEST_BYTES
from dataio.text import address, redact, shown

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
RETRY_SECONDS = 60.0
"""How long a read is retried by default. Batches made ahead keep training going for a part of that time."""

# The clients' own retry limits, well below ours: by default S3's client waits 99 s for a silent server, and GCS's retries for 15 minutes.
_CLIENT_ATTEMPTS = 2
_CONNECT_SECONDS = 3.0
_SILENCE_SECONDS = 10.0
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0

_MAY_NOT = "the credentials may not do this: give ones that may list and read there"
_PASSING_STATUSES = (408, 425, 429)
_ERRNOS = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG)
# Words with which Arrow and the clients below it report a refusal, and what the user can do about it.
_REFUSALS = (
    (r"NO_SUCH_BUCKET|ContainerNotFound|\bNOT_FOUND\b", "there is no such bucket: correct --data.path"),
    (r"TOO_SKEWED|REQUEST_EXPIRED", "the clock of this machine is wrong: set it"),
    (
        r"INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|MISSING_AUTH|UNRECOGNIZED_CLIENT|UNAUTHENTICATED|ExpiredToken"
        r"|AuthenticationFailed",
        "the credentials are not valid (any more): give ones that are, by the environment or a profile",
    ),
    (
        r"ACCESS_DENIED|PERMISSION_DENIED|AuthorizationFailure|Permission denied",
        _MAY_NOT,
    ),
    (r"INVALID_PARAMETER|INVALID_QUERY|MALFORMED|VALIDATION|INVALID_ARGUMENT|UNIMPLEMENTED", "correct --data.path, or see what it says"),
)
_STATUS = re.compile(r"HTTP status (\d{3})|Azure Error: \[\w*\] (\d{3})")

T = TypeVar("T")
_log = logging.getLogger(__name__)
_hurry: ContextVar[threading.Event | None] = ContextVar("hurry", default=None)


class DataOutage(OSError):
    """Data storage that did not answer, or not usefully, during all retries. It may answer later."""

    failure_kind = "infrastructure"


class DataRefused(ValueError):
    """Data storage that answered with a refusal, or has no such file. Retrying does not help."""

    failure_kind = "storage"


def is_uri(location: object) -> bool:
    """Whether `location` is text like s3://bucket/prefix. Raises ValueError for a scheme that this program cannot read."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location) if isinstance(location, str) else None
    if found is not None and found[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"data.path={address(str(location))!r} has the unknown scheme {found[1]!r}; use a folder or one of {known}")
    return found is not None


def is_remote(location: object) -> bool:
    """Whether `location` is a URI of storage other than this machine's files."""
    return is_uri(location) and local_path(str(location)) is None


def local_path(uri: str) -> Path | None:
    """The path that a file:// URI names; None for another scheme."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


@contextmanager
def in_a_hurry(stop: threading.Event) -> Iterator[None]:
    """Within this context, the thread's reads are not retried once `stop` is set, because nobody waits for them any more."""
    token = _hurry.set(stop)
    try:
        yield
    finally:
        _hurry.reset(token)


class Remote:
    """A remote folder, usable from any thread."""

    def __init__(self, uri: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """Opens no connection. Raises ValueError for a URI that pyarrow cannot open."""
        self.address = address(uri)
        """The URI without credentials, for display."""
        self.retry_seconds = retry_seconds
        self.requests = 0
        """Number of lists and reads; a retried one counts once."""
        self.retries = 0
        self._counting = threading.Lock()
        try:
            filesystem, root = pafs.FileSystem.from_uri(uri)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ValueError(f"data.path={self.address!r} cannot be opened: {redact(str(error))}") from None
        self.fs, self.root = _impatient(filesystem), root.rstrip("/")

    def list(self) -> dict[str, int]:
        """Name -> size in bytes, of the files directly in the folder; empty where there is no such folder. One request for 1,000 names."""

        def find() -> dict[str, int]:
            infos = self.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
            if not infos and self.fs.type_name == "s3":  # S3 also gives an empty answer for a bucket that does not exist
                bucket = self.root.partition("/")[0]
                if self.fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise DataRefused(f"there is no bucket {bucket!r} ({self.address}); correct --data.path, or its region and endpoint")
            return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

        return self.attempt(find, self.address)

    def file(self, name: str) -> "RemoteFile":
        return RemoteFile(self, name)

    def attempt(self, operation: Callable[[], T], what: str) -> T:
        """Runs `operation()` until it succeeds, the storage refuses, or the time is up. FileNotFoundError is raised at once."""
        with self._counting:
            self.requests += 1
        hurry = _hurry.get() or threading.Event()
        began, wait = time.monotonic(), _FIRST_WAIT_SECONDS
        while True:
            try:
                return operation()
            except FileNotFoundError:
                raise
            except OSError as error:
                if (remedy := _refusal(error)) is not None:
                    raise DataRefused(f"the storage refuses {what}; {remedy} ({redact(str(error))})") from error
                spent = time.monotonic() - began
                delay = wait * (1 + random.random()) / 2  # random, so that ranks do not retry at the same moment
                if spent + delay > self.retry_seconds or hurry.is_set():
                    raise DataOutage(f"the storage did not answer for {what}, tried for {spent:.1f} s ({redact(str(error))})") from error
                with self._counting:
                    self.retries += 1
                if wait == _FIRST_WAIT_SECONDS:
                    _log.warning("the storage did not answer for %s (%s); trying for %.0f s", shown(what), shown(error), self.retry_seconds)
            hurry.wait(delay)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


class RemoteFile:
    """One immutable file of a remote folder, usable from any thread."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self._handle: Any = None  # kept, because opening a handle asks the storage for the file's size
        self._opening = threading.Lock()

    def __str__(self) -> str:
        return f"{self.remote.address.rstrip('/')}/{self.name}"

    def read(self, offset: int, length: int) -> pa.Buffer:
        """Reads `length` bytes from `offset`, fewer where the file ends: one request. Raises FileNotFoundError, DataOutage, DataRefused."""

        def read() -> pa.Buffer:
            handle = self._open()
            try:
                return pa.py_buffer(handle.read_at(length, offset))
            except OSError:
                with self._opening:
                    if self._handle is handle:
                        self._handle = None  # the next attempt opens it again
                raise

        return self.remote.attempt(read, str(self))

    @property
    def size(self) -> int:
        """Size in bytes, as the storage reported it when the file was opened."""
        return int(self.remote.attempt(lambda: self._open().size(), str(self)))

    def read_all(self) -> bytes:
        def read() -> bytes:
            handle = self._open()
            if (size := handle.size()) > MAX_MANIFEST_BYTES:
                raise DataRefused(f"{self} has {size} bytes; at most {MAX_MANIFEST_BYTES} are read of such a file")
            return bytes(handle.read_at(size, 0))

        return self.remote.attempt(read, str(self))

    def _open(self) -> Any:
        with self._opening:
            if self._handle is None:
                self._handle = self.remote.fs.open_input_file(f"{self.remote.root}/{self.name}")
            return self._handle


def _refusal(error: OSError) -> str | None:
    """What the user can do if the storage refused; None if the same call may succeed later, also for errors not known to be refusals."""
    text = str(error)
    for pattern, remedy in _REFUSALS:
        if re.search(pattern, text):
            return remedy
    if isinstance(error, PermissionError) or error.errno in _ERRNOS:
        return _MAY_NOT
    if found := _STATUS.search(text):
        status = int(found[1] or found[2])
        if status < 500 and status not in _PASSING_STATUSES:
            return "trying again would not help: correct --data.path, or see what the storage says"
    return None


def _impatient(filesystem: Any) -> Any:
    """The same file system with a client that fails soon, so that retrying and giving up are decided in this file."""
    options: dict[str, Any]
    if filesystem.type_name == "s3":
        options = {
            "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_CLIENT_ATTEMPTS),
            "connect_timeout": _CONNECT_SECONDS,
            "request_timeout": _SILENCE_SECONDS,
        }
    elif filesystem.type_name == "gcs":
        options = {"retry_time_limit": datetime.timedelta(seconds=_CLIENT_ATTEMPTS * _SILENCE_SECONDS)}
    else:
        return filesystem
    _, (said,) = filesystem.__reduce__()[:2]  # the settings from the URI and the environment, as pickle would transfer them
    return type(filesystem)(**{**said, **options})
