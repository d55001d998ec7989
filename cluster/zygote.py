"""A process that has imported everything a rank needs and forks ranks from itself, so a new rank starts in milliseconds, not seconds.

Used by agent.py on every node, and by the driver (trainer/drive/start.py), so that these imports run while Ray starts. A user that asks for
a zygote by name gets the existing one, or starts it: the agents of a node share one. It has one thread, no GPU context and no state. So a
forked process is as good as new, with the environment, folder and output of its user. The zygote ends when nobody is connected any more. A
forked process ends with its user, and with the zygote, however they end.

    agent --SEQPACKET--> zygote    {"target": "module:function"}, with the file descriptors for that function
    agent <--SEQPACKET-- zygote    {"ready": seconds, "pid": pid} | {"started": pid} | {"ended": pid, "status": its exit code, or minus a
                                   signal's number}
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MESSAGE_BYTES = 1 << 16
_OWN_DESCRIPTORS = 3  # environment and folder, standard output, standard error
_MOST_DESCRIPTORS = 253 - _OWN_DESCRIPTORS  # Linux passes at most 253 in one message
_BACKLOG = 256
_PR_SET_PDEATHSIG = 1
ZYGOTE_LOST = -1000
"""Exit status of a process that ended because its zygote died."""


class ForeignZygote(PermissionError):
    """Another user's process listens where this user's zygote should."""

    failure_kind = "user"


class Forked:
    """A process that a zygote forked."""

    def __init__(self) -> None:
        self.pid = 0
        self.status: int | None = None
        """Exit code, minus the number of the signal that ended it, or ZYGOTE_LOST; None while it lives."""
        self._started, self._ended = threading.Event(), threading.Event()

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Its status once it has ended; None after `timeout_seconds`."""
        self._ended.wait(timeout_seconds)
        return self.status

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        self._started.wait()
        if self.status is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Zygote:
    """The user's end: connects to or starts the process, has it fork, and learns how each forked process ended. Thread-safe."""

    def __init__(self, modules: Sequence[str], on_ended: Callable[[Forked], None] = lambda forked: None, *, name: str = "") -> None:
        """`modules`: what the zygote imports. `on_ended` is called, from another thread, for each process that has ended. Users with the
        same account on this machine and the same `name` share one zygote; without a name it is private."""
        self._on_ended = on_ended
        self._is_shared = bool(name)
        self._folder = os.getcwd()  # now: Ray may later remove the worker's working directory, a copy of the code
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = self._reach(f"\0finetune-zygote-{name or uuid.uuid4().hex}", modules)
        self._lock = threading.Lock()
        self._starting: list[Forked] = []
        self._living: dict[int, Forked] = {}
        self._lost = False
        self._ready, self._pid = threading.Event(), 0
        self.import_seconds: float | None = None
        """How long the imports took, once they are done."""
        threading.Thread(target=self._listen, name="zygote", daemon=True).start()

    def _reach(self, address: str, modules: Sequence[str]) -> socket.socket:
        """A connection to the zygote that listens at `address`; starts one if none does."""
        while True:
            ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with contextlib.suppress(ConnectionRefusedError):
                ours.connect(address)
                if _uid_of_peer(ours) != os.getuid():
                    ours.close()
                    raise ForeignZygote(f"the zygote at @{address[1:]} is another user's")
                return ours
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                try:
                    listener.bind(address)
                except OSError as error:
                    ours.close()
                    if error.errno != errno.EADDRINUSE:
                        raise
                    continue  # another process was quicker
                listener.listen(_BACKLOG)
                ours.connect(address)  # before the process starts: it ends when nobody is connected
                self._process = self._spawn(listener.fileno(), modules)
            return ours

    def _spawn(self, listener: int, modules: Sequence[str]) -> "subprocess.Popen[bytes]":
        environment = {**MEMORY_KEPT, **os.environ, **_AS_IF_ALONE, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.zygote", str(listener), *modules],
            pass_fds=[listener],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # Ctrl-C in a terminal is for its user only
        )

    @property
    def pid(self) -> int:
        if self._process is not None:
            return self._process.pid
        self._ready.wait()
        return self._pid

    @property
    def lost(self) -> bool:
        """The zygote died: nothing can be forked any more."""
        return self._lost

    def fork(self, target: str, descriptors: Sequence[int]) -> Forked:
        """Fork a process that calls `target` ("module:function") with its copies of the open files `descriptors`, then ends.

        Returns at once; the fork itself waits until the imports are done."""
        if len(descriptors) > _MOST_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} open files for one process, at most {_MOST_DESCRIPTORS} can be handed over")
        forked, message = Forked(), json.dumps({"target": target}).encode()
        with _surroundings(self._folder) as surroundings, self._lock:
            if not self._lost:
                with contextlib.suppress(ConnectionError):  # it has died: the listening thread will report it
                    socket.send_fds(self._socket, [message], [surroundings, *_outputs(), *descriptors])
                self._starting.append(forked)
                return forked
        self._end(forked, ZYGOTE_LOST)
        return forked

    def close(self, *, kill: bool = False) -> None:
        """Disconnect. Processes forked for this user end; so does the zygote if nobody else is connected. With `kill`, a zygote that
        this process started ends at once, whoever is connected."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            if kill:
                self._process.kill()
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                if not self._is_shared:
                    self._process.kill()
                    self._process.wait()
        self._socket.close()

    def _listen(self) -> None:
        while True:
            try:
                message = self._socket.recv(_MESSAGE_BYTES)
            except OSError:
                message = b""
            if not message:
                break
            match json.loads(message):
                case {"ready": seconds, "pid": pid}:
                    self.import_seconds, self._pid = seconds, pid
                    self._ready.set()
                case {"started": pid}:
                    with self._lock:
                        forked = self._starting.pop(0)
                        forked.pid = pid
                        self._living[pid] = forked
                    forked._started.set()
                case {"ended": pid, "status": status}:
                    with self._lock:
                        forked = self._living.pop(pid)
                    self._end(forked, status)
        with self._lock:
            self._lost = True
            left = [*self._starting, *self._living.values()]
            self._starting, self._living = [], {}
        self._ready.set()
        for forked in left:
            self._end(forked, ZYGOTE_LOST)

    def _end(self, forked: Forked, status: int) -> None:
        forked.status = status
        forked._started.set()
        forked._ended.set()
        self._on_ended(forked)


_TUNABLES = ("hugetlb=1", f"trim_threshold={4 * 2**30}", f"mmap_threshold={32 * 2**20}", f"top_pad={64 * 2**20}")
MEMORY_KEPT = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{each}" for each in _TUNABLES)}
"""glibc returns memory that the next step requests again, and the kernel clears each page anew. With the memory kept, in huge pages, a
step of ResNet-18 on two cores takes 8 % less time in bf16, and 3 % less in fp32. glibc reads this when a process starts, so it is set in
the zygote's environment; the user's own setting has precedence."""

# Neither library may start threads before the fork, because a fork does not copy them.
_AS_IF_ALONE = {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


@contextlib.contextmanager
def _surroundings(folder: str) -> Iterator[int]:
    """An open file that describes this process's environment and folder."""
    descriptor = os.memfd_create("surroundings")
    try:
        with open(descriptor, "w", closefd=False) as file:
            json.dump({"environment": {**os.environ, **_AS_IF_ALONE}, "folder": folder}, file)
        yield descriptor
    finally:
        os.close(descriptor)


def _outputs() -> tuple[int, int]:
    """The file descriptors of standard output and standard error."""
    return 1, 2


def _uid_of_peer(connection: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)


# The zygote's end


class _Server:
    """The loop of the one thread."""

    def __init__(self, listener: socket.socket, import_seconds: float) -> None:
        self._listener, self._import_seconds = listener, import_seconds
        self._users: dict[int, socket.socket] = {}  # by descriptor
        self._living: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, descriptor of the user)
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def serve(self) -> None:
        """Serve until the last user has disconnected."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._listener.fileno():
                    self._welcome()
                elif descriptor in self._living:
                    self._bury(descriptor)
                elif descriptor in self._users:
                    self._hear(self._users[descriptor])
            if not self._users:
                return

    def _welcome(self) -> None:
        user, _ = self._listener.accept()
        if _uid_of_peer(user) != os.getuid():
            user.close()
            return
        self._users[user.fileno()] = user
        self._poll.register(user, select.POLLIN)
        self._tell(user, {"ready": self._import_seconds, "pid": os.getpid()})

    def _hear(self, user: socket.socket) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(user, _MESSAGE_BYTES, _OWN_DESCRIPTORS + _MOST_DESCRIPTORS)
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._poll.unregister(user)
            del self._users[user.fileno()]
            for pid, owner in self._living.values():
                if owner == user.fileno():
                    os.kill(pid, signal.SIGKILL)
            self._living = {pidfd: (pid, -1 if owner == user.fileno() else owner) for pidfd, (pid, owner) in self._living.items()}
            user.close()
            return
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            inherited = [self._listener.detach(), *(one.detach() for one in self._users.values()), *self._living]
            _be_a_rank(zygote, inherited, descriptors, json.loads(message)["target"])
        for copy in descriptors:
            os.close(copy)
        watched = os.pidfd_open(pid)
        self._living[watched] = (pid, user.fileno())
        self._poll.register(watched, select.POLLIN)
        self._tell(user, {"started": pid})

    def _bury(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        pid, owner = self._living.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        if owner in self._users:
            self._tell(self._users[owner], {"ended": pid, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, user: socket.socket, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has disconnected: the next poll reports that
            user.send(json.dumps(message).encode())


def main(arguments: list[str]) -> int:
    """`python -m cluster.zygote LISTENER MODULE...`"""
    began = time.perf_counter()
    listener = socket.socket(fileno=int(arguments[0]))
    for module in arguments[1:]:
        importlib.import_module(module)
    # What is imported lives as long as the process. Frozen, no rank's full garbage collections go through it in the middle of steps, and
    # copy the pages that ranks share.
    gc.freeze()
    _Server(listener, time.perf_counter() - began).serve()
    return 0


def _be_a_rank(zygote: int, inherited: list[int], descriptors: list[int], target: str) -> None:
    """Run the forked process to its end."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:  # the zygote died before the line above
            return
        for descriptor in inherited:
            os.close(descriptor)
        surroundings, output, errors, *descriptors = descriptors
        os.dup2(output, 1)
        os.dup2(errors, 2)
        with open(surroundings) as file:
            file.seek(0)  # the writer shares its file position with this process
            told = json.load(file)
        for descriptor in (output, errors):
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(told["environment"])
        with contextlib.suppress(FileNotFoundError):  # the folder is gone: what would be imported from it is already imported
            os.chdir(told["folder"])
        module, _, function = target.partition(":")
        entry: Callable[[list[int]], Any] = getattr(importlib.import_module(module), function)
        entry(descriptors)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
