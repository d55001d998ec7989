"""Lets one process stand for several and makes any of their storage calls fail, without a hook in the product's code.

A thread belongs to a `Life`: the driver, the coordinator, an agent or a rank. A thread that it starts belongs to the same one. `Storages`
replaces the functions of `os` and pyarrow's file systems. It counts the calls of one kind of life below the run's root, and a `Strike`
says which of them fail. A life that was killed gets `Dead` from each of its calls, so it changes nothing any more. Patches stay until the
process ends: only for a process of its own. benchmarks/faults/control.py forks one for each trial.
"""

import builtins
import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pyarrow import fs as pafs

from cluster import storage as storage_module

How = Literal["record", "once", "answer lost", "lasting", "refused"]
HOWS: tuple[How, ...] = ("once", "answer lost", "lasting", "refused")

NETWORK_ERROR = "AWS Error NETWORK_CONNECTION during {call} operation: curlCode: 7, Could not connect to server"
REFUSAL = "AWS Error ACCESS_DENIED (HTTP status 403) during {call} operation: Access Denied"
LOCAL_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a failing disk, an NFS server that was restarted, and one that is away give."""


class Dead(BaseException):
    """The process that this thread stands for was killed."""


class Life:
    """One process, as its threads see it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._is_dead = False

    @property
    def is_dead(self) -> bool:
        return self._is_dead

    def kill(self) -> None:
        self._is_dead = True

    def rename(self, kind: str) -> None:
        self.kind = kind

    def check(self) -> None:
        """Dead if it was killed."""
        if self._is_dead:
            raise Dead(self.kind)


DRIVER = Life("driver")
_start_thread = threading.Thread.start


def this_life() -> Life:
    return getattr(threading.current_thread(), "life", DRIVER)


def start_as(life: Life, work: Callable[[], object], name: str = "") -> threading.Thread:
    """Start a thread that belongs to `life`."""
    thread = threading.Thread(target=work, name=name or life.kind, daemon=True)
    thread.life = life  # type: ignore[attr-defined]
    _start_thread(thread)
    return thread


def all_threads_are(kind: str) -> None:
    """In a real process every thread belongs to one life, of this kind."""
    DRIVER.rename(kind)


def inherit_lives() -> None:
    """From now on a thread belongs to the life of the thread that starts it. A killed life's threads end without a traceback."""

    def start(thread: threading.Thread) -> None:
        if not hasattr(thread, "life"):
            thread.life = this_life()  # type: ignore[attr-defined]
        _start_thread(thread)

    usual = threading.excepthook

    def hook(told: Any) -> None:
        if not isinstance(told.exc_value, Dead) and not this_life().is_dead:
            usual(told)

    setattr(threading.Thread, "start", start)  # noqa: B010
    threading.excepthook = hook


@dataclass(frozen=True, kw_only=True, slots=True)
class Strike:
    """Which calls of one kind of life fail, and how. `first` counts from 1."""

    kind: str
    how: How = "record"
    first: int = 0
    seconds: float = 0.0
    """For `lasting`: how long every call fails, from the first one on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A call that was made."""

    call: str
    path: str
    """Relative to the storage's root."""


class Storages:
    """Counts and strikes; see the module. `root`: a local folder, or a bucket with a prefix."""

    def __init__(self, root: str, strike: Strike, *, keeps: bool = True) -> None:
        """`keeps`: remember each call, not only their number."""
        self._root, self._strike, self._keeps = root.rstrip("/"), strike, keeps
        self._count = 0
        self._lock = threading.Lock()
        self._seen: list[Seen] = []
        self._struck_at: float | None = None
        self._is_over = False
        self._paths: dict[int, str] = {}  # of open descriptors
        self._kept: list[Any] = []  # uploads that were never finished; closing one would publish it

    @property
    def seen(self) -> list[Seen]:
        return list(self._seen)

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return self._count

    @property
    def has_struck(self) -> bool:
        return self._struck_at is not None

    def is_below(self, path: object) -> bool:
        return isinstance(path, str) and (path == self._root or path.startswith(self._root + "/"))

    def stop(self) -> None:
        """No call fails or is counted any more."""
        self._is_over = True

    def install(self) -> None:
        self._install_local()
        INSTALLED.append(self)
        known = storage_module._impatient
        storage_module._impatient = lambda filesystem: FailingFs(known(filesystem), self)

    # One call

    def around(self, call: str, path: str, act: Callable[[], Any], *, is_local: bool) -> Any:
        """`act()`, or the failure that the strike says."""
        life = this_life()
        if self._is_over:
            return act()
        life.check()
        if life.kind != self._strike.kind:
            return act()
        with self._lock:
            self._count += 1
            number = self._count
            if self._keeps:
                self._seen.append(Seen(call=call, path=path[len(self._root) + 1 :]))
            fails = self._fails(number)
        if not fails:
            return act()
        if self._strike.how == "answer lost":
            act()
        raise self._error(call, path, is_local=is_local)

    def _fails(self, number: int) -> bool:
        how, now = self._strike.how, time.monotonic()
        if how == "record" or number < self._strike.first:
            return False
        if self._struck_at is None:
            self._struck_at = now
            return True
        return how == "refused" or (how == "lasting" and now - self._struck_at < self._strike.seconds)

    def _error(self, call: str, path: str, *, is_local: bool) -> OSError:
        is_refused = self._strike.how == "refused"
        if not is_local:
            return OSError((REFUSAL if is_refused else NETWORK_ERROR).format(call=call))
        number = errno.EACCES if is_refused else LOCAL_ERRORS[self._strike.first % len(LOCAL_ERRORS)]
        return OSError(number, os.strerror(number), path)

    # os

    def _install_local(self) -> None:
        shutil._use_fd_functions = False  # type: ignore[attr-defined]  # so that rmtree calls os.unlink with whole paths
        for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "scandir", "stat", "lstat"):
            setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in ("write", "fsync"):
            setattr(os, name, self._by_descriptor(name, getattr(os, name)))
        real_open, real_close, real_file = os.open, os.close, io.open

        def os_open(path: Any, *args: Any, **kwargs: Any) -> int:
            if not self.is_below(path):
                return real_open(path, *args, **kwargs)
            descriptor: int = self.around("open", path, lambda: real_open(path, *args, **kwargs), is_local=True)
            self._paths[descriptor] = path
            return descriptor

        def os_close(descriptor: int) -> None:
            self._paths.pop(descriptor, None)
            real_close(descriptor)

        def file_open(path: Any, *args: Any, **kwargs: Any) -> Any:
            text = os.fspath(path) if isinstance(path, os.PathLike) else path
            if not self.is_below(text):
                return real_file(path, *args, **kwargs)
            return self.around("open file", str(text), lambda: real_file(path, *args, **kwargs), is_local=True)

        vars(os).update(open=os_open, close=os_close)
        vars(io)["open"] = vars(builtins)["open"] = file_open

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = os.fspath(args[0]) if args and isinstance(args[0], os.PathLike) else args[0] if args else None
            if not self.is_below(path):
                return real(*args, **kwargs)
            return self.around(name, str(path), lambda: real(*args, **kwargs), is_local=True)

        return call

    def _by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            path = self._paths.get(descriptor)
            if path is None:
                return real(descriptor, *args)
            return self.around(name, path, lambda: real(descriptor, *args), is_local=True)

        return call

    def keep_open(self, stream: Any) -> None:
        self._kept.append(stream)


class FailingFs:
    """A pyarrow file system whose calls go through `Storages`, also those of a copy that a message carried to another actor."""

    def __init__(self, fs: Any, storages: Storages) -> None:
        self._fs, self._storages = fs, storages

    def __reduce__(self) -> Any:
        return failing_again, (self._fs,)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found) or name.startswith("_"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[0].base_dir if isinstance(args[0], pafs.FileSelector) else str(args[0])
            result = self._storages.around(name, path, lambda: found(*args, **kwargs), is_local=False)
            return _Stream(result, path, self._storages, is_output=name == "open_output_stream") if name.startswith("open_") else result

        return call


INSTALLED: list[Storages] = []
"""Those whose `install()` was called in this process, the newest last."""


def failing_again(fs: Any) -> Any:
    """The file system of a FailingFs that was pickled; in a process without Storages as it is."""
    return FailingFs(fs, INSTALLED[-1]) if INSTALLED else fs


class _Stream:
    """A file of a FailingFs. An upload happens when it is closed, a download when it is read: these are the calls that fail."""

    def __init__(self, stream: Any, path: str, storages: Storages, *, is_output: bool) -> None:
        self._stream, self._path, self._storages, self._is_output = stream, path, storages, is_output

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._is_output:
            self._stream.close()
            return
        self._storages.around("upload", self._path, self._stream.close, is_local=False)
        if not self._stream.closed:
            self._storages.keep_open(self._stream)

    def read(self, *args: Any) -> Any:
        return self._storages.around("read", self._path, lambda: self._stream.read(*args), is_local=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
