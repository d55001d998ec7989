"""Training images/s of `trainer.run` at its default precision against the tutorial's script, and against bare loops, on the same images.

    python -m benchmarks.end_to_end [--rounds 3] [--steps 40] [--json] [--out FILE]

It runs separate commands, interleaved: `trainer.run` through Ray Train with one worker; benchmarks/article.py as the tutorial is written,
with its loader in the main process and with two worker processes; our step in a bare loop, alone and under torchrun. All use the same
network (ResNet-18, the tutorial's stem), initial weights, batch, threads and images: Fashion-MNIST at 32x32 in CIFAR-10's archive.
Images/s are steady: from the end of the fifth step to the end of the last one, everything in between included. The seconds of the whole
processes, with evaluation and start-up, are reported too.
The ratio is to the faster of the tutorial's two.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Process,
    add_arguments,
    best_source,
    cifar_like,
    described,
    finish,
    initial_weights,
    interleave,
    median_interval,
    parser_of,
    run_process,
    spread,
    target,
)
from benchmarks.overhead import json_in, steady, times_of_run
from cluster.zygote import MEMORY_KEPT

GOAL = 2.0
OURS = "trainer.run"
TUTORIAL = ("tutorial", "tutorial, 2 loader workers")
PROCESS_SECONDS = 3600.0


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """All measurements, JSON-able."""
    archive, data = cifar_like(folder, options.source, train=options.images, test=options.test_images)
    weights = initial_weights(folder / "initial.pth")
    batch, steps, threads = options.batch_size, options.steps, options.threads
    same = [
        *("--data.batch-size", str(batch), "--model.weights", str(weights), "--model.stem", "article", "--optim.lr", "0.001"),
        *("--optim.schedule", "constant", "--optim.weight-decay", "0", "--train.epochs", "1000000", "--train.max-steps", str(steps)),
        *options.settings,
    ]
    bare = ["-m", "benchmarks.bare", "--data", str(data), "--steps", str(steps), "--threads", str(threads), "--", *same]
    article = [
        *("-m", "benchmarks.article", "--data", str(archive), "--weights", str(weights), "--steps", str(steps)),
        *("--epochs", "1000000", "--threads", str(threads), "--json"),
    ]
    run = [
        *("-m", "trainer.run", "--data.path", str(data), "--workers", "1", "--train.virtual-ranks", "1", "--storage", str(folder / "runs")),
        *("--train.eval-every-epochs", "1000000", "--cluster.threads-per-worker", str(threads), *same),
    ]
    commands: dict[str, list[str]] = {
        OURS: run,
        TUTORIAL[0]: article,
        TUTORIAL[1]: [*article, "--loader-workers", "2"],
        "bare loop": bare,
        "bare loop under torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *bare],
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number, name in interleave(list(commands), options.rounds):
        named = ["--run", f"round-{number}"] if name == OURS else []
        # The bare loop is ours without monitoring, so it has our allocator's settings too; the tutorial stays as written.
        kept = MEMORY_KEPT if name.startswith("bare") else {}
        done = run_process([*commands[name], *named], timeout_seconds=PROCESS_SECONDS, environment=kept).checked()
        row = row_of(name, done, folder / "runs" / f"round-{number}", batch)
        rows[name].append(row)
        print(f"round {number + 1}, {name}: {row['images_per_second']:.1f} images/s", file=sys.stderr, flush=True)
    return judged(rows) | {
        "images": options.images,
        "batch_size": batch,
        "steps": steps,
        "threads": threads,
        "commands": {name: " ".join(["python", *arguments]).replace(str(folder), "FOLDER") for name, arguments in commands.items()},
    }


def row_of(name: str, done: Process, run: Path, batch_size: int) -> dict[str, float]:
    times = times_of_run(run) if name == OURS else json_in(done.text)["times"]
    return steady(times, batch_size) | {"process_seconds": done.wall_seconds, "process_cpu_seconds": done.cpu_seconds}


def judged(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Spread of each command, and the ratio of ours to it, round by round."""
    cases: dict[str, Any] = {}
    for name, each in rows.items():
        ratios = [ours["images_per_second"] / other["images_per_second"] for ours, other in zip(rows[OURS], each, strict=True)]
        cases[name] = {
            **{key: spread([row[key] for row in each]) for key in each[0]},
            "rounds": each,
            "ours_over_it": median_interval(ratios),
        }
    peer = max(TUTORIAL, key=lambda name: cases[name]["images_per_second"]["median"])
    ratio = cases[peer]["ours_over_it"]["median"]
    return {
        "cases": cases,
        "peer": peer,
        "targets": [target(f"images/s of trainer.run over those of the {peer}", ratio, at_least=GOAL)],
    }


def lines_of(result: dict[str, Any]) -> Sequence[str]:
    lines = [f"batches of {result['batch_size']}, {result['steps']} steps, {result['threads']} threads; median (least to most)"]
    for name, row in result["cases"].items():
        rate, whole, ratio = row["images_per_second"], row["process_seconds"], row["ours_over_it"]
        lines.append(
            f"{name:28} {rate['median']:9.1f} images/s ({rate['least']:.1f} to {rate['most']:.1f})  "
            f"trainer.run {ratio['median']:5.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})  whole process {whole['median']:6.1f} s"
        )
    return lines


def main() -> int:
    parser = parser_of("end_to_end", __doc__)
    parser.add_argument("--source", default=best_source(), help="a source of dataio.convert (%(default)s)")
    parser.add_argument(
        "--images", type=int, default=8000, help="training images taken from it; a multiple of 5. An epoch ends with a checkpoint"
    )
    parser.add_argument("--test-images", type=int, default=100, help="both evaluate them once, at the end")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of each (%(default)s)")
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", help="further settings of trainer.run, after --")
    options = parser.parse_args()
    result = described("end_to_end", options)
    with tempfile.TemporaryDirectory(prefix="finetune-end-to-end-") as temp:
        result |= measure(options, Path(temp))
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
