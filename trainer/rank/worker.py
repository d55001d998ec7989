"""One rank's story, from its first line to its last. The agents' ranks call `train_rank` (cluster.rank); drive.py hands it the spec.

What is decided elsewhere: which samples (dataio.order), how a step is done (loop), when to stop together (cluster.heartbeat), what a
committed checkpoint is (cluster.store and the coordinator).
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.checkpointer import OUTAGE_PATIENCE_SECONDS, Buffers, Checkpointer, Files
from cluster.coordinator import RankInfo
from cluster.exporter import serve_metrics
from cluster.heartbeat import Heartbeat
from cluster.interval import AUTO, IntervalChooser, SharedInterval
from cluster.ledger import LedgerWriter
from cluster.metrics import Metrics
from cluster.rank import RankContext
from cluster.reduce import TreeReducer
from cluster.spill import Spill
from cluster.storage import Storage, StorageOutage, open_storage
from cluster.store import Store
from cluster.verify import WeightsCheck
from cluster.versions import versions
from dataio.batch import Batch, Targets
from dataio.codecs.image.decode import DECODER_VERSIONS
from dataio.loader import Loader, available_memory_bytes
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import Dataset, open_dataset
from dataio.quarantine import BadSample, Quarantine, TooManyBadSamples
from dataio.schema import LABEL, Target
from trainer.learn.optim import Ema, build_optimizer, clip_gradients, set_learning_rate, set_trainable
from trainer.learn.state import TrainState, weights_sha256
from trainer.learn.step import Arriving, Stepper, StepStats, evaluating, train_steps
from trainer.models.export import export_model
from trainer.models.im2col import use_products
from trainer.models.vision import Preprocess, build_model, head_of
from trainer.rank.device_metrics import GpuWatch, device_peak, gpu_address
from trainer.rank.guard import Guard
from trainer.rank.history import Curves, History, RankTotals, Speed
from trainer.rank.meter import Meter
from trainer.rank.profile import FlopCount, Profiler, count_work, measure_ceilings
from trainer.runs.summary import ACCOUNTED
from trainer.settings.spec import WorkerSpec, make_order, total_steps_of
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.losses import cross_entropy_sum
from trainer.tasks.make import make_task
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import PREDICTIONS_FILE, About, named, rows_to_keep
from trainer.tasks.task import Evaluation, Result, Task

HISTORY_FILE = "history.json"
CURVES_FILE = "curves.parquet"
EVALUATION_BATCH = 256
GROUP_TIMEOUT_SECONDS = 300.0


def train_rank(spec: WorkerSpec, context: RankContext) -> None:
    """Everything one rank does in one attempt."""
    config, call, place = spec.config, context.call, context.place
    rank, world_size = context.rank, context.world_size
    make_repeatable(spec.threads)
    keep_compiled(config.data.root)
    device = torch.device("cpu") if place.device_index is None else torch.device("cuda", place.device_index)

    metrics = Metrics(config.run, rank, spec.attempt)
    metrics.set("start_time_seconds", time.time())
    server = serve_metrics(metrics.registry, config.cluster.metrics_host)
    info = RankInfo(host=place.host, pid=os.getpid(), node_id=place.node_id, metrics_address=server.address)
    call("register", spec.attempt, rank, info)
    heartbeat = Heartbeat(
        lambda *beat: call("beat", *beat),
        rank,
        spec.attempt,
        config.cluster.heartbeat_seconds / 2,  # so that one is ready whenever the agent asks
        start_step=spec.resume[0] if spec.resume else 0,
    )
    if world_size > 1:
        context.join_group(GROUP_TIMEOUT_SECONDS)

    # Data: every rank can read every sample; the order says which are its own.
    dataset = open_dataset(context.files if spec.dataset is None else spec.dataset)
    order = make_order(config, dataset)
    virtual_ranks = blocks_of_virtual_ranks(order.virtual_ranks, world_size, rank)
    loader = Loader(
        dataset,
        config.data,
        order=order,
        virtual_ranks=virtual_ranks,
        device=device,
        seed=config.train.seed,
        threads=spec.threads,
        on_bad=quarantine(config, dataset, metrics, call),
        memory_bytes=available_memory_bytes() // (2 * place.local_world_size),
    )

    # Model, and its state from the commit to go on from.
    model, preprocess = build(config, dataset, loader.image_size, device)
    head_name, _ = head_of(model)
    optimizer = build_optimizer(model, config.optim, head_name)
    ema = Ema(model, config.train.ema) if config.train.ema else None
    state = TrainState(model, optimizer, ema)
    storage = open_storage(config.storage, config.cluster.storage_retry_seconds)
    store = Store.open(storage, config.run)
    start_step, history, curves = 0, History(), Curves()
    if spec.resume is not None:
        commit = store.load(*spec.resume)
        state.load(commit.read)
        start_step = commit.step
        history, curves = History.from_json(commit.read(HISTORY_FILE)), Curves.from_parquet(commit.read(CURVES_FILE))

    thaws = (config.model.lp_epochs * order.steps_per_epoch,) if config.model.freeze == "lp-ft" else ()
    guard = Guard(
        spike_factor=config.train.spike_factor,
        batch_size=config.data.batch_size,
        samples_of=lambda step: order.batch_count(step % order.steps_per_epoch),
        fresh_at=thaws,
    )
    guard.load(history.guard)
    same: list[Tensor] = list(model.parameters())
    if config.train.reduction == "tree" or world_size == 1:  # in ddp mode the ranks' BatchNorm statistics differ by design
        same += [*model.buffers(), *(ema.weights().values() if ema is not None else ())]
    weights = WeightsCheck(same, world_size=world_size) if config.train.verify_every else None
    chooser = None
    if rank == 0 and config.train.checkpoint_every == AUTO:
        chooser = IntervalChooser(
            workers=world_size,
            steps_per_epoch=order.steps_per_epoch,
            mtbf_hours=config.cluster.mtbf_hours,
            failures=spec.failures,
            observed_seconds=spec.observed_seconds,
        )
    interval = SharedInterval(
        config.train.checkpoint_every,
        start_step=start_step,
        steps_per_epoch=order.steps_per_epoch,
        chooser=chooser,
        world_size=world_size,
        device=device,
    )

    def on_staged(step: int, seconds: float, size_bytes: int) -> None:
        metrics.observe("checkpoint_stage_seconds", seconds)
        if chooser is not None:
            chooser.staged(seconds)

    checkpointer = Checkpointer(
        stage=lambda step, name, buffers: store.stage(step, spec.generation, name, buffers, give_up=checkpointer.hurried),
        ack=lambda step, receipts, meta: call("ack", spec.attempt, rank, step, receipts, meta),
        on_staged=on_staged,
        on_failed=lambda step, error: call("fail_checkpoint", spec.attempt, rank, step, str(error)),
        on_event=lambda event, fields: call("event", event, attempt=spec.attempt, rank=rank, **fields),
        spill=None if storage.is_local else Spill(config.cluster.spill_dir, config.run, spec.generation, rank, storage),
    )
    stall_before = history.checkpoint_stall_seconds

    def save(step: int, late: Sequence[Arriving]) -> None:
        verdict = weights.start(step) if weights is not None else None

        def proven() -> Guard:
            """In the checkpoint's thread: none counts before every loss up to it and the weights themselves were found good."""
            if verdict is not None:
                verdict.wait()
            return proof()

        proof = guard.proof(late)
        stall = checkpointer.save(
            step,
            lambda: snapshot_files(state, history, curves, proven, rank=rank, step=step, virtual_ranks=virtual_ranks, threads=spec.threads),
            commit_meta(spec, order, world_size) if rank == 0 else {},
        )
        history.checkpoint_stall_seconds = stall_before + checkpointer.stall_seconds
        metrics.add("checkpoint_stall_seconds_total", stall)
        if chooser is not None:
            chooser.saved(stall)
        interval.saved(step)

    def evaluate_now(steps_done: int) -> None:
        begin = time.perf_counter()
        heartbeat.tick("evaluation")
        task = task_of(loader)
        answers = None
        if steps_done == total_steps:
            answers = PredictionLog(task.columns, -(-rows_to_keep(task.columns) // world_size), device)
        result = evaluate(
            model,
            preprocess,
            dataset,
            loader,
            rank=rank,
            world_size=world_size,
            ema=ema,
            precision=config.train.precision,
            on_batch=heartbeat.tick,
            answers=answers,
        )
        if answers is not None:  # before the last commit: where there is one, the predictions of its model are there
            about = About(step=steps_done, split="test", dataset_fingerprint=order.fingerprint, count=result.count)
            write_predictions(
                answers, about, storage, config.run, dataset, rank=rank, world_size=world_size, tell=tell, tick=heartbeat.tick
            )
        heartbeat.tick("step")
        seconds = time.perf_counter() - begin
        history.evaluation_seconds += seconds
        metrics.set("test_loss", result.loss)
        metrics.set("test_accuracy_ratio", result.measures["accuracy"])
        metrics.add("evaluation_seconds_total", seconds)
        entry = {"step": steps_done, "epoch": steps_done / order.steps_per_epoch, **result.entry()}
        history.evaluations.append(entry)
        if rank == 0:
            brief = {k: entry[k] for k in ("step", "epoch", "test_loss", "test_accuracy")}
            call("event", "evaluation", attempt=spec.attempt, train_loss=history.train_loss, **brief)

    def tell(event: str, **fields: Any) -> None:
        if rank == 0:
            call("event", event, attempt=spec.attempt, **fields)

    total_steps = total_steps_of(config, order.steps_per_epoch)
    log_every = max(1, total_steps // 2000)
    ledger = None
    if config.train.ledger:  # run.py has checked that the storage is a local folder
        ledger = LedgerWriter(Path(storage.at(f"{config.run}/ledger")), spec.attempt, rank, start_step=start_step)
    speed, stopped, own_seconds, own = Speed(), False, 0.0, RankTotals()
    meter = Meter(
        metrics,
        device=device,
        share=len(virtual_ranks) / order.virtual_ranks,
        steps_per_epoch=order.steps_per_epoch,
        planned_steps=total_steps,
        waits_in_backward=config.train.reduction == "ddp" and world_size > 1 and device.type == "cpu",
        peak_flops_per_second=device_peak(device, config.train.precision),
        reads=loader,
    )
    gpu = GpuWatch(metrics, gpu_address(device))
    loader.load("train", "test")  # where images are cached this decodes them, so that no step does
    heartbeat.tick("step")
    if rank == 0:
        call("event", "training_started", attempt=spec.attempt, step=start_step, cache=loader.cache, backend=loader.backend_name)
    try:
        for first, last in phases(config, start_step, total_steps, order.steps_per_epoch):
            epoch = first // order.steps_per_epoch
            set_trainable(model, config.model.freeze, epoch, lp_epochs=config.model.lp_epochs, head_name=head_name)
            stepper = make_stepper(config, model, preprocess, optimizer, ema, world_size=world_size, rank=rank, device=device)
            stepper.on_phase = heartbeat.tick
            meter.watch(stepper)
            compile_ahead(stepper, loader.image_size, heartbeat, tell)
            profiler = None
            if config.train.profile and first == start_step:
                heartbeat.tick("starting")
                profiler = make_profiler(config, model, device, first, last, carried=len(virtual_ranks), image_size=loader.image_size)
                stepper.mark = both(stepper.mark, profiler.mark)
                if meter.peak_flops_per_second is None:
                    meter.peak_flops_per_second = profiler.ceilings.flops_per_second
                meter.flops_per_image = profiler.work.flops_per_image
                heartbeat.tick("step")
            elif meter.peak_flops_per_second is not None:
                meter.count_flops(FlopCount(model), seen_by_model(config, loader.image_size), config.train.precision)
            waited = 0.0
            batches = loader.train(first, last)
            for stats in train_steps(
                stepper,
                recorded(batches, ledger, spec.skip) if ledger else batches,
                start_step=first,
                stop_step=last,
                steps_per_epoch=order.steps_per_epoch,
                batch_count=order.batch_count,
                set_learning_rate=lambda step: set_learning_rate(optimizer, config.optim, step, total_steps),
                device=device,
                sum_over_ranks=config.train.reduction == "ddp" and world_size > 1,
                skip=spec.skip,
            ):
                done = stats.steps_done
                if rank == 0 and done == start_step + 1:
                    call("event", "first_step", attempt=spec.attempt, step=done, workers=world_size)
                for step, loss in stats.losses:
                    guard.check(step, loss)
                exchange_seconds, waited = stepper.wait_seconds - waited, stepper.wait_seconds
                own_seconds += stats.step_seconds - exchange_seconds
                own.stepped(stats, exchange_seconds, len(virtual_ranks) / order.virtual_ranks)
                history.stepped(stats)
                history.exchange_wait_seconds += exchange_seconds
                if profiler is not None:
                    profiler.stepped(stats, exchange_seconds)
                    tell_profile(profiler.result(), tell)
                speed.stepped(stats)
                if chooser is not None:
                    chooser.stepped(stats.step_seconds)
                meter.stepped(stats, speed, exchange_seconds)
                for step, loss in stats.losses:
                    if step % log_every == 0:
                        curves.add(**curve_row(stats, step, loss, speed, attempt=spec.attempt, steps_per_epoch=order.steps_per_epoch))
                heartbeat.progress(done, beat_stats(stats, history, speed, own_seconds))
                if weights is not None:
                    if done % config.train.verify_every == 0:
                        weights.start(done)
                    weights.poll()
                ends_epoch = done % order.steps_per_epoch == 0
                if done == total_steps or (ends_epoch and done // order.steps_per_epoch % config.train.eval_every_epochs == 0):
                    if profiler is not None:
                        profiler.cut()
                    evaluate_now(done)
                stopped = done < total_steps and heartbeat.should_stop(done)
                is_due = interval.due(done)  # on all ranks, whatever else has them save
                if stopped or ends_epoch or done == total_steps or is_due:
                    if profiler is not None:
                        profiler.cut()
                    save(done, stats.late)
                if stopped:
                    break
            batches.close()
            if profiler is not None:
                tell_profile(profiler.result(wait=True), tell)
            if stopped:
                break
        own.checkpoint_stall_seconds = checkpointer.stall_seconds
        ranks = own.of_all_ranks(rank, world_size, device)
        if weights is not None:
            weights.poll(wait=True)
        steps_done = max(start_step, history.steps_done)
        wait_until_saved(checkpointer, heartbeat, call, steps_done)
        if rank == 0:
            finish(
                spec, storage, model, ema, dataset, loader, history, curves, ranks=ranks, stopped=stopped, steps_done=steps_done, call=call
            )
    finally:
        checkpointer.close()
        heartbeat.close()
        meter.close()
        gpu.close()
        if ledger:
            ledger.close()
        server.close()


def both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def call(part: str) -> None:
        first(part)
        second(part)

    return call


def seen_by_model(config: RunConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) that the model is given, of images of `image_size`."""
    return (config.model.image_size,) * 2 if config.model.image_size else image_size


def compile_ahead(stepper: Stepper, image_size: tuple[int, int], heartbeat: Heartbeat, tell: Callable[..., None]) -> None:
    """Before the steps, so that what it takes is no step's."""
    heartbeat.tick("starting")  # which may take as long as a start
    seconds = stepper.compile_ahead((3, *image_size))
    heartbeat.tick("step")
    if seconds:
        tell("compiled", seconds=seconds)


def make_profiler(
    config: RunConfig, model: nn.Module, device: torch.device, first: int, last: int, *, carried: int, image_size: tuple[int, int]
) -> Profiler:
    """For the steps `first` to before `last` of a rank that carries `carried` virtual ranks. On every rank: they share the machine."""
    train = config.train
    together = 1 if train.reduction == "ddp" or train.virtual_ranks == 1 else carried
    return Profiler(
        device=device,
        first_step=first,
        stop_step=last,
        share=carried / train.virtual_ranks,
        work=count_work(model, seen_by_model(config, image_size), precision=train.precision),
        passes=together * train.accumulate,
        ceilings=measure_ceilings(device, precision=train.precision),
    )


def tell_profile(found: dict[str, Any] | None, tell: Callable[..., None]) -> None:
    if found is not None:
        tell("profiled", profile=found)


def wait_until_saved(checkpointer: Checkpointer, heartbeat: Heartbeat, call: Callable[..., Any], steps_done: int) -> None:
    """Until the last checkpoint is committed, through an outage of the storage too, whose end nobody knows; OSError where it cannot be."""
    heartbeat.tick("checkpoint")
    end = time.monotonic() + OUTAGE_PATIENCE_SECONDS
    while True:
        try:
            checkpointer.wait(2.0)
            break
        except StorageOutage:
            heartbeat.tick()
            if time.monotonic() > end:
                raise
    while not call("wait_committed", steps_done, timeout=2.0):
        heartbeat.tick()
        status = call("status")
        if steps_done in status.failed_steps or time.monotonic() > end:
            raise OSError(f"the last checkpoint, of step {steps_done}, could not be saved: {status.checkpoint_problem or 'no answer'}")


def make_repeatable(threads: int) -> None:
    """The same bits for the same input: a fixed thread count, no kernel chosen by timing."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_compiled(folder: str) -> None:
    """Compiled steps stay in `folder`, for the attempts and runs to come; where the compiler was told of another place, there.

    The same code goes in, the same comes out: a warm cache gives the same bits as a cold one."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(os.path.expanduser(folder), "compiled"))


def phases(config: RunConfig, start: int, total: int, steps_per_epoch: int) -> Iterator[tuple[int, int]]:
    """(first step, one past the last) of what is left from step `start` on, cut where the set of trained parameters changes."""
    probe = min(total, config.model.lp_epochs * steps_per_epoch) if config.model.freeze == "lp-ft" else 0
    for first, last in ((0, probe), (probe, total)):
        if max(first, start) < last:
            yield max(first, start), last


def build(config: RunConfig, dataset: Dataset, image_size: tuple[int, int], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(model, preprocess) on `device`. The preprocess takes (n, 3, H, W) uint8 as the loader gives it."""
    assert config.train.channels_last != "auto", "train.channels_last=auto is to be decided before (trainer.drive.capability)"
    preprocess = Preprocess(
        mean=config.data.mean,
        std=config.data.std,
        image_size=config.model.image_size,
        interpolation=config.model.interpolation,
        channels_last=config.train.channels_last == "on",
    )
    model = build_model(config.model, classes=len(dataset.manifest.classes), seed=config.train.seed, image_hw=image_size)
    layout = torch.channels_last if config.train.channels_last == "on" else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    if config.train.small_maps == "product":
        use_products(model)
    return model, preprocess.to(device)


def make_stepper(
    config: RunConfig,
    model: nn.Module,
    preprocess: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    *,
    world_size: int,
    rank: int,
    device: torch.device,
) -> Stepper:
    # A single virtual rank has nothing to add up: the plain step gives the same bits without the flat vector.
    tree = config.train.reduction == "tree" and config.train.virtual_ranks > 1
    wire = torch.bfloat16 if config.train.reduce_dtype == "bf16" else torch.float32
    # In tree mode each virtual rank goes through the model by itself, else all that the rank carries do together.
    together = 1 if tree else len(blocks_of_virtual_ranks(config.train.virtual_ranks, world_size, rank))
    return Stepper(
        model=model,
        preprocess=preprocess,
        optimizer=optimizer,
        ema=ema,
        loss_sum=lambda logits, labels: cross_entropy_sum(logits, labels, label_smoothing=config.optim.label_smoothing),
        clip=(lambda parameters: clip_gradients(parameters, config.optim.clip_norm)) if config.optim.clip_norm else None,
        seed=config.train.seed,
        precision=config.train.precision,
        compile_model=config.train.compile,
        reducer=TreeReducer(config.train.virtual_ranks, world_size, rank, wire=wire) if tree else None,
        distributed=world_size > 1,
        world_size=world_size,
        accumulate=config.train.accumulate,
        full_batch=together * config.data.batch_size // config.train.virtual_ranks // config.train.accumulate,
        compress=wire != torch.float32,
        cuda_graphs=config.train.cuda_graphs,
    )


def evaluate(
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
    answers: PredictionLog | None = None,
) -> Result:
    """Exact metrics over all ranks: each takes a contiguous share of the split, nothing is padded or counted twice.

    In ddp mode the ranks' BatchNorm statistics, and so their averages, differ; rank 0's are the run's (they are what a checkpoint holds).
    """
    task = task_of(loader)
    evaluation = task.evaluation(next(model.parameters()).device)
    with ema.applied() if ema is not None else nullcontext():
        if world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        share = share_of(dataset.split(split).count, rank, world_size)
        evaluate_share(
            task, evaluation, model, preprocess, loader, split=split, share=share, precision=precision, on_batch=on_batch, answers=answers
        )
    evaluation.combine(rank, world_size)
    return evaluation.result()


def task_of(loader: Loader) -> Task:
    return make_task(TaskConfig(), (Target(name=LABEL, kind="label", classes=loader.classes),))


def share_of(count: int, rank: int, world_size: int) -> range:
    """The samples that a rank evaluates."""
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
    answers: PredictionLog | None = None,
) -> None:
    """Count the samples `share` of a split, and keep each one's answer in `answers`. `as_learned` turns the data set's targets into
    those that the model was trained on."""
    assert precision in ("fp32", "bf16"), f"precision {precision} is to be decided before (trainer.drive.capability)"
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in loader.evaluate(split, share, batch_size=EVALUATION_BATCH):
            targets = as_learned(batch.targets)
            outputs = model(preprocess(batch.samples))
            evaluation.update(outputs, targets)
            if answers is not None:
                answers.update(batch.ids, task.rows(outputs, targets))
            on_batch()


def write_predictions(
    answers: PredictionLog,
    about: About,
    storage: Storage,
    run: str,
    dataset: Dataset,
    *,
    rank: int,
    world_size: int,
    tell: Callable[..., None],
    tick: Callable[[], None],
) -> None:
    """All ranks hand in their answers, rank 0 writes them. A storage that does not take them costs the run its report's images only."""
    found = answers.gathered(rank, world_size)
    if found is None:
        return
    try:
        storage.write_atomic(f"{run}/{PREDICTIONS_FILE}", named(found, dataset.split(about.split), about, tick).to_parquet())
    except OSError as error:
        tell("predictions_not_written", message=str(error))


def quarantine(config: RunConfig, dataset: Dataset, metrics: Metrics, call: Callable[..., Any]) -> Callable[[BadSample], None]:
    """What the loader does with a bad sample: count it, tell the coordinator, fail the run above the limit (over all ranks)."""
    total = sum(split.count for split in dataset.manifest.splits.values())
    limit = config.data.max_bad_fraction

    def on_record(bad: BadSample) -> None:
        metrics.add("quarantined_samples_total", label=bad.kind)
        everywhere = call("quarantine", [asdict(bad)])
        if everywhere > limit * total:
            shown = "".join(f"\n  {record.split} {record.key}: {record.reason}" for record in own.records[:5])
            raise TooManyBadSamples(
                f"{everywhere} of {total} samples are bad, more than data.max_bad_fraction={limit:g} allows; the first met here:{shown}\n"
                f"Repair or remove them, or let them be left out: --data.max-bad-fraction {everywhere / total:.2g} or more"
            )

    own = Quarantine(1.0, total, on_record)

    def on_bad(bad: BadSample) -> None:
        own.add(bad.key, bad.reason, bad.split, bad.sample_id)

    return on_bad


def recorded(batches: Iterator[tuple[Batch, ...]], ledger: LedgerWriter, skip: frozenset[int]) -> Iterator[tuple[Batch, ...]]:
    """`batches`, each written into the ledger when the step takes it."""
    for step in batches:
        for batch in step:
            ledger.record(batch.epoch, batch.step, batch.virtual_rank, batch.ids, skipped=batch.step in skip)
        yield step


def snapshot_files(
    state: TrainState,
    history: History,
    curves: Curves,
    proven: Callable[[], Guard],
    *,
    rank: int,
    step: int,
    virtual_ranks: range,
    threads: int,
) -> Files:
    """Copy what this rank saves now; the returned function gives the files' contents later, once `proven` says that they are good. Rank 0
    holds the replicated state."""
    cursor = {"rank": rank, "step": step, "virtual_ranks": [virtual_ranks.start, virtual_ranks.stop], "threads": threads}
    own: dict[str, Buffers] = {f"rank-{rank:05d}.json": [json.dumps(cursor).encode()]}
    if rank != 0:

        def cursor_alone() -> Iterator[tuple[str, Buffers]]:
            proven()
            yield from own.items()

        return cursor_alone
    snapshot, past = state.snapshot(), history.copy()
    own[CURVES_FILE] = [curves.to_parquet()]

    def files() -> Iterator[tuple[str, Buffers]]:
        try:
            snapshot.wait()
            own[HISTORY_FILE] = [past.settled(proven())]
            yield from snapshot.files().items()
            yield from own.items()
        finally:
            snapshot.release()

    return files


def commit_meta(spec: WorkerSpec, order: Order, world_size: int) -> dict[str, Any]:
    """What the manifest says beside the files: enough to refuse a resume that could not give the same run."""
    return {
        "run": spec.config.run,
        "attempt": spec.attempt,
        "world_size": world_size,
        "virtual_ranks": order.virtual_ranks,
        "threads": spec.threads,
        "dataset_fingerprint": order.fingerprint,
        "steps_per_epoch": order.steps_per_epoch,
        "skipped": sorted(spec.skip),
        "verified": bool(spec.config.train.verify_every),  # compared between ranks, and found finite, before it was acknowledged
        "decoder": DECODER_VERSIONS,
        "versions": versions(),
    }


def curve_row(stats: StepStats, step: int, loss: float, speed: Speed, *, attempt: int, steps_per_epoch: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / steps_per_epoch,
        "attempt": attempt,
        "time": time.time(),
        "train_loss": loss,
        "learning_rate": stats.learning_rate,
        "images_per_second": speed.images_per_second,
        "data_wait_seconds": stats.data_wait_seconds,
        "step_seconds": stats.step_seconds,
    }


def beat_stats(stats: StepStats, history: History, speed: Speed, own_seconds: float) -> dict[str, float]:
    accuracy = history.evaluations[-1]["test_accuracy"] if history.evaluations else float("nan")
    return {
        "loss": history.train_loss,
        "learning_rate": stats.learning_rate,
        "images_per_second": speed.images_per_second,
        "data_wait_ratio": speed.data_wait_ratio,
        "test_accuracy": accuracy,
        "own_seconds": own_seconds,
        **{f"total_{name}": getattr(history, name) for name in ACCOUNTED},
    }


def finish(
    spec: WorkerSpec,
    storage: Any,
    model: nn.Module,
    ema: Ema | None,
    dataset: Dataset,
    loader: Loader,
    history: History,
    curves: Curves,
    *,
    ranks: list[dict[str, float]],
    stopped: bool,
    steps_done: int,
    call: Callable[..., Any],
) -> None:
    """Rank 0, once the last checkpoint is committed: curves, the exported model, and the result for the driver."""
    config = spec.config
    storage.write_atomic(f"{config.run}/curves.parquet", curves.to_parquet())
    sha256 = weights_sha256(model)
    last = history.evaluations[-1] if history.evaluations else {}
    result = {
        "stopped": stopped,
        "steps_done": steps_done,
        "weights_sha256": sha256,
        "history": {k: v for k, v in asdict(history).items() if k not in ("evaluations", "guard")},
        "evaluation": last,
        "ranks": ranks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache": loader.cache,
        "backend": loader.backend_name,
        "decode_seconds": loader.decode_seconds,
        "device": str(next(model.parameters()).device),
    }
    if not stopped:
        tensors = ema.weights() if ema is not None else model.state_dict()
        export_model(
            storage=storage,
            run=config.run,
            tensors=tensors,
            config=config,
            classes=dataset.manifest.classes,
            data_image_size=loader.image_size,
            summary={
                "test_accuracy": last.get("test_accuracy"),
                "test_loss": last.get("test_loss"),
                "steps": steps_done,
                "weights_sha256": sha256,
                "dataset_fingerprint": dataset.manifest.fingerprint,
            },
        )
    call("put_result", spec.attempt, result)
