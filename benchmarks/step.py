"""The step alone, on images in memory: precision, memory order, compiler and stem of ResNet-18, against the tutorial's loop.

    python -m benchmarks.step [--device auto|cpu|cuda] [--rounds 7] [--batch 100] [--threads 0] [--cases REGEX] [--json] [--out FILE]

The cases take turns in every round, and each round begins with another one; a round has `--steps` steps of each. On a GPU, events in the
stream time a round, which fills the stream without waiting; on a CPU, the clock does, and the CPU time of the process is shown too: trust
that one where the machine has other work. A case's ratio is to `tutorial`, round by round: torchvision's model and PyTorch's loop as in the
tutorial, in fp32 and contiguous, on normalised floats. Our cases start from the loader's bytes, so that the step includes normalisation.
Compilation happens before the rounds and is reported separately. "Of peak" is the arithmetic (trainer.rank.profile.count_work) relative to
what the device just reached with square matrices in the case's precision.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common import add_arguments, described, finish, interleave, parser_of, spread
from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.schema import LABEL, Target
from trainer.learn.build import build_learner
from trainer.rank.profile import Ceilings, count_work, measure_ceilings
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, Stem, TrainConfig
from trainer.tasks.make import make_task

SIZE, CLASSES = 32, 10
MEAN = STD = (0.5, 0.5, 0.5)
PEER = "tutorial"
STEMS: tuple[Stem, ...] = ("native", "article", "centre_crop", "phase_mean", "folded", "folded_bilinear")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to do the step."""

    stem: Stem = "article"
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    cuda_graphs: bool = False
    pad_channels: bool = False

    @property
    def name(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        way = "compiled" if self.compiled else "eager"
        padded = " of 8 channels" if self.pad_channels else ""
        return f"{self.stem}{padded} {self.precision} {layout} {way}{' CUDA graphs' if self.cuda_graphs else ''}"


def all_cases(kind: str) -> list[Case]:
    """The tutorial's stem in every way; the other stems in the fastest way with and without the compiler. `kind` is the device's type."""
    ways = [
        Case(precision=precision, channels_last=channels_last, compiled=compiled)
        for compiled in (False, True)
        for precision in ("fp32", "bf16")
        for channels_last in (False, True)
    ]
    if kind == "cuda":
        for compiled in (False, True):
            fast = Case(precision="bf16", channels_last=True, compiled=compiled)
            ways += [replace(fast, cuda_graphs=True), replace(fast, pad_channels=True)]
    others = [stem for stem in STEMS if stem != "article"]
    return ways + [
        Case(stem=stem, precision="bf16", channels_last=True, compiled=compiled) for compiled in (False, True) for stem in others
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A case, ready to run."""

    step: Callable[[], object]
    compile_seconds: float
    flops_per_image: float | None


def tutorial(device: torch.device, batch: int) -> Job:
    """The tutorial's loop: plain torchvision and PyTorch."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    images, labels = random_batch(device, batch)
    normalised = ((images.float() / 255 - 0.5) / 0.5).contiguous()

    def step() -> None:
        optimizer.zero_grad()
        loss = criterion(model(normalised), labels)
        loss.backward()
        optimizer.step()

    return Job(step=step, compile_seconds=0.0, flops_per_image=count_work(model, (SIZE, SIZE), precision="fp32").flops_per_image)


def ours(case: Case, device: torch.device, batch: int) -> Job:
    config = RunConfig(
        data=DataConfig(batch_size=batch, mean=MEAN, std=STD),
        model=ModelConfig(weights="none", stem=case.stem),
        optim=OptimConfig(lr=0.001),
        train=TrainConfig(
            precision=case.precision,
            channels_last="on" if case.channels_last else "off",
            compile=case.compiled,
            cuda_graphs="on" if case.cuda_graphs else "off",
            pad_channels=case.pad_channels,
            virtual_ranks=1,
        ),
    )
    label = Target(name=LABEL, kind="label", classes=tuple(map(str, range(CLASSES))))
    learner = build_learner(config, make_task(config.task, (label,)), (SIZE, SIZE), device)
    stepper = learner.stepper()
    images, labels = random_batch(device, batch)
    given = [Batch(samples=images, targets={"label": labels}, ids=np.arange(batch), epoch=0, step=0, virtual_rank=0)]
    return Job(
        step=lambda: stepper.step(given, global_count=batch, step=0),
        compile_seconds=stepper.compile_ahead((3, SIZE, SIZE)),
        flops_per_image=count_work(learner.model, (SIZE, SIZE), precision=case.precision).flops_per_image,
    )


def random_batch(device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """(n, 3, H, W) uint8 channels_last like the loader's; (n,) int64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    return images.to(device), torch.randint(0, CLASSES, (batch,), generator=generator).to(device)


def timed(job: Job, device: torch.device, steps: int) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of one step, over `steps` of them."""
    cpu = time.process_time()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            job.step()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    else:
        began = time.perf_counter()
        for _ in range(steps):
            job.step()
        seconds = time.perf_counter() - began
    return seconds / steps, (time.process_time() - cpu) / steps


def measure(cases: Sequence[Case], *, device: torch.device, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Case -> images a second, ratio to the tutorial's loop, share of peak, and all rounds. Always includes `tutorial`."""
    peaks: dict[str, Ceilings] = {precision: measure_ceilings(device, precision=precision) for precision in ("fp32", "bf16")}
    precisions = {PEER: "fp32"} | {case.name: case.precision for case in cases}
    jobs = {PEER: tutorial(device, batch)} | {case.name: ours(case, device, batch) for case in cases}
    for job in jobs.values():
        timed(job, device, 2)  # the first steps choose buffers and kernels
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _, name in interleave(list(jobs), rounds):
        taken[name].append(timed(jobs[name], device, steps))
    rows = {}
    for name, job in jobs.items():
        walls, cpus = [wall for wall, _ in taken[name]], [cpu for _, cpu in taken[name]]
        flops = job.flops_per_image
        rows[name] = {
            "images_per_second": spread([batch / wall for wall in walls]),
            "images_per_cpu_second": spread([batch / cpu for cpu in cpus]),
            "ratio": spread([theirs / own for (theirs, _), own in zip(taken[PEER], walls, strict=True)]),
            "cpu_ratio": spread([theirs / own for (_, theirs), own in zip(taken[PEER], cpus, strict=True)]),
            "flops_per_image": flops,
            "flops_ratio": flops * batch / statistics.median(walls) / peaks[precisions[name]].flops_per_second if flops else None,
            "compile_seconds": job.compile_seconds,
            "rounds": [{"seconds": wall, "cpu_seconds": cpu} for wall, cpu in taken[name]],
        }
    return {
        "model": f"resnet18, {SIZE}x{SIZE}, {CLASSES} classes",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "steps_a_round": steps,
        "peaks": {precision: asdict(peak) for precision, peak in peaks.items()},
        "cases": rows,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    rounds = result["cases"][PEER]["ratio"]["rounds"]
    lines = [
        f"{result['model']}, batch {result['batch']}, {result['threads']} threads; median of {rounds} rounds (quartiles)",
        f"{'':44} {'images/s':>26} {'ratio to the tutorial':>24} {'of CPU time':>12} {'of peak':>8}",
    ]
    for name, row in result["cases"].items():
        speed, ratio = row["images_per_second"], row["ratio"]
        images = f"{speed['median']:,.0f} ({speed['quartiles'][0]:,.0f} to {speed['quartiles'][1]:,.0f})"
        times = f"{ratio['median']:.2f}x ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"
        share = f"{row['flops_ratio']:.1%}" if row["flops_ratio"] is not None else "-"
        compiled = f"  compiled in {row['compile_seconds']:.1f} s" if row["compile_seconds"] else ""
        lines.append(f"{name:44} {images:>26} {times:>24} {row['cpu_ratio']['median']:>11.2f}x {share:>8}{compiled}")
    return lines


def main() -> int:
    parser = parser_of("step", __doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=0, help="steps a round; 0 takes 1 on a CPU and 50 on a GPU")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--cases", default="", help="a regular expression: only the cases whose names it is found in, and the tutorial")
    add_arguments(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # The trainer's own settings (trainer.rank.worker.make_repeatable), also for the peer.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    cases = [case for case in all_cases(kind) if re.search(options.cases, case.name)]
    result = described("step", options)
    steps = options.steps or (50 if kind == "cuda" else 1)
    result |= measure(cases, device=device, batch=options.batch, rounds=options.rounds, steps=steps)
    return finish(result, options, table(result))


if __name__ == "__main__":
    sys.exit(main())
