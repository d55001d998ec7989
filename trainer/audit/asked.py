"""What the command line of an audit asks for: the data or the run, the runs' settings, the audit's own flags. __main__.py calls `asked_of`.

A run is named by its folder, or by its name under --storage. It stands for its data and settings, as if they were given by --config.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataio.manifest import Manifest
from dataio.scan import look_at
from trainer.runs.folder import RunFolder
from trainer.series.command import asked_line, run_first
from trainer.settings.cli import Invocation, SettingsLine
from trainer.settings.fields import replaced
from trainer.settings.length import length_of
from trainer.settings.photos import choice_of
from trainer.settings.programs import program
from trainer.settings.rules import worker_count
from trainer.settings.tree import RunConfig

MOST_FOLDS = 20


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Look for what is wrong with a data set: images or texts that are in training and test, copies, wrong labels, odd ones.

    The first word is the data (a folder, or what --data.path takes), or a run, whose data and settings are taken. All other arguments are
    those of a run: the runs that judge the labels are trained with them.
    """

    takes_texts = True
    folds: int = 5
    """Runs that judge the labels, each on all but one part of the training samples; 0 trains nothing and looks at the samples only."""
    out: str = "audit"
    """Folder for the page, the findings, the proposed changes and the folds; the same folder goes on."""
    dry_run: bool = False
    """Say what would be done and what it costs, then stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command, parsed."""

    invocation: Invocation
    line: Arguments
    run_seconds: float | None = None
    """How long the run took whose data and settings are taken; None: none, or it has not finished."""

    @property
    def config(self) -> RunConfig:
        return self.invocation.config

    @property
    def out(self) -> Path:
        return Path(self.line.out).expanduser()


def asked_of(argv: Sequence[str]) -> Asked:
    """ValueError for wrong arguments."""
    with run_first(argv) as (words, run):
        invocation, line = asked_line(words, Arguments, prog=program("audit"))
    if line.folds != 0 and not 2 <= line.folds <= MOST_FOLDS:
        raise ValueError(f"--folds {line.folds} cannot be; use 2 to {MOST_FOLDS}, or 0 to look at the samples only")
    if invocation.config.data.fold:
        raise ValueError(f"data.fold={invocation.config.data.fold}: the audit has folds of its own (--folds); leave it out")
    return Asked(invocation=invocation, line=line, run_seconds=_seconds_of(run) if run is not None else None)


def _seconds_of(run: RunFolder) -> float | None:
    try:
        summary = json.loads(run.read("summary.json") or b"{}")
    except ValueError:
        return None
    seconds = summary.get("seconds") if isinstance(summary, dict) and summary.get("status") == "finished" else None
    return float(seconds) if isinstance(seconds, int | float) else None


def config_for(asked: Asked, manifest: Manifest | None) -> RunConfig:
    """The settings, with what the rule for photographs chooses by these data; as they are while the data are not known."""
    invocation = asked.invocation
    if manifest is None:
        return invocation.config
    workers = worker_count(invocation.config)
    return choice_of(invocation.config, manifest, given=invocation.given, recipes=invocation.recipes, workers=workers).config


def settled_for(asked: Asked, manifest: Manifest) -> RunConfig:
    """The run's settings with what the data decide, by all of the training samples: the folds are to be trained as the run would be."""
    config = config_for(asked, manifest)
    return length_of(config, manifest, workers=worker_count(config) or 1, from_recipes=asked.invocation.from_recipes).config


def to_open(asked: Asked) -> RunConfig:
    """The settings to open the data with: all training samples are looked at, whatever part of them the run takes."""
    whole: RunConfig = replaced(config_for(asked, look_at(asked.config.data).manifest), "data.part", 1.0)
    return whole
