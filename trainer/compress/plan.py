"""What a compression's command line asks for, and the settings of its runs. __main__.py calls it.

The first word is a finished run, or the data of one that is trained first. All other arguments are those of a run, and the job's own.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from cluster.storage import Storage, is_uri, join_uri, open_storage
from trainer.drive.data import open_data
from trainer.drive.identity import identity
from trainer.drive.problems import choice_for, refuse_if_wrong, with_balance, with_length
from trainer.drive.survey import survey
from trainer.formats.onnx_graph import require_onnx
from trainer.prune.choose import MULTIPLE, check_fraction, require_torch_pruning
from trainer.prune.write import config_of
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.model_files import described, model_of, model_sha256, pinned
from trainer.series.train import Member
from trainer.settings.cli import Invocation, SettingsLine, check, parse_line
from trainer.settings.fields import replaced, settings
from trainer.settings.identity import weights_sha256
from trainer.settings.photos import choice_of
from trainer.settings.programs import program
from trainer.settings.rules import worker_count
from trainer.settings.say import Terminal
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig

WHOLE, DISTILLED, PRUNED, INT8 = "whole", "distilled", "pruned", "int8"
JOB_FILE = "job.json"
_OF_ALL = {"run": "", "resume": "auto", "train.control": ""}
"""What the job's runs do not take from the settings."""


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Make a model small in stages, and say what each costs in accuracy and saves in size, time and memory.

    The first word is a finished run, or a folder of images, on which one is trained first. Stages: --distil MODEL trains a smaller one with
    the run as teacher, --prune F takes a share of the channels out and fine-tunes again, --int8 quantises the last one. All other arguments
    are those of a run: the stages are trained with them. The same command goes on after any kill.
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
    record: Mapping[str, Any]
    """What decides its result."""


def job_of(argv: Sequence[str], console: Terminal) -> Job:
    """ValueError for wrong arguments, and for what a run would refuse. Nothing is written."""
    with ExitStack() as stack:
        words, run = list(argv), None
        if words and not words[0].startswith("-") and (run := _run_of(words[0], _storage_of(words))) is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-compress-")))
            (folder / "config.toml").write_text(to_toml(replaced(config_of(run), "run", "")))
            words = ["--config", str(folder / "config.toml"), *words[1:]]
        invocation, line = parse_line(words, Arguments, prog=program("compress"))
    check(invocation.config)
    _check_arguments(line, invocation)
    if run is not None:
        config, identified = invocation.config, model_sha256(described(model_of(run)))
    else:
        config, identified = _settled(invocation, console)
    stages = {name: getattr(line, name) for name in ("distil", "distil_weights", "prune", "multiple", "teach", "int8")}
    given = {key: settings(config)[key] for key in sorted(invocation.given) if _reaches_runs(key)}
    record = {"begins_with": identified, "stages": stages, "given": given}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    base = run.name.rpartition("/")[2] if run is not None else "compress"
    name = config.run or f"{base}-small-{digest[:8]}"
    storage = open_storage(join_uri(open_storage(config.storage).uri, name))
    _check_same(storage, name, record)
    return Job(line=line, invocation=invocation, run=run, config=config, storage=storage, record=record)


def begun(job: Job) -> None:
    """Write down what the job is, before its first run."""
    if not job.storage.exists(JOB_FILE):
        job.storage.write_atomic(JOB_FILE, (json.dumps(dict(job.record), indent=1, sort_keys=True) + "\n").encode())


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
    values = settings(job.config)
    given = {key: values[key] for key in job.invocation.given if _reaches_runs(key) and not key.startswith("model.")}
    taught = {"train.teacher": pinned(teacher.location, job.config.storage)} if job.line.teach else {}
    return Member(name=PRUNED, config=_changed(pruned, {**given, **_OF_ALL, **taught}), steps=0)


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
    if line.distil and invocation.config.train.teacher:
        raise ValueError(f"train.teacher={invocation.config.train.teacher}: --distil makes the run the teacher; leave one of them out")
    if not 0 <= line.max_drop < float("inf"):
        raise ValueError(f"--max-drop {line.max_drop} is a limit; give a number of 0 or more")
    for name, value in (("calls", line.calls), ("threads", line.threads)):
        if value < 1:
            raise ValueError(f"--{name} {value} times nothing; use 1 or more")


def _settled(invocation: Invocation, console: Terminal) -> tuple[RunConfig, str]:
    """The settings of the run to begin with, and a hash of what decides its weights. ValueError for what stands against it."""
    config = invocation.config
    facts = survey(config, workers=lambda: worker_count(config), in_job=False)
    facts = replace(facts, config=choice_for(facts, invocation.given, invocation.recipes).config)
    facts, _ = with_balance(facts)
    facts, _ = with_length(facts, invocation.from_recipes)
    refuse_if_wrong(facts)
    _, dataset = open_data(facts.config, console)
    choice = choice_of(config, dataset.manifest, given=invocation.given, recipes=invocation.recipes, workers=_ranks(config))
    settled = replaced(choice.config, "train.teacher", facts.config.train.teacher)
    settled = replaced(settled, "train.virtual_ranks", _ranks(config))
    deciding = identity(settled, dataset.manifest.fingerprint, weights_sha256(settled.model.weights))
    return settled, hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()


def _ranks(config: RunConfig) -> int:
    if asked := config.train.virtual_ranks or worker_count(config):
        return asked
    from cluster.launch import gpus_here  # imports Ray

    return max(1, gpus_here())


def _storage_of(words: Sequence[str]) -> str:
    for place, word in enumerate(words):
        if word.startswith("--storage="):
            return word.partition("=")[2]
        if word == "--storage" and place + 1 < len(words):
            return words[place + 1]
    return RunConfig().storage


def _run_of(word: str, storage: str) -> RunFolder | None:
    """The run that a word names; None if it names data."""
    try:
        run = find_run(word, storage)
    except ValueError:
        return None
    return run if run.read("config.toml") is not None else None


def _check_same(storage: Storage, name: str, record: Mapping[str, Any]) -> None:
    """ValueError if the folder holds another job."""
    if not storage.exists(JOB_FILE):
        return
    before = json.loads(storage.read(JOB_FILE))
    changed = [key for key in record if before.get(key) != json.loads(json.dumps(record[key]))]
    if changed:
        raise ValueError(f"{name} was begun with other arguments ({', '.join(changed)}); give another name with --run")
