"""Parses `data.targets`, the requested labels of a source, and holds what targets of all sources have in common.

Called by the sources, which know their columns and what the cells mean.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from dataio.schema import LABEL, Kind, Target
from dataio.sources.source import SourceError

FLAG = "--data.targets NAME[:label|labels|number],..."
MAX_CLASSES = {"label": 100_000, "labels": 10_000}
"""A column with more classes is a key, or an attack on the memory; a sample with several labels holds a byte for each class."""
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One target named in `data.targets`; without a kind, its source infers the kind."""

    name: str
    kind: Kind | None


def parse_targets(text: str) -> tuple[Asked, ...]:
    """The targets named in `data.targets`, in order; empty means the source's own. Raises SourceError."""
    if not text.strip():
        return ()
    asked: list[Asked] = []
    for item in text.split(","):
        name, colon, kind = (part.strip() for part in item.rpartition(":"))
        if not colon:
            name, kind = kind, ""
        if not name:
            raise SourceError(f"data.targets={text!r} names nothing in {item!r}; give names separated by commas: {FLAG}")
        if colon and kind not in get_args(Kind):
            raise SourceError(f"data.targets={text!r}: {kind!r} is no kind of target; label, labels and number are: {FLAG}")
        if name in [other.name for other in asked]:
            raise SourceError(f"data.targets={text!r} names {name!r} twice; name each target once")
        asked.append(Asked(name=name, kind=next((known for known in get_args(Kind) if known == kind), None)))
    return tuple(asked)


def only_label(targets: str, what: str) -> None:
    """Refuses everything but the one label that `what`, a kind of source, has."""
    if any(asked.name != LABEL or asked.kind not in (None, "label") for asked in parse_targets(targets)):
        raise SourceError(f"data.targets={targets!r}: {what} have one target, {LABEL!r}; leave data.targets empty")


def label_target(classes: tuple[str, ...]) -> tuple[Target, ...]:
    """The target of a source with one label an image."""
    return (Target(name=LABEL, kind="label", classes=classes),)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: by number if all are integers, otherwise as text."""
    names = set(names)
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def checked_classes(count: int, kind: Kind, where: str) -> None:
    """Refuses more classes than a real target can have."""
    if count > MAX_CLASSES[kind]:
        raise SourceError(
            f"{where} holds {count} classes; a target of kind {kind} has at most {MAX_CLASSES[kind]}: "
            f"name a column of classes, or one of numbers as NAME:number: {FLAG}"
        )


def values_at(targets: Sequence[Target], columns: Sequence["npt.NDArray[Any]"], row: int) -> tuple[Any, ...]:
    """A sample's values from the columns (n, *shape) of the targets."""
    return tuple(
        column[row].copy() if target.kind == "labels" else column[row].item() for target, column in zip(targets, columns, strict=True)
    )


def unknown(targets: Iterable[Target]) -> tuple[Any, ...]:
    """The values of a sample without any known target."""
    return tuple(target.blank(1)[0] if target.kind == "labels" else target.dtype(target.missing).item() for target in targets)


def is_finite_float32(value: float) -> bool:
    """Whether float32 can store the number (at most 3.4e38)."""
    return abs(value) <= float(np.finfo(np.float32).max)
