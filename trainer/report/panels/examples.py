"""Panel `examples`: the worst test samples. Of a classification the surest wrong answers; of another task those of the largest loss, with
what the model said of them: a word or two for each column of predictions.parquet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.report.files import RunFiles, class_names, confusion_of
from trainer.report.page import NOTHING, Html, section, short, table, tag
from trainer.report.panels.classes import entries_of
from trainer.report.panels.pictures import labelled_picture, picture
from trainer.report.thumbnails import worst_rows
from trainer.settings.units import percent
from trainer.tasks.predictions import Predictions

LISTED_OF_MANY = 3  # of a column of many numbers, the largest
SHOWN_COLUMNS = 12


def panel(run: RunFiles) -> Html:
    found = run.predictions
    if found is None:
        return NOTHING
    worst = list(run.thumbnails.worst) or worst_rows(found)
    if not worst:
        return NOTHING
    return _mistakes(run, found, worst) if found.is_classification else _largest_losses(run, found, worst)


def _mistakes(run: RunFiles, found: Predictions, worst: Sequence[int]) -> Html:
    names = class_names(run.summary.get("classes"), len(confusion_of(run.summary)))
    about = "Wrong answers, the surest first. An answer's percentage is the probability that the model gave it."
    sources = run.thumbnails.sources
    pictured = [row for row in worst if row in sources]
    if pictured:
        figures = (labelled_picture(row, names, found, sources[row], said=True) for row in pictured)
        return section("Worst mistakes", tag("p", about, class_="soft"), tag("div", *figures, class_="thumbnails worst"))
    rows = [
        (
            found.keys[row],
            names[found.labels[row]],
            names[found.answers[row]],
            percent(float(found.confidence[row])),
            f"{found.losses[row]:.2f}",
        )
        for row in worst
    ]
    told = tag("p", f"{about} {run.no_thumbnails}".strip(), class_="soft")
    return section("Worst mistakes", told, table(("key", "is", "is taken for", "sure", "loss"), rows, numeric=(3, 4)))


def _largest_losses(run: RunFiles, found: Predictions, worst: Sequence[int]) -> Html:
    title = f"Worst {run.info.unit}"
    about = f"Those {run.info.unit} on which the model's loss is largest."
    names = [str(entry.get("name")) for entry in entries_of(run.summary.get("labels"))]
    said = {row: said_of(found, row, names) for row in worst}
    sources = run.thumbnails.sources
    pictured = [row for row in worst if row in sources]
    if pictured:
        figures = (_picture(found, row, said[row], sources[row]) for row in pictured)
        notes = tag("p", " ".join([about, *run.thumbnails.notes]), class_="soft")
        return section(title, notes, tag("div", *figures, class_="thumbnails worst"))
    columns = list(dict.fromkeys(name for row in worst for name in said[row]))
    rows = [
        (short(found.keys[row], 200), *(said[row].get(name, "") for name in columns), f"{found.columns['loss'][row]:.3g}") for row in worst
    ]
    notes = tag("p", f"{about} {run.no_thumbnails}".strip(), class_="soft")
    return section(title, notes, table(("key", *columns, "loss"), rows, numeric=(len(columns) + 1,)))


def _picture(found: Predictions, row: int, said: Mapping[str, str], source: str) -> Html:
    key = short(found.keys[row], 200)
    loss = f"loss {found.columns['loss'][row]:.3g}"
    lines = [tag("span", loss), *(tag("span", f"{name}: {words}") for name, words in said.items()), tag("span", key, class_="id")]
    what = ", ".join(f"{name} {words}" for name, words in said.items())
    return picture(source, lines, alt=f"{key}: {what}, {loss}", title=f"{key}, {loss}", kind="wrong")


def said_of(found: Predictions, row: int, names: Sequence[str]) -> dict[str, str]:
    """By column but the loss: a number as it is; of many numbers the largest three that are half or more, by `names` where those fit."""
    told: dict[str, str] = {}
    for name, values in found.columns.items():
        if name == "loss" or len(told) >= SHOWN_COLUMNS:
            continue
        told[short(name.replace("_", " "), 60)] = _many(values[row], names) if values.ndim > 1 else _one(values[row])
    return told


def _one(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, np.floating) else short(value, 80)


def _many(values: Any, names: Sequence[str]) -> str:
    shown = [int(index) for index in np.argsort(-values.astype(np.float64), kind="stable") if values[index] >= 0.5]
    words = [short(names[index], 60) if len(names) == len(values) else str(index) for index in shown[:LISTED_OF_MANY]]
    more = f" and {len(shown) - LISTED_OF_MANY} more" if len(shown) > LISTED_OF_MANY else ""
    return f"{', '.join(words)}{more}" if words else "none"
