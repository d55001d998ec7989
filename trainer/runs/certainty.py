"""How sure a run's numbers are: the interval of a share, and the classes of which the test says little or nothing. Pure. Called by the
final table, the report, the comparison and `trainer.evaluate`.

A share (accuracy, recall, exact matches) is a count of right answers among counted samples, so chance alone moves it. `wilson` says how
far. A mean of other things (mAP, F1, a loss) has no such interval, and gets none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runs.measures import one_of
from trainer.settings.units import number
from trainer.tasks.info import Measure, measure_name

Z = 1.959963984540054
"""Standard deviations on each side that hold 95 % of a normal distribution."""
FEW = 10
"""Test samples of a class. With fewer, the 95 % interval of its recall is at least 29 points wide, whatever the answers were."""
LISTED = 5
NOT_MEASURED = "-"

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thin:
    """The classes (or labels) that have no test samples, and those that have few."""

    none: Sequence[str]
    few: Sequence[tuple[str, int]]
    """(name, test samples), the fewest first."""


def wilson(share: float, count: int) -> Interval:
    """The 95 % interval of a share of `count` samples (Wilson 1927). Unlike the usual share ± 2 standard errors it stays within 0 and 1,
    and is not empty where all or none are right."""
    assert count > 0, "nothing was measured"
    square = Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half  # exactly, where rounding would miss it


def difference_interval(one: tuple[float, int], other: tuple[float, int]) -> Interval:
    """The 95 % interval of the difference of two independent shares, each (share, samples): one minus other (Newcombe 1998, method 10). It
    comes from their Wilson intervals, and stays within -1 and 1 as they stay within 0 and 1."""
    (share, _), (share_2, _) = one, other
    (low, high), (low_2, high_2) = wilson(*one), wilson(*other)
    middle = share - share_2
    return middle - math.hypot(share - low, high_2 - share_2), middle + math.hypot(high - share, share_2 - low_2)


def paired_interval(only_one: int, only_other: int, count: int) -> Interval:
    """The 95 % interval of the difference of two shares of the same `count` samples, one minus other: `only_one` samples are right in one
    alone, `only_other` in the other alone (Bonett and Price 2012: Wald's interval with one added to both)."""
    assert count > 0, "nothing was measured"
    first, second = (only_one + 1) / (count + 2), (only_other + 1) / (count + 2)
    half = Z * math.sqrt((first + second - (first - second) ** 2) / (count + 2))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def is_within_noise(one: tuple[float, int], other: tuple[float, int]) -> bool:
    """Whether two shares, each (share, samples), may well be equal: the interval of their difference holds 0."""
    low, high = difference_interval(one, other)
    return low <= 0 <= high


def in_percent(interval: Interval) -> str:
    """`85.3 to 90.9 %`."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def interval_of(summary: Mapping[str, Any], measure: Measure) -> Interval | None:
    """The interval of a measure in a summary; None if the measure is no share of samples, or if it is not known of how many."""
    value, count = summary.get(measure.key), _samples(summary, measure.name)
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0 or not count:
        return None
    return wilson(value, count)


def _samples(summary: Mapping[str, Any], name: str) -> int | None:
    """Of how many samples the measure with this name is a share."""
    if name in ("accuracy", "exact_match"):
        return _whole(summary.get("test_count")) or _counted(summary.get("confusion"))
    heads = summary.get("heads")
    for target, head in heads.items() if isinstance(heads, Mapping) else ():
        if isinstance(head, Mapping) and name in (measure_name(str(target), "accuracy"), measure_name(str(target), "exact_match")):
            return _whole(head.get("count"))
    return None


def interval_words(summary: Mapping[str, Any], measure: Measure) -> str:
    """`85.3 to 90.9 %`; "" where there is no interval."""
    interval = interval_of(summary, measure)
    return in_percent(interval) if interval else ""


def recall_interval(entry: Mapping[str, Any]) -> Interval | None:
    """Of an entry of `per_class` or `labels`."""
    recall, count = entry.get("recall"), _whole(entry.get("support"))
    return wilson(recall, count) if isinstance(recall, int | float) and 0.0 <= recall <= 1.0 and count else None


def measured_scores(entry: Mapping[str, Any], given: int | None) -> dict[str, float | None]:
    """recall, precision and F1 of an entry of `per_class`; None for what no sample measured, where the entry itself says 0. `given`: how
    many samples got the class as an answer; None if that is not known."""
    is_in_test, is_given = bool(entry.get("support")), given is None or given > 0
    known = {"recall": is_in_test, "precision": is_given and (is_in_test or given is not None), "f1": is_in_test}
    return {name: _finite(entry.get(name)) if is_known else None for name, is_known in known.items()}


def given_of(confusion: object, count: int) -> list[int] | None:
    """How many samples got each of the `count` classes as an answer; None if the matrix does not say."""
    if (
        not isinstance(confusion, list)
        or len(confusion) != count
        or any(not isinstance(row, list) or len(row) != count for row in confusion)
    ):
        return None
    try:
        return [sum(int(row[column]) for row in confusion) for column in range(count)]
    except (TypeError, ValueError):
        return None


def thin_classes(summary: Mapping[str, Any]) -> Thin:
    """Over all targets of the run; a class of one target among several is `target: class`."""
    counts = list(_supports(summary, ""))
    heads = summary.get("heads")
    for target, head in heads.items() if isinstance(heads, Mapping) else ():
        if isinstance(head, Mapping) and head.get("count") and isinstance(head.get("details"), Mapping):
            counts += _supports(head["details"], f"{target}: ")
    few = sorted(((name, count) for name, count in counts if 0 < count < FEW), key=lambda pair: pair[1])
    return Thin(none=[name for name, count in counts if not count], few=few)


def class_warnings(summary: Mapping[str, Any], unit: str) -> list[str]:
    """Sentences on the classes of which the test says nothing or little. `unit`: the word for samples."""
    thin = thin_classes(summary)
    said = []
    if thin.none:
        said.append(f"No test {one_of(unit)} of {_listed(thin.none)}: nothing is measured there.")
    if thin.few:
        pairs = [f"{name} ({number(count)})" for name, count in thin.few]
        said.append(f"Fewer than {FEW} test {unit} of {_listed(pairs)}: what is measured there may be off by tens of points.")
    return said


def _supports(details: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    """(name, test samples) of each class or label of one target."""
    entries, names = details.get("per_class"), details.get("classes")
    if isinstance(entries, list) and isinstance(names, list) and len(entries) == len(names):
        named = list(zip(map(str, names), entries, strict=True))
    else:
        labels = details.get("labels")
        known = [entry for entry in labels if isinstance(entry, Mapping)] if isinstance(labels, list) else []
        named = [(str(entry.get("name")), entry) for entry in known]
    for name, entry in named:
        count = _whole(entry.get("support")) if isinstance(entry, Mapping) else None
        if count is not None:
            yield f"{prefix}{name}", count


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in names[:LISTED])
    return f"{shown} and {number(len(names) - LISTED)} more" if len(names) > LISTED else shown


def _counted(confusion: object) -> int | None:
    given = given_of(confusion, len(confusion)) if isinstance(confusion, list) else None
    return sum(given) if given else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0 else None


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
