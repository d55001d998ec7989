"""Decides which split a sample belongs to: the names of splits, and the samples held out of training where a source lacks a split.

Called by the sources. Everything here is a pure function of names, keys and values; who reads the samples, and in which order, is
irrelevant.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dataio.schema import SPLITS, Target

Item = TypeVar("Item")
Rows = npt.NDArray[np.int64]

ALIASES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "unlabelled": ("unlabelled", "unlabeled"),
}
"""Split -> names of files, folders and cells that mean it; where a source has several of them, the first one counts."""
HELD_OUT_RULE = "held out by class"
"""Added to the identity of a source with samples held out of training, or whose validation split once served as its test split."""
_PERSONS = {"test": b"held-out", "validation": b"validation"}  # a hash for each: a key that sorts early in one is anywhere in the other
_BINS = 10  # for a number


def recognised(names: Collection[str]) -> dict[str, str]:
    """Split -> the name that stands for it, for all splits among `names`."""
    found = {split: next((name for name in aliases if name in names), None) for split, aliases in ALIASES.items()}
    return {split: name for split, name in found.items() if name is not None}


def split_named(name: str) -> str | None:
    """The split with this name."""
    return next((split for split, aliases in ALIASES.items() if name in aliases), None)


def formerly_read(stored: Collection[str]) -> tuple[str, ...]:
    """The stored splits that were read when there were only two: validation served as test if test was missing."""
    return ("train", *[split for split in ("test", "validation") if split in stored][:1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The splits of a source: those it stores, and those held out of its training split."""

    stored: frozenset[str]
    held: Mapping[str, float]
    """Split -> fraction of the training samples, test first; validation is taken from the rest."""

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split in self.stored or split in self.held)

    def is_whole(self, split: str) -> bool:
        """Whether the split is used as it is stored."""
        return split in self.stored and not (split == "train" and self.held)


def plan_splits(stored: Iterable[str], *, test_fraction: float, validation_fraction: float) -> Plan:
    """Plans a test split for every source, and a validation split if `validation_fraction` is given."""
    stored = frozenset(stored)
    wanted = {"test": test_fraction} | ({"validation": validation_fraction} if validation_fraction else {})
    return Plan(stored=stored, held={split: fraction for split, fraction in wanted.items() if split not in stored})


def strata(target: Target, column: "npt.NDArray[Any]") -> Rows:
    """(n,): the group of each value of the target (n, *shape); samples are held out of each group separately. -1 where nothing is known.

    A label is its own group. A sample with several labels belongs to its rarest one (of equally rare ones the first); samples without any
    label have a group of their own. Numbers fall into ten bins of equal size.
    """
    if target.kind == "label":
        return column.astype(np.int64)
    if target.kind == "labels":
        has = column == 1  # (n, classes)
        rarest_first = np.argsort(has.sum(0), kind="stable")
        has = has[:, rarest_first]
        if not has.size:
            return np.full(len(column), -1, np.int64)
        return np.where(has.any(1), rarest_first[has.argmax(1)], -1)
    known = ~np.isnan(column)
    bins = np.full(len(column), -1, np.int64)
    if known.any():
        edges = np.quantile(column[known], np.arange(1, _BINS) / _BINS)
        bins[known] = np.searchsorted(edges, column[known], side="right")
    return bins


def divide(keys: Sequence[str], groups: Rows, held: Mapping[str, float]) -> dict[str, Rows]:
    """The rows of each split, ascending: `train`, and the splits held out of it.

    Each group with n keys holds out the max(1, round(fraction * n)) keys with the lowest hash; equal keys stay together, and at least one
    key is left. So a group's rows depend on its own keys alone.
    """
    left = np.arange(len(keys))
    divided: dict[str, Rows] = {}
    for split in _PERSONS:
        if split not in held:
            continue
        chosen = _lowest([(keys[row], int(groups[row]), row) for row in left.tolist()], held[split], _PERSONS[split])
        divided[split] = np.array(sorted(chosen), np.int64)
        left = np.setdiff1d(left, divided[split], assume_unique=True)
    return divided | {"train": left}


def _lowest(members: Iterable[tuple[str, int, int]], fraction: float, person: bytes) -> list[int]:
    """The rows to hold out, from members (key, group, row)."""
    by_group: defaultdict[int, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for key, group, row in members:
        by_group[group][key].append(row)
    chosen: list[int] = []
    for rows in by_group.values():
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        ranked = sorted(rows, key=lambda key: (hashlib.blake2b(key.encode(), digest_size=8, person=person).digest()[::-1], key))
        chosen += [row for key in ranked[:count] for row in rows[key]]
    return chosen


def chosen(items: Iterable[Item], first: int, rows: Rows) -> Iterator[tuple[int, Item]]:
    """Yields (row, item) for the ascending `rows`, from items that begin with row `first`. Reads on to the end, to find damage there."""
    wanted = set(rows.tolist())
    for row, item in enumerate(items, first):
        if row in wanted:
            yield row, item
