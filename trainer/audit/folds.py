"""The answers of models that have not seen a sample: k folds, each an ordinary run on the other folds, one after the other. __main__.py
calls it, trainer.series.child starts a run, labels.py judges the answers.

All state is that of the runs: a run that has finished is not started again, one that was killed goes on where it stopped, with the same
bits. So the whole goes on after any kill, and gives the same answers.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import open_storage
from dataio.manifest import Manifest
from trainer.audit.labels import Answers, agreed, joined
from trainer.runs.folder import RunFolder
from trainer.series.child import run_child
from trainer.settings.fields import replaced
from trainer.settings.identity import deciding_changes, names_file
from trainer.settings.texts import begins_as_published
from trainer.settings.toml import from_toml, to_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration, number, percent
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

SETTINGS_FILE = "folds.toml"
DATA_FILE = "data.json"
HELD_OUT = "validation"
"""The split as which a run scores the fold that it has not seen."""
GOOD_ENOUGH = 0.5
"""Models that answer fewer samples as labelled doubt most labels."""
OWN_SETTINGS: Mapping[str, Any] = {
    "run": "",
    "resume": "auto",
    "data.part": 1.0,
    "train.select": "last",  # the best by the fold would have been chosen by the answers that are wanted
    "train.select_measure": "",
    "train.patience": 0,
    "train.min_delta": 0.0,
    "train.teacher": "",  # it has seen the fold
    "train.explain": 0,
    "train.novelty": 0,
    "train.ledger": False,
    "train.profile": False,
}
"""What the folds' runs do not take from the run's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folds:
    """A job of k runs in a folder."""

    folder: Path
    count: int
    config: RunConfig
    """The settings of all of them."""

    def name(self, fold: int) -> str:
        return f"fold-{fold}-of-{self.count}"

    def run(self, fold: int) -> RunFolder:
        return RunFolder(storage=open_storage(str(self.folder)), name=self.name(fold))

    def answers_file(self, fold: int) -> Path:
        return self.folder / f"{self.name(fold)}.parquet"

    def summary(self, fold: int) -> Mapping[str, Any]:
        """Of a run that has finished; empty if it has not."""
        try:
            summary = json.loads((self.folder / self.name(fold) / "summary.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) and summary.get("status") == "finished" else {}

    def arguments(self, fold: int) -> list[str]:
        """Of the command that does this fold."""
        return ["--config", str(self.folder / SETTINGS_FILE), "--run", self.name(fold), "--data.fold", f"{fold}/{self.count}"]


def folds_of(config: RunConfig, folder: Path, count: int) -> Folds:
    """The job with a run's settings, in `folder`."""
    config = replaced(config, "storage", str(folder.resolve()))
    config = replaced(config, "data.fold", "")
    for key, value in OWN_SETTINGS.items():
        config = replaced(config, key, value)
    return Folds(folder=folder, count=count, config=replaced(config, "train.eval_every_epochs", config.train.epochs))


def notes_on(config: RunConfig, unit: str) -> list[str]:
    """What the user should know of the answers that such runs give."""
    told = []
    if config.train.teacher:
        told.append(f"the folds learn without train.teacher, which has seen the {unit} that they are asked about")
    if names_file(config.model.weights) and not begins_as_published(config):
        told.append(
            f"the folds begin with model.weights={config.model.weights}: if it was trained on these {unit}, it may know their wrong labels"
        )
    return told


def notes_on_answers(right: float, unit: str) -> list[str]:
    """What the user should know of answers of which this share is as labelled."""
    if right >= GOOD_ENOUGH:
        return []
    return [
        f"the models answered only {percent(right)} of the {unit} as they are labelled, so what they doubt says little: train longer, or "
        "from pretrained weights, in another --out"
    ]


def cost(folds: Folds, manifest: Manifest, *, run_seconds: float | None = None) -> str:
    """What the folds cost, in a sentence. `run_seconds`: of a run with these settings on all of the data."""
    train, k = manifest.splits["train"].count, folds.count
    epochs = folds.config.train.epochs
    seen = round(train * epochs * (k - 1))
    limit = f", at most {number(folds.config.train.max_steps)} steps each" if folds.config.train.max_steps else ""
    told = (
        f"{k} runs of {epochs} epoch{'' if epochs == 1 else 's'}, each on {number(train * (k - 1) // k)} of {number(train)} training "
        f"{manifest.unit}{limit}: {number(seen)} {manifest.unit} to train on, as many as {k - 1} run{'' if k == 2 else 's'} on all of them"
    )
    left = remaining_seconds(folds, run_seconds)
    return f"{told}; about {duration(left)} to go" if left is not None else told


def remaining_seconds(folds: Folds, run_seconds: float | None = None) -> float | None:
    """How long the folds that have not finished will take, by those that have, or by a run on all of the data. None if nobody knows."""
    known = [float(summary["seconds"]) for fold in range(1, folds.count + 1) if (summary := folds.summary(fold)).get("seconds")]
    if known:
        return (folds.count - len(known)) * sum(known) / len(known)
    return (folds.count - 1) * run_seconds if run_seconds else None


def prepare(folds: Folds, fingerprint: str) -> None:
    """Write the settings of the folds; the same command finds them again. ValueError if the folder has folds of other settings or data."""
    folds.folder.mkdir(parents=True, exist_ok=True)
    settings, data = folds.folder / SETTINGS_FILE, folds.folder / DATA_FILE
    if settings.is_file() and data.is_file():
        changed = deciding_changes(from_toml(settings.read_text(), origin=str(settings)), folds.config)
        if changed:
            listed = ", ".join(f"{key} was {before!r} and is {now!r}" for key, (before, now) in list(changed.items())[:4])
            raise ValueError(f"{folds.folder} has the folds of other settings: {listed}; give another --out, or remove that folder")
        if json.loads(data.read_bytes()) != fingerprint:
            raise ValueError(f"{folds.folder} has the folds of other data; give another --out, or remove that folder")
    _write(data, json.dumps(fingerprint).encode())
    _write(settings, to_toml(folds.config).encode())


def train(folds: Folds, tell: Callable[[str], None], *, run_seconds: float | None = None) -> int:
    """Run the folds that have not finished. Returns 0, or the exit status of the one that failed or was stopped."""
    for fold in range(1, folds.count + 1):
        if folds.summary(fold):
            continue
        left = remaining_seconds(folds, run_seconds)
        when = f", about {duration(left)} to go" if left is not None else ", after which the time left is known" if fold == 1 else ""
        tell(f"fold {fold} of {folds.count}{when}")
        if status := run_child(["-m", "trainer.run", *folds.arguments(fold)]).status:
            return status
    return 0


def collect(folds: Folds, tell: Callable[[str], None]) -> tuple[Answers, Answers | None]:
    """(answers for the training samples, answers for the test samples), once all folds have finished: for a training sample those of the
    one model that has not seen it, for a test sample what all models say together; None if that was not recorded in full. Takes torch."""
    import torch

    from trainer.rank.finished import evaluate_finished

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = [], []
    for fold in range(1, folds.count + 1):
        file = folds.answers_file(fold)
        if not file.is_file():
            tell(f"asking the model of fold {fold} of {folds.count}")
            part = file.with_suffix(".part")
            evaluate_finished(folds.run(fold), {}, split=HELD_OUT, device=device, predictions=str(part))
            part.replace(file)
        train.append(Answers.of(Predictions.from_parquet(file.read_bytes())))
        test.append(_recorded(folds.run(fold)))
    known = [found for found in test if found is not None]
    classes = max(int(max(found.given.max(), found.answers.max())) for found in [*train, *known]) + 1
    return joined(train), agreed(known, classes) if len(known) == folds.count else None


def _recorded(folder: RunFolder) -> Answers | None:
    """A run's answers for its test split, if it has recorded them in full."""
    data = folder.read(PREDICTIONS_FILE)
    found = Predictions.from_parquet(data) if data is not None else None
    return Answers.of(found) if found is not None and found.is_complete and len(found.ids) else None


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def finished(folds: Folds) -> Sequence[int]:
    """The folds that have finished."""
    return [fold for fold in range(1, folds.count + 1) if folds.summary(fold)]
