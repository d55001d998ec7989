"""Reads Parquet files as the Hugging Face hub stores images: a column of images, and columns of targets.

A file's name gives its split. Without `data.targets` the target is the column label or fine_label; with it, any columns that columns.py
can read.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataio.schema import LABEL, UNLABELLED, single_label
from dataio.sources.columns import Column, batches_of, columns_of, open_parquet
from dataio.sources.image_column import IMAGE_COLUMNS, holds_images, images_in, key_of_row, paths_in, why_no_image
from dataio.sources.source import Options, Sample, SourceError, former_identity, hashed, identities_of, plan_of, stat_hash
from dataio.sources.splits import ALIASES, Rows, chosen, divide, formerly_read, recognised, strata
from dataio.sources.targets import FLAG, Asked, parse_targets

_SPLIT_NAME = re.compile(rf"({'|'.join(name for names in ALIASES.values() for name in names)})(?![A-Za-z])")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "category", "label_name", "class_name", "y")


class HuggingFace:
    """The rows of Parquet files, in the order of files and rows.

    Images are `image|img: struct{bytes, path}` or plain binary. Keys are the paths or, without paths, the file's name and the row.
    """

    kind = "huggingface"

    def __init__(self, folder: Path, files: Mapping[str, list[Path]], options: Options) -> None:
        """`files` is the result of find_parquet."""
        train = files.get("train") or files.get("")
        if not train:
            raise SourceError(f"{folder} holds Parquet files for {', '.join(files)}, but none for training (train-*.parquet)")
        self._files = {"train": train} | {split: files[name] for split, name in recognised(files).items() if split != "train"}
        used = {path for paths in self._files.values() for path in paths}
        self.ignored = tuple(str(path.relative_to(folder)) for paths in files.values() for path in paths if path not in used)
        self.identities = _identities(folder, self._files, options)
        self.identity = self.identities[0]
        self._plan = plan_of(self._files, options)
        schema = _schema(train[0])
        self._image = _image_column(train[0], schema, options.image_column)
        asked = parse_targets(options.targets)
        labelled = [path for split, paths in self._files.items() if split != "unlabelled" for path in paths]
        self._columns: tuple[Column, ...]
        if asked:
            self._columns = columns_of(schema, asked, labelled, null_is_unknown=True)
        else:
            column = _label_column(train[0], schema, options.label_column)
            self._columns = columns_of(schema, (Asked(name=column, kind="label"),), labelled, null_is_unknown=False, called=LABEL)
        self.targets = tuple(column.target for column in self._columns)
        if any(column.renumbered for column in self._columns):  # an earlier rule took each file's numbers for the first file's
            self.identities = (hashed(self.identities[0], "by name"), *self.identities)
            self.identity = self.identities[0]
        self.classes = self.targets[0].classes

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        if self._plan.is_whole(split):
            return sum(_row_count(path) for path in self._files[split])
        return len(self._divided[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        if self._plan.is_whole(split):
            yield from self._rows(split, start)
        elif len(rows := self._divided[split][start:]):
            first = int(rows[0])
            for _, sample in chosen(self._rows("train", first), first, rows):
                yield sample

    @cached_property
    def _divided(self) -> dict[str, Rows]:
        """Split -> its rows of the training files. Reads keys and labels, but no image."""
        keys: list[str] = []
        values: list[Any] = []
        first = self._columns[0]
        for path, row, batch in _batches(self._files["train"], [first.name], 1 << 14, part=f"{self._image}.path"):
            images = batch.column(self._image) if self._image in batch.schema.names else None
            keys += _keys(path, row, paths_in(images, len(batch)))
            values += [value for value, _ in first.read(path, batch.column(first.name))]
        if first.target.kind == "label":  # values that are no class are refused later
            values = [value if 0 <= value < len(self.classes) else first.unknown for value in values]
        column = np.array(values, first.target.dtype).reshape(len(values), *first.target.shape)
        return divide(keys, strata(first.target, column), self._plan.held)

    def _rows(self, stored: str, start: int) -> Iterator[Sample]:
        names = [] if stored == "unlabelled" else [column.name for column in self._columns]
        for path, row, batch in _batches(self._files[stored], [self._image, *names], 128, start):
            yield from self._batch(path, row, batch, labelled=stored != "unlabelled")

    def _batch(self, path: Path, row: int, batch: pa.RecordBatch, *, labelled: bool) -> Iterator[Sample]:
        images = batch.column(self._image)
        paths = paths_in(images, len(batch))
        keys = _keys(path, row, paths)
        images = images_in(images)
        known = [
            list(column.read(path, batch.column(column.name))) if labelled else [(column.unknown, None)] * len(batch)
            for column in self._columns
        ]
        for index, key in enumerate(keys):
            data = images[index].as_py()
            refusal = next((why for column in known if (why := column[index][1]) is not None), None)
            if labelled and all(batch.column(column.name)[index].as_py() is None for column in self._columns):
                refusal = "bad label: null"
            if data is None:
                refusal = why_no_image(paths[index])
            yield Sample(key=key, data=data or b"", values=tuple(column[index][0] for column in known), refusal=refusal)


class UnlabelledRows:
    """The images of Parquet files, as the split `unlabelled`: of the files of that name if there are any, else of those for training, else
    of all. A column of labels may be there; it is read for what it is worth."""

    kind = "unlabelled-rows"
    ignored: tuple[str, ...] = ()
    held_out: Mapping[str, float] = {}

    def __init__(self, folder: Path, files: Mapping[str, list[Path]], image_column: str = "") -> None:
        """`files` is the result of find_parquet."""
        named = recognised(files)
        chosen = named.get("unlabelled") or named.get("train")
        self._files = files[chosen] if chosen is not None else sorted(path for paths in files.values() for path in paths)
        schema = _schema(self._files[0])
        self._image = _image_column(self._files[0], schema, image_column)
        self._label: Column | None = None
        try:
            asked = (Asked(name=_label_column(self._files[0], schema, ""), kind="label"),)
            (self._label,) = columns_of(schema, asked, self._files, null_is_unknown=True, called=LABEL)
        except SourceError:  # none that could be read, and none is needed
            self._label = None
        self.targets = (self._label.target,) if self._label is not None else single_label(("unknown",))
        self.classes = self.targets[0].classes
        self.identity = hashed(stat_hash(folder, self._files), image_column)
        self.identities = (self.identity,)

    def splits(self) -> tuple[str, ...]:
        return (UNLABELLED,)

    def count(self, split: str) -> int | None:
        return sum(_row_count(path) for path in self._files)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        names = [self._label.name] if self._label is not None else []
        for path, row, batch in _batches(self._files, [self._image, *names], 128, start):
            images = batch.column(self._image)
            paths = paths_in(images, len(batch))
            keys, images = _keys(path, row, paths), images_in(images)
            values = [-1] * len(batch)
            if self._label is not None:
                read = self._label.read(path, batch.column(self._label.name))
                values = [value if why is None and 0 <= value < len(self.classes) else -1 for value, why in read]
            for index, (key, value) in enumerate(zip(keys, values, strict=True)):
                data = images[index].as_py()
                refusal = why_no_image(paths[index]) if data is None else None
                yield Sample(key=key, data=data or b"", values=(value,), refusal=refusal)


def find_parquet(folder: Path) -> dict[str, list[Path]]:
    """Split's name in the file names -> files, "" for files named after no split; empty if there are no Parquet files."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.parquet")))
    for place in (folder, folder / "data", *(below if len(below) == 1 else [])):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = _SPLIT_NAME.match(path.name)
            files.setdefault(match[1] if match else "", []).append(path)
        if files:
            return files
    return {}


def _identities(folder: Path, files: Mapping[str, list[Path]], options: Options) -> tuple[str, ...]:
    """`files`: those that are read, by split."""
    formerly = formerly_read(files)
    stat = stat_hash(folder, [path for paths in files.values() for path in paths])
    before = stat_hash(folder, [path for split in formerly for path in files[split]])
    return identities_of(stat, files, options, former=former_identity(before, options, has_test=len(formerly) > 1))


def _batches(
    paths: list[Path], columns: list[str], size: int, start: int = 0, part: str | None = None
) -> Iterator[tuple[Path, int, pa.RecordBatch]]:
    """Yields (file, row in it, rows) from row `start` of all rows on. A `part` (of a struct, as struct.part) is read too if it exists."""
    at = 0  # rows before this file
    for path in paths:
        with open_parquet(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise SourceError(f"{path} lacks the column {missing[0]!r}; all files of a source need the same columns")
            count, row = file.metadata.num_rows, 0
            wanted = [*columns, *([part] if part else [])]
            for batch in batches_of(path, file, wanted, size) if at + count > start else ():
                skip = min(max(start - at - row, 0), len(batch))
                if skip < len(batch):
                    yield path, row + skip, batch.slice(skip)
                row += len(batch)
        at += count


def _keys(path: Path, row: int, paths: Sequence[str | None]) -> list[str]:
    return [key_of_row(name, path.stem, row + index) for index, name in enumerate(paths)]


def _row_count(path: Path) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def _schema(path: Path) -> Any:
    with open_parquet(path) as file:
        return file.schema_arrow


def _image_column(path: Path, schema: Any, given: str) -> str:
    what = f"column {given or 'image or img'} of struct{{bytes, path}} or binary"
    names = (given,) if given else IMAGE_COLUMNS
    return _pick(path, schema, names, holds_images, what, "say which one has the images: --data.image-column NAME")


def _label_column(path: Path, schema: Any, given: str) -> str:
    def is_label(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):  # a pandas category
            return is_label(kind.value_type)
        return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))

    hint = f"say which one has the labels: --data.label-column NAME, or all that is learnt: {FLAG}"
    what = f"column {given or 'label or fine_label'} of integers or text"
    return _pick(path, schema, (given,) if given else _LABEL_COLUMNS, is_label, what, hint)


def _pick(path: Path, schema: Any, names: tuple[str, ...], fits: Callable[[Any], bool], what: str, hint: str = "") -> str:
    """The first of the names that is a column of a fitting type."""
    for name in names:
        if name in schema.names and fits(schema.field(name).type):
            return name
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise SourceError(f"{path} has no {what}; its columns are {found:.500}" + (f"; {hint}" if hint else ""))
