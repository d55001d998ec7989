"""Claims about an agent and its ranks, with real processes and a coordinator of lists: what is asked is answered, what ends is told why."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.agent import Agent, AgentOrder, AgentReport, Beats, Payload, RankEnd, poll_seconds, process_state
from cluster.beat import CALLS_PER_SECOND, Beat, BeatReply
from cluster.coordinator import Coordinator
from cluster.failures import Kind, RankError
from cluster.journal import read_journal
from cluster.launch import failure_of_ranks
from cluster.process import process_stat
from cluster.rank import CallFailed, Placement, interface_of
from cluster.roster import RankInfo
from cluster.storage import open_storage
from cluster.zygote import ZYGOTE_LOST

PLACE = Placement(host="here", address="127.0.0.1", node_id="node", local_rank=0, local_world_size=1, device_index=None)


def beat(steps_done: int, **fields: Any) -> Beat:
    return Beat(attempt=1, rank=0, steps_done=steps_done, steps_begun=steps_done + 1, phase="step", **fields)


class Fleet:
    """Agents in threads, on a real coordinator."""

    def __init__(self, folder: Path, workers: int = 1, *, heartbeat_seconds: float = 1.0) -> None:
        self.coordinator = Coordinator(str(folder), "run", 1, 2)
        self.reports: list[tuple[Any, ...]] = []
        self.here: list[int] = []
        self.asked: list[str] = []
        self.agents = [
            Agent(
                self._ask,
                fleet=1,
                rank=rank,
                place=PLACE,
                modules=[],
                fetch=lambda reference: reference,
                heartbeat_seconds=heartbeat_seconds,
            )
            for rank in range(workers)
        ]
        self.threads = [threading.Thread(target=agent.run) for agent in self.agents]
        for thread in self.threads:
            thread.start()

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        self.asked.append(method)
        match method:
            case "report":
                self.reports.append(arguments)
            case "here":
                self.here.append(arguments[0])
            case "add":
                return sum(arguments)
            case "refuse":
                raise {"os": OSError(28, "No space left"), "key": KeyError("x"), "value": ValueError("seven")}[arguments[0]]
            case _:
                return getattr(self.coordinator, method)(*arguments, **named)
        return None

    def start(self, attempt: int, function: str, spec: Any = None, **files: bytes) -> None:
        payload = Payload(target=f"tests.cluster.ranks:{function}", spec=pickle.dumps(spec), files=files)
        self.coordinator.start_attempt(attempt, len(self.agents), 0, 1, payload)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "not in time"
            time.sleep(0.01)

    def ends(self, attempt: int) -> dict[int, RankEnd]:
        """How the ranks ended, once all have."""
        self.until(lambda: len(self.coordinator.ends(attempt)) == len(self.agents))
        return self.coordinator.ends(attempt)

    def close(self) -> None:
        self.coordinator.end_fleet(1)
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        self.coordinator.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Fleet]:
    """One whose agent asks every half minute."""
    fleet = Fleet(tmp_path, heartbeat_seconds=30.0)
    yield fleet
    fleet.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, workers=2)
    yield fleet
    fleet.close()


def test_a_rank_gets_its_task_its_files_and_answers(fleet: Fleet):
    big = bytes(range(256)) * 4096
    fleet.start(3, "echo", [("add", 1, 2), ("add", "")][:1], a=b"first", b=big)
    assert fleet.ends(3) == {0: RankEnd(status=0, error=None, killed_by_order=False)}
    assert fleet.reports == [(0, 1, 3, PLACE, [3], {"a": b"first", "b": big})]
    fleet.start(4, "echo", [], a=b"first", b=big)  # the files are there already
    fleet.ends(4)
    assert fleet.reports[1][-1] == {"a": b"first", "b": big}


def test_beats_travel_with_the_question_for_orders_and_an_urgent_one_does_not_wait(slow: Fleet):
    fleet = slow
    first = beat(7, stats={"loss": 0.5}, ticks=3, urgent=True)
    fleet.start(1, "beat", [first, beat(8, promised_stop=9, ticks=2), beat(9, ticks=3, urgent=True)])
    began = time.monotonic()
    assert fleet.ends(1)[0].status == 0
    assert time.monotonic() - began < 20
    # Nobody asked this coordinator for a stop, but a rank that has promised one was asked by the coordinator before.
    agreed = BeatReply(stop_at=9, confirmed=True)
    assert fleet.reports == [((BeatReply(stop_at=None, confirmed=False), agreed, agreed),)]
    status = fleet.coordinator.status().ranks[0]
    assert (status.steps_done, status.stats, status.ticks) == (9, {"loss": 0.5}, 3)
    assert not any(method == "beat" for method in fleet.asked)  # no call of their own


@given(st.integers(0, 5000), st.floats(0.01, 2.0))
def test_agents_ask_once_a_heartbeat_and_all_of_them_together_not_too_often(world_size: int, heartbeat_seconds: float):
    seconds = poll_seconds(world_size, heartbeat_seconds)
    assert seconds >= heartbeat_seconds
    assert world_size / seconds <= CALLS_PER_SECOND + 1e-9
    assert seconds == heartbeat_seconds or world_size > CALLS_PER_SECOND * heartbeat_seconds


def test_a_rank_that_ends_with_a_beat_on_its_way_holds_up_nobody(slow: Fleet):
    fleet = slow
    fleet.start(1, "die_in_a_beat", beat(7))
    began = time.monotonic()
    assert fleet.ends(1)[0].status == -signal.SIGKILL
    assert time.monotonic() - began < 4  # end() gives what was said last five seconds


@settings(max_examples=20, deadline=None)
@given(urgent=st.lists(st.booleans(), min_size=1, max_size=6), close_after=st.integers(0, 6))
def test_every_beat_is_answered_or_refused(urgent: list[bool], close_after: int):
    beats, woken, told = Beats(lambda: woken.append(1)), [], []

    def give(is_urgent: bool) -> None:
        try:
            told.append(beats.give(beat(5, urgent=is_urgent)))
        except CallFailed as error:
            told.append(error)

    for number, is_urgent in enumerate(urgent):
        if number == close_after:
            beats.close()
        thread = threading.Thread(target=give, args=(is_urgent,))
        thread.start()
        while thread.is_alive() and (waiting := beats.take()) is None:
            time.sleep(0.001)
        if number < close_after:
            assert waiting is not None
            waiting.reply.set_result(BeatReply(stop_at=number, confirmed=False))
        thread.join(10)
        assert not thread.is_alive()
    answered = min(close_after, len(urgent))
    assert told[:answered] == [BeatReply(stop_at=number, confirmed=False) for number in range(answered)]
    assert all(isinstance(each, CallFailed) for each in told[answered:])
    assert len(told) == len(urgent)
    assert len(woken) == sum(urgent[:answered])


def test_an_exception_comes_back_with_its_class_message_and_traceback(fleet: Fleet):
    fleet.start(1, "raise_key_error")
    failure = failure_of_ranks(fleet.ends(1))
    assert failure is not None
    assert (failure.kind, failure.rank, failure.message) == ("user", 0, "KeyError: 'learning rate'")
    assert failure.traceback.startswith("Traceback (most recent call last):")
    assert "in look_up" in failure.traceback


@pytest.mark.parametrize(
    ("what", "name", "message"),
    [
        ("os", "OSError", "OSError: [Errno 28] No space left"),
        ("value", "ValueError", "ValueError: seven"),
        ("key", "CallFailed", "CallFailed: KeyError: 'x'"),
    ],
)
def test_what_the_coordinator_raises_is_raised_in_the_rank(fleet: Fleet, what: str, name: str, message: str):
    fleet.start(1, "raise_what_the_coordinator_raised", what)
    error = fleet.ends(1)[0].error
    assert error is not None
    assert (error.name, error.message) == (name, message)
    assert issubclass(CallFailed, RuntimeError)


def test_a_killed_rank_is_told_at_once_the_others_follow_and_the_next_attempt_begins_on_the_same_agents(pair: Fleet):
    pair.start(1, "hang_in_python")
    pair.until(lambda: len(pair.here) == 2)
    os.kill(pair.here[1], signal.SIGKILL)
    ends = pair.ends(1)
    assert sorted((end.status, end.killed_by_order) for end in ends.values()) == [(-9, False), (-9, True)]
    failure = failure_of_ranks(ends)
    assert failure is not None
    assert failure.kind == "infrastructure"
    assert not ends[failure.rank or 0].killed_by_order
    assert "SIGKILL" in failure.message
    pair.start(2, "join")
    assert {end.status for end in pair.ends(2).values()} == {0}
    assert sorted(pair.reports) == [(0, 3.0), (1, 3.0)]


@pytest.mark.parametrize("function", ["hang_in_python", "hang_in_c", "stop"])
def test_the_stacks_of_a_rank_that_hangs_are_told_before_it_is_killed(fleet: Fleet, tmp_path: Path, function: str):
    fleet.start(1, function)
    fleet.until(lambda: len(fleet.here) == 1)
    fleet.until(lambda: process_state(fleet.here[0])[0] == {"stop": "T", "hang_in_c": "R"}.get(function, "S"))
    fleet.coordinator.ask_stacks(1)
    fleet.until(lambda: fleet.coordinator.status().stacks == {0})
    assert fleet.coordinator.ends(1) == {}
    fleet.coordinator.kill_attempt(1)
    fleet.ends(1)
    (told,) = [event for event in read_journal(open_storage(tmp_path), "run") if event["event"] == "stacks"]
    assert told["rank"] == 0
    assert f"in {function}" in told["text"]
    assert "most recent call first" in told["text"]


def test_a_dead_zygote_costs_an_attempt_and_no_more(fleet: Fleet):
    fleet.start(1, "hang_in_python")
    fleet.until(lambda: len(fleet.here) == 1)
    stat = process_stat(fleet.here[0])
    assert stat is not None
    os.kill(stat.parent, signal.SIGKILL)
    assert fleet.ends(1)[0].status in (ZYGOTE_LOST, -signal.SIGKILL)
    fleet.start(2, "echo", [])
    assert fleet.ends(2)[0].status == 0


def test_an_agent_whose_fleet_is_over_ends_and_its_rank_with_it(tmp_path: Path):
    fleet = Fleet(tmp_path)
    fleet.start(1, "hang_in_python")
    fleet.until(lambda: len(fleet.here) == 1)
    fleet.close()
    fleet.until(lambda: process_state(fleet.here[0])[0] in ("", "Z"))


def test_a_later_fleet_ends_the_earlier_one(tmp_path: Path):
    fleet = Fleet(tmp_path)
    fleet.start(1, "hang_in_python")
    fleet.until(lambda: len(fleet.here) == 1)
    fleet.coordinator.start_attempt(2, 1, 0, 2, Payload(target="tests.cluster.ranks:echo", spec=pickle.dumps([])))
    for thread in fleet.threads:
        thread.join(20)
        assert not thread.is_alive()
    fleet.coordinator.close()


def test_orders_follow_the_attempts(tmp_path: Path):
    coordinator = Coordinator(str(tmp_path), "run", 1, 2)
    report = AgentReport(attempt=0, pid=0, state="", cpu_seconds=0.0, notice="", node_id="n", placement_group="")
    assert coordinator.order(1, 0, report) == AgentOrder(command="wait")
    payload = Payload(target="m:f", spec=b"")
    coordinator.start_attempt(1, 2, 0, 1, payload)
    assert coordinator.order(1, 0, report) == AgentOrder(command="run", attempt=1, world_size=2, payload=payload)
    begun = AgentReport(attempt=1, pid=5, state="R", cpu_seconds=0.0, notice="spot", node_id="n", placement_group="")
    assert coordinator.order(1, 0, begun) == AgentOrder(command="run", attempt=1, world_size=2)  # the payload travels once
    assert coordinator.status().notices == ("spot",)
    coordinator.register(1, 0, RankInfo(host="h", pid=5, node_id="n", metrics_address="127.0.0.1:1"))
    assert len(coordinator.targets()) == 2
    coordinator.rank_ended(1, 0, RankEnd(status=1, error=None, killed_by_order=False))
    assert len(coordinator.targets()) == 1  # a dead rank is no target any more
    assert coordinator.order(1, 1, report).command == "kill"
    assert coordinator.status().ended_ranks == {0}
    coordinator.rank_ended(7, 1, RankEnd(status=1, error=None, killed_by_order=False))  # of no attempt
    assert coordinator.status().ended_ranks == {0}
    coordinator.publish(1, "store", 5)
    assert (coordinator.lookup(1, "store"), coordinator.lookup(1, "other"), coordinator.lookup(2, "store")) == (5, None, None)
    coordinator.start_attempt(2, 1, 0, 2, payload)
    assert coordinator.order(1, 0, begun) == AgentOrder(command="end")
    assert coordinator.lookup(2, "store") is None
    coordinator.end_fleet(2)
    assert coordinator.order(2, 0, begun) == AgentOrder(command="end")
    coordinator.close()


def test_the_cause_is_the_rank_that_failed_by_itself():
    def end(status: int, message: str = "", by_order: bool = False) -> RankEnd:
        kind: Kind | None = "data" if message.startswith("TooManyBadSamples") else None
        name = message.partition(":")[0]
        error = RankError(name=name, bases=(), message=message, traceback="t", failure_kind=kind) if message else None
        return RankEnd(status=status, error=error, killed_by_order=by_order)

    echo = end(1, "RuntimeError: Connection closed by peer")
    assert failure_of_ranks({0: end(0), 1: end(0)}) is None
    for ends, kind, rank in [
        ({0: echo, 1: end(-9), 2: end(-9, by_order=True)}, "infrastructure", 1),
        ({0: echo, 1: end(1, "KeyError: 'x'")}, "user", 1),
        ({0: end(-9, by_order=True), 1: end(1, "TooManyBadSamples: 3")}, "data", 1),
        ({0: end(1), 1: echo}, "infrastructure", 0),
    ]:
        failure = failure_of_ranks(ends)
        assert failure is not None
        assert (failure.kind, failure.rank) == (kind, rank)


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
