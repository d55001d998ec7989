"""Makes `report.html` from a run's folder: the result, where the time went, what failed. Called by the driver at a run's end
(`make_report`) and by `python -m trainer.report RUN` at any time: for a run that was stopped or still runs, it shows what is there.

This file sets the page's order and makes the parts that are a table or two. timeline.py shows the run in time and its ranks, curves.py the
curves, the task's panels the model's answers. page.py has the building blocks, and explains why text from the data cannot do harm.
"""

import datetime
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dataio.parquet import Dataset
from trainer.report.curves import curves_section
from trainer.report.files import Event, RunFiles, began, last, read_files
from trainer.report.page import NOTHING, Html, image, join, number_or_none, page, section, short, table, tag
from trainer.report.panels import panels_of
from trainer.report.reliability import reliability_section
from trainer.report.timeline import colour, ranks_section, timeline_section
from trainer.report.unlabelled import unlabelled_section
from trainer.report.verdict import verdict
from trainer.runs.certainty import class_warnings, interval_words
from trainer.runs.events import is_told_whole, is_unusual, plainly, words_of
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.measures import capital, heading, one_of, samples
from trainer.runs.progress import CAUSES, summary_rows, time_split
from trainer.settings.units import duration, flops, number, percent, size

REPORT_FILE = "report.html"
SHOWN_QUARANTINED = 100
SHOWN_FAILURES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A report that was written."""

    location: str
    """Its path or URI."""
    problems: Sequence[str]
    """What could not be shown, and why."""


def write_report(location: str, dataset: Dataset | None = None) -> str:
    """Writes report.html into the run's folder (a path or URI); returns the report's path or URI. ValueError if there is no run.
    `dataset` is the run's data set if the caller has it open; otherwise it is opened where the run had it."""
    return make_report(find_run(location if "/" in location else f"./{location}"), dataset).location


def make_report(folder: RunFolder, dataset: Dataset | None = None) -> Report:
    """Writes report.html into a run's folder."""
    html, problems = rendered(read_files(folder, dataset))
    # A name from the data need not be valid Unicode.
    return Report(location=folder.write(REPORT_FILE, html.encode(errors="replace")), problems=problems)


def render(run: RunFiles) -> str:
    """The whole page as HTML."""
    return rendered(run)[0]


def rendered(run: RunFiles) -> tuple[str, list[str]]:
    """The whole page as HTML, and what could not be shown on it. A part that fails costs itself only: anyone may have written the files of
    a run, and a report is wanted most when something is wrong."""
    problems: list[str] = []

    def part(title: str, make: Callable[[], Html]) -> Html:
        try:
            return make()
        except Exception as error:
            problems.append(f"{title}: {short(f'{type(error).__name__}: {error}', 200)}")
            return section(title, tag("p", f"This could not be shown ({problems[-1]}).", class_="soft"))

    def panels() -> Html:
        made, failed = panels_of(run)
        problems.extend(failed)
        return join(made)

    parts = [
        part("Verdict", lambda: _headed(run)),
        part("Missing", lambda: _notes(run)),
        part("Key numbers", lambda: _numbers(run)),
        part("Curves", lambda: curves_section(run)),
        part("Evaluation", panels),
        part("Confidence", lambda: reliability_section(run)),
        part("Unlabelled images", lambda: unlabelled_section(run)),
        part("Timeline", lambda: timeline_section(run.events)),
        part("Where the time went", lambda: _times(run)),
        part("Ranks", lambda: ranks_section(run.summary, run.events, run.info.unit)),
        part("Where a step's time goes", lambda: _profile(run)),
        part("Failures", lambda: _failures(run)),
        part("Quarantine", lambda: _quarantine(run)),
        part("Reproduce", lambda: _settings(run)),
    ]
    return page(f"{run.name}: report", *parts), problems


def _headed(run: RunFiles) -> Html:
    mood, sentence = verdict(run)
    return tag("header", tag("p", "Run"), tag("h1", run.name), tag("p", sentence, class_=f"verdict {mood}"))


def _notes(run: RunFiles) -> Html:
    said = (last(run.events, "data_corrected", "message"), last(run.events, "samples_chosen", "message"))
    told = [f"{capital(str(message))}." for message in said if message]
    notes = [*told, *run.missing, *class_warnings(run.summary, run.info.unit)]
    return tag("ul", *(tag("li", short(note)) for note in notes), class_="notes") if notes else NOTHING


def _numbers(run: RunFiles) -> Html:
    rows = summary_rows(run.summary, with_intervals=False)
    if not rows:
        return NOTHING
    intervals = {heading(measure): interval_words(run.summary, measure) for measure in run.info.measures}
    shown = {name for name, _ in rows} | ({INTERVAL} if any(intervals.values()) else set())
    explained = [sentence for name, sentence in _EXPLAINED if name in shown]
    cards = tag("dl", *(tag("div", tag("dt", name), tag("dd", value, _below(intervals.get(name)))) for name, value in rows))
    return section("Key numbers", cards, tag("p", " ".join(explained), class_="soft") if explained else NOTHING)


def _below(interval: str | None) -> Html:
    return tag("span", interval, class_="interval", title=INTERVAL) if interval else NOTHING


INTERVAL = "95 % interval"
_EXPLAINED = (
    (INTERVAL, "Below a share: its 95 % interval, which is how far chance moves it with so many test samples (Wilson)."),
    (
        "Virtual ranks",
        "Virtual rank: one of the equal parts of each batch; their number decides the weights, the number of workers does not.",
    ),
    ("Goodput", "Goodput: the share of all the time that went into steps that count."),
    ("Data wait", "Data wait: the share of the steps' time in which they waited for data."),
    ("Recovery", "Recovery: from a failure to the next step."),
    ("Checkpoint stall", "Checkpoint stall: what checkpoints held up training."),
)


def _times(run: RunFiles) -> Html:
    split = time_split(run.summary)
    if not split:
        return NOTHING
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
        return NOTHING
    parts, ratios = profile["parts_seconds"], profile["parts_ratio"]
    rows = [(part, duration(parts[part]), percent(ratios[part])) for part in parts if parts[part]]
    ceilings, work = profile["ceilings"], profile["work"]
    known = (
        (f"Work of {_a(one_of(run.info.unit))}", flops(work["flops_per_image"]), size(work["bytes_per_image"])),
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
    unusual = [event for event in run.events if is_unusual(event)]
    if not run.events:
        return NOTHING
    if not unusual:
        return section("Failures", tag("p", "None."))
    begin = began(run.events)
    groups = _grouped(unusual)
    told = [_event(group, begin) for group in groups[:SHOWN_FAILURES]]
    rest = sum(len(group) for group in groups[SHOWN_FAILURES:])
    more = tag("p", f"and {rest} more in journal.jsonl") if rest > 0 else NOTHING
    return section("Failures, restarts and stops", tag("div", *told, class_="events"), more)


def _grouped(events: Iterable[Event]) -> list[list[Event]]:
    """The events in order. Consecutive failed checkpoints that differ only in numbers form one group: a full disk fails them all."""
    groups: list[list[Event]] = []
    for event in events:
        if groups and event.get("event") == "checkpoint_failed" and _alike(groups[-1][-1]) == _alike(event):
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _alike(event: Event) -> dict[str, str]:
    return {key: re.sub(r"\d+", "0", str(value)) for key, value in event.items() if key not in ("time", "step")}


def _event(group: Sequence[Event], begin: float | None) -> Html:
    event = group[0]
    what = str(event.get("event")).replace("_", " ")
    times = "" if len(group) == 1 else f", {len(group)} times"
    clock, since = _moment(event.get("time"), begin)
    sentence = capital(words_of(event)) or plainly(event)
    parts = [tag("p", tag("span", f"{what}{times}", class_="what"), tag("span", f" {sentence}", class_="wrap"))]
    if len(group) > 1 and "step" in event:
        parts.append(tag("p", f"steps {number(event['step'])} to {number(group[-1].get('step'))}", class_="soft"))
    if not is_told_whole(event):
        fields = "\n".join(f"{key}={short(value)}" for key, value in event.items() if key not in ("time", "event", "writer"))
        parts.append(tag("details", tag("summary", "all of it"), tag("pre", fields)))
    return tag("div", tag("span", since, class_="when", title=clock), tag("div", *parts))


def _moment(when: object, begin: float | None) -> tuple[str, str]:
    """The time of day, and the time since `begin`."""
    seconds = number_or_none(when)
    if seconds is None:
        return "", "?"
    clock = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return clock, clock if begin is None else f"+{duration(max(0.0, seconds - begin))}"


def _quarantine(run: RunFiles) -> Html:
    """Every sample that was left out, by the conversion of the data or by the run."""
    records, unit = run.left_out.records, run.info.unit
    counted = run.summary.get("quarantined")
    known = max(len(records), int(counted) if isinstance(counted, int | float) else 0)
    if not known:
        return NOTHING
    kinds = Counter(str(record.get("reason", "?")).partition(":")[0] for record in records)
    by_kind = f": {', '.join(f'{number(count)} {short(kind, 40)}' for kind, count in kinds.most_common(8))}" if kinds else ""
    told = [f"{samples(known, unit)} left out{by_kind}."]
    if known > len(records):
        told.append(f"Of {samples(known - len(records), unit)} it is not recorded any more which and why.")
    pictured = sorted(range(len(records)), key=lambda index: index not in run.left_out.pictures)[:SHOWN_QUARANTINED]
    rows = [_left_out_row(records[index], run.left_out.pictures.get(index)) for index in pictured]
    rest = len(records) - len(rows)
    more = tag("p", f"and {number(rest)} more in quarantine.jsonl") if rest > 0 else NOTHING
    listed = table(("", "which and why", "split", "found by"), rows) if rows else NOTHING
    return section(f"{capital(unit)} that could not be used", tag("p", " ".join(told)), listed, more)


def _left_out_row(record: Mapping[str, object], picture: str | None) -> tuple[object, ...]:
    key = short(record.get("key", "?"), 300)
    shown = image(src=picture, alt=f"{key}, left out", class_="small") if picture else ""
    said = tag("div", tag("div", key, class_="wrap"), tag("div", short(record.get("reason", "?")), class_="soft wrap"))
    return shown, said, short(record.get("split", ""), 40), short(record.get("stage", "the run"), 40)


def _settings(run: RunFiles) -> Html:
    parts: list[Html] = []
    command = run.summary.get("command") or last(run.events, "run_started", "command")
    if command:
        parts += [tag("h3", "Started with"), tag("pre", command)]
    if run.config_text:
        # A config in an object store has to be fetched first; the command then finds it in the current folder.
        path = "config.toml" if "://" in run.location else f"{run.location}/config.toml"
        words = ["python", "-m", "trainer.run", "--config", path, "--run", f"{run.name}-again"]
        parts += [tag("h3", "The same again, as another run"), tag("pre", shlex.join(words))]
    facts = [
        (name, run.summary.get(key))
        for name, key in (("Weights SHA-256", "weights_sha256"), ("Data set fingerprint", "dataset_fingerprint"))
    ]
    versions = run.summary.get("versions") or last(run.events, "run_started", "versions")
    if isinstance(versions, Mapping):
        facts += sorted(versions.items())
    known = [(name, tag("code", value, class_="wrap")) for name, value in facts if value]
    if known:
        parts += [tag("h3", "Identity and versions"), table((), known)]
    if run.config_text:
        parts += [
            tag("h3", "Settings"),
            tag("p", " ".join(sentence for word, sentence in _WORDS if word in run.config_text), class_="soft"),
            tag("details", tag("summary", "config.toml"), tag("pre", run.config_text)),
        ]
    return section("Reproduce", *parts) if parts else NOTHING


_WORDS = (
    ("stem", "Stem (model.stem): the model's first layers, which may be fitted to small inputs."),
    ("virtual_ranks", "Virtual ranks (train.virtual_ranks): the equal parts into which each batch is cut, whatever the number of workers."),
    ("ema", "EMA (train.ema): an average of the weights over the last steps."),
)
"""Words of the settings that not everybody knows."""


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"
