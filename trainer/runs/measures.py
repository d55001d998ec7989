"""Puts an evaluation's numbers and counts of samples into words: titles, percent, `3 images`. For runs, report and the driver's screen; the
task's TaskInfo says what it measures."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.runs.choice import VALIDATION, validation_key
from trainer.settings.units import number, percent
from trainer.tasks.info import CLASSIFICATION, Measure, TaskInfo, info_of


def known_info(*said: Mapping[str, Any] | None) -> tuple[TaskInfo, str]:
    """`info_of`, and an error text if the folder's description of its task cannot be read; the task then counts as classification."""
    try:
        return info_of(*said), ""
    except ValueError as error:
        return CLASSIFICATION, f"its task cannot be read: {error}"


def in_words(measure: Measure, split: str = "test") -> str:
    """Within a sentence: `test accuracy`, `test mAP`; abbreviations keep their capitals."""
    return f"{split} {measure.in_words}"


def heading(measure: Measure) -> str:
    """`Test accuracy`, `Test mAP`."""
    return capital(in_words(measure))


def headline_title(info: TaskInfo, split: str = "test") -> str:
    """The title before the headline's value on a line of figures: the split if the headline is accuracy, else for example `test mAP`."""
    return split if info.headline.name == "accuracy" else in_words(info.headline, split)


def headline_of(entry: Mapping[str, Any], info: TaskInfo) -> tuple[Any, str]:
    """The headline's value in an evaluation's event or a summary, and the split that it is of: test, or validation where test was not
    read."""
    value = entry.get(info.headline.key)
    if value is None and (validated := entry.get(validation_key(info.headline))) is not None:
        return validated, VALIDATION
    return value, "test"


def shown(unit: str, value: float | None, digits: int = 1) -> str:
    """A value in a Measure's unit: `88.4 %` for a ratio, `0.1235` for a number, `?` if unknown."""
    return percent(value, digits) if unit == "ratio" else number(value)


def measured(info: TaskInfo, entry: Mapping[str, Any]) -> list[tuple[Measure, float]]:
    """The measures that `entry` (an evaluation, a summary) holds, the headline first."""
    values = [(measure, entry.get(measure.key)) for measure in info.measures]
    return [(measure, value) for measure, value in values if isinstance(value, int | float) and math.isfinite(value)]


def one_of(unit: str) -> str:
    """`image` of `images`."""
    return unit.removesuffix("s")


def samples(count: float | None, unit: str) -> str:
    """`1 image`, `3 images`."""
    return f"{number(count)} {one_of(unit) if count == 1 else unit}"


def rate_unit(unit: str) -> str:
    """Samples a second as a unit: `images/s`, `texts/s`."""
    return f"{unit}/s"


def capital(text: str) -> str:
    """Makes the first letter a capital and leaves the others."""
    return text[:1].upper() + text[1:]
