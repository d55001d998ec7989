"""Targets from the cells of a table, whatever file it lies in: which columns are learned, what kind each is, and the values.

Called by table (rows of images) and texts (rows of texts). `data.targets` names the target columns and their kinds; without a kind the
cells decide. Every error names the file, the line and the column.
"""

import re
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dataio.schema import Kind, Target
from dataio.sources.layout import split_meant
from dataio.sources.source import Options, SourceError
from dataio.sources.splits import ALIASES, split_named
from dataio.sources.targets import FLAG, Asked, checked_classes, is_finite_float32, ordered, parse_targets

SPLIT_COLUMN = "split"
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "comment", "message", "body", "tweet", "snippet", "question", "title")
"""The first of these columns that exists holds the texts, where a source is one of texts."""
LABEL_COLUMNS: dict[str, Kind | None] = {"label": None, "labels": "labels", "tags": "labels"}
"""The first of these columns that exists is the target where none is requested."""
_MORE_LABEL_COLUMNS = (*LABEL_COLUMNS, "class", "classname", "classlabel", "labelname", "target", "category", "classid", "labelid")
"""Tried if there is none of those, as above; then the only other column."""
SEPARATOR = "|"
UNKNOWN_LABELS = "?"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """The content of a table: line, file and split of each row, and a cell for each target; None in an unlabelled row."""

    path: Path
    asked: tuple[Asked, ...]
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    files: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    cells: list[list[str | None]] = field(default_factory=list)

    def refuse(self, column: int, row: int, rule: str) -> NoReturn:
        refuse(self.path, self.lines[row], self.asked[column].name, self.cells[column][row], rule)


def refuse(path: Path, line: int, column: str, value: str | None, rule: str) -> NoReturn:
    raise SourceError(f"{path}, line {line}, column {column!r}: {value!r:.80} {rule}")


def split_of(path: Path, line: int, cell: str) -> str:
    if split := split_named(cell.strip()) or split_meant(cell):
        return split
    refuse(path, line, SPLIT_COLUMN, cell, f"is no split; {', '.join(ALIASES)} are")


def label_column_of(columns: Sequence[str], options: Options) -> Asked | None:
    """The target where `data.targets` names none."""
    if options.label_column:
        return Asked(name=options.label_column, kind=None) if options.label_column in columns else None
    if asked := parse_targets(options.targets):
        return asked[0] if asked[0].name in columns else None
    for name, kind in LABEL_COLUMNS.items():
        if name in columns:
            return Asked(name=name, kind=kind)
    found = alike(columns, _MORE_LABEL_COLUMNS) or (columns[0] if len(columns) == 1 else None)
    return None if found is None else Asked(name=found, kind=None)


def alike(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column with the first of these names, whatever its case, spaces and underscores."""
    by_plain = {re.sub(r"[^a-z0-9]+", "", name.lower()): name for name in reversed(names)}
    return next((by_plain[plain] for name in wanted if (plain := name.replace("_", "")) in by_plain), None)


def chosen_columns(path: Path, columns: Sequence[str], options: Options) -> tuple[Asked, ...]:
    """Chooses the targets among the columns that can be one."""
    asked = parse_targets(options.targets)
    if not asked:
        if (label := label_column_of(columns, options)) is not None:
            return (label,)
        if options.label_column:
            raise SourceError(f"data.label_column names {options.label_column!r}; the columns of labels in {path} are {listed(columns)}")
        raise SourceError(
            f"{path} has no column {', '.join(LABEL_COLUMNS)}; say which one has the labels: --data.label-column NAME, or all that is "
            f"learnt: {FLAG}; its columns are {listed(columns)}"
        )
    if missing := [target.name for target in asked if target.name not in columns]:
        raise SourceError(f"data.targets names {missing[0]!r}, which is no column of labels in {path}; those are {listed(columns)}: {FLAG}")
    return asked


def listed(columns: Collection[str]) -> str:
    text = ", ".join(columns) or "none"
    return text if len(text) <= 500 else text[:497] + "..."


def typed(content: Cells, number: int) -> "tuple[Target, npt.NDArray[Any]]":
    """A target and its values, (rows, *shape)."""
    cells = {cell for cell in content.cells[number] if cell}
    if not cells:
        raise SourceError(
            f"{content.path}, column {content.asked[number].name!r}: all cells are empty; name a target of which something is known"
        )
    match content.asked[number].kind or _inferred(cells):
        case "label":
            return _label(content, number, cells)
        case "labels":
            return _labels(content, number, cells)
        case "number":
            return _number(content, number)


def _inferred(cells: Collection[str]) -> Kind:
    if any(SEPARATOR in cell for cell in cells):
        return "labels"
    return "number" if all("." in cell and NUMBER.fullmatch(cell) for cell in cells) else "label"


def _label(content: Cells, number: int, cells: set[str]) -> "tuple[Target, npt.NDArray[Any]]":
    target = _with_classes(content, number, "label", cells)
    numbers: dict[str | None, int] = {name: index for index, name in enumerate(target.classes)}
    return target, np.array([numbers.get(cell, target.missing) for cell in content.cells[number]], target.dtype)


def _labels(content: Cells, number: int, cells: set[str]) -> "tuple[Target, npt.NDArray[Any]]":
    named: dict[str, list[str]] = {}
    for cell in cells - {UNKNOWN_LABELS}:
        named[cell] = [name.strip() for name in cell.split(SEPARATOR)]
        if "" in named[cell] or UNKNOWN_LABELS in named[cell]:
            rule = f"holds an empty label, or {UNKNOWN_LABELS} among others"
            fix = f"write a{SEPARATOR}b, nothing for no label, {UNKNOWN_LABELS} alone where labels are unknown"
            content.refuse(number, content.cells[number].index(cell), f"{rule}; {fix}")
    target = _with_classes(content, number, "labels", {name for names in named.values() for name in names})
    numbers = {name: index for index, name in enumerate(target.classes)}
    column = np.zeros((len(content.files), len(target.classes)), target.dtype)
    for row, labels in enumerate(content.cells[number]):
        if labels is None or labels == UNKNOWN_LABELS:
            column[row] = target.missing
        elif labels:
            column[row, [numbers[name] for name in named[labels]]] = 1
    return target, column


def _with_classes(content: Cells, number: int, kind: Kind, names: set[str]) -> Target:
    where = f"{content.path}, column {content.asked[number].name!r},"
    if not names:
        raise SourceError(f"{where} names no class: nothing is known; name another target")
    checked_classes(len(names), kind, where)
    return Target(name=content.asked[number].name, kind=kind, classes=ordered(names))


def _number(content: Cells, number: int) -> "tuple[Target, npt.NDArray[Any]]":
    target = Target(name=content.asked[number].name, kind="number")
    column = target.blank(len(content.files))
    for row, cell in enumerate(content.cells[number]):
        if not cell:
            continue
        if not NUMBER.fullmatch(cell) or not is_finite_float32(float(cell)):
            content.refuse(
                number, row, "is not a number of at most 3.4e38; write it like -1.5, or leave the cell empty where it is unknown"
            )
        column[row] = float(cell)
    return target, column
