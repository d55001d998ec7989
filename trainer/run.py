"""The command line, and the composition root: `python -m trainer.run`, alone or under `ray job submit --`.

Reads downwards: settings -> data -> the run's folder and what to go on from -> a cluster -> attempts -> summary, report, table.
The only file that reads the environment.
"""

import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
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
from cluster.failures import Failure, History
from cluster.journal import Journal, last_attempt, read_journal
from cluster.storage import Storage, open_storage
from cluster.store import Commit, NoValidCheckpoint, Store
from dataio.convert import Progress as ConvertProgress
from dataio.convert import is_converted, prepare
from dataio.loader import image_size_of
from dataio.parquet import Dataset, open_dataset
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
POLL_SECONDS = 0.25
TAKEN_OVER_POLL_SECONDS = 5.0


def process_started() -> float:
    """Unix time at which this process began: imports are part of a run's seconds. From /proc/self/stat, field 22, ticks since boot."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit status: 0 done, 1 failed, 2 a wrong setting, 128 + signal when stopped by one."""
    argv = sys.argv[1:] if argv is None else argv
    invocation = parse(argv)
    if invocation.action == "print_config":
        print(to_toml(invocation.config), end="")
        return 0
    signal.signal(signal.SIGTERM, _raise_exit)
    # A job's log is read by people and other programs: no wrapping at 80 columns there.
    console = Console() if sys.stdout.isatty() else Console(width=160, highlight=False)
    try:
        if invocation.action == "dry_run":
            return dry_run(invocation.config, console)
        recipe = "-".join(invocation.recipes) or invocation.config.model.name.replace("/", "-")
        return run(invocation.config, recipe=recipe, command=shlex.join(["python", "-m", "trainer.run", *argv]), console=console)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted before training began; the same command starts again", file=sys.stderr)
        return 128 + signal.SIGINT


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


# --- before training ----------------------------------------------------------------------------------------------------------


def dry_run(config: RunConfig, console: Console) -> int:
    """Say what would run: steps, memory, cost."""
    import torch

    from trainer.plan import Hardware, describe, model_facts, table

    manifest = open_dataset(config.data.path).manifest if is_converted(config.data.path) else None
    gpus = torch.cuda.device_count()
    workers = worker_count(config) or max(1, gpus)
    device = torch.cuda.get_device_name(0) if gpus else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if gpus else None
    classes = len(manifest.classes) if manifest else 10
    size = image_size_of(manifest, config.data) if manifest else (config.data.image_size or 32,) * 2
    facts = model_facts(config.model, classes=classes, image_size=size)
    console.print(table(describe(config, manifest, Hardware(workers=workers, device=device, device_bytes=memory), facts)))
    if manifest is None:
        console.print(f"{config.data.path} is not converted yet: run `python -m dataio.convert {config.data.path} DEST` for exact counts")
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
    shown = [0.0]

    def on_progress(progress: ConvertProgress) -> None:
        if time.monotonic() - shown[0] > 5:
            shown[0] = time.monotonic()
            console.print(f"converting {config.data.path}: {progress}")

    folder = prepare(config.data, on_progress=on_progress)
    return folder.resolve(), open_dataset(folder)


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


def find_start(config: RunConfig, store: Store, journal: Journal, console: Console, fingerprint: str) -> Commit | None:
    """The commit to go on from; None starts at zero. ValueError where --resume forbids what was found."""

    def on_corrupt(path: str, reason: str) -> None:
        journal.write("checkpoint_corrupt", path=path, reason=reason)
        console.print(f"checkpoint {path} is damaged ({reason}); going back to the one before")

    try:
        commit = store.newest_valid(on_corrupt)
    except NoValidCheckpoint as error:
        raise ValueError(str(error)) from None
    if commit is None:
        if config.resume == "must":
            raise ValueError(
                f"--resume must, but run {config.run!r} in {config.storage} has no checkpoint; give --run NAME of one that has"
            )
        return None
    if config.resume == "never":
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has a checkpoint; give another --run NAME")
    saved = commit.meta["dataset_fingerprint"]
    if saved != fingerprint:
        raise ValueError(
            f"run {config.run!r} was trained on the data set {saved[:12]}, this is {fingerprint[:12]}; "
            "give the same --data.path to go on, or another --run NAME to start anew"
        )
    return commit


# --- the run ------------------------------------------------------------------------------------------------------------------


def run(config: RunConfig, *, recipe: str, command: str, console: Console) -> int:
    """One run from its data to its report."""
    from cluster.launch import plan_resources, ray_cluster
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
    if wanted is not None:  # everything that needs no cluster is checked before one is started
        early = resolved(config, workers=wanted, fingerprint=fingerprint, recipe=recipe, image_size=image_size)
        if (done := finished_summary(early, fingerprint)) is not None:
            return show_finished(early, done, console)
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
        storage.write_atomic(f"{config.run}/config.toml", to_toml(config).encode())
        console.print(f"run {config.run} in {storage.uri}: {resources.workers} worker(s) on {hardware.cpus} CPUs, {hardware.gpus} GPUs")
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


def finished_summary(config: RunConfig, fingerprint: str) -> Mapping[str, Any] | None:
    """The summary of this run if it has ended well already."""
    storage = open_storage(config.storage)
    name = f"{config.run}/summary.json"
    if not storage.exists(name):
        return None
    check_same_run(config, storage, fingerprint)
    summary: dict[str, Any] = json.loads(storage.read(name))
    return summary if summary.get("status") == "finished" else None


def show_finished(config: RunConfig, summary: Mapping[str, Any], console: Console) -> int:
    if config.resume == "never":
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has finished; give another --run NAME")
    folder = f"{config.storage}/{config.run}"
    console.print(f"run {config.run} has finished already; --run NAME starts another")
    console.print(final_table(summary, report=f"{folder}/report.html", predict=predict_command(folder)))
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
        self.signal = 0
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
        self.console.print(f"Prometheus: http_sd http://{discovery}/sd{file_sd}")
        if start is not None:
            self.journal.write("resumed", step=start.step, path=start.path)
            self.console.print(f"going on from step {start.step:,} of {self.total_steps:,}")
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
        self.phase = "starting" if not self.restarts else "restarting"
        fit = Attempt(train_worker, {"spec": spec}, name=f"{self.config.run}-{number}-{os.getpid()}", resources=self.resources)
        stop_asked_at = None
        looked_at = time.monotonic()
        while not fit.wait(POLL_SECONDS):
            status = self.ask("status")
            self.show(status)
            if time.monotonic() - looked_at > TAKEN_OVER_POLL_SECONDS:
                looked_at = time.monotonic()
                if self.is_taken_over():
                    fit.abandon()
                    return None
            if self.signal and stop_asked_at is None:
                stop_asked_at = time.monotonic()
                name = signal.Signals(self.signal).name
                self.line.message(f"{name}: saving a checkpoint, then stopping (again to stop at once)")
                self.ask("request_stop", name)
                if status.steps_done <= status.start_step:
                    fit.abandon()
                    return None  # no step was done in this attempt: there is nothing new to save
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
        first_line = failure.message.splitlines()[0][:200]
        self.line.message(f"attempt {number} failed ({failure.kind}, rank {failure.rank}): {first_line}")
        self.ask("drain", 30.0)  # a checkpoint that all ranks had staged still counts
        self.start = find_start(self.config, self.store, self.journal, self.console, self.dataset.manifest.fingerprint)
        if self.start is not None:
            self.journal.write("resumed", step=self.start.step, path=self.start.path)

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
        if steps > started:
            self.phase = "stopping" if self.signal else "training"
        rate = stats.get("images_per_second") or 0.0
        left = (self.total_steps - steps) * self.config.data.batch_size / rate if rate else None

        def known(name: str) -> float | None:
            value = stats.get(name)
            return None if value is None or value != value else value

        self.line.update(
            RunState(
                run=self.config.run,
                phase=self.phase,
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
            if self.signal:
                raise SystemExit(128 + number)
            self.signal = number

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
        self.console.print(final_table(summary, report=report, predict=predict_command(folder)))
        return 0

    def end_stopped(self) -> int:
        commit = self.store.newest_valid(lambda path, reason: None)
        self.journal.write("run_stopped", step=commit.step if commit else 0, signal=signal.Signals(self.signal).name if self.signal else "")
        summary, report = self.write_summary("stopped")
        self.console.print(final_table(summary, report=report, go_on=self.command))
        done = f"step {commit.step:,} of {self.total_steps:,} is saved" if commit else "nothing was saved yet"
        self.console.print(f"stopped: {done}. The same command goes on from there:\n  {self.command}", soft_wrap=True)
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
        if error.failure.traceback:
            print(error.failure.traceback, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        if (step := self.committed_step()) >= 0:
            print(f"step {step} is saved; once the cause is mended the same command goes on from there", file=sys.stderr)
        return 1

    def write_summary(self, status: str) -> tuple[dict[str, Any], str]:
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
        self.storage.write_atomic(f"{self.config.run}/summary.json", json.dumps(_finite(summary), indent=1, allow_nan=False).encode())
        return summary, str(write_report(f"{self.storage.uri}/{self.config.run}"))


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
