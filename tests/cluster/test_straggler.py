"""The straggler watch: silent about noise, certain about a slow rank, once an episode."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.straggler import Straggler, StragglerWatch


class Group:
    """Ranks that work and beat; beats may cover several steps."""

    def __init__(self, world_size: int, **settings: float) -> None:
        self.watch = StragglerWatch(world_size, **settings)  # type: ignore[arg-type]
        self.steps, self.own, self.world_size = 0, [0.0] * world_size, world_size
        self.said: list[Straggler] = []

    def step(self, seconds: list[float], *, beats: bool = True) -> None:
        self.steps += 1
        for rank, own in enumerate(seconds):
            self.own[rank] += own
            if beats and (said := self.watch.hear(rank, self.steps, self.own[rank])):
                self.said.append(said)


@given(world_size=st.integers(1, 8), data=st.data(), scale=st.sampled_from([1e-4, 0.3, 100.0]))
def test_equal_ranks_are_never_stragglers_whatever_the_noise_of_a_fifth(world_size: int, data: st.DataObject, scale: float) -> None:
    group = Group(world_size)
    noise = st.lists(st.floats(0.82, 1.2), min_size=world_size, max_size=world_size)  # 1.2 / 0.82 < 1.5
    for seconds in data.draw(st.lists(st.tuples(noise, st.booleans()), max_size=60)):
        group.step([scale * each for each in seconds[0]], beats=seconds[1])
    assert group.said == []
    assert 1.0 <= group.watch.skew < 1.5


@given(
    world_size=st.integers(2, 8),
    data=st.data(),
    before=st.integers(0, 50),
    beat_every=st.integers(1, 7),
)
def test_a_rank_three_times_slower_is_always_told_once_and_again_when_it_has_recovered(
    world_size: int, data: st.DataObject, before: int, beat_every: int
) -> None:
    slow = data.draw(st.integers(0, world_size - 1))
    noise = data.draw(st.lists(st.floats(0.9, 1.1), min_size=world_size, max_size=world_size))
    group = Group(world_size)
    for number, factor in enumerate([1.0] * before + [3.0] * 60 + [1.0] * 60):
        seconds = [each * (factor if rank == slow else 1.0) for rank, each in enumerate(noise)]
        group.step(seconds, beats=number % beat_every == 0)
        if before + 20 < group.steps <= before + 60 and group.said:
            assert group.watch.skew > 1.2
    assert [(said.rank, said.begins) for said in group.said] == [(slow, True), (slow, False)]
    begin, end = group.said
    assert before + 20 <= begin.steps_done <= before + 20 + 15 + 2 * beat_every
    assert before + 60 < end.steps_done <= before + 60 + 15 + 2 * beat_every
    assert begin.ratio > 1.5 >= end.ratio


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_a_rank_alone_is_never_a_straggler(seconds: list[float]) -> None:
    group = Group(1)
    for each in seconds:
        group.step([each])
    assert group.said == []
    assert group.watch.skew == 1.0


def test_slow_for_fewer_steps_than_needed_is_no_episode() -> None:
    group = Group(3, steps=20)
    for _ in range(10):
        for factor in [3.0] * 5 + [1.0] * 15:
            group.step([1.0, factor, 1.0])
    assert group.said == []


def test_two_slow_ranks_of_five_are_each_told() -> None:
    group = Group(5)
    for _ in range(60):
        group.step([1.0, 4.0, 1.0, 1.0, 6.0])
    assert {(said.rank, said.begins) for said in group.said} == {(1, True), (4, True)}
    assert group.watch.skew == pytest.approx(6.0)


def test_a_beat_that_says_nothing_new_or_is_late_changes_nothing() -> None:
    watch, other = StragglerWatch(2), StragglerWatch(2)
    for step in range(1, 40):
        for rank, each in ((0, 1.0), (1, 2.0)):
            said = watch.hear(rank, step, each * step)
            assert watch.hear(rank, step, each * step) is None
            assert watch.hear(rank, step - 1, 0.0) is None
            assert said == other.hear(rank, step, each * step)
    assert watch.skew == other.skew == 2.0 / statistics.median([1.0, 2.0])


def test_ranks_that_have_not_spoken_yet_are_waited_for() -> None:
    watch = StragglerWatch(3)
    for step in range(100):
        assert watch.hear(0, step, 9.0 * step) is None
        assert watch.hear(1, step, 1.0 * step) is None


def test_a_ratio_that_calls_everybody_slow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.faults\.straggler_ratio=1 must be above 1"):
        StragglerWatch(2, ratio=1)
