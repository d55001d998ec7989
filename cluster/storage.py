"""Where runs are stored: a local folder or any pyarrow file system, behind the few operations that runs need.

Used by store, journal and coordinator, and by trainer for the run's other files. store.py defines what a checkpoint is and when it counts.

Every operation on a remote storage is idempotent. So temporary failures are retried for a budget of seconds; after that it is an outage
(StorageOutage), which the callers survive. A refusal by the storage is not retried (StorageRefused). A local path may lie on NFS or FUSE:
its errors come as they are, `is_outage` says which of them pass, and `is_unreadable_now` that they are no damage."""

import datetime
import errno
import math
import os
import random
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

from pyarrow import fs as pafs

from cluster.text import address, redact

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")

CHUNK_BYTES = 8 << 20

RETRY_SECONDS = 20.0
"""Default time for which an operation on a remote storage is retried."""

# Limits of the clients' own retries, well below ours. Measured with pyarrow's defaults for s3:// URIs: a call took 6 s if nobody listens,
# and 99 s if the server accepts and stays silent; with these limits 0.1 s and 10 s. GCS would retry for 15 minutes.
_CLIENT_ATTEMPTS = 2
_CONNECT_SECONDS = 3.0
_SILENCE_SECONDS = 5.0

_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0

# Object stores have no directories: creating them costs requests, and needs rights that a bucket's user may lack.
_WITHOUT_DIRECTORIES = {"s3", "gcs", "abfs"}


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# pathlib makes s3:/bucket of s3://bucket.
_SLASHES_LOST = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|viewfs):(?!//)")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")

T = TypeVar("T")


class StorageOutage(OSError):
    """A remote storage that gave no usable answer during all retries. It may recover later."""

    failure_kind = "infrastructure"


class StorageRefused(OSError):
    """A remote storage that answered with a refusal. Retrying does not help."""

    failure_kind = "storage"


# These answer a question and are no failures: callers handle them.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

# What a network file system (NFS, FUSE) says while its server is away, and a disk while its controller is being reset.
_TEMPORARY = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EINTR, errno.ENOLINK, errno.EREMOTEIO, errno.ECOMM),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EPIPE, errno.ESHUTDOWN),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM),
        *(errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.ENOBUFS, errno.EBUSY),
    }
)
# A file system that checks what it reads says so if that is not what was written.
_DAMAGES = frozenset({errno.EBADMSG, errno.EUCLEAN})

_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG})
# HTTP statuses after which the same request may succeed a moment later; no other status below 500 is like that.
_PASSING_STATUSES = frozenset({408, 425, 429})
_REFUSING_STATUSES = frozenset({501, 505, 507})
# Arrow's names for S3 errors (cpp/src/arrow/filesystem/s3_internal.h), and gRPC's codes, which GCS uses.
_AWS = re.compile(r"AWS Error ([A-Z_]+)(?: \(HTTP status (\d+)\))?")
_AWS_REFUSALS = frozenset(
    {
        *("ACCESS_DENIED", "INCOMPLETE_SIGNATURE", "INVALID_ACCESS_KEY_ID", "INVALID_ACTION", "INVALID_CLIENT_TOKEN_ID"),
        *("INVALID_PARAMETER_COMBINATION", "INVALID_PARAMETER_VALUE", "INVALID_QUERY_PARAMETER", "INVALID_SIGNATURE"),
        *("MALFORMED_QUERY_STRING", "MISSING_ACTION", "MISSING_AUTHENTICATION_TOKEN", "MISSING_PARAMETER", "NO_SUCH_BUCKET"),
        *("OPT_IN_REQUIRED", "REQUEST_EXPIRED", "REQUEST_TIME_TOO_SKEWED", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED_CLIENT", "VALIDATION"),
    }
)
_GOOGLE = re.compile(r"google::cloud::Status\(([A-Z_]+)")
_GOOGLE_REFUSALS = frozenset(
    {"PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"}
)
# What the clients say of a service that cannot be reached.
_NETWORK = re.compile(
    r"NETWORK_CONNECTION|curlCode|REQUEST_TIMEOUT|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|[Cc]ould not connect|[Tt]imed out"
)
_AZURE = re.compile(r"Azure Error: \[\w*\] (\d{3})")


def is_transient(error: OSError) -> bool:
    """Whether the same call on a remote storage may succeed later. An unknown error counts as transient: a needless retry costs seconds,
    but an outage mistaken for a refusal costs a checkpoint."""
    if isinstance(error, StorageOutage):
        return True
    if isinstance(error, (StorageRefused, PermissionError, *_ANSWERS)) or error.errno in _REFUSALS:
        return False
    text = str(error)
    if aws := _AWS.search(text):
        return aws[1] not in _AWS_REFUSALS and (aws[2] is None or _passes(int(aws[2])))
    if google := _GOOGLE.search(text):
        return google[1] not in _GOOGLE_REFUSALS
    if azure := _AZURE.search(text):
        return _passes(int(azure[1]))
    return True


def is_outage(error: OSError) -> bool:
    """Whether waiting may help, on any storage: it does not answer, or a file system below a local path is away for the moment."""
    return isinstance(error, (StorageOutage, TimeoutError, ConnectionError)) or error.errno in _TEMPORARY


def is_unreadable_now(error: OSError) -> bool:
    """Whether an error on reading says nothing about the bytes that are stored: an outage, or a refusal. Then they may be as they were, and
    nothing may be taken for damaged, nor for missing. False for what is not there, and for what the file system itself found damaged."""
    return not isinstance(error, _ANSWERS) and error.errno not in _DAMAGES


def _passes(status: int) -> bool:
    return status in _PASSING_STATUSES or (status >= 500 and status not in _REFUSING_STATUSES)


def _remedy(text: str) -> str:
    """What the user can do about a refusal."""
    if re.search(r"NO_SUCH_BUCKET|ContainerNotFound|NOT_FOUND", text):
        return "there is no such bucket: make it, or give another --storage"
    if re.search(r"TOO_SKEWED|REQUEST_EXPIRED", text):
        return "the clock of this machine is wrong: set it"
    if re.search(r"ExpiredToken|INVALID_ACCESS_KEY|TOKEN|SIGNATURE|UNAUTHENTICATED|AuthenticationFailed", text):
        return "the credentials are not valid (any more): give ones that are, by the environment or a profile"
    if re.search(r"ACCESS_DENIED|PERMISSION_DENIED|Authorization|\b403\b|Permission denied", text):
        return "the credentials may not do this: give ones that may list, read, write and delete below it"
    return "trying again would not help: correct --storage, or see what the storage says"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long a failing operation is retried. Waits of 0.05 to 0.1 s double up to 5 s; half of each is random, so that ranks do not
    retry in lockstep. `seconds` is the total, from the first try; 0 tries once."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def call(self, operation: Callable[[], T], where: str, give_up: Callable[[], bool] = lambda: False) -> T:
        """Run `operation()`, which must be idempotent. StorageOutage when the time is up, or after a failure if `give_up()` says that
        nobody can wait; StorageRefused at once if retrying is useless. FileNotFoundError and similar pass through."""
        began, wait = self.clock(), _FIRST_WAIT_SECONDS
        while True:
            try:
                return operation()
            except (StorageRefused, *_ANSWERS):
                raise
            except OSError as error:
                if not is_transient(error):
                    raise StorageRefused(f"the storage refuses {where}; {_remedy(str(error))} ({error})") from error
                spent = self.clock() - began
                delay = wait * (1 + self.draw()) / 2
                if spent + delay > self.seconds or give_up():
                    cause = error.__cause__ if isinstance(error, StorageOutage) else error  # from an operation that does not retry itself
                    raise StorageOutage(f"the storage did not answer for {where}, tried for {spent:.1f} s ({cause})") from cause
            self.sleep(delay)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_dir: bool
    size_bytes: int
    modified: float
    """Unix time of the last change in seconds, 0.0 if the file system does not report it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """The folder that holds the runs' folders. Paths are relative to it, with `/` between parts."""

    fs: Any
    """A pyarrow.fs.FileSystem. Local files are read and written with `os` instead, because pyarrow cannot fsync."""
    root: str
    is_local: bool
    uri: str
    retry: RetryPolicy = RetryPolicy(seconds=0.0)
    """Applies to every operation on a remote storage. On a local one the first error counts."""

    @property
    def address(self) -> str:
        """The URI without credentials, for display."""
        return address(self.uri)

    def without_retries(self) -> "Storage":
        """The same place without retries, for a caller that retries by itself."""
        return replace(self, retry=replace(self.retry, seconds=0.0))

    def at(self, path: str) -> str:
        """`path` as the file system's own path."""
        return f"{self.root}/{path}" if path else self.root

    def local_path(self, path: str, what: str) -> str:
        """`path` for a writer that needs a file of this machine, `what` in words. ValueError on a remote storage, whose paths would be
        taken for a folder below the working directory."""
        if not self.is_local:
            raise ValueError(f"{what} needs a storage on a disk, and {self.address} is none; leave it out, or give --storage FOLDER")
        return self.at(path)

    def read(self, path: str) -> bytes:
        """A whole file; FileNotFoundError if it does not exist."""
        if self.is_local:
            with open_regular(self.at(path)) as file:
                return file.read()

        def read() -> bytes:
            with self.fs.open_input_stream(self.at(path), compression=None) as stream:
                return bytes(stream.read())

        return self._try(read, path)

    def read_chunks(self, path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Read a file piece by piece, for callers that do not need all of it in memory."""
        if self.is_local:
            with open_regular(self.at(path)) as file:
                while piece := file.read(chunk_bytes):
                    yield piece
            return
        stream, offset = None, 0

        def read() -> bytes:
            nonlocal stream
            try:
                if stream is None:
                    stream = self.fs.open_input_file(self.at(path))
                    stream.seek(offset)
                return bytes(stream.read(chunk_bytes))
            except OSError:
                stream = None  # opened again, at the same position
                raise

        while piece := self._try(read, path):
            offset += len(piece)
            yield piece

    def write_atomic(self, path: str, data: bytes) -> None:
        """Create or replace a file: a reader sees either the old bytes or the new ones. Object stores publish an upload when it ends."""
        if self.is_local:
            return write_atomic_local(self.at(path), data)
        return self.write_stream(path, lambda write: write(data))

    def write_stream(
        self, path: str, fill: Callable[[Callable[[bytes | memoryview], None]], T], give_up: Callable[[], bool] = lambda: False
    ) -> T:
        """write_atomic() on a remote storage, with the bytes that `fill(write)` writes piece by piece; returns its result. `fill` is
        called again if the storage fails midway."""
        assert not self.is_local

        def write() -> T:
            self._make_dir(path.rpartition("/")[0])
            with self.fs.open_output_stream(self.at(path), compression=None) as stream:
                return fill(stream.write)

        return self._try(write, path, give_up)

    def exists(self, path: str) -> bool:
        if self.is_local:
            try:
                os.lstat(self.at(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True  # os.path.lexists would take a file that cannot be looked at now for a missing one
        return self._try(lambda: bool(self.fs.get_file_info(self.at(path)).type != pafs.FileType.NotFound), path)

    def list(self, path: str) -> list[Entry]:
        """Names in a folder, sorted; empty if there is no such folder (or a file in its place). Only names deleted during the call may
        be missing."""
        if self.is_local:
            try:
                with os.scandir(self.at(path)) as found:
                    entries = [_local_entry(entry) for entry in found]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)
        infos = self._try(lambda: self.fs.get_file_info(pafs.FileSelector(self.at(path), allow_not_found=True)), path)
        return sorted((_entry(info) for info in infos), key=lambda entry: entry.name)

    def make_dir(self, path: str) -> None:
        if self.is_local:
            make_dirs(self.at(path))
        else:
            self._try(lambda: self._make_dir(path), path)

    def delete_file(self, path: str) -> None:
        """Delete a file if it exists."""
        self._delete(path, os.unlink, self.fs.delete_file)

    def delete_dir(self, path: str) -> None:
        """Delete a folder and its content, if it exists."""
        self._delete(path, shutil.rmtree, self.fs.delete_dir)

    def _delete(self, path: str, locally: Callable[[str], None], remotely: Callable[[str], None]) -> None:
        try:
            if self.is_local:
                locally(self.at(path))
            else:
                self._try(lambda: remotely(self.at(path)), path)
        except FileNotFoundError:
            pass

    def _make_dir(self, path: str) -> None:
        if self.fs.type_name not in _WITHOUT_DIRECTORIES:
            self.fs.create_dir(self.at(path), recursive=True)

    def _try(self, operation: Callable[[], T], path: str, give_up: Callable[[], bool] = lambda: False) -> T:
        return self.retry.call(operation, self.at(path), give_up)


def open_storage(uri: str | Path, retry_seconds: float = RETRY_SECONDS) -> Storage:
    """Open a local path (made absolute), file://, or a URI that pyarrow knows: s3://, gs://, abfs://, hdfs://. ValueError for anything
    else.

    Failures of a remote storage are retried for `retry_seconds`. The URI names your own S3-compatible service:
    s3://bucket/runs?endpoint_override=host:port&scheme=http"""
    text = str(uri)
    if not (math.isfinite(retry_seconds) and retry_seconds >= 0):
        raise ValueError(f"cluster.storage_retry_seconds={retry_seconds:g} is not a number of seconds from 0 up; use 20, or 0 to try once")
    if not text:
        raise ValueError("storage is empty; give a folder or a URI, such as --storage runs or --storage s3://bucket/runs")
    scheme = _SCHEME.match(text)
    if scheme is None and (meant := _SLASHES_LOST.match(text)):
        raise ValueError(
            f"storage={address(text)!r} lacks a slash of its scheme, and would be a folder of that name; write {meant[1]}://BUCKET/FOLDER, "
            f"or ./{meant[1]}:... for a folder"
        )
    if scheme is None or scheme[1] == "file":
        root = os.path.abspath(os.path.expanduser(text) if scheme is None else _path_of(text))
        return Storage(fs=pafs.LocalFileSystem(), root=root, is_local=True, uri=root)
    if scheme[1] not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"storage={address(text)!r} has the unknown scheme {scheme[1]!r}; use a local folder or one of {known}")
    try:
        filesystem, root = pafs.FileSystem.from_uri(_strict(text))
    except (ValueError, OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and _NETWORK.search(str(error)):  # opening may ask the storage where its bucket is
            raise StorageOutage(f"storage {address(text)} does not answer: {redact(str(error))}") from None
        raise ValueError(f"storage={address(text)!r} cannot be opened: {redact(str(error))}") from None
    return Storage(
        fs=_impatient(filesystem),
        root=root.rstrip("/"),
        is_local=isinstance(filesystem, pafs.LocalFileSystem),
        uri=text,
        retry=RetryPolicy(seconds=retry_seconds),
    )


def join_uri(base: str, *parts: str) -> str:
    """The path or URI of `parts` below `base`: a URI's query (`?endpoint_override=...`) stays at its end. Names are taken as they are."""
    is_remote = is_uri(base)
    where, question, query = base.partition("?") if is_remote else (base, "", "")
    names = (quote(part, safe="/") if is_remote else part for part in parts)
    return "/".join([where.rstrip("/"), *names]) + question + query


def is_uri(text: str) -> bool:
    """Whether `text` is a URI of a remote storage, as opposed to a local path or a file:// URI."""
    scheme = _SCHEME.match(text)
    return scheme is not None and scheme[1] != "file"


def _path_of(uri: str) -> str:
    """The path of a file:// URI. It has neither query nor fragment: `?` and `#` are characters of names, and so is a `%` that begins no
    escape."""
    host, slash, path = uri.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"storage={uri!r} names the host {host!r}; a file:// URI of this machine has three slashes: file:///folder")
    return unquote(slash + path)


def _strict(uri: str) -> str:
    """`uri` with what people write and RFC 3986 does not allow escaped: spaces, `#`, a lone `%`, letters beyond ASCII."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + quote(_LONE_PERCENT.sub("%25", rest), safe="%/:@?&=+,;!$'()*~[]")


def _impatient(filesystem: Any) -> Any:
    """The same file system with a client that fails early, so that retries and giving up are decided here. A URI cannot say that; the
    URI's other settings are copied through what pickle would carry."""
    match filesystem.type_name:
        case "s3":
            options = {
                "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_CLIENT_ATTEMPTS),
                "connect_timeout": _CONNECT_SECONDS,
                "request_timeout": _SILENCE_SECONDS,
            }
        case "gcs":
            options = {"retry_time_limit": datetime.timedelta(seconds=_CLIENT_ATTEMPTS * _SILENCE_SECONDS)}
        case _:
            return filesystem
    _, (said,) = filesystem.__reduce__()[:2]
    return type(filesystem)(**{**said, **options})


def open_regular(path: str) -> BinaryIO:
    """Open a local file to read it. OSError for a pipe, a device or a socket that stands in its place, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def make_dirs(path: str) -> None:
    """mkdir -p that survives a power cut: each new name is synced into its parent."""
    missing = []
    while not _is_dir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not _is_dir(folder):
                raise
        sync_dir(os.path.dirname(folder))


def _is_dir(path: str) -> bool:
    """os.path.isdir, which takes a folder that cannot be looked at now for a missing one, with that error raised."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def sync_dir(path: str) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: str, data: bytes | memoryview) -> None:
    """Create a file with durable bytes; FileExistsError if it already exists. Its name is durable once the folder is synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Repeat os.write until everything is written."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def write_atomic_local(path: str, data: bytes) -> None:
    """Create or replace a local file durably, through a uniquely named file next to it."""
    folder, name = os.path.split(os.path.abspath(path))
    make_dirs(folder)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    sync_dir(folder)


def _local_entry(entry: os.DirEntry[str]) -> Entry | None:
    """None for an entry deleted since it was listed. A FileNotFoundError from here must not be mistaken for a missing folder."""
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return Entry(name=entry.name, is_dir=entry.is_dir(), size_bytes=status.st_size, modified=status.st_mtime)


def _entry(info: Any) -> Entry:
    is_dir = info.type == pafs.FileType.Directory
    return Entry(
        name=info.base_name,
        is_dir=is_dir,
        size_bytes=0 if is_dir else int(info.size or 0),
        modified=0.0 if info.mtime_ns is None else info.mtime_ns / 1e9,
    )
