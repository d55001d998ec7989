"""Everybody's command for the job, and how its evaluations are read. `watch.py` runs the commands.

A command is the same when it is given again after a SIGKILL, except where its tool wants to be told (timm's `--resume`).
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parent
OURS = "ours"
LOG, STARTED = "output.log", "--- started"
"""What a command printed, and the line before each of its lives."""
PEER_NAMES = ("timm", "hf trainer", "plain ray train", "tutorial")
TUTORIAL_EPOCHS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What all of them do."""

    images: Path
    """train/CLASS/*.png and test/CLASS/*.png."""
    train_images: int
    weights: Path
    """EfficientNet-Lite0's, a state_dict by timm's names."""
    epochs: int
    """Of everybody but the tutorial, which has TUTORIAL_EPOCHS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to do the job."""

    name: str
    command: Callable[[Path], list[str]]
    """The folder of its files -> the words of the command."""
    accuracies: Callable[[Path], list[float]]
    """The folder of its files -> the test accuracies that it has said, oldest first; what a killed life said counts too."""


def contenders(job: Job, *, timm_script: Path | None, peers_python: str, flags: Mapping[str, list[str]]) -> dict[str, Contender]:
    """Everybody who can be run; timm needs its script. `flags`: name -> more words of its command."""
    known = {
        OURS: Contender(name=OURS, command=lambda place: ours(job, place), accuracies=of_journal),
        "hf trainer": Contender(name="hf trainer", command=lambda place: own("hf_trainer", job, place, peers_python), accuracies=of_log),
        "plain ray train": Contender(
            name="plain ray train", command=lambda place: own("plain_ray", job, place, sys.executable), accuracies=of_log
        ),
        "tutorial": Contender(name="tutorial", command=lambda place: tutorial(job), accuracies=of_log),
    }
    if timm_script is not None:
        known["timm"] = Contender(name="timm", command=lambda place: timm(job, place, timm_script), accuracies=of_summary)
    return {name: with_flags(known[name], flags.get(name, [])) for name in (OURS, *PEER_NAMES) if name in known}


def with_flags(contender: Contender, words: list[str]) -> Contender:
    command = contender.command
    return Contender(name=contender.name, command=lambda place: [*command(place), *words], accuracies=contender.accuracies)


# -- commands ---------------------------------------------------------------------------------------------------------------------------


def ours(job: Job, place: Path) -> list[str]:
    """The quickstart, on the same images: a folder in place of the sample."""
    words = [
        sys.executable,
        "-m",
        "trainer.run",
        "--config",
        "quickstart",
        "--data.path",
        str(job.images),
        "--data.root",
        str(place / "data"),
    ]
    return [*words, "--train.epochs", str(job.epochs), "--storage", str(place), "--run", "ours"]


def own(script: str, job: Job, place: Path, python: str) -> list[str]:
    words = [python, str(PEERS / f"{script}.py"), "--images", str(job.images), "--weights", str(job.weights)]
    return [*words, "--output", str(place / "run"), "--epochs", str(job.epochs)]


def tutorial(job: Job) -> list[str]:
    words = [sys.executable, str(PEERS / "tutorial.py"), "--images", str(job.images), "--weights", str(job.weights)]
    return [*words, "--epochs", str(TUTORIAL_EPOCHS)]


def timm(job: Job, place: Path, script: Path) -> list[str]:
    """timm's training script with the quickstart's recipe, as far as it has it. Its checkpoint of the last epoch is resumed as its help
    says: `--resume`."""
    last = place / "run" / "last.pth.tar"
    return [
        *(sys.executable, str(script), "--data-dir", str(job.images), "--train-split", "train", "--val-split", "test"),
        *("--model", "tf_efficientnet_lite0", "--pretrained", "--pretrained-path", str(job.weights), "--num-classes", "10"),
        *("--input-size", "3", "96", "96", "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--crop-pct", "1.0"),
        *("--interpolation", "bicubic", "--train-interpolation", "bicubic", "--scale", "0.8", "1.0", "--ratio", "1.0", "1.0"),
        *("--color-jitter", "0", "-b", "50", "--opt", "sgd", "--momentum", "0.9", "--lr", "0.02", "--weight-decay", "5e-4"),
        *("--smoothing", "0.05", "--sched", "cosine", "--sched-on-updates", "--warmup-epochs", "1", "--warmup-lr", "0.001"),
        *("--epochs", str(job.epochs), "--cooldown-epochs", "0", "--device", "cpu", "--workers", "1"),
        *("--output", str(place), "--experiment", "run"),
        *(("--resume", str(last)) if last.exists() else ()),
    ]


# -- evaluations ------------------------------------------------------------------------------------------------------------------------


def of_journal(place: Path) -> list[float]:
    """Ours, from the run's journal."""
    lines = text_of(place / "ours" / "journal.jsonl").splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    found = [event for event in events if event["event"] == "evaluation"]
    return [float(event["test_accuracy"]) for event in sorted(found, key=lambda event: float(event["time"]))]


def of_log(place: Path) -> list[float]:
    """From what a script prints: our peers' own line, or the Trainer's `'eval_accuracy': 0.8`. Ray hands some of a worker's lines on twice,
    so an epoch counts once in a life."""
    found, said = [], set()
    for line in text_of(place / LOG).splitlines():
        if line == STARTED:
            said.clear()
        elif match := re.search(r"(epoch [0-9]+): test accuracy ([0-9.]+)", line):
            if match[1] not in said:
                found.append(float(match[2]))
            said.add(match[1])
        elif match := re.search(r"'eval_accuracy': '?([0-9.]+(?:e-?[0-9]+)?)", line):
            found.append(float(match[1]))
    return found


def of_summary(place: Path) -> list[float]:
    """timm's, from its summary.csv. A resumed run writes the header again."""
    rows = [row for row in csv.reader(text_of(place / "run" / "summary.csv").splitlines()) if row]
    if not rows or "eval_top1" not in rows[0]:
        return []
    column = rows[0].index("eval_top1")
    return [float(row[column]) / 100 for row in rows if row != rows[0] and len(row) == len(rows[0])]


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
