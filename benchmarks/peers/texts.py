"""The text quickstart's job: MiniLM on rated snippets of film reviews. Everybody's command.

Both sides say which texts each step saw, and both are killed in the middle of an epoch of batches of similar length.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import PROJECT
from benchmarks.peers.contenders import OURS, PEERS, Contender, Job, Kind, of_journal, of_log, our_run
from trainer.settings.texts import model_place

SNIPPETS = PROJECT / "dataio" / "samples" / "movie_snippets"
MODEL = "hf/all-minilm-l6-v2"


def lay_out(folder: Path, counts: Mapping[str, int]) -> None:
    """Each split's snippets, or every so many-th of them, since they are ordered by class: SPLIT.csv."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        with (SNIPPETS / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if count > len(rows):
            raise ValueError(f"there are {len(rows)} {split} texts and not {count}; ask for fewer")
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(rows[number * len(rows) // count] for number in range(count))])


def contenders(job: Job, timm_script: Path | None, peers_python: str) -> dict[str, Contender]:
    """Everybody who can be run. timm has no texts."""
    ours = Contender(
        name=OURS,
        command=lambda place: our_run("text-quickstart", job, place, ["--train.ledger"]),
        accuracies=of_journal,
        ledger=f"{OURS}/ledger",
    )
    theirs = Contender(
        name="hf trainer",
        command=lambda place: hf_trainer(job, place, peers_python),
        accuracies=of_log,
        ledger="run/ledger",
    )
    return {contender.name: contender for contender in (ours, theirs)}


def hf_trainer(job: Job, place: Path, python: str) -> list[str]:
    words = [python, str(PEERS / "hf_trainer_texts.py"), "--texts", str(job.data), "--model", str(job.pretrained)]
    return [*words, "--output", str(place / "run"), "--epochs", str(job.epochs)]


KIND = Kind(
    recipe="text-quickstart",
    unit="texts",
    peers=("hf trainer",),
    accuracy=0.80,
    epochs=3,
    samples={"train": 3000, "test": 1000},
    lay_out=lay_out,
    pretrained=lambda folder: model_place(MODEL),
    contenders=contenders,
)
