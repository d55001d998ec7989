"""What is recorded of each test sample is what the evaluation counted: over any batches, any number of ranks, and where room is short."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataio.parquet import open_dataset
from dataio.schema import Target
from trainer.learn.step import StepStats
from trainer.rank.history import RankTotals
from trainer.settings.tree import TaskConfig
from trainer.tasks.classification import LABEL_COLUMNS, Classification, LabelEvaluation
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import LIMIT, About, Predictions, Recorded, named, rows_to_keep, worst_first

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
CLASSES = 5
TARGET = Target(name="label", kind="label", classes=tuple("abcde"))
TASK = Classification(TaskConfig(), (TARGET,))
TODAY = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("prediction", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
    ]
)
"""Of a classification's file, as tools read it."""


def drawn(count: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Ids in a mixed order, logits with ties among them, labels of which some could not be read."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (count, CLASSES), generator=generator).bfloat16()
    labels = torch.randint(-1, CLASSES, (count,), generator=generator)
    return torch.randperm(count, generator=generator).numpy(), logits, labels


def about(**changes: object) -> About:
    return About(**{"step": 7, "split": "test", "dataset_fingerprint": "ab", "count": 0, **changes})  # type: ignore[arg-type]


def logged(ids: np.ndarray, logits: Tensor, labels: Tensor, *, limit: int, batch: int) -> Recorded:
    log = PredictionLog(LABEL_COLUMNS, limit)
    for start in range(0, len(ids), batch):
        cut = slice(start, start + batch)
        log.update(ids[cut], TASK.rows(logits[cut], {"label": labels[cut]}))
    found = log.gathered(0, 1)
    assert found is not None
    return found


def recorded(ids: np.ndarray, logits: Tensor, labels: Tensor, *, limit: int, batch: int) -> Predictions:
    found = logged(ids, logits, labels, limit=limit, batch=batch)
    return named(found, open_dataset(SAMPLE).split("test"), about(count=int((labels >= 0).sum())))


@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 20))
def test_counting_the_predictions_gives_the_confusion_matrix(count: int, seed: int, batch: int) -> None:
    ids, logits, labels = drawn(count, seed)
    labels[0] = 0
    evaluation = LabelEvaluation(TARGET)
    evaluation.update(logits, {"label": labels})
    result = evaluation.result()
    found = recorded(ids, logits, labels, limit=1000, batch=batch)
    assert found.is_complete
    assert found.confusion(CLASSES).tolist() == result.details["confusion"]
    assert found.losses.astype(np.float64).mean() == pytest.approx(result.loss, rel=1e-6)
    assert found.ids.tolist() == sorted(ids[labels.numpy() >= 0].tolist())
    assert found.keys == open_dataset(SAMPLE).split("test").keys(found.ids)
    again = Predictions.from_parquet(found.to_parquet())
    assert (again.about, list(again.keys)) == (found.about, list(found.keys))
    for name in ("ids", "labels", "answers", "confidence", "losses"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
    assert pq.read_schema(io.BytesIO(found.to_parquet())).equals(TODAY)


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
        columns={
            "label": np.array([0, 0, 0, 0, 0], np.int32),
            "prediction": np.array([0, 1, 2, 0, 1], np.int32),
            "confidence": np.array([0.9, 0.5, 0.8, 0.3, 0.8], np.float32),
            "loss": np.zeros(5, np.float32),
        },
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
    log = PredictionLog(LABEL_COLUMNS, 1000)
    share = slice(0, 0) if rank == 1 else slice(0, 10) if rank == 0 else slice(10, COUNT)  # rank 1 has no sample at all
    if rank != 1:
        log.update(ids[share], TASK.rows(logits[share], {"label": labels[share]}))
    found = log.gathered(rank, WORLD)
    assert (found is None) == (rank != 0)
    own = RankTotals(share=0.5)
    for step in range(rank + 1):
        stats = StepStats(
            steps_done=step,
            epoch=0,
            samples=8,
            learning_rate=0.1,
            step_seconds=0.5,
            data_wait_seconds=0.125,
            losses=(),
            skipped=step == 1,
            exchange_seconds=0.25,
        )
        own.stepped(stats)
    own.stalled(float(rank))
    table = own.of_all_ranks(rank, WORLD, torch.device("cpu"))
    if rank == 0:
        assert found is not None
        np.savez(f"{folder}/found.npz", ids=found.ids, **found.columns)
        names = ("steps", "images", "step_seconds", "data_wait_seconds", "exchange_wait_seconds", "checkpoint_stall_seconds")
        done = (1, 1, 2)  # the batch that was left out is no step
        assert table == [
            dict(zip(names, (n, 4.0 * n, 0.5 * n, 0.125 * n, 0.25 * n, float(index)), strict=True)) for index, n in enumerate(done)
        ]
    dist.destroy_process_group()


def test_ranks_with_unequal_shares_hand_in_every_sample_once(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=WORLD)
    ids, logits, labels = drawn(COUNT, 3)
    alone = logged(ids, logits, labels, limit=1000, batch=COUNT)
    found = np.load(tmp_path / "found.npz")
    assert np.array_equal(found["ids"], alone.ids)
    for name, column in alone.columns.items():
        assert np.array_equal(found[name], column), name


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20))
def test_the_rows_kept_and_their_order_are_those_of_sorting_by_mistake_and_confidence(
    count: int, seed: int, batch: int, limit: int
) -> None:
    """Bit for bit what was kept before tasks had columns of their own."""
    ids, logits, labels = drawn(count, seed)
    found = logged(ids, logits, labels, limit=limit, batch=batch)
    kept_ids, kept_ints, kept_floats = kept_before(ids, logits, labels, limit=limit, batch=batch)
    known = kept_ints[:, 0] >= 0
    assert np.array_equal(found.ids, kept_ids[known])
    assert np.array_equal(np.stack([found.columns["label"], found.columns["prediction"]], 1), kept_ints[known])
    assert np.array_equal(np.stack([found.columns["confidence"], found.columns["loss"]], 1), kept_floats[known])


def kept_before(ids: np.ndarray, logits: Tensor, labels: Tensor, *, limit: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference: int and float rows in two tensors, cut as they were."""
    ints, floats = torch.empty((0, 3), dtype=torch.int64), torch.empty((0, 2))

    def cut() -> None:
        nonlocal ints, floats
        if len(ints) > limit:
            confidence = floats[:, 0].nan_to_num(0.0)
            badness = torch.where(ints[:, 1] != ints[:, 2], 2.0 + confidence, 1.0 - confidence)
            badness = torch.where(ints[:, 1] == -1, -1.0, badness)
            worst = badness.sort(descending=True, stable=True).indices[:limit]
            ints, floats = ints[worst], floats[worst]

    for start in range(0, len(ids), batch):
        few, theirs = logits[start : start + batch].double(), labels[start : start + batch]
        answers = few.argmax(1)
        confidence = few.softmax(1).gather(1, answers[:, None])[:, 0]
        losses = torch.nn.functional.cross_entropy(few, theirs, reduction="none", ignore_index=-1)
        ints = torch.cat([ints, torch.stack([torch.from_numpy(ids[start : start + batch]), theirs, answers], 1)])
        floats = torch.cat([floats, torch.stack([confidence, losses], 1).float()])
        if len(ints) >= 2 * limit:
            cut()
    cut()
    return ints[:, 0].numpy(), ints[:, 1:].numpy(), floats.numpy()


def test_columns_of_lists_come_back_as_they_were() -> None:
    found = Predictions(
        about=about(count=3),
        ids=np.arange(3),
        keys=list("abc"),
        columns={"probabilities": np.arange(6, dtype=np.float32).reshape(3, 2), "labels": np.array([[0, 1], [255, 1], [0, 0]], np.uint8)},
    )
    again = Predictions.from_parquet(found.to_parquet())
    assert {name: column.tolist() for name, column in again.columns.items()} == {
        "probabilities": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
        "labels": [[0, 1], [255, 1], [0, 0]],
    }
    assert [again.columns[name].dtype for name in found.columns] == [np.float32, np.uint8]
    assert not again.is_classification
    with pytest.raises(ValueError, match="no column label, only probabilities, labels"):
        _ = again.labels


def test_fewer_samples_are_recorded_where_rows_are_long() -> None:
    assert rows_to_keep(LABEL_COLUMNS) == LIMIT
    long = {"probabilities": pa.list_(pa.float32(), 10_000)}
    assert rows_to_keep(long) * (4 * 10_000 + 8) <= 256 * 2**20 < (rows_to_keep(long) + 1) * (4 * 10_000 + 8)
