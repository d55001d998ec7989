"""Classes of unequal size: how unequal they are, and what each training image then weighs. Pure but for `class_counts`, which reads labels.

trainer.settings.balance decides what a run does (`data.balance`), trainer.learn.balance puts it into the loss, the report shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dataio.parquet import Dataset

Method = Literal["none", "auto", "weights", "logit_adjustment"]
METHODS: tuple[Method, ...] = ("none", "auto", "weights", "logit_adjustment")
IMBALANCED = 3.0
"""Classes count as unequal from here on: the largest has this many times the training images of the smallest."""


def balance_of(text: str) -> Method:
    """`data.balance`. ValueError for another word."""
    if text == "sampler":
        raise ValueError(
            "data.balance=sampler is not offered: drawing rare images more often would break the promise that an epoch has each image "
            "once, and its expected gradient is that of weights; use --data.balance weights or logit_adjustment"
        )
    for method in METHODS:
        if method == text:
            return method
    raise ValueError(f"data.balance={text!r} must be one of {', '.join(METHODS)}")


def class_weights_of(text: str) -> dict[str, float]:
    """`data.class_weights` as the weight of each named class, in order. ValueError for other text."""
    weights: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals or not name:
            raise ValueError(f"data.class_weights={text!r}: {part!r} is no NAME=WEIGHT; separate them by commas, such as cat=5,dog=1")
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(
                f"data.class_weights={text!r}: {number!r} is no number; give {name} a weight above 0, such as {name}=5"
            ) from None
        if not 0 < weight < math.inf:
            raise ValueError(f"data.class_weights={text!r}: {name}={number} must be above 0 and finite; 1 is the default")
        if name in weights:
            raise ValueError(f"data.class_weights={text!r} names {name} twice; give each class one weight")
        weights[name] = weight
    return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Imbalance:
    """The smallest and the largest class that have training images, by number."""

    smallest: int
    largest: int
    ratio: float
    """Images of the largest for one of the smallest; 1 if all are equal or fewer than two classes have any."""

    @property
    def is_notable(self) -> bool:
        return self.ratio >= IMBALANCED


def imbalance_of(counts: Sequence[int]) -> Imbalance:
    """`counts`: training images of each class."""
    there = [number for number, count in enumerate(counts) if count]
    if not there:
        return Imbalance(smallest=0, largest=0, ratio=1.0)
    smallest, largest = min(there, key=counts.__getitem__), max(there, key=counts.__getitem__)
    return Imbalance(smallest=smallest, largest=largest, ratio=counts[largest] / counts[smallest])


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weights by which all classes count alike: N / (K n) for a class of n of the N training images, K classes having any. Their mean over
    the training images is 1. A class without images has 1, which no image bears."""
    total, there = sum(counts), sum(count > 0 for count in counts)
    return [total / (there * count) if count else 1.0 for count in counts]


def table_weights(table: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The user's weight of each class, scaled so that their mean over the training images is 1."""
    weighed = math.fsum(weight * count for weight, count in zip(table, counts, strict=True))
    return [weight * sum(counts) / weighed for weight in table] if weighed else [float(weight) for weight in table]


def log_priors(counts: Sequence[int]) -> list[float]:
    """The logarithm of each class's share of the training images. A class without any counts as one with one."""
    total = sum(counts)
    return [math.log(max(count, 1) / max(total, 1)) for count in counts]


def class_counts(dataset: "Dataset") -> tuple[int, ...]:
    """Training images of each class of data whose one target is a label; images without a known label do not count. Reads the labels'
    column, one row group at a time; raises what reading it raises."""
    import numpy as np  # here: settings import this file, and --help need not wait for numpy

    (target,) = dataset.manifest.targets
    assert target.kind == "label", "others have no classes that exclude each other"
    counts = np.zeros(len(target.classes), np.int64)
    for labels in dataset.split("train").values(target.name):
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
    return tuple(counts.tolist())


def known_class_counts(dataset: "Dataset") -> tuple[int, ...]:
    """The same where it costs next to nothing: written down by the conversion, or read from a disk. Empty for other data and otherwise."""
    targets = dataset.manifest.targets
    if len(targets) != 1 or targets[0].kind != "label":
        return ()
    try:
        reading = dataset.reading
        known = reading.class_counts.get("train", ()) if reading is not None else ()
        if len(known) == len(targets[0].classes):
            return tuple(known)
        return () if dataset.is_remote else class_counts(dataset)
    except (OSError, ValueError):  # only told, so nothing depends on it
        return ()
