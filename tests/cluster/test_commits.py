"""Claims about a checkpoint's way to its commit: handed out once, when all ranks of the attempt have staged it, and never an older one."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.commits import Commits, Committed, Staged
from cluster.store import Receipt


def receipt(step: int, rank: int) -> Receipt:
    return Receipt(name=f"{step}/{rank}", size_bytes=1, sha256="0")


def begun(world_size: int, last: Committed | None = None, attempt: int = 1) -> Commits:
    commits = Commits([last] if last is not None else [])
    commits.begin(attempt, world_size, last.step if last is not None else 0)
    return commits


@given(world_size=st.integers(1, 4), data=st.data())
def test_ranks_in_any_order_have_each_step_handed_out_once_in_the_order_of_steps(world_size: int, data: st.DataObject) -> None:
    """Each rank stages steps 1 to 4 in order; some steps fail on a rank."""
    commits, left = begun(world_size), [1] * world_size
    failing = data.draw(st.dictionaries(st.integers(1, 4), st.integers(0, world_size - 1), max_size=2))
    handed: list[Staged] = []
    while any(step <= 4 for step in left):
        rank = data.draw(st.sampled_from([rank for rank, step in enumerate(left) if step <= 4]))
        step = left[rank]
        left[rank] += 1
        if failing.get(step) == rank:
            assert commits.withdraw(1, rank, step)
            assert commits.failed(1, step, "full")
            assert not commits.failed(1, step, "full here too")
        elif (staged := commits.ack(1, rank, step, [receipt(step, rank)], {f"rank{rank}": rank})) is not None:
            handed.append(staged)
    assert [staged.step for staged in handed] == [step for step in range(1, 5) if step not in failing]
    for staged in handed:
        assert staged.receipts == [receipt(staged.step, rank) for rank in range(world_size)]
        assert staged.meta == {f"rank{rank}": rank for rank in range(world_size)}
    assert commits.in_hand == len(handed)
    assert commits.news().failed_steps == frozenset(failing)
    assert commits.news().failures == len(failing)


def test_a_step_that_some_ranks_left_out_is_forgotten_when_a_later_one_is_whole() -> None:
    commits = begun(2)
    assert commits.ack(1, 0, 4, [receipt(4, 0)], {}) is None
    assert commits.ack(1, 0, 8, [receipt(8, 0)], {}) is None
    staged = commits.ack(1, 1, 8, [receipt(8, 1)], {})
    assert staged is not None
    assert staged.step == 8
    assert commits.ack(1, 1, 4, [receipt(4, 1)], {}) is None


def test_an_older_attempt_has_no_say() -> None:
    commits = begun(1, Committed(step=3, time=1.0))
    commits.begin(2, 1, 3)
    assert commits.ack(1, 0, 9, [], {}) is None
    assert not commits.withdraw(1, 0, 9)
    commits.committed(1, 9, 2.0)
    assert commits.last == Committed(step=3, time=1.0)
    assert commits.failed(1, 9, "late")  # counted, and no answer to those who wait now
    assert not commits.is_failed(9)
    assert (commits.news().failures, commits.news().problem) == (1, "late")


def test_a_later_commit_answers_those_who_wait_for_an_earlier_step() -> None:
    commits = begun(1)
    assert not commits.is_committed(0)
    assert commits.ack(1, 0, 6, [], {}) is not None
    commits.committed(1, 6, 5.0)
    commits.settled(1, 6)
    assert [commits.is_committed(step) for step in (4, 6, 7)] == [True, True, False]
    assert (commits.news().last, commits.in_hand) == (Committed(step=6, time=5.0), 0)
