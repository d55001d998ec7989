"""The command line, and the composition root: `python -m trainer.run`, alone or under `ray job submit --`.

Reads downwards: settings -> data -> the run's folder and what to go on from -> a cluster -> attempts -> summary, report, table.
The only file that reads the environment.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster.controller import RunFailed, run_attempts
from cluster.coordinator import FILE_SD
from cluster.exporter import serve_discovery
from cluster.failures import Failure, History
from cluster.journal import Journal, last_attempt, read_journal
from cluster.storage import Storage, open_storage
from cluster.store import Commit, NoValidCheckpoint, Store
from dataio.convert import Progress as ConvertProgress
from dataio.convert import is_converted, prepare
from dataio.loader import image_size_of
from dataio.parquet import QUARANTINE_NAME, Dataset, open_dataset
from dataio.sources import open_source
from trainer.cli import fail, from_toml, parse, settings, to_toml, validate, worker_count
from trainer.config import RunConfig
from trainer.progress import ProgressLine, RunState, final_table
from trainer.report import write_report
from trainer.summary import summarise

PROJECT = Path(__file__).resolve().parent.parent
# Settings that change neither the weights nor the evaluation; all others must be the same when a run goes on.
FREE_SETTINGS = {
    *("workers", "run", "storage", "resume", "data.path", "data.root", "data.cache", "data.backend", "data.max_bad_fraction"),
    *("data.max_image_pixels", "data.test_fraction", "train.checkpoint_every", "train.eval_every_epochs", "train.ledger"),
}
SAYS_IT_ALL = ("WeightsError:", "OSError:", "StorageFull:")  # on a rank; where in the program they came up helps nobody
POLL_SECONDS = 0.25
SAME_SIGNAL_SECONDS = 0.3
CONVERT_LINE_SECONDS = 5.0
CHECKPOINT_WARNING_SECONDS = 60.0  # a disk that is full stays so for a while: one line, not one for each checkpoint
TAKEN_OVER_POLL_SECONDS = 5.0


def process_started() -> float:
    """Unix time at which this process began: imports are part of a run's seconds. From /proc/self/stat, field 22, ticks since boot."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit status: 0 done, 1 failed, 2 a wrong setting, 128 + signal when stopped by one."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    invocation = parse(argv)
    if invocation.action == "print_config":
        print(to_toml(invocation.config), end="")
        return 0
    signal.signal(signal.SIGTERM, _raise_exit)
    # A job's log is read by people and other programs: no wrapping at 80 columns there.
    console = Console() if sys.stdout.isatty() else Console(width=160, highlight=False)
    try:
        if invocation.action == "dry_run":
            return dry_run(invocation.config, invocation.recipes, console)
        recipe = run_prefix(invocation.config, invocation.recipes)
        return run(invocation.config, recipe=recipe, command=shlex.join(["python", "-m", "trainer.run", *argv]), console=console)
    except ValueError as error:
        fail(str(error))
    except OSError as error:  # a full disk, a folder that is no longer there: not a bug, and no traceback helps
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before training began; the same command starts again", file=sys.stderr)
        return 128 + signal.SIGINT


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


# --- before training ----------------------------------------------------------------------------------------------------------


def run_prefix(config: RunConfig, recipes: tuple[str, ...]) -> str:
    """How the name of a run begins that was given none."""
    return "-".join(recipes) or config.model.name.replace("/", "-")


def dry_run(config: RunConfig, recipes: tuple[str, ...], console: Console) -> int:
    """Say what would run: steps, memory, cost."""
    import torch

    from trainer.plan import Hardware, describe, model_facts, table

    manifest = open_dataset(config.data.path).manifest if is_converted(config.data.path) else None
    classes = len(manifest.classes) if manifest else 10
    if manifest is None:  # ValueError where there is nothing to convert
        source = open_source(config.data.path, root=Path(config.data.root).expanduser(), test_fraction=config.data.test_fraction)
        classes = 10 if source.kind.startswith("cifar") else len(source.classes)  # to count CIFAR's it would have to be downloaded
    gpus = torch.cuda.device_count()
    workers = worker_count(config) or max(1, gpus)
    device = torch.cuda.get_device_name(0) if gpus else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if gpus else None
    size = image_size_of(manifest, config.data) if manifest else (config.data.image_size or 32,) * 2
    if manifest is not None:
        recipe = run_prefix(config, recipes)
        config = resolved(config, workers=workers, fingerprint=manifest.fingerprint, recipe=recipe, image_size=size)
    facts = model_facts(config.model, classes=classes, image_size=size)
    console.print(table(describe(config, manifest, Hardware(workers=workers, device=device, device_bytes=memory), facts)))
    if manifest is None:
        command = shlex.join(["python", "-m", "dataio.convert", config.data.path, "DEST"])
        console.print(f"For exact numbers convert the data first: {command}", soft_wrap=True, highlight=False)
    return 0


def check_storage_outlives_job(storage: str) -> None:
    """ValueError for a relative folder: a job's working directory is a copy that Ray deletes."""
    if "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise ValueError(
            f"--storage {storage} is relative, and a job's working directory is a copy that Ray deletes after it; "
            "give an absolute path that every node mounts, or s3://..., gs://..."
        )


def open_data(config: RunConfig, console: Console) -> tuple[Path, Dataset]:
    """The converted data set a run reads; a source that is not converted yet is converted into `data.root`."""
    shown_at: float | None = None

    def on_progress(progress: ConvertProgress) -> None:
        nonlocal shown_at
        if shown_at is None or time.monotonic() - shown_at > CONVERT_LINE_SECONDS:
            shown_at = time.monotonic()
            console.print(f"converting {config.data.path}: {progress.describe()}", soft_wrap=True, markup=False)

    folder = prepare(config.data, on_progress=on_progress).resolve()
    dataset = open_dataset(folder)
    if shown_at is not None:
        console.print(f"converted into {folder}", soft_wrap=True, markup=False)
    if dataset.manifest.quarantined:
        count = dataset.manifest.quarantined
        left_out = f"{count} image{'' if count == 1 else 's'} that could not be used {'is' if count == 1 else 'are'} left out"
        console.print(f"{left_out}: {folder / QUARANTINE_NAME}", soft_wrap=True, markup=False)
    return folder, dataset


def check_before_cluster(config: RunConfig, storage: Storage, dataset: Dataset) -> None:
    """ValueError for what would fail on the workers, found in a second and before a cluster is started. Downloaded weights stay in the
    library's cache, so that the workers of this node find them."""
    from trainer.model import build_model

    if storage.is_local:
        try:
            storage.make_dir("")
        except OSError as error:
            raise ValueError(f"storage {storage.uri!r} cannot be made ({error.strerror}); give a folder that can with --storage") from None
    check_same_run(config, storage, dataset.manifest.fingerprint)
    check_resume(config, has_checkpoint=bool(Store.open(storage, config.run).commits()))
    serve_discovery(config.cluster.metrics_host, config.cluster.discovery_port, list).close()  # the coordinator will, on this node
    build_model(
        config.model,
        classes=len(dataset.manifest.classes),
        seed=config.train.seed,
        image_hw=image_size_of(dataset.manifest, config.data),
    )


def check_resume(config: RunConfig, *, has_checkpoint: bool) -> None:
    """ValueError where --resume forbids what was found."""
    if config.resume == "must" and not has_checkpoint:
        raise ValueError(f"--resume must, but run {config.run!r} in {config.storage} has no checkpoint; give --run NAME of one that has")
    if config.resume == "never" and has_checkpoint:
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has a checkpoint; give another --run NAME")


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides a run's weights."""
    flat = {key: value for key, value in settings(config).items() if key not in FREE_SETTINGS and not key.startswith("cluster.")}
    return flat | {"dataset": fingerprint, "model.weights": Path(config.model.weights).name}


def resolved(config: RunConfig, *, workers: int, fingerprint: str, recipe: str, image_size: tuple[int, int]) -> RunConfig:
    """`config` with everything decided that was left open: virtual ranks, the run's name, the storage's full address."""
    storage = open_storage(config.storage)
    virtual_ranks = config.train.virtual_ranks or saved_virtual_ranks(storage, config.run, workers) or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), storage=storage.uri)
    validate(config, workers=workers, image_size=image_size)
    if not config.run:
        # Named after what it is, so that the same command given again goes on with the same run.
        digest = hashlib.sha256(json.dumps(identity(config, fingerprint), sort_keys=True, default=list).encode()).hexdigest()
        config = dataclasses.replace(config, run=f"{recipe}-{digest[:8]}")
    return config


def saved_virtual_ranks(storage: Storage, run: str, workers: int) -> int:
    """Those that a named run was started with, if `workers` can carry them: it may go on with another number of workers. Else 0."""
    name = f"{run}/config.toml"
    if not run or not storage.exists(name):
        return 0
    saved = from_toml(storage.read(name).decode(), origin=name).train.virtual_ranks
    return saved if saved >= workers else 0


def check_same_run(config: RunConfig, storage: Storage, fingerprint: str) -> None:
    """ValueError if the run of this name was started with other settings."""
    name = f"{config.run}/config.toml"
    if not storage.exists(name):
        return
    before = identity(from_toml(storage.read(name).decode(), origin=name), fingerprint)
    now = identity(config, fingerprint)
    changed = [f"{key}: {before[key]!r} then, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if changed and before["train.virtual_ranks"] < now["train.virtual_ranks"]:
        changed.append(f"it can go on with at most {before['train.virtual_ranks']} workers")
    if changed:
        raise ValueError(
            f"run {config.run!r} was started with other settings ({'; '.join(changed)}); "
            "give the same settings to go on, or another --run NAME to start anew"
        )


def check_same_data(config: RunConfig, saved: str, fingerprint: str) -> None:
    """ValueError if the run of this name was trained on the data set `saved`, and that is another."""
    if saved != fingerprint:
        raise ValueError(
            f"run {config.run!r} was trained on the data set {saved[:12]}, this is {fingerprint[:12]}; "
            "give the same --data.path to go on, or another --run NAME to start anew"
        )


def find_start(config: RunConfig, store: Store, journal: Journal, console: Console, fingerprint: str) -> Commit | None:
    """The commit to go on from; None starts at zero."""

    def on_corrupt(path: str, reason: str) -> None:
        journal.write("checkpoint_corrupt", path=path, reason=reason)
        console.print(f"checkpoint {path} is damaged ({reason}); going back to the one before")

    try:
        commit = store.newest_valid(on_corrupt)
    except NoValidCheckpoint as error:
        raise ValueError(str(error)) from None
    if commit is None:
        return None
    check_same_data(config, commit.meta["dataset_fingerprint"], fingerprint)
    return commit


# --- the run ------------------------------------------------------------------------------------------------------------------


def run(config: RunConfig, *, recipe: str, command: str, console: Console) -> int:
    """One run from its data to its report."""
    import torch

    from cluster.launch import Hardware, plan_resources, ray_cluster
    from cluster.preflight import preflight, versions

    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job:
        check_storage_outlives_job(config.storage)
    folder, dataset = open_data(config, console)
    fingerprint = dataset.manifest.fingerprint
    image_size = image_size_of(dataset.manifest, config.data)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    cluster = ray_cluster(
        config.cluster,
        project=PROJECT,
        address=address,
        in_job=in_job,
        cpus=os.cpu_count() or 1,
        verbose=bool(os.environ.get("FINETUNE_VERBOSE")),
    )
    wanted = worker_count(config)
    if not address:
        here = Hardware(local=True, nodes=1, cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count())
        wanted = plan_resources(config.workers, config.cluster, here).workers
    if wanted is not None:  # everything that needs no cluster is checked before one is started
        early = resolved(config, workers=wanted, fingerprint=fingerprint, recipe=recipe, image_size=image_size)
        if (done := finished_summary(early, fingerprint)) is not None:
            return show_finished(early, done, console)
        check_before_cluster(early, open_storage(early.storage), dataset)
    console.print(f"joining the Ray cluster at {address}" if address else "starting a local Ray")
    with cluster as hardware:
        resources = plan_resources(config.workers, config.cluster, hardware)
        config = resolved(config, workers=resources.workers, fingerprint=fingerprint, recipe=recipe, image_size=image_size)
        if (done := finished_summary(config, fingerprint)) is not None:
            return show_finished(config, done, console)
        storage = open_storage(config.storage)
        check_same_run(config, storage, fingerprint)
        is_shared = preflight(storage, config.run, hardware, lambda: open_dataset(folder).manifest.fingerprint)
        journal = Journal.open(storage, config.run, writer=f"driver-{os.getpid()}-{int(time.time())}")
        journal.write(
            "run_started",
            command=command,
            versions=versions(),
            pid=os.getpid(),
            process_started=process_started(),
            resources=dataclasses.asdict(resources),
        )
        store = Store.open(storage, config.run)
        start = find_start(config, store, journal, console, fingerprint)
        check_resume(config, has_checkpoint=start is not None)
        storage.write_atomic(f"{config.run}/config.toml", to_toml(config).encode())
        console.print(f"run {config.run} in {storage.uri}: {described(resources.workers, hardware)}", soft_wrap=True)
        return _Drive(
            config=config,
            dataset=dataset,
            location=str(folder) if is_shared else ship(dataset, folder, config),
            storage=storage,
            store=store,
            journal=journal,
            resources=resources,
            command=command,
            console=console,
        ).go(start)


def described(workers: int, hardware: Any) -> str:
    """`2 workers on 8 CPUs`, `1 worker on 1 GPU and 16 CPUs`."""

    def counted(count: int, what: str) -> str:
        return f"{count} {what}" if count == 1 else f"{count} {what}s"

    gpus = f"{counted(hardware.gpus, 'GPU')} and " if hardware.gpus else ""
    return f"{counted(workers, 'worker')} on {gpus}{counted(hardware.cpus, 'CPU')}"


def finished_summary(config: RunConfig, fingerprint: str) -> Mapping[str, Any] | None:
    """The summary of this run if it has ended well already."""
    storage = open_storage(config.storage)
    name = f"{config.run}/summary.json"
    if not storage.exists(name):
        return None
    check_same_run(config, storage, fingerprint)
    summary: dict[str, Any] = json.loads(storage.read(name))
    if summary.get("status") != "finished":
        return None
    check_same_data(config, summary["dataset_fingerprint"], fingerprint)
    return summary


def show_finished(config: RunConfig, summary: Mapping[str, Any], console: Console) -> int:
    if config.resume == "never":
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has finished; give another --run NAME")
    folder = f"{config.storage}/{config.run}"
    console.print(f"run {config.run} has finished already; --run NAME starts another")
    console.print(final_table(summary, report=f"{folder}/report.html", predict=predict_command(folder)), soft_wrap=True)
    return 0


def predict_command(folder: str) -> str:
    return f"python -m trainer.predict {shlex.quote(folder)} IMAGE..."


def ship(dataset: Dataset, folder: Path, config: RunConfig) -> dict[str, Any]:
    """The data set's files in Ray's object store, for nodes that cannot read `folder`."""
    import numpy as np
    import ray

    if dataset.size_bytes > config.cluster.object_store_limit_bytes:
        raise ValueError(
            f"data set {folder} ({dataset.size_bytes:,} bytes) can be read on this node only and is larger than "
            f"cluster.object_store_limit_bytes={config.cluster.object_store_limit_bytes:,}; put it on storage that every node mounts "
            "and give that path to --data.path, or raise the limit if the nodes' object stores can hold it"
        )
    return {
        name: ray.put(np.fromfile(file, dtype=np.uint8) if isinstance(file, Path) else np.frombuffer(file, dtype=np.uint8))
        for name, file in dataset.files().items()
    }


class _Drive:
    """The driver's part of a run: attempts, progress, signals, and the end. Lives as long as one command."""

    def __init__(
        self,
        *,
        config: RunConfig,
        dataset: Dataset,
        location: str | Mapping[str, Any],
        storage: Storage,
        store: Store,
        journal: Journal,
        resources: Any,
        command: str,
        console: Console,
    ) -> None:
        from cluster.launch import start_coordinator
        from trainer.worker import make_order, total_steps_of

        self.config, self.dataset, self.location = config, dataset, location
        self.storage, self.store, self.journal = storage, store, journal
        self.resources, self.command, self.console = resources, command, console
        self.steps_per_epoch = make_order(config, dataset).steps_per_epoch
        self.total_steps = total_steps_of(config, self.steps_per_epoch)
        self.signal, self.signal_at = 0, 0.0
        self.phase, self.phase_began = "", time.monotonic()
        self.failed_checkpoints, self.failure_told_at = 0, -math.inf
        self.result: dict[str, Any] | None = None
        self.restarts = 0
        self.generation = store.claim_generation()
        self.coordinator = start_coordinator(
            storage_uri=storage.uri,
            run=config.run,
            generation=self.generation,
            keep=config.cluster.keep_checkpoints,
            metrics_host=config.cluster.metrics_host,
            discovery_port=config.cluster.discovery_port,
        )

    def go(self, start: Commit | None) -> int:
        if self.committed_step() > (start.step if start else 0):  # by a driver that was still at work when this one took over
            start = find_start(self.config, self.store, self.journal, self.console, self.dataset.manifest.fingerprint)
        first = 1 + last_attempt(read_journal(self.storage, self.config.run))
        discovery = self.ask("discovery_address")
        file_sd = f", file_sd {self.storage.at(self.config.run)}/{FILE_SD}" if self.storage.is_local else ""
        self.console.print(f"Prometheus: http_sd http://{discovery}/sd{file_sd}", soft_wrap=True)
        if start is not None:
            self.journal.write("resumed", step=start.step, path=start.path)
            self.console.print(f"going on from step {start.step:,} of {self.total_steps:,}")
            before, now = start.meta["threads"], self.resources.threads_per_worker
            if before != now:
                self.console.print(
                    f"threads of a worker: {before} before, {now} now; the weights may differ in their last bits "
                    f"from an uninterrupted run's (--cluster.threads-per-worker {before} keeps them)"
                )
        self.start = start
        try:
            with ProgressLine(self.console) as self.line, self.signals():
                self.restarts = run_attempts(
                    self.attempt,
                    first_attempt=first,
                    committed_step=self.committed_step,
                    policy=self.config.cluster.faults,
                    on_failure=self.on_failure,
                    stopping=lambda: self.signal != 0,
                )
        except RunFailed as error:
            return self.end_taken_over() if self.is_taken_over() else self.end_failed(error)
        if (self.result is None or self.result["stopped"]) and self.is_taken_over():
            return self.end_taken_over()
        if self.result is None or self.result["stopped"]:
            return self.end_stopped()
        return self.end_finished()

    # One attempt, from the driver's side.

    def attempt(self, number: int) -> Failure | None:
        from cluster.launch import Attempt
        from trainer.worker import WorkerSpec, train_worker

        start = self.start
        self.ask("start_attempt", number, self.resources.workers, start.step if start else 0)
        spec = WorkerSpec(
            config=self.config,
            dataset=self.location,
            generation=self.generation,
            attempt=number,
            resume=(start.step, start.generation) if start else None,
            coordinator=self.coordinator,
            threads=self.resources.threads_per_worker,
        )
        fit = Attempt(train_worker, {"spec": spec}, name=f"{self.config.run}-{number}-{os.getpid()}", resources=self.resources)
        stop_asked_at = None
        looked_at = time.monotonic()
        while not fit.wait(POLL_SECONDS):
            status = self.ask("status")
            if time.monotonic() - looked_at > TAKEN_OVER_POLL_SECONDS:
                looked_at = time.monotonic()
                if self.is_taken_over():
                    fit.abandon()
                    return None
            if self.signal and stop_asked_at is None:
                stop_asked_at = time.monotonic()
                name = signal.Signals(self.signal).name
                self.ask("request_stop", name)
                if status.steps_done <= status.start_step:
                    self.line.message(f"{name}: stopping; no step has been done yet")
                    fit.abandon()
                    return None  # no step was done in this attempt: there is nothing new to save
                self.line.message(f"{name}: saving a checkpoint, then stopping (again to stop at once)")
            self.show(status)
            if stop_asked_at is not None and time.monotonic() - stop_asked_at > self.config.cluster.stop_grace_seconds:
                self.line.message(f"no checkpoint within cluster.stop_grace_seconds={self.config.cluster.stop_grace_seconds:g}; stopping")
                fit.abandon()
                return None
        failure = fit.failure()
        self.result = self.ask("result", number)
        if failure is None or self.is_taken_over():
            return None
        # An attempt that handed in its result had nothing left to do; what died after that does not matter.
        return None if self.result is not None else failure

    def on_failure(self, number: int, failure: Failure, history: History) -> None:
        self.restarts += 1
        status = self.ask("status")
        reached = max((rank.steps_done for rank in status.ranks.values()), default=0)
        self.tell(
            "attempt_failed",
            attempt=number,
            kind=failure.kind,
            rank=failure.rank,
            message=failure.message,
            last_step=reached,
            lost_steps=max(0, reached - max(0, self.committed_step())),
        )
        self.ask("drain", 30.0)  # a checkpoint that all ranks had staged still counts
        self.start = find_start(self.config, self.store, self.journal, self.console, self.dataset.manifest.fingerprint)
        if self.start is not None:
            self.journal.write("resumed", step=self.start.step, path=self.start.path)
        if failure.kind in ("infrastructure", "preempted"):  # others end the run, with the whole message
            where = f" on rank {failure.rank}" if failure.rank is not None else ""
            lost = reached - (self.start.step if self.start else 0)
            cost = f"{lost} step{'' if lost == 1 else 's'} to do again, " if lost > 0 else ""
            back = f"going on from step {self.start.step:,}" if self.start else "starting from the beginning"
            first_line = failure.message.splitlines()[0][:200]
            self.line.message(f"attempt {number} failed{where} at step {reached:,} ({failure.kind}: {first_line}); {cost}{back}")

    def is_taken_over(self) -> bool:
        """Another process drives this run now. A storage that does not answer says nothing about that."""
        try:
            return self.store.newest_generation() > self.generation
        except OSError:
            return False

    def tell(self, event: str, **fields: Any) -> None:
        """Into the journal by way of the coordinator, which counts failures; directly where it is gone."""
        import ray

        try:
            ray.get(self.coordinator.event.remote(event, **fields), timeout=60)
        except ray.exceptions.RayError:
            self.journal.write(event, **fields)

    def committed_step(self) -> int:
        """Of the newest commit; -1 where there is none."""
        commits = self.store.commits()
        return commits[0].step if commits else -1

    def ask(self, method: str, *args: Any) -> Any:
        import ray

        return ray.get(getattr(self.coordinator, method).remote(*args), timeout=60)

    def show(self, status: Any) -> None:
        ranks = status.ranks
        started = self.start.step if self.start else 0
        steps = max((rank.steps_done for rank in ranks.values()), default=started)
        stats = ranks[0].stats if 0 in ranks else {}
        if self.signal:
            phase = "stopping"
        elif steps > started:
            phase = "training"
        else:
            again = "re" if self.restarts else ""
            phase = f"{again}starting workers" if len(ranks) < self.resources.workers else "loading data and model"
        if phase != self.phase:
            self.phase, self.phase_began = phase, time.monotonic()
        if status.failed_checkpoints > self.failed_checkpoints:
            self.failed_checkpoints = status.failed_checkpoints
            if time.monotonic() - self.failure_told_at > CHECKPOINT_WARNING_SECONDS:
                self.failure_told_at = time.monotonic()
                self.line.message(f"warning: a checkpoint was not saved, training goes on: {status.checkpoint_problem}")
        rate = stats.get("images_per_second") or 0.0
        left = (self.total_steps - steps) * self.config.data.batch_size / rate if rate else None

        def known(name: str) -> float | None:
            value = stats.get(name)
            return None if value is None or value != value else value

        self.line.update(
            RunState(
                run=self.config.run,
                phase=self.phase,
                phase_seconds=None if phase == "training" else time.monotonic() - self.phase_began,
                step=steps,
                total_steps=self.total_steps,
                epoch=steps / self.steps_per_epoch,
                epochs=self.config.train.epochs,
                loss=known("loss"),
                learning_rate=known("learning_rate"),
                images_per_second=known("images_per_second"),
                data_wait_ratio=known("data_wait_ratio"),
                test_accuracy=known("test_accuracy"),
                checkpoint_step=status.last_commit_step,
                checkpoint_age_seconds=time.time() - status.last_commit_time if status.last_commit_time else None,
                remaining_seconds=left,
                restarts=self.restarts,
            )
        )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint first; the second one ends the program at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self.signal and now - self.signal_at < SAME_SIGNAL_SECONDS:
                return  # `timeout` and some schedulers send theirs to the process and to its group
            if self.signal:
                print("stopped at once; the same command goes on from the newest saved checkpoint", file=sys.stderr)
                raise SystemExit(128 + number)
            self.signal, self.signal_at = number, now

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # Four ways to end.

    def end_finished(self) -> int:
        self.journal.write("run_finished", steps=self.total_steps)
        summary, report = self.write_summary("finished")
        folder = f"{self.storage.uri}/{self.config.run}"
        self.console.print(final_table(summary, report=report, predict=predict_command(folder)), soft_wrap=True)
        return 0

    def end_stopped(self) -> int:
        commit = self.store.newest_valid(lambda path, reason: None)
        self.journal.write("run_stopped", step=commit.step if commit else 0, signal=signal.Signals(self.signal).name if self.signal else "")
        summary, report = self.write_summary("stopped")
        self.console.print(final_table(summary, report=report), soft_wrap=True)
        if commit:
            done = f"step {commit.step:,} of {self.total_steps:,} is saved. The same command goes on from there"
        else:
            done = "nothing was saved yet. The same command starts again"
        self.console.print(f"stopped: {done}:\n  {self.command}", soft_wrap=True, markup=False, highlight=False)
        return 128 + self.signal if self.signal else 1

    def end_taken_over(self) -> int:
        """Nothing but the journal is written: summary and report are the other process's now."""
        claim = json.loads(self.storage.read(f"{self.config.run}/generations/g{self.store.newest_generation():04d}"))
        other = f"process {claim['pid']} on {claim['host']}"
        self.journal.write("run_taken_over", by=other, generation=self.generation)
        print(
            f"error: run {self.config.run} was taken over by {other}, which goes on from the newest checkpoint; this process ends. "
            "To have both, give one of them another --run NAME",
            file=sys.stderr,
        )
        return 1

    def end_failed(self, error: RunFailed) -> int:
        self.journal.write(
            "run_failed", kind=error.failure.kind, rank=error.failure.rank, message=error.failure.message, reason=error.reason
        )
        self.write_summary("failed")
        if error.failure.kind == "user" and not error.failure.message.startswith(SAYS_IT_ALL):
            print(error.failure.traceback, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        if (step := self.committed_step()) >= 0:
            print(f"step {step} is saved; once the cause is mended the same command goes on from there", file=sys.stderr)
        return 1

    def write_summary(self, status: str) -> tuple[dict[str, Any], str | None]:
        """The summary, and where the report is; None where it could not be written."""
        from cluster.preflight import versions

        events = read_journal(self.storage, self.config.run)
        summary = summarise(
            config=self.config,
            status=status,
            events=events,
            result=self.result,
            facts={
                "workers": self.resources.workers,
                "threads": self.resources.threads_per_worker,
                "steps_per_epoch": self.steps_per_epoch,
                "classes": list(self.dataset.manifest.classes),
                "dataset_fingerprint": self.dataset.manifest.fingerprint,
                "quarantined": self.dataset.manifest.quarantined + self.ask("status").quarantined,
                "versions": versions(),
                "command": self.command,
            },
        )
        try:
            self.storage.write_atomic(f"{self.config.run}/summary.json", json.dumps(_finite(summary), indent=1, allow_nan=False).encode())
            return summary, str(write_report(f"{self.storage.uri}/{self.config.run}"))
        except OSError as error:  # a full disk, most likely: what came out is still told, and the checkpoints are what they were
            print(f"warning: summary.json and report.html could not be written: {error}", file=sys.stderr)
            return summary, None


def _finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
