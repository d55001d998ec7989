"""A run's folder -> `report.html`: what came out, where the time went, what failed. Called by `trainer.run` at a run's end and by
`python -m trainer.report RUN` at any time: of a run that was stopped or is still going it tells as much as is there.

The page is one file that asks the network for nothing and runs no script. Class names, keys and messages come from the data, and from
whoever made the data: all text goes through `tag`, which escapes it; nothing else builds HTML.
"""

import datetime
import html
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from cluster.journal import read_journal
from trainer.cli import fail
from trainer.config import RunConfig
from trainer.progress import CAUSES, summary_rows, time_split
from trainer.runs import RunFolder, find_run
from trainer.units import duration, flops, number, percent, size

PROG = "python -m trainer.report"
REPORT_FILE = "report.html"
SHOWN_CLASSES = 30  # a larger confusion matrix becomes a picture
SHOWN_QUARANTINED = 100
SHOWN_FAILURES = 200
CURVE_POINTS = 600  # more are below a pixel, and each costs bytes
LOG_FROM = 20.0  # a loss that reaches this many times its median is drawn on a logarithmic axis

# A colour for each cause, the same in every report: good green, lost red.
_CAUSE_COLOURS = {
    "steps": "s3",
    "data wait": "s4",
    "exchange wait": "s2",
    "checkpoint stall": "s1",
    "evaluation": "s0",
    "start up": "s5",
    "recovery": "s2",
    "resize": "s2",
    "hang": "bad",
    "lost work": "bad",
    "other": "line",
}

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

Values = npt.NDArray[np.float64]
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


def write_report(location: str) -> str:
    """Write report.html into the run's folder (a path or URI); its own path or URI. ValueError where there is no run."""
    folder = find_run(location if "/" in location else f"./{location}")
    return folder.write(REPORT_FILE, render(read_files(folder)).encode())


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, prog=PROG, args=argv)
    try:
        folder = find_run(arguments.run, arguments.storage)
        written = folder.write(REPORT_FILE, render(read_files(folder)).encode())
    except (ValueError, OSError) as error:
        fail(str(error))
    print(written)
    return 0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write report.html into a run's folder."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_files(folder: RunFolder) -> RunFiles:
    """Everything the report tells of. A damaged or missing file is named in `missing`, never fatal: failed runs need reports, too."""
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
    return RunFiles(
        location=folder.location,
        name=folder.name,
        summary=summary,
        events=events,
        curves=curves,
        quarantined=quarantined,
        config_text=text,
        missing=missing,
    )


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
    return int(np.sum(_confusion(summary)))


def _confusion(summary: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """(C, C) int64, rows are true classes; (0, 0) where there is none."""
    try:
        matrix = np.asarray(summary.get("confusion") or [], dtype=np.int64)
    except (ValueError, TypeError):
        matrix = np.zeros(0, dtype=np.int64)
    return matrix if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] else np.zeros((0, 0), dtype=np.int64)


def _last(events: Iterable[Mapping[str, Any]], kind: str, key: str) -> Any:
    return next((event[key] for event in reversed(list(events)) if event.get("event") == kind and key in event), None)


# --- HTML -----------------------------------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is HTML already. Only `tag`, `_svg` and constants of this file make it."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: str) -> Html:
    """An element. A child that is no Html is text and is escaped, and so are attributes; `class_` is `class`."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child), quote=True) for child in children)
    return Html(f"<{name}{words}>{inside}</{name}>")


def _join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = ()) -> Html:
    def cell(kind: str, index: int, value: object) -> Html:
        return tag(kind, value, class_="n") if index in numeric else tag(kind, value)

    body = _join(tag("tr", *(cell("td", index, value) for index, value in enumerate(row))) for row in rows)
    top = tag("thead", tag("tr", *(cell("th", index, value) for index, value in enumerate(head)))) if head else Html("")
    return tag("div", tag("table", top, tag("tbody", body)), class_="scroll")


def render(run: RunFiles) -> str:
    """The page."""
    mood, sentence = verdict(run)
    sections = [
        tag("header", tag("p", "Run"), tag("h1", run.name), tag("p", sentence, class_=f"verdict {mood}")),
        _notes(run),
        _numbers(run),
        _curves(run),
        _times(run),
        _profile(run),
        _failures(run),
        _per_class(run),
        _matrix(run),
        _quarantine(run),
        _settings(run),
    ]
    head = _join(
        [
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            # Belt and braces: should text ever slip through unescaped, the browser still loads and runs nothing.
            Html("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", f"{run.name}: report"),
            Html(f"<style>{STYLE}</style>"),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{_join(sections)}</main></body></html>\n'


def _section(title: str, *parts: Html) -> Html:
    return tag("section", tag("h2", title), *parts)


def _notes(run: RunFiles) -> Html:
    return tag("ul", *(tag("li", note) for note in run.missing), class_="notes") if run.missing else Html("")


def _numbers(run: RunFiles) -> Html:
    rows = summary_rows(run.summary)
    if not rows:
        return Html("")
    shown = {name for name, _ in rows}
    explained = [sentence for name, sentence in _EXPLAINED if name in shown]
    cards = tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows))
    return _section("Key numbers", cards, tag("p", " ".join(explained), class_="soft") if explained else Html(""))


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
            tag("i", style=f"flex:{share:.6f};background:{_colour(cause)}", title=f"{cause}: {duration(seconds)}, {percent(share)}")
            for cause, seconds, share in split
        ),
        class_="bar",
    )
    rows = [
        (
            tag("span", tag("i", class_="key", style=f"background:{_colour(cause)}"), cause, class_="nobreak"),
            tag("span", duration(seconds), class_="nobreak"),
            tag("span", percent(share), class_="nobreak"),
            tag("span", CAUSES.get(cause, ""), class_="soft"),
        )
        for cause, seconds, share in split
    ]
    return _section("Where the time went", bar, _table(("", "time", "share", ""), rows, numeric=(1, 2)))


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
    return _section(
        "Where a step's time goes",
        tag("p", f"{profile['verdict']} ({number(profile['steps'])} steps after a warm-up, rank 0)"),
        _table(("part", "time a step", "share"), rows, numeric=(1, 2)),
        _table(("", "arithmetic", "memory"), known, numeric=(1, 2)),
    )


def _colour(cause: str) -> str:
    return f"var(--{_CAUSE_COLOURS.get(cause, 's5')})"


def _failures(run: RunFiles) -> Html:
    unusual = [event for event in run.events if str(event.get("event")) not in ROUTINE and not _is_first_attempt(event)]
    if not run.events:
        return Html("")
    if not unusual:
        return _section("Failures", tag("p", "None."))
    begin = _number_or_none(run.events[0].get("time"))
    groups = _grouped(unusual)
    told = [_event(group, begin) for group in groups[:SHOWN_FAILURES]]
    rest = sum(len(group) for group in groups[SHOWN_FAILURES:])
    more = tag("p", f"and {rest} more in journal.jsonl") if rest > 0 else Html("")
    return _section("Failures, restarts and stops", tag("div", *told, class_="events"), more)


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
        fields = "\n".join(f"{key}={_short(value)}" for key, value in event.items() if key not in ("time", "event", "writer"))
        parts.append(tag("details", tag("summary", "all of it"), tag("pre", fields)))
    return tag("div", tag("span", since, class_="when", title=clock), tag("div", *parts))


def _sentence(event: Mapping[str, Any]) -> tuple[str, bool]:
    """What an event says, for people; and whether that is all it holds."""
    kind = event.get("event")
    message = str(event.get("message", ""))
    first = _short(message.strip().partition("\n")[0], 300)
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
        return f"{who}: {event.get('kind', '?')} for {duration(_number_or_none(event.get('seconds')) or 0.0)}.", True
    if kind == "stacks":
        return f"What rank {event.get('rank', '?')} was doing.", False
    if kind == "attempt_paused":
        return f"Attempt {event.get('attempt', '?')} ended at step {number(event.get('step'))}: {event.get('reason', '')}.", True
    if kind == "batch_skipped":
        return f"The batch of step {number(event.get('step'))} is left out: {_short(event.get('reason', ''), 300)}", True
    if kind == "resumed":
        return f"Went on from the checkpoint of step {number(_number_or_none(event.get('step')))}.", True
    if kind == "attempt_started":
        workers = event.get("workers", "?")
        start = number(_number_or_none(event.get("start_step")))
        return f"Attempt {event.get('attempt', '?')}, {workers} {'worker' if workers == 1 else 'workers'}, from step {start}.", True
    details = {key: value for key, value in event.items() if key not in ("time", "event", "writer", "message")}
    words = "  ".join(f"{key}={_short(value)}" for key, value in details.items())
    return "  ".join(part for part in (first, words) if part), is_all


def _is_first_attempt(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "attempt_started" and event.get("attempt") in (0, 1) and event.get("start_step") == 0


def _short(value: object, limit: int = 600) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _moment(when: object, begin: float | None) -> tuple[str, str]:
    """The clock's time, and the time since `begin`."""
    seconds = _number_or_none(when)
    if seconds is None:
        return "", "?"
    clock = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return clock, clock if begin is None else f"+{duration(max(0.0, seconds - begin))}"


def _number_or_none(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _class_names(summary: Mapping[str, Any], count: int) -> list[str]:
    names = [str(name) for name in summary.get("classes") or []]
    return names if len(names) == count else [str(index) for index in range(count)]


def _per_class(run: RunFiles) -> Html:
    per_class = [entry for entry in run.summary.get("per_class") or [] if isinstance(entry, Mapping)]
    if not per_class:
        return Html("")
    names = _class_names(run.summary, len(per_class))
    weakest_first = sorted(range(len(per_class)), key=lambda index: (_number_or_none(per_class[index].get("f1")) or 0.0, index))
    rows = [
        (
            names[index],
            *(percent(_number_or_none(per_class[index].get(key))) for key in ("recall", "precision", "f1")),
            number(per_class[index].get("support")),
        )
        for index in weakest_first
    ]
    explained = tag(
        "p", "Weakest first. Recall: how many images of the class are found. Precision: how many images given this name deserve it."
    )
    return _section("Classes", explained, _table(("class", "recall", "precision", "F1", "images"), rows, numeric=(1, 2, 3, 4)))


def _matrix(run: RunFiles) -> Html:
    matrix = _confusion(run.summary)  # (C, C)
    count = len(matrix)
    if not count or not matrix.sum():
        return Html("")
    names = _class_names(run.summary, count)
    rows = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    share = matrix / rows  # (C, C) float64, of the true class's images
    wrong = [(int(matrix[i, j]), i, j) for i, j in np.argwhere((matrix > 0) & ~np.eye(count, dtype=bool))]
    top = sorted(wrong, key=lambda item: (-item[0], item[1], item[2]))[:10]
    listed = _table(
        ("is", "is taken for", "images", "of the class"),
        [(names[i], names[j], number(images), percent(float(share[i, j]))) for images, i, j in top],
        numeric=(2, 3),
    )
    if count > SHOWN_CLASSES:
        return _section("Confusion", tag("h3", "Most frequent mistakes"), listed, _heat(share))
    header = tag("tr", tag("th", "is ↓  taken for →", class_="corner"), *(tag("th", name, class_="up") for name in names))
    body = [
        tag(
            "tr",
            tag("th", names[i]),
            *(
                tag(
                    "td",
                    number(int(matrix[i, j])) if matrix[i, j] else "",
                    class_="n",
                    style=_shade(float(share[i, j]), is_right=i == j),
                    title=f"{names[i]} taken for {names[j]}: {matrix[i, j]} ({percent(float(share[i, j]))})",
                )
                for j in range(count)
            ),
        )
        for i in range(count)
    ]
    grid = tag("div", tag("table", header, *body, class_="confusion"), class_="scroll")
    explained = tag("p", "A row for each true class, a column for each answer: right ones are green, wrong ones red.", class_="soft")
    mistakes = _join([tag("h3", "Most frequent mistakes"), listed]) if top else tag("p", "No image was classified wrongly.")
    return _section("Confusion", explained, grid, mistakes)


def _shade(share: float, *, is_right: bool) -> str:
    """See-through colours, so that one value serves light and dark pages."""
    return f"background:rgba({'46,160,67' if is_right else '218,54,51'},{0.08 + 0.72 * share if share else 0:.3f})"


def _quarantine(run: RunFiles) -> Html:
    if not run.quarantined:
        return Html("")
    shown = run.quarantined[:SHOWN_QUARANTINED]
    rows = [
        (record.get("split", ""), record.get("key", ""), tag("span", _short(record.get("reason", "")), class_="wrap")) for record in shown
    ]
    rest = len(run.quarantined) - len(shown)
    more = tag("p", f"and {number(rest)} more in quarantine.jsonl") if rest > 0 else Html("")
    return _section("Images that could not be used", _table(("split", "key", "reason"), rows), more)


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
        parts += [tag("h3", "Identity and versions"), _table((), known)]
    if run.config_text:
        parts += [tag("h3", "Settings"), tag("details", tag("summary", "config.toml"), tag("pre", run.config_text))]
    return _section("Reproduce", *parts) if parts else Html("")


# --- curves ---------------------------------------------------------------------------------------------------------------------------

# Colours that no drawing uses by chance; each becomes a CSS variable, so that the page's scheme colours the curves, too.
_INK, _SERIES = "#010203", ("#020304", "#030405", "#040506")


def _curves(run: RunFiles) -> Html:
    curves = run.curves
    epochs = curves.get("epoch", np.zeros(0))
    evaluations = _evaluations(run.events)
    figures: list[Html] = []

    def add(title: str, *lines: tuple[str, Values, Values, str], marks: Sequence[float] = (), x: str = "epoch", log: bool = False) -> None:
        drawn = [line for line in lines if len(line[1]) and np.isfinite(line[2]).any()]
        if drawn:
            plot = _plot(drawn, marks=marks, x=x, log=log, ident=f"f{len(figures)}")
            figures.append(tag("figure", tag("figcaption", title), plot))

    def column(name: str) -> Values:
        return curves.get(name, np.full(len(epochs), np.nan))

    def tested(key: str) -> Values:
        values = (_number_or_none(event.get(key)) for event in evaluations)
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    test_epochs = tested("epoch")
    losses = (("training", *_thinned(epochs, column("train_loss")), "-"), ("test", test_epochs, tested("test_loss"), "o-"))
    log = _spans_magnitudes(np.concatenate([losses[0][2], losses[1][2]]))
    add("Loss (logarithmic)" if log else "Loss", *losses, log=log)
    add("Test accuracy, %", ("test", test_epochs, 100 * tested("test_accuracy"), "o-"))
    add("Learning rate", ("learning rate", *_thinned(epochs, column("learning_rate")), "-"))
    times = column("time")
    if len(times) and np.isfinite(times).any():
        begin = float(_number_or_none(run.events[0].get("time")) or np.nanmin(times)) if run.events else float(np.nanmin(times))
        failed = [event for event in run.events if event.get("event") in ("worker_failed", "attempt_failed", "resumed")]
        unit, name = (60.0, "minutes") if np.nanmax(times) - begin > 300 else (1.0, "seconds")
        marks = [(float(event["time"]) - begin) / unit for event in failed if _number_or_none(event.get("time")) is not None]
        add(
            "Images per second" + (" (dashed: failures and restarts)" if marks else ""),
            ("images per second", *_by_attempt((times - begin) / unit, column("images_per_second"), column("attempt")), "-"),
            marks=marks,
            x=f"{name} since the start",
        )
    return _section("Curves", tag("div", *figures, class_="figures")) if figures else Html("")


def _evaluations(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last evaluation at each step: one that a restart repeated counts once."""
    by_step = {event.get("step"): event for event in events if event.get("event") == "evaluation"}
    return sorted(by_step.values(), key=lambda event: _number_or_none(event.get("epoch")) or 0.0)


def _thinned(x: Values, y: Values, points: int = CURVE_POINTS) -> tuple[Values, Values]:
    """At most `points` finite points: means of equal runs of neighbours, not a choice of them, which would hide or invent spikes."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    each = -(-len(x) // points) if len(x) else 1
    if each <= 1:
        return x, y
    starts = np.arange(0, len(x), each)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _by_attempt(x: Values, y: Values, attempt: Values) -> tuple[Values, Values]:
    """Thinned, with a gap between attempts: while nothing was computed there is nothing to draw."""
    starts = np.flatnonzero(np.diff(attempt) != 0) + 1 if np.isfinite(attempt).all() else np.zeros(0, dtype=np.int64)
    each = max(2, CURVE_POINTS // (len(starts) + 1))
    parts = [_thinned(xs, ys, each) for xs, ys in zip(np.split(x, starts), np.split(y, starts), strict=True)]
    gap = (np.array([np.nan]), np.array([np.nan]))
    joined = [part for known in parts if len(known[0]) for part in (known, gap)][:-1] or [gap]
    return np.concatenate([xs for xs, _ in joined]), np.concatenate([ys for _, ys in joined])


def _spans_magnitudes(values: Values) -> bool:
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() > LOG_FROM * np.median(known))


def _plot(lines: Sequence[tuple[str, Values, Values, str]], *, marks: Sequence[float], x: str, log: bool, ident: str) -> Html:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident, "font.size": 9.0, "axes.edgecolor": _INK}):
        figure = Figure(figsize=(5.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, xs, ys, style), colour in zip(lines, _SERIES, strict=False):
            axes.plot(xs, ys, style, color=colour, label=label, linewidth=1.4, markersize=3.5)
        for mark in marks:
            axes.axvline(mark, color=_SERIES[2], linestyle="--", linewidth=0.8)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # not 10^1 in mathematics' letters
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x, color=_INK)
        axes.tick_params(colors=_INK, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        return _svg(figure, ident)


def _heat(share: Values) -> Html:
    """A large confusion matrix as a picture: rows true classes, columns predictions, darker is more."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heat", "font.size": 9.0}):
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted class", color=_INK)
        axes.set_ylabel("true class", color=_INK)
        axes.tick_params(colors=_INK)
        return tag("figure", _svg(figure, "heat"))


def _svg(figure: Figure, ident: str) -> Html:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML header and the document type, whose address HTML has no use for
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names must be unique in the page, not only in their own drawing.
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{ident}-", text)
    for index, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--s{index})")
    return Html(text.replace(_INK, "var(--ink)"))


STYLE = """
:root{--paper:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa;--good:#1a7f37;--warn:#9a6700;--bad:#cf222e;
--s0:#0969da;--s1:#bc4c00;--s2:#8250df;--s3:#1a7f37;--s4:#bf8700;--s5:#59636e}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23;--good:#3fb950;
--warn:#d29922;--bad:#f85149;--s0:#58a6ff;--s1:#f0883e;--s2:#bc8cff;--s3:#3fb950;--s4:#e3b341;--s5:#9198a1}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:70rem;margin:auto;padding:1rem}
header p{margin:0;color:var(--soft)}
.soft{color:var(--soft);font-size:.85rem}
.nobreak{white-space:nowrap}
h1{margin:0;font-size:1.6rem;overflow-wrap:anywhere}
h2{margin:2rem 0 .6rem;font-size:1.15rem;border-bottom:1px solid var(--line)}
h3{margin:1.2rem 0 .4rem;font-size:1rem}
header .verdict{margin:.8rem 0;padding:.7rem 1rem;border-left:4px solid;background:var(--card);color:var(--ink);font-size:1.1rem;
overflow-wrap:anywhere}
.verdict.good{border-color:var(--good)}.verdict.warn{border-color:var(--warn)}.verdict.bad{border-color:var(--bad)}
.notes{color:var(--warn)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:0}
dl div{padding:.5rem .7rem;background:var(--card);border-radius:6px}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
figure{margin:0}
figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,sans-serif!important}
.bar{display:flex;height:1.4rem;border-radius:4px;overflow:hidden;margin-bottom:.5rem}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.5em;border-radius:2px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.wrap{overflow-wrap:anywhere;white-space:pre-wrap}
.events>div{display:grid;grid-template-columns:5.5rem minmax(0,1fr);padding:.5rem 0;border-bottom:1px solid var(--line);font-size:.9rem}
.events p{margin:0}
.what{font-weight:600}
.when{color:var(--soft);font-variant-numeric:tabular-nums}
summary{cursor:pointer;color:var(--soft)}
.confusion td{min-width:2.4rem;border:1px solid var(--line)}
.confusion .up{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;max-height:9rem;overflow:hidden}
.confusion .corner{vertical-align:bottom;font-weight:400;color:var(--soft);white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.7rem;background:var(--card);border-radius:6px;font-size:.85rem}
@media(max-width:40rem){th,td{padding:.25rem .35rem}dl{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))}}
""".strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
