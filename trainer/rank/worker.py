"""One rank's work in one attempt, from its first line to its last. cluster.rank calls `train_rank` in the rank's process; the driver makes
the spec.

Other modules decide the rest: dataio.order picks the samples, trainer.learn defines the step, cluster.heartbeat agrees on when to stop, and
cluster.store and the coordinator define a committed checkpoint.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.beat import COMPILING, EXCHANGE, JOINING, STEP
from cluster.ledger import LedgerWriter
from cluster.rank import RankContext
from cluster.storage import open_storage
from cluster.store import Store
from trainer.learn.build import Learner, SecondStream, build_learner, class_counts_of, task_of
from trainer.learn.state import TrainState
from trainer.learn.step import Stepper, StepStats, train_steps
from trainer.models.own import OwnCodeError
from trainer.models.weights import WeightsError
from trainer.rank.best import BestWeights
from trainer.rank.data import Batches, RankData, fill_cache, open_data, open_ledger, open_second_ledger, recorded
from trainer.rank.device_metrics import GpuWatch, gpu_address
from trainer.rank.evaluation import TEST, Evaluator
from trainer.rank.final import test_kept
from trainer.rank.finishing import finish
from trainer.rank.guard import Guard
from trainer.rank.history import LossMean, RankTotals, Speed
from trainer.rank.meter import Meter
from trainer.rank.observers import (
    BeatStats,
    Comparison,
    CurveLog,
    FirstStep,
    GuessWatch,
    Observer,
    StepProfile,
    StepWatch,
    count_flops,
    meter_of,
)
from trainer.rank.saving import Memory, Saver, restore, weights_check
from trainer.rank.step_plan import StepPlan
from trainer.rank.teaching import remember_answers, teacher_for
from trainer.rank.this_rank import ThisRank, join
from trainer.runs.choice import rule_of
from trainer.settings.identity import deciding_settings, description_sha256, weights_sha256
from trainer.settings.selection import watched_split
from trainer.settings.sources import OWN
from trainer.settings.spec import WorkerSpec


def train_rank(spec: WorkerSpec, context: RankContext) -> None:
    """Do everything that one rank does in one attempt."""
    config = spec.config
    make_repeatable(spec.threads)
    keep_compiled(config.data.root)
    me = join(spec, context)
    data = open_data(me)
    check_weights(spec)
    check_sources(spec)
    counts = class_counts_of(config, data.dataset)
    task = task_of(config, data.dataset.manifest)
    teacher = teacher_for(me, data, task)
    stream = SecondStream(order=data.second.order, target=data.second.dataset.manifest.targets[0]) if data.second is not None else None
    learner = build_learner(config, task, data.loader.shape, me.device, class_counts=counts, teacher=teacher, stream=stream)
    storage = open_storage(config.storage, config.cluster.storage_retry_seconds)
    store = Store.open(storage, config.run)
    state = TrainState(learner.model, learner.optimizer, learner.ema, learner.semi.state() if learner.semi is not None else None)
    watched, rule = watched_split(data.dataset.manifest), rule_of(config.train, learner.task.info)
    best = BestWeights(rule, is_averaged=learner.ema is not None) if rule.keeps_best and me.rank == 0 else None
    memory = restore(store, spec.resume, state, me.waits, best)
    plan = StepPlan.of(config, data.order.steps_per_epoch, start_step=memory.start_step)

    guard, weights = guard_of(data, learner, plan, memory), weights_check(me, learner)
    speed, totals = Speed(), RankTotals(share=data.share)
    meter = meter_of(me, data, plan, speed)
    profile = StepProfile(me, data, learner, meter)
    saver = Saver(me, data, plan, store=store, state=state, memory=memory, guard=guard, weights=weights, on_begin=profile.cut)
    mean = LossMean(memory.history, data.samples_of)
    evaluator = Evaluator(
        me, data, learner, plan, history=memory.history, mean=mean, storage=storage, split=watched, rule=rule, on_begin=profile.cut
    )
    observers: list[Observer] = [FirstStep(me, plan.start_step), guard, totals, memory.history, mean, profile, speed, saver, meter]
    guesses = GuessWatch(learner.semi, plan, me.metrics) if learner.semi is not None else None
    if guesses is not None:
        observers.append(guesses)
    observers.append(CurveLog(memory.curves, speed, plan, attempt=spec.attempt, guesses=guesses))
    observers.append(BeatStats(me.heartbeat, memory.history, speed, learner.task.info, device_seconds=lambda: meter.device_seconds))
    if weights is not None:
        observers.append(Comparison(weights, every=config.train.verify_every))
    ledger = open_ledger(me, storage, start_step=plan.start_step)
    second = open_second_ledger(me, storage, start_step=plan.start_step)
    gpu = GpuWatch(me.metrics, gpu_address(me.device))

    fill_cache(me.heartbeat, data.loader, watched, data.second)
    if teacher is not None:
        remember_answers(me, data, storage, teacher, task.outputs)
    me.heartbeat.tick(STEP)
    me.tell("training_started", step=plan.start_step, cache=data.loader.cache, backend=data.loader.backend_name)
    steps = Steps(me=me, data=data, learner=learner, plan=plan, meter=meter, profile=profile, ledger=ledger, second=second)
    try:
        stopped = train(steps, observers, evaluator, saver)
        totals.stalled(saver.stall_seconds)
        with me.heartbeat.during(EXCHANGE):
            ranks = totals.of_all_ranks(me.rank, me.world_size, me.device)
            if weights is not None:
                weights.poll(wait=True)
        steps_done = max(plan.start_step, memory.history.steps_done)
        saver.wait_until_saved(steps_done)
        kept = None
        if watched != TEST and not stopped:
            kept = test_kept(me, data, learner, memory, evaluator, rule, steps_done=steps_done, is_early=steps_done < plan.total_steps)
        if me.rank == 0:
            finish(me, storage, learner, data, memory, ranks=ranks, stopped=stopped, steps_done=steps_done, kept=kept)
    finally:
        saver.close()
        me.heartbeat.close()
        meter.close()
        gpu.close()
        for each in (ledger, second):
            if each is not None:
                each.close()
        me.server.close()


def check_weights(spec: WorkerSpec) -> None:
    """WeightsError if this node's weights file is not the one that the driver saw, and that the run is known by. A run that goes on has its
    weights from the commit."""
    known = spec.identity.get("weights", "")
    if spec.resume is None and known and (found := weights_sha256(spec.config.model.weights)) != known:
        raise WeightsError(
            f"model.weights={spec.config.model.weights} holds on {platform.node()} another file (SHA-256 {found[:12]}) than where the run "
            f"was started ({known[:12]}); put the same file on every node, or on storage that all of them mount"
        )
    about = spec.identity.get("weights_about", "")
    if spec.resume is None and known and description_sha256(spec.config.model.weights) != about:
        raise WeightsError(
            f"model.weights={spec.config.model.weights} has on {platform.node()} another config.json beside it than where the run was "
            "started; it says for which classes the weights were trained: copy the whole folder to every node"
        )


def check_sources(spec: WorkerSpec) -> None:
    """OwnCodeError if a function of the user's own has another source on this node than the driver saw."""
    known, here = spec.identity.get("settings", {}), deciding_settings(spec.config)
    for key in OWN:
        if key in known and ":" in str(known[key]) and known[key] != here.get(key):
            raise OwnCodeError(
                f"{key}: the source on {platform.node()} is not that of where the run was started ({here.get(key)}, not {known[key]}); "
                "put the same file on every node, or let the job bring it"
            )


def train(steps: "Steps", observers: Sequence[Observer], evaluator: Evaluator, saver: Saver) -> bool:
    """Do the remaining steps, until the last one or until the evaluations end the run. Returns whether all ranks were asked to stop
    before that."""
    plan, stopped, is_over = steps.plan, False, evaluator.is_over
    for first, last in plan.phases():
        if is_over:
            break
        stepper = steps.stepper(first, last)
        batches = steps.batches(first, last)
        for stats in steps.run(stepper, batches, first, last):
            for observer in observers:
                observer.stepped(stats)
            done = stats.steps_done
            if plan.evaluates(done):
                evaluator.run(done, stats.late)
                is_over = evaluator.is_over
            stopped = not plan.is_last(done) and not is_over and steps.me.heartbeat.should_stop(done)
            if saver.is_due(done) or stopped:
                saver.save(done, stats.late)
            if is_over and not plan.is_last(done):
                steps.me.tell("stopped_early", step=done, epoch=done / plan.steps_per_epoch, patience=steps.me.config.train.patience)
            if stopped or is_over:
                break
        batches.close()
        steps.profile.end()
        if stopped:
            break
    return stopped


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Steps:
    """Makes an attempt's steps. `first` and `last` (one past the end) bound a phase (StepPlan.phases)."""

    me: ThisRank
    data: RankData
    learner: Learner
    plan: StepPlan
    meter: Meter
    profile: StepProfile
    ledger: LedgerWriter | None
    second: LedgerWriter | None = None
    """For the images without labels."""

    def stepper(self, first: int, last: int) -> Stepper:
        """The stepper for the parameters that this phase trains. Compiling and measuring the device happen here, outside of any step."""
        me, profiles = self.me, self.learner.config.train.profile
        self.learner.set_trainable(first // self.plan.steps_per_epoch)
        self.meter.begin()
        watch = StepWatch(me.heartbeat, self.meter, self.profile if profiles else None)
        me.heartbeat.tick(JOINING)  # in ddp mode making the stepper is a collective, and ranks may take long to come here
        stepper = self.learner.stepper(world_size=me.world_size, rank=me.rank, observer=watch, order=self.data.order)
        me.heartbeat.tick(COMPILING)
        seconds = stepper.compile_ahead((3, *self.data.loader.shape))  # of images: a model of texts is not compiled
        me.heartbeat.tick(STEP)
        if seconds:
            me.tell("compiled", seconds=seconds)
        if profiles and first == self.plan.start_step:
            self.profile.begin(first, last)
        else:
            count_flops(me, self.data, self.learner, self.meter)
        return stepper

    def batches(self, first: int, last: int) -> Batches:
        return recorded(self.data.train(first, last), self.ledger, self.me, self.second)

    def run(self, stepper: Stepper, batches: Batches, first: int, last: int) -> Iterator[StepStats]:
        me, plan = self.me, self.plan
        return train_steps(
            stepper,
            batches,
            start_step=first,
            stop_step=last,
            steps_per_epoch=plan.steps_per_epoch,
            batch_count=self.data.order.batch_count,
            set_learning_rate=lambda step: self.learner.set_learning_rate(step, plan.total_steps),
            device=me.device,
            sum_over_ranks=self.learner.config.train.reduction == "ddp" and me.world_size > 1,
            skip=me.spec.skip,
        )


CROSS_ENTROPY_TASKS = frozenset({"classification", "multilabel"})


def guard_of(data: RankData, learner: Learner, plan: StepPlan, memory: Memory) -> Guard:
    """The run's guard, with the state that the checkpoint holds."""
    config, saved = learner.config, memory.history.guard
    guard = Guard(
        spike_factor=config.train.spike_factor,
        batch_size=data.order.batch_count(0) if not saved or "judges_all" in saved else config.data.batch_size,
        samples_of=data.samples_of,
        fresh_at=plan.thaws,
        loss_floor=None if config.optim.loss else learner.task.info.loss_floor,
        judges_early=not config.optim.loss and learner.task.info.name in CROSS_ENTROPY_TASKS,
        heaviest=learner.heaviest,
    )
    guard.load(saved)
    return guard


def make_repeatable(threads: int) -> None:
    """Make PyTorch give the same bits for the same input: fix the thread count, and choose no kernel by timing."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_compiled(folder: str) -> None:
    """Keep compiled steps in `folder` for later attempts and runs, unless TORCHINDUCTOR_CACHE_DIR names another place.

    A warm cache gives the same bits as a cold one, because the same code is compiled the same way."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(os.path.expanduser(folder), "compiled"))
