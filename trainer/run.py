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
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster.exporter import serve_discovery
from cluster.journal import Journal
from cluster.redact import redact
from cluster.storage import Storage, open_storage
from cluster.store import Commit, NoValidCheckpoint, Store
from cluster.zygote import Zygote
from dataio.codecs.image.decode import DECODER_VERSIONS, FIRST_VERSIONS
from dataio.convert import Progress as ConvertProgress
from dataio.convert import is_converted, open_prepared
from dataio.manifest import Manifest, image_size_of, resizes
from dataio.parquet import QUARANTINE_NAME, Dataset, open_dataset
from dataio.sources import open_source
from trainer.drive.capability import Capability, as_started, decide, here, weakest
from trainer.drive.check import ModelCheck
from trainer.runs.progress import final_table, predict_command
from trainer.settings.cli import fail, parse
from trainer.settings.identity import deciding_changes, deciding_settings
from trainer.settings.rules import validate, worker_count
from trainer.settings.spec import RANK_MODULES
from trainer.settings.toml import from_toml, to_toml
from trainer.settings.tree import RunConfig

PROJECT = Path(__file__).resolve().parent.parent
CONVERT_LINE_SECONDS = 5.0


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

    from trainer.drive.plan import Hardware, describe, model_facts, table

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
    capability = here(use_gpus=gpus > 0 and config.cluster.gpus_per_worker != 0)
    config = decided(
        config, capability, has_depthwise=facts.has_depthwise, tell=lambda line: console.print(line, soft_wrap=True, markup=False)
    )
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


def open_data(config: RunConfig, console: Console) -> tuple[str, Dataset]:
    """The converted data set a run reads, and its folder or URI; a source that is not converted yet is converted into `data.root`."""
    shown_at: float | None = None

    def on_progress(progress: ConvertProgress) -> None:
        nonlocal shown_at
        if shown_at is None or time.monotonic() - shown_at > CONVERT_LINE_SECONDS:
            shown_at = time.monotonic()
            console.print(f"converting {config.data.path}: {progress.describe()}", soft_wrap=True, markup=False)

    location, dataset = open_prepared(config.data, on_progress=on_progress)
    if shown_at is not None:
        console.print(f"converted into {dataset.where}", soft_wrap=True, markup=False)
    if dataset.manifest.quarantined:
        count = dataset.manifest.quarantined
        left_out = f"{count} image{'' if count == 1 else 's'} that could not be used {'is' if count == 1 else 'are'} left out"
        console.print(f"{left_out}: {dataset.where}/{QUARANTINE_NAME}", soft_wrap=True, markup=False)
    return location, dataset


def check_before_cluster(config: RunConfig, storage: Storage, dataset: Dataset) -> None:
    """ValueError for what would fail on the workers, found in a second and before a cluster is started."""
    if storage.is_local:
        try:
            storage.make_dir("")
        except OSError as error:
            raise ValueError(f"storage {storage.uri!r} cannot be made ({error.strerror}); give a folder that can with --storage") from None
    check_same_run(config, storage, dataset.manifest.fingerprint)
    check_resume(config, has_checkpoint=bool(Store.open(storage, config.run).commits()))
    serve_discovery(config.cluster.metrics_host, config.cluster.discovery_port, list).close()  # the coordinator will, on this node


def check_resume(config: RunConfig, *, has_checkpoint: bool) -> None:
    """ValueError where --resume forbids what was found."""
    if config.resume == "must" and not has_checkpoint:
        raise ValueError(f"--resume must, but run {config.run!r} in {config.storage} has no checkpoint; give --run NAME of one that has")
    if config.resume == "never" and has_checkpoint:
        raise ValueError(f"--resume never, but run {config.run!r} in {config.storage} has a checkpoint; give another --run NAME")


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides a run's weights."""
    return deciding_settings(config) | {"dataset": fingerprint}


def resolved(config: RunConfig, *, workers: int, fingerprint: str, recipe: str, image_size: tuple[int, int]) -> RunConfig:
    """`config` with everything decided that was left open: virtual ranks, the run's name, the storage's full address."""
    storage = open_storage(config.storage, config.cluster.storage_retry_seconds)
    virtual_ranks = config.train.virtual_ranks or saved_virtual_ranks(storage, config.run, workers) or workers
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, virtual_ranks=virtual_ranks), storage=storage.uri)
    validate(config, workers=workers, image_size=image_size)
    if not config.run:
        # Named after what it is, so that the same command given again goes on with the same run.
        digest = hashlib.sha256(json.dumps(identity(config, fingerprint), sort_keys=True, default=list).encode()).hexdigest()
        # Before what is left at auto is decided: the command means the same run on every machine.
        config = dataclasses.replace(config, run=f"{recipe}-{digest[:8]}")
    saved = saved_config(storage, config.run)
    return config if saved is None else dataclasses.replace(config, train=as_started(config.train, saved.train))


def decided(config: RunConfig, capability: Capability, *, has_depthwise: bool, tell: Callable[[str], None]) -> RunConfig:
    """`config` with what is still at auto decided by the devices. A run that goes on has nothing left open: `resolved` took what it has."""
    decision = decide(config.train, capability, has_depthwise=has_depthwise)
    for line in (*decision.said, *(f"warning: {warning}" for warning in decision.warnings)):
        tell(line)
    return dataclasses.replace(config, train=decision.train)


def saved_config(storage: Storage, run: str) -> RunConfig | None:
    """What the run of this name was started with."""
    name = f"{run}/config.toml"
    if not run or not storage.exists(name):
        return None
    config = from_toml(storage.read(name).decode(), origin=name)
    # A release that knew no other way said nothing of it.
    small_maps = "convolution" if config.train.small_maps == "auto" else config.train.small_maps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, small_maps=small_maps))


def saved_virtual_ranks(storage: Storage, run: str, workers: int) -> int:
    """Those that a named run was started with, if `workers` can carry them: it may go on with another number of workers. Else 0."""
    saved = saved_config(storage, run)
    return saved.train.virtual_ranks if saved is not None and saved.train.virtual_ranks >= workers else 0


def check_same_run(config: RunConfig, storage: Storage, fingerprint: str) -> None:
    """ValueError if the run of this name was started with other settings."""
    saved = saved_config(storage, config.run)
    if saved is None:
        return
    # What is left at auto is taken from the run, see `resolved`.
    now = dataclasses.replace(config, train=as_started(config.train, saved.train))
    changed = [f"{key}: {before!r} then, {after!r} now" for key, (before, after) in deciding_changes(saved, now).items()]
    if changed and saved.train.virtual_ranks < config.train.virtual_ranks:
        changed.append(f"it can go on with at most {saved.train.virtual_ranks} workers")
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


def check_same_decoder(config: RunConfig, manifest: Manifest, start: Commit | None, device: str) -> None:
    """ValueError if this run's images were resized by another version of the decoder on this type of device (cpu, cuda)."""
    if start is None or not resizes(manifest, config.data):  # images of the right size are the same in all versions
        return
    saved, now = start.meta.get("decoder", FIRST_VERSIONS)[device], DECODER_VERSIONS[device]
    if saved != now:
        raise ValueError(
            f"run {config.run!r} has resized its images (data.fit={config.data.fit}) by version {saved} of the {device} decoder, this is "
            f"version {now}: their pixels differ, and it would not be the same run; give another --run NAME to start anew, or go on with "
            "the release that started it"
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
    name = uuid.uuid4().hex
    # It imports what the ranks need while this process imports Ray and starts it. Two seconds, and the ranks of this node share it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # what a process group or a control group is sent is for the driver
    try:
        zygote = Zygote(RANK_MODULES, name=name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        return run_with(zygote, name, config, recipe=recipe, command=command, console=console)
    finally:
        zygote.close(kill=True)


def run_with(zygote: Zygote, zygote_name: str, config: RunConfig, *, recipe: str, command: str, console: Console) -> int:
    """The run, with a zygote on this node that the ranks come from."""
    from cluster.demand import wait_for_hardware
    from cluster.launch import Hardware, gpus_here, plan_resources, ray_cluster
    from cluster.preflight import on_every_node, preflight
    from cluster.versions import versions
    from trainer.drive.drive import Drive

    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job:
        check_storage_outlives_job(config.storage)
    location, dataset = open_data(config, console)
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
        this_node = Hardware(local=True, nodes=1, cpus=os.cpu_count() or 1, gpus=gpus_here())
        wanted = plan_resources(config.workers, config.cluster, this_node).most
    has_depthwise = False
    if wanted is not None:  # everything that needs no cluster is checked before one is started
        early = resolved(config, workers=wanted, fingerprint=fingerprint, recipe=recipe, image_size=image_size)
        if (done := finished_summary(early, fingerprint)) is not None:
            return show_finished(early, done, console)
        checked = ModelCheck(zygote, early.model, classes=len(dataset.manifest.classes), seed=early.train.seed, image_size=image_size)
        check_before_cluster(early, open_storage(early.storage, early.cluster.storage_retry_seconds), dataset)
        has_depthwise = checked.wait()
    console.print(f"joining the Ray cluster at {address}" if address else "starting a local Ray")
    with cluster as hardware:
        hardware = wait_for_hardware(config.workers, config.cluster, hardware, lambda line: console.print(line, soft_wrap=True))
        resources = plan_resources(config.workers, config.cluster, hardware)
        config = resolved(config, workers=resources.most, fingerprint=fingerprint, recipe=recipe, image_size=image_size)
        if (done := finished_summary(config, fingerprint)) is not None:
            return show_finished(config, done, console)
        storage = open_storage(config.storage, config.cluster.storage_retry_seconds)
        check_same_run(config, storage, fingerprint)
        is_shared = preflight(storage, config.run, hardware, lambda: open_dataset(location).manifest.fingerprint)
        use_gpus = resources.gpus_per_worker > 0
        capability = weakest(on_every_node(hardware, partial(here, use_gpus=use_gpus), with_gpus=use_gpus))
        if wanted is None:  # nothing was looked at before the cluster was joined
            classes = len(dataset.manifest.classes)
            has_depthwise = ModelCheck(zygote, config.model, classes=classes, seed=config.train.seed, image_size=image_size).wait()
        config = decided(
            config,
            capability,
            has_depthwise=has_depthwise,
            tell=lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False),
        )
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
        check_same_decoder(config, dataset.manifest, start, "cuda" if use_gpus else "cpu")
        storage.write_atomic(f"{config.run}/config.toml", redact(to_toml(config)).encode())
        console.print(f"run {config.run} in {redact(storage.uri)}: {described(resources.workers, hardware)}", soft_wrap=True)
        return Drive(
            config=config,
            dataset=dataset,
            location=location if is_shared else ship(dataset, config),
            storage=storage,
            store=store,
            journal=journal,
            resources=resources,
            command=command,
            console=console,
            zygote=zygote_name,
            is_local=hardware.local,
            find_start=lambda: find_start(config, store, journal, console, fingerprint),
        ).go(start)


def described(workers: int, hardware: Any) -> str:
    """`2 workers on 8 CPUs`, `1 worker on 1 GPU and 16 CPUs`."""

    def counted(count: int, what: str) -> str:
        return f"{count} {what}" if count == 1 else f"{count} {what}s"

    gpus = f"{counted(hardware.gpus, 'GPU')} and " if hardware.gpus else ""
    return f"{counted(workers, 'worker')} on {gpus}{counted(hardware.cpus, 'CPU')}"


def finished_summary(config: RunConfig, fingerprint: str) -> Mapping[str, Any] | None:
    """The summary of this run if it has ended well already."""
    storage = open_storage(config.storage, config.cluster.storage_retry_seconds)
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


def ship(dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """The data set's files in Ray's object store, for nodes that cannot read its folder."""
    import numpy as np
    import ray

    if dataset.is_remote:
        dataset.files()  # says that every node needs a way to it
    if dataset.size_bytes > config.cluster.object_store_limit_bytes:
        raise ValueError(
            f"data set {dataset.where} ({dataset.size_bytes:,} bytes) can be read on this node only and is larger than "
            f"cluster.object_store_limit_bytes={config.cluster.object_store_limit_bytes:,}; put it on storage that every node mounts "
            "and give that path to --data.path, or raise the limit if the nodes' object stores can hold it"
        )
    return {
        name: ray.put(np.fromfile(file, dtype=np.uint8) if isinstance(file, Path) else np.frombuffer(file, dtype=np.uint8))
        for name, file in dataset.files().items()
    }


if __name__ == "__main__":
    sys.exit(main())
