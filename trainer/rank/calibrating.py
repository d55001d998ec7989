"""Calibrates a finished model's confidence. trainer.rank.evaluation calls it at a run's last evaluation, trainer.rank.finished for a run
that has ended. trainer.tasks.calibration does the arithmetic.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.tasks.calibration import Scores, Temperature, calibrated, measured_at
from trainer.tasks.task import Result


def calibration_record(
    test: Mapping[str, Scores], fit: Mapping[str, Scores] | None = None, *, fit_split: str = "validation"
) -> dict[str, Any] | None:
    """A temperature for each target, and what it does on the test split; None if no target has one. `fit`: scores of a split that is not
    the test; without them the temperatures are cross-fitted on the test split."""
    heads = {name: calibrated(scores, fit=fit.get(name) if fit else None, fit_split=fit_split) for name, scores in test.items()}
    known = {name: head for name, head in heads.items() if head is not None}
    return {"heads": known} if known else None


def measured_record(scores: Mapping[str, Scores], temperatures: Mapping[str, Temperature]) -> dict[str, Any] | None:
    """What the model's temperatures do on these samples; a target without one is measured as it is."""
    plain = Temperature(value=1.0, split="", count=0)
    heads = {name: measured_at(each, temperatures.get(name, plain)) for name, each in scores.items()}
    known = {name: head for name, head in heads.items() if head is not None}
    return {"heads": known} if known else None


def with_calibration(result: Result, record: Mapping[str, Any] | None) -> Result:
    """The result with the record among its details; of a single target also its two errors as numbers."""
    if record is None:
        return result
    numbers = {}
    if len(record["heads"]) == 1:
        (head,) = record["heads"].values()
        numbers = {"test_ece": head["ece"], "test_calibrated_ece": head["calibrated_ece"]}
    return replace(result, details={**result.details, **numbers, "calibration": record})
