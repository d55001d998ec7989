"""The command line `python -m trainer.curve DIR --SETTING VALUE ...` (`finetune curve`): how much more labels would help. Takes the
settings of `trainer.run`, trains ordinary runs on nested parts of the samples (plan.py, trainer.series), fits a power law through their
errors (power_law.py) and says what twice the labels would bring, which classes gain, and which samples to label next.

Everything lies in a folder of its own in --storage, named after the settings and the data: the same command, killed anywhere, goes on
there, and ends in the same curve.json to the byte. More --repeats or --parts add their runs to it.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from cluster.storage import Storage, join_uri, open_storage
from dataio.manifest import Manifest
from trainer.curve.next_labels import DEFAULT, ToLabel
from trainer.curve.page import drawn
from trainer.curve.plan import Planned, Size, cost_lines, planned, size_of, sizes_of
from trainer.curve.results import Curve, check_measure, curve_of, noise_words, sentences, to_json, wanted_words
from trainer.drive.identity import automatic_name
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import model_of
from trainer.series.command import asked_line, guarded_series, settled, surveyed, tell
from trainer.series.train import Member, Summary, finished, left_words, train
from trainer.settings.cli import Invocation, SettingsLine
from trainer.settings.identity import weights_sha256
from trainer.settings.length import length_of
from trainer.settings.programs import program
from trainer.settings.say import Terminal, say, say_json
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration, number, percent
from trainer.tasks.info import info_of

JSON_FILE, PAGE_FILE, NEXT_FILE = "curve.json", "curve.html", "label-next.csv"
PARTS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Arguments(SettingsLine):
    """Find out how much more labels would help: runs on parts of the samples, a power law through their errors, and what twice the labels
    would bring, with an interval.

    All other arguments are those of a run: DIR as the first word, --config, and its settings. The runs are ordinary ones, in a folder of
    their own in --storage (--run names it). The same command goes on after any kill.
    """

    takes_texts = True
    parts: tuple[float, ...] = PARTS
    """Sizes: up to 1 fractions of the training samples, above it numbers of samples. A smaller one lies within a larger one."""
    repeats: int = 3
    """Runs of each size, each with other samples and another seed."""
    unlabelled: str = ""
    """Images without a label, a folder of them, or texts, a folder or a table: label-next.csv then says which of them to label next."""
    next: Annotated[int, tyro.conf.arg(name="next")] = DEFAULT
    """How many of them label-next.csv names."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text: what curve.json holds, and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A curve to be made."""

    name: str
    storage: Storage
    """The curve's own folder, in which each run has one."""
    sizes: tuple[Size, ...]
    runs: tuple[Planned, ...]
    whole: int
    """Training samples that there are."""
    unit: str
    """What they are, in the plural."""
    text_column: str
    """Of the samples without a label, if they are a table's."""


def main(argv: Sequence[str]) -> int:
    """Return 0 if all runs have finished, also if the curve cannot tell; 1 if a run failed, 128 + signal if one stopped it. Exits with 2
    (SystemExit) for what a run would refuse."""
    console: Console = Terminal(stderr=True) if "--json" in argv else Terminal()

    def work() -> int:
        invocation, line = asked_line(argv, Arguments, prog=program("curve"))
        _check_arguments(invocation.config, line)
        if invocation.takes_dir_recipe:
            tell(console, f"settings of the recipe {invocation.recipes[0]}; flags change them")
        job = prepared_job(invocation, line, console)
        curve = curve_of(trained(job, line.repeats, console))
        shown(job, curve, asked_next(job, line, console) if line.unlabelled else None, line)
        return 0

    return guarded_series(work)


def _check_arguments(config: RunConfig, line: Arguments) -> None:
    if config.data.part != 1.0:
        raise ValueError(f"data.part={config.data.part:g}: the curve chooses the parts itself; say which with --parts")
    if line.repeats < 1:
        raise ValueError(f"--repeats {line.repeats} trains nothing; use 1 or more, 3 is the default")
    if line.next < 1:
        raise ValueError(f"--next {line.next} names no sample; use 1 or more, {DEFAULT} is the default")
    if line.unlabelled and not os.path.exists(line.unlabelled):
        raise ValueError(f"--unlabelled {line.unlabelled} does not exist; give a folder of images, or a folder or table of texts")


# --- before the runs --------------------------------------------------------------------------------------------------------------------


def prepared_job(invocation: Invocation, line: Arguments, console: Console) -> Job:
    """Open the data, find what stands against a run on all of it, and plan the runs. ValueError that says what is wrong."""
    made, asked = settled(invocation, console, surveyed(invocation.config, console)), invocation.config
    manifest, ranks = made.dataset.manifest, made.ranks
    sizes = planned_sizes(made.config, manifest, line.parts, ranks=ranks, from_recipes=invocation.from_recipes)
    largest = sizes[-1].config
    weights = weights_sha256(asked.model.weights)
    name = asked.run or automatic_name(made.config, manifest.fingerprint, f"curve-{made.prefix}", weights)
    storage = open_storage(join_uri(open_storage(asked.storage).uri, name), largest.cluster.storage_retry_seconds)
    runs = tuple(planned(sizes, line.repeats))
    return Job(
        name=name,
        storage=storage,
        sizes=sizes,
        runs=runs,
        whole=manifest.splits["train"].count,
        unit=manifest.unit,
        text_column=asked.data.text_column,
    )


def planned_sizes(
    config: RunConfig, manifest: Manifest, parts: Sequence[float], *, ranks: int, from_recipes: frozenset[str]
) -> tuple[Size, ...]:
    """The sizes with their settings, the largest last."""
    whole = manifest.splits["train"].count
    length = length_of(config, manifest, workers=ranks, from_recipes=from_recipes)
    warmup = min(1.0, length.config.optim.warmup_of(length.total_steps) / length.total_steps)
    sizes = sizes_of(parts, whole, manifest.unit)
    return tuple(size_of(config, samples, whole=whole, ranks=ranks, warmup_fraction=round(warmup, 6)) for samples in sizes)


# --- the runs ---------------------------------------------------------------------------------------------------------------------------


def trained(job: Job, repeats: int, console: Console) -> list[tuple[Planned, Summary]]:
    """Train what has not finished, and say what it costs, before and meanwhile. ValueError if the task's measure makes no curve."""
    by_name = {planned.member.name: planned for planned in job.runs}
    members = [planned.member for planned in job.runs]
    known = [(member, summary) for member in members if (summary := finished(job.storage, member)) is not None]
    for text in cost_lines(job.sizes, repeats, job.whole, job.unit):
        tell(console, text)
    if known:
        there = {member.name for member, _ in known}
        left = left_words(known, [member for member in members if member.name not in there])
        tell(console, f"{len(known)} of them have finished already{', ' + left if left else ''}")
    done: list[tuple[Member, Summary]] = []

    def on_run(member: Member, place: int) -> None:
        folder = join_uri(job.storage.uri, member.name)
        tell(console, f"run {place + 1} of {len(members)}: {number(by_name[member.name].samples)} {job.unit} ({program('watch')} {folder})")

    for member, summary in train(members, job.storage, on_run):
        check_measure(summary)
        done.append((member, summary))
        if member.name in {each.name for each, _ in known}:
            continue
        left = left_words(done, [each for each in members[len(done) :] if all(each.name != one.name for one, _ in known)])
        tell(console, f"  {_measured(summary)} in {duration(summary.get('seconds'))}{'; ' + left if left else ''}")
    return [(by_name[member.name], summary) for member, summary in done]


def _measured(summary: Summary) -> str:
    headline = info_of(summary).headline
    return f"{headline.in_words} {percent(summary.get(headline.key), 2)}"


# --- after them -------------------------------------------------------------------------------------------------------------------------


def asked_next(job: Job, line: Arguments, console: Console) -> list[ToLabel]:
    """The samples to label next, by the model of the first run on the most samples."""
    from trainer.curve.asking import asked  # imports torch

    most = max(planned.samples for planned in job.runs)
    member = next(planned.member for planned in job.runs if planned.samples == most)
    with console.status("") as status:
        found = asked(
            line.unlabelled,
            model_of(RunFolder(storage=job.storage, name=member.name)),
            line.next,
            lambda done: status.update(f"asked about {number(done)} {job.unit}"),
            text_column=job.text_column,
        )
    if found.unreadable:
        tell(
            console,
            f"{number(found.unreadable)} of {number(found.samples)} {job.unit} in {line.unlabelled} cannot be read and are left out",
        )
    return found.rows


def shown(job: Job, curve: Curve, next_rows: list[ToLabel] | None, line: Arguments) -> None:
    """Write the files and say the result."""
    result = to_json(curve)
    files = {JSON_FILE: (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(), PAGE_FILE: drawn(curve, next_rows).encode()}
    if next_rows is not None:
        files[NEXT_FILE] = _csv(next_rows, job.unit)
    where = {name: _written(job.storage, name, data) for name, data in files.items()}
    if line.json:
        named = {"folder": job.storage.uri, "page": where[PAGE_FILE], "label_next": where.get(NEXT_FILE)}
        say_json({**result, **named})
        return
    for text in sentences(curve):
        say(text)
    if words := noise_words(curve):
        say(words)
    say(f"the curve: {where[PAGE_FILE]}")
    say(f"{len(next_rows)} {job.unit} to label next: {where[NEXT_FILE]}" if next_rows is not None else wanted_words(curve))


def _written(storage: Storage, name: str, data: bytes) -> str:
    storage.write_atomic(name, data)
    return join_uri(storage.uri, name)


def _csv(rows: Sequence[ToLabel], unit: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if unit == "texts":
        writer.writerow(("rank", "key", "text", "guess", "margin"))
        writer.writerows((each.rank, each.name, each.text, each.guess, each.margin) for each in rows)
    else:
        writer.writerow(("rank", "image", "guess", "margin"))
        writer.writerows((each.rank, each.name, each.guess, each.margin) for each in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
