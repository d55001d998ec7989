"""What a job is, what a contender is, and how the evaluations are read that it says. `images.py` and `texts.py` have the jobs and
everybody's commands; `watch.py` runs them.

A command is the same when it is given again after a SIGKILL, except where its tool wants to be told (timm's `--resume`).
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PEERS = Path(__file__).parent
OURS = "ours"
LOG, STARTED = "output.log", "--- started"
"""What a command printed, and the line before each of its lives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to do the job."""

    name: str
    command: Callable[[Path], list[str]]
    """The folder of its files -> the words of the command."""
    accuracies: Callable[[Path], list[float]]
    """The folder of its files -> the test accuracies that it has said, oldest first; what a killed life said counts too."""
    ledger: str = ""
    """Where, in the folder of its files, it records which samples each step saw (cluster.ledger); "" if it does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What all of them do."""

    data: Path
    """What everybody reads, as the job lays it out."""
    pretrained: Path
    """The weights or the model that everybody begins with."""
    train_samples: int
    epochs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of job, and who else does it."""

    recipe: str
    unit: str
    peers: tuple[str, ...]
    accuracy: float
    """To be reached, unless it is said otherwise."""
    epochs: int
    samples: Mapping[str, int]
    """Split -> how many there are."""
    lay_out: Callable[[Path, Mapping[str, int]], None]
    """(folder, how many of each split): writes what everybody reads."""
    pretrained: Callable[[Path], Path]
    """(a folder to write in) -> what everybody begins with."""
    contenders: Callable[[Job, Path | None, str], dict[str, Contender]]
    """(job, timm's script, the interpreter with the peers' packages) -> everybody who can be run, ours first."""


def with_flags(contender: Contender, words: Sequence[str]) -> Contender:
    command = contender.command
    return replace(contender, command=lambda place: [*command(place), *words])


def our_run(recipe: str, job: Job, place: Path, flags: Sequence[str] = ()) -> list[str]:
    """The recipe, on the job's data in place of its own."""
    words = [sys.executable, "-m", "trainer.run", "--config", recipe, "--data.path", str(job.data), "--data.root", str(place / "data")]
    return [*words, "--train.epochs", str(job.epochs), "--storage", str(place), "--run", OURS, *flags]


def of_journal(place: Path) -> list[float]:
    """Ours, from the run's journal."""
    lines = text_of(place / OURS / "journal.jsonl").splitlines()
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
