"""Panel `classes`: recall, precision and F1 of each class, the weakest first."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.files import RunFiles, class_names
from trainer.report.page import NOTHING, Html, number_or_none, section, table, tag
from trainer.settings.units import number, percent


def panel(run: RunFiles) -> Html:
    scores = entries_of(run.summary.get("per_class"))
    if not scores:
        return NOTHING
    unit = run.info.unit
    explained = tag(
        "p", f"Weakest first. Recall: how many {unit} of the class are found. Precision: how many {unit} given this name deserve it."
    )
    return section("Classes", explained, classes_table(scores, class_names(run.summary.get("classes"), len(scores)), unit))


def entries_of(value: object) -> list[Mapping[str, Any]]:
    """The entries of a list in a summary that are objects."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def classes_table(scores: Sequence[Mapping[str, Any]], names: Sequence[str], unit: str) -> Html:
    weakest_first = sorted(range(len(scores)), key=lambda index: (number_or_none(scores[index].get("f1")) or 0.0, index))
    rows = [
        (
            names[index],
            *(percent(number_or_none(scores[index].get(key))) for key in ("recall", "precision", "f1")),
            number(scores[index].get("support")),
        )
        for index in weakest_first
    ]
    return table(("class", "recall", "precision", "F1", unit), rows, numeric=(1, 2, 3, 4))
