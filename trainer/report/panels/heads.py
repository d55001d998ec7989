"""Panel `heads`: for a task with several targets, a part for each. The evaluation's `heads` is {name: {kind, weight, loss, count, measures,
details}}. `details` is what a task with only that target would have written: per_class, confusion and classes for a label, labels for
several labels, nothing for a number.
"""

from collections.abc import Mapping
from typing import Any

from trainer.report.files import RunFiles, class_names, matrix_of
from trainer.report.page import NOTHING, Html, join, number_or_none, section, short, table, tag
from trainer.report.panels.classes import classes_table, entries_of
from trainer.report.panels.confusion import grid
from trainer.report.panels.labels import labels_parts
from trainer.report.panels.numbers import number_figures
from trainer.runs.certainty import given_of
from trainer.runs.measures import samples, shown
from trainer.settings.units import number

GRID_CLASSES = 20
"""A larger confusion matrix is left to summary.json, so that a page with many heads stays readable."""
_KINDS = {"label": "one label of several", "labels": "any number of labels", "number": "a number"}


def panel(run: RunFiles) -> Html:
    heads = run.summary.get("heads")
    known = {str(name): head for name, head in heads.items() if isinstance(head, Mapping)} if isinstance(heads, Mapping) else {}
    if not known:
        return NOTHING
    rows = [
        (
            tag("a", short(name, 120), href=f"#head-{index}"),
            str(head.get("kind", "?")),
            number(number_or_none(head.get("weight"))),
            number(number_or_none(head.get("loss"))),
            number(head.get("count")),
            ", ".join(f"{title} {text}" for title, text in _measures(head)),
        )
        for index, (name, head) in enumerate(known.items())
    ]
    overview = table(("head", "kind", "weight", "loss", run.info.unit, "measures"), rows, numeric=(2, 3, 4))
    return section("Heads", overview, *(_head(run, name, head, index) for index, (name, head) in enumerate(known.items())))


def _head(run: RunFiles, name: str, head: Mapping[str, Any], index: int) -> Html:
    kind = str(head.get("kind", "?"))
    count = number_or_none(head.get("count"))
    about = f"{_KINDS.get(kind, kind)}, known of {samples(round(count), run.info.unit)}" if count is not None else _KINDS.get(kind, kind)
    cards = tag("dl", *(tag("div", tag("dt", title), tag("dd", text)) for title, text in _measures(head)))
    title = tag("h3", short(name, 120), tag("span", f" ({about})", class_="soft"), id=f"head-{index}")
    details = head.get("details")
    body = _details(details if isinstance(details, Mapping) else {}, run.info.unit)
    figures = number_figures(run.predictions, name, f"h{index}") if kind == "number" else NOTHING
    return tag("div", title, cards, body, figures, class_="head")


def _details(details: Mapping[str, Any], unit: str) -> Html:
    """Chosen by the keys present, not by the kind: a head of an outside task may have any of them."""
    parts: list[Html] = []
    matrix = matrix_of(details.get("confusion"))
    if 0 < len(matrix) <= GRID_CLASSES and matrix.sum():
        names = class_names(details.get("classes"), len(matrix))
        parts.append(grid(matrix, names, lambda cell: number(int(matrix[cell])) if matrix[cell] else ""))
    if scores := entries_of(details.get("per_class")):
        names = class_names(details.get("classes"), len(scores))
        parts.append(_folded("Classes", classes_table(scores, names, unit, given_of(details.get("confusion"), len(scores)))))
    if labels := entries_of(details.get("labels")):
        parts.append(labels_parts(labels, unit))
    return join(parts)


def _folded(title: str, inside: Html) -> Html:
    return tag("details", tag("summary", title), inside)


def _measures(head: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, value); a number's measures are in its own unit, all others are ratios."""
    said = head.get("measures")
    unit = "number" if head.get("kind") == "number" else "ratio"
    return [
        (short(_TITLES.get(str(key), str(key).replace("_", " ")), 60), shown(unit, number_or_none(value), 2))
        for key, value in (said.items() if isinstance(said, Mapping) else ())
    ]


_TITLES = {"map": "mAP", "micro_f1": "micro F1", "macro_f1": "macro F1", "mae": "MAE", "rmse": "RMSE", "r2": "R²"}
