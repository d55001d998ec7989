"""What is recorded of each test sample is what the evaluation counted: over any batches, any number of ranks, and where room is short."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dataio.parquet import open_dataset
from trainer.learn.step import StepStats
from trainer.rank.history import RankTotals
from trainer.tasks.classification import Answers, Evaluation
from trainer.tasks.predictions import About, Predictions, named, worst_first

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
CLASSES = 5


def drawn(count: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Ids in a mixed order, logits with ties among them, labels of which some could not be read."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (count, CLASSES), generator=generator).bfloat16()
    labels = torch.randint(-1, CLASSES, (count,), generator=generator)
    return torch.randperm(count, generator=generator).numpy(), logits, labels


def about(**changes: object) -> About:
    return About(**{"step": 7, "split": "test", "dataset_fingerprint": "ab", "count": 0, **changes})  # type: ignore[arg-type]


def recorded(ids: np.ndarray, logits: Tensor, labels: Tensor, *, limit: int, batch: int) -> Predictions:
    answers = Answers(limit)
    for start in range(0, len(ids), batch):
        cut = slice(start, start + batch)
        answers.update(ids[cut], logits[cut], labels[cut])
    found = answers.gathered(0, 1)
    assert found is not None
    return named(*found, open_dataset(SAMPLE).split("test"), about(count=int((labels >= 0).sum())))


@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 20))
def test_counting_the_predictions_gives_the_confusion_matrix(count: int, seed: int, batch: int) -> None:
    ids, logits, labels = drawn(count, seed)
    labels[0] = 0
    evaluation = Evaluation(CLASSES)
    evaluation.update(logits, labels)
    result = evaluation.result()
    found = recorded(ids, logits, labels, limit=1000, batch=batch)
    assert found.is_complete
    assert found.confusion(CLASSES).tolist() == [list(row) for row in result.confusion]
    assert found.losses.astype(np.float64).mean() == pytest.approx(result.loss, rel=1e-6)
    assert found.ids.tolist() == sorted(ids[labels.numpy() >= 0].tolist())
    assert found.keys == open_dataset(SAMPLE).split("test").keys(found.ids)
    again = Predictions.from_parquet(found.to_parquet())
    assert (again.about, list(again.keys)) == (found.about, list(found.keys))
    for name in ("ids", "labels", "answers", "confidence", "losses"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name


@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20))
def test_where_there_is_no_room_for_all_the_worst_are_kept(count: int, seed: int, batch: int, limit: int) -> None:
    ids, logits, labels = drawn(count, seed)
    whole = recorded(ids, logits, labels, limit=1000, batch=batch)
    kept = recorded(ids, logits, labels, limit=limit, batch=batch)
    assert len(kept.ids) == min(limit, len(whole.ids))
    assert kept.is_complete == (len(whole.ids) <= limit)

    def badness(found: Predictions) -> list[tuple[bool, float]]:
        wrong = found.labels != found.answers
        return sorted(zip((~wrong).tolist(), np.where(wrong, -found.confidence, found.confidence).tolist(), strict=True))

    assert badness(kept) == badness(whole)[: len(kept.ids)]


def test_sure_mistakes_come_before_unsure_ones_and_those_before_what_is_right() -> None:
    found = Predictions(
        about=about(count=5),
        ids=np.arange(5),
        keys=list("abcde"),
        labels=np.array([0, 0, 0, 0, 0]),
        answers=np.array([0, 1, 2, 0, 1]),
        confidence=np.array([0.9, 0.5, 0.8, 0.3, 0.8], np.float32),
        losses=np.zeros(5, np.float32),
    )
    assert [found.keys[row] for row in worst_first(found)] == ["c", "e", "b", "d", "a"]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}"])
def test_what_is_no_file_of_predictions_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it is no file of predictions"):
        Predictions.from_parquet(data)


def test_another_table_is_refused() -> None:
    table = (SAMPLE / "test-00000.parquet").read_bytes()
    with pytest.raises(ValueError, match="its columns are image, label, key, sha256"):
        Predictions.from_parquet(table)


COUNT, WORLD = 25, 3


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    ids, logits, labels = drawn(COUNT, 3)
    answers = Answers(1000)
    share = slice(0, 0) if rank == 1 else slice(0, 10) if rank == 0 else slice(10, COUNT)  # rank 1 has no sample at all
    if rank != 1:
        answers.update(ids[share], logits[share], labels[share])
    found = answers.gathered(rank, WORLD)
    assert (found is None) == (rank != 0)
    own = RankTotals()
    for step in range(rank + 1):
        stats = StepStats(
            steps_done=step, epoch=0, samples=8, learning_rate=0.1, step_seconds=0.5, data_wait_seconds=0.125, losses=(), skipped=step == 1
        )
        own.stepped(stats, 0.25, 0.5)
    own.checkpoint_stall_seconds = float(rank)
    table = own.of_all_ranks(rank, WORLD, torch.device("cpu"))
    if rank == 0:
        assert found is not None
        np.savez(f"{folder}/found.npz", ints=found[0], floats=found[1])
        names = ("steps", "images", "step_seconds", "data_wait_seconds", "exchange_wait_seconds", "checkpoint_stall_seconds")
        done = (1, 1, 2)  # the batch that was left out is no step
        assert table == [
            dict(zip(names, (n, 4.0 * n, 0.5 * n, 0.125 * n, 0.25 * n, float(index)), strict=True)) for index, n in enumerate(done)
        ]
    dist.destroy_process_group()


def test_ranks_with_unequal_shares_hand_in_every_sample_once(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=WORLD)
    ids, logits, labels = drawn(COUNT, 3)
    alone = Answers(1000)
    alone.update(ids, logits, labels)
    expected = alone.gathered(0, 1)
    assert expected is not None
    found = np.load(tmp_path / "found.npz")
    assert np.array_equal(found["ints"], expected[0])
    assert np.array_equal(found["floats"], expected[1])
