"""What a sample is labelled with: its targets, their kinds, and how each is stored. Imports no torch.

A data set has one target or several, each a column. What is not known of a sample is said by a value that is none of the kind's own
(`missing`): the sample's other targets still count, and one that knows nothing at all is a sample without labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["label", "labels", "number"]
KINDS: tuple[Kind, ...] = ("label", "labels", "number")
SPLITS = ("train", "validation", "test", "unlabelled")
"""All that a data set may have; `train` it must."""
LABEL = "label"
"""The name of the only target of a data set of one label an image."""

_DTYPES: Mapping[Kind, Any] = {"label": np.int64, "labels": np.uint8, "number": np.float32}
_MISSING: Mapping[Kind, float] = {"label": -1, "labels": 255, "number": float("nan")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One thing that is known of each sample."""

    name: str
    kind: Kind
    """`label`: one class, () int64, -1 where unknown. `labels`: any number of classes, (classes,) uint8 of 0 and 1, 255 where unknown.
    `number`: () float32, NaN where unknown."""
    classes: tuple[str, ...] = ()
    """In the order of the outputs; none for a number."""
    mean: float = 0.0
    """Of a number, over the training split: what is learned is (value - mean) / std."""
    std: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's value."""
        return (len(self.classes),) if self.kind == "labels" else ()

    @property
    def dtype(self) -> Any:
        """numpy's type of a value."""
        return _DTYPES[self.kind]

    @property
    def missing(self) -> float:
        """What stands for a value that is not known."""
        return _MISSING[self.kind]

    def blank(self, count: int) -> "npt.NDArray[Any]":
        """(count, *shape): nothing is known."""
        return np.full((count, *self.shape), self.missing, self.dtype)
