"""What `finetune audit` finds of what was planted in real images: wrong labels, copies, leaks; and what correcting the labels is worth.

    python -m benchmarks.audit [--images 6000] [--test 5000] [--folds 5] [--seeds 3] [--cases NAME...] [--compared "FLAGS"] [--keep FOLDER]
                               [--json] [--out FILE] [-- FLAGS of the runs]

The images are the first of Fashion-MNIST (Debian's dataset-fashion-mnist; the shipped sample where it is not installed), the settings those
of the recipe quickstart, or FLAGS. The test images are never changed, but for the leaks.

random       5 % of the training labels are another class, drawn at random
confusable   5 % are the class that theirs is most like: T-shirt and shirt, pullover and coat, sneaker and ankle boot
copies       50 training images once more in training, and 20 of them in the test: every fifth as the same file or the same pixels, the
             others resized, compressed or mirrored, or several of these

For wrong labels the audit ranks all training images; what is judged is the 5 % that it doubts most. A person looks at these and corrects
the wrong ones (`data.corrections`); then runs with the labels as they were (once for both kinds), with the planted ones and with the
corrected ones are compared on the test images, in turns. `--compared` gives these runs more flags than the audit's: wrong labels cost
little where a network does not learn for long enough to know them by heart. For copies what is judged is findings.json: an image counts
as falsely found if it is in a group without a planted copy. Fashion-MNIST has such pairs of its own.

`--keep` keeps the folders, and the same command goes on there. An audit and a run cost the same as outside of a benchmark.
"""

import csv
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import SAMPLE, add_arguments, best_source, described, finish, parser_of, run_process, spread, target
from dataio.config import DataConfig
from dataio.parquet import open_dataset
from dataio.prepared import is_converted, source_of
from trainer.audit.labels import Answers, joined, judge
from trainer.tasks.predictions import Predictions

NOISES = ("random", "confusable")
CASES = (*NOISES, "copies")
NOISE = 0.05
ALIKE: Mapping[int, int] = {0: 6, 6: 0, 2: 4, 4: 2, 7: 9, 9: 7}
COPIES, LEAKS = 50, 20
CHANGES = ("resized", "compressed", "mirrored", "resized compressed", "mirrored resized compressed")
SECONDS = 12 * 3600.0
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A real image."""

    data: bytes
    label: int


# --- planting -------------------------------------------------------------------------------------------------------------------------


def pictures(split: str, count: int) -> list[Picture]:
    """The first `count` of a split. ValueError if there are fewer."""
    found = [picture for _, picture in zip(range(count), _all(best_source(), split), strict=False)]
    if len(found) < count:
        raise ValueError(f"{best_source()} has only {len(found)} {split} images, not {count}; ask for fewer")
    return found


def _all(path: str, split: str) -> Iterator[Picture]:
    if not is_converted(path):
        yield from (Picture(data=sample.data, label=sample.label) for sample in source_of(DataConfig(path=path)).samples(split))
        return
    found = open_dataset(path).split(split)
    for number in range(found.groups):
        group = found.read_group(number)
        yield from (Picture(data=data.tobytes(), label=label) for data, label in zip(group.encoded, group.labels.tolist(), strict=True))


def flipped(labels: Sequence[int], case: str, classes: int, *, seed: int = 0) -> dict[int, int]:
    """Place -> the wrong label planted there: NOISE of all."""
    rng = np.random.default_rng(seed)
    given = np.array(labels)
    may = np.flatnonzero(np.isin(given, list(ALIKE))) if case == "confusable" else np.arange(len(given))
    chosen = rng.choice(may, round(NOISE * len(given)), replace=False)
    if case == "confusable":
        return {int(place): ALIKE[int(given[place])] for place in chosen}
    shifts = rng.integers(1, classes, len(chosen))
    return {int(place): int((given[place] + shift) % classes) for place, shift in zip(chosen, shifts, strict=True)}


def lay_out(folder: Path, found: Mapping[str, Sequence[Picture]], names: Sequence[str], wrong: Mapping[int, int]) -> None:
    """Write split/CLASS/NUMBER.png, training images under their planted label."""
    for split, images in found.items():
        for place, picture in enumerate(images):
            label = wrong.get(place, picture.label) if split == "train" else picture.label
            _write(folder / split / names[label] / f"{place:05d}.png", picture.data)


def plant_copies(folder: Path, train: Sequence[Picture], names: Sequence[str], *, copies: int, leaks: int, seed: int = 0) -> list[Row]:
    """Write the copies; returns a row for each: of which place, in which split, and how it was changed."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, place in enumerate(rng.choice(len(train), copies + leaks, replace=False).tolist()):
        split = "train" if number < copies else "test"
        how = ("file", "pixels")[number // 5 % 2] if number % 5 == 0 else CHANGES[(number + number // 5) % len(CHANGES)]
        data, suffix = changed(train[place].data, how, rng)
        _write(folder / split / names[train[place].label] / f"copy-of-{place:05d}.{suffix}", data)
        rows.append({"place": place, "split": split, "how": how})
    return rows


def changed(data: bytes, how: str, rng: np.random.Generator) -> tuple[bytes, str]:
    """(the image's bytes after what `how` names, the file's suffix)."""
    if how == "file":
        return data, "png"
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    if "mirrored" in how:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "resized" in how:
        factor = float(rng.uniform(0.7, 1.6))
        width, height = (max(1, round(side * factor)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    if "compressed" in how:
        picture.save(sink, "JPEG", quality=int(rng.integers(50, 91)))
        return sink.getvalue(), "jpg"
    picture.save(sink, "PNG")
    return sink.getvalue(), "png"


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def measured_copies(place: Path, found: Mapping[str, Sequence[Picture]], names: Sequence[str]) -> Row:
    """What an audit finds of planted copies. It trains nothing."""
    if not (place / "planted.json").is_file():
        lay_out(place / "images", found, names, {})
        planted = plant_copies(place / "images", found["train"], names, copies=COPIES, leaks=LEAKS)
        (place / "planted.json").write_text(json.dumps(planted))
    planted = json.loads((place / "planted.json").read_text())
    done = run_process(
        ["-m", "trainer.audit", str(place / "images"), "--data.root", str(place / "root"), "--folds", "0", "--out", str(place / "audit")],
        timeout_seconds=SECONDS,
    ).checked()
    images = sum(len(each) for each in found.values()) + len(planted)
    return judged_copies(json.loads((place / "audit" / "findings.json").read_text()), planted, images) | {
        "wall_seconds": done.wall_seconds,
        "cpu_seconds": done.cpu_seconds,
    }


def judged_copies(findings: Mapping[str, Any], planted: Sequence[Row], images: int) -> Row:
    """Which planted copies are in one group with their original, and which images are in a group without a planted copy."""
    groups = [[(image["split"], Path(image["key"]).stem) for image in group["images"]] for group in findings["copies"]]
    hits = []
    for row in planted:
        pair = {("train", f"{row['place']:05d}"), (row["split"], f"copy-of-{row['place']:05d}")}
        hits.append(any(pair <= set(group) for group in groups))
    exact = [hit for hit, row in zip(hits, planted, strict=True) if row["how"] in ("file", "pixels")]
    others = [hit for hit, row in zip(hits, planted, strict=True) if row["how"] not in ("file", "pixels")]
    false = sum(len(group) for group in groups if not any(name.startswith("copy-of-") for _, name in group))
    return {
        "planted": len(planted),
        "exact_found": sum(exact) / len(exact),
        "others_found": sum(others) / len(others),
        "false": false / images,
        "missed": [row for hit, row in zip(hits, planted, strict=True) if not hit],
    }


def measured_labels(
    case: str,
    place: Path,
    found: Mapping[str, Sequence[Picture]],
    names: Sequence[str],
    *,
    folds: int,
    seeds: int,
    flags: Sequence[str],
    compared: Sequence[str],
) -> Row:
    """What an audit doubts, and what correcting that is worth, in runs with the flags `compared` besides. The runs with the labels as they
    were are those of all cases."""
    wrong = flipped([picture.label for picture in found["train"]], case, len(names))
    clean = place.parent / "clean"
    for folder, planted in ((place / "noisy", wrong), (clean, {})):
        if not (folder / "done").is_file():
            lay_out(folder / "images", found, names, planted)
            (folder / "done").touch()
    data = ["--data.root", str(place.parent / "root"), *flags]
    noisy = ["--data.path", str(place / "noisy" / "images")]
    done = run_process(
        ["-m", "trainer.audit", *noisy, *data, "--folds", str(folds), "--out", str(place / "audit")], timeout_seconds=SECONDS
    ).checked()
    keys, doubted = most_doubted(place / "audit" / "folds", folds, len(names))
    right = {key: found["train"][place_of(key)].label for key in doubted if place_of(key) in wrong}
    corrections = place / "corrections.csv"
    corrections.write_text(corrections_of(right, names))
    cases = {
        "clean": ["--data.path", str(clean / "images")],
        "noisy": noisy,
        "corrected": [*noisy, "--data.corrections", str(corrections)],
    }
    accuracies: dict[str, list[float]] = {name: [] for name in cases}
    for seed in range(seeds):
        for name, words in cases.items():
            run, storage = f"{name}-{seed}", (clean if name == "clean" else place) / "runs"
            arguments = [*words, *data, *compared, "--storage", str(storage), "--run", run, "--train.seed", str(seed)]
            run_process(["-m", "trainer.run", *arguments], timeout_seconds=SECONDS).checked()
            accuracies[name].append(json.loads((storage / run / "summary.json").read_text())["test_accuracy"])
            print(f"{case}: {run} {accuracies[name][-1]:.2%}", file=sys.stderr, flush=True)
    return {
        "planted": len(wrong),
        "images": len(keys),
        "judged": len(doubted),
        "of_judged_planted": len(right) / len(doubted),
        "of_planted_judged": len(right) / len(wrong),
        "accuracy": accuracies,
        "recovered": recovered(accuracies),
        "audit_wall_seconds": done.wall_seconds,
        "audit_cpu_seconds": done.cpu_seconds,
    }


def most_doubted(folder: Path, folds: int, classes: int) -> tuple[Sequence[str], list[str]]:
    """(keys of all training images, keys of the NOISE of them that are doubted most)."""
    files = [folder / f"fold-{fold}-of-{folds}.parquet" for fold in range(1, folds + 1)]
    answers = joined([Answers.of(Predictions.from_parquet(file.read_bytes())) for file in files])
    order = judge(answers, classes).order[: round(NOISE * len(answers.keys))]
    return answers.keys, [answers.keys[place] for place in order.tolist()]


def place_of(key: str) -> int:
    """The number of the training image with this key."""
    return int(Path(key).stem)


def corrections_of(right: Mapping[str, int], names: Sequence[str]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(("key", "split", "action", "label"))
    writer.writerows((key, "train", "relabel", names[label]) for key, label in right.items())
    return sink.getvalue()


def recovered(accuracies: Mapping[str, Sequence[float]]) -> float | None:
    """The part of the accuracy lost by wrong labels that correcting them wins back, over all seeds; None if nothing was lost."""
    clean, noisy, corrected = (statistics.fmean(accuracies[name]) for name in ("clean", "noisy", "corrected"))
    return (corrected - noisy) / (clean - noisy) if clean > noisy else None


def targets_of(cases: Mapping[str, Row]) -> list[Row]:
    rows = []
    for name, least in (("random", 0.8), ("confusable", 0.5)):
        if (case := cases.get(name)) is not None:
            rows.append(target(f"{name}: of the {NOISE:.0%} most doubtful labels, wrong ones", case["of_judged_planted"], at_least=least))
            rows.append(target(f"{name}: of the accuracy lost, won back by correcting them", case["recovered"], at_least=0.5))
    if (case := cases.get("copies")) is not None:
        rows.append(target("copies: equal files and pixels found", case["exact_found"], at_least=1.0))
        rows.append(target("copies: others found", case["others_found"], at_least=0.9))
        rows.append(target("copies: images in groups without a planted one", case["false"], at_most=0.01))
    return rows


def lines_of(cases: Mapping[str, Row]) -> list[str]:
    lines = []
    for name, case in cases.items():
        if name == "copies":
            lines.append(
                f"copies: {case['exact_found']:.1%} of the exact ones, {case['others_found']:.1%} of the others, {case['false']:.2%} of "
                f"the images falsely; {case['cpu_seconds']:.0f} CPU s"
            )
            continue
        medians = ", ".join(f"{each} {spread(values)['median']:.2%}" for each, values in case["accuracy"].items())
        lines.append(f"{name}: {case['of_judged_planted']:.1%} of the most doubted are wrong; accuracy {medians}")
    return lines


def main() -> int:
    words = sys.argv[1:]
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = parser_of("audit", __doc__)
    parser.add_argument("--images", type=int, default=6000, help="training images (%(default)s)")
    parser.add_argument("--test", type=int, default=5000, help="test images (%(default)s)")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--compared", type=str.split, default=[], metavar="FLAGS", help="more flags of the runs that are compared (none)")
    parser.add_argument("--keep", type=Path, help="folder to keep, and to go on in")
    add_arguments(parser)
    options = parser.parse_args(own)
    result = described("audit", options)
    names = [name.replace("/", "-") for name in open_dataset(SAMPLE).manifest.classes]
    found = {"train": pictures("train", options.images), "test": pictures("test", options.test)}
    cases: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        for case in options.cases:
            place = folder / case
            place.mkdir(parents=True, exist_ok=True)
            if case == "copies":
                cases[case] = measured_copies(place, found, names)
            else:
                more = flags or ["--config", "quickstart"]
                cases[case] = measured_labels(
                    case, place, found, names, folds=options.folds, seeds=options.seeds, flags=more, compared=options.compared
                )
    result |= {
        "compared": options.compared,
        "images": {split: len(each) for split, each in found.items()},
        "folds": options.folds,
        "cases": cases,
    }
    result["targets"] = targets_of(cases)
    return finish(result, options, lines_of(cases))


if __name__ == "__main__":
    sys.exit(main())
