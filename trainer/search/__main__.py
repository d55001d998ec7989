"""The command line `python -m trainer.search DIR --SETTING VALUE ...` (`finetune search`): which settings make a better model. Takes the
settings of `trainer.run`, tries others around them (space.py), trains the promising trials further (ladder.py, running.py), and says what
that has brought (results.py).

Everything lies in a folder of its own in --storage, named after the settings, the data and the space: the same command, killed anywhere,
goes on there, and ends in the same search.json to the byte. More --trials add theirs to it."""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tyro
from rich.console import Console

from cluster.storage import Storage, join_uri, open_storage
from dataio.manifest import Manifest
from trainer.drive.identity import automatic_name
from trainer.runs.choice import Rule, rule_of
from trainer.search.found import search_of, seconds_of
from trainer.search.ladder import Job, Ladder, Score, rungs_of
from trainer.search.page import drawn
from trainer.search.record import RECORD_FILE, record_of
from trainer.search.results import SOUP, Search, Souped, score_words, sentences, time_words, to_json, values_words
from trainer.search.running import Running, searched
from trainer.search.space import Space, default_space, load_space, trial_config, values_of
from trainer.search.trials import Trial
from trainer.series.command import asked_line, guarded_series, same_job, settled, surveyed, tell
from trainer.settings.cli import Invocation, SettingsLine, check
from trainer.settings.fields import replaced
from trainer.settings.identity import weights_sha256
from trainer.settings.length import length_of
from trainer.settings.programs import program
from trainer.settings.say import Terminal, say, say_json
from trainer.settings.selection import has_validation
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import number
from trainer.tasks.info import TaskInfo

JSON_FILE, PAGE_FILE, BEST_FILE = "search.json", "search.html", "best.toml"
FOLD = "1/5"
"""Held out where the data have no validation split."""
MOST_TRIALS = 999
OF_TRIALS = {"run": "", "resume": "auto", "train.explain": 0, "train.novelty": 0, "train.ledger": False, "train.profile": False}
"""What the trials do not take from the run's settings: none of it changes a result."""


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Find better settings: trials around the given ones, of which the promising are trained further (ASHA).

    All other arguments are those of a run: DIR as the first word, --config, and its settings, which are trial 0. The trials are ordinary
    runs, in a folder of their own in --storage (--run names it). The same command goes on after any kill, and ends in the same result.
    """

    takes_texts = True
    trials: int = 12
    """How many settings are tried, those that were given included."""
    space: str = ""
    """What is tried: a shipped space (rates, augmentation, texts) or a TOML file (docs/search.md). Empty: rates for images, texts for
    texts."""
    eta: int = 3
    """One in so many trials is trained further, so many times as long."""
    least_epochs: int = 1
    """Epochs after which the first trials are stopped, at the least."""
    jobs: int = 1
    """Trials at once. Each is a run with its --workers; on a cluster they share it."""
    image_epochs: int = 0
    """No new trial begins once all together have seen so many images, or texts; 0: no limit."""
    minutes: float = 0.0
    """No new trial begins after so many minutes; 0: no limit. What follows then depends on the machine's speed."""
    soup: tyro.conf.FlagCreatePairsOff[bool] = False
    """Average the weights of the trials that were trained to the end, as far as the validation split likes it (a greedy soup)."""
    search_seed: int = 0
    """Seed of the trials' settings, apart from train.seed, which all trials share."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text: what search.json holds, and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A search to be made."""

    storage: Storage
    """The search's own folder, in which each trial has one."""
    space: Space
    trials: tuple[Trial, ...]
    rule: Rule
    info: TaskInfo
    ladder: Ladder
    samples: int
    """In an epoch."""
    given: RunConfig
    """Trial 0's settings without what is the search's: what best.toml changes."""


def main(argv: Sequence[str]) -> int:
    """Return 0 if the search has come to its end; 1 if a run failed, 128 + signal if one stopped it. Exits with 2 (SystemExit) for what a
    run would refuse."""
    console: Console = Terminal(stderr=True) if "--json" in argv else Terminal()

    def work() -> int:
        invocation, line = asked_line(argv, Arguments, prog=program("search"))
        _check_arguments(invocation.config, line)
        line = replace(line, space=line.space or default_space(invocation.config))
        load_space(line.space, invocation.config)  # a mistake in it is told before the data are opened
        if invocation.takes_dir_recipe:
            tell(console, f"settings of the recipe {invocation.recipes[0]}; flags change them")
        prepared = prepare(invocation, line, console)
        shown(prepared, *trained(prepared, line, console), line)
        return 0

    return guarded_series(work)


def _check_arguments(config: RunConfig, line: Arguments) -> None:
    for flag, value, least, usual in (
        ("--trials", line.trials, 2, "12 is the default"),
        ("--eta", line.eta, 2, "3 is the default"),
        ("--least-epochs", line.least_epochs, 1, "1 is the default"),
        ("--jobs", line.jobs, 1, "1 is the default"),
        ("--image-epochs", line.image_epochs, 0, "0 is no limit"),
        ("--minutes", line.minutes, 0, "0 is no limit"),
        ("--search-seed", line.search_seed, 0, "0 is the default"),
    ):
        if not value >= least:
            raise ValueError(f"{flag} {value:g} must be at least {least}; {usual}")
    if line.trials > MOST_TRIALS:
        raise ValueError(f"--trials {line.trials} is more than {MOST_TRIALS}, the most; 12 is the default")
    if config.train.max_steps:
        raise ValueError(
            f"train.max_steps={config.train.max_steps}: a search stops trials after whole epochs; say with --train.epochs how long a run is"
        )


# --- before the trials ------------------------------------------------------------------------------------------------------------------


def prepare(invocation: Invocation, line: Arguments, console: Console) -> Prepared:
    """Open the data, find what stands against a run with each trial's settings, and plan the trials. ValueError that says what is wrong."""
    facts, asked = surveyed(invocation.config, console), invocation.config
    if holds_out := not asked.data.fold and facts.manifest is not None and not has_validation(facts.manifest):
        tell(
            console,
            f"the data have no validation split, which a search chooses by: a fifth of the training {facts.manifest.unit} is held out "
            f"(fold {FOLD})",
        )
        invocation = replace(invocation, config=replaced(asked, "data.fold", FOLD))
        facts = surveyed(invocation.config, console)
    made = settled(invocation, console, facts)
    own, dataset, ranks = made.config, made.dataset, made.ranks
    for key, value in OF_TRIALS.items():
        own = replaced(own, key, value)
    length = length_of(own, dataset.manifest, workers=ranks, from_recipes=invocation.from_recipes)
    own = replaced(own, "optim.warmup_fraction", length.config.optim.warmup_fraction)
    info = _info(own, dataset.manifest)
    space = load_space(line.space, own)
    configs = [trial_config(own, space, trial, line.search_seed) for trial in range(line.trials)]
    steps = [_steps_per_epoch(each, trial, space, dataset.manifest, ranks) for trial, each in enumerate(configs)]
    trials = tuple(Trial(number=trial, config=each, steps_per_epoch=steps[trial]) for trial, each in enumerate(configs))
    rungs = rungs_of(own.train.epochs, line.eta, own.train.eval_every_epochs, line.least_epochs)
    samples = dataset.manifest.splits["train"].count
    ladder = Ladder(rungs, trials=line.trials, slots=line.jobs, eta=line.eta, epochs=_budget(line, samples, rungs[-1], info.unit))
    record = record_of(own, space, line.search_seed, rungs, line.eta, dataset.manifest.fingerprint)
    base = automatic_name(own, dataset.manifest.fingerprint, f"search-{made.prefix}", weights_sha256(own.model.weights))
    name = asked.run or f"{base}-{hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]}"
    storage = open_storage(join_uri(open_storage(asked.storage).uri, name), own.cluster.storage_retry_seconds)
    same_job(storage, RECORD_FILE, record)
    tell(console, _plan_words(rungs, line, space, storage))
    return Prepared(
        storage=storage,
        space=space,
        trials=trials,
        rule=rule_of(length.config.train, info),
        info=info,
        ladder=ladder,
        samples=samples,
        given=replaced(made.config, "data.fold", "") if holds_out else made.config,
    )


def _info(config: RunConfig, manifest: Manifest) -> TaskInfo:
    from trainer.learn.build import task_of  # imports torch

    return task_of(config, manifest).info


def _steps_per_epoch(config: RunConfig, trial: int, space: Space, manifest: Manifest, ranks: int) -> int:
    """ValueError that names the trial if its settings do not fit each other or the data."""
    try:
        check(config)
        return length_of(config, manifest, workers=ranks).steps_per_epoch
    except ValueError as error:
        raise ValueError(f"trial {trial} ({values_words(values_of(config, space))}) cannot be trained: {error}; change the space") from None


def _budget(line: Arguments, samples: int, epochs: int, unit: str) -> int | None:
    """--image-epochs as epochs. ValueError for one that is too small."""
    if not line.image_epochs:
        return None
    if (found := line.image_epochs // samples) < 2 * epochs:
        raise ValueError(
            f"--image-epochs {line.image_epochs} are {found} epochs of {number(samples)} {unit}, less than the two whole runs of {epochs} "
            f"epochs that a search trains in any case; give {2 * epochs * samples} or more, or fewer --train.epochs"
        )
    return found


def _plan_words(rungs: Sequence[int], line: Arguments, space: Space, storage: Storage) -> str:
    ladder = " -> ".join(map(str, rungs))
    return (
        f"{line.trials} trials over {', '.join(axis.key for axis in space)}; epochs {ladder}, the best of {line.eta} goes on; "
        f"whole runs would be {line.trials * rungs[-1]} epochs; {storage.address}"
    )


# --- the trials -------------------------------------------------------------------------------------------------------------------------


def trained(prepared: Prepared, line: Arguments, console: Console) -> tuple[Search, dict[str, float]]:
    """Run the search to its end; the result, and the seconds of all trials by cause."""
    ladder, until = prepared.ladder, time.monotonic() + 60 * line.minutes if line.minutes else None
    with Running.open(prepared.storage, prepared.trials, prepared.rule) as running:

        def on_score(job: Job, score: Score) -> None:
            trial = prepared.trials[job.trial]
            measured = score_words(prepared.rule.measure, score if prepared.rule.measure.higher_is_better or score is None else -score)
            what = values_words(values_of(trial.config, prepared.space))
            tell(console, f"{trial.name}, epoch {ladder.rungs[job.rung]} of {ladder.rungs[-1]}: {measured}   {what}")

        searched(ladder, running, on_score=on_score, is_over=_over(prepared.storage, ladder, until))
        found = {trial: running.seen(trial) for trial in range(ladder.begun)}
    search = search_of(
        ladder, {trial: (prepared.trials[trial], seen) for trial, seen in found.items()}, prepared.storage,
        rule=prepared.rule, info=prepared.info, space=prepared.space, samples=prepared.samples,
    )  # fmt: skip
    if line.soup:
        search = replace(search, soup=_soup(prepared, search))
    return search, seconds_of(prepared.storage, [prepared.trials[trial].name for trial in found])


def _soup(prepared: Prepared, search: Search) -> Souped | None:
    ended = [each for each in search.tried if each.end == "finished"]
    if len(ended) < 2:
        return None
    import torch

    from trainer.search.soup import soup

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = [prepared.trials[each.number].config for each in ended]
    return soup(prepared.storage, [each.name for each in ended], configs, prepared.rule, device)


def _over(storage: Storage, ladder: Ladder, until: float | None) -> Callable[[], bool]:
    """Whether no new trial is to begin. What a search with --minutes decided by the clock is written down: it stays so when it goes on."""
    name = ".series/closed.json"

    def is_over() -> bool:
        try:
            return ladder.begun >= int(json.loads(storage.read(name))["trials"])
        except FileNotFoundError:
            pass
        if until is None or time.monotonic() < until or not ladder.begun:
            return False
        storage.write_atomic(name, json.dumps({"trials": ladder.begun}).encode())
        return True

    return is_over


# --- after them -------------------------------------------------------------------------------------------------------------------------


def shown(prepared: Prepared, search: Search, seconds: dict[str, float], line: Arguments) -> None:
    """Write the files and say the result."""
    result, wall = to_json(search), sum(seconds.values())
    files = {
        JSON_FILE: (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(),
        PAGE_FILE: drawn(search, seconds, wall).encode(),
    }
    if search.winner is not None:
        files[BEST_FILE] = best_toml(prepared, search.winner.number).encode()
    where = {name: _written(prepared.storage, name, data) for name, data in files.items()}
    if line.json:
        say_json({**result, "folder": prepared.storage.uri, "page": where[PAGE_FILE], "seconds": seconds})
        return
    for text in sentences(search):
        say(text)
    if words := time_words(seconds, wall):
        say(words)
    say(f"all trials: {where[PAGE_FILE]}")
    if search.winner is not None:
        say(f"the model: {join_uri(prepared.storage.uri, search.winner.name)}")
        if search.soup is not None and len(search.soup.members) > 1:
            say(f"the soup: {join_uri(prepared.storage.uri, SOUP)}")
        say(f"a run with its settings on all {prepared.info.unit}: {program('run')} --config {where[BEST_FILE]}")


def best_toml(prepared: Prepared, trial: int) -> str:
    """The trial's settings as a recipe, without what was the search's own: a run with it learns from all training samples."""
    config = replace(prepared.given, run="", storage=RunConfig().storage)  # of the next run the user's command says them
    for key, value in values_of(prepared.trials[trial].config, prepared.space).items():
        config = replaced(config, key, value)
    return to_toml(config)


def _written(storage: Storage, name: str, data: bytes) -> str:
    storage.write_atomic(name, data)
    return join_uri(storage.uri, name)


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
