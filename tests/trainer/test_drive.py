"""What the driver makes of what it sees: pure decisions, and a real coordinator's status. No Ray."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.beat import Beat
from cluster.coordinator import Coordinator, Status
from cluster.failures import Failure
from cluster.hang import Hang
from cluster.roster import RankInfo
from cluster.store import Commit
from trainer.drive.attempt import (
    Act,
    Look,
    decide,
    has_begun,
    lost_agents,
    may_begin,
    outcome_of,
    signs,
    silent_agents,
    wait_for_news,
)
from trainer.drive.drive import told_failure
from trainer.drive.fleets import Pause
from trainer.drive.screen import Position, phase_of
from trainer.drive.signals import Phase, Signals
from trainer.settings.tree import RunConfig

HERE = RankInfo(host="here", pid=1, node_id="node", metrics_address="")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(str(tmp_path), "run", 1, 2)
    coordinator.start_attempt(1, 2, 10)
    yield coordinator
    coordinator.close()


# What is done about what is seen

HANG = Hang(kind="stuck", ranks=(1,), seconds=60.0)
GROW = Pause(kind="grow", reason="there is room")
MINUTES = st.floats(0, 1000)
LOOKS = st.builds(
    Look,
    fleet_ended=st.booleans(),
    ranks_ended=st.booleans(),
    is_orphan=st.booleans(),
    lost_agents=st.sampled_from([(), (1,), (0, 2)]),
    hang=st.sampled_from([None, HANG]),
    is_taken_over=st.booleans(),
    signal=st.sampled_from([0, signal.SIGINT, signal.SIGTERM]),
    may_begin=st.booleans(),
    has_begun=st.booleans(),
    stop_asked_seconds=st.none() | MINUTES,
    stop_grace_seconds=MINUTES,
    pause=st.sampled_from([None, GROW]),
    pause_asked=st.booleans(),
)
TROUBLE = {"fleet_ended": False, "ranks_ended": False, "is_orphan": False, "lost_agents": (), "hang": None, "is_taken_over": False}
# The first of these that is true decides, whatever else is.
FIRST = [
    ("fleet_ended", True, Act.TAKE_FLEETS_FAILURE),
    ("ranks_ended", True, Act.TAKE_RESULT),
    ("is_orphan", True, Act.ADOPT),
    ("lost_agents", (0,), Act.GIVE_UP_AGENTS),
    ("hang", HANG, Act.BREAK_HANG),
    ("is_taken_over", True, Act.GIVE_WAY),
]


def at_peace(look: Look) -> Look:
    """`look` without what ends an attempt by itself."""
    changes: Any = TROUBLE
    return dataclasses.replace(look, **changes)


@given(look=LOOKS, which=st.integers(0, len(FIRST) - 1))
def test_what_is_wrong_with_an_attempt_comes_before_what_is_wanted_of_it_the_gravest_first(look: Look, which: int) -> None:
    key, value, act = FIRST[which]
    changes: Any = {**{name: TROUBLE[name] for name, _, _ in FIRST[:which]}, key: value}
    assert decide(dataclasses.replace(look, **changes)) is act


@given(look=LOOKS.map(at_peace))
def test_the_ranks_are_asked_to_stop_once_and_only_after_a_signal(look: Look) -> None:
    act = decide(look)
    is_new = look.signal != 0 and look.stop_asked_seconds is None and (look.has_begun or not look.may_begin)
    assert (act in (Act.ASK_TO_STOP, Act.STOP_AT_ONCE)) == is_new
    if is_new:
        assert act is (Act.ASK_TO_STOP if look.has_begun else Act.STOP_AT_ONCE)


@given(look=LOOKS.map(at_peace))
def test_ranks_that_were_asked_to_stop_have_their_grace_and_no_more(look: Look) -> None:
    is_late = look.stop_asked_seconds is not None and look.stop_asked_seconds > look.stop_grace_seconds
    assert (decide(look) is Act.END_GRACE) == is_late


@given(look=LOOKS)
def test_other_workers_are_for_a_run_that_is_to_go_on_and_are_asked_for_once(look: Look) -> None:
    if decide(look) is Act.ASK_TO_PAUSE:
        assert look.pause is not None
        assert not look.signal
        assert not look.pause_asked
        assert at_peace(look) == look


def test_an_attempt_goes_on_where_nothing_happens_and_changes_its_workers_for_a_reason() -> None:
    assert decide(Look()) is Act.GO_ON
    assert decide(Look(has_begun=True, stop_grace_seconds=30.0)) is Act.GO_ON
    assert decide(Look(pause=GROW)) is Act.ASK_TO_PAUSE
    assert decide(Look(pause=GROW, pause_asked=True)) is Act.GO_ON


# What a status says


def beat(coordinator: Coordinator, rank: int, steps_done: int, phase: str) -> None:
    coordinator.beat(Beat(attempt=1, rank=rank, steps_done=steps_done, steps_begun=steps_done + 1, phase=phase, ticks=1))


def test_an_attempt_has_begun_once_a_rank_may_have_steps_that_are_not_saved(coordinator: Coordinator) -> None:
    assert not has_begun(coordinator.status())
    for rank in range(2):
        coordinator.register(1, rank, HERE)
        beat(coordinator, rank, 10, "starting")
    assert not has_begun(coordinator.status())
    beat(coordinator, 1, 10, "step")  # it may have done many since
    assert has_begun(coordinator.status())


@pytest.mark.parametrize(
    ("beat_seconds", "signal_seconds", "unknown"),
    [
        (0.5, 0.1, True),  # the beat came before the signal
        (0.5, 1.0, True),  # it came after it, and may tell of a time before
        (0.5, 1.6, False),
        (30.0, 2.0, True),
        (30.0, 5.0, False),  # nobody waits for a rank that says nothing
    ],
)
def test_a_signal_waits_for_beats_that_are_newer_to_know_whether_a_step_was_done(
    beat_seconds: float, signal_seconds: float, unknown: bool
) -> None:
    status: Any = SimpleNamespace(ranks={0: SimpleNamespace(age_seconds=0.0), 1: SimpleNamespace(age_seconds=beat_seconds)})
    assert may_begin(status, signal_seconds, heartbeat_seconds=1.0) is unknown
    nobody: Any = SimpleNamespace(ranks={})
    assert not may_begin(nobody, signal_seconds, heartbeat_seconds=1.0)


def test_a_rank_that_compiles_again_after_its_first_steps_has_begun(coordinator: Coordinator) -> None:
    for rank in range(2):
        beat(coordinator, rank, 14, "starting")
    assert has_begun(coordinator.status())


def test_the_watch_hears_of_every_rank_that_has_not_ended_also_of_one_that_never_registered(coordinator: Coordinator) -> None:
    coordinator.register(1, 0, HERE)
    beat(coordinator, 0, 10, "joining")
    status = coordinator.status()
    assert {rank: sign.phase for rank, sign in signs(status).items()} == {0: "joining", 1: "placing"}
    agents: Any = {rank: SimpleNamespace(state="S") for rank in range(2)}
    placed = dataclasses.replace(status, reports=agents)
    assert {rank: sign.phase for rank, sign in signs(placed).items()} == {0: "joining", 1: "absent"}
    assert signs(placed)[1].age_seconds == 0
    assert set(signs(dataclasses.replace(placed, ended_ranks=frozenset({0})))) == {1}


def with_agents(status: Status, *, ages: dict[int, float], ended: set[int], world_size: int) -> Status:
    reports: Any = {rank: SimpleNamespace(node_id=f"node-{rank}") for rank in ages}
    return dataclasses.replace(status, agent_ages=ages, ended_ranks=frozenset(ended), world_size=world_size, reports=reports)


def test_silent_agents_hold_an_attempt_up_where_their_node_is_gone_or_only_they_are_left(coordinator: Coordinator) -> None:
    def lost(ages: dict[int, float], ended: set[int], alive: set[str]) -> tuple[int, ...]:
        status = with_agents(coordinator.status(), ages=ages, ended=ended, world_size=3)
        return lost_agents(status, silent_agents(status), alive)

    everywhere = {f"node-{rank}" for rank in range(3)}
    assert lost({0: 0.1, 1: 0.1, 2: 0.1}, set(), set()) == ()
    assert lost({0: 0.1, 1: 9.0, 2: 0.1}, set(), everywhere) == ()  # late, on a node that lives: it may come back
    assert lost({0: 0.1, 1: 9.0, 2: 9.0}, set(), everywhere - {"node-1"}) == (1,)
    assert lost({0: 0.1, 1: 9.0, 2: 0.1}, {0}, everywhere) == ()  # rank 2 is still at work
    assert lost({0: 0.1, 1: 9.0, 2: 9.0}, {0}, everywhere) == (1, 2)
    assert lost({0: 9.0, 1: 9.0, 2: 9.0}, {0, 1, 2}, set()) == ()


def test_what_a_run_is_doing_in_words(coordinator: Coordinator) -> None:
    def phase(position: Position, **more: Any) -> str:
        return phase_of(coordinator.status(), position, **{"workers": 2, "is_stopping": False, "waiting": "", **more})

    first = Position(attempt=1, start=commit(10))
    again = dataclasses.replace(first, attempt=2, restarts=1)
    assert phase(first) == "starting workers"
    assert phase(dataclasses.replace(first, attempt=2)) == "starting workers"  # the first of this driver
    assert phase(again) == "restarting workers"
    assert phase(first, waiting="waiting for room") == "waiting for room"
    assert phase(first, waiting="waiting for room", is_stopping=True) == "stopping"
    for rank in range(2):
        beat(coordinator, rank, 10, "starting")
    assert phase(again) == "loading data and model"
    beat(coordinator, 1, 11, "step")
    assert phase(again) == "training"
    assert phase(again, is_stopping=True) == "stopping"


def commit(step: int) -> Commit:
    nowhere: Any = None
    return Commit(step=step, generation=1, path=f"step-{step}", manifest={}, storage=nowhere)


def test_a_failure_is_told_with_its_place_and_its_price() -> None:
    died = Failure(kind="infrastructure", rank=1, message="killed (SIGKILL): by hand\nmore")
    assert told_failure(died, Position(attempt=2, start=commit(10)), 12) == (
        "attempt 2 failed on rank 1 at step 12 (infrastructure: killed (SIGKILL): by hand); 2 steps to do again, going on from step 10"
    )
    numbers = Failure(kind="numbers", rank=0, message="step 1200: the loss is nan", step=1200)
    assert told_failure(numbers, Position(attempt=1), 1) == (
        "attempt 1 failed at step 1 (numbers: step 1200: the loss is nan); 1 step to do again, starting from the beginning"
    )
    assert told_failure(dataclasses.replace(died, rank=None), Position(attempt=1, start=commit(10)), 10) == (
        "attempt 1 failed at step 10 (infrastructure: killed (SIGKILL): by hand); going on from step 10"
    )


# Signals and sleep


class _NoNews:
    """Ray's reference to news that never come."""

    def future(self) -> "Future[None]":
        return Future()


class _Fleet:
    workers = 1

    def wait(self, timeout_seconds: float) -> bool:
        return False


def test_a_driver_that_waits_hears_of_a_signal_at_once() -> None:
    signals = Signals()
    session: Any = SimpleNamespace(call=lambda *_: _NoNews(), config=RunConfig(), status=lambda: "status")
    kill = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    signals.enter(Phase.TRAINING)
    with signals.heard():
        kill.start()
        began = time.monotonic()
        assert wait_for_news(session, signals, _Fleet(), 0, is_told=False) == "status"  # type: ignore[comparison-overlap, arg-type]
    assert (signals.number, signals.name) == (signal.SIGINT, "SIGINT")
    assert time.monotonic() - began < 30  # else it waits a minute for the news
    assert signal.getsignal(signal.SIGINT) is before


def test_a_wait_before_the_next_attempt_ends_with_a_signal() -> None:
    signals = Signals()
    signals.enter(Phase.TRAINING)
    with signals.heard():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        signals.sleep(60)
        signals.sleep(60)  # nor is there another
    assert time.monotonic() - began < 30
    assert signals.number == signal.SIGTERM


@pytest.mark.parametrize("pause", [None, Pause(kind="grow", reason="a node has come")])
@pytest.mark.parametrize("failure", [None, Failure(kind="infrastructure", rank=1, message="the agents ended before their ranks had")])
@pytest.mark.parametrize("is_taken_over", [False, True])
@pytest.mark.parametrize("result", [None, {"stopped": True}, {"stopped": False}])
def test_an_attempt_that_paused_is_followed_by_another_whatever_died_after_it(
    pause: Pause | None, failure: Failure | None, is_taken_over: bool, result: dict[str, Any] | None
) -> None:
    """Else the run ends as stopped, which nobody asked for: seen where a rank or the fleet died between the pause and its outcome."""
    outcome = outcome_of(failure, result, pause=pause, is_taken_over=is_taken_over)
    assert outcome.pause == (pause if result is not None and result["stopped"] else None)
    assert outcome.result == result
    assert outcome.failure == (failure if result is None and not is_taken_over else None)
