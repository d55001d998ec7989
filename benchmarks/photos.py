"""A folder of pictures of many sizes, given to this product and to timm's own training script, with nothing said but data and model.

    python -m benchmarks.photos --timm-script train.py [--folder DIR] [--seeds 1] [--cases NAME...] [--keep FILE] [--json] [--out FILE]

EfficientNet-Lite0 with ImageNet weights (extra `quickstart`). The pictures are Debian's tuxpaint-stamps-default (`apt install
tuxpaint-stamps-default`), PNG of many sizes, most of them with transparency: each of its folders with at least 15 is a class, every third
picture is saved as JPEG, and three in ten are tested. `--folder` takes another folder of class folders. timm's script is not part of its
package: it is train.py in the repository huggingface/pytorch-image-models at the tag of the installed version; its SHA-256 is recorded.

Runs in turns, on the same training and test pictures:

ours           python -m trainer.run --data.path FOLDER --model.name ... --model.weights ...
timm           train.py with its defaults, but as many epochs as ours chose (its own default is 300)
timm, recipe   the same epochs, with the one command by which timm's documentation fine-tunes pretrained weights (hfdocs/source/
               training_script.mdx, plant pathology): batches of 32, AdamW 1e-4, weight decay .01; there it has 30 epochs
timm, tuned    the same epochs with what is usual for fine-tuning: batches of 32, AdamW 3e-4, weight decay .05, a warm-up of 2 epochs,
               crops of no less than half of the picture

Nobody sees the test pictures before the end: our folder holds no validation split, and timm, which looks at them after each epoch, is
judged by its last epoch (its best one, which only the test pictures can tell, is given beside it). Accuracies are compared picture by
picture. CPU seconds are those of all processes that a run started; wall times are compared only where other work took little of the
machine. `--keep` keeps what was measured, and the same command goes on there.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import Kept, add_arguments, add_keep, described, finish, parser_of, run_process, target
from benchmarks.timm_weights import write_weights
from trainer.tasks.predictions import Predictions

STAMPS = Path("/usr/share/tuxpaint/stamps")
LEAST_OF_A_CLASS = 15
TESTED = 0.3
NAME = "timm/tf_efficientnet_lite0"
WEIGHTS = "package:efficientnet_lite0"
OURS = "ours"
PEERS: Mapping[str, tuple[str, ...]] = {
    "timm": (),
    "timm, recipe": ("-b", "32", "--opt", "adamw", "--lr", "1e-4", "--weight-decay", "0.01"),
    "timm, tuned": ("-b", "32", "--opt", "adamw", "--lr", "3e-4", "--weight-decay", "0.05", "--warmup-epochs", "2", "--scale", "0.5", "1"),
}
"""Name -> flags."""
TIMMS_WEIGHTS = "timm-weights.pth"
RUN_SECONDS = 7200.0
MOST_OTHERS = 0.15
"""Of the machine's CPU time, what other work may take while wall times count."""
Row = dict[str, Any]


def pictures_of(folder: Path, *, least: int = LEAST_OF_A_CLASS) -> dict[str, list[Path]]:
    """The pictures in and below each folder of `folder`, sorted, of those folders that have at least `least`."""
    found = {
        each.name: sorted(path for path in each.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        for each in sorted(folder.iterdir())
        if each.is_dir()
    }
    return {name: paths for name, paths in found.items() if len(paths) >= least}


def lay_out(folder: Path, pictures: Mapping[str, Sequence[Path]], *, tested: float = TESTED) -> dict[str, int]:
    """Write ours/train/CLASS and ours/test/CLASS below `folder`, and the same as timm/train and timm/validation. A picture's own hash says
    where it goes, class by class; every third is saved as JPEG, on white. Returns the counts by split."""
    counts = {"train": 0, "test": 0}
    for name, paths in pictures.items():
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        for number, path in enumerate(by_hash):
            split = "test" if number < max(1, round(tested * len(paths))) else "train"
            counts[split] += 1
            place = folder / "ours" / split / name
            place.mkdir(parents=True, exist_ok=True)
            if number % 3:
                (place / f"{number:04d}{path.suffix.lower()}").write_bytes(path.read_bytes())
            else:
                with Image.open(path) as image:
                    whole = image.convert("RGBA")
                    white = Image.new("RGBA", whole.size, "white")
                    Image.alpha_composite(white, whole).convert("RGB").save(place / f"{number:04d}.jpg", quality=90)
    (folder / "timm").mkdir()
    (folder / "timm" / "train").symlink_to("../ours/train")
    (folder / "timm" / "validation").symlink_to("../ours/test")  # not in our folder, where it would choose the best epoch
    return counts


def ours(folder: Path, seed: int, place: Path, flags: Sequence[str]) -> Row:
    words = ["-m", "trainer.run", "--data.path", str(folder / "ours"), "--model.name", NAME, "--model.weights", WEIGHTS]
    words += ["--train.seed", str(seed), "--storage", str(place), "--run", "ours", "--data.root", str(place / "root"), *flags]
    row = timed(words)
    summary = json.loads((place / "ours" / "summary.json").read_text())
    found = Predictions.from_parquet((place / "ours" / "predictions.parquet").read_bytes())
    wrong = [of_key(key) for key, right in zip(found.keys, found.labels == found.answers, strict=True) if not right]
    assert found.is_complete
    return row | {"accuracy": summary["test_accuracy"], "epochs": round(summary["epochs"]), "wrong": sorted(wrong)}


def timms(script: Path, folder: Path, seed: int, place: Path, *, epochs: int, flags: Sequence[str]) -> Row:
    classes = sorted(each.name for each in (folder / "timm" / "train").iterdir())
    words = [str(script), "--data-dir", str(folder / "timm"), "--model", NAME.removeprefix("timm/"), "--pretrained"]
    words += ["--pretrained-path", str(folder / TIMMS_WEIGHTS), "--num-classes", str(len(classes))]
    words += ["--device", "cpu", "--workers", str(os.cpu_count() or 1), "--seed", str(seed), "--epochs", str(epochs), *flags]
    row = timed([*words, "--output", str(place), "--experiment", "timm"])
    row |= rows_of_timm((place / "timm" / "summary.csv").read_text())
    tested = sorted((folder / "timm" / "validation").glob("*/*"))
    wrong = wrong_of_timm(place / "timm" / "last.pth.tar", tested, classes)
    if abs(1 - len(wrong) / len(tested) - row["accuracy"]) > 1.5 / len(tested):
        raise ValueError(f"timm's last checkpoint has {len(wrong)} of {len(tested)} pictures wrong, its summary.csv says {row['accuracy']}")
    return row | {"wrong": wrong}


def rows_of_timm(text: str) -> Row:
    """What timm's summary.csv says: the last epoch's accuracy, and the best one's."""
    tops = [float(row["eval_top1"]) / 100 for row in csv.DictReader(text.splitlines())]
    if not tops:
        raise ValueError("timm's summary.csv has no epoch")
    return {"accuracy": tops[-1], "best_accuracy": max(tops), "epochs": len(tops)}


def wrong_of_timm(checkpoint: Path, tested: Sequence[Path], classes: Sequence[str]) -> list[str]:
    """The pictures that the checkpoint gets wrong, seen as timm's script sees them."""
    import timm
    import torch
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(NAME.removeprefix("timm/"), num_classes=len(classes))
    model.load_state_dict(torch.load(checkpoint, weights_only=False, map_location="cpu")["state_dict"])
    model.eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    wrong = []
    with torch.inference_mode():
        for path in tested:
            with Image.open(path) as image:
                scores = model(transform(image.convert("RGB"))[None])  # (1, classes)
            if classes[int(scores.argmax())] != path.parent.name:
                wrong.append(of_key(str(path)))
    return sorted(wrong)


def of_key(key: str) -> str:
    """CLASS/FILE, by which both sides know a picture."""
    return "/".join(Path(key).parts[-2:])


def timed(words: Sequence[str]) -> Row:
    """Runs `python WORDS`: wall seconds, and the CPU seconds of every process that has this run's mark in its environment."""
    mark = uuid.uuid4().hex
    ended = threading.Event()
    cpu: dict[tuple[str, str], float] = {}
    strangers: set[tuple[str, str]] = set()

    def watch() -> None:
        while not ended.wait(0.5):
            look(mark.encode(), cpu, strangers)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = busy_seconds()
    try:
        done = run_process(words, timeout_seconds=RUN_SECONDS, environment={"BENCHMARK_PHOTOS": mark}).checked()
    finally:
        ended.set()
        thread.join()
    own = sum(cpu.values())
    others = (busy_seconds() - before - own) / (done.wall_seconds * (os.cpu_count() or 1))
    return {"seconds": done.wall_seconds, "cpu_seconds": own, "others_share": round(max(0.0, others), 3)}


def busy_seconds() -> float:
    """CPU seconds that this machine has worked since it started."""
    user, nice, system, _, _, irq, soft, stolen = (int(word) for word in Path("/proc/stat").read_text().split()[1:9])
    return float(user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def look(mark: bytes, cpu: dict[tuple[str, str], float], strangers: set[tuple[str, str]]) -> None:
    """Notes the CPU seconds of all marked processes that live, by (pid, start): what a process used in its last half second is not seen,
    but neither are Ray's processes lost, which outlive their parents."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            one = (folder.name, fields[19])
            if one in strangers:
                continue
            if one not in cpu and mark not in (folder / "environ").read_bytes():
                if fields[0] != "Z" and int(fields[11]) + int(fields[12]) > 0:
                    strangers.add(one)
                continue
            cpu[one] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    counts = lay_out(folder, pictures := pictures_of(options.folder))
    write_weights(folder / TIMMS_WEIGHTS, package=WEIGHTS)
    cases = (OURS, *(name for name in PEERS if name in options.cases))
    rows: dict[str, list[Row]] = {name: [] for name in cases}
    kept = Kept(options.keep)
    epochs = 0
    for seed in range(options.seeds):
        for name in cases:  # ours first: it chooses the epochs
            flags = options.ours if name == OURS else PEERS[name]

            def run(name: str = name, seed: int = seed, flags: Sequence[str] = flags, epochs: int = epochs) -> Row:
                place = folder / f"{seed}-{cases.index(name)}"
                if name == OURS:
                    return ours(folder, seed, place, flags)
                return timms(options.timm_script.resolve(), folder, seed, place, epochs=epochs, flags=flags)

            row = kept.known_or({"name": name, "seed": seed, "flags": list(flags)}, run)
            epochs = row["epochs"] if name == OURS else epochs
            rows[name].append(row)
    return {
        "pictures": {"classes": {name: len(paths) for name, paths in pictures.items()}, **counts},
        "timm_version": version("timm"),
        "timm_script_sha256": hashlib.sha256(options.timm_script.read_bytes()).hexdigest(),
        "flags": {name: list(PEERS[name]) for name in cases if name != OURS} | {OURS: options.ours},
        "seeds": options.seeds,
        "runs": rows,
        "targets": [line for peer in cases[1:] for line in targets_of(rows[OURS], rows[peer], peer, counts["test"])],
    }


def targets_of(own: Sequence[Row], theirs: Sequence[Row], peer: str, tested: int) -> list[dict[str, Any]]:
    """The claims against a peer: more test pictures right, in less time."""
    gained, low, high = gain_of([row["wrong"] for row in own], [row["wrong"] for row in theirs], tested)
    lines = [target(f"photographs, without a flag: points of test accuracy above {peer}", gained, at_least=0.0, interval=(low, high))]
    for key, what in (("seconds", "wall time"), ("cpu_seconds", "CPU time")):
        ratios = [one[key] / other[key] for one, other in zip(own, theirs, strict=True)]
        span = (min(ratios), max(ratios)) if len(ratios) > 1 else None
        name = f"photographs, without a flag: {what}, of that of {peer}"
        disturbed = key == "seconds" and max(row["others_share"] for row in (*own, *theirs)) > MOST_OTHERS
        lines.append(target(name, None if disturbed else statistics.median(ratios), at_most=1.0, interval=None if disturbed else span))
    return lines


def gain_of(own: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]], tested: int) -> tuple[float, float, float]:
    """Percentage points of accuracy that `own` is ahead, and a 95 % interval over test pictures. Each argument has, for each seed, the
    pictures got wrong. A picture counts with its mean over the seeds, so pictures are independent of each other, and pairs of runs are not
    taken for more pictures."""
    ahead: dict[str, float] = {}
    for one, other in zip(own, theirs, strict=True):
        for key in one:
            ahead[key] = ahead.get(key, 0.0) - 1 / len(own)
        for key in other:
            ahead[key] = ahead.get(key, 0.0) + 1 / len(own)
    values = [*ahead.values(), *[0.0] * (tested - len(ahead))]
    half = 1.96 * statistics.stdev(values) / math.sqrt(tested)
    middle = statistics.fmean(values)
    return 100 * middle, 100 * (middle - half), 100 * (middle + half)


def mean(rows: Sequence[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def main() -> int:
    parser = parser_of("photos", __doc__)
    parser.add_argument("--timm-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--folder", type=Path, default=STAMPS, help="class folders (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[*PEERS], default=[*PEERS], help="timm's runs beside ours (all)")
    add_keep(parser)
    parser.add_argument("--ours", type=str.split, default=[], help="more flags for our run, to try other settings ('')")
    add_arguments(parser)
    options = parser.parse_args()
    for path in (options.timm_script, options.folder):
        if not path.exists():
            parser.error(f"there is no {path}")
    with tempfile.TemporaryDirectory(prefix="benchmark-photos-") as folder:
        result = described("photos", options) | measure(options, Path(folder))
    lines = ["case           test accuracy   best epoch   epochs   seconds   CPU seconds"]
    for name, rows in result["runs"].items():
        best = f"{mean(rows, 'best_accuracy'):10.1%}" if name != OURS else " " * 10
        times = f"{mean(rows, 'seconds'):7.0f}   {mean(rows, 'cpu_seconds'):11.0f}"
        lines.append(f"{name:13}  {mean(rows, 'accuracy'):13.1%}   {best}   {rows[0]['epochs']:6}   {times}")
    return finish(result, options, lines)


if __name__ == "__main__":
    sys.exit(main())
