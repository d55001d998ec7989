"""The first layers compared: test accuracy after fine-tuning, and training images/s, for every stem that the model supports.

    python -m benchmarks.stems [--data cifar10] [--model resnet18] [--weights imagenet] [--seeds 0 1 2] [--epochs 2] [--json] [--out FILE]

One process, no Ray. Seeds and stems are interleaved; each trains from the same pretrained weights with the same order and augmentation, and
is tested on the whole test split. The stems of trainer/models/stem.py are compared with the untouched network on enlarged images
(--enlarge 4, repeated or interpolated), which the folded stems imitate. Differences of accuracy are paired by seed.
Without the weights (no network, no file) accuracy means nothing: then only images/s are measured, on random weights, and the result says
so. `--model timm/tf_efficientnet_lite0 --weights package:efficientnet_lite0` has real weights without a download.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.bare import decided, loader_of
from benchmarks.common import SAMPLE, add_arguments, described, finish, interleave, median_interval, parser_of, spread
from dataio.manifest import image_size_of
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import prepare
from trainer.learn.build import build_learner, task_of
from trainer.learn.step import train_steps
from trainer.models.vision import WeightsError, build_model
from trainer.rank.evaluation import evaluate
from trainer.rank.worker import make_repeatable
from trainer.settings.cli import parse
from trainer.settings.spec import make_order, total_steps_of
from trainer.settings.tree import ModelConfig, RunConfig, Stem

WARM_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One variant of the first layers."""

    stem: Stem
    image_size: int = 0
    interpolation: str = "bilinear"


def cases_of(model: ModelConfig, side: int, enlarge: int, *, classes: int) -> tuple[dict[str, Case], dict[str, str]]:
    """(name -> case, name -> why the model does not support it), for all stems, sized for images of `side` pixels."""
    wanted = {stem: Case(stem=stem, image_size=model.image_size) for stem in get_args(Stem) if stem != "auto"}
    if enlarge > 1 and not model.image_size:
        for interpolation in ("nearest", "bilinear"):
            name = f"native, enlarged {enlarge} times, {interpolation}"
            wanted[name] = Case(stem="native", image_size=enlarge * side, interpolation=interpolation)
    possible, refused = {}, {}
    for name, case in wanted.items():
        try:
            build_model(changed(dataclasses.replace(model, weights="none"), case), classes=classes, seed=0, image_hw=(side, side))
        except ValueError as error:
            refused[name] = str(error)
        else:
            possible[name] = case
    return possible, refused


def changed(model: ModelConfig, case: Case) -> ModelConfig:
    return dataclasses.replace(model, stem=case.stem, image_size=case.image_size, interpolation=case.interpolation)  # type: ignore[arg-type]


def train(config: RunConfig, dataset: Dataset, device: torch.device, *, test: bool) -> dict[str, Any]:
    """Trains as a run does, and tests: accuracy (None without `test`), images/s and CPU time an image of the steps after the first few."""
    loader = loader_of(config, dataset, device)
    order = make_order(config, dataset)
    total = total_steps_of(config, order.steps_per_epoch)
    if total <= WARM_STEPS:
        raise ValueError(f"{total} steps are too few: the first {WARM_STEPS} warm up; give more --epochs or --steps")
    learner = build_learner(config, task_of(config, dataset.manifest), loader.image_size, device)
    stepper = learner.stepper()
    stepper.compile_ahead((3, *loader.image_size))
    loader.load("train")
    began = cpu = 0.0
    images = 0
    with contextlib.closing(loader.train(0, total)) as batches:
        for stats in train_steps(
            stepper,
            batches,
            start_step=0,
            stop_step=total,
            steps_per_epoch=order.steps_per_epoch,
            batch_count=order.batch_count,
            set_learning_rate=lambda step: learner.set_learning_rate(step, total),
            device=device,
            sum_over_ranks=False,
        ):
            if stats.steps_done == WARM_STEPS:
                _settle(device)
                began, cpu, images = time.perf_counter(), time.process_time(), 0
            elif stats.steps_done > WARM_STEPS:
                images += stats.samples
    _settle(device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    accuracy = None
    if test:
        precision = config.train.precision
        result = evaluate(learner.task, learner.model, learner.preprocess, dataset, loader, precision=precision)
        accuracy = result.measures["accuracy"]
    return {"accuracy": accuracy, "images_per_second": images / seconds, "cpu_us_per_image": 1e6 * cpu_seconds / images}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: RunConfig, dataset: Dataset, *, seeds: Sequence[int], enlarge: int, threads: int) -> dict[str, Any]:
    """All measurements, JSON-able."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    make_repeatable(threads)
    side, classes = max(image_size_of(dataset.manifest, config.data)), len(dataset.manifest.classes)
    cases, refused = cases_of(config.model, side, enlarge, classes=classes)
    absent = ""
    try:
        build_model(changed(config.model, next(iter(cases.values()))), classes=classes, seed=0, image_hw=(side, side))
    except WeightsError as error:
        absent = str(error)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="none"))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number, name in interleave(list(cases), len(seeds)):
        own = dataclasses.replace(
            config, model=changed(config.model, cases[name]), train=dataclasses.replace(config.train, seed=seeds[number])
        )
        row = train(own, dataset, device, test=not absent)
        rows[name].append(row | {"seed": seeds[number]})
        shown = "" if row["accuracy"] is None else f"{row['accuracy']:.2%}, "
        print(f"seed {seeds[number]}, {name}: {shown}{row['images_per_second']:.0f} images/s", file=sys.stderr, flush=True)
    return judged(rows) | {
        "model": config.model.name,
        "weights": f"absent: {absent}" if absent else config.model.weights,
        "image_side": side,
        "steps": total_steps_of(config, make_order(config, dataset).steps_per_epoch),
        "batch_size": config.data.batch_size,
        "precision": config.train.precision,
        "refused": refused,
    }


def judged(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Spread of each case; accuracy and speed against the tutorial's stem (or, if the model does not support it, its own)."""
    peer = "article" if "article" in rows else "native"
    cases: dict[str, Any] = {}
    for name, each in rows.items():
        cases[name] = {
            "images_per_second": spread([row["images_per_second"] for row in each]),
            "cpu_us_per_image": spread([row["cpu_us_per_image"] for row in each]),
            "speed_over_peer": median_interval(
                [row["images_per_second"] / other["images_per_second"] for row, other in zip(each, rows[peer], strict=True)]
            ),
            "rounds": [dict(row) for row in each],
        }
        if each[0]["accuracy"] is not None:
            cases[name]["accuracy"] = spread([row["accuracy"] for row in each])
            points = [100 * (row["accuracy"] - other["accuracy"]) for row, other in zip(each, rows[peer], strict=True)]
            cases[name]["points_over_peer"] = median_interval(points)
    return {"peer": peer, "cases": cases}


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{result['model']}, weights {result['weights']}",
        f"images of {result['image_side']} pixels, batches of {result['batch_size']}, {result['steps']} steps, {result['precision']}; "
        f"median (least to most), against {result['peer']}",
    ]
    for name, row in result["cases"].items():
        rate, speed = row["images_per_second"], row["speed_over_peer"]
        told = f"{name:38} {rate['median']:8.1f} images/s ({rate['least']:.1f} to {rate['most']:.1f})  {speed['median']:5.2f} x"
        if "accuracy" in row:
            accuracy, points = row["accuracy"], row["points_over_peer"]
            told += f"  {accuracy['median']:.2%} ({accuracy['least']:.2%} to {accuracy['most']:.2%})  {points['median']:+.2f} points"
        lines.append(told)
    lines += [f"{name:38} cannot be: {why}" for name, why in result["refused"].items()]
    return lines


def main() -> int:
    parser = parser_of("stems", __doc__)
    parser.add_argument(
        "--data", default=str(SAMPLE), help="data.path: cifar10, a converted data set, or a source (default: the sample here)"
    )
    parser.add_argument("--root", default="~/.cache/trainer", help="where a source is converted to (%(default)s)")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", default="imagenet", help="as model.weights (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="stop after this many; 0 does all epochs")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--enlarge", type=int, default=4, help="the untouched network also sees images enlarged so often; 1 leaves that out"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (%(default)s)")
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", help="further settings of trainer.run, after --")
    options = parser.parse_args()
    flags = [
        *("--data.path", options.data, "--data.root", options.root, "--data.batch-size", str(options.batch_size)),
        *("--model.name", options.model, "--model.weights", options.weights, "--model.stem", "native", "--train.virtual-ranks", "1"),
        *("--train.epochs", str(options.epochs), "--train.max-steps", str(options.steps), *options.settings),
    ]
    config = decided(parse(flags).config)
    result = described("stems", options)
    dataset = open_dataset(Path(prepare(config.data)))
    result |= measure(config, dataset, seeds=options.seeds, enlarge=options.enlarge, threads=options.threads)
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
