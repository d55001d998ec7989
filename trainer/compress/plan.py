"""What a compression's command line asks for, and the settings of its runs. __main__.py calls it.

The first word is a finished run, or the data of one that is trained first. All other arguments are those of a run, and the job's own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from cluster.storage import Storage, is_uri, join_uri, open_storage
from dataio.config import FREE
from trainer.drive.identity import identity
from trainer.formats.onnx_graph import require_onnx
from trainer.prune.choose import MULTIPLE, check_fraction, require_torch_pruning
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import described, model_of, model_sha256, pinned
from trainer.runs.started import started_with
from trainer.series.command import run_first, same_job, settled, surveyed
from trainer.series.train import Member
from trainer.settings.cli import Invocation, SettingsLine, check, parse_line
from trainer.settings.fields import marked, replaced, settings
from trainer.settings.identity import weights_sha256
from trainer.settings.programs import program
from trainer.settings.say import Terminal
from trainer.settings.tree import RunConfig

WHOLE, DISTILLED, PRUNED, INT8, AWARE, INT8_AWARE = "whole", "distilled", "pruned", "int8", "aware", "int8-aware"
JOB_FILE = "job.json"
_OF_ALL = {"run": "", "resume": "auto", "train.control": ""}
"""What the job's runs do not take from the settings."""
_CHANGES_NOTHING = {key for key in marked(RunConfig, FREE) if not key.startswith("data.")} | {"data.root", "data.backend", "data.cache"}
"""Flags that the same job may be given again with other values. The other free settings of the data make other data."""


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Make a model small in stages, and say what each costs in accuracy and saves in size, time and memory.

    The first word is a finished run, or a folder of images, on which one is trained first. Stages: --distil MODEL trains a smaller one with
    the run as teacher, --prune F takes a share of the channels out and fine-tunes again, --int8 quantises the last one, and fine-tunes it
    with the rounding where it loses too much. All other arguments are those of a run: the stages are trained with them. The same command
    goes on after any kill.
    """

    distil: str = ""
    """A smaller model (as --model.name) to be trained with the run as teacher. Empty: none."""
    distil_weights: str = "imagenet"
    """The weights that it begins with (as --model.weights)."""
    prune: float = 0.0
    """Share of each layer's channels that goes, such as 0.5. 0: none."""
    multiple: int = MULTIPLE
    """For --prune: the channels that stay are a multiple of it."""
    teach: tyro.conf.FlagCreatePairsOff[bool] = False
    """For --prune: the fine-tuning learns from the run's answers too (train.teacher)."""
    int8: tyro.conf.FlagCreatePairsOff[bool] = False
    """Quantise the last model, with scales from 256 training images."""
    aware: Literal["auto", "always", "never"] = "auto"
    """For --int8: fine-tune the last model with its rounding (train.quantise int8) and quantise that one too; `auto`: where int8 alone
    loses more than --max-drop."""
    max_drop: float = 1.0
    """Refuse an int8 model that loses more than so many points of the headline measure; of one that is no ratio, so many per cent of it."""
    calls: int = 100
    """Calls of each batch size that are timed, of each stage."""
    threads: int = 1
    """Threads of ONNX Runtime that are timed."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text: what compress.json holds, and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A compression to be made."""

    line: Arguments
    invocation: Invocation
    run: RunFolder | None
    """The finished run to begin with; None trains one."""
    config: RunConfig
    """Of the run to begin with, flags included."""
    storage: Storage
    """The job's own folder."""


def job_of(argv: Sequence[str], console: Terminal) -> Job:
    """ValueError for wrong arguments, and for what a run would refuse. Only what decides its result is written, if it is new."""
    with run_first(argv) as (words, run):
        invocation, line = parse_line(words, Arguments, prog=program("compress"))
    check(invocation.config)
    _check_arguments(line, invocation)
    if run is not None:
        config, identified = invocation.config, model_sha256(described(model_of(run)))
    else:
        made = settled(invocation, console, surveyed(invocation.config, console))
        config = made.config
        whole_run = identity(config, made.dataset.manifest.fingerprint, weights_sha256(config.model.weights))
        identified = hashlib.sha256(json.dumps(whole_run, sort_keys=True, default=list).encode()).hexdigest()
    stages = {name: getattr(line, name) for name in ("distil", "distil_weights", "prune", "multiple", "teach", "int8", "aware")}
    given = {key: settings(config)[key] for key in sorted(invocation.given) if key not in _CHANGES_NOTHING}
    record = {"begins_with": identified, "stages": stages, "given": given}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    base = run.name.rpartition("/")[2] if run is not None else "compress"
    name = config.run or f"{base}-small-{digest[:8]}"
    storage = open_storage(join_uri(open_storage(config.storage).uri, name))
    same_job(storage, JOB_FILE, record)
    return Job(line=line, invocation=invocation, run=run, config=config, storage=storage)


def distilled(job: Job, teacher: RunFolder) -> Member:
    """The run of the smaller model."""
    changes = {
        **_OF_ALL,
        "model.name": job.line.distil,
        "model.weights": job.line.distil_weights,
        "model.widths": "",
        "model.stem": "auto",
        "train.teacher": pinned(teacher.location, job.config.storage),
    }
    return Member(name=DISTILLED, config=_changed(job.config, changes), steps=0)


def whole(job: Job) -> Member:
    """The run to begin with, where there is none."""
    return Member(name=WHOLE, config=_changed(job.config, _OF_ALL), steps=0)


def tuned(job: Job, pruned: RunConfig, teacher: RunFolder) -> Member:
    """The run that fine-tunes the pruned model, whose settings are `pruned`."""
    taught = {"train.teacher": pinned(teacher.location, job.config.storage)} if job.line.teach else {}
    return Member(name=PRUNED, config=_changed(pruned, {**_given(job), **_OF_ALL, **taught}), steps=0)


def aware(job: Job, last: RunFolder) -> Member:
    """The run that goes on from the finished run `last` with the rounding of int8."""
    changes = {**_given(job), **_OF_ALL, "model.weights": last.location, "train.quantise": "int8"}
    return Member(name=AWARE, config=_changed(started_with(last), changes), steps=0)


def _given(job: Job) -> dict[str, Any]:
    """What flags say of a run that goes on from another one's model."""
    values = settings(job.config)
    return {key: values[key] for key in job.invocation.given if _reaches_runs(key) and not key.startswith("model.")}


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    for key, value in changes.items():
        config = replaced(config, key, value)
    check(config)
    return config


def _reaches_runs(key: str) -> bool:
    """Whether a flag is a setting of the stages' runs, and not where the job lies."""
    return key not in ("run", "storage", "resume")


def _check_arguments(line: Arguments, invocation: Invocation) -> None:
    require_onnx()
    storage = invocation.config.storage
    if is_uri(storage):
        raise ValueError(f"--storage {storage} is on another machine, and pruned weights are read from this one; give a folder here")
    if not (line.distil or line.prune or line.int8):
        raise ValueError("nothing is to be made smaller; give one or more of --distil MODEL, --prune 0.5, --int8")
    if line.prune:
        check_fraction(line.prune, line.multiple, flag="--prune")
        require_torch_pruning()
    elif line.teach:
        raise ValueError("--teach is for the fine-tuning after --prune, which is not asked for; add it, or leave --teach out")
    if line.aware == "always" and not line.int8:
        raise ValueError("--aware always is for --int8, which is not asked for; add it, or leave --aware out")
    if line.distil and invocation.config.train.teacher:
        raise ValueError(f"train.teacher={invocation.config.train.teacher}: --distil makes the run the teacher; leave one of them out")
    if not 0 <= line.max_drop < float("inf"):
        raise ValueError(f"--max-drop {line.max_drop} is a limit; give a number of 0 or more")
    for name, value in (("calls", line.calls), ("threads", line.threads)):
        if value < 1:
            raise ValueError(f"--{name} {value} times nothing; use 1 or more")
