"""Evaluates the model on a split, exactly, over all ranks. worker.py calls `Evaluator.run` between steps; finished.py and benchmarks call
`evaluate` or `evaluate_share`. The task decides what is measured (trainer.tasks.task.Evaluation).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.beat import EVALUATION, EXCHANGE, MEASURING
from cluster.storage import Storage
from dataio.batch import Targets
from dataio.loader import Loader
from dataio.parquet import Dataset
from trainer.learn.build import Learner
from trainer.learn.ema import Ema
from trainer.learn.gradients import evaluating
from trainer.learn.objectives import autocast_for
from trainer.learn.step import Arriving
from trainer.rank.calibrating import calibration_record, with_calibration
from trainer.rank.data import RankData
from trainer.rank.history import History, LossMean
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import PREDICTIONS_FILE, About, named, rows_to_keep
from trainer.tasks.score_log import ScoreLog
from trainer.tasks.task import Evaluation, Result, Task

EVALUATION_BATCH = 256
ACCURACY = "accuracy"


class Evaluator:
    """Does a run's evaluations. The last one also records the model's prediction for each sample."""

    def __init__(
        self,
        me: ThisRank,
        data: RankData,
        learner: Learner,
        plan: StepPlan,
        *,
        history: History,
        mean: LossMean,
        storage: Storage,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        """`history` gets an entry for each evaluation, and `mean` the losses that were still late. `on_begin` is called before each."""
        self._me, self._data, self._learner, self._plan = me, data, learner, plan
        self._history, self._mean, self._storage, self._on_begin = history, mean, storage, on_begin
        me.metrics.declare("test_measure", [measure.name for measure in learner.task.info.measures])

    def run(self, steps_done: int, late: Sequence[Arriving] = ()) -> None:
        """Evaluate the test split, and report to the history, Prometheus and the journal. All ranks call it after the same step. `late`:
        losses of steps before (StepStats), which an evaluation outlasts."""
        self._on_begin()
        begin = time.perf_counter()
        with self._me.heartbeat.during(EVALUATION):
            result = self._evaluate(steps_done)
        self._mean.arrived(late)
        self._tell(steps_done, result, time.perf_counter() - begin)

    def _evaluate(self, steps_done: int) -> Result:
        me, learner, dataset = self._me, self._learner, self._data.dataset
        columns = learner.task.columns
        is_last = self._plan.is_last(steps_done)
        log = PredictionLog(columns, -(-rows_to_keep(columns) // me.world_size), me.device) if is_last else None
        scores = ScoreLog(learner.task, dataset.split("test").count, me.device) if is_last else None
        result = evaluate(
            learner.task,
            learner.model,
            learner.preprocess,
            dataset,
            self._data.loader,
            rank=me.rank,
            world_size=me.world_size,
            ema=learner.ema,
            precision=me.config.train.precision,
            on_batch=me.heartbeat.tick,
            on_phase=me.heartbeat.tick,
            log=log,
            scores=scores,
        )
        if scores is not None:
            result = with_calibration(result, self._calibration(scores))
        if log is not None:  # before the last commit, so that a finished checkpoint always has its model's predictions
            fingerprint = self._data.order.fingerprint
            self._write_predictions(log, About(step=steps_done, split="test", dataset_fingerprint=fingerprint, count=result.count))
        return result

    def _calibration(self, test: ScoreLog) -> dict[str, Any] | None:
        """The record for rank 0; None for the others. A collective."""
        me = self._me
        fit = self._scores_of("validation")
        with me.heartbeat.during(EXCHANGE):
            own, others = test.gathered(me.rank, me.world_size), None if fit is None else fit.gathered(me.rank, me.world_size)
        with me.heartbeat.during(MEASURING):
            return None if own is None else calibration_record(own, others)

    def _scores_of(self, split: str) -> ScoreLog | None:
        """The model's scores on a split that is there for it, of which the test knows nothing; None if there is no such split."""
        me, learner, dataset = self._me, self._learner, self._data.dataset
        splits = dataset.manifest.splits
        if split not in splits or not (count := splits[split].count):
            return None
        scores = ScoreLog(learner.task, count, me.device)
        with learner.ema.applied() if learner.ema is not None else nullcontext():
            evaluate_share(
                learner.task,
                learner.task.evaluation(me.device),
                learner.model,
                learner.preprocess,
                self._data.loader,
                split=split,
                share=scores.wanted(share_of(count, me.rank, me.world_size)),
                precision=me.config.train.precision,
                on_batch=me.heartbeat.tick,
                scores=scores,
            )
        return scores

    def _write_predictions(self, log: PredictionLog, about: About) -> None:
        """All ranks hand in their rows, and rank 0 writes them. If the storage refuses them, only the report's images are missing."""
        me = self._me
        with me.heartbeat.during(EXCHANGE):
            found = log.gathered(me.rank, me.world_size)
        if found is None:
            return
        try:
            predictions = named(found, self._data.dataset.split(about.split), about, me.heartbeat.tick).to_parquet()
            me.waits.call(lambda: self._storage.write_atomic(f"{me.config.run}/{PREDICTIONS_FILE}", predictions), PREDICTIONS_FILE)
        except OSError as error:
            me.tell("predictions_not_written", message=str(error))

    def _tell(self, steps_done: int, result: Result, seconds: float) -> None:
        history, metrics, info = self._history, self._me.metrics, self._learner.task.info
        metrics.set("test_loss", result.loss)
        if ACCURACY in result.measures:
            metrics.set("test_accuracy_ratio", result.measures[ACCURACY])
        for name, value in result.measures.items():
            metrics.set("test_measure", value, label=name)
        metrics.add("evaluation_seconds_total", seconds)
        entry: dict[str, Any] = {"step": steps_done, "epoch": steps_done / self._plan.steps_per_epoch, **result.entry()}
        history.evaluated(entry, seconds)
        brief = {key: entry[key] for key in ("step", "epoch", "test_loss", *(measure.key for measure in info.measures))}
        self._me.tell("evaluation", train_loss=history.train_loss, mean_train_loss=history.mean_train_loss, **brief)


def evaluate(
    task: Task,
    model: nn.Module,
    preprocess: nn.Module,
    dataset: Dataset,
    loader: Loader,
    *,
    rank: int = 0,
    world_size: int = 1,
    ema: Ema | None = None,
    precision: str,
    split: str = "test",
    on_batch: Callable[[], None] = lambda: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    log: PredictionLog | None = None,
    scores: ScoreLog | None = None,
) -> Result:
    """Exact measures over all ranks: each rank takes a contiguous share of the split, and nothing is padded or counted twice. `on_phase`:
    where it waits for the others and where it works (cluster.beat).

    In ddp mode the ranks' BatchNorm statistics, and so their averages, differ. Rank 0's count, because checkpoints hold them; the others
    get them here.
    """
    evaluation = task.evaluation(next(model.parameters()).device)
    with ema.applied() if ema is not None else nullcontext():
        if world_size > 1:
            on_phase(EXCHANGE)
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
            on_phase(EVALUATION)
        share = share_of(dataset.split(split).count, rank, world_size)
        evaluate_share(
            task,
            evaluation,
            model,
            preprocess,
            loader,
            split=split,
            share=share,
            precision=precision,
            on_batch=on_batch,
            log=log,
            scores=scores,
        )
    on_phase(EXCHANGE)
    evaluation.combine(rank, world_size)
    on_phase(MEASURING)
    result = evaluation.result()
    on_phase(EVALUATION)
    return result


def share_of(count: int, rank: int, world_size: int) -> range:
    """Positions in the split of the samples that a rank evaluates."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def evaluate_share(
    task: Task,
    evaluation: Evaluation,
    model: nn.Module,
    preprocess: nn.Module,
    loader: Loader,
    *,
    split: str,
    share: range,
    precision: str,
    as_learned: Callable[[Targets], Targets] = lambda targets: targets,
    on_batch: Callable[[], None] = lambda: None,
    log: PredictionLog | None = None,
    scores: ScoreLog | None = None,
) -> None:
    """Evaluate the samples `share` of a split into `evaluation`; record each prediction in `log`, and outputs in `scores`. `as_learned`
    converts the data set's targets to those that the model was trained on."""
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(), autocast_for(device, precision):
        for batch in loader.evaluate(split, share, batch_size=EVALUATION_BATCH):
            targets = as_learned(batch.targets)
            outputs = model(preprocess(batch.samples))  # (n, task.outputs)
            evaluation.update(outputs, targets)
            if log is not None:
                log.update(batch.ids, task.rows(outputs, targets))
            if scores is not None:
                scores.update(batch.ids, outputs, targets)
            on_batch()
