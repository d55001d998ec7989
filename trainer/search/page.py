"""The page of a search: one file without a script, made of the report's parts. __main__.py writes it."""

from collections.abc import Mapping

import numpy as np

from trainer.report.page import NOTHING, Html, page, section, table, tag
from trainer.report.plots import Parallel, parallel
from trainer.runs.measures import heading, in_words, shown
from trainer.search.importance import FEWEST
from trainer.search.results import Search, Tried, score_words, sentences, time_words, value_words
from trainer.search.space import Axis
from trainer.settings.units import duration, number, percent

PAGE_TITLE = "A search for better settings"
_ENDS = {"finished": "trained to the end", "stopped": "stopped", "diverged": "diverged"}


def drawn(search: Search, seconds: Mapping[str, float], wall_seconds: float) -> str:
    """The page as HTML. `seconds`: of all trials' runs by cause; `wall_seconds`: their sum."""
    said = sentences(search)
    mood = "good" if search.gain is not None and search.gain.is_sure and search.gain.best > search.gain.own else "warn"
    head = tag("header", tag("h1", PAGE_TITLE), tag("p", said[0], class_=f"verdict {mood}"))
    return page(
        PAGE_TITLE,
        head,
        *(tag("p", line) for line in said[1:]),
        _picture(search),
        _trials(search),
        _matters(search),
        _time(seconds, wall_seconds),
    )


def _picture(search: Search) -> Html:
    known = [each for each in search.tried if each.score is not None]
    if len(known) < 2:
        return NOTHING
    scores = [each.score for each in known if each.score is not None]
    figure = parallel(
        [_labels(axis) for axis in search.space],
        [
            Parallel(
                places=tuple(_place(axis, each) for axis in search.space),
                score=float(score),
                is_marked=each.number == search.best,
                is_whole=each.end == "finished",
            )
            for each, score in zip(known, scores, strict=True)
        ],
        score=in_words(search.measure, "validation"),
        is_ratio=search.measure.unit == "ratio",
        ident="trials",
    )
    note = (
        "Each line is a trial, from its settings to its score: whole runs drawn through, those that were stopped early dashed, with their "
        "score there, and the best in the strong colour."
    )
    return section("The trials", tag("figure", figure), tag("p", note, class_="soft"))


def _place(axis: Axis, tried: Tried) -> float:
    place = axis.place(tried.values[axis.key])
    return np.nan if place is None else place


def _labels(axis: Axis) -> tuple[str, list[tuple[float, str]]]:
    if axis.values:
        return axis.key, [(place, value_words(value)) for value in axis.values if (place := axis.place(value)) is not None]
    return axis.key, [(0.0, value_words(axis.low)), (1.0, value_words(axis.high))]


def _trials(search: Search) -> Html:
    headline = search.info.headline
    rows = [
        (
            tag("b" if each.number == search.best else "span", each.name, style="white-space:nowrap"),
            *(value_words(each.values[axis.key]) for axis in search.space),
            number(each.epochs),
            score_words(search.measure, each.score),
            "" if each.test is None else shown(headline.unit, each.test, 2),
            _ENDS[each.end] + (f": {each.diverged}" if each.diverged else ""),
        )
        for each in search.tried
    ]
    head = ("run", *(axis.key for axis in search.space), "epochs", heading_of(search), heading(headline), "")
    numeric = tuple(range(1, len(search.space) + 4))
    note = (
        f"Scores of different epochs do not compare. {search.own.name} has the settings as they were given. Which is best, the "
        "validation split alone has said."
    )
    return section("Trial by trial", table(head, rows, numeric=numeric), tag("p", note, class_="soft"))


def heading_of(search: Search) -> str:
    words = in_words(search.measure, "validation")
    return words[:1].upper() + words[1:]


def _matters(search: Search) -> Html:
    if not search.matters:
        return section("What mattered", tag("p", f"Too few trials to say, or no difference between them: {FEWEST} are the fewest."))
    rows = [(each.key, percent(each.share), percent(each.chance)) for each in search.matters]
    note = (
        f"How much of the scores after {number(search.rungs[0])} epoch{'s' if search.rungs[0] > 1 else ''} the setting explains by itself, "
        "beyond chance, and how often scores in a random order are explained as well: above 5 % it may be chance."
    )
    return section("What mattered", table(("setting", "explains", "by chance"), rows, numeric=(1, 2)), tag("p", note, class_="soft"))


def _time(seconds: Mapping[str, float], wall_seconds: float) -> Html:
    rows = [(cause.replace("_", " "), duration(each)) for cause, each in sorted(seconds.items(), key=lambda pair: -pair[1]) if each >= 0.5]
    return section("Where the time went", tag("p", time_words(seconds, wall_seconds)), table(("of all trials", ""), rows, numeric=(1,)))
