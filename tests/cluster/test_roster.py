"""Claims about who takes part: in whatever order messages come, only the current attempt counts, and agents are told what follows."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.agent import AgentOrder, AgentReport, Payload, RankEnd
from cluster.beat import STARTING, Beat
from cluster.roster import Attempt, RankInfo, Roster
from cluster.straggler import StragglerLimits

PAYLOAD = Payload(target="m:f", spec=b"")
REPORT = AgentReport(attempt=0, pid=0, state="", cpu_seconds=0.0, notice="", node_id="n", placement_group="")
DIED, WELL = RankEnd(status=-9, error=None, killed_by_order=False), RankEnd(status=0, error=None, killed_by_order=False)


def info(rank: int) -> RankInfo:
    return RankInfo(host="h", pid=100 + rank, node_id="n", metrics_address=f"h:{rank}")


def beat(attempt: int, rank: int, steps_done: int, **fields: Any) -> Beat:
    return Beat(attempt=attempt, rank=rank, steps_done=steps_done, steps_begun=steps_done + 1, **fields)


def roster(world_size: int = 2, start_step: int = 10, fleet: int = 1) -> Roster:
    found = Roster(StragglerLimits(ratio=1.5, steps=3))
    found.begin(Attempt(number=1, world_size=world_size, start_step=start_step, fleet=fleet, payload=PAYLOAD))
    return found


def test_a_rank_is_known_from_its_registration_on_and_its_beats_tell_the_rest() -> None:
    known = roster()
    assert known.ranks(0.0) == {}
    assert known.register(1, 1, info(1), now=5.0)
    (rank,) = known.ranks(7.0).values()
    assert (rank.steps_done, rank.phase, rank.ticks, rank.stats, rank.age_seconds, rank.info) == (10, STARTING, 0, {}, 2.0, info(1))
    known.hear(beat(1, 1, 12, stats={"loss": 0.5}, totals={"steps": 3.0}, phase="step", ticks=4), now=8.0)
    rank = known.ranks(8.5)[1]
    assert (rank.steps_done, rank.phase, rank.ticks, rank.stats, rank.totals) == (12, "step", 4, {"loss": 0.5}, {"steps": 3.0})
    assert rank.age_seconds == 0.5


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1))
def test_beats_in_any_order_take_no_step_back_and_lose_no_figures(said: list[tuple[int, bool]]) -> None:
    known = roster()
    for now, (steps, has_stats) in enumerate(said):
        assert known.hear(beat(1, 0, steps, stats={"loss": float(now)} if has_stats else {}), now=float(now)) is not None
    rank = known.ranks(float(len(said)))[0]
    assert rank.steps_done == max(steps for steps, _ in said)
    assert rank.age_seconds == 1.0
    with_stats = [float(now) for now, (_, has_stats) in enumerate(said) if has_stats]
    assert rank.stats == ({"loss": with_stats[-1]} if with_stats else {})


@given(st.sampled_from(["register", "hear", "ended", "told_stacks", "publish", "kill", "ask_stacks", "adopt"]), st.sampled_from([0, 1, 3]))
def test_what_is_said_of_another_attempt_changes_nothing(what: str, number: int) -> None:
    known = roster()
    known.begin(Attempt(number=2, world_size=1, start_step=20, fleet=1, payload=PAYLOAD))
    untouched = (known.attempt, known.ranks(1.0), known.infos(), known.ends(), known.stacks(), known.order(1, 0, REPORT, 0.0))
    match what:
        case "register":
            assert not known.register(number, 0, info(0), 1.0)
        case "hear":
            assert known.hear(beat(number, 0, 50), 1.0) is None
        case "ended":
            assert not known.ended(number, 0, DIED)
        case "told_stacks":
            known.told_stacks(number, 0)
        case "publish":
            known.publish(number, "key", 5)
            assert known.lookup(2, "key") is None
        case "kill":
            known.kill(number)
        case "ask_stacks":
            known.ask_stacks(number)
        case "adopt":
            known.adopt(number, 9, PAYLOAD)
    assert (known.attempt, known.ranks(1.0), known.infos(), known.ends(), known.stacks(), known.order(1, 0, REPORT, 0.0)) == untouched
    assert known.lookup(number, "key") is None
    assert known.ends(number) == {}


def test_a_rank_that_dies_is_up_no_more_and_the_others_are_to_be_killed() -> None:
    known = roster()
    for rank in range(2):
        known.register(1, rank, info(rank), 0.0)
    assert known.ended(1, 0, WELL)
    begun = replace(REPORT, attempt=1)
    assert known.order(1, 1, begun, 0.0).command == "run"  # one that ends well leaves the others to it
    assert known.ended(1, 1, DIED)
    assert known.infos() == {}
    assert known.ends(1) == known.ends() == {0: WELL, 1: DIED}
    assert known.order(1, 0, begun, 0.0) == AgentOrder(command="kill", attempt=1, world_size=2)


@pytest.mark.parametrize(("fleet", "command"), [(0, "end"), (1, "run"), (2, "wait")])
def test_agents_of_older_fleets_end_and_those_of_newer_ones_wait(fleet: int, command: str) -> None:
    assert roster().order(fleet, 0, REPORT, 0.0).command == command


def test_an_attempt_read_from_the_journal_waits_until_the_driver_adopts_it() -> None:
    known = Roster(StragglerLimits())
    assert known.order(1, 0, REPORT, 0.0) == AgentOrder(command="wait")
    known.begin(Attempt(number=3, world_size=1, start_step=0))
    assert known.order(1, 0, REPORT, 0.0) == AgentOrder(command="wait")
    known.adopt(3, 1, PAYLOAD)
    assert known.order(1, 0, REPORT, 0.0) == AgentOrder(command="run", attempt=3, world_size=1, payload=PAYLOAD)
    assert known.order(1, 0, replace(REPORT, attempt=3), 0.0).payload is None  # it travels once
    known.end_fleet(1)
    assert known.order(1, 0, REPORT, 0.0) == AgentOrder(command="end")


def test_stacks_count_from_when_they_were_asked_for() -> None:
    known = roster()
    known.told_stacks(1, 0)
    known.ask_stacks(1)
    assert known.stacks() == frozenset()
    known.told_stacks(1, 1)
    assert known.stacks() == {1}
    assert known.order(1, 0, replace(REPORT, attempt=1), 0.0).command == "stacks"


def test_only_agents_of_the_current_fleet_are_listed() -> None:
    known = roster(fleet=1)
    known.order(1, 0, replace(REPORT, notice="spot"), now=3.0)
    known.order(2, 1, REPORT, now=4.0)  # of the next one, which has not begun
    assert {rank: report.notice for rank, report in known.reports().items()} == {0: "spot"}
    assert known.agent_ages(5.0) == {0: 2.0}
    known.begin(Attempt(number=2, world_size=2, start_step=0, fleet=2, payload=PAYLOAD))
    assert known.agent_ages(5.0) == {1: 1.0}


def test_a_slow_rank_is_heard_of_once_it_was_slow_for_long_enough() -> None:
    known, told = roster(), []
    for step in range(1, 8):
        for rank in range(2):
            heard = known.hear(beat(1, rank, 10 + step, own_seconds=step * (1.0 + rank)), float(step))
            assert heard is not None
            told += [heard.straggler.rank] if heard.straggler else []
    assert told == [1]
    assert heard.skew > 1.3
