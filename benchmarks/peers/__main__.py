"""The quickstart's job by us, timm's training script, Hugging Face's Trainer, a plain Ray Train loop and the tutorial's script, in turns.

    python -m benchmarks.streaming --setup-peers                                     once: transformers and accelerate, in their own place
    python -m benchmarks.peers [--timm-script train.py] [--rounds 3] [--json] [--out FILE]

The job: EfficientNet-Lite0 with ImageNet weights (extra `quickstart`) on this repository's 2,000 images of Fashion-MNIST at 96 pixels, to
a test accuracy of `--accuracy` on its 500 others. The images are written once as a folder of PNG files, which everybody reads. Each peer
is a small script of its own in this folder, as its tool's documentation writes it, with the quickstart's recipe where the tool has it;
timm's script is train.py of its repository at the tag of the installed version, with its SHA-256 recorded. The tutorial keeps its own
recipe.

Measured, from outside and for all alike, each run a fresh process: seconds from the command to the first evaluation that is as good;
images/s between the first and the last evaluation; the most memory (RSS of all processes together); and the seconds lost to one SIGKILL:
all processes are killed when half of the undisturbed time has passed, the same command is given again, and the undisturbed time is
subtracted from the sum. Tools resume in the way that they document; the tutorial has none. A tool that does not get there says so. Run it
on a quiet machine.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import SAMPLE, add_arguments, described, finish, interleave, parser_of
from benchmarks.peers.contenders import OURS, PEER_NAMES, Contender, Job, contenders
from benchmarks.peers.judge import Row, judged, lines_of, reached, row_of
from benchmarks.peers.watch import Life, live
from benchmarks.streaming.__main__ import HOME
from benchmarks.streaming.measure import interpreter
from benchmarks.timm_weights import write_weights
from dataio.parquet import open_dataset


def lay_out(folder: Path, counts: Mapping[str, int]) -> None:
    """The sample's first images of each split as PNG files: SPLIT/CLASS/NUMBER.png."""
    dataset = open_dataset(SAMPLE)
    for split, count in counts.items():
        source, written = dataset.split(split), 0
        labels = source.labels()
        for group in range(source.groups):
            for image in source.read_group(group).encoded:
                if written < count:
                    place = folder / split / dataset.manifest.classes[labels[written]].replace("/", "-")
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{written:05d}.png").write_bytes(bytes(image))
                    written += 1
        if written < count:
            raise ValueError(f"the sample has {written} {split} images and not {count}; ask for fewer")


def one_round(contender: Contender, folder: Path, *, accuracy: float, train_images: int, timeout_seconds: float) -> Row:
    """An undisturbed run to its end, and one that is killed in the middle of that run's way to the accuracy."""
    undisturbed = live(contender, folder / "undisturbed", timeout_seconds=timeout_seconds)
    if undisturbed.failure:
        raise RuntimeError(f"{contender.name} {undisturbed.failure}")
    seconds = reached(undisturbed, accuracy)
    lives: list[Life] = []
    if seconds is not None:
        place = folder / "killed"
        lives.append(live(contender, place, timeout_seconds=timeout_seconds, kill_after=seconds / 2))
        lives.append(live(contender, place, timeout_seconds=timeout_seconds, until=accuracy))
    return row_of(undisturbed, lives, accuracy=accuracy, train_images=train_images)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    lay_out(folder / "images", {"train": options.images, "test": options.test_images})
    weights = write_weights(folder / "weights.pth")
    job = Job(images=folder / "images", train_images=options.images, weights=weights, epochs=options.epochs)
    script: Path | None = options.timm_script
    python = interpreter(options.peers.expanduser())
    known = contenders(job, timm_script=script and script.resolve(), peers_python=python, flags={OURS: options.ours})
    chosen = {name: contender for name, contender in known.items() if name == OURS or name in options.cases}
    rows: dict[str, list[Row]] = {name: [] for name in chosen}
    for number, name in interleave(list(chosen), options.rounds):
        place = folder / f"{number}-{name.replace(' ', '-')}"
        found = one_round(chosen[name], place, accuracy=options.accuracy, train_images=job.train_images, timeout_seconds=options.timeout)
        rows[name].append(found)
        shutil.rmtree(place)  # every checkpoint of every life
        print(f"round {number + 1}, {name}: {found}", file=sys.stderr, flush=True)
    return judged(rows, options.accuracy) | {
        "accuracy": options.accuracy,
        "images": options.images,
        "test_images": options.test_images,
        "epochs": options.epochs,
        "rounds": options.rounds,
        "commands": {name: shown(contender, folder) for name, contender in chosen.items()},
        "timm_script_sha256": hashlib.sha256(script.read_bytes()).hexdigest() if script is not None else None,
    }


def shown(contender: Contender, folder: Path) -> list[str]:
    """The command without where this machine keeps things."""
    words = contender.command(folder / "run")
    return ["python", *(Path(word).name if word.startswith("/") else word for word in words[1:])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("peers", __doc__)
    parser.add_argument("--timm-script", type=Path, help="timm's train.py; without it timm is left out")
    parser.add_argument("--peers", type=Path, default=HOME / "peers", metavar="DIR", help="where --setup-peers put them (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=PEER_NAMES, default=PEER_NAMES, help="peers beside ours (all)")
    parser.add_argument("--accuracy", type=float, default=0.83, help="to be reached (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of everybody but the tutorial, which has 10 (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="training images, at most 2,000 (%(default)s)")
    parser.add_argument("--test-images", type=int, default=500, help="at most 500 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one life may take (%(default)s)")
    parser.add_argument("--ours", type=str.split, default=[], help="more flags for our run ('')")
    add_arguments(parser)
    options = parser.parse_args(argv)
    if options.timm_script is not None and not options.timm_script.is_file():
        parser.error(
            f"there is no {options.timm_script}; it is train.py of huggingface/pytorch-image-models at the installed version's tag"
        )
    if options.timm_script is None and "timm" in options.cases and options.cases is not PEER_NAMES:
        parser.error("--cases timm needs --timm-script")
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-") as folder:
        result = described("peers", options) | measure(options, Path(folder))
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
