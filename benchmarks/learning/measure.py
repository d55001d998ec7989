"""Trains a feature on and off in turns, and judges the paired differences.

A run is done in this process, without Ray: the run's own order, loader, step, schedule and evaluation, one virtual rank. A feature that
lives outside them (Feature.whole_run) is measured by `trainer.run` as a process of its own.
"""

import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import decided, loader_of
from benchmarks.common import Kept, interleave, mean_interval, run_process, target
from benchmarks.learning.features import Feature
from benchmarks.learning.tasks import Sizes, Task
from dataio.balance import class_counts
from dataio.parquet import Dataset
from dataio.prepared import prepared
from trainer.learn.build import build_learner, class_counts_of, task_of
from trainer.learn.step import train_steps
from trainer.rank.evaluation import evaluate
from trainer.rank.step_plan import StepPlan
from trainer.rank.worker import make_repeatable
from trainer.settings.balance import asks_for_balance, balanced
from trainer.settings.cli import parse
from trainer.settings.length import length_of
from trainer.settings.spec import make_order
from trainer.settings.tree import RunConfig

RUN_SECONDS = 3600.0

Row = Mapping[str, float]
"""Measures of one run: loss, accuracy, balanced_accuracy, macro_f1."""


def config_of(flags: Sequence[str], seed: int) -> tuple[RunConfig, Dataset]:
    """The settings with nothing left at auto, as a run on this machine has them, and the data, converted if necessary."""
    invocation = parse([*flags, "--train.virtual-ranks", "1", "--train.seed", str(seed)])
    dataset = prepared(invocation.config.data).dataset
    manifest = dataset.manifest
    counts = class_counts(dataset) if asks_for_balance(invocation.config) else ()
    config = balanced(invocation.config, manifest.targets, counts).config
    return decided(length_of(config, manifest, workers=1, from_recipes=invocation.from_recipes).config), dataset


def trained(flags: Sequence[str], *, seed: int, threads: int) -> Row:
    """Do the whole run in this process; its measures on the test split."""
    make_repeatable(threads)
    config, dataset = config_of(flags, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order, loader = make_order(config, dataset), loader_of(config, dataset, device)
    learner = build_learner(
        config, task_of(config, dataset.manifest), loader.image_size, device, class_counts=class_counts_of(config, dataset)
    )
    loader.load("train", "test")
    plan = StepPlan.of(config, order.steps_per_epoch)
    for first, last in plan.phases():
        learner.set_trainable(first // plan.steps_per_epoch)
        with closing(loader.train(first, last)) as batches:
            for _ in train_steps(
                learner.stepper(order=order),
                batches,
                start_step=first,
                stop_step=last,
                steps_per_epoch=plan.steps_per_epoch,
                batch_count=order.batch_count,
                set_learning_rate=lambda step: learner.set_learning_rate(step, plan.total_steps),
                device=device,
                sum_over_ranks=False,
            ):
                pass
    found = evaluate(learner.task, learner.model, learner.preprocess, dataset, loader, ema=learner.ema, precision=config.train.precision)
    return {"loss": found.loss, **found.measures}


def run_whole(flags: Sequence[str], *, seed: int, folder: Path) -> Row:
    """The same through `trainer.run` and Ray."""
    words = ["-m", "trainer.run", *flags, "--train.seed", str(seed), "--workers", "1", "--storage", str(folder), "--run", "measured"]
    run_process(words, timeout_seconds=RUN_SECONDS).checked()
    summary = json.loads((folder / "measured" / "summary.json").read_text())
    found = {key.removeprefix("test_"): value for key, value in summary.items() if key.startswith("test_")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and name != "count"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train on one task; features that compare with the same one share it."""

    task: str
    flags: tuple[str, ...]
    whole_run: bool
    teacher: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.task}: {' '.join(self.flags) or 'as it is'}{' (whole run)' if self.whole_run else ''}"


def variants_of(features: Sequence[Feature], tasks: Sequence[str]) -> list[Variant]:
    """All that has to be trained, each once."""
    wanted = [(feature, task) for feature in features for task in tasks if task in feature.tasks]
    return list(dict.fromkeys(variant for feature, task in wanted for variant in (_off(feature, task), _on(feature, task))))


def measure(
    features: Sequence[Feature],
    tasks: Mapping[str, Task],
    *,
    seeds: int,
    sizes: Sizes,
    threads: int,
    folder: Path,
    given: Path | None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """All measurements in turns, and what they say; JSON-able. `keep`: a file for `Kept`."""
    data: dict[tuple[str, int], Path] = {}
    left_out = []
    for name, task in tasks.items():
        for seed in range(seeds):
            if (path := task.make(folder / "data" / f"{name}-{seed}", seed, sizes, given)) is None:
                left_out.append(name)
                break
            data[name, seed] = path
    variants = {variant.name: variant for variant in variants_of(features, [name for name in tasks if name not in left_out])}
    rows: dict[str, dict[int, Row]] = {name: {} for name in variants}
    kept = Kept(keep)
    for seed, name in interleave(list(variants), seeds):
        variant = variants[name]
        flags = [*tasks[variant.task].at(sizes), *variant.flags, "--data.path", str(data[variant.task, seed])]
        flags += ["--data.root", str(folder / "converted")]

        def run(variant: Variant = variant, seed: int = seed, flags: Sequence[str] = flags) -> Row:
            words = list(flags)
            if variant.teacher is not None:
                taught = _taught(variant, words, seed=seed, folder=folder / "teachers", sizes=sizes, tasks=tasks)
                words += ["--train.teacher", str(taught)]
            if variant.whole_run:
                return run_whole(words, seed=seed, folder=folder / "runs" / f"{seed}-{list(variants).index(variant.name)}")
            return trained(words, seed=seed, threads=threads)

        rows[name][seed] = kept.known_or({"variant": name, "seed": seed, "sizes": list(sizes.flags)}, run)
    by_seed = {name: [each[seed] for seed in range(seeds)] for name, each in rows.items()}
    cases = list(cases_of(features, {name: task.measure for name, task in tasks.items() if name not in left_out}, by_seed))
    return {
        "seeds": seeds,
        "sizes": dataclasses.asdict(sizes),
        "threads": threads,
        "not_installed": left_out,
        "runs": by_seed,
        "cases": cases,
        "targets": [target_of(case) for case in cases],
    }


def _on(feature: Feature, task: str) -> Variant:
    return Variant(task=task, flags=feature.on, whole_run=feature.whole_run, teacher=feature.teacher)


def _off(feature: Feature, task: str) -> Variant:
    return Variant(task=task, flags=feature.off, whole_run=feature.whole_run)


def _taught(variant: Variant, flags: Sequence[str], *, seed: int, folder: Path, sizes: Sizes, tasks: Mapping[str, Task]) -> Path:
    """The folder of the run that teaches `variant`, which is done if it is not there: of the task and the sizes, on the same data."""
    place = folder / f"{variant.task}-{seed}-{hashlib.sha256(repr(variant.teacher).encode()).hexdigest()[:8]}"
    if not (place / "measured").exists():
        data = [flags[at + offset] for at, flag in enumerate(flags) if flag in ("--data.path", "--data.root") for offset in (0, 1)]
        row = run_whole([*tasks[variant.task].at(sizes), *(variant.teacher or ()), *data], seed=seed, folder=place)
        print(f"seed {seed}  {variant.task}: the teacher: {row}", file=sys.stderr, flush=True)
    return place / "measured"


def cases_of(features: Sequence[Feature], measures: Mapping[str, str], rows: Mapping[str, Sequence[Row]]) -> Iterator[dict[str, Any]]:
    """Each feature on each task: the paired difference of the task's measure, in points."""
    for feature in features:
        for task, measured in measures.items():
            if task not in feature.tasks:
                continue
            on, off = rows[_on(feature, task).name], rows[_off(feature, task).name]
            gained = [100 * (a[measured] - b[measured]) for a, b in zip(on, off, strict=True)]
            interval = mean_interval(gained)
            yield {
                "feature": feature.name,
                "task": task,
                "measure": measured,
                "on": statistics.fmean(row[measured] for row in on),
                "off": statistics.fmean(row[measured] for row in off),
                "points": interval,
                "verdict": verdict_of(interval),
            }


def verdict_of(interval: Mapping[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return "not repeated"
    return "pays" if low > 0 else "costs" if high < 0 else "undecided"


def target_of(case: Mapping[str, Any]) -> dict[str, Any]:
    points = case["points"]
    name = f"{case['feature']} on {case['task']}: points of {case['measure'].replace('_', ' ')} gained"
    interval = None if points["low"] is None else (points["low"], points["high"])
    return target(name, points["mean"], at_least=0.0, interval=interval)


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = ["feature             task        measure            off     on      points gained (95 % interval)"]
    for case in result["cases"]:
        points = case["points"]
        interval = "" if points["low"] is None else f" ({points['low']:+.1f} to {points['high']:+.1f})"
        lines.append(
            f"{case['feature']:18}  {case['task']:10}  {case['measure']:17}  {case['off']:6.1%}  {case['on']:6.1%}  "
            f"{points['mean']:+.1f}{interval}  {case['verdict']}"
        )
    return [*lines, *(f"{name}: its data are not installed" for name in result["not_installed"])]
