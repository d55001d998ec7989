"""A quickstart's job by us and by others, in turns: timm's training script, Hugging Face's Trainer, a plain Ray Train loop, the tutorial.

    python -m benchmarks.streaming --setup-peers                                     once: transformers and accelerate, in their own place
    python -m benchmarks.peers [--timm-script train.py] [--rounds 3] [--json] [--out FILE]
    python -m benchmarks.peers --job text-quickstart [--rounds 3] [--json] [--out FILE]

The jobs:

quickstart       EfficientNet-Lite0 with ImageNet weights (extra `quickstart`) on this repository's 2,000 images of Fashion-MNIST at 96
                 pixels, to a test accuracy of 83 % on its 500 others. The images are written once as PNG files, which everybody reads
text-quickstart  MiniLM (extra `text-quickstart`) on this repository's 3,000 snippets of film reviews, to 80 % on its 1,000 others.
                 Everybody reads the same tables. The Trainer is the peer

Each peer is a small script of its own in this folder, as its tool's documentation writes it, with the recipe of the quickstart where the
tool has it; timm's script is train.py of its repository at the tag of the installed version, with its SHA-256 recorded. The tutorial keeps
its own recipe.

Measured, from outside and for all alike, each run a fresh process: seconds from the command to the first evaluation that is as good;
samples/s between the first and the last evaluation; the most memory (RSS of all processes together); and the seconds lost to one SIGKILL:
all processes are killed when half of the undisturbed time has passed, the same command is given again, and the undisturbed time is
subtracted from the sum. Tools resume in the way that they document; the tutorial has none. A tool that does not get there says so. Of
texts the second life goes on to its end, and each side's record of what its steps saw says how many samples the epochs of a run that was
killed once trained on twice, and how many never. Run it on a quiet machine.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_arguments, described, finish, interleave, parser_of
from benchmarks.peers import images, texts
from benchmarks.peers.contenders import OURS, Contender, Job, Kind, with_flags
from benchmarks.peers.judge import Row, judged, lines_of, reached, row_of, seen_wrongly
from benchmarks.peers.watch import Life, live
from benchmarks.streaming.__main__ import HOME
from benchmarks.streaming.measure import interpreter

KINDS = {kind.recipe: kind for kind in (images.KIND, texts.KIND)}


def one_round(contender: Contender, folder: Path, job: Job, *, accuracy: float, timeout_seconds: float) -> Row:
    """An undisturbed run to its end, and one that is killed in the middle of that run's way to the accuracy."""
    undisturbed = live(contender, folder / "undisturbed", timeout_seconds=timeout_seconds)
    if undisturbed.failure:
        raise RuntimeError(f"{contender.name} {undisturbed.failure}")
    seconds = reached(undisturbed, accuracy)
    lives: list[Life] = []
    place = folder / "killed"
    until = {} if contender.ledger else {"until": accuracy}
    if seconds is not None:
        lives.append(live(contender, place, timeout_seconds=timeout_seconds, kill_after=seconds / 2))
        lives.append(live(contender, place, timeout_seconds=timeout_seconds, **until))
    row = row_of(undisturbed, lives, accuracy=accuracy, train_samples=job.train_samples)
    if contender.ledger and lives and lives[0].was_killed and not lives[-1].failure:
        row |= seen_wrongly(place / contender.ledger, samples=job.train_samples, epochs=job.epochs)
    return row


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    kind: Kind = KINDS[options.job]
    kind.lay_out(folder / "data", {"train": options.train, "test": options.test})
    job = Job(data=folder / "data", train_samples=options.train, pretrained=kind.pretrained(folder), epochs=options.epochs)
    script: Path | None = options.timm_script
    known = kind.contenders(job, script and script.resolve(), interpreter(options.peers.expanduser()))
    known[OURS] = with_flags(known[OURS], options.ours)
    chosen = {name: contender for name, contender in known.items() if name == OURS or name in options.cases}
    rows: dict[str, list[Row]] = {name: [] for name in chosen}
    for number, name in interleave(list(chosen), options.rounds):
        place = folder / f"{number}-{name.replace(' ', '-')}"
        found = one_round(chosen[name], place, job, accuracy=options.accuracy, timeout_seconds=options.timeout)
        rows[name].append(found)
        shutil.rmtree(place)  # every checkpoint of every life
        print(f"round {number + 1}, {name}: {found}", file=sys.stderr, flush=True)
    return judged(rows, options.accuracy) | {
        "job": kind.recipe,
        "unit": kind.unit,
        "accuracy": options.accuracy,
        "train_samples": options.train,
        "test_samples": options.test,
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
    parser.add_argument("--job", choices=tuple(KINDS), default="quickstart", help="(%(default)s)")
    parser.add_argument("--cases", nargs="+", metavar="PEER", help="peers beside ours (all of the job)")
    parser.add_argument("--accuracy", type=float, help="to be reached (that of the job)")
    parser.add_argument("--epochs", type=int, help="of everybody but the tutorial, which has 10 (those of the job)")
    parser.add_argument("--train", type=int, metavar="N", help="training samples (all)")
    parser.add_argument("--test", type=int, metavar="N", help="test samples (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one life may take (%(default)s)")
    parser.add_argument("--ours", type=str.split, default=[], help="more flags for our run ('')")
    add_arguments(parser)
    options = parser.parse_args(argv)
    kind = KINDS[options.job]
    if options.timm_script is not None and not options.timm_script.is_file():
        parser.error(
            f"there is no {options.timm_script}; it is train.py of huggingface/pytorch-image-models at the installed version's tag"
        )
    if unknown := [name for name in options.cases or () if name not in kind.peers]:
        parser.error(f"--cases {' '.join(unknown)}: the peers of --job {kind.recipe} are {', '.join(kind.peers)}")
    if options.timm_script is None and "timm" in (options.cases or ()):
        parser.error("--cases timm needs --timm-script")
    usual = {"cases": kind.peers, "accuracy": kind.accuracy, "epochs": kind.epochs, **kind.samples}
    vars(options).update({name: value for name, value in usual.items() if getattr(options, name) is None})
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-") as folder:
        result = described("peers", options) | measure(options, Path(folder))
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
