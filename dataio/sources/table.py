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
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dataio.sources.cells import (
    SPLIT_COLUMN,
    TEXT_COLUMNS,
    Cells,
    alike,
    chosen_columns,
    label_column_of,
    listed,
    refuse,
    split_of,
    typed,
)
from dataio.sources.hostile import read_below, table_rows
from dataio.sources.layout import Tree, scan
from dataio.sources.source import Options, Sample, SourceError, SourceFile, identities_of, plan_of
from dataio.sources.splits import Rows, divide, strata
from dataio.sources.targets import values_at

DELIMITERS = {".csv": ",", ".tsv": "\t"}
IMAGE_COLUMNS = ("image", "file", "filename", "path", "image_path")
"""The first of these columns that exists names the files."""
_MORE_IMAGE_COLUMNS = (*IMAGE_COLUMNS, "imagename", "imagefile", "filepath", "img", "imgpath", "imageid", "id", "photo", "picture", "name")
"""Tried if there is none of those, whatever their case, spaces and underscores."""


class Table:
    """The rows of a table, in order. Keys are the files' names as written in the table."""

    kind = "table"

    def __init__(self, path: Path, options: Options, *, ignored: tuple[str, ...] = ()) -> None:
        content = _read(path, options)
        self._folder, self._files, self.ignored = path.parent, content.files, ignored
        columns = [typed(content, number) for number in range(len(content.asked))]
        self.targets = tuple(target for target, _ in columns)
        self._columns = [column for _, column in columns]
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
        if not self._places and missing.issuperset(self._files):
            _, header = next(table_rows(path, DELIMITERS[path.suffix.lower()]))
            if texts := _for_texts([name.strip() for name in header]):
                raise SourceError(
                    f"{path}: there is none of the {len(missing)} files that it names, such as {self._files[0]!r:.80}; names are "
                    f"relative to the table, and --data.image-column NAME says which column has them{texts}"
                )
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


def _read(path: Path, options: Options) -> Cells:
    rows = table_rows(path, DELIMITERS[path.suffix.lower()])
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SourceError(f"{path}, line {line}: there are two columns named {twice[0]!r}; name each column once")
    image = _image_column(names, options)
    if image is None:
        raise SourceError(
            f"{path}, line {line}: no column names the image files; its columns are {listed(names)}; say which one does, with names "
            f"relative to the table: --data.image-column NAME{_for_texts(names)}"
        )
    content = Cells(path=path, asked=chosen_columns(path, [name for name in names if name not in (image, SPLIT_COLUMN)], options))
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
        split = "train" if split_at is None else split_of(path, line, cells[split_at])
        content.lines.append(line)
        content.files.append(_file(path, line, image, cells[image_at]))
        content.splits.append(split)
        for column, at in zip(content.cells, target_at, strict=True):
            cell = cells[at].strip()
            column.append(None if split == "unlabelled" else same.setdefault(cell, cell))
    if not content.files:
        raise SourceError(f"{path} has a header, but no row below it; a row an image is needed")
    return content


def _for_texts(names: Sequence[str]) -> str:
    """What else a table with these columns may be for."""
    return "; texts are for a model of texts: --model.name hf/FOLDER" if alike(names, TEXT_COLUMNS) is not None else ""


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
        if image is not None and label_column_of([name for name in names if name not in (image, SPLIT_COLUMN)], options) is not None:
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
    return next((name for name in IMAGE_COLUMNS if name in names), None) or alike(names, _MORE_IMAGE_COLUMNS)


def _file(path: Path, line: int, column: str, cell: str) -> str:
    """The file's name below the table's folder, in its shortest form."""
    parts = [part for part in cell.split("/") if part not in ("", ".")]
    if not parts:
        refuse(path, line, column, cell, "names no file; name one, relative to the table, or remove the row")
    if cell.startswith("/") or ".." in parts:
        refuse(path, line, column, cell, "leads out of the table's folder; name a file below it, relative to the table")
    return "/".join(parts)
