"""Says which weights a run kept, by what, and how sure that is. Called by the final table and the report; trainer.runs.choice decides, and
writes what is said here into summary.json (key `selection`). Pure.

The best of many evaluations is better than the others partly by chance, which is why the test split is not among them. Where the interval
of the difference to the last evaluation holds 0, the difference is called within noise. The two are evaluations of the same images, whose
answers are not kept: the interval is that of two independent counts, which is the wider one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.runs.certainty import in_percent, is_within_noise, wilson
from trainer.runs.events import STRANGE
from trainer.runs.measures import in_words, shown
from trainer.settings.units import number
from trainer.tasks.info import Measure

SHARES = ("accuracy", "exact_match")
"""Measures that count right answers among all samples of the split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evaluated:
    """An evaluation of the validation split, as `selection` has it."""

    epoch: float | None
    value: float | None
    count: int | None


def kept_words(summary: Mapping[str, Any]) -> str:
    """`epoch 3 of 10, the best by validation accuracy: 91.20 % (95 % interval: ...); the last epoch's 90.80 % is within noise of it`. ""
    where nothing was chosen."""
    said = summary.get("selection")
    if not isinstance(said, Mapping):
        return ""
    try:
        measure = Measure(**said["measure"])
        kept, last = _evaluated(said["kept"]), _evaluated(said["last"])
        where = _where(kept, last)
        if said["select"] != "best":
            return f"{where}, the last: {in_words(measure, 'validation')} {_value(measure, kept)}"
        words = f"{where}, the best by {in_words(measure, 'validation')}: {_value(measure, kept)}"
        return words if kept.epoch == last.epoch else f"{words}; {_against(measure, kept, last)}"
    except STRANGE:
        return "?"


def kept_in_brief(summary: Mapping[str, Any]) -> str:
    """`epoch 3 of 10`; "" where nothing was chosen."""
    said = summary.get("selection")
    try:
        return _where(_evaluated(said["kept"]), _evaluated(said["last"])) if isinstance(said, Mapping) else ""
    except STRANGE:
        return "?"


def early_words(summary: Mapping[str, Any]) -> str:
    """`after epoch 7: 3 evaluations without a better one (train.patience)`; "" for a run that did all of its steps."""
    said = summary.get("selection")
    if not isinstance(said, Mapping) or not said.get("stopped_early"):
        return ""
    try:
        epoch, patience = _evaluated(said["last"]).epoch, number(said["patience"])
        return f"after epoch {number(epoch)}: {patience} evaluations without a better one (train.patience)"
    except STRANGE:
        return "?"


def _where(kept: _Evaluated, last: _Evaluated) -> str:
    return f"epoch {number(kept.epoch)} of {number(last.epoch)}"


def _value(measure: Measure, one: _Evaluated) -> str:
    share = _share(measure, one)
    return shown(measure.unit, one.value, 2) + (f" (95 % interval: {in_percent(wilson(*share))})" if share else "")


def _against(measure: Measure, kept: _Evaluated, last: _Evaluated) -> str:
    words = f"the last epoch's {shown(measure.unit, last.value, 2)}"
    shares = _share(measure, kept), _share(measure, last)
    if shares[0] is None or shares[1] is None:
        return words
    return f"{words} is within noise of it" if is_within_noise(shares[0], shares[1]) else f"{words} is worse by more than noise"


def _share(measure: Measure, one: _Evaluated) -> tuple[float, int] | None:
    """(share of right answers, samples); None if the measure is something else."""
    is_share = measure.name in SHARES and one.value is not None and 0.0 <= one.value <= 1.0
    return (one.value, one.count) if is_share and one.value is not None and one.count else None


def _evaluated(said: Mapping[str, Any]) -> _Evaluated:
    def known(key: str) -> float | None:
        value = said.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    count = known("count")
    return _Evaluated(epoch=known("epoch"), value=known("value"), count=None if count is None else int(count))
