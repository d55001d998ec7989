"""Claims about waits: who waits for a storage says so, ticks only while it looks, and gives up in the end."""

import threading
import time
from collections.abc import Callable

import pytest

from cluster.beat import (
    ABSENT,
    BEFORE_STEPS,
    COMPILING,
    COORDINATOR,
    DECODING,
    EVALUATION,
    EXCHANGE,
    JOINING,
    STARTING,
    STEP,
    STORAGE,
    BeatReply,
    in_words,
)
from cluster.heartbeat import Heartbeat
from cluster.storage import StorageOutage
from cluster.waiting import Waits


def heartbeat_of_nobody() -> Heartbeat:
    return Heartbeat(lambda beat: BeatReply(stop_at=None, confirmed=False), 0, 1, 60.0, start_step=0)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_phase_ends_where_it_began_also_with_an_error() -> None:
    heartbeat = heartbeat_of_nobody()
    heartbeat.tick(STEP)
    with heartbeat.during(EVALUATION):
        assert heartbeat.phase == EVALUATION
        with heartbeat.during(EXCHANGE):
            assert heartbeat.phase == EXCHANGE
        assert heartbeat.phase == EVALUATION
    with pytest.raises(ValueError, match="x"), heartbeat.during(EVALUATION):
        raise ValueError("x")
    assert heartbeat.phase == STEP
    heartbeat.close()


class Ticks:
    """Counts ticks in each phase, on a clock that every tick moves on."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.now, self._seconds = 1000.0, seconds
        self.phases: list[str] = []
        self._heartbeat = heartbeat_of_nobody()
        self._heartbeat.tick(STEP)

    def tick(self, phase: str | None = None) -> None:
        self._heartbeat.tick(phase)
        self.phases.append(self._heartbeat.phase)
        self.now += self._seconds

    def during(self, phase: str):  # type: ignore[no-untyped-def]
        return self._heartbeat.during(phase)

    @property
    def phase(self) -> str:
        return self._heartbeat.phase

    def waits(self, phase: str = STORAGE) -> Waits:
        return Waits(self, phase=phase, patience_seconds=3600.0, look_seconds=0.005, clock=lambda: self.now)


def test_a_storage_that_answers_leaves_no_trace() -> None:
    ticks = Ticks()
    assert ticks.waits().call(lambda: 5, "a file") == 5
    assert (ticks.phases, ticks.phase) == ([], STEP)


def test_what_the_storage_raises_comes_back_as_it_is() -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "no such file")

    with pytest.raises(FileNotFoundError, match="no such file"):
        Ticks().waits().call(refuse, "a file")

    def late() -> None:
        raise TimeoutError("the storage's own time-out")

    with pytest.raises(TimeoutError, match="the storage's own"):
        Ticks().waits().call(late, "a file")


@pytest.mark.parametrize("phase", [STORAGE, COORDINATOR])
def test_a_call_that_is_not_answered_is_said_to_be_waited_for_until_it_is(phase: str) -> None:
    ticks, answered = Ticks(), threading.Event()
    release = threading.Thread(target=lambda: (until(lambda: len(ticks.phases) > 5), answered.set()))
    release.start()
    assert ticks.waits(phase=phase).call(lambda: 5 if answered.wait(10) else 0, "a file") == 5
    assert set(ticks.phases) == {phase}
    assert ticks.phase == STEP
    release.join()


def test_another_threads_wait_says_nothing_of_the_main_threads() -> None:
    """A checkpoint's thread acknowledges while the main thread does steps, and may be stuck in one."""
    ticks, found = Ticks(), list[int]()
    thread = threading.Thread(target=lambda: found.append(ticks.waits().call(lambda: time.sleep(0.1) or 5, "a file")))
    thread.start()
    thread.join()
    assert (found, ticks.phases, ticks.phase) == ([5], [], STEP)


def test_the_wait_for_a_storage_that_stalls_for_good_ends_and_names_what_is_not_there() -> None:
    ticks, never = Ticks(seconds=600.0), threading.Event()
    with pytest.raises(StorageOutage, match=r"curves.parquet: the storage has not answered for \d+ s"):
        ticks.waits().call(never.wait, "curves.parquet")
    assert len(ticks.phases) == 7
    never.set()


def test_a_phase_in_words_is_that_of_the_rank_that_is_farthest_behind() -> None:
    assert in_words([]) == in_words([STEP, EXCHANGE, EVALUATION]) == ""
    assert in_words([STEP, STORAGE]) == "waiting for the storage"
    assert in_words([DECODING, JOINING]) == "waiting for all workers to join"
    assert in_words([COMPILING, DECODING]) == "decoding samples into the cache"
    assert in_words([ABSENT, STARTING]) == "starting workers"
    assert STORAGE not in BEFORE_STEPS
