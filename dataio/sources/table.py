"""Reads a table of images: a CSV or TSV file with one image per row, whose other columns are targets.

`data.targets` names the target columns and their kinds; without a kind the cells decide. hostile.py reads the table and the files that it
names. Every error names the file, the line and the column.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dataio.schema import Kind, Target
from dataio.sources.hostile import read_below, table_rows
from dataio.sources.source import Options, Sample, SourceError, SourceFile, identities_of
from dataio.sources.splits import ALIASES, Rows, divide, plan_splits, split_named, strata
from dataio.sources.targets import FLAG, Asked, checked_classes, is_finite_float32, ordered, parse_targets, values_at

DELIMITERS = {".csv": ",", ".tsv": "\t"}
IMAGE_COLUMNS = ("image", "file", "filename", "path", "image_path")
"""The first of these columns that exists names the files."""
SPLIT_COLUMN = "split"
LABEL_COLUMNS: dict[str, Kind | None] = {"label": None, "labels": "labels", "tags": "labels"}
"""The first of these columns that exists is the target where none is requested."""
SEPARATOR = "|"
UNKNOWN_LABELS = "?"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


class Table:
    """The rows of a table, in order. Keys are the files' names as written in the table."""

    kind = "table"
    ignored: tuple[str, ...] = ()

    def __init__(self, path: Path, options: Options) -> None:
        content = _read(path, parse_targets(options.targets))
        self._folder, self._files = path.parent, content.files
        typed = [_typed(content, number) for number in range(len(content.asked))]
        self.targets = tuple(target for target, _ in typed)
        self._columns = [column for _, column in typed]
        self.classes = self.targets[0].classes
        stored = {split: np.flatnonzero(np.array(content.splits) == split) for split in dict.fromkeys(content.splits)}
        if "train" not in stored:
            raise SourceError(f"{path} has no row of split train, but of {', '.join(stored)}; there must be images to train with")
        self._plan = plan_splits(stored, test_fraction=options.test_fraction, validation_fraction=options.validation_fraction)
        self._rows: dict[str, Rows] = stored
        if self._plan.held:
            train = stored["train"]
            groups = strata(self.targets[0], self._columns[0][train])
            divided = divide([self._files[row] for row in train.tolist()], groups, self._plan.held)
            self._rows = stored | {split: train[rows] for split, rows in divided.items()}
        self.identities = identities_of(_stat_hash(self._folder, {path.name, *self._files}), stored, options)
        self.identity = self.identities[0]

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._rows[split])

    def files(self, split: str) -> list[SourceFile]:
        return [
            SourceFile(key=self._files[row], path=self._folder / self._files[row], values=values_at(self.targets, self._columns, row))
            for row in self._rows[split].tolist()
        ]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for row in self._rows[split][start:].tolist():
            key, values = self._files[row], values_at(self.targets, self._columns, row)
            try:
                yield Sample(key=key, data=read_below(self._folder, key), values=values)
            except OSError as error:
                yield Sample(key=key, data=b"", values=values, refusal=f"unreadable: {error.strerror}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """The content of a table: line, file and split of each row, and a cell for each target; None in an unlabelled row."""

    path: Path
    asked: tuple[Asked, ...]
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    files: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    cells: list[list[str | None]] = field(default_factory=list)

    def refuse(self, column: int, row: int, rule: str) -> NoReturn:
        _refuse(self.path, self.lines[row], self.asked[column].name, self.cells[column][row], rule)


def _refuse(path: Path, line: int, column: str, value: str | None, rule: str) -> NoReturn:
    raise SourceError(f"{path}, line {line}, column {column!r}: {value!r:.80} {rule}")


def _read(path: Path, asked: tuple[Asked, ...]) -> _Content:
    rows = table_rows(path, DELIMITERS[path.suffix.lower()])
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SourceError(f"{path}, line {line}: there are two columns named {twice[0]!r}; name each column once")
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise SourceError(
            f"{path}, line {line}: no column names the image files; its columns are {_listed(names)}; "
            f"call the one with the files, relative to the table, {IMAGE_COLUMNS[0]}"
        )
    content = _Content(path=path, asked=_chosen(path, [name for name in names if name not in (image, SPLIT_COLUMN)], asked))
    content.cells.extend([] for _ in content.asked)
    image_at, split_at = names.index(image), names.index(SPLIT_COLUMN) if SPLIT_COLUMN in names else None
    target_at = [names.index(target.name) for target in content.asked]
    same: dict[str, str] = {}  # one string object for all equal cells
    for line, cells in rows:
        if len(cells) != len(names):
            raise SourceError(
                f"{path}, line {line}: there are {len(cells)} cells, the header names {len(names)} columns; "
                f"put a cell that holds the delimiter in quotation marks"
            )
        split = "train" if split_at is None else _split(path, line, cells[split_at])
        content.lines.append(line)
        content.files.append(_file(path, line, image, cells[image_at]))
        content.splits.append(split)
        for column, at in zip(content.cells, target_at, strict=True):
            cell = cells[at].strip()
            column.append(None if split == "unlabelled" else same.setdefault(cell, cell))
    if not content.files:
        raise SourceError(f"{path} has a header, but no row below it; a row an image is needed")
    return content


def _stat_hash(folder: Path, names: Collection[str]) -> str:
    """Like source.stat_hash, but for names: without a Path for each of a million files it takes a quarter of the time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        try:
            facts = os.stat(os.path.join(folder, name))
            line = (name, facts.st_size, facts.st_mtime_ns)
        except OSError:  # the file does not exist: samples() reports it
            line = (name, -1, -1)
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _chosen(path: Path, columns: Sequence[str], asked: tuple[Asked, ...]) -> tuple[Asked, ...]:
    """Chooses the targets among the columns that can be one."""
    if not asked:
        for name, kind in LABEL_COLUMNS.items():
            if name in columns:
                return (Asked(name=name, kind=kind),)
        raise SourceError(
            f"{path} has no column {', '.join(LABEL_COLUMNS)}; say which are the labels, {FLAG}; its columns are {_listed(columns)}"
        )
    if missing := [target.name for target in asked if target.name not in columns]:
        raise SourceError(
            f"data.targets names {missing[0]!r}, which is no column of labels in {path}; those are {_listed(columns)}: {FLAG}"
        )
    return asked


def _listed(columns: Collection[str]) -> str:
    text = ", ".join(columns) or "none"
    return text if len(text) <= 500 else text[:497] + "..."


def _split(path: Path, line: int, cell: str) -> str:
    if split := split_named(cell.strip()):
        return split
    _refuse(path, line, SPLIT_COLUMN, cell, f"is no split; {', '.join(ALIASES)} are")


def _file(path: Path, line: int, column: str, cell: str) -> str:
    """The file's name below the table's folder, in its shortest form."""
    parts = [part for part in cell.split("/") if part not in ("", ".")]
    if not parts:
        _refuse(path, line, column, cell, "names no file; name one, relative to the table, or remove the row")
    if cell.startswith("/") or ".." in parts:
        _refuse(path, line, column, cell, "leads out of the table's folder; name a file below it, relative to the table")
    return "/".join(parts)


def _typed(content: _Content, number: int) -> "tuple[Target, npt.NDArray[Any]]":
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
    return "number" if all("." in cell and _NUMBER.fullmatch(cell) for cell in cells) else "label"


def _label(content: _Content, number: int, cells: set[str]) -> "tuple[Target, npt.NDArray[Any]]":
    target = _with_classes(content, number, "label", cells)
    numbers: dict[str | None, int] = {name: index for index, name in enumerate(target.classes)}
    return target, np.array([numbers.get(cell, target.missing) for cell in content.cells[number]], target.dtype)


def _labels(content: _Content, number: int, cells: set[str]) -> "tuple[Target, npt.NDArray[Any]]":
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


def _with_classes(content: _Content, number: int, kind: Kind, names: set[str]) -> Target:
    where = f"{content.path}, column {content.asked[number].name!r},"
    if not names:
        raise SourceError(f"{where} names no class: nothing is known; name another target")
    checked_classes(len(names), kind, where)
    return Target(name=content.asked[number].name, kind=kind, classes=ordered(names))


def _number(content: _Content, number: int) -> "tuple[Target, npt.NDArray[Any]]":
    target = Target(name=content.asked[number].name, kind="number")
    column = target.blank(len(content.files))
    for row, cell in enumerate(content.cells[number]):
        if not cell:
            continue
        if not _NUMBER.fullmatch(cell) or not is_finite_float32(float(cell)):
            content.refuse(
                number, row, "is not a number of at most 3.4e38; write it like -1.5, or leave the cell empty where it is unknown"
            )
        column[row] = float(cell)
    return target, column
