"""The report's parts about time: the run second by second with its failures, and the ranks next to each other. Called by sections.

`trainer.runs.summary.timeline` makes the spans; the account of seconds uses the same ones.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.page import NOTHING, Html, join, number_or_none, section, short, table, tag
from trainer.runs.measures import capital
from trainer.runs.summary import Span, timeline
from trainer.settings.units import duration, number, percent

COLOURS = {
    "steps": "s3",
    "training": "s3",
    "data wait": "s4",
    "exchange wait": "s6",
    "checkpoint stall": "s1",
    "evaluation": "s0",
    "start up": "s5",
    "compile": "s7",
    "recovery": "s2",
    "resize": "s0",
    "hang": "s1",
    "lost work": "bad",
    "other": "line",
}
"""A colour for each cause, the same in every report: productive time is green, lost time red."""
SPANS = 1500
"""With more spans than this, neighbours are drawn as one: a span would be far below a pixel."""
LISTED_FAILURES = 50
MARK_EVERY = 0.035  # of the timeline's width: closer marks are drawn as one
SHOWN_RANKS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A failure and its cost."""

    at: float
    """Seconds along the timeline."""
    since_seconds: float
    """Wall-clock seconds since the run began."""
    event: Mapping[str, Any]
    back_seconds: float | None
    """Seconds to the next step; None if there was none."""


def colour(cause: str) -> str:
    return f"var(--{COLOURS.get(cause, 's5')})"


def totals(sessions: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Seconds by cause, in order of first appearance."""
    out: dict[str, float] = {}
    for span in itertools.chain.from_iterable(sessions):
        out[span.cause] = out.get(span.cause, 0.0) + span.seconds
    return out


def failures(events: Sequence[Mapping[str, Any]], sessions: Sequence[Sequence[Span]]) -> list[Lost]:
    """Each `attempt_failed` event of the journal, in order."""
    found = []
    offset = 0.0
    for spans in sessions:
        if not spans:
            continue
        begin, end = spans[0].begin, spans[-1].end
        for event in events:
            when = number_or_none(event.get("time"))
            if event.get("event") != "attempt_failed" or when is None or not begin <= when <= end:
                continue
            going = next((span.begin for span in spans if span.end > when and span.cause in ("training", "lost_work", "compile")), None)
            found.append(
                Lost(
                    at=offset + when - begin,
                    since_seconds=when - sessions[0][0].begin,
                    event=event,
                    back_seconds=None if going is None else max(0.0, going - when),
                )
            )
        offset += end - begin
    return found


def timeline_section(events: Sequence[Mapping[str, Any]]) -> Html:
    """The timeline; nothing if the journal covers no time."""
    sessions = [spans for spans in timeline(_sound(events)) if spans]
    whole = sum(totals(sessions).values())
    if whole <= 0:
        return NOTHING
    by_cause = totals(sessions)
    legend = tag(
        "p",
        *(
            tag("span", _key(cause.replace("_", " ")), f"{cause.replace('_', ' ')} {duration(seconds)}", class_="nobreak")
            for cause, seconds in sorted(by_cause.items(), key=lambda item: -item[1])
        ),
        class_="legend",
    )
    lost = failures(events, sessions)
    off = [later[0].begin - earlier[-1].end for earlier, later in itertools.pairwise(sessions)]
    words = ", ".join(f"{cause.replace('_', ' ')} {percent(seconds / whole)}" for cause, seconds in by_cause.items())
    bar = tag("div", *_drawn(sessions, whole, off), class_="timeline", role="img", aria_label=f"The run's {duration(whole)}: {words}")
    axis = tag("div", tag("span", "0 s"), tag("span", duration(whole)), class_="axis")
    gaps = ""
    if off:
        what = "A gap is" if len(off) == 1 else "Gaps are"
        gaps = f"{what} where nobody was running: {duration(sum(off))}, not counted."
    about = tag(
        "p", f"From the first second to the last. Training is steps, their waits, tests and checkpoints. {gaps}".rstrip(), class_="soft"
    )
    marks = tag("div", *_marks(lost, whole), class_="marks") if lost else NOTHING
    return section("The run in time", about, marks, bar, axis, legend, _listed(lost))


def _sound(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Drops events that lack fields an account needs, so that a damaged journal costs its timeline only those."""
    needs = {"checkpoint_committed": "step", "attempt_started": "start_step"}

    def is_sound(event: Mapping[str, Any]) -> bool:
        name = event.get("event")
        key = needs.get(str(name))
        numbers = [event.get("time"), *(event[word] for word in ("seconds", "process_started") if word in event)]
        if name == "account":  # holds many seconds
            return False
        return isinstance(name, str) and None not in map(number_or_none, numbers) and (key is None or isinstance(event.get(key), int))

    return [event for event in events if is_sound(event)]


def _drawn(sessions: Sequence[Sequence[Span]], whole: float, off: Sequence[float]) -> list[Html]:
    parts = []
    for index, spans in enumerate(sessions):
        for cause, seconds, at in _merged(spans, whole / SPANS if sum(map(len, sessions)) > SPANS else 0.0):
            name = cause.replace("_", " ")
            title = f"{name}: {duration(seconds)}, from +{duration(at - spans[0].begin)} on"
            parts.append(tag("i", style=f"flex:{seconds / whole:.6f} 0 0;background:{colour(name)}", title=title))
        if index < len(off):
            parts.append(tag("i", class_="off", title=f"nobody was running for {duration(off[index])}"))
    return parts


def _merged(spans: Sequence[Span], shortest: float) -> list[tuple[str, float, float]]:
    """(cause, seconds, begin); spans are merged until they last `shortest`, under the cause with the largest part."""
    out: list[tuple[str, float, float]] = []
    held: list[Span] = []
    for span in spans:
        held.append(span)
        seconds = held[-1].end - held[0].begin
        if seconds >= shortest or span is spans[-1]:
            most = totals([held])
            out.append((max(most, key=lambda cause: most[cause]), seconds, held[0].begin))
            held = []
    return out


def _marks(lost: Sequence[Lost], whole: float) -> list[Html]:
    groups: list[list[int]] = []
    for index, failure in enumerate(lost):
        if groups and (failure.at - lost[groups[-1][0]].at) / whole < MARK_EVERY:
            groups[-1].append(index)
        else:
            groups.append([index])
    marks = []
    for group in groups:
        first, last = group[0], group[-1]
        label = str(first + 1) if first == last else f"{first + 1}–{last + 1}"
        title = "; ".join(_brief(lost[index]) for index in group[:8]) + ("; ..." if len(group) > 8 else "")
        at = 100 * lost[first].at / whole
        side = "right" if at > 90 else "left"
        place = f"{side}:{100 - at if side == 'right' else at:.3f}%"
        marks.append(tag("a", label, href=f"#failure-{min(first + 1, LISTED_FAILURES)}", style=place, class_=side, title=title))
    return marks


def _brief(failure: Lost) -> str:
    return f"{failure.event.get('kind', '?')}, {_steps(failure.event)} lost"


def _steps(event: Mapping[str, Any]) -> str:
    lost = event.get("lost_steps")
    return "?" if not isinstance(lost, int) else "1 step" if lost == 1 else f"{number(lost)} steps"


def _listed(lost: Sequence[Lost]) -> Html:
    if not lost:
        return NOTHING
    rows = [
        (
            tag("b", index + 1, id=f"failure-{index + 1}"),
            f"+{duration(failure.since_seconds)}",
            "" if failure.event.get("rank") is None else failure.event["rank"],
            tag("span", short(str(failure.event.get("message", "")).strip().partition("\n")[0], 160), class_="wrap"),
            _steps(failure.event),
            "never" if failure.back_seconds is None else duration(failure.back_seconds),
        )
        for index, failure in enumerate(lost[:LISTED_FAILURES])
    ]
    more = tag("p", f"and {number(len(lost) - LISTED_FAILURES)} more", class_="soft") if len(lost) > LISTED_FAILURES else NOTHING
    head = ("failure", "at", "rank", "what", "lost", "back at work after")
    return join([table(head, rows, numeric=(1, 2, 4, 5)), more])


def _key(cause: str) -> Html:
    return tag("i", class_="key", style=f"background:{colour(cause)}")


def ranks_section(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]], unit: str = "images") -> Html:
    """How fast each rank is by itself, and how its steps divide: for the last attempt, from summary.json."""
    entries = [entry for entry in summary.get("ranks") or [] if isinstance(entry, Mapping)]
    measured = {rank: split for rank, entry in enumerate(entries) if (split := _split(entry)) is not None}
    if not measured:
        return NOTHING
    hosts = {event["rank"]: event.get("host") for event in events if event.get("event") == "worker_registered" and "rank" in event}
    slowest_first = sorted(measured, key=lambda rank: (measured[rank][0], rank))
    shown = sorted(measured) if len(measured) <= SHOWN_RANKS else slowest_first[: SHOWN_RANKS // 2] + slowest_first[-SHOWN_RANKS // 2 :]
    longest = max(sum(parts.values()) for _, parts in measured.values())
    rows = []
    for rank in shown:
        rate, parts = measured[rank]
        whole = sum(parts.values())
        told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        bar = tag(
            "div",
            *(
                tag("i", style=f"flex:{seconds / longest:.6f} 0 0;background:{colour(name)}")
                for name, seconds in parts.items()
                if seconds > 0
            ),
            tag("i", style=f"flex:{1 - whole / longest:.6f} 0 0"),
            class_="bar thin",
            role="img",
            aria_label=told,
            title=told,
        )
        rows.append((rank, hosts.get(rank) or "", number(float(f"{rate:.4g}")), duration(whole), bar))
    rates = [rate for rate, _ in measured.values()]
    seen = "the slowest and the fastest of them" if len(shown) < len(measured) else ""
    spread = f" The slowest does {percent(min(rates) / statistics.median(rates))} of the median." if len(rates) > 1 else ""
    of = f", {seen}" if seen else ""
    about = f"Of the last attempt{of}. {capital(unit)} a second: what the rank would do if it never waited for another.{spread}"
    legend = tag(
        "p",
        *(tag("span", _key(name), name, class_="nobreak") for name in ("steps", "data wait", "exchange wait", "checkpoint stall")),
        class_="legend",
    )
    head = ("rank", "host", f"{unit}/s", "a step takes", "of which")
    return section("Ranks", tag("p", about, class_="soft"), table(head, rows, numeric=(0, 2, 3)), legend)


def _split(entry: Mapping[str, Any]) -> tuple[float, dict[str, float]] | None:
    """(images a second of the rank alone, seconds of a step by part); None if it did no step."""
    values = {
        name: number_or_none(entry.get(name))
        for name in ("steps", "images", "step_seconds", "data_wait_seconds", "exchange_wait_seconds", "checkpoint_stall_seconds")
    }
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < len(values) or known["steps"] <= 0:
        return None
    waits = known["data_wait_seconds"] + known["exchange_wait_seconds"]
    own = known["step_seconds"] - known["exchange_wait_seconds"]
    steps = known["steps"]
    parts = {
        "steps": max(0.0, known["step_seconds"] - waits) / steps,
        "data wait": known["data_wait_seconds"] / steps,
        "exchange wait": known["exchange_wait_seconds"] / steps,
        "checkpoint stall": known["checkpoint_stall_seconds"] / steps,
    }
    return (known["images"] / own, parts) if own > 0 else None
