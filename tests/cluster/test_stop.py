"""The common stop: in any order of beats, steps and answers all ranks stop after the same number of steps, and none waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.beat import BeatReply
from cluster.stop import AGAIN_SECONDS, Gate, StopVote

Action = tuple[str, int]


class Rank:
    """A rank as the protocol sees it: at a gate, inside a step that needs all others, or stopped; and one beat on its way at most."""

    def __init__(self, start: int) -> None:
        self.gate, self.done, self.place = Gate(start), start, "step"
        self.answer: BeatReply | None = None


class World:
    """Ranks in lockstep by the collective of each step, a StopVote, and beats whose answers arrive when the schedule says."""

    def __init__(self, ranks: int, start: int, margin: int) -> None:
        self.vote, self.ranks, self.size = StopVote(ranks, margin), [Rank(start) for _ in range(ranks)], ranks

    def do(self, action: Action) -> None:
        what, which = action
        rank = self.ranks[which % self.size]
        match what:
            case "stop":
                self.vote.request()
            case "step" if rank.place == "step":
                # A rank comes out of step n when every rank is in it, or past it.
                if all(other.done > rank.done or (other.done == rank.done and other.place == "step") for other in self.ranks):
                    rank.done, rank.place = rank.done + 1, "gate"
            case "step" if rank.place == "gate":
                passed = rank.gate.arrive(rank.done)
                rank.place = {False: "step", True: "stopped", None: "gate"}[passed]
            case "beat" if rank.answer is None:
                rank.answer = self.vote.hear(which % self.size, rank.gate.steps_begun, rank.gate.stop_at)
                self.vote.take_up(self.vote.agreement)  # as the coordinator's log does
            case "hear" if rank.answer is not None:
                rank.gate.take(rank.answer)
                rank.answer = None
            case "restart":  # a new coordinator that knows only that a stop was requested
                self.vote = StopVote(self.size, requested=self.vote.requested)
            case "succeed":  # one that has read the log
                agreement, self.vote = self.vote.agreement, StopVote(self.size, requested=self.vote.requested)
                self.vote.take_up(agreement)
            case _:
                pass


BEFORE = st.tuples(st.sampled_from(["step"] * 6 + ["beat", "hear"]), st.integers(0, 3))
AFTER = st.tuples(st.sampled_from(["step"] * 5 + ["beat"] * 3 + ["hear"] * 3 + ["restart", "succeed"]), st.integers(0, 3))


@settings(max_examples=1000)
@given(
    ranks=st.sampled_from([1, 2, 2, 2, 3, 4]),
    start=st.integers(0, 1000),
    margin=st.integers(1, 3),
    before=st.lists(BEFORE, max_size=30),
    after=st.lists(AFTER, max_size=100),
)
def test_all_ranks_stop_after_the_same_number_of_steps_and_none_waits_for_ever(
    ranks: int, start: int, margin: int, before: list[Action], after: list[Action]
) -> None:
    world = World(ranks, start, margin)
    for action in [*before, ("stop", 0), *after]:
        world.do(action)
        stopped = {rank.done for rank in world.ranks if rank.place == "stopped"}
        assert len(stopped) <= 1
        assert all(rank.done <= stop for rank in world.ranks for stop in stopped)
    for _ in range(60):  # then a fair schedule, with slow beats: ten steps for each
        for rank in range(ranks):
            world.do(("beat", rank))
            for _ in range(10):
                for other in range(ranks):
                    world.do(("step", other))
            world.do(("hear", rank))
    assert all(rank.place == "stopped" for rank in world.ranks)
    assert len({rank.done for rank in world.ranks}) == 1


def test_a_new_coordinator_adopts_a_stop_that_some_ranks_have_already_taken() -> None:
    vote = StopVote(2, requested=True)
    for rank in range(2):
        stop = vote.hear(rank, 10, None).stop_at
    confirmed = [vote.hear(rank, 10, stop) for rank in range(2)][-1]
    assert confirmed.confirmed  # rank 1 stops; rank 0 waits, and the coordinator dies
    heir = StopVote(2, requested=True)
    assert heir.hear(0, stop or 0, stop) == BeatReply(stop_at=None, confirmed=False, again_seconds=AGAIN_SECONDS)
    assert heir.hear(1, stop or 0, stop) == confirmed
    assert heir.hear(0, stop or 0, stop) == confirmed


def test_a_rank_that_has_promised_nothing_is_not_taken_for_one_that_has() -> None:
    vote = StopVote(2)
    for rank in range(2):
        vote.hear(rank, 9, None)
    vote.request()
    first = vote.hear(1, 9, None)
    vote.take_up(vote.agreement)  # the log's
    assert not vote.hear(1, 9, first.stop_at).confirmed  # rank 0 has not beaten since, and may be past that step
    vote.take_up(vote.agreement)
    assert vote.hear(0, 9, first.stop_at).confirmed


@given(ranks=st.integers(1, 3), start=st.integers(0, 1000), calm=st.integers(0, 5000), pace=st.integers(0, 500))
def test_however_many_steps_a_beat_takes_a_stop_is_agreed_on_in_five(ranks: int, start: int, calm: int, pace: int) -> None:
    """`calm` steps between the beats until the stop is asked for, `pace` while a beat is on its way from then on."""
    world = World(ranks, start, 2)
    everyone = range(ranks)

    def beats(steps: int) -> None:
        for what in ("beat", *["step"] * 3 * steps, "hear"):
            for rank in everyone:
                world.do((what, rank))

    beats(calm)
    world.do(("stop", 0))
    for _ in range(5):
        beats(pace)
    assert world.vote.confirmed
