"""What a source says of its samples, in the form that is stored; and what the stored values come to. Called by dataio.conversion."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dataio.parquet import Split
from dataio.schema import Target, is_known, is_single_label, value_of


def checked_values(targets: Sequence[Target], given: Sequence[Any], *, may_be_unknown: bool) -> list[np.ndarray]:
    """A sample's values in stored form. Raises ValueError for a value that does not fit its kind, or if none is known but one must be."""
    assert len(targets) == len(given), f"a source of {len(targets)} targets gives {len(given)} values"
    is_only = is_single_label(targets)
    values = []
    for target, value in zip(targets, given, strict=True):
        try:
            values.append(value_of(target, value))
        except ValueError as error:
            raise ValueError(str(error) if is_only else f"{target.name}: {error}") from None
    if not may_be_unknown and not any(map(is_known, targets, values)):
        raise ValueError(f"{given[0]} is not in 0..{len(targets[0].classes) - 1}" if is_only else "no target is known")
    return values


def measured(target: Target, train: Split) -> Target:
    """A number target with its mean and (population) standard deviation over the training split; other kinds unchanged.

    Both are sums rounded once (math.fsum), so they do not depend on the machine. Raises ValueError for a target without any known value.
    """

    def known() -> Iterator[np.ndarray]:
        return (values[~np.isnan(values)].astype(np.float64) for values in train.values(target.name))

    if target.kind != "number":
        if not any(is_known(target, values) for values in train.values(target.name)):
            raise ValueError(f"no training sample has a value of the target {target.name!r}; leave it out, or give it one")
        return target
    count = sum(len(values) for values in known())
    if not count:
        raise ValueError(f"no training sample has a value of the target {target.name!r}; leave it out, or give it one")
    mean = math.fsum(itertools.chain.from_iterable(known())) / count
    variance = math.fsum(itertools.chain.from_iterable((values - mean) ** 2 for values in known())) / count
    return replace(target, mean=mean, std=math.sqrt(variance) or 1.0)  # a constant is learned as 0


def class_counts(splits: dict[str, Split], targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """Samples of each class of the only target that has classes; empty if there are several such targets, or none."""
    with_classes = [target for target in targets if target.classes]
    if len(with_classes) != 1:
        return {}
    (target,) = with_classes
    counts = {}
    for name, split in splits.items():
        found = np.zeros(len(target.classes), np.int64)
        for values in split.values(target.name):
            if target.kind == "label":
                found += np.bincount(values[values >= 0], minlength=len(found))
            else:
                found += (values == 1).sum(0)
        counts[name] = tuple(found.tolist())
    return counts
