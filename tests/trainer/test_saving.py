"""A rank that waits for its checkpoints is seen to wait for what it really waits for. Real heartbeat, checkpointer and hang watch."""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cluster.beat import CHECKPOINT, EVALUATION, STEP, STORAGE, BeatReply
from cluster.commits import CheckpointNews
from cluster.config import ClusterConfig
from cluster.hang import HangWatch, Sign
from cluster.heartbeat import Heartbeat
from cluster.storage import open_storage
from cluster.store import Receipt, StorageFull
from trainer.learn.state import MODEL_FILE, OPTIMIZER_FILE, TrainState
from trainer.rank.data import read_wait
from trainer.rank.guard import Guard
from trainer.rank.history import Curves
from trainer.rank.saving import CURVES_FILE, HISTORY_FILE, CheckpointNotSaved, Memory, Saver, snapshot_files
from trainer.rank.step_plan import StepPlan
from trainer.settings.tree import RunConfig, TrainConfig

TEN = StepPlan(start_step=0, total_steps=100, steps_per_epoch=10, eval_every_epochs=1)


class Rank:
    """Rank 1 of two: its part of a checkpoint is a small file. `gate` holds up the storage, `error` makes it refuse."""

    def __init__(self, folder: Path, plan: StepPlan = TEN) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: OSError | None = None
        self.committed = False
        self.news = CheckpointNews(last=None, failures=0, problem="", is_refused=False, failed_steps=frozenset())
        self.heartbeat = Heartbeat(lambda beat: BeatReply(stop_at=None, confirmed=False), 1, 1, 60.0, start_step=0)
        self.heartbeat.tick(STEP)
        me: Any = SimpleNamespace(
            config=RunConfig(run="run", train=TrainConfig(checkpoint_every=5), cluster=ClusterConfig(spill_dir=str(folder))),
            spec=SimpleNamespace(generation=1, attempt=1, threads=1),
            rank=1,
            world_size=2,
            device=torch.device("cpu"),
            metrics=SimpleNamespace(add=lambda *_: None, observe=lambda *_: None),
            heartbeat=self.heartbeat,
            call=self.call,
        )
        self.saver = Saver(
            me,
            SimpleNamespace(virtual_ranks=range(1), samples_of=lambda step: 1),  # type: ignore[arg-type]
            plan,
            store=SimpleNamespace(storage=open_storage(folder), stage=self.stage),  # type: ignore[arg-type]
            state=None,  # type: ignore[arg-type]
            memory=Memory(),
            guard=SimpleNamespace(proof=lambda late: lambda: None),  # type: ignore[arg-type]
            weights=None,
        )

    def stage(self, step: int, generation: int, name: str, buffers: Any, **_: Any) -> Receipt:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return Receipt(name=name, size_bytes=1, sha256="")

    def call(self, method: str, *args: Any, **_: Any) -> Any:
        match method:
            case "wait_committed":
                return self.committed
            case "status":
                return SimpleNamespace(checkpoints=self.news)
            case _:
                return None

    def sign(self) -> Sign:
        return Sign(state="S", age_seconds=0.1, ticks=self.heartbeat._ticks, phase=self.heartbeat.phase)


@pytest.fixture
def rank(tmp_path: Path) -> Any:
    rank = Rank(tmp_path)
    yield rank
    rank.gate.set()
    rank.saver.close()
    rank.heartbeat.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_checkpoint_is_due_at_its_interval_and_after_an_evaluation_and_not_for_every_short_epoch(tmp_path: Path) -> None:
    plan = StepPlan(start_step=0, total_steps=28, steps_per_epoch=2, eval_every_epochs=4)
    rank = Rank(tmp_path, plan)
    try:
        due = []
        for step in range(1, plan.total_steps + 1):
            if rank.saver.is_due(step):
                due.append(step)
                rank.saver._interval.saved(step)
        assert due == [5, 8, 10, 15, 16, 20, 24, 25, 28], "every 5 steps; the evaluations are at 8, 16, 24 and the end"
    finally:
        rank.saver.close()
        rank.heartbeat.close()


def test_the_curves_of_a_checkpoint_are_those_of_its_step_and_written_down_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": step, "attempt": 1, **dict.fromkeys(("epoch", "time", "train_loss", "learning_rate"), 0.5)} for step in range(3)]
    memory, model = Memory(), torch.nn.Linear(2, 2)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    threads = []
    to_parquet = Curves.to_parquet

    def noted(curves: Curves) -> bytes:
        threads.append(threading.current_thread())
        return to_parquet(curves)

    monkeypatch.setattr(Curves, "to_parquet", noted)
    for row in rows[:2]:
        memory.curves.add(**row)
    files = snapshot_files(
        state,
        memory,
        lambda: Guard(spike_factor=0.0, batch_size=1, samples_of=lambda step: 1),
        lambda history, guard: history.to_json(),
        rank=0,
        step=2,
        virtual_ranks=range(1),
        threads=1,
    )
    assert threads == []  # nothing of it on the step path
    memory.curves.add(**rows[2])
    contents: dict[str, bytes] = {}
    writer = threading.Thread(target=lambda: contents.update({name: b"".join(buffers) for name, buffers in files()}))
    writer.start()
    writer.join(20)
    assert threads == [writer]
    assert pq.read_table(io.BytesIO(contents[CURVES_FILE])).column("step").to_pylist() == [0, 1]
    assert list(contents) == [MODEL_FILE, OPTIMIZER_FILE, "rank-00000.json", CURVES_FILE, HISTORY_FILE]


def test_a_save_that_waits_for_a_stalled_disk_is_no_hang_however_long(rank: Rank) -> None:
    """Each tick of the rank stands for a minute here, the budget of a hang."""
    rank.gate.clear()
    rank.saver.save(5, ())
    watch, now = HangWatch(hang_seconds=60.0, start_seconds=600.0, now=0.0), 0.0
    saving = threading.Thread(target=lambda: rank.saver.save(10, ()))
    saving.start()
    until(lambda: rank.heartbeat.phase == STORAGE)
    for _ in range(2):
        ticks = rank.sign().ticks
        until(lambda ticks=ticks: rank.sign().ticks > ticks)  # type: ignore[misc]
        for _ in range(59):
            now += 1.0
            assert watch.look(now, {0: Sign(state="S", age_seconds=0.1, ticks=7, phase="exchange"), 1: rank.sign()}) is None
    rank.gate.set()
    saving.join(20)
    assert rank.heartbeat.phase == STEP
    rank.committed = True
    rank.saver.wait_until_saved(10)


def test_the_end_waits_for_the_commit_and_says_what_became_of_the_last_checkpoint(rank: Rank) -> None:
    rank.saver.save(5, ())
    waiting = threading.Thread(target=lambda: rank.saver.wait_until_saved(5))
    waiting.start()
    until(lambda: rank.heartbeat.phase == CHECKPOINT)
    rank.committed = True
    waiting.join(20)
    assert rank.heartbeat.phase == STEP
    rank.committed = False
    for is_refused, kind in ((False, "infrastructure"), (True, "storage")):
        rank.news = replace(rank.news, failed_steps=frozenset({5}), problem="no room at the coordinator's", is_refused=is_refused)
        with pytest.raises(CheckpointNotSaved, match=r"of step 5, could not be saved: no room at the coordinator's") as raised:
            rank.saver.wait_until_saved(5)
        assert raised.value.failure_kind == kind


def test_a_last_checkpoint_that_the_storage_refused_ends_in_the_storages_own_error(rank: Rank) -> None:
    """Its kind decides whether another attempt is worth it."""
    rank.error = StorageFull(28, "no room for a file of 45.0 MB")
    rank.saver.save(5, ())
    with pytest.raises(StorageFull, match="no room for a file"):
        rank.saver.wait_until_saved(5)


def test_a_batch_that_waits_for_a_read_is_a_wait_for_a_storage_and_then_the_phase_is_what_it_was(rank: Rank) -> None:
    on_read_wait = read_wait(rank.heartbeat)
    for phase in (STEP, EVALUATION):
        rank.heartbeat.tick(phase)
        for _ in range(3):
            before = rank.sign().ticks
            on_read_wait(True)
            assert (rank.heartbeat.phase, rank.sign().ticks) == (STORAGE, before + 1)
        on_read_wait(False)
        assert rank.heartbeat.phase == phase
