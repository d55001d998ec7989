"""The real Drive and Session, a real coordinator and real journals through every failure of the storage, and of the way to the coordinator.
Ray and the ranks are played."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from pyarrow import fs as pafs
from rich.console import Console

from benchmarks.faults.storage import Group
from cluster import journal as journal_module
from cluster import patience as patience_module
from cluster.agent import Payload, RankEnd
from cluster.controller import RunFailed
from cluster.coordinator import Coordinator
from cluster.failures import Failure
from cluster.heartbeat import CoordinatorLost
from cluster.journal import Journal, JournalReader, read_journal
from cluster.launch import Resources
from cluster.overseer import Overseer
from cluster.roster import RankInfo
from cluster.storage import RetryPolicy, Storage, open_storage
from cluster.store import Store
from tests.s3 import Server, serving
from trainer.drive import account as account_module
from trainer.drive import attempt as attempt_module
from trainer.drive import drive as drive_module
from trainer.drive import session as session_module
from trainer.drive.account import Account
from trainer.drive.attempt import Attempt, Outcome, payload_of
from trainer.drive.drive import Drive
from trainer.drive.record import Identity
from trainer.drive.screen import Position
from trainer.drive.session import Session, patience_of
from trainer.drive.signals import Phase, Signals
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION

AWAY = "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Could not connect to server"
EXPIRED = "AWS Error INVALID_CLIENT_TOKEN_ID (HTTP status 403) during GetObject operation: ExpiredToken"


class Faults:
    """A pyarrow file system whose calls fail as told: `fails(number of the call)` gives the error's text, or ""."""

    def __init__(self, fs: Any, fails: Callable[[int], str]) -> None:
        self._fs, self.fails, self._counter, self.calls = fs, fails, itertools.count(), 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(self._counter)
            self.calls = number + 1
            if text := self.fails(number):
                raise OSError(text)
            return found(*args, **kwargs)

        return call


class Reference:
    """Ray's reference to the answer of a call, which is made when that is asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def __call__(self) -> Any:
        return self._call()

    def future(self) -> Any:
        return SimpleNamespace(add_done_callback=lambda tell: tell(None))


class Handle:
    """Ray's handle of a coordinator that lives in this process."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._coordinator, name, lambda *_: None)  # the actor also keeps the ranks' results: none here

        def remote(*args: Any, **kwargs: Any) -> Reference:
            if name in ("waiting_for_storage", "account"):  # nobody asks for their answers
                method(*args, **kwargs)
            return Reference(lambda: method(*args, **kwargs))

        return SimpleNamespace(remote=remote)


class Play:
    """A run of two attempts: the first commits step 1 and dies, the second goes on from there to the end. `stop_at` kills the driver's
    patience: the number of the storage's call at which a signal comes."""

    def __init__(self, fails: Callable[[int], str]) -> None:
        healthy = pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem())
        self.healthy = Storage(fs=healthy, root="runs", is_local=False, uri="mock://bucket/runs")
        self.faults = Faults(healthy, fails)
        self.storage = Storage(fs=self.faults, root="runs", is_local=False, uri="mock://bucket/runs", retry=RetryPolicy(seconds=0.0))
        self.console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        self.group = Group(self.healthy, ranks=1)
        self.starts: list[int] = []
        self.ended: list[str] = []
        self.failed: RunFailed | None = None

    def session(self, **changes: Any) -> Session:
        journal = Journal.open(self.storage, "run", "driver-1-1")
        coordinator: Any = Handle(self.group._coordinator)
        decided: Any = SimpleNamespace(
            config=RunConfig(run="run"),
            storage=self.storage,
            resources=Resources(workers=1, fewest=1, most=1, cpus_per_worker=1, gpus_per_worker=0, threads_per_worker=1),
            hardware=SimpleNamespace(local=True),
            fingerprint="f",
            task=CLASSIFICATION,
            identity=Identity(settings={}, weights="", dataset="f", decoder={}, device="cpu", threads=1, versions={}),
        )
        given: dict[str, Any] = {
            "decided": decided,
            "data": "data",
            "steps_per_epoch": 10,
            "total_steps": 10,
            "store": Store.open(self.storage, "run"),
            "journal": journal,
            "reader": JournalReader(self.storage, "run"),
            "patience": patience_of(self.console, journal, coordinator.waiting_for_storage.remote),
            "generation": 1,
            "coordinator": coordinator,
            "overseer": Overseer(lambda: None, lambda: pytest.fail("it was asked")),
            "zygote": "",
            "console": self.console,
        }
        return Session(**{**given, **changes})

    def attempt(self, session: Session, *, position: Position, **_: Any) -> Any:
        """In place of an Attempt."""

        def run() -> Outcome:
            self.starts.append(position.start_step)
            session.newest_events()
            session.tell("attempt_started", attempt=position.attempt, workers=1, start_step=position.start_step, generation=1)
            if len(self.starts) == 1:
                assert self.group.settle(self.group.save())
                return Outcome(failure=Failure(kind="infrastructure", rank=0, message="killed"))
            return Outcome(result={"stopped": False})

        return SimpleNamespace(run=run)

    def ending(self, *, signals: Signals, **known: Any) -> Any:
        """In place of an Ending, which has tests of its own."""
        assert signals.phase is Phase.ENDING, "a signal from now on interrupts nothing that is being written down"

        def end(how: str, status: int) -> Callable[..., int]:
            def ended(error: RunFailed | None = None) -> int:
                self.ended.append(how)
                self.failed = error
                return status

            return ended

        return SimpleNamespace(
            **{how: end(how, status) for how, status in (("finished", 0), ("stopped", 130), ("failed", 1), ("taken_over", 1))}
        )

    def go(self, monkeypatch: pytest.MonkeyPatch, session: Session | None = None) -> int:
        fleets = SimpleNamespace(present=SimpleNamespace(workers=1), workers=1, start=lambda *_, **__: None, end=lambda: None)
        monkeypatch.setattr(drive_module, "Fleets", lambda *_: fleets)
        monkeypatch.setattr(drive_module, "Attempt", self.attempt)
        monkeypatch.setattr(drive_module, "Ending", self.ending)
        session = session or self.session()
        with self.group:
            signals = Signals()
            with signals.heard():
                status = Drive(session, None, signals).go()
        self.mend(session)
        return status

    def mend(self, session: Session) -> None:
        """From now on nothing fails. Else the journal's thread would try for ever."""
        self.faults.fails = lambda number: ""
        assert session.journal.flush(20)

    def told(self) -> str:
        return self.console.export_text(clear=False)


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray in this process, pauses of milliseconds, and a checkpoint that any data set may go on from."""
    monkeypatch.setattr(ray, "get", lambda reference, timeout=None: reference())
    monkeypatch.setattr(session_module, "find_start", lambda config, store, *_: store.newest_valid(lambda path, reason: None))
    for module in (patience_module, journal_module):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.002)
        monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.01)


def test_each_call_to_the_storage_may_fail_once_and_the_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = Play(lambda number: "")
    assert clean.go(monkeypatch) == 0
    assert clean.starts == [0, 1]
    assert clean.faults.calls > 10
    for failing in range(clean.faults.calls):
        play = Play(lambda number, failing=failing: AWAY if number == failing else "")  # type: ignore[misc]
        assert play.go(monkeypatch) == 0, failing
        assert (play.starts, play.ended) == ([0, 1], ["finished"]), failing


def test_an_outage_that_begins_at_any_call_is_waited_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = Play(lambda number: "")
    assert clean.go(monkeypatch) == 0
    for first in range(0, clean.faults.calls, 2):
        play = Play(lambda number, first=first: AWAY if first <= number < first + 25 else "")  # type: ignore[misc]
        session = play.session()
        assert play.go(monkeypatch, session) == 0, first
        assert (play.starts, play.ended) == ([0, 1], ["finished"]), first
        assert session.journal.flush(20)
        session.events()  # as the real Ending asks
        assert session.patience.seconds_away == 0, first
        assert session.journal.flush(20)
        events = read_journal(play.healthy, "run")
        outages = [event for event in events if event["event"] in ("storage_outage", "storage_recovered") and "step" not in event]
        assert [event["event"] for event in outages] in ([], ["storage_outage", "storage_recovered"]), first
        assert ("the storage does not answer" in play.told()) == bool(outages), first
        assert ("the storage answers again, after" in play.told()) == bool(outages), first
        started = [event["attempt"] for event in events if event["event"] == "attempt_started"]
        assert started == [1, 2, 3], first  # the first is the group's own


@pytest.mark.parametrize("first", [0, 6, 12])
def test_a_signal_in_an_outage_without_end_stops_the_run(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> str:
        if number == first + 4:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return AWAY if number >= first else ""

    play = Play(fails)
    began = time.monotonic()
    assert play.go(monkeypatch) == 130
    assert play.ended == ["stopped"]
    assert time.monotonic() - began < 60


def test_a_storage_that_refuses_what_the_driver_cannot_do_without_ends_the_run_with_what_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(lambda number: EXPIRED)
    assert play.go(monkeypatch) == 1
    assert play.ended == ["failed"]
    assert "the credentials are not valid (any more)" in str(play.failed)
    assert "the same command goes on" in str(play.failed)


def test_expired_credentials_end_nothing_that_can_do_without() -> None:
    play = Play(lambda number: EXPIRED if number > 1 else "")
    with play.group:
        session = play.session()
        assert session.newest_events() == session.reader.known
        assert not session.seems_taken_over()
        assert not session.is_taken_over()
        assert session.newest_events() == []
        play.mend(session)
    assert play.told().count("credentials are not valid") == 2  # once for the journal, once for the claims


@pytest.mark.parametrize("error", [EXPIRED, AWAY], ids=["refused", "away"])
def test_the_end_of_a_run_has_what_is_known_where_the_storage_does_not_say(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(lambda number: "")
    session = play.session()
    with play.group:
        assert session.saved_step() == -1
        assert play.group.settle(play.group.save())
        assert session.saved_step() == 1
        known = session.last_events()
        assert "checkpoint_committed" in [event["event"] for event in known]
        assert play.group.settle(play.group.save())
        play.faults.fails = lambda number: error
        with session.patience.watched(show=lambda waiting: None, is_stopping=lambda: error == AWAY):
            assert session.last_events() == known
            assert session.saved_step() == 2  # the coordinator knows
            monkeypatch.setattr(ray, "get", Wire(*[ray.exceptions.ActorDiedError()] * 2))
            assert session.saved_step() == 1  # the journal, as far as it was read
        play.mend(session)


def test_the_driver_goes_on_when_a_real_service_is_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(patience_module, "LONGEST_PAUSE_SECONDS", 0.2)
    with serving(Server()) as server:
        server.client().create_bucket(Bucket="driver")
        storage = open_storage(server.uri("driver/runs"), retry_seconds=0.2)
        play = Play(lambda number: "")
        play.storage = play.healthy = storage
        play.group.__exit__()
        play.group = Group(storage, ranks=1)
        session, attempt = play.session(), play.attempt

        def start_again() -> None:
            while session.patience.seconds_away == 0:
                time.sleep(0.01)
            server.start()

        back = threading.Thread(target=start_again, daemon=True)  # once the driver has met the outage, however busy the machine is

        def attempt_and_outage(*args: Any, **known: Any) -> Any:
            ended = attempt(*args, **known).run()
            if ended.failure is not None:  # nothing answers from the death of the ranks on
                server.stop()
                back.start()
            return SimpleNamespace(run=lambda: ended)

        monkeypatch.setattr(play, "attempt", attempt_and_outage)
        assert play.go(monkeypatch, session) == 0
        back.join()
        assert play.starts == [0, 1]
        assert session.journal.flush(20)
        events = {event["event"]: event for event in read_journal(storage, "run")}
        told = [events[name]["time"] for name in ("attempt_failed", "storage_outage", "storage_recovered", "resumed")]
        assert told == sorted(told)  # the wait is after the failure, where it does not count as training


def test_a_storage_that_is_silent_holds_up_no_look_at_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's loop goes on: it sees the ranks, and their end. Nobody is told to have taken the run over."""
    monkeypatch.setattr(attempt_module, "TAKEN_OVER_POLL_SECONDS", 0.0)
    monkeypatch.setattr(account_module, "REMOTE_ACCOUNT_SECONDS", 0.0)
    monkeypatch.setattr(attempt_module, "poll_seconds", lambda *_: 0.001)
    monkeypatch.setattr(attempt_module, "living_nodes", set)
    answers, asked = threading.Event(), threading.Semaphore(0)

    def silent(number: int) -> str:
        asked.release()
        assert answers.wait(60)
        return ""

    play = Play(lambda number: "")
    with play.group:
        session, coordinator = play.session(), play.group._coordinator
        looks = 0

        def show(*_: Any, **__: Any) -> None:
            nonlocal looks
            looks += 1
            if looks == 1:
                coordinator.register(2, 0, RankInfo(host="here", pid=1, node_id="node", metrics_address=""))
                play.faults.fails = silent
            if looks == 300:
                coordinator.rank_ended(2, 0, RankEnd(status=0, error=None, killed_by_order=False))

        fleet: Any = SimpleNamespace(workers=1, number=1, wait=lambda seconds: False)
        parts: Any = {
            "fleets": SimpleNamespace(seen=lambda status: None),
            "room": SimpleNamespace(reason_to_pause=lambda *_, **__: None),
            "signals": Signals(),
            "screen": SimpleNamespace(show=show, message=lambda text: None),
            "account": Account(session),
        }
        began = time.monotonic()
        outcome = Attempt(session, position=Position(attempt=2), fleet=fleet, **parts).run()
        assert time.monotonic() - began < 60
        assert looks == 300
        assert asked.acquire(timeout=30)
        assert asked.acquire(timeout=30)  # both questions were put: who drives the run, and what the account is made of
        assert outcome == Outcome(result=None)
        answers.set()
        play.mend(session)


@pytest.mark.parametrize("believes", [0, 1])
def test_a_coordinator_that_lost_the_attempt_is_told_of_it_and_not_taken_at_its_word(
    believes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was started again without its log and could not tell the journal of attempt 2: it knows attempt 1, all of whose ranks have ended,
    or none. On the old code the driver took that for the end of attempt 2, or went round for ever."""
    monkeypatch.setattr(attempt_module, "poll_seconds", lambda *_: 0.001)
    monkeypatch.setattr(attempt_module, "living_nodes", set)
    play = Play(lambda number: "")
    with play.group:
        session = play.session()
        handle: Any = session.coordinator
        lost = Coordinator(play.healthy, "other", 1, 2, log=None)  # which finds nothing in its journal
        if believes:
            lost.start_attempt(believes, 1, 0, 1, Payload(target="m:f", spec=b""))
            lost.rank_ended(believes, 0, RankEnd(status=-9, error=None, killed_by_order=False))
        shown = []

        def show(status: Any, *_: Any, **__: Any) -> None:
            shown.append(status.attempt)
            if len(shown) == 1:
                handle._coordinator = lost
            if len(shown) == 3:
                lost.rank_ended(2, 0, RankEnd(status=0, error=None, killed_by_order=False))

        parts: Any = {
            "fleets": SimpleNamespace(seen=lambda status: None),
            "room": SimpleNamespace(reason_to_pause=lambda *_, **__: None),
            "signals": Signals(),
            "screen": SimpleNamespace(show=show, message=lambda text: None),
            "account": Account(session),
        }
        fleet: Any = SimpleNamespace(workers=1, number=1, wait=lambda seconds: False)
        outcome = Attempt(session, position=Position(attempt=2), fleet=fleet, **parts).run()
        assert (shown, outcome) == ([2, 2, 2], Outcome(result=None))
        lost.finish(20)
        assert [event["attempt"] for event in read_journal(play.healthy, "other") if event["event"] == "coordinator_restarted"] == [2]
        play.mend(session)


def test_a_look_into_a_long_journal_costs_the_driver_no_more_than_into_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(lambda number: "")
    with play.group:
        session = play.session()

        def requests(events: int) -> int:
            for number in range(events):
                session.journal.write("tick", number=number)
            session.events()
            before = play.faults.calls
            for ask in (session.newest_events, session.events, session.last_events):
                assert ask()[-1]["event"] == "tick"
            Account(session)._tell({})
            payload_of(session, Position(attempt=1))
            return play.faults.calls - before

        few, many = requests(10), requests(400)
        assert many <= few + 2
        assert few < 12
        play.mend(session)


# The way to the coordinator


class Wire:
    """Ray's answers to one call after the other: an exception is raised, anything else returned."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.calls = list(answers), 0

    def __call__(self, reference: Any, timeout: float | None = None) -> Any:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else "done"
        if isinstance(answer, Exception):
            raise answer
        return answer


def unavailable() -> Exception:
    return ray.exceptions.ActorUnavailableError("the actor is restarting", None)


def raised(cause: Exception) -> Exception:
    """As Ray brings it from the coordinator's process."""
    return ray.exceptions.RayTaskError("start_attempt", "Traceback ...", cause).as_instanceof_cause()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(session_module, "POLL_SECONDS", 0.001)
    play = Play(lambda number: "")
    with play.group:
        yield play.session()


def test_a_coordinator_that_is_being_restarted_is_asked_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(unavailable(), ray.exceptions.GetTimeoutError("slow"), unavailable(), "there")
    monkeypatch.setattr(ray, "get", wire)
    assert session.ask("status") == "there"
    assert wire.calls == 4


def test_a_coordinator_that_never_comes_back_is_given_up_in_a_sentence(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", Wire(ray.exceptions.ActorDiedError()))
    with pytest.raises(CoordinatorLost, match="the run's coordinator is gone"):
        session.ask("status")
    monkeypatch.setattr(session_module, "COORDINATOR_SECONDS", 0.05)
    monkeypatch.setattr(ray, "get", Wire(*[ray.exceptions.GetTimeoutError("slow")] * 10**5))
    with pytest.raises(CoordinatorLost, match="does not answer: no answer for"):
        session.ask("status")


def test_a_coordinator_that_waits_for_the_storage_is_waited_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "COORDINATOR_SECONDS", 0.0)
    faults: Any = session.storage.fs
    faults.fails = lambda number: AWAY if number % 2 or number < 40 else ""
    wire = Wire(*[ray.exceptions.GetTimeoutError("slow")] * 10)
    monkeypatch.setattr(ray, "get", wire)
    assert session.ask("status") == "done"
    faults.fails = lambda number: ""


def test_what_the_coordinator_raises_is_raised_here_in_its_own_words(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for cause in (OSError(5, "Input/output error"), ValueError("attempt=1 is not above the attempt before")):
        monkeypatch.setattr(ray, "get", Wire(raised(cause)))
        with pytest.raises(type(cause)) as failure:
            session.ask("start_attempt")
        assert type(failure.value) is type(cause)
        assert str(failure.value) == str(cause)
    monkeypatch.setattr(ray, "get", Wire(raised(OSError(5, "Input/output error")), "begun"))
    assert session.patiently("the list of checkpoints", lambda: session.ask("start_attempt")) == "begun"


def test_an_event_is_told_by_the_driver_where_the_coordinator_is_gone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, is_written in ((ray.exceptions.ActorDiedError(), True), (ray.exceptions.GetTimeoutError("slow"), False)):
        monkeypatch.setattr(ray, "get", Wire(error))
        session.tell("hang", attempt=1, written=is_written)
    assert [event["written"] for event in session.events() if event["event"] == "hang"] == [True]
    monkeypatch.setattr(ray, "get", Wire(unavailable()))
    session.order("end_fleet", 1)
    for key in ("a", "b", "a"):
        session.journal.write("sample_quarantined", split="train", key=key, reason="broken")
    session.events()
    monkeypatch.setattr(ray, "get", Wire(ray.exceptions.ActorDiedError()))
    assert session.quarantined() == 2, "what the journal knows, each sample once"
