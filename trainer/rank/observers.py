"""The smaller observers of a step; the others have their own files (guard, history, meter, saving). worker.py holds all of them in one list
and shows them each step in order. None of them waits for the device.
"""

import math
import time
from collections.abc import Callable
from typing import Protocol

from cluster.beat import COMPILING, STEP
from cluster.heartbeat import Heartbeat
from cluster.metrics import Metrics
from cluster.verify import WeightsCheck
from trainer.learn.build import Learner
from trainer.learn.semi import COUNT, USED, WEIGHT, Semi
from trainer.learn.step import Arriving, StepStats
from trainer.rank.data import RankData
from trainer.rank.device_metrics import device_peak
from trainer.rank.history import GUESS_CURVES, Curves, History, Speed
from trainer.rank.meter import Meter
from trainer.rank.profile import FlopCount, Profiler, count_work, measure_ceilings
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank
from trainer.runs.measures import headline_of
from trainer.runs.summary import ACCOUNTED
from trainer.settings.texts import is_text
from trainer.settings.tree import RunConfig
from trainer.tasks.info import TaskInfo

CURVE_ROWS = 2000
"""A run's curve has at least this many rows if it has the steps, and fewer than twice as many."""


class Observer(Protocol):
    def stepped(self, stats: StepStats) -> None:
        """Called after each step, on all ranks."""
        ...


class StepWatch:
    """The StepObserver that the step reports to while the host queues it. It passes phases to the heartbeat, and parts to the meter and, if
    the run has one, to the profile."""

    def __init__(self, heartbeat: Heartbeat, meter: Meter, profile: "StepProfile | None") -> None:
        self.phase: Callable[[str], None] = heartbeat.tick
        self.part: Callable[[str], None] = meter.mark if profile is None else both(meter.mark, profile.mark)
        self.takes_norm: Callable[[], bool] = meter.takes_norm


def both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def call(part: str) -> None:
        first(part)
        second(part)

    return call


class FirstStep:
    """Writes into the journal when the attempt's first step is done."""

    def __init__(self, me: ThisRank, start_step: int) -> None:
        self._me, self._first = me, start_step + 1

    def stepped(self, stats: StepStats) -> None:
        if stats.steps_done == self._first:
            self._me.tell("first_step", step=stats.steps_done, workers=self._me.world_size)


class StepProfile:
    """`--profile`: profiles the first steps of an attempt and writes the result into the journal. It runs on every rank, because the ranks
    share the machine."""

    def __init__(self, me: ThisRank, data: RankData, learner: Learner, meter: Meter) -> None:
        self._me, self._data, self._learner, self._meter = me, data, learner, meter
        self._profiler: Profiler | None = None

    def begin(self, first_step: int, stop_step: int) -> None:
        """Measure the device and count the model's work. This takes a few seconds before the steps `first_step` .. `stop_step` - 1."""
        me, train = self._me, self._learner.config.train
        me.heartbeat.tick(COMPILING)
        carried = len(self._data.virtual_ranks)
        together = 1 if train.reduction == "ddp" or train.virtual_ranks == 1 else carried
        seen = seen_by_model(me.config, self._data.loader.image_size)
        self._profiler = Profiler(
            device=me.device,
            first_step=first_step,
            stop_step=stop_step,
            share=self._data.share,
            work=count_work(self._learner.model, seen, precision=train.precision),
            passes=together * train.accumulate,
            ceilings=measure_ceilings(me.device, precision=train.precision),
        )
        peak, work = self._profiler.ceilings.flops_per_second, self._profiler.work
        self._meter.measured(peak_flops_per_second=peak, flops_per_image=work.flops_per_image)
        me.heartbeat.tick(STEP)

    def mark(self, part: str) -> None:
        if self._profiler is not None:
            self._profiler.mark(part)

    def cut(self) -> None:
        """The time that follows is not part of a step: an evaluation or a checkpoint."""
        if self._profiler is not None:
            self._profiler.cut()

    def stepped(self, stats: StepStats) -> None:
        if self._profiler is not None:
            self._profiler.stepped(stats)
            self._tell(self._profiler, wait=False)

    def end(self) -> None:
        """Stop profiling, and report what there is."""
        if self._profiler is not None:
            self._tell(self._profiler, wait=True)
            self._profiler = None

    def _tell(self, profiler: Profiler, *, wait: bool) -> None:
        found = profiler.result(wait=wait)
        if found is not None:
            self._me.tell("profiled", profile=found)


class GuessWatch:
    """Follows what the guesses at unlabelled images come to, in the steps that have a row in the run's curves, and tells Prometheus. On all
    ranks, as all observers; it must be shown a step before CurveLog is."""

    def __init__(self, semi: Semi, plan: StepPlan, metrics: Metrics) -> None:
        self._semi, self._every, self._metrics = semi, curve_every(plan), metrics
        self._late: dict[int, tuple[Arriving, ...]] = {}

    def stepped(self, stats: StepStats) -> None:
        step = stats.steps_done - 1
        if not stats.skipped and step % self._every == 0:
            sums = self._semi.newest
            count = sums[COUNT].clamp(min=1.0)
            self._late[step] = tuple(Arriving(step, sums[which] / count) for which in (USED, WEIGHT))

    def at(self, step: int) -> dict[str, float]:
        """Columns of the curves for a step whose loss has arrived; the numbers are right behind it."""
        known = self._late.pop(step, None)
        if known is None:
            return {}
        found = dict(zip(GUESS_CURVES, (each.wait() for each in known), strict=True))
        for name, value in found.items():
            self._metrics.set(f"{name}_ratio", value)
        return found


def curve_every(plan: StepPlan) -> int:
    """Steps from one row of the curves to the next."""
    return max(1, plan.total_steps // CURVE_ROWS)


class CurveLog:
    """Adds rows to the run's curves as losses arrive."""

    def __init__(self, curves: Curves, speed: Speed, plan: StepPlan, *, attempt: int, guesses: GuessWatch | None = None) -> None:
        self._curves, self._speed, self._attempt, self._guesses = curves, speed, attempt, guesses
        self._every, self._steps_per_epoch = curve_every(plan), plan.steps_per_epoch

    def stepped(self, stats: StepStats) -> None:
        for step, loss in stats.losses:
            if step % self._every == 0:
                self._curves.add(
                    step=step,
                    epoch=step / self._steps_per_epoch,
                    attempt=self._attempt,
                    time=time.time(),
                    train_loss=loss,
                    learning_rate=stats.learning_rate,
                    images_per_second=self._speed.images_per_second,
                    data_wait_seconds=stats.data_wait_seconds,
                    step_seconds=stats.step_seconds,
                    **(self._guesses.at(step) if self._guesses is not None else {}),
                )


class BeatStats:
    """Fills the next heartbeat with the run's numbers for the driver's screen and account."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        history: History,
        speed: Speed,
        info: TaskInfo,
        *,
        device_seconds: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`device_seconds`: the Meter's. Where it is known, that is the rank's own work: the host of a GPU does not wait for other ranks,
        so that by its clock all of them would be equally slow."""
        self._heartbeat, self._history, self._speed, self._device_seconds = heartbeat, history, speed, device_seconds
        self._info = info
        self._accuracies = tuple(measure.key for measure in info.measures if measure.name == "accuracy")
        self._own_seconds = 0.0

    def stepped(self, stats: StepStats) -> None:
        history, speed = self._history, self._speed
        self._own_seconds += stats.step_seconds - stats.exchange_seconds
        of_device = self._device_seconds()
        newest = history.evaluations[-1] if history.evaluations else {}
        headline, _ = headline_of(newest, self._info)
        self._heartbeat.progress(
            stats.steps_done,
            {
                "loss": history.train_loss,
                "learning_rate": stats.learning_rate,
                "images_per_second": speed.images_per_second,
                "data_wait_ratio": speed.data_wait_ratio,
                **{key: newest.get(key, math.nan) for key in self._accuracies},
                "test_headline": math.nan if headline is None else headline,
            },
            totals={name: getattr(history, name) for name in ACCOUNTED},
            own_seconds=self._own_seconds if of_device is None else of_device,
        )


class Comparison:
    """Starts a comparison of all ranks' weights every so many steps, and reads the verdicts that have arrived."""

    def __init__(self, check: WeightsCheck, *, every: int) -> None:
        self._check, self._every = check, every

    def stepped(self, stats: StepStats) -> None:
        if stats.steps_done % self._every == 0:
            self._check.start(stats.steps_done)
        self._check.poll()


def meter_of(me: ThisRank, data: RankData, plan: StepPlan, speed: Speed) -> Meter:
    train = me.config.train
    return Meter(
        me.metrics,
        device=me.device,
        share=data.share,
        steps_per_epoch=plan.steps_per_epoch,
        planned_steps=plan.total_steps,
        waits_in_backward=train.reduction == "ddp" and me.world_size > 1 and me.device.type == "cpu",
        peak_flops_per_second=device_peak(me.device, train.precision),
        reads=data.loader,
        speed=speed,
    )


def count_flops(me: ThisRank, data: RankData, learner: Learner, meter: Meter) -> None:
    """Count FLOPs during the first steps, if the device's peak is known. A text's depend on its length, and are not counted."""
    if meter.peak_flops_per_second is not None and not is_text(me.config.model):
        meter.count_flops(FlopCount(learner.model), seen_by_model(me.config, data.loader.image_size), me.config.train.precision)


def seen_by_model(config: RunConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) that the model sees for data of `image_size`."""
    return (config.model.image_size,) * 2 if config.model.image_size else image_size
