"""Describes in words a test sample's true value and the model's answer, from the columns of predictions.parquet. For the panel `examples`.

The end of a column's name tells its role: `label`, `prediction`, `confidence` for one label; `labels`, `probabilities` for several;
`target`, `prediction` for a number. With several targets, each column begins with `NAME_`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.page import number_or_none, short
from trainer.report.panels.classes import entries_of
from trainer.settings.units import percent
from trainer.tasks.predictions import Predictions

LISTED = 3
"""Of several labels, at most this many are named; beyond that, their number is shown."""
NOT_KNOWN = "not known"
_TRUE, _SAID = ("labels", "label", "target"), ("probabilities", "prediction")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one target."""

    name: str
    """The target's name; empty if there is only one target."""
    true: str
    said: str
    is_right: bool | None
    """None for a number, which is never right to the last digit; an unknown value does not count as a mistake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """A target's class names, as far as the summary has them."""

    classes: Sequence[str] = ()
    thresholds: Sequence[float] = ()
    """For several labels: the threshold of each, from which it counts as given."""

    def of(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else str(index)


def names_of(summary: Mapping[str, Any]) -> dict[str, Names]:
    """By target; a single target has the name ""."""
    found = {"": _names(summary)}
    heads = summary.get("heads")
    for name, head in heads.items() if isinstance(heads, Mapping) else ():
        details = head.get("details") if isinstance(head, Mapping) else None
        found[str(name)] = _names(details if isinstance(details, Mapping) else {})
    return found


def _names(details: Mapping[str, Any]) -> Names:
    entries = entries_of(details.get("labels"))
    if entries:
        thresholds = [number_or_none(entry.get("threshold")) for entry in entries]
        return Names(
            classes=[short(entry.get("name", "?"), 60) for entry in entries],
            thresholds=[0.5 if threshold is None else threshold for threshold in thresholds],
        )
    return Names(classes=[short(name, 60) for name in details.get("classes") or []])


def answers_of(found: Predictions, row: int, names: Mapping[str, Names]) -> list[Answer]:
    """One for each target, in the order of the columns, which is the same for every row."""
    told = []
    for column in found.columns:
        end = next((end for end in _TRUE if column == end or column.endswith(f"_{end}")), None)
        if end is None:
            continue
        prefix = column.removesuffix(end)
        values = {each: found.columns[f"{prefix}{each}"][row] for each in (end, *_SAID, "confidence") if f"{prefix}{each}" in found.columns}
        name = prefix.removesuffix("_")
        answer = _ANSWERS[end](short(name, 60), values, names.get(name, Names()))
        if answer is not None:
            told.append(answer)
    return told


def _label(name: str, values: Mapping[str, Any], names: Names) -> Answer | None:
    if "prediction" not in values:
        return None
    true, said = int(values["label"]), int(values["prediction"])
    sure = f" ({percent(float(values['confidence']), 0)})" if "confidence" in values else ""
    is_known = true >= 0
    return Answer(
        name=name, true=names.of(true) if is_known else NOT_KNOWN, said=f"{names.of(said)}{sure}", is_right=not is_known or true == said
    )


def _labels(name: str, values: Mapping[str, Any], names: Names) -> Answer | None:
    if "probabilities" not in values:
        return None
    truth, probabilities = np.asarray(values["labels"]), np.asarray(values["probabilities"], dtype=np.float64)
    thresholds = np.array(names.thresholds) if len(names.thresholds) == len(truth) else np.full(len(truth), 0.5)
    given = probabilities >= thresholds
    surest_first = np.argsort(-probabilities, kind="stable")
    true = [names.of(int(index)) for index in np.flatnonzero(truth == 1)]
    said = [f"{names.of(int(index))} {percent(float(probabilities[index]), 0)}" for index in surest_first if given[index]]
    is_right = bool((((truth == 1) == given) | (truth < 0)).all())
    return Answer(name=name, true=_listed(true), said=_listed(said), is_right=is_right)


def _target(name: str, values: Mapping[str, Any], names: Names) -> Answer | None:
    if "prediction" not in values:
        return None
    true, said = float(values["target"]), float(values["prediction"])
    is_known = bool(np.isfinite(true))
    return Answer(name=name, true=f"{true:.4g}" if is_known else NOT_KNOWN, said=f"{said:.4g}", is_right=None)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return f"{', '.join(words[:LISTED])}{more}" if words else "none"


_ANSWERS = {"label": _label, "labels": _labels, "target": _target}
