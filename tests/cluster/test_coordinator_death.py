"""A coordinator may die anywhere, and its calls may come twice: what it was told, and what it did, is the same as without.

Its process is an object here. It dies at a call to the outside, before or after it: a record of the log, a line of the journal, a
commit, a clean-up. From then on nothing of it does anything. Its heir finds the log, and whoever got no answer asks again, as Ray and the
agents do."""

import errno
import inspect
import itertools
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from cluster.agent import AgentReport, Payload, RankEnd
from cluster.beat import Beat
from cluster.coordinator import MOST_RESTARTS, Coordinator, CoordinatorKeepsDying
from cluster.journal import Journal, read_journal
from cluster.memory import LOG_LOST
from cluster.names import QUARANTINE
from cluster.quarantined import append_local
from cluster.roster import RankInfo
from cluster.storage import Storage, StorageOutage, StorageRefused, open_storage
from cluster.store import Receipt, Store
from cluster.targets import Discovery
from cluster.wal import Log

PAYLOAD = Payload(target="m:f", spec=b"")
REPORT = AgentReport(attempt=0, pid=0, state="", cpu_seconds=0.0, notice="", node_id="n", placement_group="")
WELL, KILLED = RankEnd(status=0, error=None, killed_by_order=False), RankEnd(status=-9, error=None, killed_by_order=False)
NEVER = 10**9
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a committer dies here too
READS = {
    *("adopt", "beat", "news", "status", "account", "result", "ends", "discovery_address", "targets", "last_commit", "wait_committed"),
    *("drain", "ended", "finish", "close", "order", "lookup", "waiting_for_storage"),
}
"""Methods that change nothing that is to be kept, or that the driver or the rank repeats by itself (adopt, account, beat)."""


class Died(SystemExit):
    """A thread that ends with it ends silently."""


class Life:
    """A process that dies at its `dies_at`-th point: before its first call to the outside is point 1, after it point 2, and so on."""

    def __init__(self, dies_at: int = NEVER) -> None:
        self.dies_at, self.points, self.is_dead = dies_at, 0, False
        self._lock = threading.RLock()

    def point(self) -> None:
        with self._lock:
            self.points += 1
            self.is_dead = self.is_dead or self.points >= self.dies_at
            if self.is_dead:
                raise Died

    def of(self, thing: Any, *methods: str) -> Any:
        """`thing`, as this life reaches it."""

        def mortal(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.point()
                result = getattr(thing, name)(*arguments, **named)
                self.point()
                return result

            return call

        calls = {name: mortal(name) for name in methods}

        class Reached:
            def __getattr__(self, name: str) -> Any:
                return calls.get(name) or getattr(thing, name)

        return Reached()


class Unlisted:
    """In place of the server for Prometheus, which takes its time to end and is not in question here."""

    address, problem = "localhost:1", ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def write(self) -> None:
        pass

    close = retire = write


class World:
    """A run whose coordinator dies at the given points of its lives, and everybody who calls it."""

    def __init__(
        self, storage: Storage, log: Path, patch: pytest.MonkeyPatch, *, dies_at: list[int] | None = None, twice: bool = False
    ) -> None:
        self.storage, self.log, self.patch, self.twice = storage, log, patch, twice
        self.store = Store.open(storage, "run")
        self.generation = self.store.claim_generation()
        self._lives = iter([Life(each) for each in dies_at or []])
        self.deaths = 0
        self.coordinator = self._born()

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The answer, of whichever coordinator gives it."""
        answer = self._answer(method, *arguments, **named)
        if self.twice:
            assert self._answer(method, *arguments, **named) == answer, method
        return answer

    def until(self, method: str, *arguments: Any, **named: Any) -> None:
        """Ask until the answer is yes. Whoever waits goes on when the coordinator has died unseen, in one of its threads."""
        for _ in range(400):
            if self._answer(method, *arguments, **named):
                return
        raise AssertionError(f"{method}{arguments} is never true")

    def stage(self, attempt: int, rank: int, step: int) -> Receipt:
        return self.store.stage(step, self.generation, f"rank-{rank}.json", f"{attempt}/{rank}/{step}".encode(), attempt=attempt)

    def end(self) -> None:
        self.until("drain", 0.1)
        self._answer("finish", 5.0)

    def seen(self) -> dict[str, Any]:
        """What remains, and what the coordinator says of it, without what is a matter of time."""
        status = self._answer("status")
        events = [{key: value for key, value in event.items() if key not in ("time", "seconds", "path")} for event in self.journal()]
        registry = self.coordinator._metrics.registry.collect()
        counters = {
            (sample.name, *sample.labels.values()): sample.value for each in registry if each.type == "counter" for sample in each.samples
        }
        return {
            "commits": [commit.step for commit in self.store.commits()][:2],  # a death may cost a clean-up, which the next one does
            "news": (status.checkpoints.last and status.checkpoints.last.step, status.checkpoints.failures, status.checkpoints.problem),
            "failed": status.checkpoints.failed_steps,
            "ends": {attempt: self._answer("ends", attempt) for attempt in range(1, 5)},
            "results": {attempt: self._answer("result", attempt) for attempt in range(1, 5)},
            "stop": status.stop,
            "orders": [self._answer("order", fleet, 0, replace(REPORT, attempt=status.attempt)).command for fleet in range(4)],
            "attempt": (status.attempt, status.world_size, status.start_step),
            "up": {rank: known.info for rank, known in status.ranks.items()},
            "stacks": status.stacks,
            "bad": (status.quarantined, self.storage.read(f"run/{QUARANTINE}") if status.quarantined else b""),
            "board": self._answer("lookup", status.attempt, "store"),
            "counters": counters,
            "events": sorted(json.dumps(event, sort_keys=True) for event in events),
        }

    def journal(self) -> list[dict[str, Any]]:
        return read_journal(self.storage, "run")

    def _answer(self, method: str, *arguments: Any, **named: Any) -> Any:
        while True:
            with suppress(Died):
                answer = getattr(self.coordinator, method)(*arguments, **named)
                if not self.life.is_dead:
                    return answer
            self._end_of_life()
            self.coordinator = self._born()

    def _end_of_life(self) -> None:
        self.deaths += 1
        with suppress(Died):
            self.coordinator.close()  # its threads and its port; its log, its journal and its commits it can no longer reach

    def _born(self) -> Coordinator:
        while True:
            self.life = life = next(self._lives, Life())
            self.patch.setattr("cluster.memory.Log", lambda path, life=life: life.of(Log(path), "begin", "append"))
            journal = SimpleNamespace(open=lambda *each, life=life: life.of(Journal.open(*each), "write"))
            self.patch.setattr("cluster.outbox.Journal", journal)
            store = SimpleNamespace(open=lambda *each, life=life: life.of(Store.open(*each), "commit", "prune"))
            self.patch.setattr("cluster.coordinator.Store", store)
            self.patch.setattr("cluster.coordinator.Discovery", Unlisted)
            with suppress(Died):
                return Coordinator(self.storage, "run", self.generation, 2, log=self.log)
            self.deaths += 1


def info(rank: int) -> RankInfo:
    return RankInfo(host="h", pid=100 + rank, node_id="n", metrics_address=f"h:{rank}")


def bad(sample_id: int) -> dict[str, Any]:
    return {"key": f"k{sample_id}", "reason": "truncated", "split": "train", "sample_id": sample_id}


def agree(world: World, attempt: int, begun: int, ranks: int) -> None:
    """The ranks beat until the stop is confirmed to each, as their heartbeats do."""
    promised: dict[int, int | None] = dict.fromkeys(range(ranks))
    confirmed: set[int] = set()
    for _ in range(50):
        for rank in range(ranks):
            beat = Beat(attempt=attempt, rank=rank, steps_done=begun - 1, steps_begun=begun, promised_stop=promised[rank])
            reply = world.call("beat", beat) if not world.twice else world._answer("beat", beat)
            promised[rank] = reply.stop_at or promised[rank]
            confirmed |= {rank} if reply.confirmed else set()
        if len(confirmed) == ranks:
            return
    raise AssertionError("the ranks wait for ever")


def a_run(world: World) -> None:
    """Three attempts, with all that a coordinator is ever told: a pause, a failure, a stop."""
    call = world.call
    call("start_attempt", 1, 2, 0, 1, PAYLOAD)
    for rank in range(2):
        call("register", 1, rank, info(rank))
    call("publish", 1, "store", 5)
    call("event", "first_step", call_id="a", attempt=1, step=1)
    for step in (2, 4):
        for rank in range(2):
            call("ack", 1, rank, step, [world.stage(1, rank, step)], {"ranks": 2})
        world.until("wait_committed", step, 0.05)
    call("fail_checkpoint", 1, 0, 6, "no room")
    call("ack", 1, 1, 6, [world.stage(1, 1, 6)], {})
    assert call("quarantine", [bad(1)]) == 1
    assert call("quarantine", [bad(1), bad(2)]) == 2
    call("request_pause", 1, "there is room")
    agree(world, 1, 6, 2)
    call("put_result", 1, {"stopped": True})
    for rank in range(2):
        call("rank_ended", 1, rank, WELL)
    call("event", "attempt_paused", call_id="b", attempt=1, kind="grow")
    call("start_attempt", 2, 2, 4, 1, PAYLOAD)
    call("register", 2, 0, info(7))
    call("ask_stacks", 2)
    call("stacks", 2, 1, "most recent call first")
    call("kill_attempt", 2)
    call("rank_ended", 2, 0, KILLED)
    call("event", "attempt_failed", call_id="c", attempt=2, kind="hang", message="stuck")
    call("event", "attempt_failed", call_id="d", attempt=2, kind="hang", message="stuck")  # the same again, and another one
    call("end_fleet", 1)
    assert call("order", 1, 0, REPORT).command == "end"
    call("start_attempt", 3, 1, 4, 2, PAYLOAD)
    call("register", 3, 0, info(0))
    call("request_stop", "SIGTERM")
    agree(world, 3, 5, 1)
    call("ack", 3, 0, 7, [world.stage(3, 0, 7)], {})
    world.until("wait_committed", 7, 0.05)
    call("put_result", 3, {"stopped": True, "steps_done": 7})
    call("rank_ended", 3, 0, WELL)
    world.end()


def storage_of(kind: str, folder: Path) -> Storage:
    if kind == "local":
        return open_storage(folder / "runs")
    return Storage(fs=pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()), root="runs", is_local=False, uri="mock://bucket/runs")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    numbers = itertools.count()

    def world(kind: str = "objects", **how: Any) -> World:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return World(storage_of(kind, folder), folder / "log", monkeypatch, **how)

    return world


UNDISTURBED: dict[str, tuple[dict[str, Any], int]] = {}


def undisturbed(make: Callable[..., World], kind: str = "objects") -> tuple[dict[str, Any], int]:
    """What is seen of a run in which nothing dies, and how many points it has."""
    if kind not in UNDISTURBED:
        world = make(kind)
        a_run(world)
        points = world.life.points
        assert not world.coordinator._state.untold  # the journal has everything, and the coordinator keeps none of it
        UNDISTURBED[kind] = world.seen(), points
    return UNDISTURBED[kind]


@pytest.mark.parametrize("kind", ["local", "objects"])
def test_a_call_that_comes_twice_does_what_it_did_the_first_time(make: Callable[..., World], kind: str) -> None:
    expected, _ = undisturbed(make, kind)
    world = make(kind, twice=True)
    a_run(world)
    assert world.seen() == expected
    public = {name for name, _ in inspect.getmembers(Coordinator, inspect.isfunction) if not name.startswith("_")}
    said = {name for name in public if f'"{name}"' in inspect.getsource(a_run)}
    assert public - READS <= said, "a new method is to be in a_run, and to bear coming twice"


@pytest.mark.parametrize(("kind", "every", "first"), [("local", 13, 3), ("objects", 2, 1)])
def test_it_may_die_before_and_after_each_thing_it_does(make: Callable[..., World], kind: str, every: int, first: int) -> None:
    expected, points = undisturbed(make, kind)
    assert points > 100
    for point in range(first, points + 1, every):
        world = make(kind, dies_at=[point])
        a_run(world)
        assert world.seen() == expected, f"dead at point {point}"
        assert world.deaths == 1


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dies_at=st.lists(st.integers(1, 60), min_size=1, max_size=6), twice=st.booleans())
def test_it_may_die_again_and_again(make: Callable[..., World], dies_at: list[int], twice: bool) -> None:
    expected, _ = undisturbed(make)
    world = make(dies_at=dies_at, twice=twice)
    a_run(world)
    assert world.seen() == expected


Message = tuple[str, tuple[Any, ...], dict[str, Any]]


@st.composite
def attempts(draw: st.DrawFn) -> list[Message]:
    """Two attempts of one to three ranks: each rank's messages in its own order, everybody's in any."""
    told: list[Message] = []
    for attempt in (1, 2):
        ranks = draw(st.integers(1, 3))
        lines: list[list[Message]] = []
        for rank in range(ranks):
            steps = draw(st.lists(st.sampled_from(["ack", "ack", "fail"]), max_size=2))
            lines.append([("register", (attempt, rank, info(rank)), {})])
            lines[-1] += [
                ("ack", (attempt, rank, 10 * attempt + step), {})
                if what == "ack"
                else ("fail_checkpoint", (attempt, rank, 10 * attempt + step, "full"), {})
                for step, what in enumerate(steps)
            ]
            lines[-1] += [("quarantine", ([bad(draw(st.integers(0, 3)))],), {})] if draw(st.booleans()) else []
            lines[-1] += [("publish", (attempt, "store", rank), {})] if draw(st.booleans()) else []
            lines[-1] += [("put_result", (attempt, {"rank": rank}), {})] if draw(st.booleans()) else []
            lines[-1] += [("rank_ended", (attempt, rank, draw(st.sampled_from([WELL, KILLED]))), {})] if draw(st.booleans()) else []
        driver: list[Message] = [
            ("request_pause", (attempt, "room"), {}),
            ("request_stop", ("SIGTERM",), {}),
            ("ask_stacks", (attempt,), {}),
            ("kill_attempt", (attempt,), {}),
            ("event", ("attempt_failed",), {"attempt": attempt, "kind": "hang", "call_id": f"id-{attempt}"}),
        ]
        lines.append([each for each in driver if draw(st.booleans())])
        told.append(("start_attempt", (attempt, ranks, 0, attempt, PAYLOAD), {}))
        while any(lines):
            told.append(draw(st.sampled_from([line for line in lines if line])).pop(0))
    return told


def tell(world: World, messages: list[Message], again: dict[int, list[int]]) -> None:
    """Send the messages; `again`: after which of them which earlier ones come once more, as late as that."""
    receipts: dict[tuple[Any, ...], Any] = {}
    for number, (method, arguments, named) in enumerate(messages):
        if method == "ack":
            receipts[arguments] = [world.stage(*arguments)]
        if method == "start_attempt":
            world.until("drain", 0.1)
        for which in (number, *(each for each in again.get(number, ()) if each < number)):
            method, arguments, named = messages[which]
            if method != "start_attempt":
                world.call(method, *arguments, *([receipts[arguments]] if method == "ack" else []), **named)
            elif which == number or all(other != "start_attempt" for other, _, _ in messages[which + 1 : number + 1]):
                world.call(method, *arguments)
        world.until("drain", 0.1)
    world.end()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=attempts(),
    dies_at=st.lists(st.integers(1, 30), max_size=5),
    again=st.dictionaries(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=4), max_size=8),
)
def test_whatever_is_told_in_whatever_order_deaths_and_repetitions_change_nothing(
    make: Callable[..., World], messages: list[Message], dies_at: list[int], again: dict[int, list[int]]
) -> None:
    calm = make()
    tell(calm, messages, {})
    wild = make(dies_at=dies_at)
    tell(wild, messages, again)
    assert wild.seen() == calm.seen()


# Without the log, and without the storage


def bare(storage: Storage, log: Path | None, generation: int = 1, **how: Any) -> Coordinator:
    return Coordinator(storage, "run", generation, 2, log=log, **how)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, Path]:
    monkeypatch.setattr("cluster.coordinator.Discovery", Unlisted)
    storage = open_storage(tmp_path / "runs")
    Store.open(storage, "run").claim_generation()
    return storage, tmp_path / "log"


def named(storage: Storage, name: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(storage, "run") if event["event"] == name]


def half_a_run(coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 2, 0, 1, PAYLOAD)
    coordinator.register(1, 0, info(0))
    coordinator.quarantine([bad(1)])
    coordinator.request_pause(1, "there is room")
    coordinator.rank_ended(1, 1, WELL)


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_without_its_log_it_knows_what_the_folder_tells_and_says_so(local: tuple[Storage, Path], damage: str) -> None:
    storage, log = local
    dead = bare(storage, log)
    half_a_run(dead)
    dead.close()
    if damage == "gone":
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:6] + b"x" + log.read_bytes()[7:])
    heir = bare(storage, log)
    status = heir.status()
    assert (status.attempt, status.world_size, status.quarantined, status.is_orphan) == (1, 2, 1, True)
    assert heir.beat(Beat(attempt=1, rank=0, steps_done=4, steps_begun=5)).again_seconds is not None  # a pause is being agreed on
    assert status.ended_ranks == frozenset()  # this is lost
    (said,) = named(storage, LOG_LOST)
    assert said["message"].startswith("rebuilt from the run's folder")
    heir.start_attempt(1, 2, 0, 1, PAYLOAD)  # the driver's call, delivered again
    assert not heir.status().is_orphan
    heir.close()
    third = bare(storage, log)  # and the heir has a log again
    assert len(named(storage, LOG_LOST)) == 1
    third.close()


def test_without_its_log_it_believes_the_highest_attempt_whatever_the_clock_says(local: tuple[Storage, Path]) -> None:
    storage, _ = local
    times = iter(range(1000, 0, -1))  # an hour that is put back all the time
    dead = bare(storage, None, now=lambda: float(next(times)))
    for attempt in (1, 2, 3):
        dead.start_attempt(attempt, 1 + attempt, 0)
        dead.event("attempt_failed", attempt=attempt, kind="hang", message="x")
    dead.start_attempt(4, 5, 0)
    dead.register(4, 0, info(0))
    dead.close()
    heir = bare(storage, None)
    status = heir.status()
    assert (status.attempt, status.world_size) == (4, 5)
    assert set(status.ranks) == {0}
    heir.close()


@pytest.mark.parametrize("known", [0, 1])
def test_an_attempt_that_neither_log_nor_journal_holds_is_told_by_the_driver(local: tuple[Storage, Path], known: int) -> None:
    """It had answered start_attempt of the attempt after `known`, without a log, in an outage."""
    storage, _ = local
    if known:
        dead = bare(storage, None)
        dead.start_attempt(known, 2, 0, 1, PAYLOAD)
        dead.rank_ended(known, 0, KILLED)
        dead.rank_ended(known, 1, KILLED)
        dead.close()
    heir, ours = bare(storage, None), known + 1
    assert heir.status().attempt == known
    for _ in range(2):  # Ray repeats a call
        heir.adopt(ours, 3, 7, 2, PAYLOAD)
        status = heir.status()
        assert (status.attempt, status.world_size, status.start_step, status.is_orphan) == (ours, 3, 7, False)
    heir.register(ours, 2, info(2))
    heir.rank_ended(ours, 1, WELL)
    heir.adopt(known, 2, 0, 1, PAYLOAD)  # of an attempt that is over
    status = heir.status()
    assert (status.attempt, set(status.ranks), status.ended_ranks) == (ours, {2}, frozenset({1}))
    assert heir.order(2, 0, REPORT).attempt == ours
    heir.close()
    assert [event["attempt"] for event in named(storage, "attempt_started")] == [*range(1, known + 1), ours]


class Away:
    """A storage that answers nothing, or refuses everything, as long as `error` is set; and `gone` for good to who has it by this URI."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.error: OSError | None = None
        self.gone, self.tried = "", 0
        for name in ("read", "exists", "list", "write_stream"):
            real = getattr(Storage, name)

            def tried(storage: Storage, *rest: Any, real: Any = real, **named: Any) -> Any:
                if self.error is not None:
                    self.tried += 1
                    raise self.error
                if storage.uri == self.gone:
                    raise StorageOutage("its process is dead")
                return real(storage, *rest, **named)

            patch.setattr(Storage, name, tried)


def test_with_its_log_it_comes_back_while_the_storage_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, log = storage_of("objects", tmp_path), tmp_path / "log"
    monkeypatch.setattr("cluster.outbox.OPEN_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("cluster.committer.COMMIT_PAUSE_SECONDS", 0.01)
    store, away = Store.open(storage, "run"), Away(monkeypatch)
    store.claim_generation()
    dead = bare(replace(storage, uri="mock://dead"), log)
    half_a_run(dead)
    away.error = StorageOutage("nobody answers")
    dead.event("written_in_the_outage", call_id="a")
    for rank in range(2):
        dead.ack(1, rank, 4, [Receipt(name=f"r{rank}", size_bytes=1, sha256="0" * 64)])
    assert not dead.drain(0.05)
    dead._memory.close()  # nothing that it does from now on is in its log, nor in the storage
    away.gone = "mock://dead"
    dead.close()
    assert dead.drain(10.0)
    heir = bare(storage, log)
    status = heir.status()
    assert (status.attempt, status.quarantined, status.ended_ranks) == (1, 1, frozenset({1}))
    heir.adopt(1, 2, 0, 1, PAYLOAD)
    heir.event("written_by_the_heir", call_id="b")
    assert not heir.wait_committed(4, 0.05)
    assert "nobody answers" in heir.status().checkpoints.waiting
    away.error = None
    heir.finish(10.0)
    names = [event["event"] for event in read_journal(storage, "run")]
    for name in ("attempt_started", "written_in_the_outage", "written_by_the_heir", "pause_requested"):
        assert names.count(name) == 1, name
    # Nothing is there to be committed here; that the storage says so, and not the outage, is the point.
    (failed,) = named(storage, "checkpoint_failed")
    assert "r0" in failed["message"]


def test_without_its_log_it_waits_for_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of("objects", tmp_path)
    Store.open(storage, "run").claim_generation()
    away, slept = Away(monkeypatch), []
    away.error = StorageOutage("nobody answers")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            away.error = None

    bare(storage, tmp_path / "log", sleep=sleep).close()
    assert len(slept) == 5
    away.error = StorageRefused("no such bucket")
    with pytest.raises(StorageRefused):  # waiting would not help, and the user is there
        bare(storage, tmp_path / "other", sleep=sleep)


def test_a_commit_that_the_storage_refuses_waits_for_new_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of("objects", tmp_path)
    monkeypatch.setattr("cluster.committer.COMMIT_PAUSE_SECONDS", 0.01)
    store, away = Store.open(storage, "run"), Away(monkeypatch)
    generation = store.claim_generation()
    coordinator = bare(storage, None)
    coordinator.start_attempt(1, 1, 0)
    receipt = store.stage(4, generation, "r", b"x", attempt=1)
    away.error = StorageRefused("the token has expired")
    coordinator.ack(1, 0, 4, [receipt])
    while away.tried < 10:
        assert not coordinator.wait_committed(4, 0.02)
    assert coordinator.status().checkpoints.waiting == "the token has expired"
    assert coordinator.status().checkpoints.failures == 0
    away.error = None
    assert coordinator.wait_committed(4, 10.0)
    assert coordinator.status().checkpoints.waiting == ""
    coordinator.finish(5.0)
    assert [each["message"] for each in named(storage, "storage_outage")] == ["the token has expired"]
    assert len(named(storage, "storage_recovered")) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["rename", "open", "fsync"])
def test_a_mount_that_fails_once_in_a_commit_costs_no_checkpoint(
    local: tuple[Storage, Path], monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    storage, _ = local
    monkeypatch.setattr("cluster.committer.COMMIT_PAUSE_SECONDS", 0.001)
    store = Store.open(storage, "run")
    for failing in range(1, 8):
        coordinator = bare(storage, None)
        coordinator.start_attempt(failing, 1, 0)
        receipt = store.stage(failing, 1, "r", b"x", attempt=failing)
        calls, real = itertools.count(1), getattr(os, name)

        def fails_once(path: Any, *rest: Any, calls: Any = calls, real: Any = real, failing: int = failing, **named: Any) -> Any:
            if threading.current_thread().name == "committer" and next(calls) == failing:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails_once)
            coordinator.ack(failing, 0, failing, [receipt])
            assert coordinator.wait_committed(failing, 20.0), (name, failing)
        assert coordinator.finish(10.0)
        commit = store.newest_valid(print)
        assert commit is not None
        assert commit.step == failing
        assert coordinator.status().checkpoints.failures == 0


def test_it_gives_up_when_it_dies_again_at_once_and_not_when_it_dies_once_a_day(local: tuple[Storage, Path]) -> None:
    storage, log = local
    clock = [1000.0]

    def live(seconds: float) -> None:
        """A life that ends after so many seconds."""
        coordinator = bare(storage, log, now=lambda: clock[0])
        if coordinator.status().attempt == 0:
            coordinator.start_attempt(1, 1, 0)
        coordinator.close()
        clock[0] += seconds

    for _ in range(3 * MOST_RESTARTS):
        live(86_400.0)
    for _ in range(MOST_RESTARTS):
        live(1.0)
    with pytest.raises(CoordinatorKeepsDying, match=f"again {MOST_RESTARTS + 1} times within 10 minutes"):
        live(1.0)


def test_a_port_that_somebody_else_took_meanwhile_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.targets.Discovery.__init__.__kwdefaults__", {**Discovery.__init__.__kwdefaults__, "wait_seconds": 0.0})
    storage, log = open_storage(tmp_path / "runs"), tmp_path / "log"
    Store.open(storage, "run").claim_generation()
    dead = bare(storage, log)
    dead.start_attempt(1, 1, 0)
    port = int(dead.discovery_address().rpartition(":")[2])
    dead._memory.close()
    heir = bare(storage, log, discovery_port=port)  # which is still taken
    assert heir.discovery_address() != dead.discovery_address()
    (said,) = named(storage, "discovery_moved")
    assert said["address"] == heir.discovery_address()
    assert f"127.0.0.1:{port}" in said["message"]
    for each in (dead, heir):
        each.close()


# Bad samples


@pytest.mark.parametrize("kind", ["local", "objects"])
def test_ten_thousand_bad_samples_cost_a_few_times_their_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, written = storage_of(kind, tmp_path), [0, 0]
    Store.open(storage, "run").claim_generation()
    coordinator = bare(storage, tmp_path / "log", clock=lambda: 0.0)

    def counted(real: Any) -> Any:
        def write(path: Any, data: Any, *rest: Any) -> Any:
            if QUARANTINE in str(path) or QUARANTINE in str(data):
                written[0] += 1
                written[1] += max(len(each) for each in (path, data, *rest) if isinstance(each, bytes))
            return real(path, data, *rest)

        return write

    monkeypatch.setattr(Storage, "write_atomic", counted(Storage.write_atomic))
    monkeypatch.setattr("cluster.quarantined.append_local", counted(append_local))
    coordinator._outbox.write = lambda: None  # type: ignore[method-assign]  # the journal is not in question
    count = 10_000
    assert [coordinator.quarantine([bad(number)]) for number in range(count)] == list(range(1, count + 1))
    assert coordinator.quarantine([bad(0)]) == count
    coordinator.drain(0.0)
    content = storage.read(f"run/{QUARANTINE}")
    assert [json.loads(line) for line in content.splitlines()] == [bad(number) for number in range(count)]
    writes, size = written
    assert size <= (1.01 if kind == "local" else 3.0) * len(content)
    assert writes <= (count if kind == "local" else 16)
    assert (tmp_path / "log").stat().st_size < 8_000_000
    coordinator.close()


def test_an_heir_completes_the_list_of_bad_samples(local: tuple[Storage, Path]) -> None:
    storage, log = local
    dead = bare(storage, log)
    dead.start_attempt(1, 1, 0)
    dead.quarantine([bad(1)])
    dead.quarantine([bad(2)])
    dead.close()
    path = Path(storage.at(f"run/{QUARANTINE}"))
    path.write_bytes(path.read_bytes()[:-20])  # it died in the middle of the line
    heir = bare(storage, log)
    assert heir.quarantine([bad(2)]) == 2
    heir.drain(1.0)
    assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [1, 2]
    heir.close()
