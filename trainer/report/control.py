"""Did images without labels help? Compares a run with its control: the same run without them, which did as many steps. Called by the
report's section on them (unlabelled.py).

The control is the run that `train.control` names, or one that lies beside the run and is its control. It has to have the same settings but
for those of the second stream, the same data and the same steps: otherwise the difference says nothing of the images, and is not shown.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import join_uri
from dataio.foreign import json_of
from trainer.report.compare import disagreement
from trainer.report.files import RunFiles, read_files
from trainer.runs.certainty import Interval, difference_interval, paired_interval
from trainer.runs.folder import RunFolder, find_run, located
from trainer.settings.fields import settings
from trainer.settings.identity import deciding_changes
from trainer.settings.programs import program
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import number
from trainer.settings.unlabelled import BELONGS

OF_SECOND = ("data.unlabelled", *(f"train.{name}" for name in BELONGS))
MOST_LOOKED_AT = 100
"""Runs beside the run, the newest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Right answers with images without labels, and without them."""

    control: str
    """The control's name."""
    steps: int
    with_them: float
    without: float
    interval: Interval
    """Of the difference, 95 %."""
    is_paired: bool
    """The same test images were compared one by one."""

    def sentence(self) -> str:
        low, high = (100 * end for end in self.interval)
        points = 100 * (self.with_them - self.without)
        chance = " That may be chance." if low <= 0 <= high else ""
        return (
            f"With unlabelled images {100 * self.with_them:.1f} %, without {100 * self.without:.1f} %: {points:.1f} points "
            f"({low:.1f} to {high:.1f}).{chance}"
        )


def gain_of(run: RunFiles) -> tuple[Gain | None, str]:
    """What the images without labels gained, or why that is not known."""
    config = from_toml(run.config_text, origin=f"{run.location}/config.toml")
    folder = located(run.location)
    if config.train.control:
        try:
            control = find_run(config.train.control, folder.storage.uri)
        except ValueError as error:
            return None, f"train.control: {error}."
        if problem := not_its_control(config, run.summary, control):
            return None, f"train.control={config.train.control} is not this run without unlabelled images: {problem}."
    else:
        found = beside(folder, config, run.summary)
        if found is None:
            return None, "No finished run beside this one did the same without them."
        control = found
    return compared(run, read_files(control, pictures=False))


def compared(run: RunFiles, control: RunFiles) -> tuple[Gain | None, str]:
    """The gain over a control that is one."""
    values = [(each.summary.get("test_accuracy"), each.summary.get("test_count")) for each in (run, control)]
    (accuracy, count), (before, count_before) = values
    if not isinstance(accuracy, float) or not isinstance(before, float) or not count or not count_before:
        return None, "Not both runs have a test accuracy."
    found, _ = disagreement(run, control)
    interval = (
        paired_interval(found.only_first, found.only_second, found.count)
        if found is not None
        else difference_interval((accuracy, int(count)), (before, int(count_before)))
    )
    return (
        Gain(
            control=control.name,
            steps=int(run.summary["steps"]),
            with_them=accuracy,
            without=before,
            interval=interval,
            is_paired=found is not None,
        ),
        "",
    )


def beside(folder: RunFolder, config: RunConfig, summary: Mapping[str, Any]) -> RunFolder | None:
    """The newest run in the same storage that is the control of the run in `folder`."""
    entries = [entry for entry in folder.storage.list("") if entry.is_dir and not entry.name.startswith(".") and entry.name != folder.name]
    for entry in sorted(entries, key=lambda entry: -entry.modified)[:MOST_LOOKED_AT]:
        other = RunFolder(storage=folder.storage, name=entry.name)
        if not not_its_control(config, summary, other):
            return other
    return None


def not_its_control(config: RunConfig, summary: Mapping[str, Any], other: RunFolder) -> str:
    """Why the run in `other` is not the run of `config` and `summary` without images without labels; "" if it is."""
    text, their = other.read("config.toml"), _summary(other)
    if text is None or their.get("status") != "finished":
        return "it has not finished"
    try:
        saved = from_toml(text.decode(errors="replace"), origin="config.toml")
    except ValueError as error:  # of a later release, or damaged
        return str(error)
    if saved.data.unlabelled:
        return "it has unlabelled images too"
    if changed := [key for key in deciding_changes(saved, config) if key not in OF_SECOND]:
        return f"it has other settings ({', '.join(changed)})"
    if their.get("dataset_fingerprint") != summary.get("dataset_fingerprint"):
        return "it was trained on other data"
    if their.get("steps") != summary.get("steps"):
        return f"it did {number(their.get('steps'))} steps, and this run {number(summary.get('steps'))}"
    return ""


def _summary(folder: RunFolder) -> Mapping[str, Any]:
    data = folder.read("summary.json")
    try:
        loaded = json_of(data) if data is not None else {}
    except ValueError:
        return {}
    return loaded if isinstance(loaded, Mapping) else {}


def command_for(run: RunFiles) -> str:
    """The command that makes the control."""
    config = from_toml(run.config_text, origin=f"{run.location}/config.toml")
    default = settings(RunConfig())
    values = settings(config)
    words = [*program("run").split(), "--config", join_uri(run.location, "config.toml"), "--run", f"{run.name}-without"]
    for key in OF_SECOND:
        if values[key] != default[key]:
            words += [f"--{key.replace('_', '-')}", str(default[key])]
    return shlex.join(words)
