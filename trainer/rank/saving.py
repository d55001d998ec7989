"""A rank's checkpoints: when one is due, what it holds, and that none with bad numbers counts. worker.py calls `Saver`.

trainer.learn.state copies the state, cluster.checkpointer brings it into the storage, and the coordinator commits it.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cluster.beat import CHECKPOINT, STORAGE
from cluster.checkpointer import Buffers, Checkpointer, Files
from cluster.commits import CheckpointNews
from cluster.failures import CheckpointNotSaved, is_refusal
from cluster.interval import AUTO, IntervalChooser, SharedInterval
from cluster.spill import Spill, is_another_disk
from cluster.store import Receipt, Store
from cluster.verify import WeightsCheck
from cluster.versions import versions
from cluster.waiting import OUTAGE_PATIENCE_SECONDS, Waits
from dataio.codecs.image.decode import DECODER_VERSIONS
from trainer.learn.build import Learner
from trainer.learn.state import TrainState
from trainer.learn.step import Arriving, StepStats
from trainer.rank.best import BestWeights
from trainer.rank.data import RankData
from trainer.rank.guard import Guard
from trainer.rank.history import Curves, History
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank
from trainer.settings.spec import ResumePoint

HISTORY_FILE = "history.json"
CURVES_FILE = "curves.parquet"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Memory:
    """What a checkpoint holds besides the training state, and the step after which it was made."""

    start_step: int = 0
    history: History = field(default_factory=History)
    curves: Curves = field(default_factory=Curves)
    best: BestWeights | None = None
    """Rank 0's, if the run keeps the weights of its best evaluation."""


def restore(store: Store, resume: ResumePoint | None, state: TrainState, waits: Waits, best: BestWeights | None = None) -> Memory:
    """Load the commit to go on from into `state`, and into `best`. Returns its memory; without a commit, an empty one."""
    if resume is None:
        return Memory(best=best)
    what = f"the checkpoint of step {resume.step}"
    commit = waits.call(lambda: store.load(resume.step, resume.generation, path=resume.path), what)

    def read(name: str) -> bytes:
        return waits.call(lambda: commit.read(name), f"{name} of {what}")

    state.load(read)
    history = History.from_json(read(HISTORY_FILE))
    if best is not None:
        best.restore(commit.step, history.evaluations, read)
    return Memory(start_step=commit.step, history=history, curves=Curves.from_parquet(read(CURVES_FILE)), best=best)


def weights_check(me: ThisRank, learner: Learner) -> WeightsCheck | None:
    """The check of all tensors that must be equal on every rank; None if the run compares nothing."""
    train, model, ema = me.config.train, learner.model, learner.ema
    same: list[Tensor] = list(model.parameters())
    if train.reduction == "tree" or me.world_size == 1:  # in ddp mode the ranks' BatchNorm statistics differ by design
        same += [*model.buffers(), *(ema.weights().values() if ema is not None else ())]
        same += [learner.semi.running] if learner.semi is not None else []
    return WeightsCheck(same, world_size=me.world_size) if train.verify_every else None


def interval_chooser(me: ThisRank, steps_per_epoch: int) -> IntervalChooser | None:
    """Rank 0's chooser, if measurements decide how often to save; else None."""
    if me.rank != 0 or me.config.train.checkpoint_every != AUTO:
        return None
    return IntervalChooser(
        workers=me.world_size,
        steps_per_epoch=steps_per_epoch,
        mtbf_hours=me.config.cluster.mtbf_hours,
        failures=me.spec.failures,
        observed_seconds=me.spec.observed_seconds,
    )


class Saver:
    """Saves a checkpoint after the steps that need one, the same steps on all ranks."""

    def __init__(
        self,
        me: ThisRank,
        data: RankData,
        plan: StepPlan,
        *,
        store: Store,
        state: TrainState,
        memory: Memory,
        guard: Guard,
        weights: WeightsCheck | None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        """`guard` must have seen every loss that has arrived. `on_begin` is called before each checkpoint."""
        self._me, self._data, self._plan, self._store, self._state = me, data, plan, store, state
        self._memory, self._guard, self._weights, self._on_begin = memory, guard, weights, on_begin
        self._chooser = interval_chooser(me, plan.steps_per_epoch)
        self._interval = SharedInterval(
            me.config.train.checkpoint_every,
            start_step=memory.start_step,
            steps_per_epoch=plan.steps_per_epoch,
            chooser=self._chooser,
            world_size=me.world_size,
            device=me.device,
        )
        cluster, spec, storage = me.config.cluster, me.spec, store.storage
        has_spill = is_another_disk(cluster.spill_dir, storage)
        self._failed: dict[int, OSError] = {}
        self._checkpointer = Checkpointer(
            stage=self._stage,
            ack=lambda step, receipts, meta: me.call("ack", spec.attempt, me.rank, step, receipts, meta),
            on_staged=self._staged,
            on_failed=self._on_failed,
            on_event=lambda event, fields: me.call("event", event, attempt=spec.attempt, rank=me.rank, **fields),
            on_wait=self._on_wait,
            spill=Spill(cluster.spill_dir, me.config.run, spec.generation, me.rank, storage) if has_spill else None,
            may_stall=storage.is_local,
        )

    @property
    def stall_seconds(self) -> float:
        """How long checkpoints have held up the steps of this attempt."""
        return self._checkpointer.stall_seconds

    def stepped(self, stats: StepStats) -> None:
        if self._chooser is not None:
            self._chooser.stepped(stats.step_seconds)

    def is_due(self, steps_done: int) -> bool:
        """Whether to save now: at the interval, and what an evaluation has measured. All ranks must ask after every step."""
        is_due = self._interval.due(steps_done)
        return is_due or self._plan.evaluates(steps_done)

    def save(self, step: int, late: Sequence[Arriving]) -> None:
        """Copy the state now and write it during the next steps. The guard has not seen the losses `late` (StepStats) yet."""
        self._on_begin()
        me, memory = self._me, self._memory
        verdict = self._weights.start(step) if self._weights is not None else None
        proof = self._guard.proof(late)
        samples_of = self._data.samples_of

        def proven() -> Guard:
            """Runs in the checkpoint's thread: no checkpoint counts until every loss up to it and its weights are found good."""
            if verdict is not None:
                verdict.wait()
            return proof()

        with me.heartbeat.during(me.heartbeat.phase):  # also when `_on_wait` has named others
            stall = self._checkpointer.save(
                step,
                lambda: self._files(step, proven, lambda history, guard: history.settled(guard, late, samples_of)),
                commit_meta(me, self._data, memory) if me.rank == 0 else {},
            )
        memory.history.stalled(stall)
        me.metrics.add("checkpoint_stall_seconds_total", stall)
        if self._chooser is not None:
            self._chooser.saved(stall)
        self._interval.saved(step)

    def wait_until_saved(self, steps_done: int) -> None:
        """Wait until the last checkpoint is committed, through an outage of the storage (waiting.OUTAGE_PATIENCE_SECONDS). OSError if it
        cannot be saved: the storage's own if this rank met it, else CheckpointNotSaved."""
        heartbeat, call = self._me.heartbeat, self._me.call
        with heartbeat.during(CHECKPOINT):
            self._checkpointer.wait()
            if steps_done in self._failed:
                raise self._failed[steps_done]
            heartbeat.tick(CHECKPOINT)  # `_on_wait` may have named others
            end = time.monotonic() + OUTAGE_PATIENCE_SECONDS
            while not call("wait_committed", steps_done, timeout=2.0):
                heartbeat.tick()
                news: CheckpointNews = call("status").checkpoints
                has_failed = steps_done in news.failed_steps
                if has_failed or time.monotonic() > end:
                    message = f"the last checkpoint, of step {steps_done}, could not be saved: {news.problem or 'no answer'}"
                    raise CheckpointNotSaved(message, is_refused=has_failed and news.is_refused)

    def close(self) -> None:
        self._checkpointer.close()

    def _stage(self, step: int, name: str, buffers: Buffers) -> Receipt:
        spec = self._me.spec
        return self._store.stage(step, spec.generation, name, buffers, attempt=spec.attempt, give_up=self._checkpointer.hurried)

    def _on_wait(self, phase: str) -> None:
        """In the main thread, about every second. A look at the storage is a tick; waiting for other ranks is only said once."""
        if phase == STORAGE or self._me.heartbeat.phase != phase:
            self._me.heartbeat.tick(phase)

    def _on_failed(self, step: int, error: OSError) -> None:
        self._failed[step] = error
        self._me.call("fail_checkpoint", self._me.spec.attempt, self._me.rank, step, str(error), is_refusal(error))

    def _staged(self, step: int, seconds: float, size_bytes: int) -> None:
        self._me.metrics.observe("checkpoint_stage_seconds", seconds)
        if self._chooser is not None:
            self._chooser.staged(seconds)

    def _files(self, step: int, proven: Callable[[], Guard], settle: Callable[[History, Guard], bytes]) -> Files:
        return snapshot_files(
            self._state,
            self._memory,
            proven,
            settle,
            rank=self._me.rank,
            step=step,
            virtual_ranks=self._data.virtual_ranks,
            threads=self._me.spec.threads,
        )


def snapshot_files(
    state: TrainState,
    memory: Memory,
    proven: Callable[[], Guard],
    settle: Callable[[History, Guard], bytes],
    *,
    rank: int,
    step: int,
    virtual_ranks: range,
    threads: int,
) -> Files:
    """Copy now what this rank saves. The returned function yields the files' contents later, after `proven` has found them good. `settle`
    writes the history down with the guard that has found them so. Rank 0 saves the replicated state; every rank saves its cursor."""
    cursor = {"rank": rank, "step": step, "virtual_ranks": [virtual_ranks.start, virtual_ranks.stop], "threads": threads}
    own: dict[str, Buffers] = {f"rank-{rank:05d}.json": [json.dumps(cursor).encode()]}
    if rank != 0:

        def cursor_alone() -> Iterator[tuple[str, Buffers]]:
            proven()
            yield from own.items()

        return cursor_alone
    snapshot, past, curves = state.snapshot(), memory.history.copy(), memory.curves.copy()

    def files() -> Iterator[tuple[str, Buffers]]:
        try:
            snapshot.wait()
            own[CURVES_FILE] = [curves.to_parquet()]  # here, as it takes some milliseconds
            own[HISTORY_FILE] = [settle(past, proven())]
            contents = snapshot.files()
            if memory.best is not None:
                own.update(memory.best.files(step, past.evaluations, contents))
            yield from contents.items()
            yield from own.items()
        finally:
            snapshot.release()

    return files


def commit_meta(me: ThisRank, data: RankData, memory: Memory) -> dict[str, Any]:
    """The manifest's entries besides the files: enough to refuse a resume that would not give the same run."""
    spec, order = me.spec, data.order
    return {
        "run": spec.config.run,
        "attempt": spec.attempt,
        "world_size": me.world_size,
        "virtual_ranks": order.virtual_ranks,
        "threads": spec.threads,
        "dataset_fingerprint": order.fingerprint,
        "steps_per_epoch": order.steps_per_epoch,
        "skipped": sorted(spec.skip),
        "verified": bool(spec.config.train.verify_every),  # compared between ranks and found finite before it was acknowledged
        "decoder": DECODER_VERSIONS,
        "versions": versions(),
        "identity": spec.identity,
        **(memory.best.mark(memory.history.evaluations) if memory.best is not None else {}),
    }
