"""A process that has imported everything a rank needs and forks ranks from itself: a new rank begins in milliseconds, not in seconds.

Used by agent.py on every node. The zygote (`python -m cluster.zygote`) has one thread, no GPU context and no state: what it forks is as
good as new. It ends when its agent does, and what it forked ends with it, whatever way they end.

    agent --SEQPACKET--> zygote    {"target": "module:function"}, with the file descriptors for that function
    agent <--SEQPACKET-- zygote    {"ready": seconds} | {"started": pid} | {"ended": pid, "status": exit code, or minus a signal's number}
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

_MESSAGE_BYTES = 1 << 16
_MOST_DESCRIPTORS = 250  # Linux hands over 253 in one message
_PR_SET_PDEATHSIG = 1
ZYGOTE_LOST = -1000
"""Exit status of a process whose zygote died, and took it along."""


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
        """Send a signal, unless it has ended."""
        self._started.wait()
        if self.status is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Zygote:
    """The agent's end: starts the process, has it fork, hears how each forked process ended. Thread-safe."""

    def __init__(self, modules: Sequence[str], on_ended: Callable[[Forked], None] = lambda forked: None) -> None:
        """`modules` are imported by the zygote; `on_ended` is called, from another thread, for each process that has ended."""
        self._on_ended = on_ended
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # Neither library may start threads before the fork: they would be missing after it.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.zygote", str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._socket = ours
        self._lock = threading.Lock()
        self._starting: list[Forked] = []
        self._living: dict[int, Forked] = {}
        self._lost = False
        self.import_seconds: float | None = None
        """How long the imports took, once they are done."""
        threading.Thread(target=self._listen, name="zygote", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lost(self) -> bool:
        """It died: nothing can be forked any more."""
        return self._lost

    def fork(self, target: str, descriptors: Sequence[int]) -> Forked:
        """Fork a process that calls `target` ("module:function") with its copies of the open files `descriptors`, then ends.

        Returns at once; before the imports are done the fork waits for them."""
        if len(descriptors) > _MOST_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} open files for one process, at most {_MOST_DESCRIPTORS} can be handed over")
        forked = Forked()
        with self._lock:
            if not self._lost:
                self._starting.append(forked)
                with contextlib.suppress(OSError):  # it has died: the listening thread will say so
                    socket.send_fds(self._socket, [json.dumps({"target": target}).encode()], list(descriptors))
                return forked
        self._end(forked, ZYGOTE_LOST)
        return forked

    def close(self) -> None:
        """End it, and with it whatever it forked."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
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
                case {"ready": seconds}:
                    self.import_seconds = seconds
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
        for forked in left:
            self._end(forked, ZYGOTE_LOST)

    def _end(self, forked: Forked, status: int) -> None:
        forked.status = status
        forked._started.set()
        forked._ended.set()
        self._on_ended(forked)


# The zygote's end


def main(arguments: list[str]) -> int:
    """`python -m cluster.zygote FD MODULE...`"""
    began = time.perf_counter()
    orders = socket.socket(fileno=int(arguments[0]))
    for module in arguments[1:]:
        importlib.import_module(module)
    living: dict[int, int] = {}  # pidfd -> pid
    with contextlib.suppress(OSError):
        orders.send(json.dumps({"ready": time.perf_counter() - began}).encode())
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != orders.fileno():
                poll.unregister(descriptor)
                pid = living.pop(descriptor)
                _, status = os.waitpid(pid, 0)
                os.close(descriptor)
                with contextlib.suppress(OSError):
                    orders.send(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode())
                continue
            message, descriptors, _, _ = socket.recv_fds(orders, _MESSAGE_BYTES, _MOST_DESCRIPTORS)
            if not message:  # the agent has ended
                for pid in living.values():
                    os.kill(pid, signal.SIGKILL)
                return 0
            zygote = os.getpid()
            pid = os.fork()
            if pid == 0:
                _be_a_rank(zygote, orders, list(living), descriptors, json.loads(message)["target"])
            for copy in descriptors:
                os.close(copy)
            watched = os.pidfd_open(pid)
            living[watched] = pid
            poll.register(watched, select.POLLIN)
            with contextlib.suppress(OSError):
                orders.send(json.dumps({"started": pid}).encode())


def _be_a_rank(zygote: int, orders: socket.socket, others: list[int], descriptors: list[int], target: str) -> None:
    """The forked process, to its end."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:  # it died before the line above
            return
        for descriptor in (orders.detach(), *others):
            os.close(descriptor)
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
