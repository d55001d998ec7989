"""All claims about a GPU, in 9 minutes: `python -m benchmarks.gpu_suite [--data FOLDER] [--part 1|2] [--json] [--out FILE]`.

    python -m benchmarks.gpu_suite --prepare FOLDER               where there is no GPU: the images, converted, for --data
    python -m benchmarks.gpu_suite --data FOLDER --part 1         on the GPU; then --part 2
    python -m benchmarks.gpu_suite --rehearse                     the code of all claims, small, on any device

Each claim is a separate process with a budget of seconds (`--only NAME` runs one), so that a claim that hangs or breaks CUDA does not
affect the others. All budgets together are at most SUITE_SECONDS; a part is what fits one call. A claim that this machine cannot test is
listed as not measured, with what it needs; without a GPU that is all of them, and nothing runs. `--rehearse` judges nothing.
All commands keep their compiled kernels in one folder (`--keep`), so that only the first one compiles. The GPU's clocks are warm before
anything is measured. Peers that share a step are measured in the same process, interleaved; other peers in the same command. The latest
proven results are copied into benchmarks/GPU.md by hand.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernels as profiling
from benchmarks.common import (
    FASHION_MNIST,
    Stopwatch,
    add_arguments,
    best_source,
    cifar_like,
    described,
    finish,
    gpu_name,
    initial_weights,
    interleave,
    median_interval,
    parser_of,
    run_process,
    spread,
    target,
    warm_clocks,
    write_archive,
)

IMAGES, TEST_IMAGES = 51_200, 2_500
"""A hundred batches of 512, so that no epoch ends with a smaller batch, and an epoch is as long as CIFAR-10's."""
SMALL_IMAGES, SMALL_TEST_IMAGES = 200, 100
PREPARED = "prepared.json"
BATCH = 512
SUSTAINED_GOAL, SYNTHETIC_GOAL, TUTORIAL_GOAL, WAIT_GOAL = 60_000.0, 0.97, 6.0, 0.01
TREE_GOAL, STALL_GOAL, OVERHEAD_GOAL, TIME_GOAL = 0.03, 0.1, 0.01, 0.1
TUTORIAL_WORKERS = (0, 4)
LAUNCH_GOAL, BUSY_GOAL = 330.0, 0.95
RAY_STEPS, RAY_WARM_STEPS = 2000, 700
NESTED_SECONDS = 600.0
"""For a command that a claim starts; the claim's own budget ends it earlier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The images of all claims."""

    data: Path
    """Converted, 32x32."""
    images: int
    test_images: int
    is_whole: bool
    """They are the full Fashion-MNIST's; else the few of this repository, shifted sideways: enough to measure speed."""


def prepare_data(folder: Path, source: str, *, images: int, test: int) -> Prepared:
    """Makes `folder`, which may be moved to another machine: 58 MB, in one to two minutes on two cores."""
    folder.mkdir(parents=True, exist_ok=True)
    archive, data = cifar_like(folder, source, train=images, test=test)
    archive.unlink()  # half as much again to carry, and soon made anew
    said = {
        "data": str(data.relative_to(folder)),
        "images": images,
        "test_images": test,
        "is_whole": source == str(FASHION_MNIST),
    }
    (folder / PREPARED).write_text(json.dumps(said))
    return prepared_in(folder)


def prepared_in(folder: Path) -> Prepared:
    """What `prepare_data` made there. ValueError if there is none."""
    try:
        said = json.loads((folder / PREPARED).read_text())
    except FileNotFoundError:
        raise ValueError(f"--data {folder} holds no {PREPARED}; make it: python -m benchmarks.gpu_suite --prepare {folder}") from None
    return Prepared(data=folder / said["data"], images=said["images"], test_images=said["test_images"], is_whole=said["is_whole"])


def archive_of(prepared: Prepared, keep: Path) -> Path:
    """The same images as CIFAR-10's archive, for the tutorial's script, made once: seconds."""
    path = keep / f"cifar-10-{prepared.images}.tar.gz"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write_archive(partial, str(prepared.data), {"train": prepared.images, "test": prepared.test_images})
        partial.rename(path)
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The environment of a claim."""

    prepared: Prepared
    folder: Path
    """For all files that the claim writes."""
    keep: Path
    """What one command leaves for the next: compiled kernels, the tutorial's archive and images/s."""
    extra: tuple[str, ...]
    """Further settings of trainer.run."""
    small: bool
    """A rehearsal: few images and a small network; its figures mean nothing."""

    @property
    def batch(self) -> int:
        return 20 if self.small else BATCH


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`measure` returns {"targets": [...], ...}."""

    measure: Callable[[Setting], dict[str, Any]]
    promises: tuple[str, ...]
    """Names of its targets, for the table of claims that were not measured."""
    budget_seconds: float
    part: int
    """The call in which it runs."""
    needs_ray: bool = False
    needs_whole: bool = False
    """It trains to an accuracy, so a few images again and again do not do."""


# -- step level -----------------------------------------------------------------------------------------------------------------------


def device_here() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config_of(setting: Setting, *more: str) -> Any:
    from benchmarks.bare import decided
    from trainer.settings.cli import parse

    flags = [
        "--data.path",
        str(setting.prepared.data),
        "--data.batch-size",
        str(setting.batch),
        "--model.weights",
        "none",
        "--train.epochs",
        "100000",
    ]
    flags += ["--optim.lr", "0.001", "--optim.schedule", "constant", "--train.virtual-ranks", "1"]
    if setting.small:
        flags += ["--model.name", "shufflenet_v2_x0_5", "--model.stem", "native", "--train.precision", "fp32"]
    else:
        flags += ["--model.name", "resnet18", "--model.stem", "article", "--train.precision", "bf16", "--train.compile"]
    return decided(parse([*flags, *more, *setting.extra]).config)


class Handed:
    """Hands batches on, and measures how long the device stood still for them. A loader hands over before its own work on the device is
    done, so the host's clock sees no wait; two events around the hand-over, in the steps' stream, do."""

    def __init__(self, batches: Iterator[Any], device: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` replaces the events on a CPU."""
        self._batches, self._is_cuda, self._clock = batches, device.type == "cuda", clock
        self._marks: list[tuple[Any, Any]] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        before = self._mark()
        batch = next(self._batches)
        self._marks.append((before, self._mark()))
        return batch

    def take_seconds(self) -> float:
        """The waits since the last call. The device must have reached all of them."""
        marks, self._marks = self._marks, []
        if self._is_cuda:
            return sum(before.elapsed_time(after) for before, after in marks) / 1e3
        return sum(after - before for before, after in marks)

    def _mark(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Steps:
    """The run's step and loader without the run: `real(n)` and `synthetic(n)` do n steps of the same stepper."""

    def __init__(self, setting: Setting, total: int) -> None:
        from benchmarks.bare import loader_of
        from dataio.parquet import open_dataset
        from trainer.learn.build import build_learner, task_of
        from trainer.rank.worker import make_repeatable
        from trainer.settings.spec import make_order

        self.config, self.device = config_of(setting), device_here()
        make_repeatable(min(8, os.cpu_count() or 1))
        dataset = open_dataset(setting.prepared.data)
        self.order = make_order(self.config, dataset)
        self.loader = loader_of(self.config, dataset, self.device)
        self.loader.load("train")
        self.learner = build_learner(self.config, task_of(self.config, dataset.manifest), self.loader.image_size, self.device)
        self.stepper = self.learner.stepper()
        self.compile_seconds = self.stepper.compile_ahead((3, *self.loader.image_size))
        self._batches = self.loader.train(0, total)
        self.handed = Handed(self._batches, self.device)
        self._real = self._steps(self.handed, total)
        with contextlib.closing(self.loader.train(0, 1)) as first:
            resident = next(first)
        self._synthetic = self._steps(itertools.repeat(resident), total)
        warm_clocks(self.device)

    def _steps(self, batches: Iterator[Any], total: int) -> Iterator[Any]:
        from trainer.learn.step import train_steps

        return train_steps(
            self.stepper,
            batches,
            start_step=0,
            stop_step=total,
            steps_per_epoch=self.order.steps_per_epoch,
            batch_count=self.order.batch_count,
            set_learning_rate=lambda step: self.learner.set_learning_rate(step, total),
            device=self.device,
            sum_over_ranks=False,
        )

    def real(self, steps: int) -> int:
        return sum(stats.samples for stats in itertools.islice(self._real, steps))

    def synthetic(self, steps: int) -> int:
        return sum(stats.samples for stats in itertools.islice(self._synthetic, steps))

    def close(self) -> None:
        self._batches.close()


def sustained(setting: Setting) -> dict[str, Any]:
    """Images/s of step and loader with the cache on the device, against the same step on one fixed batch; and the loader's wait."""
    block, rounds, warm = (3, 2, 2) if setting.small else (100, 12, 60)
    steps = Steps(setting, total=warm + block * rounds + 2)
    began = time.perf_counter()
    steps.real(1)
    steps.synthetic(1)
    synchronize()
    first_seconds = time.perf_counter() - began
    steps.real(warm)
    steps.synthetic(warm)
    rates: dict[str, list[float]] = {"real": [], "synthetic": []}
    waits = []
    for _, name in interleave(list(rates), rounds):
        synchronize()
        steps.handed.take_seconds()
        watch = Stopwatch(synchronize)
        images = steps.real(block) if name == "real" else steps.synthetic(block)
        wall = watch.taken().wall_seconds
        rates[name].append(images / wall)
        if name == "real":
            waits.append(steps.handed.take_seconds() / wall)
    steps.close()
    ratio = median_interval([real / synthetic for real, synthetic in zip(rates["real"], rates["synthetic"], strict=True)])
    peers = tutorial_rate(setting)
    return {
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "tutorial_images_per_second": peers,
        "cache": steps.loader.cache,
        "backend": steps.loader.backend_name,
        "compile_seconds": steps.compile_seconds,
        "first_steps_seconds": first_seconds,
        "data_wait_ratio": spread(waits),
        "targets": [
            target(SUSTAINED, spread(rates["real"])["median"], at_least=SUSTAINED_GOAL),
            target(OF_SYNTHETIC, ratio["median"], at_least=SYNTHETIC_GOAL),
            target(DATA_WAIT, spread(waits)["median"], at_most=WAIT_GOAL),
            target(OVER_TUTORIAL, spread(rates["real"])["median"] / max(peers.values()), at_least=TUTORIAL_GOAL),
        ],
    }


def no_sync(setting: Setting) -> dict[str, Any]:
    """Does a block of real steps, the loader's thread included, while every synchronisation that torch detects raises."""
    import torch

    block, warm = (3, 2) if setting.small else (100, 30)
    steps = Steps(setting, total=warm + block + 2)
    steps.real(warm)
    synchronize()
    message = ""
    detected = is_detected(steps.device)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        steps.real(block)
    except RuntimeError as error:
        if "synchron" not in str(error):
            raise
        message = str(error).splitlines()[0]
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    steps.close()
    targets = [target(NO_SYNC, float(bool(message)), at_most=0), target(DETECTED, float(detected), at_least=1)]
    return {"steps": block, "message": message, "targets": targets}


def is_detected(device: Any) -> bool:
    """Whether a synchronisation on purpose is refused; otherwise `no_sync` proves nothing."""
    import torch

    value = torch.ones(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        value.item()
    except RuntimeError:
        return True
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return False


def kernels(setting: Setting) -> dict[str, Any]:
    """What the device does in a step, from torch's profiler: launches, time by kind and by kernel, and the share of a step in which it
    computes. The step's length is measured without the profiler, which slows the host."""
    warm, block, watched = (2, 3, 2) if setting.small else (60, 100, 20)
    steps = Steps(setting, total=warm + block + watched + 2)
    steps.real(warm)
    watch = Stopwatch(synchronize)
    steps.real(block)
    step_seconds = watch.taken().wall_seconds / block
    found = profiling.table(profiling.profiled(lambda: steps.real(watched), steps.device), watched)
    steps.close()
    return {
        "step_seconds": step_seconds,
        "table": found,
        "targets": [
            target(LAUNCHES, found["launches_a_step"], at_most=LAUNCH_GOAL),
            target(BUSY, found["busy_microseconds_a_step"] / 1e6 / step_seconds, at_least=BUSY_GOAL),
        ],
    }


def backends(setting: Setting) -> dict[str, Any]:
    """Checks that the device's backends give the reference's bytes; measures the cost of each."""
    import torch

    from dataio.codecs.image.augment import draw, reference
    from dataio.codecs.image.backends import make_backend

    device = device_here()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8)
    made = {
        name: make_backend(name, height=32, width=32, pad=4, batch_size=setting.batch, device=device, threads=2)
        for name in ("torch", "dali")
    }
    store = torch.from_numpy(images).to(device)
    different = 0
    for epoch in range(3):
        ids = generator.integers(0, len(images), 100)
        drawn = draw(seed=1, epoch=epoch, ids=ids, pad=4, flip=True)
        expected = reference(images[ids], drawn, 4)
        for backend in made.values():
            different += int((backend.batch(store, ids, drawn).cpu().numpy() != expected).sum())
    warm_clocks(device)
    block = 3 if setting.small else 200
    ids = generator.integers(0, len(images), setting.batch)
    micro: dict[str, list[float]] = {name: [] for name in made}
    for _, name in interleave(list(made), 5):
        watch = Stopwatch(synchronize)
        for epoch in range(block):
            made[name].batch(store, ids, draw(seed=1, epoch=epoch, ids=ids, pad=4, flip=True))
        micro[name].append(watch.taken().wall_seconds / (block * setting.batch) * 1e6)
    return {
        "microseconds_an_image": {name: spread(values) for name, values in micro.items()},
        "torch_over_dali_speed": median_interval([dali / own for dali, own in zip(micro["dali"], micro["torch"], strict=True)]),
        "targets": [
            target(PARITY, float(different), at_most=0),
            target(GATHER, 1e6 / spread(micro["torch"])["median"], at_least=SUSTAINED_GOAL),
            target(DALI_SPEED, 1e6 / spread(micro["dali"])["median"], at_least=SUSTAINED_GOAL),
        ],
    }


def checkpoint_stall(setting: Setting) -> dict[str, Any]:
    """How long Checkpointer.save stalls the steps, against torch.save with fsync of the same state."""
    import torch
    import torchvision

    from benchmarks.checkpoint import files_of, torch_save
    from cluster.checkpointer import Checkpointer
    from cluster.storage import open_storage
    from cluster.store import Store
    from trainer.learn.state import TrainState

    device = device_here()
    model = torchvision.models.resnet18(num_classes=10).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3, 64, 64, device=device)).square().mean().backward()
        optimizer.step()

    step()
    warm_clocks(device)
    state, store = TrainState(model, optimizer), Store.open(open_storage(setting.folder), "run")
    generation = store.claim_generation()
    checkpointer = Checkpointer(
        stage=lambda number, name, buffers: store.stage(number, generation, name, buffers, attempt=1),
        ack=lambda number, receipts, meta: None,
    )
    stalls, saves = [], []
    for number in range(3 if setting.small else 12):
        step()
        synchronize()
        stalls.append(checkpointer.save(number + 1, lambda: files_of(state), {}))
        checkpointer.wait()
        synchronize()
        saves.append(sum(torch_save(setting.folder / "peer.pt", model, optimizer)))
    checkpointer.close()
    ratio = spread(stalls[2:])["median"] / spread(saves[2:])["median"]
    return {
        "stall_seconds": spread(stalls[2:]),
        "torch_save_fsync_seconds": spread(saves[2:]),
        "targets": [target(STALL, ratio, at_most=STALL_GOAL)],
    }


def tree(setting: Setting) -> dict[str, Any]:
    """A step with the ordered reduction against one with DDP's all-reduce, one virtual rank a GPU, interleaved, on up to eight GPUs."""
    import torch
    import torch.multiprocessing as mp

    world = min(8, torch.cuda.device_count()) or 2
    mp.spawn(_tree_rank, (str(setting.folder), world, setting), nprocs=world)
    ranks = [json.loads((setting.folder / f"{rank}.json").read_text()) for rank in range(world)]
    slowest = {name: [max(row) for row in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}
    price = median_interval([tree / ddp - 1 for tree, ddp in zip(slowest["tree"], slowest["ddp"], strict=True)])
    return {
        "ranks": world,
        "seconds_a_step": {name: spread(values) for name, values in slowest.items()},
        "price": price,
        "targets": [target(TREE, price["median"], at_most=TREE_GOAL, interval=(price["low"], price["high"]))],
    }


def _tree_rank(rank: int, folder: str, world: int, setting: Setting) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.bare import loader_of
    from dataio.parquet import open_dataset
    from trainer.learn.build import build_learner, task_of
    from trainer.rank.worker import make_repeatable

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    make_repeatable(1)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    config = config_of(setting, "--data.batch-size", str(setting.batch * world), "--train.virtual-ranks", str(world), "--train.no-compile")
    dataset = open_dataset(setting.prepared.data)
    loader = loader_of(config, dataset, device, virtual_ranks=range(rank, rank + 1))
    with contextlib.closing(loader.train(0, 1)) as first:
        batch = next(first)
    steppers = {}
    for name in ("tree", "ddp"):
        own = dataclasses.replace(config, train=dataclasses.replace(config.train, reduction=name))
        steppers[name] = build_learner(own, task_of(own, dataset.manifest), loader.image_size, device).stepper(world_size=world, rank=rank)
    warm_clocks(device)
    block, rounds = (2, 3) if setting.small else (20, 12)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for number, name in interleave(list(steppers), rounds + 2):
        dist.barrier()
        watch = Stopwatch(synchronize)
        for _ in range(block):
            steppers[name].step(batch, global_count=setting.batch * world, step=0)
        taken = watch.taken().wall_seconds / block
        if number > 1:
            seconds[name].append(taken)
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


# -- whole commands ----------------------------------------------------------------------------------------------------------------------


def tutorial_rate(setting: Setting) -> dict[str, float]:
    """Images/s of the tutorial's script by its number of loader workers; measured once on a machine."""
    from benchmarks.overhead import json_in, steady

    known, here = setting.keep / "tutorial.json", {"gpu": gpu_name(), "small": setting.small}
    if known.exists():
        said = json.loads(known.read_text())
        if {key: said[key] for key in here} == here:
            rates: dict[str, float] = said["rates"]
            return rates
    weights, archive = initial_weights(setting.folder / "initial.pth"), archive_of(setting.prepared, setting.keep)
    count = 8 if setting.small else 150
    rates = {}
    for workers in TUTORIAL_WORKERS[: 1 if setting.small else None]:
        arguments = [
            "-m",
            "benchmarks.article",
            "--data",
            str(archive),
            "--weights",
            str(weights),
            "--steps",
            str(count),
            "--json",
        ]
        done = run_process([*arguments, "--loader-workers", str(workers)], timeout_seconds=NESTED_SECONDS).checked()
        rates[f"{workers} loader workers"] = steady(json_in(done.text)["times"], 100, count // 3)["images_per_second"]
    known.write_text(json.dumps({**here, "rates": rates}))
    return rates


def through_ray(setting: Setting) -> dict[str, Any]:
    """`trainer.run` through Ray Train with DALI on the device: images/s after the warm-up, and its data wait."""
    from benchmarks.overhead import steady, times_of_run

    steps, warm = (12, 5) if setting.small else (RAY_STEPS, RAY_WARM_STEPS)
    flags = [
        *(
            "--data.path",
            str(setting.prepared.data),
            "--data.batch-size",
            str(setting.batch),
            "--data.backend",
            "dali",
            "--model.weights",
            "none",
        ),
        *("--model.name", "shufflenet_v2_x0_5" if setting.small else "resnet18", "--model.stem", "native" if setting.small else "article"),
        *("--optim.lr", "0.001", "--optim.schedule", "constant", "--train.epochs", "100000", "--train.max-steps", str(steps)),
        *("--train.eval-every-epochs", "1000000", "--workers", "1", "--storage", str(setting.folder / "runs"), "--run", "dali"),
        *(() if setting.small else ("--train.precision", "bf16", "--train.compile")),
    ]
    run_process(["-m", "trainer.run", *flags, *setting.extra], timeout_seconds=NESTED_SECONDS).checked()
    run = setting.folder / "runs" / "dali"
    summary = json.loads((run / "summary.json").read_text())
    found = steady(times_of_run(run), setting.batch, warm)
    peers = tutorial_rate(setting)
    return {
        "steady": found,
        "summary": {key: summary[key] for key in ("data_wait_ratio", "backend", "cache", "checkpoint_stall_seconds", "images_per_second")},
        "tutorial_images_per_second": peers,
        "targets": [
            target(RAY_SUSTAINED, found["images_per_second"], at_least=SUSTAINED_GOAL),
            target(RAY_WAIT, summary["data_wait_ratio"], at_most=WAIT_GOAL),
            target(RAY_OVER_TUTORIAL, found["images_per_second"] / max(peers.values()), at_least=TUTORIAL_GOAL),
        ],
    }


def overhead(setting: Setting) -> dict[str, Any]:
    """Runs benchmarks.overhead on this device, in one process."""
    out, batch = setting.folder / "overhead.json", str(setting.batch)
    arguments = [
        "-m",
        "benchmarks.overhead",
        "--data",
        str(setting.prepared.data),
        "--out",
        str(out),
        "--batch-size",
        batch,
        "--full-batch",
        batch,
    ]
    if setting.small:
        arguments += ["--rounds", "9", "--threads", "1"]
        settings = ["--model.name", "shufflenet_v2_x0_5", "--model.stem", "native", "--train.precision", "fp32"]
    else:
        arguments += ["--rounds", "48", "--threads", "1", "--steps-a-block", "20"]
        settings = ["--train.precision", "bf16", "--train.compile"]
    run_process([*arguments, "--", *settings, *setting.extra], timeout_seconds=NESTED_SECONDS).checked()
    found = json.loads(out.read_text())
    share = found["in_one_process"]["wall_seconds"]["share"]
    return {
        "overhead": found["in_one_process"],
        "targets": [target(OVERHEAD, share["median"], at_most=OVERHEAD_GOAL, interval=(share["low"], share["high"]))],
    }


def accuracy(setting: Setting) -> dict[str, Any]:
    """Runs benchmarks.time_to_accuracy on this device."""
    out = setting.folder / "accuracy.json"
    made = ["--made", str(archive_of(setting.prepared, setting.keep)), str(setting.prepared.data)]
    quick = ["--quick", "--tutorial-epochs", "1", "--epochs", "1"] if setting.small else ["--loader-workers", "4"]
    arguments = ["-m", "benchmarks.time_to_accuracy", "--out", str(out), *made, *quick]
    run_process([*arguments, "--", *setting.extra], timeout_seconds=NESTED_SECONDS).checked()
    found = json.loads(out.read_text())
    (row,) = [row for row in found["targets"] if row["rule"] == "<="]
    return {"cases": found["cases"], "targets": [target(TIME, row["measured"], at_most=TIME_GOAL)]}


SUSTAINED = "images/s, ResNet-18 with the CIFAR stem, bf16, compiled, loader on the device's cache"
OF_SYNTHETIC = "of the same step on one resident batch"
DATA_WAIT = "part of the time that steps waited for data"
NO_SYNC = "synchronisations of host and device in 100 steps"
DETECTED = "of one synchronisations on purpose that were detected"
LAUNCHES = "kernels and copies that a step launches"
BUSY = "share of a step in which the device computes"
PARITY = "bytes in which the device's backends differ from the reference"
GATHER = "images/s of the torch gather alone"
DALI_SPEED = "images/s of DALI alone"
STALL = "a checkpoint's stall over torch.save with fsync"
TREE = "time a step that the ordered reduction takes more than DDP, one virtual rank a GPU"
OVER_TUTORIAL = "times the images/s of the tutorial's script (the faster of 0 and 4 loader workers)"
RAY_OVER_TUTORIAL = "times the images/s of the tutorial's script, through Ray Train and DALI"
RAY_SUSTAINED = "images/s of trainer.run through Ray Train and DALI"
RAY_WAIT = "part of the time that steps waited for data, through Ray Train and DALI"
OVERHEAD = "share of a step that metrics, ledger, guard and checkpoints take"
TIME = "of the tutorial's time to its own accuracy after 10 epochs"

CLAIMS = {
    "sustained": Claim(measure=sustained, promises=(SUSTAINED, OF_SYNTHETIC, DATA_WAIT, OVER_TUTORIAL), budget_seconds=125, part=1),
    "kernels": Claim(measure=kernels, promises=(LAUNCHES, BUSY), budget_seconds=35, part=1),
    "no_sync": Claim(measure=no_sync, promises=(NO_SYNC, DETECTED), budget_seconds=30, part=1),
    "backends": Claim(measure=backends, promises=(PARITY, GATHER, DALI_SPEED), budget_seconds=25, part=1),
    "checkpoint_stall": Claim(measure=checkpoint_stall, promises=(STALL,), budget_seconds=20, part=1),
    "tree": Claim(measure=tree, promises=(TREE,), budget_seconds=25, part=1),
    "overhead": Claim(measure=overhead, promises=(OVERHEAD,), budget_seconds=100, part=2),
    "through_ray": Claim(
        measure=through_ray, promises=(RAY_SUSTAINED, RAY_WAIT, RAY_OVER_TUTORIAL), budget_seconds=80, part=2, needs_ray=True
    ),
    "time_to_accuracy": Claim(measure=accuracy, promises=(TIME,), budget_seconds=100, part=2, needs_ray=True, needs_whole=True),
}
"""`sustained` comes first: it compiles, and measures the tutorial's script, for all that follow."""
SUITE_SECONDS = 540.0


# -- the suite ------------------------------------------------------------------------------------------------------------------------


def missing(claim: Claim, *, gpu: bool, ray: bool, whole: bool) -> str:
    """What this machine lacks for a claim; empty if it lacks nothing."""
    if not gpu:
        return "a GPU"
    if claim.needs_ray and not ray:
        return "Ray"
    if claim.needs_whole and not whole:
        return f"the full Fashion-MNIST: --prepare where {FASHION_MNIST.parent.parent.name}/{FASHION_MNIST.name} is installed"
    return ""


def run_claim(name: str, arguments: Sequence[str], budget_seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a claim in a process of its own; a failure is a result too."""
    began = time.perf_counter()
    command = ["-m", "benchmarks.gpu_suite", "--only", name, *arguments]
    try:
        done = run_process(command, timeout_seconds=budget_seconds, environment=environment).checked()
        found: dict[str, Any] = json.loads(next(line for _, line in reversed(done.lines) if line.startswith('{"targets"')))
    except RuntimeError as error:
        found = {"failed": str(error)[-2000:], "targets": []}
    return found | {"seconds": time.perf_counter() - began}


def unmeasured(claim: Claim) -> list[dict[str, Any]]:
    return [{"name": promise, "rule": "", "goal": None, "measured": None, "met": None} for promise in claim.promises]


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in result["claims"].items():
        if row.get("needs"):
            lines.append(f"{name}: not tried, needs {row['needs']}: {'; '.join(each['name'] for each in row['targets'])}")
        elif row.get("failed"):
            lines.append(f"{name}: FAILED after {row['seconds']:.0f} s: {row['failed'].strip().splitlines()[-1]}")
        else:
            lines.append(f"{name}: {row['seconds']:.0f} s of {row['budget_seconds']:.0f}")
            lines.extend(profiling.lines_of(row["table"]) if "table" in row else ())
    if result["rehearsal"]:
        lines.append("a rehearsal: the code of the claims ran, small; no figure of it counts")
    return lines


def suite(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the claims that were asked for, in turn; `folder` is for their files."""
    gpu, ray = options.rehearse or bool(gpu_name()), importlib.util.find_spec("ray") is not None
    chosen = {
        name: claim for name, claim in CLAIMS.items() if (not options.only or name in options.only) and options.part in (None, claim.part)
    }
    rows: dict[str, Any] = {}
    began = time.perf_counter()
    home, whole = options.data, True
    if any(not missing(claim, gpu=gpu, ray=ray, whole=True) for claim in chosen.values()):
        if home is None:
            home = folder / "data"
            images, test = (SMALL_IMAGES, SMALL_TEST_IMAGES) if options.rehearse else (IMAGES, TEST_IMAGES)
            prepare_data(home, best_source(), images=images, test=test)
        whole = prepared_in(home).is_whole or options.rehearse
    keep = options.keep or (folder / "kept" if options.data is None else options.data.with_name(options.data.name + "-kept"))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(keep / "inductor"), "TRITON_CACHE_DIR": str(keep / "triton")}
    for name, claim in chosen.items():
        needs = missing(claim, gpu=gpu, ray=ray, whole=whole)
        left = SUITE_SECONDS - (time.perf_counter() - began)
        if not needs and left < 20 and not options.rehearse:
            needs = f"time: the suite's {SUITE_SECONDS:.0f} s are over; run it with --only {name}"
        if needs:
            rows[name] = {"needs": needs, "targets": unmeasured(claim)}
            continue
        own = folder / name
        own.mkdir()
        keep.mkdir(parents=True, exist_ok=True)
        arguments = ["--inside", str(home), str(own), str(keep), *(["--rehearse"] if options.rehearse else []), "--", *options.settings]
        budget = NESTED_SECONDS if options.rehearse else min(claim.budget_seconds, left)
        row = run_claim(name, arguments, budget, environment)
        if options.rehearse or row.get("failed"):
            row["targets"] = unmeasured(claim)
        rows[name] = row | {"budget_seconds": claim.budget_seconds}
        print(f"{name}: {row['seconds']:.0f} s{' FAILED' if row.get('failed') else ''}", file=sys.stderr, flush=True)
    return {"claims": rows, "seconds": time.perf_counter() - began}


def inside(options: argparse.Namespace) -> int:
    """One claim, in the process that `run_claim` started."""
    home, folder, keep = map(Path, options.inside)
    setting = Setting(prepared=prepared_in(home), folder=folder, keep=keep, extra=tuple(options.settings), small=options.rehearse)
    (name,) = options.only
    found = CLAIMS[name].measure(setting)
    print(json.dumps({"targets": found.pop("targets"), **found}), flush=True)
    return 0


def main() -> int:
    parser: argparse.ArgumentParser = parser_of("gpu_suite", __doc__)
    parser.add_argument("--only", choices=[*CLAIMS], action="append", help="this claim alone; may be given more than once")
    parser.add_argument("--part", type=int, choices=sorted({claim.part for claim in CLAIMS.values()}), help="the claims of one call")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make the images there, for --data, and end; needs no GPU")
    parser.add_argument("--source", default=best_source(), help="of --prepare, as dataio.convert takes it (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="what --prepare made; otherwise it is made in each call")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="compiled kernels of all commands (FOLDER-kept beside --data)")
    parser.add_argument("--rehearse", action="store_true", help="run the code of the claims small, on whatever there is; judge nothing")
    parser.add_argument("--inside", nargs=3, metavar=("DATA", "FOLDER", "KEEP"), help=argparse.SUPPRESS)
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", help="further settings of trainer.run, after --")
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    if options.prepare:
        made = prepare_data(options.prepare, options.source, images=IMAGES, test=TEST_IMAGES)
        print(f"{made.images:,} images, {'of the full Fashion-MNIST' if made.is_whole else 'a few, shifted: time_to_accuracy needs more'}")
        return 0
    if options.data is not None:
        try:
            prepared_in(options.data)
        except ValueError as error:
            parser.error(str(error))
    result = described("gpu_suite", options) | {"gpu": gpu_name(), "rehearsal": options.rehearse}
    with tempfile.TemporaryDirectory(prefix="finetune-gpu-") as temp:
        result |= suite(options, Path(temp))
    result["targets"] = [row for claim in result["claims"].values() for row in claim["targets"] if row["rule"]]
    status = finish(result, options, lines_of(result))
    return status or int(any(row.get("failed") for row in result["claims"].values()))


if __name__ == "__main__":
    sys.exit(main())
