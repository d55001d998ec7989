"""A rank's process, seen from inside: its task, its connection to the coordinator, and the process group it joins. No Ray here.

agent.py starts the process through zygote.py, with two open files: one end of a connection, and a file for stack traces. The agent sends a
Task. The process sends calls for the coordinator, which the agent passes on, and its exception if it fails. serve_calls is the agent's end.
"""

import contextlib
import faulthandler
import fcntl
import importlib
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from cluster.failures import Kind, RankError, described, is_refusal, unwrapped
from cluster.surroundings import GLOO, NCCL, check_interface, drop_foreign

STACKS_SIGNAL = signal.SIGUSR1
_SIOCGIFADDR = 0x8915
COLLECTIVE_SECONDS = 86_400.0
"""How long a collective waits for the slowest rank. The driver watches the ranks' beats and ends an attempt that hangs much earlier; it
alone knows which ranks are at work, for instance at decoding their images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where an agent, and so its rank, runs."""

    host: str
    address: str
    """The node's address in the cluster."""
    node_id: str
    local_rank: int
    local_world_size: int
    device_index: int | None
    """Index of the rank's GPU among those that the process sees; None without a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a rank's process should do."""

    target: str
    """"module:function", called with (spec, RankContext)."""
    spec: bytes
    """Pickled by the driver."""
    rank: int
    world_size: int
    attempt: int
    place: Placement
    files: Mapping[str, int]
    """Name -> file descriptor in memory, for the files that travel with the task."""


# Messages between the two ends of the connection


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """Rank to agent: ask the coordinator."""

    number: int
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failed:
    """Rank to agent: this exception ends the rank."""

    error: RankError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """Agent to rank: what the call with this number returned or raised."""

    number: int
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStore:
    """Rank to ranks, through the coordinator: where the store of their process group listens."""

    address: str
    port: int


class AgentLost(RuntimeError):
    """The agent no longer answers, so this process has nothing left to do."""

    failure_kind = "infrastructure"


class CallFailed(RuntimeError):
    """The coordinator could not be reached, or raised an exception that cannot travel. Where its storage refuses, a retry does not help."""

    failure_kind: Kind = "infrastructure"

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        if cause is not None and is_refusal(cause):
            self.failure_kind = "storage"


class GroupIncomplete(RuntimeError):
    """Not all ranks of the attempt have come to form their group."""

    failure_kind = "infrastructure"


class Calls:
    """The process's end of the connection. Any thread may call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._number = 0

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The coordinator's answer. Raises what its method raised, CallFailed if it does not answer, or AgentLost."""
        answer: Future[Any] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = answer
        self._send(_Call(number=number, method=method, args=args, kwargs=kwargs))
        return answer.result()

    def failed(self, error: RankError) -> None:
        with contextlib.suppress(AgentLost):
            self._send(_Failed(error=error))

    def listen(self) -> None:
        """Receive answers until the agent is gone, then end this process: nobody would get what it saves or reports."""
        threading.Thread(target=self._listen, name="agent", daemon=True).start()

    def _send(self, message: _Call | _Failed) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError as error:
            raise AgentLost("the agent of this rank has ended") from error

    def _listen(self) -> None:
        while True:
            try:
                answer: _Answer = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            with self._lock:
                future = self._waiting.pop(answer.number)
            if answer.error is None:
                future.set_result(answer.result)
            else:
                future.set_exception(answer.error)


def serve_calls(connection: Connection, ask: Callable[..., Any], on_failed: Callable[[RankError], None]) -> None:
    """The agent's end: answer calls with `ask(method, *args, **kwargs)` until the process has ended. Runs several at a time, because
    some block."""

    sending = threading.Lock()

    def answer(call: _Call) -> None:
        try:
            found = _Answer(number=call.number, result=ask(call.method, *call.args, **call.kwargs))
        except Exception as error:
            found = _Answer(number=call.number, error=_that_can_travel(error))
        with sending, contextlib.suppress(OSError):  # the process has ended meanwhile
            connection.send(found)

    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="calls") as pool:
        while True:
            try:
                match connection.recv():
                    case _Call() as call:
                        pool.submit(answer, call)
                    case _Failed(error=error):
                        on_failed(error)
            except (EOFError, OSError):
                return


def _that_can_travel(error: Exception) -> Exception:
    """`error`, or its text in a CallFailed if the other side could not unpickle it without Ray."""
    if isinstance(error, CallFailed):
        return error
    if isinstance(error, OSError | ValueError) and type(error).__module__ == "builtins":
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return CallFailed(f"{type(error).__name__}: {error}", unwrapped(error)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """What a rank's work receives besides its spec."""

    rank: int
    world_size: int
    attempt: int
    place: Placement
    files: Mapping[str, memoryview]
    call: Calls

    def join_group(self, join_seconds: float) -> None:
        """Set up torch.distributed's default group of this attempt's ranks: NCCL if they have GPUs, else gloo. Rank 0 hosts the store.
        GroupIncomplete if not all ranks have come within `join_seconds`, NoSuchInterface if a variable names a wrong network."""
        import torch
        import torch.distributed as dist

        drop_foreign(os.environ)
        variable = GLOO if self.place.device_index is None else NCCL
        if named := os.environ.get(variable):
            check_interface(variable, named)
        if self.place.device_index is not None:
            torch.cuda.set_device(self.place.device_index)
        elif not named and (interface := interface_of(self.place.address)):
            os.environ[GLOO] = interface
        dist.init_process_group(
            "gloo" if self.place.device_index is None else "nccl",
            store=self._meet(join_seconds),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )

    def _meet(self, join_seconds: float) -> Any:
        """The group's store, once all ranks have come to it."""
        from torch._C._distributed_c10d import TCPStore

        end = time.monotonic() + join_seconds
        timeout = timedelta(seconds=join_seconds)
        if self.rank == 0:
            store = TCPStore(self.place.address, 0, self.world_size, is_master=True, timeout=timeout, wait_for_workers=False)
            self.call("publish", self.attempt, "store", GroupStore(address=self.place.address, port=store.port))
        else:
            while (where := self.call("lookup", self.attempt, "store")) is None:
                if time.monotonic() > end:
                    raise GroupIncomplete(f"rank 0 has not opened the group's store within {join_seconds:g} s")
                time.sleep(0.02)
            store = TCPStore(where.address, where.port, self.world_size, is_master=False, timeout=timeout, wait_for_workers=False)
        here = {rank: f"here/{rank}" for rank in range(self.world_size)}
        store.set(here[self.rank], "")
        try:
            store.wait(list(here.values()), timedelta(seconds=max(end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            missing = [rank for rank, key in here.items() if not store.check([key])]
            if not missing:
                raise
            who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            raise GroupIncomplete(f"{who} of {self.world_size} did not come to the group within {join_seconds:g} s") from error
        return store


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None if none has. gloo would take the one of the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def run_rank(descriptors: list[int]) -> None:
    """Entry point of a forked process: receive the task, run it, and report the exception if it fails, with exit status 1."""
    connection, stacks, *files = descriptors
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})
    pipe = Connection(connection)
    task: Task = pipe.recv()
    calls = Calls(pipe)
    calls.listen()
    context = RankContext(
        rank=task.rank,
        world_size=task.world_size,
        attempt=task.attempt,
        place=task.place,
        files={name: memoryview(mmap.mmap(files[index], 0, access=mmap.ACCESS_READ)) for name, index in task.files.items()},
        call=calls,
    )
    try:
        module, _, function = task.target.partition(":")
        getattr(importlib.import_module(module), function)(pickle.loads(task.spec), context)
    except AgentLost:
        raise SystemExit(1) from None
    except BaseException as error:
        calls.failed(described(error))
        traceback.print_exc(file=sys.stderr)
        raise SystemExit(1) from None
