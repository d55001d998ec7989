"""A rank without images: a few weights that each step changes, and everything else as in trainer/rank/worker.py.

It stands in for `train_rank` in the processes of benchmarks/faults/control.py. It joins, restores, saves, waits, stops, exports and hands
in its result through the product's own code (join, restore, Saver, finish). What it leaves out is the data, the model and the collectives:
the ranks of an attempt, threads of one process, meet at a barrier after each step.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.faults.calls import this_life
from cluster.rank import RankContext
from cluster.storage import open_storage
from cluster.store import Store
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import open_dataset
from trainer.learn.state import TrainState
from trainer.learn.step import StepStats
from trainer.rank import finishing
from trainer.rank.guard import Guard
from trainer.rank.history import History, RankTotals, Speed
from trainer.rank.observers import BeatStats, CurveLog, FirstStep
from trainer.rank.saving import Saver, restore
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank, join
from trainer.settings.spec import WorkerSpec, make_order
from trainer.tasks.info import CLASSIFICATION

PEER_GONE = "Connection closed by peer"


@dataclass(kw_only=True, slots=True)
class Script:
    """What the ranks of one process go through. `deaths`: (rank, steps done) at which a rank's process dies, each once."""

    step_seconds: float = 0.01
    deaths: set[tuple[int, int]] = field(default_factory=set)
    quarantines_at: int = 0
    """Step at which rank 0 reports a sample that it cannot read; 0: never."""
    on_step: Callable[[int], None] = lambda steps_done: None
    """Called by rank 0 after each step."""
    event_every: int = 0
    """Rank 0 writes an event after so many steps; 0: never."""
    evaluation_every: int = 0
    evaluation: Callable[[int], dict[str, Any]] = lambda steps_done: {}
    """What an evaluation after so many steps adds to the run's history."""


SCRIPT = Script()
_meetings: dict[int, "Meeting"] = {}
_lock = threading.Lock()
_orders: dict[str, Order] = {}


class Meeting:
    """Where the ranks of one attempt meet after each step, as in a collective. It breaks when one of them dies."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._changed = threading.Condition()
        self._at: dict[int, int] = {}
        self._lives: list[Any] = []

    def join(self) -> None:
        with self._changed:
            self._lives.append(this_life())

    def wait(self, rank: int, step: int) -> None:
        life = this_life()
        with self._changed:
            self._at[rank] = step
            self._changed.notify_all()
            while len(self._at) < self._ranks or min(self._at.values()) < step:
                life.check()
                if any(one.is_dead for one in self._lives):
                    raise RuntimeError(PEER_GONE)
                self._changed.wait(0.01)


def meeting(attempt: int, ranks: int) -> Meeting:
    with _lock:
        return _meetings.setdefault(attempt, Meeting(ranks))


def order_of(spec: WorkerSpec) -> Order:
    """Read once in a process: reading the data set is not what is tested."""
    assert spec.dataset is not None
    with _lock:
        if spec.dataset not in _orders:
            _orders[spec.dataset] = make_order(spec.config, open_dataset(spec.dataset))
        return _orders[spec.dataset]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """A step: weights that depend on all steps before, in order. Returns the loss."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.cos(parameter * (number + 2) + step)
    optimizer.step()
    return 1.0 / (step + 1)


def train_rank(spec: WorkerSpec, context: RankContext) -> None:
    """Everything that one rank does in one attempt."""
    me = join(spec, context)
    order = order_of(spec)
    shared = blocks_of_virtual_ranks(order.virtual_ranks, me.world_size, me.rank)
    loader = SimpleNamespace(cache="off", backend_name="none", decode_seconds=0.0, shape=(28, 28))
    data: Any = SimpleNamespace(
        order=order,
        samples_of=lambda step: order.batch_size,
        virtual_ranks=shared,
        share=1 / me.world_size,
        loader=loader,
        dataset=open_dataset(spec.dataset or ""),
    )
    model = nn.Linear(16, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    storage = open_storage(spec.config.storage, spec.config.cluster.storage_retry_seconds)
    store = Store.open(storage, spec.config.run)
    state = TrainState(model, optimizer)
    memory = restore(store, spec.resume, state, me.waits)
    plan = StepPlan.of(spec.config, order.steps_per_epoch, start_step=memory.start_step)
    guard = Guard(spike_factor=0.0, batch_size=order.batch_size, samples_of=data.samples_of)
    guard.load(memory.history.guard)
    saver = Saver(me, data, plan, store=store, state=state, memory=memory, guard=guard, weights=None)
    speed, totals = Speed(), RankTotals(share=data.share)
    observers: list[Any] = [FirstStep(me, plan.start_step), guard, totals, memory.history, speed]
    observers += [
        CurveLog(memory.curves, speed, plan, attempt=spec.attempt),
        BeatStats(me.heartbeat, memory.history, speed, CLASSIFICATION),
    ]
    me.heartbeat.tick("step")
    me.tell("training_started", step=plan.start_step, cache="off", backend="none")
    learner: Any = SimpleNamespace(model=model, ema=None, device=torch.device("cpu"), task=SimpleNamespace(info=CLASSIFICATION))
    try:
        stopped, steps_done = _steps(me, plan, saver, observers, memory.history, lambda step: update(model, optimizer, step))
        totals.stalled(saver.stall_seconds)
        saver.wait_until_saved(steps_done)
        if me.rank == 0:
            ranks = totals.of_all_ranks(0, 1, me.device)
            finishing.finish(me, storage, learner, data, memory, ranks=ranks, stopped=stopped, steps_done=steps_done)
    finally:
        saver.close()
        me.heartbeat.close()
        me.server.close()


def _steps(
    me: ThisRank,
    plan: StepPlan,
    saver: Saver,
    observers: list[Any],
    history: History,
    step_once: Callable[[int], float],
) -> tuple[bool, int]:
    """(whether all ranks were asked to stop before the last step, steps done)"""
    together = meeting(me.spec.attempt, me.world_size)
    together.join()
    done = plan.start_step
    for step in range(plan.start_step, plan.total_steps):
        began = time.perf_counter()
        time.sleep(SCRIPT.step_seconds)
        loss = step_once(step)
        together.wait(me.rank, step)
        done = step + 1
        stats = StepStats(
            steps_done=done,
            epoch=step // plan.steps_per_epoch,
            samples=me.config.data.batch_size,
            learning_rate=0.01,
            step_seconds=time.perf_counter() - began,
            data_wait_seconds=0.0,
            losses=((step, loss),),
        )
        for observer in observers:
            observer.stepped(stats)
        _events(me, done)
        if SCRIPT.evaluation_every and done % SCRIPT.evaluation_every == 0:
            history.evaluated(SCRIPT.evaluation(done), 0.001)
        stopped = not plan.is_last(done) and me.heartbeat.should_stop(done)
        if saver.is_due(done) or stopped:
            saver.save(done, stats.late)
        if stopped:
            return True, done
    return False, done


def _events(me: ThisRank, done: int) -> None:
    if me.rank == 0:
        SCRIPT.on_step(done)
        if SCRIPT.event_every and done % SCRIPT.event_every == 0:
            me.tell("note", step=done)
        if done == SCRIPT.quarantines_at:
            record = {"key": "train/00007", "reason": "truncated: no IEND", "split": "train", "sample_id": 7, "kind": "truncated"}
            me.call("quarantine", [record])
    if (me.rank, done) in SCRIPT.deaths:
        SCRIPT.deaths.discard((me.rank, done))
        life = this_life()
        life.end(-9)  # type: ignore[attr-defined]
        life.check()


def export_model(*, storage: Any, run: str, tensors: Any, **_: Any) -> None:
    """In place of trainer.export's: one small file, written in the same way."""
    storage.write_atomic(f"{run}/model/model.safetensors", b"weights")
