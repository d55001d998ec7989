"""Claims about the coordinator's memory: a log that cannot be written is given up and said so, and it stays small."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import memory as module
from cluster import wal
from cluster.agent import AgentReport, RankEnd
from cluster.commits import STEPS_KEPT, Committed
from cluster.memory import LOG_LOST, LOG_PAUSE_SECONDS, Memory
from cluster.roster import Attempt, RankInfo
from cluster.state import ATTEMPTS_KEPT, CALLS_KEPT, State
from cluster.store import Receipt
from cluster.straggler import StragglerLimits

REPORT = AgentReport(attempt=0, pid=0, state="", cpu_seconds=0.0, notice="", node_id="n", placement_group="")
WELL = RankEnd(status=0, error=None, killed_by_order=False)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def begun(log: Path | None, clock: Clock | None = None) -> Memory:
    memory = Memory(log, clock=clock or Clock(), now=lambda: 5.0)
    memory.begin(State(1, StragglerLimits()))
    memory.do("begin", Attempt(number=1, world_size=2, start_step=0))
    return memory


def heir(log: Path) -> State | None:
    memory = Memory(log)
    was_there, _ = memory.take_up()
    return memory.state if was_there else None


def said(memory: Memory, event: str) -> list[str]:
    return [each.fields["message"] for each in memory.state.untold if each.event == event]


def test_a_disk_that_fills_up_costs_the_log_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, path = Clock(), tmp_path / "log"
    memory = begun(path, clock)
    memory.do("publish", 1, "a", 1)
    real, is_full = os.write, True

    def write(descriptor: int, data: bytes) -> int:
        if is_full:
            real(descriptor, bytes(data)[:3])  # and it leaves a torn record
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(50):
        memory.do("publish", 1, f"b{number}", number)
    assert memory.state.roster.lookup(1, "b49") == 49
    assert not path.exists()  # an heir must not take half of it for the whole
    assert len(said(memory, LOG_LOST)) == 1
    assert "No space left" in said(memory, LOG_LOST)[0]
    is_full = False
    memory.do("publish", 1, "c", 2)
    assert heir(path) is None  # not tried at every message
    clock.seconds += LOG_PAUSE_SECONDS
    memory.do("publish", 1, "d", 3)
    found = heir(path)
    assert found is not None
    assert [found.roster.lookup(1, key) for key in ("a", "b49", "c", "d")] == [1, 49, 2, 3]


def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    memory = begun(tmp_path / "none" / "log")
    memory.do("kill", 1)
    assert len(said(memory, LOG_LOST)) == 1


def test_a_log_of_another_program_is_none(tmp_path: Path) -> None:
    log = wal.Log(tmp_path / "log")
    log.begin([b"not a pickle"])
    was_there, problem = Memory(tmp_path / "log").take_up()
    assert not was_there
    assert problem.startswith("UnpicklingError")


def test_the_log_of_a_long_attempt_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_BYTES", 20_000)
    memory = begun(tmp_path / "log")
    for step in range(1, 2_000):
        for rank in range(2):
            memory.do("ack", 1, rank, step, [Receipt(name=f"{rank}", size_bytes=1, sha256="0" * 64)], {"rank": rank})
        memory.do("committed", (1, step), 1.0, {})
        memory.do("settled", (1, step))
        memory.do("told", memory.state.untold[-1].serial)
    assert (tmp_path / "log").stat().st_size < 20_000 + 20_000
    found = heir(tmp_path / "log")
    assert found is not None
    assert found.commits.last == Committed(step=1_999, time=1.0)


def test_a_thousand_attempts_leave_no_more_than_a_few(tmp_path: Path) -> None:
    memory, sizes = begun(tmp_path / "log"), []
    for number in range(2, 1_001):
        memory.do("begin", Attempt(number=number, world_size=2, start_step=0, fleet=number))
        for rank in range(2):
            memory.do("register", number, rank, RankInfo(host="h", pid=1, node_id="n", metrics_address="a"), 0.0)
            memory.state.roster.order(number, rank, REPORT, 0.0)
            memory.do("fail_checkpoint", number, rank, number, "full")
            memory.do("rank_ended", number, rank, WELL)
        memory.do("publish", number, "store", 1)
        memory.do("put_result", number, {"number": number})
        memory.do("event", f"id-{number}", "attempt_failed", {"kind": "hang"})
        memory.do("end_fleet", number)
        memory.do("told", memory.state.untold[-1].serial)
        sizes.append(len(memory.state.dumped()) - 50 * len(memory.state._calls))
    assert max(sizes[10:]) < 1.3 * sizes[10]
    assert len(memory.state.roster.reports()) == 2
    assert [memory.state.result(number) is not None for number in (998, 999, 1000)] == [False, True, True]
    assert [len(memory.state.roster.ends(number)) for number in (998, 999, 1000)] == [0, 2, 2]
    assert ATTEMPTS_KEPT == 2
    for number in range(2 * CALLS_KEPT):
        memory.state.event(f"more-{number}", "x", {})
    assert len(memory.state._calls) == CALLS_KEPT


OF_ATTEMPT_1: list[tuple[Any, ...]] = [
    ("adopt", 1, 1),
    ("request_pause", 1, "room"),
    ("ask_stacks", 1),
    ("kill", 1),
    ("end_fleet", 1),
    ("event", "id", "attempt_failed", {"kind": "hang"}),
    ("rank_ended", 1, 0, WELL),
    ("told_stacks", 1, 0, "text"),
    ("publish", 1, "key", 5),
    ("register", 1, 0, RankInfo(host="h", pid=1, node_id="n", metrics_address="a"), 0.0),
    ("ack", 1, 0, 4, [Receipt(name="r", size_bytes=1, sha256="0")], {}),
    ("fail_checkpoint", 1, 0, 5, "full"),
    ("quarantine", [{"key": "k", "reason": "r", "split": "train", "sample_id": 1}]),
    ("put_result", 1, {"stopped": True}),
]


@pytest.mark.parametrize("message", OF_ATTEMPT_1, ids=lambda message: message[0])
def test_a_message_that_comes_again_in_the_next_attempt_changes_nothing(message: tuple[Any, ...]) -> None:
    memory = begun(None)
    memory.do(*message)
    memory.do("begin", Attempt(number=2, world_size=2, start_step=0, fleet=1))
    before = memory.state.dumped()
    memory.do(*message)
    if message[0] == "end_fleet":  # the fleet goes on to the next attempt here, and to its end
        assert memory.state.roster.order(1, 0, REPORT, 0.0).command == "end"
    else:
        assert memory.state.dumped() == before


@pytest.mark.parametrize(
    ("message", "then"),
    [
        (("ask_stacks", 1), ("kill", 1)),
        (("register", 1, 0, RankInfo(host="h", pid=1, node_id="n", metrics_address="a"), 0.0), ("rank_ended", 1, 0, WELL)),
        (("publish", 1, "key", 5), ("publish", 1, "key", 6)),
        (("request_stop", "SIGTERM"), ("request_stop", "SIGINT")),
        (("request_stop", "SIGTERM"), ("request_pause", 1, "room")),
        (("ack", 1, 0, 4, [Receipt(name="r", size_bytes=1, sha256="0")], {}), ("ack", 1, 1, 4, [], {})),
        (("fail_checkpoint", 1, 0, 4, "full"), ("fail_checkpoint", 1, 1, 4, "full here too")),
        (("put_result", 1, {"rank": 0}), ("put_result", 1, {"rank": 1})),
    ],
    ids=lambda message: message[0],
)
def test_a_message_that_comes_again_does_not_undo_a_later_one(message: tuple[Any, ...], then: tuple[Any, ...]) -> None:
    memory = begun(None)
    memory.do(*message)
    memory.do(*then)
    before = memory.state.dumped()
    memory.do(*message)
    assert memory.state.dumped() == before


def test_checkpoints_that_fail_without_end_are_not_all_remembered() -> None:
    state = State(1, StragglerLimits())
    state.begin(Attempt(number=1, world_size=2, start_step=0))
    for step in range(1, 10 * STEPS_KEPT):
        state.fail_checkpoint(1, 0, step, "full")
        state.ack(1, 1, step, [], {})
    news = state.commits.news()
    assert (len(news.failed_steps), news.failures) == (STEPS_KEPT, 10 * STEPS_KEPT - 1)
    assert len(state.commits._pending) <= STEPS_KEPT
    assert len(state.dumped()) < 200_000
