"""A cluster of one process: `trainer.run` with its own driver, coordinator and agents, but threads where Ray would start processes.

`install` replaces Ray's functions, the zygote and the fleet with the classes below, in a process that benchmarks/faults/control.py forked
for one trial. All else is the product's code: start.py, Drive, Session, Coordinator, Store, Journal, agent_main, run_rank, Saver. Ranks run
benchmarks/faults/small_rank.py. A start that takes ten seconds with Ray takes a few milliseconds, so hundreds of trials are affordable.

What Ray promises of the coordinator's actor is kept: arguments and answers are pickled; a method's exception arrives as a RayTaskError; if
the actor dies, a new one is built with the same arguments, and every call that had no answer is delivered again (max_task_retries=-1), so
a call may run twice; an actor whose constructor raises stays dead.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from benchmarks.faults import small_rank
from benchmarks.faults.calls import Dead, Life, start_as, this_life
from cluster import launch, rank, ray_cluster
from cluster.agent import agent_main
from cluster.coordinator import CoordinatorActor
from cluster.failures import Failure
from cluster.launch import ClusterHardware
from cluster.leftovers import FOLDER_VARIABLE
from cluster.overseer import Overseer
from cluster.zygote import Forked, Zygote
from trainer.drive.check import Checked
from trainer.rank import finishing, worker
from trainer.tasks.info import CLASSIFICATION

NODE = "node-of-this-process"
RESTART_SECONDS = 0.05
MOST_RESTARTS = 5

MessageHow = Literal["record", "once", "answer lost", "lasting", "killed before", "killed after", "killed inside", "twice"]
MESSAGE_HOWS: tuple[MessageHow, ...] = ("once", "answer lost", "lasting", "killed before", "killed after", "killed inside", "twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageStrike:
    """What happens to one message of the coordinator: the `number`-th call of `method`, from 1."""

    how: MessageHow = "record"
    method: str = ""
    number: int = 0
    seconds: float = 0.0
    """For `lasting`: how long the coordinator answers nobody, from that message on."""
    timeout_seconds: float = 0.0
    """For `once` and `answer lost`: after how long Ray tells the caller that the actor cannot be reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A message that arrived."""

    method: str
    number: int
    """Which call of this method it is, from 1."""
    sender: str


class Ref:
    """What `.remote()` returns."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> "Future[Any]":
        return self._future

    def answer(self, result: Any) -> None:
        with contextlib.suppress(Exception):  # answered already
            self._future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):
            self._future.set_exception(error)


class Actor:
    """The handle of the coordinator's actor. Each message runs in a thread of its own."""

    def __init__(self, make: Callable[[], CoordinatorActor], strike: MessageStrike) -> None:
        self._make, self._strike = make, strike
        self._changed = threading.Condition()
        self._life = Life("coordinator")
        self._instance: CoordinatorActor | None = None
        self._failure: BaseException | None = None
        self._restarts = 0
        self._counts: Counter[str] = Counter()
        self._messages: list[Message] = []
        self._waiting: dict[Ref, Callable[[], None]] = {}
        self._silent_until = 0.0
        self._has_struck = False
        start_as(self._life, self._build)

    @property
    def messages(self) -> list[Message]:
        return list(self._messages)

    @property
    def has_struck(self) -> bool:
        return self._has_struck

    @property
    def restarts(self) -> int:
        return self._restarts

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args, **kwargs: self._send(method, args, kwargs))

    def kill(self, *, after_seconds: float = 0.0) -> None:
        """Kill the actor as SIGKILL would; Ray builds a new one."""
        time.sleep(after_seconds)
        with self._changed:
            self._life.kill()
            self._instance = None
            self._restarts += 1
            if self._restarts > MOST_RESTARTS:
                self._failure = RuntimeError("the actor died too often")
            self._life = Life("coordinator")
            again = list(self._waiting.values())
        start_as(self._life, self._build)
        for deliver in again:
            deliver()

    def bury(self) -> None:
        """End it for good: the run is over."""
        self._life.kill()

    def _build(self) -> None:
        if self._restarts:
            time.sleep(RESTART_SECONDS)
        life = this_life()
        try:
            instance = self._make()
        except Exception as error:
            with self._changed:
                if self._life is life:
                    self._failure = error
                    self._changed.notify_all()
            return
        with self._changed:
            if self._life is life:
                self._instance = instance
                self._changed.notify_all()

    def _send(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Ref:
        sender = this_life()
        sender.check()
        ref, packed = Ref(), pickle.dumps((tuple(args), dict(kwargs)))
        with self._changed:
            self._counts[method] += 1
            message = Message(method=method, number=self._counts[method], sender=sender.kind)
            self._messages.append(message)
            strikes = not self._has_struck and (method, message.number) == (self._strike.method, self._strike.number)
            self._has_struck = self._has_struck or strikes
            if strikes and self._strike.how == "lasting":
                self._silent_until = time.monotonic() + self._strike.seconds
            life = self._life
        how = self._strike.how if strikes else "record"
        if how == "once":
            start_as(life, lambda: self._lose(ref))
            return ref
        if how == "killed before":
            self.kill()
        first = [True]

        def deliver() -> None:
            start_as(self._life, lambda: self._run(ref, method, packed, how if first[0] else "record", first))

        with self._changed:
            self._waiting[ref] = deliver
        deliver()
        return ref

    def _lose(self, ref: Ref) -> None:
        time.sleep(self._strike.timeout_seconds)
        ref.fail(ActorUnavailableError("The actor is temporarily unavailable", None))

    def _run(self, ref: Ref, method: str, packed: bytes, how: str, first: list[bool]) -> None:
        """Deliver a message to the present instance, unless it dies first: then kill() delivers it again."""
        life = this_life()
        with self._changed:
            self._changed.wait_for(lambda: life.is_dead or self._instance is not None or self._failure is not None)
            instance, failure = self._instance, self._failure
        if life.is_dead:
            return None
        if failure is not None or instance is None:
            return self._answered(ref, ActorDiedError(), failed=True)
        while (left := self._silent_until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        first[0] = False
        args, kwargs = pickle.loads(packed)
        if how == "killed inside":
            start_as(self._life, lambda: self.kill(after_seconds=0.002))
        try:
            result = getattr(instance, method)(*args, **kwargs)
            if self._strike.how == "twice" and self._strike.method in ("", method):
                args, kwargs = pickle.loads(packed)
                result = getattr(instance, method)(*args, **kwargs)
            result = pickle.loads(pickle.dumps(result))
        except Dead:
            return None
        except Exception as error:
            if not life.is_dead:
                self._answered(ref, RayTaskError(method, f"{type(error).__name__}: {error}", error).as_instanceof_cause(), failed=True)
            return None
        if life.is_dead:
            return None
        if how == "killed after":
            self.kill()
            return None
        if how == "answer lost":
            with self._changed:
                self._waiting.pop(ref, None)
            return self._lose(ref)
        return self._answered(ref, result, failed=False)

    def _answered(self, ref: Ref, result: Any, *, failed: bool) -> None:
        with self._changed:
            self._waiting.pop(ref, None)
        if failed:
            ref.fail(result)
        else:
            ref.answer(result)


class ThreadZygote:
    """Forks threads: a rank's run_rank, and the model check with its answer ready."""

    def __init__(self, modules: Sequence[str], on_ended: Callable[[Forked], None] = lambda forked: None, *, name: str = "") -> None:
        self._on_ended = on_ended
        self.import_seconds, self.pid = 0.0, os.getpid()

    @property
    def lost(self) -> bool:
        return False

    def close(self, *, kill: bool = False) -> None:
        pass

    def fork(self, target: str, descriptors: Sequence[int]) -> Forked:
        mine = [os.dup(descriptor) for descriptor in descriptors]
        if target == "trainer.drive.check:answer":
            start_as(Life("check"), lambda: _answer_check(mine[0]))
            return Forked()
        assert target == "cluster.rank:run_rank", target
        return ThreadRank(mine, self._on_ended)


def _answer_check(descriptor: int) -> None:
    connection = Connection(descriptor)
    connection.recv()
    connection.send(Checked(has_depthwise=True, task=CLASSIFICATION, weights_bytes=1000))


class ThreadRank(Forked):
    """A rank's process that is a thread."""

    def __init__(self, descriptors: list[int], on_ended: Callable[[Forked], None]) -> None:
        super().__init__()
        self.pid = os.getpid()
        self._life, self._on_ended_rank = Life("rank"), on_ended
        self._descriptors = descriptors
        self._once = threading.Lock()
        self._started.set()
        self._life.end = self.end  # type: ignore[attr-defined]
        start_as(self._life, self._work, "rank")

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.end(-signal.SIGKILL)

    def end(self, status: int) -> None:
        """The process has ended."""
        with self._once:
            if self.status is not None:
                return
            self.status = status
        self._life.kill()
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._descriptors[0])) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        self._ended.set()
        self._on_ended_rank(self)

    def _work(self) -> None:
        status = 1
        try:
            rank.run_rank(self._descriptors)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except Dead:
            return
        self.end(status)


class ThreadFleet:
    """Agents that are threads, where cluster.launch.Fleet has Ray Train place them."""

    def __init__(
        self,
        number: int,
        coordinator: Any,
        *,
        name: str,
        resources: Any,
        modules: Sequence[str],
        notice: str,
        placement_seconds: float,
        heartbeat_seconds: float,
        zygote: str = "",
        on_ended: Callable[[], None] = lambda: None,
        **more: Any,
    ) -> None:
        self.number, self.workers = number, resources.workers
        _room["small"] = _room.get("small", 0) - 1
        self._failure: Failure | None = None
        self._ended, self._on_ended = threading.Event(), on_ended
        settings = {
            "coordinator": coordinator,
            "fleet": number,
            "modules": list(modules),
            "zygote": zygote,
            "notice": notice,
            "heartbeat_seconds": heartbeat_seconds,
            **more,
        }
        self._lives = [Life("agent") for _ in range(self.workers)]
        agents = [start_as(life, lambda index=index: self._agent(index, settings)) for index, life in enumerate(self._lives)]  # type: ignore[misc]
        start_as(Life("fit"), lambda: self._fit(agents))

    def wait(self, timeout_seconds: float) -> bool:
        return self._ended.wait(timeout_seconds)

    def abandon(self) -> None:
        for life in self._lives:
            life.kill()

    def failure(self) -> Failure | None:
        assert self._ended.is_set()
        return self._failure

    def _fit(self, agents: Sequence[threading.Thread]) -> None:
        while any(agent.is_alive() for agent in agents) and self._failure is None:
            time.sleep(0.01)
        self.abandon()
        self._ended.set()
        self._on_ended()

    def _agent(self, index: int, settings: Mapping[str, Any]) -> None:
        threading.current_thread().agent = SimpleNamespace(index=index, workers=self.workers)  # type: ignore[attr-defined]
        try:
            agent_main(settings)
        except Exception as error:
            self._failure = self._failure or launch.failure_of(error)


def _context() -> Any:
    agent = threading.current_thread().agent  # type: ignore[attr-defined]
    return SimpleNamespace(
        get_world_rank=lambda: agent.index,
        get_local_rank=lambda: agent.index,
        get_world_size=lambda: agent.workers,
        get_local_world_size=lambda: agent.workers,
    )


def get(refs: Any, *, timeout: float | None = None) -> Any:
    """ray.get"""
    if isinstance(refs, list):
        return [get(ref, timeout=timeout) for ref in refs]
    try:
        return refs.future().result(timeout)
    except FutureTimeout as error:
        if isinstance(error, GetTimeoutError | RayTaskError):
            raise
        raise GetTimeoutError("Get timed out: some object(s) not ready.") from None


_room: dict[str, int] = {}
"""Number of fleets that find room for one worker only."""


def give_room(*, after_first_fleet: int) -> None:
    """The first `after_first_fleet` fleets find room for one worker; then there is room for many."""
    _room["small"] = after_first_fleet


def _free(avoided: Any = ()) -> list[dict[str, float]]:
    return [{"CPU": 1.0 if _room.get("small", 0) > 0 else 64.0}]


def _nodes() -> list[dict[str, Any]]:
    return [{"NodeID": NODE, "Alive": True, "Resources": {"CPU": 64.0}, "NodeManagerAddress": "127.0.0.1"}]


@contextlib.contextmanager
def _cluster(config: Any, **_: Any) -> Iterator[ClusterHardware]:
    yield ClusterHardware(local=True, nodes=1, cpus=64, gpus=0)


def _exit_of_rank(status: int) -> None:
    """os._exit in cluster.rank ends the thread that stands for the process."""
    life = this_life()
    end = getattr(life, "end", None)
    assert end is not None, "only a rank ends like this"
    end(status)
    raise Dead(life.kind)


class _Os:
    """`os` as cluster.rank sees it."""

    _exit = staticmethod(_exit_of_rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def everywhere(*pairs: tuple[Any, Any]) -> None:
    """Replace the first of each pair by the second in every module of the project that has it under any name."""
    stand_ins = {id(real): stand_in for real, stand_in in pairs}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("cluster", "trainer", "dataio") and module is not None:
            for key, value in list(vars(module).items()):
                if id(value) in stand_ins:
                    setattr(module, key, stand_ins[id(value)])


def install(strike: MessageStrike, *, on_actor: Callable[[Actor], None]) -> None:
    """Replace Ray. `on_actor` gets each coordinator's handle."""

    def start_coordinator(**kwargs: Any) -> Actor:
        packed = pickle.dumps(kwargs)
        log = f"{tempfile.mkdtemp(prefix='coordinator-', dir=os.environ.get(FOLDER_VARIABLE))}/coordinator.log"
        actor = Actor(lambda: CoordinatorActor(**pickle.loads(packed), log=log), strike)
        on_actor(actor)
        return actor

    everywhere(
        (launch.start_coordinator, start_coordinator),
        (launch.overseer_of, lambda coordinator: Overseer(lambda: None, lambda: None)),  # type: ignore[arg-type, return-value]
        (ray_cluster.ray_cluster, _cluster),
        (launch.Fleet, ThreadFleet),
        (launch.free_resources, _free),
        (launch.total_resources, _free),
        (launch.draining_nodes, dict),
        (launch.remove_placement_group, lambda group: None),
        (Zygote, ThreadZygote),
    )
    ray.get, ray.nodes = get, _nodes
    ray.put = lambda value: SimpleNamespace(future=lambda: _done(value))
    ray.get_gpu_ids = list
    ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: NODE, gcs_address="127.0.0.1:1")
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    ray.util.get_current_placement_group = lambda: None
    ray.train.get_context = _context
    vars(rank)["os"] = _Os()
    rank.RankContext.join_group = lambda self, join_seconds: None  # type: ignore[method-assign]
    worker.train_rank = small_rank.train_rank
    vars(finishing)["export_model"] = small_rank.export_model


def _done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future
