"""What metrics, ledger, heartbeat, guard and checkpoints cost a step: our run against the same step in a bare loop, and under torchrun.

    python -m benchmarks.overhead [--rounds 96] [--batch-size 100] [--steps-a-block 2] [--processes 3] [--json] [--out FILE]

1. In one process, interleaved in blocks of a few steps: `trainer.rank.worker.train_rank` unchanged, with a real coordinator, ledger,
   metrics server, heartbeat, guard, weights check and checkpoints; the bare loop of benchmarks/bare.py; that loop with PyTorch's own
   optimiser in place of ours; and `Stepper` alone, which separates the cost of the step's own checks from the rest. The verdict uses the
   difference to the bare loop with our optimiser; the difference to PyTorch's is shown too. Same model, same batches, a loader for each.
   A block of steps is compared with the bare block of its round, so a disturbance longer than a round cancels. The median of these
   differences has an interval that assumes nothing about their distribution. Rare costs would vanish in a median. So blocks with a weights
   check and blocks with a checkpoint (which is waited for, commit included, unlike in a run) are reported separately, and their price is
   divided by the steps between two of them in a run with default settings.
   The coordinator also runs in this process and its CPU time is counted; in a run it is another process.
   On a GPU a block begins and ends with a wait for the device, after which the host has no lead over it: --steps-a-block 20 makes that
   small beside the steps.
   The overhead hardly depends on the batch, but a step does: --batch-size 16 shows milliseconds more sharply; the share is that of a step
   with --full-batch images.
2. With --processes N, N rounds of four separate commands: the bare loop, the bare loop under torchrun, the bare loop as a worker of plain
   Ray Train, and `trainer.run`. Images/s are from the first measured step to the last, without checkpoints (1. has their price). This is
   noisier; the last two include the cost of Ray's own processes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.bare import Bare, decided, loader_of
from benchmarks.common import (
    SAMPLE,
    Stopwatch,
    Taken,
    add_arguments,
    best_source,
    cifar_like,
    described,
    finish,
    interleave,
    median_interval,
    parser_of,
    run_process,
    spread,
    target,
    warm_clocks,
)
from cluster.coordinator import Coordinator
from cluster.interval import steps_between
from cluster.rank import Placement, RankContext
from cluster.storage import open_storage
from cluster.store import Store
from cluster.zygote import MEMORY_KEPT
from dataio.batch import Batch
from dataio.parquet import open_dataset
from trainer.learn.build import build_learner, task_of
from trainer.learn.step import StepStats
from trainer.rank import evaluation, saving, worker
from trainer.settings.cli import parse
from trainer.settings.spec import WorkerSpec
from trainer.settings.tree import RunConfig, TrainConfig

GOAL = 0.01
STEPS_A_BLOCK = 2
"""Unless --steps-a-block says otherwise: on a CPU a step is long, and short blocks compare moments that are close."""
CHECKPOINT_BLOCKS = 4
"""One in this many blocks of the run has a checkpoint; halfway between two of them, a block has a weights check."""
WARM_BLOCKS = 3
WARM_STEPS = 20
"""Warm-up of a process before its images/s count: some of Ray's own processes need ten seconds to settle."""
CIFAR_EPOCH_STEPS = 500
"""50,000 images in batches of 100: the tutorial's epoch, and so the steps between two checkpoints of a run with default settings."""
PLAIN, CHECK, CHECKPOINT = "plain", "weights check", "checkpoint"
ARMS = ("bare", "stepper", "stock")
BARE, TORCHRUN, RAY_TRAIN, OURS = "bare loop", "bare loop under torchrun", "bare loop in plain Ray Train", "trainer.run"


def settings_of(data: str, storage: Path, batch_size: int, extra: Sequence[str], *, steps_a_block: int = STEPS_A_BLOCK) -> RunConfig:
    """The run's settings: ResNet-18 with the tutorial's stem, and all monitoring on."""
    every = CHECKPOINT_BLOCKS * steps_a_block
    flags = [
        *("--data.path", data, "--data.batch-size", str(batch_size), "--model.weights", "none", "--model.stem", "article"),
        *("--optim.lr", "0.001", "--optim.schedule", "constant", "--train.virtual-ranks", "1", "--train.ledger"),
        *("--train.checkpoint-every", str(every), "--train.verify-every", str(every // 2), "--train.eval-every-epochs", "1000000"),
        *("--train.epochs", "1000000", "--storage", str(storage), "--run", "overhead", *extra),
    ]
    return decided(parse(flags).config)


class Turns:
    """Replaces the worker's `train_steps`: runs the other arms between blocks of the run's own steps.

    A block of the run lasts from the first call of its first step to the worker's call for the step after its last. So it includes
    everything that the worker does with a step.
    """

    def __init__(
        self, arms: dict[str, Callable[[], None]], device: torch.device, settle: Callable[[], bool], *, steps_a_block: int
    ) -> None:
        """`arms`: name -> does a block of steps. `settle`: waits until no checkpoint is pending; called where a block has one."""
        self._arms, self._settle, self._steps_a_block = arms, settle, steps_a_block
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.checks = self.saves = self.evaluations = 0  # in the current block
        self.blocks: list[tuple[str, dict[str, Taken]]] = []
        """(kind, arm -> time of its block), without the warm-up."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[StepStats]:
        number, steps = 0, 0
        watch = Stopwatch(self._synchronize)
        for stats in TRAIN_STEPS(*args, **kwargs):
            yield stats
            steps += 1
            if steps % self._steps_a_block:
                continue
            if self.saves:
                self._settle()
            taken = {"run": watch.taken()}
            kind = CHECKPOINT if self.saves else CHECK if self.checks else PLAIN
            names = list(self._arms)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                watch = Stopwatch(self._synchronize)
                self._arms[name]()
                taken[name] = watch.taken()
            if number >= WARM_BLOCKS and not self.evaluations:
                self.blocks.append((kind, taken))
            number += 1
            self.checks = self.saves = self.evaluations = 0
            watch = Stopwatch(self._synchronize)


TRAIN_STEPS = worker.train_steps


def in_one_process(
    config: RunConfig, storage_folder: Path, *, rounds: int, full_batch: int, threads: int, steps_a_block: int = STEPS_A_BLOCK
) -> dict[str, Any]:
    """Part 1 of the module's docstring."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dataset = open_dataset(config.data.path)
    worker.make_repeatable(threads)
    warm_clocks(device)
    steps = (rounds + WARM_BLOCKS) * steps_a_block
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=steps))
    storage = open_storage(storage_folder)
    config = dataclasses.replace(config, storage=storage.uri)
    generation = Store.open(storage, config.run).claim_generation()
    coordinator = Coordinator(storage, config.run, generation, config.cluster.keep_checkpoints)
    coordinator.start_attempt(1, 1, 0)

    loaders = {name: loader_of(config, dataset, device) for name in ARMS}
    feeds = {name: loader.train(0, steps) for name, loader in loaders.items()}
    bare = Bare(config, dataset, loaders["bare"].image_size, device)
    stock = Bare(config, dataset, loaders["stock"].image_size, device, pytorchs_optimizer=True)
    alone = stepper_alone(config, dataset, loaders["stepper"].image_size, device)
    done = dict.fromkeys(ARMS, 0)

    def block(name: str, step: Callable[[Batch, int], object]) -> Callable[[], None]:
        def steps_of_block() -> None:
            for _ in range(steps_a_block):
                (batch,) = next(feeds[name])
                step(batch, done[name])
                done[name] += 1

        return steps_of_block

    arms = {"bare": block("bare", bare.step), "stepper": block("stepper", alone), "stock": block("stock", stock.step)}
    turns = Turns(arms, device, lambda: settle(watched, coordinator), steps_a_block=steps_a_block)
    watched: list[saving.Checkpointer] = []

    class Watched(saving.Checkpointer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            watched.append(self)

        def save(self, *args: Any) -> float:
            turns.saves += 1
            return super().save(*args)

    class Check(saving.WeightsCheck):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            turns.checks += 1
            return super().start(*args, **kwargs)

    evaluate = evaluation.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        turns.evaluations += 1
        return evaluate(*args, **kwargs)

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        return None if method == "put_result" else getattr(coordinator, method)(*args, **kwargs)

    place = Placement(
        host="localhost",
        address="127.0.0.1",
        node_id="benchmark",
        local_rank=0,
        local_world_size=1,
        device_index=device.index if device.type == "cuda" else None,
    )
    spec = WorkerSpec(config=config, dataset=config.data.path, generation=generation, attempt=1, resume=None, threads=threads)
    context = RankContext(rank=0, world_size=1, attempt=1, place=place, files={}, call=call)  # type: ignore[arg-type]
    patches = [
        patch.object(worker, "train_steps", turns),
        patch.object(saving, "Checkpointer", Watched),
        patch.object(saving, "WeightsCheck", Check),
        patch.object(evaluation, "evaluate", counted),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            worker.train_rank(spec, context)
    finally:
        coordinator.close()
        for feed in feeds.values():
            feed.close()
    full = full_step_seconds(config, dataset, device, full_batch, bare)
    return judged(turns.blocks, config, full, full_batch, steps_a_block=steps_a_block)


def stepper_alone(config: RunConfig, dataset: Any, image_size: tuple[int, int], device: torch.device) -> Callable[[Batch, int], Tensor]:
    """The run's own Stepper with nothing around it."""
    stepper = build_learner(config, task_of(config, dataset.manifest), image_size, device).stepper()
    stepper.compile_ahead((3, *image_size))

    def step(batch: Batch, number: int) -> Tensor:
        return stepper.step([batch], global_count=len(batch.ids), step=number)

    return step


def settle(watched: Sequence[saving.Checkpointer], coordinator: Coordinator) -> bool:
    """Waits until all saved checkpoints are staged, acknowledged and committed."""
    for checkpointer in watched:
        checkpointer.wait()
    return coordinator.drain()


def full_step_seconds(config: RunConfig, dataset: Any, device: torch.device, batch_size: int, bare: Bare) -> Taken:
    """Median time of a bare step on `batch_size` images, which may differ from the compared batch."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
    loader = loader_of(config, dataset, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken = []
    steps = 9
    with contextlib.closing(loader.train(0, steps)) as batches:
        for step, (batch,) in enumerate(batches):
            watch = Stopwatch(synchronize)
            bare.step(batch, step)
            taken.append(watch.taken())
    return Taken(
        wall_seconds=spread([each.wall_seconds for each in taken[2:]])["median"],
        cpu_seconds=spread([each.cpu_seconds for each in taken[2:]])["median"],
    )


def judged(
    blocks: Sequence[tuple[str, dict[str, Taken]]], config: RunConfig, full: Taken, full_batch: int, *, steps_a_block: int = STEPS_A_BLOCK
) -> dict[str, Any]:
    """Prices in seconds a step, by cause, and their sum as a fraction of a bare step on `full_batch` images."""
    default = TrainConfig()
    every_checkpoint = steps_between(default.checkpoint_every, CIFAR_EPOCH_STEPS)
    assert every_checkpoint is not None
    between = {CHECK: default.verify_every, CHECKPOINT: every_checkpoint}
    result: dict[str, Any] = {
        "batch_size": config.data.batch_size,
        "full_batch": full_batch,
        "steps_a_block": steps_a_block,
        "steps_between": between,
        "blocks": {kind: sum(each == kind for each, _ in blocks) for kind in (PLAIN, CHECK, CHECKPOINT)},
    }
    for clock in ("wall_seconds", "cpu_seconds"):
        parts: dict[str, dict[str, Any]] = {}

        def difference(kind: str, arm: str, other: str, clock: str = clock) -> dict[str, Any]:
            values = [
                (getattr(taken[arm], clock) - getattr(taken[other], clock)) / steps_a_block
                for each, taken in blocks
                if each == kind or kind == "any"
            ]
            return median_interval(values)

        parts["the bare loop, with PyTorch's optimiser instead"] = difference("any", "stock", "bare")
        parts["the step's own proofs (Stepper)"] = difference("any", "stepper", "bare")
        plain = difference(PLAIN, "run", "bare")
        parts["all of a step (metrics, ledger, heartbeat, guard, proofs)"] = plain
        total = dict(plain)
        for kind in (CHECK, CHECKPOINT):
            price = difference(kind, "run", "bare")
            # An interval for a difference of two medians: the widest that both allow.
            each = {
                "median": (price["median"] - plain["median"]) * steps_a_block,
                "low": (price["low"] - plain["high"]) * steps_a_block,
                "high": (price["high"] - plain["low"]) * steps_a_block,
            }
            parts[f"one {kind}"] = each | {"pairs": price["pairs"], "steps_between": between[kind]}
            for end in ("median", "low", "high"):
                total[end] += each[end] / between[kind]
        step = getattr(full, clock)
        of_stock = difference(PLAIN, "run", "stock")
        for end in ("median", "low", "high"):
            of_stock[end] += total[end] - plain[end]  # the rare costs
        result[clock] = {
            "bare_step": {arm: spread([getattr(taken[arm], clock) / steps_a_block for _, taken in blocks]) for arm in ("bare", "run")},
            "bare_full_step": step,
            "parts": parts,
            "a_step": {end: total[end] for end in ("median", "low", "high")},
            "share": {end: total[end] / step for end in ("median", "low", "high")},
            "share_over_pytorchs_optimizer": {end: of_stock[end] / step for end in ("median", "low", "high")},
        }
    return result


# -- processes of their own -------------------------------------------------------------------------------------------------------------


def in_processes(
    data: str, folder: Path, *, rounds: int, steps: int, batch_size: int, threads: int, extra: Sequence[str]
) -> dict[str, Any]:
    """Part 2 of the module's docstring: images/s by command."""
    same = [
        *("--data.batch-size", str(batch_size), "--model.weights", "none", "--model.stem", "article", "--train.max-steps", str(steps)),
        *("--optim.lr", "0.001", "--optim.schedule", "constant", "--train.epochs", "1000000", *extra),
    ]
    bare = ["-m", "benchmarks.bare", "--data", data, "--steps", str(steps), "--threads", str(threads), "--", *same]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *bare]
    peers = {BARE: bare, TORCHRUN: torchrun, RAY_TRAIN: [*bare[: bare.index("--")], "--ray", *bare[bare.index("--") :]]}
    found: dict[str, list[dict[str, float]]] = {}
    for number, name in interleave([*peers, OURS], rounds):
        if name == OURS:
            run = f"round-{number}"
            ours = [
                *("-m", "trainer.run", *same, "--data.path", data, "--train.virtual-ranks", "1", "--workers", "1", "--train.ledger"),
                *("--train.eval-every-epochs", "1000000", "--cluster.threads-per-worker", str(threads)),
                *("--storage", str(folder), "--run", run),
            ]
            done = run_process(ours, timeout_seconds=1800).checked()
            row = steady(times_of_run(folder / run), batch_size)
        else:
            done = run_process(peers[name], timeout_seconds=1800, environment=MEMORY_KEPT).checked()
            row = steady(json_in(done.text)["times"], batch_size)
        found.setdefault(name, []).append(row | {"process_seconds": done.wall_seconds})
        print(f"round {number + 1}, {name}: {row['images_per_second']:.1f} images/s", file=sys.stderr, flush=True)
    commands = {
        name: {key: spread([row[key] for row in rows]) for key in ("images_per_second", "median_step_seconds", "process_seconds")}
        | {"rounds": rows}
        for name, rows in found.items()
    }
    for reference, key in ((BARE, "more_time_a_step_than_bare"), (RAY_TRAIN, "more_time_a_step_than_ray_train")):
        rates = [row["images_per_second"] for row in found[reference]]
        for name, rows in found.items():
            slower = [theirs / row["images_per_second"] - 1 for row, theirs in zip(rows, rates, strict=True)]
            commands[name][key] = median_interval(slower)
    return {"steps": steps, "batch_size": batch_size, "commands": commands}


def steady(times: Sequence[float], batch_size: int, warm_steps: int = WARM_STEPS) -> dict[str, float]:
    """From the unix times of the steps' ends: images/s after the first `warm_steps`, and the median step."""
    if len(times) < warm_steps + 3:
        raise ValueError(f"{len(times)} steps are too few; {warm_steps} warm up and at least 3 more are measured")
    counted = times[warm_steps - 1 :]
    each = [b - a for a, b in itertools.pairwise(counted)]
    return {
        "images_per_second": batch_size * len(each) / (counted[-1] - counted[0]),
        "median_step_seconds": spread(each)["median"],
    }


def times_of_run(run: Path) -> list[float]:
    """The unix time of each step's end, as the run recorded it. Runs of fewer than 4,000 steps record each step."""
    curves = pq.read_table(run / "curves.parquet").sort_by("step")
    if curves["step"].to_pylist() != list(range(len(curves))):
        raise ValueError(f"{run} did not write down every step; measure with fewer steps")
    times: list[float] = curves["time"].to_pylist()
    return times


def json_in(text: str) -> dict[str, Any]:
    """The last line that is a JSON object, because other lines may be warnings."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError(f"no result in what the process printed:\n{text[-2000:]}")


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = []
    if inside := result.get("in_one_process"):
        blocks = ", ".join(f"{count} {kind}" for kind, count in inside["blocks"].items())
        lines.append(f"in one process, batches of {inside['batch_size']}; blocks of {inside['steps_a_block']} steps: {blocks}")
        for clock, title in (("wall_seconds", "wall"), ("cpu_seconds", "CPU")):
            own = inside[clock]
            bare = own["bare_step"]["bare"]
            low, high = bare["quartiles"]
            lines.append(f"{title}: a bare step {1e3 * bare['median']:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")
            for name, part in own["parts"].items():
                apart = f", once in {part['steps_between']} steps" if "steps_between" in part else ""
                interval = f"({1e3 * part['low']:+.2f} to {1e3 * part['high']:+.2f})"
                lines.append(f"  {name:60} {1e3 * part['median']:+8.2f} ms {interval}{apart}")
            share = own["share"]
            lines.append(
                f"  a step in all {1e3 * own['a_step']['median']:+.2f} ms = {share['median']:+.2%} of a bare step of "
                f"{inside['full_batch']} images ({share['low']:+.2%} to {share['high']:+.2%})"
            )
            share = own["share_over_pytorchs_optimizer"]
            lines.append(
                f"  more than the bare loop with PyTorch's optimiser: {share['median']:+.2%} ({share['low']:+.2%} to {share['high']:+.2%})"
            )
    if outside := result.get("in_processes"):
        lines.append(f"in processes of their own, {outside['steps']} steps of {outside['batch_size']} images")
        for name, row in outside["commands"].items():
            rate, more = row["images_per_second"], row["more_time_a_step_than_bare"]
            lines.append(
                f"  {name:28} {rate['median']:9.1f} images/s ({rate['least']:.1f} to {rate['most']:.1f})  "
                f"{more['median']:+.2%} ({more['low']:+.2%} to {more['high']:+.2%}) time a step"
            )
    return lines


def main() -> int:
    parser = parser_of("overhead", __doc__)
    parser.add_argument("--data", default=str(SAMPLE), help="a converted data set whose images share one size")
    parser.add_argument("--rounds", type=int, default=96, help="rounds in one process; half of them without check and checkpoint")
    parser.add_argument("--steps-a-block", type=int, default=STEPS_A_BLOCK, help="steps of a round and arm, in one process (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--full-batch", type=int, default=100, help="images of the step that the overhead is a share of")
    parser.add_argument("--processes", type=int, default=0, help="rounds with processes of their own, through Ray; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=70, help="steps of such a process")
    parser.add_argument("--source", default=best_source(), help="their images, a source of dataio.convert (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (%(default)s)")
    add_arguments(parser)
    parser.add_argument("settings", nargs=argparse.REMAINDER, help="further settings of trainer.run, after --")
    options = parser.parse_args()
    if options.steps_a_block < 1:
        parser.error(f"--steps-a-block {options.steps_a_block}: a block has at least one step")
    extra = [each for each in options.settings if each != "--"]
    result = described("overhead", options)
    with tempfile.TemporaryDirectory(prefix="finetune-overhead-") as temp:
        targets = []
        if options.rounds:
            config = settings_of(options.data, Path(temp), options.batch_size, extra, steps_a_block=options.steps_a_block)
            inside = in_one_process(
                config,
                Path(temp),
                rounds=options.rounds,
                full_batch=options.full_batch,
                threads=options.threads,
                steps_a_block=options.steps_a_block,
            )
            result["in_one_process"] = inside
            for clock, title in (("wall_seconds", "wall time"), ("cpu_seconds", "CPU time")):
                share = inside[clock]["share"]
                name = f"share of a step that all of ours takes, {title}"
                targets.append(target(name, share["median"], at_most=GOAL, interval=(share["low"], share["high"])))
        if options.processes:
            images = -(-options.batch_size * (options.steps + 10) // 5) * 5  # more than needed: the epoch, and its checkpoint, end later
            outside = in_processes(
                str(cifar_like(Path(temp), options.source, train=images, test=100)[1]),
                Path(temp) / "runs",
                rounds=options.processes,
                steps=options.steps,
                batch_size=options.full_batch,
                threads=options.threads,
                extra=extra,
            )
            result["in_processes"] = outside
            for name, key, reference in (
                (TORCHRUN, "more_time_a_step_than_bare", "the bare loop"),
                (OURS, "more_time_a_step_than_bare", "the bare loop"),
                (OURS, "more_time_a_step_than_ray_train", "the same as a plain Ray Train worker"),
            ):
                more = outside["commands"][name][key]
                interval = (more["low"], more["high"])
                targets.append(target(f"more time a step than {reference}: {name}", more["median"], at_most=GOAL, interval=interval))
        result["targets"] = targets
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
