"""The agent: what Ray Train runs on every worker. It forks its rank's process for each attempt, relays that process's calls, and outlives
it.

When a rank dies, everything that is slow to rebuild stays: Ray's worker, its place in the cluster, the imports. In one call per heartbeat
the agent asks the coordinator for orders and delivers its rank's newest beat. It makes only one call because each call through Ray costs
some milliseconds of CPU time, which the steps lose on a small machine. Unasked, the agent does only two things: it reports how its rank
ended, and it ends with its worker.

    coordinator.order(fleet, rank, report, beat) -> AgentOrder   "run" an attempt | "stacks" | "kill" | "wait" | "end", and the beat's reply
    coordinator.rank_ended(attempt, rank, end)

An answer may get lost with a coordinator that dies. Then the agent asks again (Asking), so that a rank's call fails only if nobody answers
for ten minutes.

cluster/launch.py starts it through `agent_main`. It imports no torch, so it starts as fast as Ray's worker does."""

import contextlib
import os
import platform
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from cluster.beat import CALLS_PER_SECOND, Beat, BeatReply
from cluster.failures import RankError
from cluster.process import process_stat
from cluster.rank import STACKS_SIGNAL, CallFailed, Placement, Task, serve_calls
from cluster.zygote import Forked, Zygote

POLL_IDLE_SECONDS = 0.05
PATIENCE_SECONDS = 60.0
"""How long an agent goes on without orders, and how long one call waits for its answer. Ray starts a coordinator that died again within
seconds."""
CALL_PATIENCE_SECONDS = 600.0
"""How long a rank's call is repeated until it is answered."""
ASK_PAUSE_SECONDS = 1.0
STACKS_SECONDS = 2.0
MOST_STACK_BYTES = 64_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What the ranks of an attempt run. `files`: name -> reference to a file in Ray's object store."""

    target: str
    spec: bytes
    """Pickled, because only the rank imports the modules of its classes; that takes seconds."""
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentOrder:
    """What an agent should do."""

    command: Literal["wait", "run", "stacks", "kill", "end"]
    attempt: int = 0
    world_size: int = 0
    payload: Payload | None = None
    """Sent with "run" to an agent that has not begun this attempt."""
    reply: BeatReply | None = None
    """The answer to the beat that was sent with the question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentReport:
    """An agent's view of its rank's process."""

    attempt: int
    """The newest attempt that this agent has begun."""
    pid: int
    state: str
    """The state letter in /proc: R, S, D, T (stopped), ...; "" without a process."""
    cpu_seconds: float
    notice: str
    """Why this node is about to go; "" if no notice is known."""
    node_id: str
    placement_group: str
    """The fleet's placement group, in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnd:
    """How a rank's process ended. `status` is its exit code, or minus the number of the signal that killed it."""

    status: int
    error: RankError | None
    killed_by_order: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingBeat:
    """A beat whose rank waits for the answer."""

    beat: Beat
    reply: Future[BeatReply]


class Beats:
    """A rank's beats on their way to the coordinator. `give` runs in the thread that answers the rank's calls; it waits until the agent
    asks for orders."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: WaitingBeat | None = None
        self._closed = False

    def give(self, beat: Beat) -> BeatReply:
        """An urgent beat, or one that promises a stop, wakes the agent at once."""
        waiting = WaitingBeat(beat=beat, reply=Future())
        with self._lock:
            if self._closed:
                raise CallFailed("the rank has ended")
            self._waiting = waiting
        if beat.urgent or beat.promised_stop is not None:
            self._wake()
        return waiting.reply.result(PATIENCE_SECONDS)

    def take(self) -> WaitingBeat | None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
        return waiting

    def close(self) -> None:
        """End all waits, now and later."""
        with self._lock:
            self._closed = True
        if (waiting := self.take()) is not None:
            waiting.reply.set_exception(CallFailed("the rank has ended"))


class Agent:
    """One worker's agent. `ask(method, *args, **kwargs)` calls the coordinator; `fetch(reference)` reads Ray's object store."""

    def __init__(
        self,
        ask: Callable[..., Any],
        *,
        fleet: int,
        rank: int,
        place: Placement,
        modules: Sequence[str],
        heartbeat_seconds: float,
        placement_group: str = "",
        fetch: Callable[[Any], Any] = lambda reference: reference,
        notice: Callable[[], str] = lambda: "",
        zygote: str = "",
    ) -> None:
        """`zygote`: name of the zygote that this node's agents share; without it this agent starts its own. `heartbeat_seconds`: time
        between two questions while the rank is working; an urgent beat and the rank's end do not wait for it."""
        self._ask, self._fetch, self._notice, self._placement_group = ask, fetch, notice, placement_group
        self._zygote_name, self._heartbeat_seconds = zygote, heartbeat_seconds
        self._fleet, self._rank, self._place, self._modules = fleet, rank, place, tuple(modules)
        self._wake = threading.Event()
        self._running: _Running | None = None
        self._begun = 0
        self._files: dict[str, int] = {}

    def run(self) -> None:
        """Run until the coordinator says "end", or has not answered for PATIENCE_SECONDS."""
        zygote = self._new_zygote()
        answered = time.monotonic()
        try:
            while True:
                self._wake.clear()
                waiting = self._running.beats.take() if self._running is not None else None
                try:
                    order: AgentOrder = self._ask("order", self._fleet, self._rank, self._report(), waiting and waiting.beat)
                except Exception as error:
                    if waiting is not None:
                        waiting.reply.set_exception(error)
                    if time.monotonic() - answered > PATIENCE_SECONDS:
                        raise
                    order = AgentOrder(command="wait")
                else:
                    answered = time.monotonic()
                    if waiting is not None:
                        assert order.reply is not None, "a beat is answered"
                        waiting.reply.set_result(order.reply)
                if order.command == "end":
                    return
                if zygote.lost:
                    zygote.close()
                    zygote = self._new_zygote()
                self._obey(order, zygote)
                pause = poll_seconds(order.world_size, self._heartbeat_seconds) if self._running else POLL_IDLE_SECONDS
                self._wake.wait(pause)
        finally:
            zygote.close()
            for descriptor in self._files.values():
                os.close(descriptor)

    def _new_zygote(self) -> Zygote:
        return Zygote(self._modules, on_ended=lambda forked: self._wake.set(), name=self._zygote_name)

    def _obey(self, order: AgentOrder, zygote: Zygote) -> None:
        running = self._running
        if running is not None:
            mine = order.attempt == running.attempt
            if running.forked.status is None and mine and order.command == "stacks" and not running.stacks_told:
                running.stacks_told = True
                self._ask("stacks", running.attempt, self._rank, running.stacks())
            if running.forked.status is None and ((mine and order.command == "kill") or order.attempt > running.attempt):
                running.killed_by_order = True
                running.forked.signal(signal.SIGKILL)
                running.forked.wait(5.0)
            if running.forked.status is not None:
                self._ask("rank_ended", running.attempt, self._rank, running.end())
                self._running = None
        if self._running is None and order.command == "run" and order.payload is not None and order.attempt > self._begun:
            self._begun = order.attempt
            task = Task(
                target=order.payload.target,
                spec=order.payload.spec,
                rank=self._rank,
                world_size=order.world_size,
                attempt=order.attempt,
                place=self._place,
                files={name: index for index, name in enumerate(self._take_in(order.payload.files))},
            )
            self._running = _Running(task, zygote, list(self._files.values()), self._ask, self._wake.set)

    def _take_in(self, files: Mapping[str, Any]) -> Sequence[str]:
        """Load the files into memory, once for all attempts of this agent."""
        for name, reference in files.items():
            if name not in self._files:
                descriptor = os.memfd_create(name)
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(memoryview(self._fetch(reference)))
                self._files[name] = descriptor
        return tuple(self._files)

    def _report(self) -> AgentReport:
        running = self._running
        pid = running.forked.pid if running else 0
        state, cpu_seconds = process_state(pid) if pid else ("", 0.0)
        return AgentReport(
            attempt=self._begun,
            pid=pid,
            state=state,
            cpu_seconds=cpu_seconds,
            notice=self._notice(),
            node_id=self._place.node_id,
            placement_group=self._placement_group,
        )


class _Running:
    """A rank's process, and the thread that answers its calls."""

    def __init__(self, task: Task, zygote: Zygote, files: Sequence[int], ask: Callable[..., Any], wake: Callable[[], None]) -> None:
        self.attempt = task.attempt
        self.beats = Beats(wake)
        self.killed_by_order = self.stacks_told = False
        self._error: RankError | None = None
        self._stacks = os.memfd_create("stacks")
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self.forked: Forked = zygote.fork("cluster.rank:run_rank", [theirs.fileno(), self._stacks, *files])

        def answer(method: str, *args: Any, **kwargs: Any) -> Any:
            return self.beats.give(*args) if method == "beat" else ask(method, *args, **kwargs)

        self._answering = threading.Thread(
            target=serve_calls, args=(self._connection, answer, self._failed), name=f"calls-{task.attempt}", daemon=True
        )
        self._answering.start()
        with contextlib.suppress(OSError):  # the process has already ended
            self._connection.send(task)

    def stacks(self) -> str:
        """The stack of each thread, if the process answers. A stopped process is continued so that it can."""
        before = os.fstat(self._stacks).st_size
        self.forked.signal(STACKS_SIGNAL)
        self.forked.signal(signal.SIGCONT)
        end = time.monotonic() + STACKS_SECONDS
        size, quiet = before, 0
        while time.monotonic() < end and quiet < 5:
            time.sleep(0.02)
            now = os.fstat(self._stacks).st_size
            quiet = quiet + 1 if now == size > before else 0
            size = now
        text = os.pread(self._stacks, MOST_STACK_BYTES, before).decode(errors="replace")
        return text or f"no answer in {STACKS_SECONDS:g} s; state {process_state(self.forked.pid)[0] or 'gone'}"

    def end(self) -> RankEnd:
        """Collect the result of a process that has ended."""
        self.beats.close()
        self._answering.join(timeout=5.0)  # its last calls may still be in the connection
        self._connection.close()
        os.close(self._stacks)
        assert self.forked.status is not None
        return RankEnd(status=self.forked.status, error=self._error, killed_by_order=self.killed_by_order and self._error is None)

    def _failed(self, error: RankError) -> None:
        self._error = error


class Asking:
    """Calls the coordinator, and repeats a call whose answer was lost until it is answered: the coordinator does nothing twice.

    `send(method, args, kwargs)` makes one call. It raises one of `lost` if there was no answer; any other exception is the answer. An order
    is not repeated, because the agent's next question replaces it."""

    def __init__(
        self,
        send: Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any],
        lost: tuple[type[Exception], ...],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._send, self._lost, self._clock, self._sleep = send, lost, clock, sleep

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The answer. CallFailed if there is none for CALL_PATIENCE_SECONDS."""
        if method == "event":
            kwargs = {**kwargs, "call_id": secrets.token_hex(8)}  # two events may be alike
        began = self._clock()
        while True:
            try:
                return self._send(method, args, kwargs)
            except self._lost as error:
                if method == "order":
                    raise
                spent = self._clock() - began
                if spent > CALL_PATIENCE_SECONDS:
                    raise CallFailed(f"the coordinator did not answer {method!r} for {spent:.0f} s ({error})") from error
            self._sleep(ASK_PAUSE_SECONDS)


def poll_seconds(world_size: int, heartbeat_seconds: float) -> float:
    """Time between two questions of an agent whose rank is working; 2.5 s with 1,000 ranks."""
    return max(heartbeat_seconds, world_size / CALLS_PER_SECOND)


def process_state(pid: int) -> tuple[str, float]:
    """The state letter in /proc and the CPU seconds used; ("", 0) if /proc cannot be read, usually because the process is gone."""
    stat = None
    with contextlib.suppress(OSError):
        stat = process_stat(pid)
    return (stat.state, stat.cpu_seconds) if stat is not None else ("", 0.0)


def agent_main(settings: Mapping[str, Any]) -> None:
    """The train function of a fleet. `settings`: coordinator, fleet, modules, zygote (a name), notice (a path), heartbeat_seconds."""
    import ray
    import ray.exceptions
    import ray.train

    coordinator = settings["coordinator"]
    context = ray.train.get_context()
    runtime = ray.get_runtime_context()
    notice_path = settings["notice"]

    def send(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return ray.get(getattr(coordinator, method).remote(*args, **kwargs), timeout=PATIENCE_SECONDS)

    def notice() -> str:
        return f"{notice_path} on {platform.node()}" if notice_path and os.path.exists(notice_path) else ""

    mine = [str(gpu) for gpu in ray.get_gpu_ids()]
    seen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    place = Placement(
        host=platform.node(),
        address=ray.util.get_node_ip_address(),
        node_id=runtime.get_node_id(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device_index=(seen.index(mine[0]) if mine[0] in seen else 0) if mine else None,
    )
    group = ray.util.get_current_placement_group()
    Agent(
        Asking(send, (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError)),
        fleet=settings["fleet"],
        rank=context.get_world_rank(),
        place=place,
        modules=settings["modules"],
        placement_group=group.id.hex() if group else "",
        fetch=ray.get,
        notice=notice,
        zygote=settings["zygote"],
        heartbeat_seconds=settings["heartbeat_seconds"],
    ).run()
