"""The targets of a sample: their kinds, and how each is stored. Imports no torch. Used by all of dataio, and by the trainer's tasks.

A data set has one or several targets, each a column. An unknown value is marked by a value outside of the kind's own range (`missing`).
The sample's other targets still count; a sample whose targets are all missing has no labels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["label", "labels", "number"]
KINDS: tuple[Kind, ...] = ("label", "labels", "number")
SPLITS = ("train", "validation", "test", "unlabelled")
"""All splits that a data set may have; `train` is required."""
LABEL = "label"
"""Name of the only target of a data set with one label a sample."""
UNLABELLED = "unlabelled"
"""The split whose samples need no known target."""
MAX_TARGETS = 64
MAX_NAME = 100
MAX_CLASSES: Mapping[Kind, int] = {"label": 1 << 20, "labels": 1 << 14, "number": 0}
"""A row of `labels` takes one byte a class."""

_DTYPES: Mapping[Kind, Any] = {"label": np.int64, "labels": np.uint8, "number": np.float32}
_MISSING: Mapping[Kind, float] = {"label": -1, "labels": 255, "number": float("nan")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One thing to be known about each sample."""

    name: str
    kind: Kind
    """`label`: one class, () int64, -1 where unknown. `labels`: any number of classes, (classes,) uint8 of 0 and 1, 255 where unknown.
    `number`: () float32, NaN where unknown."""
    classes: tuple[str, ...] = ()
    """In the order of the model's outputs; empty for a number."""
    mean: float = 0.0
    """Mean of a number over the training split; the model learns (value - mean) / std."""
    std: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's value."""
        return (len(self.classes),) if self.kind == "labels" else ()

    @property
    def dtype(self) -> Any:
        """numpy's dtype of a value."""
        return _DTYPES[self.kind]

    @property
    def missing(self) -> float:
        """The value that marks an unknown one."""
        return _MISSING[self.kind]

    def blank(self, count: int) -> "npt.NDArray[Any]":
        """(count, *shape), all unknown."""
        return np.full((count, *self.shape), self.missing, self.dtype)


def single_label(classes: Iterable[str]) -> tuple[Target, ...]:
    """The targets of a data set with one label a sample."""
    return (Target(name=LABEL, kind="label", classes=tuple(classes)),)


def is_single_label(targets: Sequence[Target]) -> bool:
    """Whether these are the targets of a data set with one label a sample, which is still stored as before other targets existed."""
    return len(targets) == 1 and targets[0].name == LABEL and targets[0].kind == "label"


def fault_of_targets(targets: Sequence[Target]) -> str | None:
    """What is wrong with a data set's targets; None if nothing is."""
    if not 1 <= len(targets) <= MAX_TARGETS:
        return f"there are {len(targets)} targets, not 1 to {MAX_TARGETS}"
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return f"there are two targets named {twice[0]!r}"
    return next((f"target {target.name!r:.60} {fault}" for target in targets if (fault := _fault_of(target)) is not None), None)


def _fault_of(target: Target) -> str | None:
    if not 1 <= len(target.name) <= MAX_NAME or not target.name.isprintable() or target.name != target.name.strip():
        return f"needs a name of 1 to {MAX_NAME} printable characters without spaces around them"
    if target.kind not in KINDS:
        return f"is of kind {target.kind!r:.60}, not one of {', '.join(KINDS)}"
    if target.kind == "number":
        if target.classes:
            return "is a number and has classes"
        return None if math.isfinite(target.mean) and 0 < target.std < math.inf else f"has mean {target.mean} and std {target.std}"
    if (target.mean, target.std) != (0.0, 1.0):
        return f"is of kind {target.kind} and has a mean or a std"
    if not 1 <= len(target.classes) <= MAX_CLASSES[target.kind]:
        return f"has {len(target.classes)} classes, not 1 to {MAX_CLASSES[target.kind]}"
    return "has the same class twice" if len(set(target.classes)) != len(target.classes) else None


def value_of(target: Target, given: Any) -> "npt.NDArray[Any]":
    """A source's value in stored form, (*shape,) of the target's dtype. Raises ValueError for an invalid one and names the rule it breaks.

    A label is an integer; labels are (classes,) uint8; a number is rounded to float32. Each may be the kind's `missing` value.
    """
    match target.kind:
        case "label":
            if isinstance(given, bool | np.bool_) or not isinstance(given, int | np.integer) or not -1 <= given < len(target.classes):
                raise ValueError(f"{given!s:.60} is not in 0..{len(target.classes) - 1}")
            return np.asarray(given, np.int64)
        case "labels":
            if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or given.shape != target.shape:
                raise ValueError(f"{given!r:.60} is not {len(target.classes)} uint8, one a class")
            if not np.all((given <= 1) | (given == target.missing)):
                raise ValueError(f"{given!r:.60} holds other values than 0, 1 and {target.missing}")
            return given
        case "number":
            if isinstance(given, bool | np.bool_) or not isinstance(given, int | float | np.integer | np.floating):
                raise ValueError(f"{given!s:.60} is no number")
            try:
                with np.errstate(over="ignore"):
                    value = np.asarray(float(given)).astype(np.float32)
            except OverflowError:  # an integer beyond float64
                value = np.asarray(np.inf, np.float32)
            if np.isinf(value):
                raise ValueError(f"{given!s:.60} is no finite number of 32 bits")
            return np.asarray(target.missing, np.float32) if np.isnan(value) else value  # one of NaN's many bit patterns


def is_known(target: Target, value: "npt.NDArray[Any]") -> bool:
    """Whether any part of a stored value is known."""
    return not bool(np.all(np.isnan(value) if target.kind == "number" else value == target.missing))
