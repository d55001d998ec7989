"""What the ordered reduction costs: training steps with it, with DDP's all-reduce and with none; and the reduction alone.

    python -m benchmarks.reduction [--workers 2] [--rounds 15] [--precision bf16] [--json]

It runs real processes on this CPU, one thread each, with gloo: ResNet-18 on 32x32 images, the same batch in every case. The cases take
turns in every round, in an order that rotates. A step's time is that of the slowest rank, its CPU time that of all ranks and all their
threads. The best round of each case counts, because other work on the machine only makes a round slower; the median of the rounds'
differences is shown too. On a shared machine (see the load in the result) trust the CPU time: other work hardly affects it.
"two virtual ranks each" cuts a rank's batch in two, so its price includes that of smaller batches; "none, two halves" does the same without
a reduction.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.common import told_words
from cluster.reduce import TreeReducer
from cluster.versions import versions
from dataio.batch import Batch
from dataio.schema import LABEL, Target
from trainer.learn.build import build_learner
from trainer.learn.step import Stepper
from trainer.models.vision import build_model
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

SIZE, CLASSES = 32, 10
MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to do a step, and the case that its price is relative to."""

    halves: int = 1  # virtual ranks per rank
    reducer: str  # "tree", "ddp" or "none"
    peer: str = ""


STEPS = {
    "none": Case(reducer="none"),
    "ddp": Case(reducer="ddp", peer="none"),
    "tree, one virtual rank each": Case(reducer="tree", peer="ddp"),
    "none, two halves": Case(reducer="none", halves=2),
    "tree, two virtual ranks each": Case(reducer="tree", halves=2, peer="none, two halves"),
}
ALONE = {"all_reduce, one vector": "", "all_reduce, the gradients copied in": "", "tree": "all_reduce, the gradients copied in"}


def stepper(case: Case, rank: int, workers: int, precision: str) -> Stepper:
    config = RunConfig(
        model=ModelConfig(weights="none"),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(
            precision=precision,  # type: ignore[arg-type]
            channels_last="on",
            virtual_ranks=case.halves * workers,
            reduction="tree" if case.reducer == "tree" else "ddp",
        ),
    )
    label = Target(name=LABEL, kind="label", classes=tuple(map(str, range(CLASSES))))
    learner = build_learner(config, make_task(config.task, (label,)), (SIZE, SIZE), torch.device("cpu"))
    return learner.stepper() if case.reducer == "none" else learner.stepper(world_size=workers, rank=rank)


def batches(case: Case, rank: int, batch: int) -> list[Batch]:
    """The rank's share of the batch, cut into its virtual ranks."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    n = batch // case.halves
    return [
        Batch(
            samples=images[half * n : (half + 1) * n],
            targets={"label": labels[half * n : (half + 1) * n]},
            ids=np.arange(n),
            epoch=0,
            step=0,
            virtual_rank=rank * case.halves + half,
        )
        for half in range(case.halves)
    ]


def step_of(case: Case, rank: int, workers: int, precision: str, batch: int) -> tuple[Callable[[], None], Stepper]:
    """A function that does one step, and its stepper (for its wait_seconds)."""
    does, share = stepper(case, rank, workers, precision), batches(case, rank, batch)

    def step() -> None:
        # Without the tree, a Stepper joins the halves. So they are two steps here, as much work as the tree's two virtual ranks.
        for part in [share] if case.reducer == "tree" else [[each] for each in share]:
            does.step(part, global_count=batch * workers, step=0)

    return step, does


def alone(name: str, rank: int, workers: int) -> Callable[[], object]:
    """Only the reduction of ResNet-18's gradients, which exist already."""
    model = build_model(ModelConfig(weights="none"), classes=CLASSES, seed=0, image_hw=(SIZE, SIZE))
    gradients = [torch.full_like(p, 1e-3).detach() for p in reversed(list(model.parameters()))]
    if name == "tree":
        reducer = TreeReducer([range(each, each + 1) for each in range(workers)], rank)
        reducer.lay_out(gradients)

        def tree() -> Tensor:
            reducer.begin(rank)
            for part, gradient in enumerate(gradients):
                reducer.put(part, gradient)
            reducer.end()
            return reducer.finish()

        return tree
    flat = torch.zeros(sum(g.numel() for g in gradients))
    views = [part.view(-1) for part in flat.split([g.numel() for g in gradients])]
    sources = [g.permute(0, 2, 3, 1).reshape(-1) if g.dim() == 4 else g.view(-1) for g in gradients]

    def all_reduce() -> None:
        if name.endswith("copied in"):
            torch._foreach_copy_(views, sources)
        else:
            flat.fill_(1e-3)  # otherwise sums of sums would grow
        dist.all_reduce(flat)

    return all_reduce


def rank_main(rank: int, folder: str, workers: int, rounds: int, batch: int, precision: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    made = {name: step_of(case, rank, workers, precision, batch) for name, case in STEPS.items()}
    does: dict[str, Callable[[], object]] = {name: step for name, (step, _) in made.items()}
    does |= {name: alone(name, rank, workers) for name in ALONE}
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in does}  # (wall, CPU, wait) of a round
    names = list(does)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            waited = made[name][1].wait_seconds if name in made else 0.0
            dist.barrier()
            begin, cpu = time.perf_counter(), time.process_time()
            does[name]()
            own = time.perf_counter() - begin
            dist.barrier()  # gloo's threads may still be working for the others
            row = (own, time.process_time() - cpu, (made[name][1].wait_seconds if name in made else 0.0) - waited)
            if number:  # not the first round, which allocates buffers
                seconds[name].append(row)
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def measure(*, workers: int, rounds: int, batch: int, precision: str) -> dict[str, Any]:
    """Case -> its times in seconds a step, and its price."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (folder, workers, rounds, batch, precision), nprocs=workers)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(workers)]
    rows: dict[str, Any] = {}
    slowest: dict[str, list[float]] = {}
    for name in ranks[0]:
        each = [[rank[name][number] for rank in ranks] for number in range(rounds)]
        slowest[name] = [max(wall for wall, _, _ in row) for row in each]
        cpu = [sum(used for _, used, _ in row) for row in each]
        rows[name] = {
            "seconds": min(slowest[name]),
            "median_seconds": statistics.median(slowest[name]),
            "worst_seconds": max(slowest[name]),
            "cpu_seconds_all_ranks": min(cpu),
        }
        if name in STEPS:
            rows[name]["wait_seconds"] = min(statistics.mean(wait for _, _, wait in row) for row in each)
    for name, peer in {**{name: case.peer for name, case in STEPS.items()}, **ALONE}.items():
        if peer:
            mine, theirs = rows[name], rows[peer]
            paired = [ours / other - 1 for ours, other in zip(slowest[name], slowest[peer], strict=True)]
            mine["price"] = {
                "against": peer,
                "of_best_round": mine["seconds"] / theirs["seconds"] - 1,
                "of_cpu_time": mine["cpu_seconds_all_ranks"] / theirs["cpu_seconds_all_ranks"] - 1,
                "median_of_rounds": statistics.median(paired),
            }
    return {
        "cases": rows,
        "workers": workers,
        "rounds": rounds,
        "batch_per_rank": batch,
        "precision": precision,
        "floats": sum(
            p.numel() for p in build_model(ModelConfig(weights="none"), classes=CLASSES, seed=0, image_hw=(SIZE, SIZE)).parameters()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32, help="images a rank (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}, {os.cpu_count()} CPUs", help="what to call this machine (%(default)s)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    result = measure(workers=options.workers, rounds=options.rounds, batch=options.batch, precision=options.precision)
    result |= {
        "command": " ".join(["python -m benchmarks.reduction", *told_words(sys.argv[1:])]),
        "hardware": options.hardware,
        "versions": versions(),
    }
    result["load_average"] = {"before": load, "after": os.getloadavg()[0]}  # over one minute; `after` includes this benchmark's own ranks
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{result['hardware']}; ResNet-18, {SIZE}x{SIZE}, {options.precision}, {options.workers} ranks of {options.batch} images; "
        f"best (median, worst) of {options.rounds} rounds"
    )
    for name, row in result["cases"].items():
        best, median, worst, cpu = (1e3 * row[key] for key in ("seconds", "median_seconds", "worst_seconds", "cpu_seconds_all_ranks"))
        waited = f"  waited {1e3 * row['wait_seconds']:5.1f} ms" if "wait_seconds" in row else ""
        line = f"{name:36} {best:7.1f} ({median:7.1f}, {worst:7.1f}) ms  CPU {cpu:7.1f} ms{waited:18}"
        if "price" in row:
            against, wall, cpu_price, paired = row["price"].values()
            line += f"  {wall:+.1%} ({paired:+.1%}), CPU {cpu_price:+.1%} against {against}"
        print(line.rstrip())


if __name__ == "__main__":
    main()
