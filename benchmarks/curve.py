"""How often the accuracy at twice the labels lies in the interval that `finetune curve` foretells from half of them, on real data.

    python -m benchmarks.curve [--cases 120] [--runs 0] [--keep FILE] [--json] [--out FILE]

Held-out cases: a curve is fitted to sizes N/8, N/4, N/2 and N, three runs each, and says where a run on 2N lies in nine of ten cases; then
a run on 2N is looked at. Two series:

features   a frozen network's features (EfficientNet-Lite0, extra `quickstart`) or the pixels, with a linear head trained to convergence:
           hundreds of runs in minutes. Cases differ in images, N (200 to 3,200), classes, wrong labels, test images, regularisation
runs       real runs: `finetune curve` with --parts 0.0625 0.125 0.25 0.5 1, whose largest size is the one that is foretold. --runs N
           data sets of different images; some minutes each on a CPU (--flags has the settings)

The images are Fashion-MNIST's (Debian's dataset-fashion-mnist); without them, those of this repository, for small N.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import Kept, add_arguments, add_keep, described, finish, parser_of, run_process, target
from benchmarks.learning.tasks import NAMES, fashion_mnist, write_idx
from trainer.curve.power_law import LEVEL, CannotTell, Point, fitted
from trainer.runs.certainty import wilson

PARTS = (0.125, 0.25, 0.5, 1.0)
REPEATS = 3
SIZES = (200, 400, 800, 1600, 3200)
SIDE = 32
"""Pixels that the frozen network sees."""
DIMENSIONS = 256
"""Principal components of the features that the heads get."""
RUN_FLAGS = ("--config", "quickstart", "--model.image-size", "32", "--train.epochs", "4", "--repeats", "2")
RUN_SECONDS = 4 * 3600.0

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a curve of the series `features` is measured on."""

    features: str
    """`network` or `pixels`."""
    images: int
    """N: half of the images of the run that is foretold."""
    classes: tuple[int, ...]
    wrong: float
    """The share of training labels that are wrong."""
    tested: int
    decay: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pictures:
    """Features and labels of all images."""

    train: Mapping[str, Floats]  # by the kind of features, each (n, DIMENSIONS)
    train_labels: Labels
    test: Mapping[str, Floats]
    test_labels: Labels


def cases_of(count: int, *, train: int, test: int, seed: int = 1) -> Iterator[Case]:
    """Cases drawn at random; `train`, `test`: images that there are."""
    random = np.random.default_rng(seed)
    for number in range(count):
        classes = np.sort(random.permutation(len(NAMES))[: random.choice([3, 5, 10, 10])])
        there = 0.9 * len(classes) / len(NAMES)  # classes are about equally large
        sizes = [size for size in SIZES if 2 * size <= there * train] or [int(there * train) // 2]
        yield Case(
            features=("network", "network", "pixels")[number % 3],
            images=int(random.choice(sizes)),
            classes=tuple(int(each) for each in classes),
            wrong=float(random.choice([0.0, 0.0, 0.1])),
            tested=min(int(random.choice([300, 1000, 3000])), int(there * test)),
            decay=float(random.choice([1e-3, 1e-2])),
            seed=100_000 * seed + number,
        )


def errors_of(case: Case, pictures: Pictures, threads: int = 1) -> dict[int, list[float]]:
    """Images -> the errors of its runs: REPEATS of each size up to N, and one at 2N, on nested parts of images drawn for the repeat."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(case.seed)
    train = np.flatnonzero(np.isin(pictures.train_labels, case.classes))
    test = random.permutation(np.flatnonzero(np.isin(pictures.test_labels, case.classes)))[: case.tested]
    found: dict[int, list[float]] = {}
    for repeat in range(REPEATS):
        order = random.permutation(train)[: 2 * case.images]
        assert len(order) == 2 * case.images
        assert len(test) == case.tested
        labels = np.searchsorted(case.classes, pictures.train_labels[order])
        is_wrong = random.random(len(labels)) < case.wrong
        labels = np.where(is_wrong, (labels + random.integers(1, len(case.classes), len(labels))) % len(case.classes), labels)
        sizes = [round(part * case.images) for part in PARTS] + ([2 * case.images] if repeat == 0 else [])
        for size in sizes:
            guessed = head(pictures.train[case.features][order[:size]], labels[:size], len(case.classes), case.decay)(
                pictures.test[case.features][test]
            )
            wrong = guessed != np.searchsorted(case.classes, pictures.test_labels[test])
            found.setdefault(size, []).append(float(wrong.mean()))
    return found


def head(features: Floats, labels: Labels, classes: int, decay: float) -> Any:
    """A linear head, trained by L-BFGS; returns the function features (n, f) -> classes (n,)."""
    inputs, truth = torch.from_numpy(features), torch.from_numpy(labels)
    weight = torch.zeros((classes, features.shape[1]), requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, truth) + decay * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)

    def guess(others: Floats) -> Labels:
        with torch.no_grad():
            guessed: Labels = (torch.from_numpy(others) @ weight.T + bias).argmax(1).numpy()
        return guessed

    return guess


def judged(errors: Mapping[int, Sequence[float]], tested: int) -> dict[str, Any]:
    """What the curve through all sizes but the largest says of that one, and whether its first run lies there."""
    *fitted_sizes, largest = sorted(errors)
    outcome = fitted([Point(samples=size, errors=tuple(errors[size])) for size in fitted_sizes], tested=tested)
    assert largest == 2 * fitted_sizes[-1]
    if isinstance(outcome, CannotTell):
        return {"cannot_tell": outcome.reason}
    twice, truth = outcome.twice, errors[largest][0]
    return {
        "cannot_tell": "",
        "foretold": twice.error,
        "low": twice.low,
        "high": twice.high,
        "seen": truth,
        "inside": twice.low <= truth <= twice.high,
    }


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the truth lay inside, with its 95 % interval, and how wide the intervals were."""
    told = [row for row in rows if not row["cannot_tell"]]
    if not told:
        return {"cases": len(rows), "told": 0, "inside": None}
    share = sum(row["inside"] for row in told) / len(told)
    return {
        "cases": len(rows),
        "told": len(told),
        "inside": share,
        "interval": list(wilson(share, len(told))),
        "above": sum(row["seen"] > row["high"] for row in told),
        "below": sum(row["seen"] < row["low"] for row in told),
        "width_points": 100 * statistics.median(row["high"] - row["low"] for row in told),
        "off_points": 100 * statistics.median(abs(row["seen"] - row["foretold"]) for row in told),
        "width_of_error": statistics.median((row["high"] - row["low"]) / max(1e-9, row["seen"]) for row in told),
    }


# --- the series `features` --------------------------------------------------------------------------------------------------------------


def pictures_of(train: int, test: int) -> Pictures:
    """The features of the first images of each split."""
    arrays = fashion_mnist()
    kept = {"train": arrays["train"][0][:train], "test": arrays["t10k"][0][:test]}
    pixels = {name: images.reshape(len(images), -1).astype(np.float32) / 255 for name, images in kept.items()}
    network = {name: _network(images) for name, images in kept.items()}
    components = {name: _components(each["train"], DIMENSIONS) for name, each in (("network", network), ("pixels", pixels))}
    made = {
        split: {name: _projected(each[split], *components[name]) for name, each in (("network", network), ("pixels", pixels))}
        for split in kept
    }
    labels = {"train": arrays["train"][1][:train].astype(np.int64), "test": arrays["t10k"][1][:test].astype(np.int64)}
    return Pictures(train=made["train"], train_labels=labels["train"], test=made["test"], test_labels=labels["test"])


def _network(images: npt.NDArray[np.uint8]) -> Floats:
    """(n, 28, 28) -> (n, features), each of length 1."""
    from trainer.models.features import features_of
    from trainer.models.vision import Preprocess, build_model
    from trainer.settings.tree import ModelConfig

    config = ModelConfig(name="timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0", image_size=SIDE, stem="native")
    model = build_model(config, classes=2, seed=0, image_hw=(28, 28)).eval().to(memory_format=torch.channels_last)
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=SIDE, interpolation="bicubic")
    found = []
    with torch.inference_mode(), features_of(model) as features:
        for start in range(0, len(images), 250):
            samples = torch.from_numpy(images[start : start + 250].copy())[:, None].expand(-1, 3, -1, -1).contiguous()
            model(preprocess(samples))
            found.append(features.taken().numpy())
    return np.concatenate(found)


def _components(features: Floats, count: int) -> tuple[Floats, Floats, float]:
    mean = features.mean(0)
    _, vectors = np.linalg.eigh(np.cov((features - mean).T))
    kept = vectors[:, ::-1][:, :count].astype(np.float32)
    return mean, kept, float(((features - mean) @ kept).std())


def _projected(features: Floats, mean: Floats, vectors: Floats, scale: float) -> Floats:
    found: Floats = ((features - mean) @ vectors / scale).astype(np.float32)
    return found


# --- the series `runs` ------------------------------------------------------------------------------------------------------------------


def real_case(number: int, folder: Path, *, images: int, tested: int, flags: Sequence[str]) -> dict[str, Any]:
    """A curve of real runs on images of its own."""
    arrays = fashion_mnist()
    random = np.random.default_rng(number)
    chosen = {split: np.sort(random.permutation(len(arrays[split][1]))[:count]) for split, count in (("train", images), ("t10k", tested))}
    data = write_idx(folder / f"data-{number}", {split: tuple(each[chosen[split]] for each in arrays[split]) for split in arrays})  # type: ignore[misc]
    words = ["-m", "trainer.curve", str(data), *flags, "--parts", "0.0625", "0.125", "0.25", "0.5", "1", "--workers", "1", "--json"]
    words += ["--storage", str(folder / "runs"), "--run", f"curve-{number}", "--data.root", str(folder / "converted")]
    run_process(words, timeout_seconds=RUN_SECONDS).checked()
    curve = json.loads((folder / "runs" / f"curve-{number}" / "curve.json").read_text())
    errors: dict[int, list[float]] = {}
    for run in curve["runs"]:
        errors.setdefault(run["images"], []).append(run["error"])
    return {"errors": {str(size): each for size, each in errors.items()}, **judged(errors, curve["tested"])}


# --- the command ------------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    kept = Kept(options.keep)
    pictures: list[Pictures] = []

    def features_case(case: Case) -> dict[str, Any]:
        if not pictures:
            pictures.append(pictures_of(options.train, options.test))
        errors = errors_of(case, pictures[0], options.threads)
        return {**asdict(case), "errors": {str(size): each for size, each in errors.items()}, **judged(errors, case.tested)}

    rows = {
        "features": [
            kept.known_or(f"features {case.seed}", lambda case=case: features_case(case))  # type: ignore[misc]
            for case in cases_of(options.cases, train=options.train, test=options.test, seed=options.seed)
        ],
        "runs": [
            kept.known_or(
                f"runs {number}",
                lambda number=number: real_case(  # type: ignore[misc]
                    number, folder, images=options.run_images, tested=options.run_tested, flags=options.flags
                ),
            )
            for number in range(options.runs)
        ],
    }
    series = {name: summed(each) for name, each in rows.items() if each}
    return {
        "level": LEVEL,
        "series": series,
        "cases": rows,
        "targets": [
            target(
                f"{name}: share of held-out cases whose accuracy at twice the labels lies in the interval",
                found["inside"],
                at_least=LEVEL,
                interval=tuple(found["interval"]) if found["inside"] is not None else None,
            )
            for name, found in series.items()
        ],
    }


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in result["series"].items():
        if found["inside"] is None:
            lines.append(f"{name}: of {found['cases']} cases none was told")
            continue
        low, high = found["interval"]
        lines.append(
            f"{name}: {found['inside']:.1%} of {found['told']} cases inside ({low:.1%} to {high:.1%}), {found['below']} better than the "
            f"interval, {found['above']} worse; {found['cases'] - found['told']} could not be told. Median width "
            f"{found['width_points']:.2f} points, median distance {found['off_points']:.2f} points"
        )
    return lines


def main() -> int:
    parser = parser_of("curve", __doc__)
    parser.add_argument("--cases", type=int, default=120, help="of the series features (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the drawing of these; the fit's constants were chosen on 0 (%(default)s)")
    parser.add_argument("--runs", type=int, default=0, help="of the series runs (%(default)s)")
    parser.add_argument("--train", type=int, default=12_800, help="images from which the series features draws (%(default)s)")
    parser.add_argument("--test", type=int, default=3000, help="test images of that series (%(default)s)")
    parser.add_argument("--run-images", type=int, default=2000, help="training images of a case of the series runs (%(default)s)")
    parser.add_argument("--run-tested", type=int, default=2000, help="test images of it (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    add_keep(parser)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=list(RUN_FLAGS), help="settings of the real runs, last of all")
    add_arguments(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-curve-") as folder:
        result = described("curve", options) | measure(options, Path(folder))
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
