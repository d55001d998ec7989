"""Reads columns of Parquet files as targets, from their types and the Hugging Face metadata.

Called by huggingface. Integers and text become labels, lists of them several labels, floats numbers; integers become numbers on request.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.foreign import open_regular
from dataio.schema import Kind, Target
from dataio.sources.source import SourceError
from dataio.sources.targets import FLAG, Asked, checked_classes, is_finite_float32, unknown

MAX_COLUMN_BYTES = 2 << 30
"""Of a column in a row group, unpacked."""
MAX_COLUMN_VALUES = 1 << 26
BATCH_BYTES = 64 << 20
MAX_EXPANSION = 1000

_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "integer": ("label", "number"),
    "text": ("label",),
    "boolean": ("label",),
    "list of integers": ("labels",),
    "list of text": ("labels",),
    "float": ("number",),
}
"""What a column can be; the first entry applies where nothing is declared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column that is used as a target."""

    name: str
    """In the files; the target's name may differ."""
    target: Target
    texts: Mapping[Any, int] | None
    """For a column of text, cell -> class number; None where cells hold the numbers themselves."""
    renumbered: Mapping[Path, Mapping[int, int]]
    """File -> cell -> class number, for files whose metadata name the classes in another order than the first file's."""
    null_is_unknown: bool
    """Otherwise a null refuses the sample."""

    @property
    def unknown(self) -> Any:
        return unknown((self.target,))[0]

    def read(self, path: Path, cells: Any) -> Iterator[tuple[Any, str | None]]:
        """Yields (value, refusal or None) for each cell of an Arrow array of this file."""
        numbers = self.renumbered.get(path, self.texts)
        for cell in cells.to_pylist():
            if cell is None:
                yield self.unknown, None if self.null_is_unknown else "bad label: null"
            elif self.target.kind == "label":
                if numbers is None or cell in numbers:
                    yield cell if numbers is None else numbers[cell], None
                else:
                    yield self.unknown, f"bad label: {cell!s:.60} is not in 0..{len(numbers) - 1}"
            elif self.target.kind == "labels":
                yield self._labels(cell, numbers)
            elif math.isnan(cell) or is_finite_float32(cell):
                yield float(cell), None
            else:
                yield self.unknown, f"bad label: {self.target.name} is {cell}, more than a number can be"

    def _labels(self, cell: list[Any], places: Mapping[Any, int] | None) -> tuple[Any, str | None]:
        classes = len(self.target.classes)
        numbers: list[Any] = cell if places is None else [places.get(text) for text in cell]
        if bad := [number for number in numbers if number is None or not 0 <= number < classes]:
            return self.unknown, f"bad label: {self.target.name} holds {bad[0]}, which is not in 0..{classes - 1}"
        value = np.zeros(classes, self.target.dtype)
        value[np.asarray(numbers, np.int64)] = 1
        return value, None


def columns_of(
    schema: Any, asked: Sequence[Asked], paths: list[Path], *, null_is_unknown: bool, called: str | None = None
) -> tuple[Column, ...]:
    """The requested columns of files with this Arrow schema. Class names that the schema lacks are collected from all `paths`.

    `called` is the target's name, where it differs from the column's.
    """
    columns = []
    for target in asked:
        if target.name not in schema.names:
            found = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise SourceError(f"data.targets names {target.name!r}, which is no column of {paths[0]}; its columns are {found:.500}: {FLAG}")
        content = _content(schema.field(target.name).type)
        kinds = _KINDS.get(content or "", ())
        kind = target.kind or next(iter(kinds), None)
        if kind is None or kind not in kinds:
            raise SourceError(
                f"data.targets: column {target.name!r} of {paths[0]} is {schema.field(target.name).type}, which is no {kind or 'target'}; "
                f"integers and text are of kind label, lists of them labels, floats and integers number: {FLAG}"
            )
        name = called or target.name
        described: _Classes = ((), None, {}) if kind == "number" else _classes(schema, target.name, kind, paths)
        classes, texts, renumbered = described
        columns.append(
            Column(
                name=target.name,
                target=Target(name=name, kind=kind, classes=classes),
                texts=texts,
                renumbered=renumbered,
                null_is_unknown=null_is_unknown,
            )
        )
    return tuple(columns)


def _content(kind: Any) -> str | None:
    """What a column's cells are, in the words of _KINDS; None for a type that cannot be a target."""
    if pa.types.is_dictionary(kind):  # a pandas category
        return _content(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _content(kind.value_type)
        return f"list of {inner}s".replace("texts", "text") if inner in ("integer", "text") else None
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "boolean"
    return "float" if pa.types.is_floating(kind) else None


_Classes = tuple[tuple[str, ...], dict[Any, int] | None, dict[Path, dict[int, int]]]
"""(names, cell -> number or None where cells are the numbers, file -> cell -> number where its own names are others)"""


def _classes(schema: Any, column: str, kind: Kind, paths: list[Path]) -> _Classes:
    """The classes of a column that has some."""
    content = _content(schema.field(column).type)
    where = f"column {column!r} of {paths[0]}"
    if content == "boolean":
        return ("false", "true"), {False: 0, True: 1}, {}
    if content in ("integer", "list of integers") and (names := metadata_names(schema, column)):
        return _by_name(names, column, paths)
    cells = _distinct(paths, column, where, kind)
    if not cells:
        raise SourceError(f"{where} holds no label")
    if content in ("text", "list of text"):
        names = tuple(sorted(cells))
        return names, {name: number for number, name in enumerate(names)}, {}
    highest = max(int(cell) for cell in cells)
    checked_classes(highest + 1, kind, where)
    if highest < 0:
        raise SourceError(f"{where} holds no label")
    return tuple(str(number) for number in range(highest + 1)), None, {}


def _by_name(names: tuple[str, ...], column: str, paths: list[Path]) -> _Classes:
    """The classes of all files, the first file's first, and the numbers of each file that names them in another order. What counts is the
    name: the splits of a data set may have been numbered each for itself."""
    classes = list(names)
    renumbered: dict[Path, dict[int, int]] = {}
    for path in paths:
        with open_parquet(path) as file:
            own = metadata_names(file.schema_arrow, column)
        if own in ((), names):  # without names, the numbers are the first file's
            continue
        classes += [name for name in own if name not in classes]
        renumbered[path] = {number: classes.index(name) for number, name in enumerate(own)}
    return tuple(classes), None, renumbered


def _distinct(paths: Iterable[Path], column: str, where: str, kind: Kind) -> set[Any]:
    """The distinct values in all cells, or in the lists of all cells."""
    seen: set[Any] = set()
    for path in paths:
        with open_parquet(path) as file:
            if column not in file.schema_arrow.names:
                raise SourceError(f"{path} lacks the column {column!r}; all files of a source need the same columns")
            for batch in batches_of(path, file, [column], 1 << 16):
                cells = batch.column(0)
                seen.update((cells if kind == "label" else cells.flatten()).unique().to_pylist())
                checked_classes(len(seen) - 1, kind, where)
    return seen - {None}


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a foreign Parquet file. SourceError for one that is damaged, also where that is only found within the context."""
    try:
        with open_regular(path) as opened, pq.ParquetFile(opened) as file:
            yield file
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # ValueError: names that are not UTF-8
        raise SourceError(f"{path} is no readable Parquet file: {error}") from error


def batches_of(path: Path, file: pq.ParquetFile, columns: list[str], most: int) -> Iterator[pa.RecordBatch]:
    """Yields the rows of these columns, at most `most` at once. SourceError for a file whose content is a thousand times its size: its
    dictionary, or its compression, was made to fill memory and disks."""
    limit = max(BATCH_BYTES, MAX_EXPANSION * path.stat().st_size)
    unpacked = 0
    for batch in file.iter_batches(batch_size=rows_at_once(path, file, columns, most), columns=columns):
        unpacked += batch.nbytes
        if unpacked > limit:
            raise SourceError(f"{path} of {path.stat().st_size} bytes unpacks to more than {limit}; it was made to fill memory")
        yield batch


def rows_at_once(path: Path, file: pq.ParquetFile, columns: Sequence[str], most: int) -> int:
    """How many rows of these columns to read at once, at most `most`, so that they take some BATCH_BYTES of memory.

    A dictionary, or a value that repeats the one before, takes a few bytes of the file for each row and the whole value in memory. No value
    is longer than its column's part of a row group unpacked, so that is what a row can take; most rows take far less. SourceError where the
    file announces more than can be held.
    """
    worst = 0
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if not any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
                continue
            unpacked = column.total_uncompressed_size
            if not 0 <= unpacked <= MAX_COLUMN_BYTES or not 0 <= column.num_values <= MAX_COLUMN_VALUES:
                raise SourceError(
                    f"{path}: column {column.path_in_schema!r} of row group {group} has {column.num_values} values in {unpacked} bytes; "
                    f"at most {MAX_COLUMN_VALUES} in {MAX_COLUMN_BYTES} are read; write smaller row groups"
                )
            if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
                worst = max(worst, unpacked)
    return max(1, min(most, BATCH_BYTES // max(worst, 1)))


def metadata_names(schema: Any, column: str) -> tuple[str, ...]:
    """The names that the Hugging Face metadata gives the column's values; empty if it has none."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # for a list, the type of its items
        names = feature["names"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError):
        return ()
    if isinstance(names, dict):  # {"0": "airplane", ...} in older files
        names = [names[str(number)] for number in range(len(names)) if str(number) in names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return ()
    return tuple(names)
