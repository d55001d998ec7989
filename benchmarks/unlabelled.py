"""Do images without labels help? Few labelled images of Fashion-MNIST with and without the others, by paired seeds.

    python -m benchmarks.unlabelled [--labels 4 25 100] [--seeds N] [--methods softmatch ...] [--steps N] [--small] [--keep FILE]
                                    [--json] [--out FILE]

One process, no Ray. The quickstart's network and weights learn N labelled images of each of the ten classes; with `data.unlabelled` they
also see others without their labels, as many a step as labelled ones. The peer is the supervised control: the same labelled images, seed
and steps without the others. Each seed draws other images. The test images are 2,000 others, or with --small 1,000.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bare import decided, loader_of, refuse
from benchmarks.common import Kept, add_arguments, add_keep, described, finish, interleave, mean_interval, parser_of
from benchmarks.learning.measure import target_of, verdict_of
from benchmarks.learning.tasks import NAMES, Arrays, fashion_mnist, write_idx
from dataio.loader import Loader
from dataio.prepared import prepared
from dataio.schema import UNLABELLED
from dataio.unlabelled import pin, prepare_unlabelled
from trainer.learn.build import SecondStream, build_learner, task_of
from trainer.learn.step import train_steps
from trainer.rank.data import paired
from trainer.rank.evaluation import evaluate
from trainer.rank.worker import make_repeatable
from trainer.settings.cli import parse
from trainer.settings.fields import replaced
from trainer.settings.length import length_of
from trainer.settings.second_stream import order_of_unlabelled, stream_seed
from trainer.settings.spec import make_order, total_steps_of
from trainer.settings.tree import RunConfig

CONTROL = "control"
METHODS = ("softmatch", "fixmatch", "freematch")
MANY_EPOCHS = 100_000
"""The steps end a run, as an epoch is of the labelled images alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is trained and tested."""

    steps: int
    unlabelled: int
    test: int
    side: int
    batch: int


FULL = Sizes(steps=1_000, unlabelled=10_000, test=2_000, side=64, batch=20)
SMALL = Sizes(steps=500, unlabelled=2_000, test=1_000, side=64, batch=20)
"""For two cores."""
RECIPE = ("--optim.lr", "0.005", "--optim.schedule", "cosine", "--optim.warmup-fraction", "0.1")
"""On top of the quickstart's. Its own rate of 0.02 is for batches of 50: with 20 the control has 52 % and 71 % with 4 and 25 labels a class
(32 pixels, 1,000 steps), and the other images make it worse."""


def divided(arrays: Arrays, seed: int, labels: int, sizes: Sizes) -> tuple[Arrays, Arrays]:
    """(`labels` images of each class and the test images, the images without labels); no image is in two of them."""
    images, classes = arrays["train"]
    random = np.random.default_rng(seed)
    order = random.permutation(len(classes))
    kept = np.concatenate([order[classes[order] == each][:labels] for each in range(len(NAMES))])
    others = order[~np.isin(order, kept)][: sizes.unlabelled]
    tested = tuple(part[: sizes.test] for part in arrays["t10k"])
    return (
        {"train": (images[kept], classes[kept]), "t10k": (tested[0], tested[1])},
        {"train": (images[others], classes[others]), "t10k": (images[others][:1], classes[others][:1])},
    )


def config_of(folder: Path, method: str, seed: int, sizes: Sizes) -> RunConfig:
    """The settings of a run on the data in `folder`; `method` is one of METHODS, or CONTROL."""
    flags = [
        *("--config", "quickstart", "--data.path", str(folder / "labelled"), "--data.root", str(folder / "converted")),
        *("--data.batch-size", str(sizes.batch), "--model.image-size", str(sizes.side), "--train.virtual-ranks", "1"),
        *("--train.seed", str(seed), "--train.epochs", str(MANY_EPOCHS), "--train.max-steps", str(sizes.steps)),
        *("--optim.warmup-steps", "0", "--data.remainder", "last", *RECIPE),
    ]
    if method != CONTROL:
        flags += ["--data.unlabelled", str(folder / UNLABELLED), "--train.semi", method]
    return parse(flags).config


def trained(config: RunConfig, *, threads: int) -> dict[str, float]:
    """Do the whole run in this process; its measures on the test split, and how good its last guesses were."""
    make_repeatable(threads)
    dataset = prepared(config.data).dataset
    config = decided(length_of(config, dataset.manifest, workers=1).config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order, loader = make_order(config, dataset), loader_of(config, dataset, device)
    batches_of, stream = loader.train, None
    if config.data.unlabelled:
        found = prepare_unlabelled(config.data)
        config = replaced(config, "data.unlabelled", pin(found))
        second = order_of_unlabelled(config, found.dataset.manifest)
        more = Loader(
            found.dataset,
            config.data,
            order=second,
            virtual_ranks=range(1),
            device=device,
            seed=stream_seed(config.train.seed),
            threads=torch.get_num_threads(),
            on_bad=refuse,
            split=UNLABELLED,
            row=loader.row,
        )
        stream = SecondStream(order=second, target=found.dataset.manifest.targets[0])
        batches_of = partial(_both, loader, more)
    learner = build_learner(config, task_of(config, dataset.manifest), loader.image_size, device, stream=stream)
    learner.set_trainable(0)
    total = total_steps_of(config, order.steps_per_epoch)
    with closing(batches_of(0, total)) as batches:
        for stats in train_steps(
            learner.stepper(order=order),
            batches,
            start_step=0,
            stop_step=total,
            steps_per_epoch=order.steps_per_epoch,
            batch_count=order.batch_count,
            set_learning_rate=lambda step: learner.set_learning_rate(step, total),
            device=device,
            sum_over_ranks=False,
        ):
            if learner.semi is not None and stats.steps_done == total - max(1, total // 10):
                learner.semi.taken()  # so that the last tenth is told
    result = evaluate(learner.task, learner.model, learner.preprocess, dataset, loader, precision=config.train.precision)
    told = {name: value for name, value in (learner.semi.taken() if learner.semi is not None else {}).items() if isinstance(value, float)}
    return {"loss": result.loss, **result.measures, **told}


def _both(labelled: Loader, unlabelled: Loader, first: int, last: int) -> Any:
    return paired(labelled.train(first, last), unlabelled.train(first, last))


def measure(
    *, labels: Sequence[int], methods: Sequence[str], seeds: int, sizes: Sizes, threads: int, folder: Path, keep: Path | None = None
) -> dict[str, Any]:
    """All measurements in turns, and what they say; JSON-able. `keep`: a file for `Kept`."""
    arrays, kept = fashion_mnist(), Kept(keep)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed, name in interleave([f"{count}/{method}" for count in labels for method in (CONTROL, *methods)], seeds):
        count, _, method = name.partition("/")

        def run(count: int = int(count), method: str = method, seed: int = seed) -> dict[str, float]:
            place = folder / f"{count}-{seed}"
            if not place.exists():
                few, others = divided(arrays, seed, count, sizes)
                write_idx(place / "labelled", few)
                write_idx(place / UNLABELLED, others)
            return {"seed": seed, **trained(config_of(place, method, seed, sizes), threads=threads)}

        rows.setdefault(name, []).append(kept.known_or({"case": name, "seed": seed, "sizes": dataclasses.asdict(sizes)}, run))
    cases = judged({name: sorted(each, key=lambda row: row["seed"]) for name, each in rows.items()})
    return {
        "seeds": seeds,
        "sizes": dataclasses.asdict(sizes),
        "cases": cases,
        "runs": rows,
        "targets": [target_of(case) for case in cases],
    }


def judged(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """For each method and number of labels the paired difference to the control, in points."""
    cases = []
    for name, each in rows.items():
        count, _, method = name.partition("/")
        if method == CONTROL:
            continue
        off = rows[f"{count}/{CONTROL}"]
        interval = mean_interval([100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(each, off, strict=True)])
        guesses = [row["unlabelled_right"] for row in each if "unlabelled_right" in row]
        cases.append(
            {
                "feature": method,
                "task": f"{count} labels a class",
                "labels": int(count),
                "measure": "accuracy",
                "on": statistics.fmean(row["accuracy"] for row in each),
                "off": statistics.fmean(row["accuracy"] for row in off),
                "points": interval,
                "verdict": verdict_of(interval),
                "guesses_right": statistics.fmean(guesses) if guesses else None,
                "weight": statistics.fmean(row.get("unlabelled_weight", 0.0) for row in each),
            }
        )
    return sorted(cases, key=lambda case: (case["labels"], case["feature"]))


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = ["labels a class  rule        without  with    points gained (95 % interval)        guesses right  mean weight"]
    for case in result["cases"]:
        points = case["points"]
        interval = "" if points["low"] is None else f" ({points['low']:+.1f} to {points['high']:+.1f})"
        right = "?" if case["guesses_right"] is None else f"{case['guesses_right']:.1%}"
        lines.append(
            f"{case['labels']:14}  {case['feature']:10}  {case['off']:6.1%}  {case['on']:6.1%}  "
            f"{points['mean']:+.1f}{interval}  {case['verdict']}".ljust(85)
            + f"  {right:>6}  {case['weight']:.2f}"
        )
    return lines


def sizes_of(options: argparse.Namespace) -> Sizes:
    sizes = SMALL if options.small else FULL
    given = {name: getattr(options, name) for name in ("steps", "unlabelled", "test") if getattr(options, name) is not None}
    return dataclasses.replace(sizes, **given)


def main() -> int:
    parser = parser_of("unlabelled", __doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=[4, 25, 100], help="labelled images of each class (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["softmatch"], help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, help=f"of each run ({FULL.steps}; with --small {SMALL.steps})")
    parser.add_argument("--unlabelled", type=int, help=f"images without labels ({FULL.unlabelled}; {SMALL.unlabelled})")
    parser.add_argument("--test", type=int, help=f"test images ({FULL.test}; {SMALL.test})")
    parser.add_argument("--small", action="store_true", help="for two cores")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    add_keep(parser)
    add_arguments(parser)
    options = parser.parse_args()
    sizes = sizes_of(options)
    with tempfile.TemporaryDirectory() as folder:
        result = described("unlabelled", options) | measure(
            labels=options.labels,
            methods=options.methods,
            seeds=options.seeds,
            sizes=sizes,
            threads=options.threads,
            folder=Path(folder),
            keep=options.keep,
        )
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
