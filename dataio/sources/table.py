"""Reads a table of images: a CSV or TSV file with one image per row, whose other columns are targets.

`data.targets` names the target columns and their kinds; without a kind the cells decide. A cell names a file below the table's folder: by
its path, or by its name or its name without suffix where only one image has that (`id` and `breed` beside a folder of photographs).
hostile.py reads the table and the files that it names. Every error names the file, the line and the column. `find_table` chooses the table
of a folder that has no class folders.
"""

import hashlib
import json
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dataio.schema import Kind, Target
from dataio.sources.hostile import read_below, table_rows
from dataio.sources.layout import Tree, scan, split_meant
from dataio.sources.source import Options, Sample, SourceError, SourceFile, identities_of, plan_of
from dataio.sources.splits import ALIASES, Rows, divide, split_named, strata
from dataio.sources.targets import FLAG, Asked, checked_classes, is_finite_float32, ordered, parse_targets, values_at

DELIMITERS = {".csv": ",", ".tsv": "\t"}
IMAGE_COLUMNS = ("image", "file", "filename", "path", "image_path")
"""The first of these columns that exists names the files."""
_MORE_IMAGE_COLUMNS = (*IMAGE_COLUMNS, "imagename", "imagefile", "filepath", "img", "imgpath", "imageid", "id", "photo", "picture", "name")
"""Tried if there is none of those, whatever their case, spaces and underscores."""
SPLIT_COLUMN = "split"
LABEL_COLUMNS: dict[str, Kind | None] = {"label": None, "labels": "labels", "tags": "labels"}
"""The first of these columns that exists is the target where none is requested."""
_MORE_LABEL_COLUMNS = (*LABEL_COLUMNS, "class", "classname", "classlabel", "labelname", "target", "category", "classid", "labelid")
"""Tried if there is none of those, as above; then the only other column."""
SEPARATOR = "|"
UNKNOWN_LABELS = "?"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


class Table:
    """The rows of a table, in order. Keys are the files' names as written in the table."""

    kind = "table"

    def __init__(self, path: Path, options: Options, *, ignored: tuple[str, ...] = ()) -> None:
        content = _read(path, options)
        self._folder, self._files, self.ignored = path.parent, content.files, ignored
        typed = [_typed(content, number) for number in range(len(content.asked))]
        self.targets = tuple(target for target, _ in typed)
        self._columns = [column for _, column in typed]
        self.classes = self.targets[0].classes
        stored = {split: np.flatnonzero(np.array(content.splits) == split) for split in dict.fromkeys(content.splits)}
        if "train" not in stored:
            raise SourceError(f"{path} has no row of split train, but of {', '.join(stored)}; there must be images to train with")
        self._plan = plan_of(stored, options)
        self._rows: dict[str, Rows] = stored
        if self._plan.held:
            train = stored["train"]
            groups = strata(self.targets[0], self._columns[0][train])
            divided = divide([self._files[row] for row in train.tolist()], groups, self._plan.held)
            self._rows = stored | {split: train[rows] for split, rows in divided.items()}
        digest, missing = _stat_hash(self._folder, {path.name, *self._files})
        self.identities = identities_of(digest, stored, options)
        self._places = _found(path, missing) if missing else {}
        if self._places:
            found, _ = _stat_hash(self._folder, {path.name, *(self._places.get(name, name) for name in self._files)})
            self.identities = (identities_of(found, stored, options)[0], *self.identities)
        self.identity = self.identities[0]

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

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
                yield Sample(key=key, data=read_below(self._folder, self._places.get(key, key)), values=values)
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


def _read(path: Path, options: Options) -> _Content:
    rows = table_rows(path, DELIMITERS[path.suffix.lower()])
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SourceError(f"{path}, line {line}: there are two columns named {twice[0]!r}; name each column once")
    image = _image_column(names, options)
    if image is None:
        raise SourceError(
            f"{path}, line {line}: no column names the image files; its columns are {_listed(names)}; say which one does, with names "
            f"relative to the table: --data.image-column NAME"
        )
    content = _Content(path=path, asked=_chosen(path, [name for name in names if name not in (image, SPLIT_COLUMN)], options))
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


def _stat_hash(folder: Path, names: Collection[str]) -> tuple[str, set[str]]:
    """Like source.stat_hash, but for names: without a Path for each of a million files it takes a quarter of the time. Also returns the
    names of no file."""
    digest = hashlib.sha256()
    missing: set[str] = set()
    for name in sorted(names):
        try:
            facts = os.stat(os.path.join(folder, name))
            line = (name, facts.st_size, facts.st_mtime_ns)
        except OSError:  # the file does not exist: samples() reports it
            line = (name, -1, -1)
            missing.add(name)
        digest.update(json.dumps(line).encode())
    return digest.hexdigest(), missing


def _found(table: Path, names: Collection[str]) -> dict[str, str]:
    """Name -> the image below the table's folder that has it, with or without its suffix. SourceError where several have it."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for path in scan(table.parent).all_images:
        place = path.relative_to(table.parent).as_posix()
        by_name[path.name].append(place)
        if path.suffix:
            by_name[path.stem].append(place)
    found = {}
    for name in names:
        places = by_name.get(name, [])
        if len(places) > 1:  # `train/7.jpg` for a row of train.csv, and not `test/7.jpg`
            places = [place for place in places if _words(place.split("/")[0]) & _words(table.stem)] or places
        if len(places) > 1:
            raise SourceError(
                f"{table}: {name!r:.80} may be {places[0]} or {places[1]}; write the path of each file, relative to the table"
            )
        if places:
            found[name] = places[0]
    return found


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) - {""}


def find_table(tree: Tree, options: Options) -> tuple[Path, tuple[str, ...]] | None:
    """The table directly in a folder that says what its images show, and what of the folder is not read then; None if there is none.
    SourceError where several may be it."""
    tables = [path for path in tree.others if path.suffix.lower() in DELIMITERS and "submission" not in path.name.lower()]
    usable = []
    for path in tables:
        _, header = next(table_rows(path, DELIMITERS[path.suffix.lower()]), (1, []))
        names = [name.strip() for name in header]
        image = _image_column(names, options)
        if image is not None and _label_column([name for name in names if name not in (image, SPLIT_COLUMN)], options) is not None:
            usable.append(path)
    if len(usable) > 1:
        usable = [path for path in usable if _words(path.stem) & {"train", "training", "labels", "metadata", "annotations"}] or usable
    if len(usable) > 1:
        told = " and ".join(path.name for path in usable[:2])
        raise SourceError(
            f"{tree.path} holds several tables, {told}; name the one to read, --data.path {usable[0]}, or put all rows into one with a "
            f"column {SPLIT_COLUMN}"
        )
    if not usable:
        return None
    others = tuple(path.name for path in tree.others if path != usable[0])
    return usable[0], others


def _image_column(names: Sequence[str], options: Options) -> str | None:
    """The column that names the files."""
    if options.image_column:
        return options.image_column if options.image_column in names else None
    return next((name for name in IMAGE_COLUMNS if name in names), None) or _alike(names, _MORE_IMAGE_COLUMNS)


def _label_column(columns: Sequence[str], options: Options) -> Asked | None:
    """The target where `data.targets` names none."""
    if options.label_column:
        return Asked(name=options.label_column, kind=None) if options.label_column in columns else None
    if asked := parse_targets(options.targets):
        return asked[0] if asked[0].name in columns else None
    for name, kind in LABEL_COLUMNS.items():
        if name in columns:
            return Asked(name=name, kind=kind)
    found = _alike(columns, _MORE_LABEL_COLUMNS) or (columns[0] if len(columns) == 1 else None)
    return None if found is None else Asked(name=found, kind=None)


def _alike(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column with the first of these names, whatever its case, spaces and underscores."""
    by_plain = {re.sub(r"[^a-z0-9]+", "", name.lower()): name for name in reversed(names)}
    return next((by_plain[plain] for name in wanted if (plain := name.replace("_", "")) in by_plain), None)


def _chosen(path: Path, columns: Sequence[str], options: Options) -> tuple[Asked, ...]:
    """Chooses the targets among the columns that can be one."""
    asked = parse_targets(options.targets)
    if not asked:
        if (label := _label_column(columns, options)) is not None:
            return (label,)
        if options.label_column:
            raise SourceError(f"data.label_column names {options.label_column!r}; the columns of labels in {path} are {_listed(columns)}")
        raise SourceError(
            f"{path} has no column {', '.join(LABEL_COLUMNS)}; say which one has the labels: --data.label-column NAME, or all that is "
            f"learnt: {FLAG}; its columns are {_listed(columns)}"
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
    if split := split_named(cell.strip()) or split_meant(cell):
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
    return "number" if all("." in cell and NUMBER.fullmatch(cell) for cell in cells) else "label"


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
        if not NUMBER.fullmatch(cell) or not is_finite_float32(float(cell)):
            content.refuse(
                number, row, "is not a number of at most 3.4e38; write it like -1.5, or leave the cell empty where it is unknown"
            )
        column[row] = float(cell)
    return target, column
