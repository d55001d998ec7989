"""A run's folder -> `report.html`: what came out, where the time went, what failed. Called by `trainer.run` at a run's end and by
`python -m trainer.report RUN` at any time: of a run that was stopped or is still going it tells as much as is there.

Its parts: the run in time and its ranks are `strip`'s, single images `mistakes`', drawings `plots`'; `page` has what all of it is made of,
and says why no text of the data can do anything. `--compare` is `trainer.report.compare`.
"""

import datetime
import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from cluster.journal import read_journal
from dataio.parquet import Dataset
from trainer.report.confusion import NO_SHOTS, Shots, confusion_section, find_dataset, look_up, problems, worst_section
from trainer.report.page import Html, number_or_none, page, section, short, table, tag
from trainer.report.plots import Line, Values, by_attempt, plot, spans_magnitudes, thinned
from trainer.report.timeline import colour, ranks_section, strip_section
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.progress import CAUSES, summary_rows, time_split
from trainer.settings.cli import fail
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration, flops, number, percent, size
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

PROG = "python -m trainer.report"
REPORT_FILE = "report.html"
SHOWN_QUARANTINED = 100
SHOWN_FAILURES = 200

# What happens in every run; all other events are worth a line in the report.
ROUTINE = frozenset(
    {
        "run_started",
        "worker_registered",
        "training_started",
        "checkpoint_committed",
        "checkpoint_pruned",
        "evaluation",
        "sample_quarantined",
        "run_finished",
        "first_step",
        "account",
    }
)

Mood = Literal["good", "warn", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What a run's folder holds; what is missing is empty and named in `missing`."""

    location: str
    name: str
    summary: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Values]
    """Columns of curves.parquet, each (rows,) float64."""
    quarantined: Sequence[Mapping[str, Any]]
    config_text: str
    missing: Sequence[str]
    """Sentences."""
    predictions: Predictions | None = None
    """Of the evaluation that the summary tells of."""
    shots: Shots = NO_SHOTS
    no_shots: str = ""
    """Why there are no images, where there are none."""


def write_report(location: str, dataset: Dataset | None = None) -> str:
    """Write report.html into the run's folder (a path or URI); its own path or URI. ValueError where there is no run. `dataset` is the
    run's, where the caller has it open; else it is looked for where the run had it."""
    folder = find_run(location if "/" in location else f"./{location}")
    return folder.write(REPORT_FILE, render(read_files(folder, dataset)).encode())


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, prog=PROG, args=argv)
    try:
        if arguments.compare:
            written = _compare(arguments)
        else:
            if arguments.out:
                raise ValueError(f"--out {arguments.out} goes with --compare; the report of one run is in its own folder")
            folder = find_run(arguments.run, arguments.storage)
            written = folder.write(REPORT_FILE, render(read_files(folder)).encode())
    except (ValueError, OSError) as error:
        fail(str(error))
    print(written)
    return 0


def _compare(arguments: "Arguments") -> str:
    from trainer.report.compare import render_comparison  # which takes this module's parts

    if arguments.run:
        raise ValueError(f"--compare takes two runs; {arguments.run} is one more")
    first, second = (find_run(run, arguments.storage) for run in arguments.compare)
    out = Path(arguments.out or f"compare-{first.name}-{second.name}.html")
    out.write_text(render_comparison(read_files(first, pictures=False), read_files(second, pictures=False)), encoding="utf-8")
    return str(out)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write report.html into a run's folder, or compare two runs on one page."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The run's folder (path or URI), or its name under --storage."""
    compare: Annotated[tuple[str, str] | tuple[()], tyro.conf.arg(metavar="RUN RUN")] = ()
    """Two runs, each as RUN: what differs in settings, curves and results, and whether it is more than chance."""
    out: str = ""
    """With --compare: the page's file; by default compare-RUN-RUN.html in this folder."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_files(folder: RunFolder, dataset: Dataset | None = None, *, pictures: bool = True) -> RunFiles:
    """Everything the report tells of; with `pictures`, images of the data set, too. A damaged or missing file is named in `missing`, never
    fatal: failed runs need reports, too."""
    missing: list[str] = []

    summary: Mapping[str, Any] = {}
    data = folder.read("summary.json")
    if data is None:
        missing.append("There is no summary.json: the run has not ended, or was killed.")
    else:
        try:
            loaded = json.loads(data)
            summary = loaded if isinstance(loaded, dict) else {}
        except ValueError as error:
            missing.append(f"summary.json cannot be read: {error}.")

    events = read_journal(folder.storage, folder.name)
    if not events:
        missing.append("There is no journal: what failed is not known.")

    curves: dict[str, Values] = {}
    data = folder.read("curves.parquet")
    if data is None:
        missing.append("There are no curves (curves.parquet).")
    else:
        try:
            table = pq.read_table(io.BytesIO(data))
            curves = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names}
        except (pa.ArrowException, ValueError) as error:
            missing.append(f"curves.parquet cannot be read: {error}.")

    quarantined = []
    for line in (folder.read("quarantine.jsonl") or b"").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a torn last line; the count is the summary's
            continue
        if isinstance(record, dict):
            quarantined.append(record)
    if not quarantined:
        quarantined = [event for event in events if event.get("event") == "sample_quarantined"]

    text = (folder.read("config.toml") or b"").decode(errors="replace")
    if not text:
        missing.append("There is no config.toml.")
    predictions, no_shots = _predictions(folder, summary)
    shots = NO_SHOTS
    if predictions is not None and pictures:
        try:
            if dataset is None:
                dataset = find_dataset(from_toml(text, origin=f"{folder.location}/config.toml").data, predictions.about.dataset_fingerprint)
            shots = look_up(predictions, dataset, len(confusion_of(summary)))
        except (ValueError, OSError, ImportError) as error:
            no_shots = f"There are no images here: {error}."
    return RunFiles(
        location=folder.location,
        name=folder.name,
        summary=summary,
        events=events,
        curves=curves,
        quarantined=quarantined,
        config_text=text,
        missing=missing,
        predictions=predictions,
        shots=shots,
        no_shots=no_shots,
    )


def _predictions(folder: RunFolder, summary: Mapping[str, Any]) -> tuple[Predictions | None, str]:
    """Those of the run's last evaluation, or why there are none."""
    data = folder.read(PREDICTIONS_FILE)
    if data is None:
        return None, f"There is no {PREDICTIONS_FILE}, which a run writes when it finishes: which images were mistaken is not known."
    try:
        found = Predictions.from_parquet(data)
        problem = next(problems(found, summary, confusion_of(summary)), "")
    except ValueError as error:
        problem = str(error)
    return (None, f"{PREDICTIONS_FILE} is not used: {problem}.") if problem else (found, "")


def verdict(run: RunFiles) -> tuple[Mood, str]:
    """The first sentence: did it work, how good is it, what did failures cost."""
    summary = run.summary
    kinds = [event.get("event") for event in run.events]
    ended = next((kind for kind in reversed(kinds) if kind in ("run_finished", "run_stopped", "run_failed", "run_started")), None)
    status = str(
        summary.get("status") or {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}.get(str(ended), "")
    )
    if ended == "run_started" and summary:  # a summary of an earlier part of the run; it was started again since
        status = ""
    steps = summary.get("steps", _last(run.events, "checkpoint_committed", "step"))
    done = f" after {number(steps)} steps" if isinstance(steps, int | float) else ""
    saved = _last(run.events, "checkpoint_committed", "step")
    go_on = f"; the newest checkpoint is of step {number(saved)}, and the same command goes on from there" if saved is not None else ""
    trouble = _trouble(run)
    match status:
        case "finished":
            accuracy, count = summary.get("test_accuracy"), _test_count(summary)
            of = f" of the {number(count)} test images" if count else " of the test images"
            result = f"{percent(accuracy, 2)}{of} are classified correctly" if accuracy is not None else "Finished, without an evaluation"
            took = f", {duration(summary['seconds'])}" if summary.get("seconds") is not None else ""
            return ("warn" if trouble else "good"), f"{result}{done}{took}. {trouble or 'Nothing failed.'}"
        case "stopped":
            reason = _last(run.events, "stop_requested", "reason")
            why = f" ({reason})" if reason else ""
            return "warn", f"Stopped{done}{why} before its end: these numbers are not final{go_on}. {trouble}".rstrip()
        case "":
            return "warn", f"No end is recorded: the run is still going, or was killed{go_on}. {trouble}".rstrip()
    reason = summary.get("error") or _last(run.events, "run_failed", "message") or _last(run.events, "attempt_failed", "message")
    why = f": {reason}" if reason else ""
    return "bad", f"{status.capitalize()}{done}{why}{go_on}. {trouble}".rstrip()


def _trouble(run: RunFiles) -> str:
    parts = []
    failed = sum(event.get("event") == "attempt_failed" for event in run.events) or run.summary.get("restarts")
    if failed:
        lost = sum(event["lost_steps"] for event in run.events if isinstance(event.get("lost_steps"), int))
        failures = "1 failure" if failed == 1 else f"{number(failed)} failures"
        parts.append(f"{failures} lost {'1 step' if lost == 1 else f'{number(lost)} steps'}.")
    corrupt = sum(event.get("event") == "checkpoint_corrupt" for event in run.events)
    if corrupt:
        parts.append(f"{corrupt} damaged {'checkpoint was' if corrupt == 1 else 'checkpoints were'} found and not used.")
    bad = run.summary.get("quarantined") or len(run.quarantined)
    if bad:
        parts.append(f"{number(bad)} {'image' if bad == 1 else 'images'} could not be used.")
    return " ".join(parts)


def _test_count(summary: Mapping[str, Any]) -> int:
    if summary.get("test_count"):
        return int(summary["test_count"])
    return int(np.sum(confusion_of(summary)))


def confusion_of(summary: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """(C, C) int64, rows are true classes; (0, 0) where there is none."""
    try:
        matrix = np.asarray(summary.get("confusion") or [], dtype=np.int64)
    except (ValueError, TypeError):
        matrix = np.zeros(0, dtype=np.int64)
    return matrix if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] else np.zeros((0, 0), dtype=np.int64)


def _last(events: Iterable[Mapping[str, Any]], kind: str, key: str) -> Any:
    return next((event[key] for event in reversed(list(events)) if event.get("event") == kind and key in event), None)


# --- HTML -----------------------------------------------------------------------------------------------------------------------------


def render(run: RunFiles) -> str:
    """The page."""
    mood, sentence = verdict(run)
    matrix = confusion_of(run.summary)
    names = class_names(run.summary, len(matrix))
    return page(
        f"{run.name}: report",
        tag("header", tag("p", "Run"), tag("h1", run.name), tag("p", sentence, class_=f"verdict {mood}")),
        _notes(run),
        _numbers(run),
        _curves(run),
        confusion_section(matrix, names, run.predictions, run.shots, run.no_shots),
        worst_section(names, run.predictions, run.shots, run.no_shots),
        _per_class(run),
        strip_section(run.events),
        _times(run),
        ranks_section(run.summary, run.events),
        _profile(run),
        _failures(run),
        _quarantine(run),
        _settings(run),
    )


def _notes(run: RunFiles) -> Html:
    return tag("ul", *(tag("li", note) for note in run.missing), class_="notes") if run.missing else Html("")


def _numbers(run: RunFiles) -> Html:
    rows = summary_rows(run.summary)
    if not rows:
        return Html("")
    shown = {name for name, _ in rows}
    explained = [sentence for name, sentence in _EXPLAINED if name in shown]
    cards = tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows))
    return section("Key numbers", cards, tag("p", " ".join(explained), class_="soft") if explained else Html(""))


_EXPLAINED = (
    ("Goodput", "Goodput: the share of all the time that went into steps that count."),
    ("Data wait", "Data wait: the share of the steps' time in which they waited for images."),
    ("Recovery", "Recovery: from a failure to the next step."),
    ("Checkpoint stall", "Checkpoint stall: what checkpoints held up training."),
)


def _times(run: RunFiles) -> Html:
    split = time_split(run.summary)
    if not split:
        return Html("")
    bar = tag(
        "div",
        *(
            tag("i", style=f"flex:{share:.6f};background:{colour(cause)}", title=f"{cause}: {duration(seconds)}, {percent(share)}")
            for cause, seconds, share in split
        ),
        class_="bar",
    )
    rows = [
        (
            tag("span", tag("i", class_="key", style=f"background:{colour(cause)}"), cause, class_="nobreak"),
            tag("span", duration(seconds), class_="nobreak"),
            tag("span", percent(share), class_="nobreak"),
            tag("span", CAUSES.get(cause, ""), class_="soft"),
        )
        for cause, seconds, share in split
    ]
    return section("Where the time went", bar, table(("", "time", "share", ""), rows, numeric=(1, 2)))


def _profile(run: RunFiles) -> Html:
    profile = run.summary.get("profile")
    if not profile:
        return Html("")
    parts, ratios = profile["parts_seconds"], profile["parts_ratio"]
    rows = [(part, duration(parts[part]), percent(ratios[part])) for part in parts if parts[part]]
    ceilings, work = profile["ceilings"], profile["work"]
    known = (
        ("Work of an image", flops(work["flops_per_image"]), size(work["bytes_per_image"])),
        ("The device can, a second", flops(ceilings["flops_per_second"]), size(ceilings["bytes_per_second"])),
        ("Of that in use", percent(profile["flops_ratio"]), percent(profile["bytes_ratio"])),
    )
    return section(
        "Where a step's time goes",
        tag("p", f"{profile['verdict']} ({number(profile['steps'])} steps after a warm-up, rank 0)"),
        table(("part", "time a step", "share"), rows, numeric=(1, 2)),
        table(("", "arithmetic", "memory"), known, numeric=(1, 2)),
    )


def _failures(run: RunFiles) -> Html:
    unusual = [event for event in run.events if str(event.get("event")) not in ROUTINE and not _is_first_attempt(event)]
    if not run.events:
        return Html("")
    if not unusual:
        return section("Failures", tag("p", "None."))
    begin = _began(run.events)
    groups = _grouped(unusual)
    told = [_event(group, begin) for group in groups[:SHOWN_FAILURES]]
    rest = sum(len(group) for group in groups[SHOWN_FAILURES:])
    more = tag("p", f"and {rest} more in journal.jsonl") if rest > 0 else Html("")
    return section("Failures, restarts and stops", tag("div", *told, class_="events"), more)


def _began(events: Sequence[Mapping[str, Any]]) -> float | None:
    """When the run's first process began."""
    return next((number_or_none(event.get("process_started", event.get("time"))) for event in events), None)


def _grouped(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events in order; failed checkpoints in a row that differ in numbers only are one group: a full disk fails them all."""
    groups: list[list[Mapping[str, Any]]] = []
    for event in events:
        if groups and event.get("event") == "checkpoint_failed" and _alike(groups[-1][-1]) == _alike(event):
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _alike(event: Mapping[str, Any]) -> dict[str, str]:
    return {key: re.sub(r"\d+", "0", str(value)) for key, value in event.items() if key not in ("time", "step")}


def _event(group: Sequence[Mapping[str, Any]], begin: float | None) -> Html:
    event = group[0]
    what = str(event.get("event")).replace("_", " ")
    times = "" if len(group) == 1 else f", {len(group)} times"
    clock, since = _moment(event.get("time"), begin)
    sentence, is_all = _sentence(event)
    parts = [tag("p", tag("span", f"{what}{times}", class_="what"), tag("span", f" {sentence}", class_="wrap"))]
    if len(group) > 1 and "step" in event:
        parts.append(tag("p", f"steps {number(event['step'])} to {number(group[-1].get('step'))}", class_="soft"))
    if not is_all:
        fields = "\n".join(f"{key}={short(value)}" for key, value in event.items() if key not in ("time", "event", "writer"))
        parts.append(tag("details", tag("summary", "all of it"), tag("pre", fields)))
    return tag("div", tag("span", since, class_="when", title=clock), tag("div", *parts))


def _sentence(event: Mapping[str, Any]) -> tuple[str, bool]:
    """What an event says, for people; and whether that is all it holds."""
    kind = event.get("event")
    message = str(event.get("message", ""))
    first = short(message.strip().partition("\n")[0], 300)
    is_all = first == message.strip()
    if kind == "attempt_failed":
        where = f" on rank {event['rank']}" if event.get("rank") is not None else ""
        lost = event.get("lost_steps")
        cost = ""
        if isinstance(lost, int):
            reached = f" at step {number(event['last_step'])}" if isinstance(event.get("last_step"), int) else ""
            cost = f" It came{reached}; {'no step was' if lost == 0 else '1 step was' if lost == 1 else f'{number(lost)} steps were'} lost."
        dot = "" if first.endswith((".", "!")) else "."
        return f"Attempt {event.get('attempt', '?')}{where} ({event.get('kind', '?')}): {first}{dot}{cost}", is_all
    if kind == "hang":
        ranks = event.get("ranks") or []
        who = f"Rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"
        return f"{who}: {event.get('kind', '?')} for {duration(number_or_none(event.get('seconds')) or 0.0)}.", True
    if kind == "stacks":
        return f"What rank {event.get('rank', '?')} was doing.", False
    if kind == "attempt_paused":
        return f"Attempt {event.get('attempt', '?')} ended at step {number(event.get('step'))}: {event.get('reason', '')}.", True
    if kind == "batch_skipped":
        return f"The batch of step {number(event.get('step'))} is left out: {short(event.get('reason', ''), 300)}", True
    if kind == "resumed":
        return f"Went on from the checkpoint of step {number(number_or_none(event.get('step')))}.", True
    if kind == "attempt_started":
        workers = event.get("workers", "?")
        start = number(number_or_none(event.get("start_step")))
        return f"Attempt {event.get('attempt', '?')}, {workers} {'worker' if workers == 1 else 'workers'}, from step {start}.", True
    details = {key: value for key, value in event.items() if key not in ("time", "event", "writer", "message")}
    words = "  ".join(f"{key}={short(value)}" for key, value in details.items())
    return "  ".join(part for part in (first, words) if part), is_all


def _is_first_attempt(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "attempt_started" and event.get("attempt") in (0, 1) and event.get("start_step") == 0


def _moment(when: object, begin: float | None) -> tuple[str, str]:
    """The clock's time, and the time since `begin`."""
    seconds = number_or_none(when)
    if seconds is None:
        return "", "?"
    clock = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return clock, clock if begin is None else f"+{duration(max(0.0, seconds - begin))}"


def class_names(summary: Mapping[str, Any], count: int) -> list[str]:
    names = [str(name) for name in summary.get("classes") or []]
    return names if len(names) == count else [str(index) for index in range(count)]


def _per_class(run: RunFiles) -> Html:
    per_class = [entry for entry in run.summary.get("per_class") or [] if isinstance(entry, Mapping)]
    if not per_class:
        return Html("")
    names = class_names(run.summary, len(per_class))
    weakest_first = sorted(range(len(per_class)), key=lambda index: (number_or_none(per_class[index].get("f1")) or 0.0, index))
    rows = [
        (
            names[index],
            *(percent(number_or_none(per_class[index].get(key))) for key in ("recall", "precision", "f1")),
            number(per_class[index].get("support")),
        )
        for index in weakest_first
    ]
    explained = tag(
        "p", "Weakest first. Recall: how many images of the class are found. Precision: how many images given this name deserve it."
    )
    return section("Classes", explained, table(("class", "recall", "precision", "F1", "images"), rows, numeric=(1, 2, 3, 4)))


def _quarantine(run: RunFiles) -> Html:
    if not run.quarantined:
        return Html("")
    shown = run.quarantined[:SHOWN_QUARANTINED]
    rows = [
        (record.get("split", ""), record.get("key", ""), tag("span", short(record.get("reason", "")), class_="wrap")) for record in shown
    ]
    rest = len(run.quarantined) - len(shown)
    more = tag("p", f"and {number(rest)} more in quarantine.jsonl") if rest > 0 else Html("")
    return section("Images that could not be used", table(("split", "key", "reason"), rows), more)


def _settings(run: RunFiles) -> Html:
    parts: list[Html] = []
    command = run.summary.get("command") or _last(run.events, "run_started", "command")
    if command:
        parts += [tag("h3", "Started with"), tag("pre", command)]
    if run.config_text:
        # A config in an object store has to be fetched first; the command then finds it beside itself.
        path = "config.toml" if "://" in run.location else f"{run.location}/config.toml"
        words = ["python", "-m", "trainer.run", "--config", path, "--run", f"{run.name}-again"]
        parts += [tag("h3", "The same again, as another run"), tag("pre", shlex.join(words))]
    facts = [
        (name, run.summary.get(key))
        for name, key in (("Weights SHA-256", "weights_sha256"), ("Data set fingerprint", "dataset_fingerprint"))
    ]
    versions = run.summary.get("versions") or _last(run.events, "run_started", "versions")
    if isinstance(versions, Mapping):
        facts += sorted(versions.items())
    known = [(name, tag("code", value, class_="wrap")) for name, value in facts if value]
    if known:
        parts += [tag("h3", "Identity and versions"), table((), known)]
    if run.config_text:
        parts += [tag("h3", "Settings"), tag("details", tag("summary", "config.toml"), tag("pre", run.config_text))]
    return section("Reproduce", *parts) if parts else Html("")


# --- curves ---------------------------------------------------------------------------------------------------------------------------


def _curves(run: RunFiles) -> Html:
    curves = run.curves
    epochs = curves.get("epoch", np.zeros(0))
    tests = evaluations(run.events)
    figures: list[Html] = []

    def add(title: str, *lines: Line, marks: Sequence[float] = (), x: str = "epoch", log: bool = False) -> None:
        drawn = [line for line in lines if len(line[1]) and np.isfinite(line[2]).any()]
        if drawn:
            drawing = plot(drawn, marks=marks, x=x, log=log, ident=f"f{len(figures)}")
            figures.append(tag("figure", tag("figcaption", title), drawing))

    def column(name: str) -> Values:
        return curves.get(name, np.full(len(epochs), np.nan))

    def tested(key: str) -> Values:
        values = (number_or_none(event.get(key)) for event in tests)
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    test_epochs = tested("epoch")
    losses = (("training", *thinned(epochs, column("train_loss")), "-"), ("test", test_epochs, tested("test_loss"), "o-"))
    log = spans_magnitudes(np.concatenate([losses[0][2], losses[1][2]]))
    add("Loss (logarithmic)" if log else "Loss", *losses, log=log)
    add("Test accuracy, %", ("test", test_epochs, 100 * tested("test_accuracy"), "o-"))
    add("Learning rate", ("learning rate", *thinned(epochs, column("learning_rate")), "-"))
    times = column("time")
    if len(times) and np.isfinite(times).any():
        begin = float(_began(run.events) or np.nanmin(times))
        failed = [event for event in run.events if event.get("event") in ("worker_failed", "attempt_failed", "resumed")]
        unit, name = (60.0, "minutes") if np.nanmax(times) - begin > 300 else (1.0, "seconds")
        marks = [(float(event["time"]) - begin) / unit for event in failed if number_or_none(event.get("time")) is not None]
        add(
            "Images per second" + (" (dashed: failures and restarts)" if marks else ""),
            ("images per second", *by_attempt((times - begin) / unit, column("images_per_second"), column("attempt")), "-"),
            marks=marks,
            x=f"{name} since the start",
        )
    return section("Curves", tag("div", *figures, class_="figures")) if figures else Html("")


def evaluations(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last evaluation at each step: one that a restart repeated counts once."""
    by_step = {event.get("step"): event for event in events if event.get("event") == "evaluation"}
    return sorted(by_step.values(), key=lambda event: number_or_none(event.get("epoch")) or 0.0)
