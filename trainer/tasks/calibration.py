"""Confidence that can be believed: one temperature by which a head's logits are divided, and how far its probabilities are from the shares
that come true (expected calibration error). Pure, and without torch. Called by trainer.rank.calibrating, where scores are gathered in the
samples' order; the report and `trainer.predict` read the records.

A temperature changes no answer: the order of a sample's probabilities stays, and labels are given by the uncalibrated ones. Where a
validation split is there, it is fitted on that and measured on the test split. Without one it is cross-fitted: each of FOLDS parts of the
test split is measured at the temperature of the others, so no sample is measured by a temperature that saw it, and the model gets the
temperature of all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BINS = 15  # Guo et al. 2017
FOLDS = 5
FEWEST = 50
"""Samples from which a temperature is fitted. With fewer, chance decides it."""
COLDEST, HOTTEST = 0.05, 20.0
_ROUNDS, _CLOSE = 60, 1e-10

Values = npt.NDArray[np.float64]
Kind = Literal["label", "labels"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """A head's logits for samples in the order of a split, and what is true."""

    kind: Kind
    logits: npt.NDArray[np.floating[Any]]  # (n, k)
    truth: npt.NDArray[np.integer[Any]]  # (n,) classes; or (n, k): 1, 0, or another value where it is not known
    ids: npt.NDArray[np.int64]  # (n,) by which samples are put into folds

    def among(self, chosen: npt.NDArray[np.bool_]) -> "Scores":
        return Scores(kind=self.kind, logits=self.logits[chosen], truth=self.truth[chosen], ids=self.ids[chosen])

    def usable(self) -> "Scores":
        """Without samples of which nothing is known, or whose logits are not finite."""
        known = self.truth >= 0 if self.kind == "label" else np.isin(self.truth, (0, 1)).any(1)
        return self.among(known & np.isfinite(self.logits).all(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """What a model's logits are divided by, and where that was found."""

    value: float
    split: str
    """The split that it was fitted on."""
    count: int
    """Samples that it was fitted on."""


def temperature_of(scores: Scores) -> float:
    """The temperature at which the scores' mean negative log-likelihood is least (Guo et al. 2017), from COLDEST to HOTTEST, to 4 digits.

    In b = 1 / T that mean is convex, so a safeguarded Newton's method finds its only minimum. Truths are smoothed by 1 / (n + 2), as
    Platt (1999) does: without it, a head that is always right would be infinitely sure of everything."""
    logits = scores.logits.astype(np.float64)
    if scores.kind == "label":
        logits -= logits.max(1, keepdims=True)
    low, high = 1 / HOTTEST, 1 / COLDEST
    beta, slope_of = 1.0, _label_slope if scores.kind == "label" else _labels_slope
    for _ in range(_ROUNDS):
        slope, bend = slope_of(logits, scores.truth, beta)
        if slope > 0:
            high = beta
        else:
            low = beta
        step = beta - slope / bend if bend > 0 else math.inf
        new = step if low < step < high else (low + high) / 2
        if abs(new - beta) <= _CLOSE * beta:
            break
        beta = new
    return float(f"{1 / beta:.4g}")


def _label_slope(logits: Values, truth: npt.NDArray[Any], beta: float) -> tuple[float, float]:
    """First and second derivative by beta of the mean loss of softmax(beta * logits)."""
    weights = np.exp(beta * logits)
    weights /= weights.sum(1, keepdims=True)
    mean = (weights * logits).sum(1)
    spread = (weights * logits**2).sum(1) - mean**2
    smooth = 1 / (len(logits) + 2)
    wanted = (1 - smooth) * logits[np.arange(len(logits)), truth] + smooth * logits.mean(1)
    return float((mean - wanted).mean()), float(spread.mean())


def _labels_slope(logits: Values, truth: npt.NDArray[Any], beta: float) -> tuple[float, float]:
    """The same of sigmoid(beta * logits), over the known labels."""
    known = np.isin(truth, (0, 1))
    flat = logits[known]
    smooth = 1 / (len(logits) + 2)
    wanted = np.where(truth[known] == 1, 1 - smooth, smooth)
    said = _sigmoid(beta * flat)
    return float(((said - wanted) * flat).mean()), float((said * (1 - said) * flat**2).mean())


def _sigmoid(values: Values) -> Values:
    return 0.5 * (1 + np.tanh(0.5 * values))


def confidences(scores: Scores, temperature: Values | float) -> tuple[Values, Values]:
    """(how sure, whether that came true), each (m,). Of a label: the probability of the answer. Of several labels: the probability of each
    known label of each sample. `temperature`: one for all, or (n,)."""
    logits = scores.logits.astype(np.float64) / np.reshape(temperature, (-1, 1))
    if scores.kind == "labels":
        known = np.isin(scores.truth, (0, 1))
        return _sigmoid(logits[known]), (scores.truth[known] == 1).astype(np.float64)
    answers = logits.argmax(1)
    top = logits.max(1, keepdims=True)
    return 1 / np.exp(logits - top).sum(1), (answers == scores.truth).astype(np.float64)


def calibration_error(sure: Values, right: Values, *, adaptive: bool = False) -> float:
    """Expected calibration error: the mean over samples of how far their bin's mean confidence is from its share of right answers. BINS
    bins of equal width (Guo et al. 2017), or with `adaptive` of equally many samples (Nixon et al. 2019)."""
    groups = np.array_split(np.argsort(sure, kind="stable"), BINS) if adaptive else _of_equal_width(sure)
    return float(sum(abs(float(sure[group].sum() - right[group].sum())) for group in groups) / len(sure))


def reliability(sure: Values, right: Values) -> list[dict[str, Any]]:
    """The points of a reliability plot: for each bin of equal width that is not empty, from the least sure."""
    return [
        {"confidence": float(sure[group].mean()), "right": float(right[group].mean()), "count": len(group)}
        for group in _of_equal_width(sure)
        if len(group)
    ]


def _of_equal_width(sure: Values) -> list[npt.NDArray[np.int64]]:
    bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)  # ((i - 1) / BINS, i / BINS]
    return [np.flatnonzero(bins == index) for index in range(BINS)]


def calibrated(test: Scores, *, fit: Scores | None = None, fit_split: str = "validation") -> dict[str, Any] | None:
    """A head's record: its temperature, and the error on the test split without and with it; None if there are too few samples. Without
    `fit`, the scores of a split that is not the test, the temperature is cross-fitted (see above)."""
    test = test.usable()
    given = None if fit is None else fit.usable()
    if len(test.ids) < FEWEST or (given is not None and len(given.ids) < FEWEST):
        return None
    if given is not None:
        found = Temperature(value=temperature_of(given), split=fit_split, count=len(given.ids))
        return _record(test, found, found.value)
    folds = _folds(test.ids)
    each = np.ones(len(folds))
    for fold in range(FOLDS):
        others = folds != fold
        if others.all() or not others.any():
            return None
        each[~others] = temperature_of(test.among(others))
    return _record(test, Temperature(value=temperature_of(test), split="test", count=len(test.ids)), each)


def measured_at(test: Scores, temperature: Temperature) -> dict[str, Any] | None:
    """The record of scores at a temperature that was found elsewhere."""
    test = test.usable()
    return _record(test, temperature, temperature.value) if len(test.ids) else None


def _record(test: Scores, temperature: Temperature, each: Values | float) -> dict[str, Any]:
    before, after = confidences(test, 1.0), confidences(test, each)
    return {
        "temperature": temperature.value,
        "fitted_on": temperature.split,
        "fitted_count": temperature.count,
        "cross_fitted": not isinstance(each, float),
        "count": len(test.ids),
        "ece": calibration_error(*before),
        "calibrated_ece": calibration_error(*after),
        "adaptive_ece": calibration_error(*before, adaptive=True),
        "calibrated_adaptive_ece": calibration_error(*after, adaptive=True),
        "bins": reliability(*before),
        "calibrated_bins": reliability(*after),
    }


def _folds(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(n,) 0 to FOLDS - 1. Multiples of the golden ratio: each stretch of a split has samples of all folds, in no short period."""
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) * np.uint64(FOLDS) >> np.uint64(32)).astype(np.int64)


def temperatures(record: Mapping[str, Any] | None) -> dict[str, Temperature]:
    """The temperatures of a `calibration` record (config.json, summary.json), by target. ValueError if one is damaged."""
    heads = (record or {}).get("heads")
    found = {}
    for name, head in heads.items() if isinstance(heads, Mapping) else ():
        try:
            value, split, count = float(head["temperature"]), str(head["fitted_on"]), int(head["fitted_count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the calibration of {name!r:.80} is damaged ({type(error).__name__}: {error})") from None
        if not COLDEST <= value <= HOTTEST:
            raise ValueError(f"the calibration of {name!r:.80} is damaged: temperature={value:g} must be {COLDEST:g} to {HOTTEST:g}")
        found[str(name)] = Temperature(value=value, split=split, count=count)
    return found


def stored(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of a `calibration` record that a model folder keeps."""
    kept: Sequence[str] = ("temperature", "fitted_on", "fitted_count", "ece", "calibrated_ece")
    if record is None:
        return None
    return {"heads": {name: {key: head[key] for key in kept} for name, head in record["heads"].items()}}
