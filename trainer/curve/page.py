"""The page of a curve: one file without a script, made of the report's parts. __main__.py writes it."""

from collections.abc import Sequence

import numpy as np

from trainer.curve.next_labels import ToLabel
from trainer.curve.plan import rule_words
from trainer.curve.power_law import LEVEL, CannotTell, Fit, Point
from trainer.curve.results import Curve, noise_words, sentences, wanted_words
from trainer.report.page import Html, page, section, short, table, tag
from trainer.report.plots import CurveOverSizes, curves_over_sizes
from trainer.runs.measures import heading
from trainer.settings.units import number, percent

PAGE_TITLE = "How many more labels"
DRAWN_CLASSES = 6
DRAWN_POINTS = 80
TEXT_CHARACTERS = 300
"""Of a text to label next, the beginning."""


def drawn(curve: Curve, next_rows: Sequence[ToLabel] | None = None) -> str:
    """The page as HTML. `next_rows`: the samples to label next; None: none were asked about."""
    said = sentences(curve)
    mood = "warn" if isinstance(curve.outcome, CannotTell) else "good"
    head = tag("header", tag("h1", PAGE_TITLE), tag("p", said[0], class_=f"verdict {mood}"))
    parts = [head, _main(curve), _sizes(curve)]
    if curve.classes:
        parts.append(_classes(curve, said[1:]))
    parts.append(_next(curve, next_rows))
    return page(PAGE_TITLE, *parts)


def _main(curve: Curve) -> Html:
    line = _curve(heading(curve.info.headline), curve.points, curve.outcome)
    figure = curves_over_sizes([line], x=f"labelled {curve.info.unit}", ident="law")
    outcome = curve.outcome
    rule = ""
    if isinstance(outcome, Fit):
        law = outcome.law
        rule = (
            f"The line: error(n) = {law.a:.4g} + {law.b:.4g} n^-{law.c:.3g}, the middle of the curves that fit the points. The diamond "
            f"is what twice the labels would bring, its bar the {LEVEL:.0%} interval of a run. "
        )
    return section("The curve", tag("figure", figure), tag("p", rule, noise_words(curve), class_="soft"))


def _curve(label: str, points: tuple[Point, ...], outcome: Fit | CannotTell) -> CurveOverSizes:
    pairs = [(point.samples, error) for point in points for error in point.errors]
    seen = np.array([pair[0] for pair in pairs], dtype=np.float64), 100 - 100 * np.array([pair[1] for pair in pairs])
    if isinstance(outcome, CannotTell):
        return CurveOverSizes(label=label, seen=seen)
    twice = outcome.twice
    sizes = np.geomspace(points[0].samples, twice.samples, DRAWN_POINTS)
    return CurveOverSizes(
        label=label,
        seen=seen,
        line=(sizes, 100 - 100 * np.array([outcome.law.at(size) for size in sizes])),
        foretold=(float(twice.samples), 100 - 100 * twice.error, 100 - 100 * twice.high, 100 - 100 * twice.low),
    )


def _sizes(curve: Curve) -> Html:
    rows = [
        (number(point.samples), number(len(point.errors)), ", ".join(percent(1 - error, 2) for error in point.errors))
        for point in curve.points
    ]
    head = (f"labelled {curve.info.unit}", "runs", heading(curve.info.headline))
    note = f"Each size's {curve.info.unit} lie within the next one's. The rule of the runs: {rule_words(curve.info.unit)}."
    return section("The runs", table(head, rows, numeric=(0, 1)), tag("p", note, class_="soft"))


def _classes(curve: Curve, said: list[str]) -> Html:
    rows: list[tuple[object, ...]] = []
    for each in curve.classes:
        if isinstance(each.outcome, CannotTell):
            rows.append((each.name, number(each.tested), "", "", "", tag("span", each.outcome.reason, class_="soft wrap")))
            continue
        gain, fit = each.outcome.gain, each.outcome
        spread = f"{100 * gain.low:.1f} to {100 * gain.high:.1f}"
        rows.append(
            (
                each.name,
                number(each.tested),
                percent(1 - fit.now.error),
                percent(1 - fit.twice.error),
                f"{100 * gain.error:+.1f} ({spread})",
                f"a run is off by {100 * fit.noise:.1f} points",
            )
        )
    head = ("class", f"test {curve.info.unit}", "recall now", "with twice the labels", f"points gained ({LEVEL:.0%})", "noise")
    lines = [_curve(each.name, each.points, each.outcome) for each in curve.classes if isinstance(each.outcome, Fit)][:DRAWN_CLASSES]
    figure = tag("figure", curves_over_sizes(lines, x=f"labelled {curve.info.unit} of all classes", ident="classes")) if lines else Html("")
    return section("Class by class", *(tag("p", line) for line in said), figure, table(head, rows, numeric=(1, 2, 3)))


def _next(curve: Curve, rows: Sequence[ToLabel] | None) -> Html:
    if rows is None:
        return section("Which to label next", tag("p", wanted_words(curve)))
    rule = (
        f"Of the {curve.info.unit} that the model is least sure of (the smallest margin between its two best answers), such as differ from "
        "each other; label-next.csv has all of them."
    )
    unit = curve.info.unit.removesuffix("s")
    listed = [(each.rank, short(each.text, TEXT_CHARACTERS) or each.name, each.guess, each.margin) for each in rows[:50]]
    return section("Which to label next", tag("p", rule), table(("", unit, "the model's guess", "margin"), listed, numeric=(0, 3)))
