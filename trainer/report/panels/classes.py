"""Panel `classes`: recall, precision and F1 of each class, the weakest first; `-` where no test sample measured it."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.files import RunFiles, class_names
from trainer.report.page import NOTHING, Html, section, table, tag
from trainer.runs.certainty import NOT_MEASURED, given_of, in_percent, measured_scores, recall_interval
from trainer.settings.units import number, percent


def panel(run: RunFiles) -> Html:
    scores = entries_of(run.summary.get("per_class"))
    if not scores:
        return NOTHING
    unit = run.info.unit
    explained = tag(
        "p",
        f"Weakest first. Recall: how many {unit} of the class are found, with its 95 % interval: how far chance moves it with so many test "
        f"{unit}. Precision: how many {unit} given this name deserve it. {NOT_MEASURED}: nothing was measured.",
    )
    names = class_names(run.summary.get("classes"), len(scores))
    return section("Classes", explained, classes_table(scores, names, unit, given_of(run.summary.get("confusion"), len(scores))))


def entries_of(value: object) -> list[Mapping[str, Any]]:
    """The entries of a list in a summary that are objects."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def classes_table(scores: Sequence[Mapping[str, Any]], names: Sequence[str], unit: str, given: Sequence[int] | None) -> Html:
    """`given`: how many samples got each class as an answer; None if that is not known."""
    measured = [measured_scores(entry, given[index] if given else None) for index, entry in enumerate(scores)]

    def weakness(index: int) -> tuple[bool, float, int]:
        f1 = measured[index]["f1"]
        return f1 is None, f1 or 0.0, index  # what was not measured is not weak, and comes last

    rows = []
    for index in sorted(range(len(scores)), key=weakness):
        recall, precision, f1 = (_share(measured[index][name]) for name in ("recall", "precision", "f1"))
        interval = recall_interval(scores[index])
        rows.append((names[index], recall, in_percent(interval) if interval else "", precision, f1, number(scores[index].get("support"))))
    return table(("class", "recall", "95 % interval", "precision", "F1", unit), rows, numeric=(1, 2, 3, 4, 5))


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else percent(value)
