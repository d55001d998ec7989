"""Evaluates the model on a split, exactly, over all ranks. worker.py calls `Evaluator.run` between steps and final.py `Evaluator.final`
after them; finished.py and benchmarks call `evaluate` or `evaluate_share`. The task decides what is measured
(trainer.tasks.task.Evaluation).
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
from trainer.rank.history import History, LossMean, numbers_of
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank
from trainer.runs.choice import VALIDATION, Rule, choose
from trainer.tasks.calibration import Scores
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import PREDICTIONS_FILE, About, named, rows_to_keep
from trainer.tasks.score_log import ScoreLog
from trainer.tasks.task import Evaluation, Parted, Result, Task

TEST = "test"
EVALUATION_BATCH = 256
ACCURACY = "accuracy"


class Evaluator:
    """Does a run's evaluations of the split that it watches, and those at its end. The last one of the test split also records the model's
    prediction for each sample."""

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
        split: str = TEST,
        rule: Rule | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        """`history` gets an entry for each evaluation, and `mean` the losses that were still late. `split` is the one to watch; `rule` says
        when its evaluations end the run (None: never). `on_begin` is called before each."""
        self._me, self._data, self._learner, self._plan = me, data, learner, plan
        self._history, self._mean, self._storage, self._on_begin = history, mean, storage, on_begin
        self._split, self._rule = split, rule
        self._to_fit: Mapping[str, Scores] | None = None
        names = [measure.name for measure in learner.task.info.measures]
        for each in dict.fromkeys((TEST, split)):
            me.metrics.declare(f"{each}_measure", names)

    def run(self, steps_done: int, late: Sequence[Arriving] = ()) -> None:
        """Evaluate the watched split, and report to the history, Prometheus and the journal. All ranks call it after the same step. `late`:
        losses of steps before (StepStats), which an evaluation outlasts."""
        self._on_begin()
        begin = time.perf_counter()
        is_last_test = self._split == TEST and self._plan.is_last(steps_done)
        result = self._evaluate(self._split, self._learner.ema, predictions_of=steps_done if is_last_test else None)
        self._mean.arrived(late)
        seconds = time.perf_counter() - begin
        entry = self._entry(self._split, steps_done, result)
        self._history.evaluated(entry if self._split == TEST else numbers_of(entry), seconds)
        if self._learner.semi is not None:
            self._history.unlabelled = self._learner.semi.taken()
        self._tell(self._split, entry, result, seconds)

    def final(self, split: str, step: int, *, ema: Ema | None, predictions_of: int | None = None) -> dict[str, Any]:
        """Evaluate `split` after the last step, with the weights that the model, or `ema`, has: those after `step` steps. Returns the
        entry. `predictions_of`: also write the predictions, of a run of so many steps. All ranks call it."""
        self._on_begin()
        begin = time.perf_counter()
        result = self._evaluate(split, ema, predictions_of=predictions_of, keeps_scores=True)
        seconds = time.perf_counter() - begin
        self._history.evaluated_again(seconds)
        entry = self._entry(split, step, result)
        self._tell(split, entry, result, seconds, is_final=True)
        return entry

    @property
    def is_over(self) -> bool:
        """Whether the evaluations so far end the run, by its patience. Rank 0's answer counts: all ranks call it at the same place."""
        if self._rule is None or not self._rule.patience:
            return False
        stops = choose(self._rule, self._history.evaluations).stops
        if self._me.world_size == 1:
            return stops
        with self._me.heartbeat.during(EXCHANGE):
            agreed = torch.tensor([int(stops)], device=self._me.device)  # (1,)
            dist.broadcast(agreed, src=0)
        return bool(agreed.item())

    def _evaluate(self, split: str, ema: Ema | None, *, predictions_of: int | None, keeps_scores: bool = False) -> Result:
        me, learner, data = self._me, self._learner, self._data
        columns = learner.task.columns
        log = PredictionLog(columns, -(-rows_to_keep(columns) // me.world_size), me.device) if predictions_of is not None else None
        count = data.dataset.split(split).count
        scores = ScoreLog(learner.task, count, me.device) if predictions_of is not None or keeps_scores else None
        with me.heartbeat.during(EVALUATION):
            result = evaluate(
                learner.task,
                learner.model,
                learner.preprocess,
                data.dataset,
                data.loader,
                rank=me.rank,
                world_size=me.world_size,
                ema=ema,
                precision=me.config.train.precision,
                split=split,
                # What is chosen by must not depend on how many ranks there are.
                parts=[share_of(count, each, data.order.virtual_ranks) for each in data.virtual_ranks] if split == VALIDATION else (),
                on_batch=me.heartbeat.tick,
                on_phase=me.heartbeat.tick,
                log=log,
                scores=scores,
            )
            if scores is not None:
                result = self._calibrated(split, result, scores)
            if log is not None and predictions_of is not None:
                # Before the last commit where the test split is watched, so that a finished checkpoint has its model's predictions.
                about = About(step=predictions_of, split=split, dataset_fingerprint=data.order.fingerprint, count=result.count)
                self._write_predictions(log, about)
        return result

    def _calibrated(self, split: str, result: Result, scores: ScoreLog) -> Result:
        """The result with what calibration does on the test split, on rank 0. Scores of the validation split, which is read before it, are
        kept to fit by. A collective."""
        me = self._me
        with me.heartbeat.during(EXCHANGE):
            found = scores.gathered(me.rank, me.world_size)
        if split != TEST or found is None:
            self._to_fit = found
            return result
        with me.heartbeat.during(MEASURING):
            return with_calibration(result, calibration_record(found, self._to_fit))

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

    def _entry(self, split: str, steps_done: int, result: Result) -> dict[str, Any]:
        return {"step": steps_done, "epoch": steps_done / self._plan.steps_per_epoch, **result.entry(split)}

    def _tell(self, split: str, entry: Mapping[str, Any], result: Result, seconds: float, *, is_final: bool = False) -> None:
        history, metrics, info = self._history, self._me.metrics, self._learner.task.info
        metrics.set(f"{split}_loss", result.loss)
        if ACCURACY in result.measures:
            metrics.set(f"{split}_accuracy_ratio", result.measures[ACCURACY])
        for name, value in result.measures.items():
            metrics.set(f"{split}_measure", value, label=name)
        metrics.add("evaluation_seconds_total", seconds)
        if is_final and split != TEST:  # its numbers were told when it was chosen
            return
        keys = ("step", "epoch", f"{split}_loss", *(f"{split}_{measure.name}" for measure in info.measures))
        brief = {key: entry[key] for key in keys}
        if split != TEST or is_final:
            brief["split"] = split
        if not is_final:
            brief |= numbers_of(history.unlabelled)
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
    split: str = TEST,
    parts: Sequence[range] = (),
    on_batch: Callable[[], None] = lambda: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    log: PredictionLog | None = None,
    scores: ScoreLog | None = None,
) -> Result:
    """Exact measures over all ranks: each rank takes a contiguous share of the split, and nothing is padded or counted twice. `on_phase`:
    where it waits for the others and where it works (cluster.beat).

    `parts`: this rank's share, cut at places that do not depend on the number of ranks. Each part then goes through the model in the same
    batches, and the result has the same bits for any number of ranks (trainer.tasks.task.Parted).

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
        for share in parts or [share_of(dataset.split(split).count, rank, world_size)]:
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
            if parts and isinstance(evaluation, Parted):
                evaluation.end_part()
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
        for batch in loader.evaluate(split, loader.padding_least(split, share), batch_size=EVALUATION_BATCH):
            targets = as_learned(batch.targets)
            outputs = model(preprocess(batch.samples))  # (n, task.outputs)
            evaluation.update(outputs, targets)
            if log is not None:
                log.update(batch.ids, task.rows(outputs, targets))
            if scores is not None:
                scores.update(batch.ids, outputs, targets)
            on_batch()
