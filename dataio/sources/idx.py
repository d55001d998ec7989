"""Reads IDX files (http://yann.lecun.com/exdb/mnist/), the format of the MNIST family."""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataio.foreign import MAX_SETTINGS_BYTES, open_regular, read_regular
from dataio.sources.source import Options, Sample, SourceError, former_identity, identities_of, no_columns, plan_of, png, stat_hash
from dataio.sources.splits import chosen, divide
from dataio.sources.targets import label_target, only_label

MAX_LABELS = 1 << 26
_IDX_NAME = re.compile(r"(?P<split>train|t10k|test)-(?P<what>images|labels)[.-]idx(?P<dims>[13])-ubyte(?:\.gz)?")


class Idx:
    """Gray images of the MNIST family, each encoded as a PNG. classes.txt (a name a line) names the classes, else they are numbers."""

    kind = "idx"
    ignored: tuple[str, ...] = ()

    def __init__(self, folder: Path, files: dict[str, tuple[Path, Path]], options: Options) -> None:
        no_columns(options, "IDX files")
        only_label(options.targets, "IDX files")
        self._files = files
        self._labels = {split: _idx_labels(labels) for split, (_, labels) in files.items()}
        self._plan = plan_of(files, options)
        names = folder / "classes.txt"
        paths = [path for pair in files.values() for path in pair] + ([names] if names.is_file() else [])
        stat = stat_hash(folder, paths)
        self.identities = identities_of(stat, files, options, former=former_identity(stat, options, has_test="test" in files))
        self.identity = self.identities[0]
        highest = max(int(labels.max(initial=0)) for labels in self._labels.values())
        self.classes = tuple(str(number) for number in range(highest + 1))
        if names.is_file():
            self.classes = _class_names(names)
            if len(self.classes) <= highest:
                raise SourceError(f"{names} names {len(self.classes)} classes, the labels go up to {highest}; name them all, one a line")
        self.targets = label_target(self.classes)
        keys = [f"train/{row:05d}" for row in range(len(self._labels["train"]))]
        self._rows = {split: np.arange(len(labels)) for split, labels in self._labels.items()}
        self._rows |= divide(keys, self._labels["train"].astype(np.int64), self._plan.held)

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._rows[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        stored = split if split in self._files else "train"
        labels = self._labels[stored]
        for row, image in chosen(_idx_images(self._files[stored][0], len(labels)), 0, self._rows[split][start:]):
            yield Sample(key=f"{stored}/{row:05d}", data=png(image), values=(int(labels[row]),))


def find_idx(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (images, labels); empty if there are no IDX files."""
    found: dict[tuple[str, str], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _IDX_NAME.fullmatch(entry.name)
        if match and entry.is_file():
            place = ("train" if match["split"] == "train" else "test", match["what"])
            found.setdefault(place, entry)  # if both a file and its .gz exist, the file wins: it sorts first
    splits = sorted({split for split, _ in found}, reverse=True)
    for split in splits:
        if missing := [what for what in ("images", "labels") if (split, what) not in found]:
            raise SourceError(f"{folder} holds IDX files for {split}, but not its {missing[0]}")
    if splits and "train" not in splits:
        raise SourceError(f"{folder} holds IDX files for testing, but no train-images-idx3-ubyte")
    return {split: (found[split, "images"], found[split, "labels"]) for split in splits}


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        text = read_regular(path, MAX_SETTINGS_BYTES).decode()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); write one class name a line") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@contextmanager
def _idx_open(path: Path) -> Iterator[BinaryIO]:
    with open_regular(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # type: ignore[misc]  # it has all that is used here


def _idx_header(path: Path, file: BinaryIO, dimensions: int) -> list[int]:
    header = file.read(4 + 4 * dimensions)
    if len(header) != 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise SourceError(f"{path} does not begin like an IDX file of uint8 in {dimensions} dimension(s): {header[:4].hex()}")
    return [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]


def _idx_labels(path: Path) -> np.ndarray:
    try:
        with _idx_open(path) as file:
            (count,) = _idx_header(path, file, 1)
            if count > MAX_LABELS:
                raise SourceError(f"{path} says it has {count} labels; at most {MAX_LABELS} are read")
            raw = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) != count:
        raise SourceError(f"{path} says it has {count} labels; it has {'more' if len(raw) > count else len(raw)}")
    return np.frombuffer(raw, np.uint8)


def _idx_images(path: Path, labels: int) -> Iterator[np.ndarray]:
    """Yields arrays (height, width) uint8."""
    try:
        with _idx_open(path) as file:
            count, height, width = _idx_header(path, file, 3)
            if count != labels:
                raise SourceError(f"{path} has {count} images, its labels file {labels} labels")
            if not 1 <= height * width <= 1 << 26:
                raise SourceError(f"{path} says its images have {height}x{width} pixels")
            for index in range(count):
                raw = file.read(height * width)
                if len(raw) != height * width:
                    raise SourceError(f"{path} says it has {count} images; it ends in number {index}")
                yield np.frombuffer(raw, np.uint8).reshape(height, width)
            if file.read(1):
                raise SourceError(f"{path} says it has {count} images of {height}x{width}; it has more bytes")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
