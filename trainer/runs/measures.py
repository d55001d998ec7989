"""An evaluation's numbers and counts of samples in words: titles, percent, `3 images`. For runs and the report; what a task measures is its
TaskInfo's to say."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.settings.units import number, percent
from trainer.tasks.info import CLASSIFICATION, Measure, TaskInfo, info_of


def known_info(*said: Mapping[str, Any] | None) -> tuple[TaskInfo, str]:
    """`info_of`, and what is wrong where what a folder says of its task cannot be read: it is then taken for classification."""
    try:
        return info_of(*said), ""
    except ValueError as error:
        return CLASSIFICATION, f"its task cannot be read: {error}"


def in_words(measure: Measure) -> str:
    """Within a sentence: `test accuracy`, `test mAP`; what is an abbreviation keeps its capitals."""
    title = measure.title
    return f"test {title[:1].lower()}{title[1:]}" if title[1:2].islower() else f"test {title}"


def heading(measure: Measure) -> str:
    """`Test accuracy`, `Test mAP`."""
    return capital(in_words(measure))


def headline_title(info: TaskInfo) -> str:
    """Before the headline's value on a line of figures: `test`, as long as that means accuracy; else `test mAP`."""
    return "test" if info.headline.name == "accuracy" else in_words(info.headline)


def shown(unit: str, value: float | None, digits: int = 1) -> str:
    """A value of a Measure's unit: `88.4 %` of a ratio, `0.1235` of a number, `?` where it is not known."""
    return percent(value, digits) if unit == "ratio" else number(value)


def measured(info: TaskInfo, entry: Mapping[str, Any]) -> list[tuple[Measure, float]]:
    """Those measures that `entry` (an evaluation, a summary) holds, the headline first."""
    values = [(measure, entry.get(measure.key)) for measure in info.measures]
    return [(measure, value) for measure, value in values if isinstance(value, int | float) and math.isfinite(value)]


def one_of(unit: str) -> str:
    """`image` of `images`."""
    return unit.removesuffix("s")


def samples(count: float | None, unit: str) -> str:
    """`1 image`, `3 images`."""
    return f"{number(count)} {one_of(unit) if count == 1 else unit}"


def rate_unit(unit: str) -> str:
    """Of samples a second: `img/s`, `texts/s`."""
    return "img/s" if unit == "images" else f"{unit}/s"


def capital(text: str) -> str:
    """With a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]
