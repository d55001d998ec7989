"""Claims about the hang watch: who is stopped, silent or stuck is found within its budget, and slow ones never are."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hang import STOPPED_SECONDS, Hang, HangWatch, Sign

HANG, START = 60.0, 600.0


def sign(ticks: int = 0, *, state: str = "S", age: float = 0.1, phase: str = "step") -> Sign:
    return Sign(state=state, age_seconds=age, ticks=ticks, phase=phase)


class Clock:
    """A watch that is looked at every quarter of a second, for as long as `advance` says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.watch = HangWatch(hang_seconds=HANG, start_seconds=START, now=self.now)

    def advance(self, seconds: float, signs: Mapping[int, Sign], every: float = 0.25) -> tuple[Hang | None, float]:
        """(the first hang, seconds until then), or (None, seconds)."""
        began = self.now
        while self.now < began + seconds:
            self.now += every
            if hang := self.watch.look(self.now, signs):
                return hang, self.now - began
        return None, seconds


def test_a_stopped_rank_is_found_after_its_budget_and_not_before():
    clock = Clock()
    signs = {0: sign(1, phase="exchange"), 1: sign(1, state="T", age=STOPPED_SECONDS)}
    assert clock.advance(STOPPED_SECONDS - 0.5, signs)[0] is None
    assert clock.advance(0.3, {0: sign(2), 1: sign(2, state="R")})[0] is None  # it went on
    hang, seconds = clock.advance(30, signs)
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("stopped", (1,))
    assert STOPPED_SECONDS <= seconds <= STOPPED_SECONDS + 1
    assert hang.describe() == "rank 1: stopped (state T: SIGSTOP or a debugger) for 5 s"


def test_a_rank_that_is_found_stopped_at_every_look_and_beats_meanwhile_is_slow_and_not_stopped():
    clock = Clock()
    for ticks in range(40):
        assert clock.advance(1.0, {0: sign(ticks, state="T", age=1.5)})[0] is None


@pytest.mark.parametrize("phase", ["joining", "exchange"])
def test_a_rank_that_never_registers_is_named_and_not_those_that_wait_for_it(phase: str):
    clock = Clock()
    signs = {0: sign(3, phase=phase), 1: sign(phase="absent", age=0.0), 2: sign(4, phase=phase)}
    assert clock.advance(START - 1, signs)[0] is None
    hang, _ = clock.advance(10, signs)
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("never started", (1,))
    assert hang.describe() == "rank 1: never registered for 600 s"


def test_of_those_that_start_the_ones_behind_are_named_with_what_they_do():
    signs = {0: sign(9, phase="joining"), 1: sign(2, phase="decoding"), 2: sign(9, phase="joining")}
    hang, _ = Clock().advance(START + 10, signs)
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("never started", (1,))
    assert hang.describe() == "rank 1: not training yet (decoding) for 600 s"


def test_where_nobody_registers_all_are_named_and_where_all_wait_in_vain_too():
    for phase in ("absent", "joining"):
        hang, _ = Clock().advance(START + 10, {0: sign(phase=phase), 1: sign(phase=phase)})
        assert hang is not None
        assert (hang.kind, hang.ranks) == ("never started", (0, 1))


def test_a_worker_that_is_not_placed_yet_is_not_the_watchs_business():
    """Ray Train has a limit of its own for that, which may be longer than the one for the start."""
    assert Clock().advance(10 * START, {0: sign(phase="placing"), 1: sign(phase="placing")})[0] is None


def test_decoding_may_take_hours_as_long_as_row_groups_are_decoded():
    clock = Clock()
    for group in range(60):  # five minutes each; the other rank has few and waits for the first step
        assert clock.advance(300, {0: sign(group, phase="decoding"), 1: sign(7, phase="exchange")})[0] is None
    hang, _ = clock.advance(START + 10, {0: sign(59, phase="decoding"), 1: sign(7, phase="exchange")})
    assert hang is not None
    assert hang.ranks == (0,)


@pytest.mark.parametrize("others", ["exchange", "step"])
def test_who_waits_for_a_storage_is_no_hang_and_neither_are_those_that_wait_for_it(others: str):
    """The others wait in a collective. On a GPU, and in ddp mode, they cannot say so."""
    clock = Clock()
    for second in range(3500):
        assert clock.advance(1, {0: sign(second, phase="storage", state="D"), 1: sign(5, phase=others)})[0] is None


def test_a_rank_that_ranks_many_scores_is_awaited_and_nobody_is_blamed_meanwhile():
    """In ddp mode the other is in its next step's all-reduce by then."""
    signs = {0: sign(5, phase="measuring"), 1: sign(5)}
    clock = Clock()
    assert clock.advance(START - 1, signs)[0] is None
    hang, _ = clock.advance(2, signs)
    assert hang is not None
    assert (hang.kind, hang.ranks, hang.phase) == ("stuck", (0,), "measuring")


def test_a_rank_that_says_it_waits_for_the_storage_and_no_longer_looks_is_stuck():
    clock = Clock()
    assert clock.advance(5, {0: sign(1, phase="storage"), 1: sign(5, phase="exchange")})[0] is None
    hang, _ = clock.advance(100, {0: sign(2, phase="storage"), 1: sign(5, phase="exchange")})
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("stuck", (0,))
    assert hang.describe() == "rank 0: stuck: no step done, nor anything else (storage) for 60 s"


def test_a_rank_that_ticks_does_not_hide_one_that_is_stuck():
    """Rank 0 waits for a commit that needs rank 1's part of the checkpoint, and ticks with each answer of the coordinator."""
    clock = Clock()
    for second in range(120):
        hang, _ = clock.advance(1, {0: sign(second, phase="checkpoint"), 1: sign(5, phase="evaluation")})
        if hang is not None:
            break
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("stuck", (1,))
    assert HANG <= second <= HANG + 2


def test_where_waiting_does_not_show_all_in_the_step_are_named_whoever_ticked_last():
    clock = Clock()
    assert clock.advance(1, {0: sign(1), 1: sign(1)})[0] is None
    assert clock.advance(1, {0: sign(1), 1: sign(2)})[0] is None  # rank 0 is in the all-reduce already
    hang, _ = clock.advance(100, {0: sign(1), 1: sign(2)})
    assert hang is not None
    assert hang.ranks == (0, 1)


def test_a_rank_that_sleeps_is_to_blame_and_those_that_wait_for_it_are_not():
    clock = Clock()
    assert clock.advance(5, {0: sign(1), 1: sign(1)})[0] is None
    hang, seconds = clock.advance(100, {0: sign(2, phase="exchange"), 1: sign(2), 2: sign(2, phase="exchange")})
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("stuck", (1,))
    assert HANG <= seconds <= HANG + 2


def test_where_all_wait_for_each_other_all_are_named():
    hang, _ = Clock().advance(100, {0: sign(2, phase="exchange"), 1: sign(2, phase="exchange")})
    assert hang is not None
    assert hang.ranks == (0, 1)


def test_a_silent_process_is_found_by_its_missing_heartbeat():
    clock = Clock()
    for second in range(120):
        hang, _ = clock.advance(1, {0: sign(second), 1: sign(second, age=float(second))})
        if hang:
            break
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("silent", (1,))
    assert second == 60


def test_the_way_to_the_first_step_has_a_budget_of_its_own():
    clock = Clock()
    signs = {0: sign(0, phase="starting"), 1: sign(0, phase="starting")}
    assert clock.advance(START - 1, signs)[0] is None
    hang, _ = clock.advance(10, signs)
    assert hang is not None
    assert hang.kind == "never started"


@given(st.floats(0.5, 300), st.floats(1, 9.9))
def test_who_was_slow_once_may_be_slow_again(step_seconds: float, factor: float):
    clock = Clock()
    for ticks, seconds in enumerate((0.25, min(step_seconds, HANG - 2), min(step_seconds, HANG - 2) * min(factor, 9.0))):
        if clock.advance(seconds, {0: sign(ticks)})[0] is not None:
            # only ever beyond both budgets
            assert seconds >= HANG
            assert seconds > 9.0 * min(step_seconds, HANG - 2)


def test_a_long_step_stretches_the_budget_to_ten_times_its_length():
    clock = Clock()
    assert clock.advance(50, {0: sign(1)})[0] is None
    assert clock.advance(480, {0: sign(2)})[0] is None
    hang, _ = clock.advance(100, {0: sign(2)})
    assert hang is not None
    assert 499 < hang.seconds < 502


@given(st.lists(st.floats(0, 3600), min_size=1, max_size=40))
def test_time_in_which_the_driver_did_not_run_is_not_held_against_the_ranks(gaps: list[float]):
    clock = Clock()
    looks = 0
    for gap in gaps:
        hang, _ = clock.advance(gap, {0: sign(1, age=0.2), 1: sign(1, age=0.2)}, every=max(gap, 0.01))
        looks += gap > 0
        assert hang is None or looks >= HANG  # each look counts for a second at most


def test_ranks_that_tick_are_never_stuck_whatever_they_do():
    clock = Clock()
    for tick in range(4000):
        assert clock.advance(0.25, {0: sign(tick, phase="evaluation"), 1: sign(tick, phase="checkpoint", state="D")})[0] is None
