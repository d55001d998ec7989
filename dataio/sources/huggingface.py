"""Parquet files as the Hugging Face hub stores images."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataio.sources.source import Sample, SourceError, hashed, stat_hash, text_of
from dataio.sources.splits import HELD_OUT_SPLITS, held_out


class HuggingFace:
    """Parquet files of `image|img: struct{bytes, path}` (or plain binary) and `label|fine_label`, as the Hugging Face hub stores them."""

    kind = "huggingface"

    def __init__(self, folder: Path, files: dict[str, list[Path]], test_fraction: float) -> None:
        self._folder, self._fraction = folder, test_fraction
        tests = [split for split in HELD_OUT_SPLITS if split in files]
        train = files.get("train") or files.get("")
        if not train:
            raise SourceError(f"{folder} holds Parquet files for {', '.join(files)}, but none for training (train-*.parquet)")
        self._files = {"train": train} | ({"test": files[tests[0]]} if tests else {})
        used = {path for paths in self._files.values() for path in paths}
        self.ignored = tuple(str(path.relative_to(folder)) for paths in files.values() for path in paths if path not in used)
        paths = [path for paths in self._files.values() for path in paths]
        self.identity = hashed(stat_hash(folder, paths), "" if tests else repr(test_fraction))
        self._columns = _columns(train[0])
        self._texts: dict[str, int] | None = None
        names = _class_names(pq.read_schema(train[0]), self._columns[1])
        labels = self._distinct_labels(paths)
        if labels and isinstance(labels[0], str):
            self._texts = {str(name): number for number, name in enumerate(labels)}
            names = tuple(self._texts)
        self.classes = names or tuple(str(number) for number in range(max((int(label) for label in labels), default=-1) + 1))
        if not self.classes:
            raise SourceError(f"column {self._columns[1]!r} of {train[0]} holds no label")

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        if "test" not in self._files:
            return None
        return sum(int(pq.read_metadata(path).num_rows) for path in self._files[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        if "test" in self._files:
            yield from self._rows(split, start)
            return
        kept = (sample for sample in self._rows("train", 0) if held_out(sample.key, self._fraction) == (split == "test"))
        for index, sample in enumerate(kept):
            if index >= start:
                yield sample

    def _rows(self, stored: str, start: int) -> Iterator[Sample]:
        image, label = self._columns
        at = 0
        for path in self._files[stored]:
            try:
                with pq.ParquetFile(path) as file:
                    if at + file.metadata.num_rows <= start:
                        at += file.metadata.num_rows
                        continue
                    row = 0
                    for batch in file.iter_batches(batch_size=128, columns=[image, label]):
                        if at + row + len(batch) > start:
                            yield from self._batch(f"{path.stem}", row, batch, max(start - at - row, 0))
                        row += len(batch)
                    at += row
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path} cannot be read: {error}") from error

    def _batch(self, stem: str, row: int, batch: pa.RecordBatch, skip: int) -> Iterator[Sample]:
        images, labels = batch.column(0), batch.column(1).to_pylist()
        paths: list[str | None] = [None] * len(batch)
        if pa.types.is_struct(images.type):
            children = dict(zip([field.name for field in images.type], images.flatten(), strict=True))  # flatten applies the struct's nulls
            images = children["bytes"]
            if "path" in children:
                paths = children["path"].to_pylist()
        for index in range(skip, len(batch)):
            key = text_of(paths[index] or f"{stem}/{row + index:08d}")
            data, label = images[index].as_py(), labels[index]
            number = self._texts.get(label, -1) if self._texts is not None else label
            refusal = None
            if data is None:
                refusal = "no image: null" if paths[index] is None else "no image: the row holds a path, but no bytes"
            elif number is None:
                refusal = "bad label: null"
            yield Sample(key=key, data=data or b"", label=-1 if number is None else number, refusal=refusal)

    def _distinct_labels(self, paths: list[Path]) -> list[Any]:
        column, seen = self._columns[1], set()
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=1 << 16, columns=[column]):
                        seen.update(batch.column(0).unique().to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path} cannot be read: {error}") from error
        seen.discard(None)
        return sorted(seen)


def find_parquet(folder: Path) -> dict[str, list[Path]]:
    """split -> files, "" for files named after no split; empty if there are none."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.parquet")))
    for place in (folder, folder / "data", *(below if len(below) == 1 else [])):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = re.match(r"(train|test|validation|valid|val|dev)(?![A-Za-z])", path.name)
            files.setdefault(match[1] if match else "", []).append(path)
        if files:
            return files
    return {}


def _columns(path: Path) -> tuple[str, str]:
    """The names of the image and the label column."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is no readable Parquet file: {error}") from error

    def pick(names: tuple[str, ...], fits: Callable[[Any], bool], what: str) -> str:
        for name in names:
            if name in schema.names and fits(schema.field(name).type):
                return name
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise SourceError(f"{path} has no {what}; its columns are {found:.500}")

    def is_image(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and is_image(field.type) for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def is_label(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))

    return (
        pick(("image", "img"), is_image, "column image or img of struct{bytes, path} or binary"),
        pick(("label", "labels", "fine_label"), is_label, "column label or fine_label of integers or text"),
    )


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that the Hugging Face metadata gives the label's values; empty if it gives none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    if isinstance(names, dict):  # {"0": "airplane", ...} in older files
        names = [names[str(number)] for number in range(len(names)) if str(number) in names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return ()
    return tuple(names)
