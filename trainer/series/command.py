"""What the commands that train a series of runs have in common: trainer.curve, trainer.search, trainer.compress; trainer.audit takes a run
as its first word as they do.

A command line is that of a run with flags of its own. `settled` makes of it the settings that fit the data, `same_job` sees to it that a
folder holds one job, `guarded_series` ends the command.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.storage import Storage, open_storage
from dataio.foreign import json_of
from dataio.parquet import Dataset
from trainer.drive.data import convert_data, open_data
from trainer.drive.guarded import guarded
from trainer.drive.identity import run_prefix
from trainer.drive.problems import Facts, choice_for, refuse_if_wrong, with_balance, with_length
from trainer.drive.survey import survey
from trainer.runs.folder import RunFolder, find_run, located
from trainer.runs.started import SETTINGS_FILE, started_with
from trainer.series.train import RunFailed, RunStopped
from trainer.settings.cli import DIR_RECIPE, Invocation, Line, check, parse_line
from trainer.settings.fields import replaced
from trainer.settings.photos import choice_of
from trainer.settings.rules import worker_count
from trainer.settings.say import complain
from trainer.settings.texts import with_text_model
from trainer.settings.toml import recipe_names, to_toml
from trainer.settings.tree import RunConfig

GOES_ON = "the same command goes on"


def guarded_series(work: Callable[[], int]) -> int:
    """`guarded`, and 1 for a run that failed, 128 + signal for one that a signal has stopped."""

    def carried_out() -> int:
        try:
            return work()
        except RunStopped as stopped:
            complain(f"{stopped}: stopped; {GOES_ON}")
            return 128 + stopped.number
        except RunFailed as error:
            complain(f"error: {error}")
            return 1

    return guarded(lambda _: carried_out(), stopped=f"stopped; {GOES_ON}", goes_on=f"; {GOES_ON}")


def tell(console: Console, text: str) -> None:
    """A line for people, as it is."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def asked_line(argv: Sequence[str], kind: type[Line], *, prog: str) -> tuple[Invocation, Line]:
    """The command line of a series, parsed and checked, with what follows from a model of texts. ValueError for what is wrong with it."""
    invocation, line = parse_line(argv, kind, prog=prog)
    check(invocation.config)
    return replace(invocation, config=with_text_model(invocation.config)), line


# --- a run as the first word ------------------------------------------------------------------------------------------------------------


@contextmanager
def run_first(argv: Sequence[str]) -> Iterator[tuple[list[str], RunFolder | None]]:
    """A command line whose first word may be a run, by its folder or by its name under --storage: (words, run). The words then have the
    run's settings as if they were given by --config, which holds while the context does. ValueError if they cannot be read."""
    words = list(argv)
    run = None
    if words and not words[0].startswith("-") and (run := _run_of(words[0], _storage_of(words))) is None:
        _check_is_data(words[0], _storage_of(words))
    if run is None:
        yield words, None
        return
    with tempfile.TemporaryDirectory(prefix="finetune-line-") as folder:
        file = Path(folder, SETTINGS_FILE)
        file.touch(mode=0o600)  # a URI among the settings may hold credentials
        file.write_text(to_toml(replaced(started_with(run), "run", "")), encoding="utf-8")
        yield ["--config", str(file), *words[1:]], run


def _storage_of(words: Sequence[str]) -> str:
    for place, word in enumerate(words):
        if word.startswith("--storage="):
            return word.partition("=")[2]
        if word == "--storage" and place + 1 < len(words):
            return words[place + 1]
    return RunConfig().storage


def _run_of(word: str, storage: str) -> RunFolder | None:
    """The run that a word names; None if it names data."""
    is_name = "/" not in word and not os.path.exists(word)
    try:
        run = RunFolder(storage=open_storage(storage), name=word) if is_name else located(word)
        return run if run.read(SETTINGS_FILE) is not None else None
    except (ValueError, OSError):  # it names no folder, and so no run
        return None


def _check_is_data(word: str, storage: str) -> None:
    """ValueError for a word that is no run and that, as a name, can only have meant one."""
    is_name = "/" not in word and not os.path.exists(word) and word != RunConfig().data.path
    if is_name and not word.endswith(".toml") and word not in recipe_names():
        try:
            find_run(word, storage)
        except ValueError as error:
            raise ValueError(f"{word} is neither data here nor a run: {error}") from None


# --- settings that fit the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """The settings of a command line, as a run on these data would have them."""

    config: RunConfig
    """With what the rule for photographs chooses, the teacher's place and hash, and `train.virtual_ranks`."""
    dataset: Dataset
    ranks: int
    """Virtual ranks."""
    prefix: str
    """How the name of such a run begins."""


def surveyed(config: RunConfig, console: Console) -> Facts:
    """What is known of a run with these settings before it starts. Data of which only a conversion can tell are converted, unless something
    stands against the run already. ValueError that says what does."""

    def found() -> Facts:
        return survey(config, workers=lambda: worker_count(config), in_job=False)

    facts = found()
    if facts.looked is not None and facts.looked.manifest is None:
        refuse_if_wrong(facts)
        convert_data(config, console)
        facts = found()
    return facts


def settled(invocation: Invocation, console: Console, facts: Facts) -> Settled:
    """Find what stands against such a run, open the data, and tell what is chosen by them. `facts`: `surveyed` of the invocation's
    settings. ValueError that says what is wrong."""
    config = invocation.config
    facts = replace(facts, config=choice_for(facts, invocation.given, invocation.recipes).config)
    facts, _ = with_balance(facts)
    facts, _ = with_length(facts, invocation.from_recipes)
    refuse_if_wrong(facts)
    _, dataset = open_data(facts.config, console)
    ranks = ranks_of(config)
    config = replaced(config, "train.teacher", facts.config.train.teacher)  # its place and its hash: a name would be one beside the runs
    choice = choice_of(config, dataset.manifest, given=invocation.given, recipes=invocation.recipes, workers=ranks)
    for said in choice.said:
        tell(console, said)
    made = replaced(choice.config, "train.virtual_ranks", ranks)
    prefix = run_prefix(made, (DIR_RECIPE,) if choice.takes_recipe else invocation.recipes)
    return Settled(config=made, dataset=dataset, ranks=ranks, prefix=prefix)


def ranks_of(config: RunConfig) -> int:
    """Virtual ranks of a run here."""
    if asked := config.train.virtual_ranks or worker_count(config):
        return asked
    from cluster.launch import gpus_here  # imports Ray

    return max(1, gpus_here())


# --- one folder, one job ----------------------------------------------------------------------------------------------------------------


def same_job(storage: Storage, file: str, record: Mapping[str, Any]) -> None:
    """Write what decides a new job's result into its folder, or compare it with what the job there was begun with. ValueError that names
    what differs, or for a folder that holds something else."""
    ours = json.loads(json.dumps(record))
    try:
        before = storage.read(file)
    except FileNotFoundError:
        if storage.list(""):
            raise ValueError(
                f"{storage.address} holds something else; give another --run NAME, or leave it out for a name of its own"
            ) from None
        storage.write_atomic(file, (json.dumps(ours, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        known = json_of(before)
    except ValueError as error:
        raise ValueError(f"{storage.address}/{file} is damaged ({error}); give another --run NAME") from None
    if known != ours:
        differs = ", ".join(_different(known, ours))
        raise ValueError(
            f"what lies in {storage.address} was begun with other {differs}; give another --run NAME, or leave it out for a name of its own"
        )


def _different(known: Any, ours: Mapping[str, Any]) -> list[str]:
    """Names of what differs, those of a table within it by themselves."""
    if not isinstance(known, dict):
        return ["settings"]
    found = []
    for key in dict.fromkeys([*ours, *known]):
        one, other = known.get(key), ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [name for name in {**other, **one} if one.get(name) != other.get(name)]
        elif one != other:
            found.append(key)
    return sorted(found)
