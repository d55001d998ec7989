"""The ledger: what counts is what the newest attempt did, and a kill loses nothing that was recorded."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger import LedgerWriter, read_ledger


def run_attempt(folder: Path, attempt: int, start: int, stop: int, ranks: int = 1) -> None:
    """Steps [start, stop) of two virtual ranks, dealt to `ranks` ranks; ids tell the step and the virtual rank."""
    writers = [LedgerWriter(folder, attempt, rank, start_step=start) for rank in range(ranks)]
    for step in range(start, stop):
        for virtual_rank in range(2):
            writers[virtual_rank % ranks].record(step // 10, step, virtual_rank, [100 * step + virtual_rank])
    for writer in writers:
        writer.close()


def test_one_attempt_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    run_attempt(tmp_path / "ledger", 1, 0, 3, ranks=2)
    records = read_ledger(tmp_path / "ledger")
    assert [(r.step, r.virtual_rank, r.ids, r.epoch, r.attempt) for r in records] == [
        (step, v, (100 * step + v,), 0, 1) for step in range(3) for v in range(2)
    ]


@given(data=st.data())
def test_after_any_kills_each_step_counts_once_and_comes_from_the_newest_attempt(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    owner: dict[int, int] = {}
    reached = 0
    for attempt in range(1, data.draw(st.integers(1, 4)) + 1):
        start = data.draw(st.integers(0, reached))
        reached = start + data.draw(st.integers(0, 5))
        run_attempt(folder, attempt, start, reached, ranks=data.draw(st.integers(1, 2)))
        owner = {step: by for step, by in owner.items() if step < start} | dict.fromkeys(range(start, reached), attempt)
    assert [(r.step, r.virtual_rank, r.attempt) for r in read_ledger(folder)] == [
        (step, v, owner[step]) for step in sorted(owner) for v in range(2)
    ]


def test_a_line_cut_by_a_kill_is_not_a_record(tmp_path: Path) -> None:
    run_attempt(tmp_path, 1, 0, 2)
    path = tmp_path / "attempt-0001.rank-0000.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert len(read_ledger(tmp_path)) == max(0, whole[:length].count(b"\n") - 1)


def test_an_attempt_number_used_twice_is_refused(tmp_path: Path) -> None:
    run_attempt(tmp_path, 1, 0, 2)
    with pytest.raises(FileExistsError, match="count on"):
        LedgerWriter(tmp_path, 1, 0, start_step=0)


def test_two_ranks_that_did_the_same_work_are_found_out(tmp_path: Path) -> None:
    for rank in range(2):
        LedgerWriter(tmp_path, 1, rank, start_step=0).record(0, 5, 1, [7])
    with pytest.raises(ValueError, match="step 5 of virtual rank 1 is there twice"):
        read_ledger(tmp_path)


def test_ranks_that_disagree_about_the_start_are_found_out(tmp_path: Path) -> None:
    for rank in range(2):
        LedgerWriter(tmp_path, 1, rank, start_step=rank)
    with pytest.raises(ValueError, match="started at step 1, another rank says 0"):
        read_ledger(tmp_path)


@given(skipped=st.sets(st.integers(0, 9)), cut=st.integers(0, 10))
def test_a_batch_left_out_is_in_the_ledger_once_and_says_so(tmp_path_factory: pytest.TempPathFactory, skipped: set[int], cut: int) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    for attempt, start, stop in ((1, 0, 10), (2, cut, 10)):  # the first trained on them all
        writer = LedgerWriter(folder, attempt, 0, start_step=start)
        for step in range(start, stop):
            writer.record(0, step, 0, [step], skipped=attempt == 2 and step in skipped)
        writer.close()
    records = read_ledger(folder)
    assert [record.ids for record in records] == [(step,) for step in range(10)]
    assert {record.step for record in records if record.skipped} == {step for step in skipped if step >= cut}
