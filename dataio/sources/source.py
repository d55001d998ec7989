"""What a source of labelled images is, and the sources made of another one. Every kind of source imports it; it knows none of them."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

ACCEPTED = """accepted are
  cifar10                               downloaded, hash-checked
  cifar-10-python.tar.gz                or another archive in that format, or the folder of its batches
  a folder of Parquet files             Hugging Face layout: train-*.parquet, test-*.parquet (or in data/); or one such file
  a folder with train/ and test/        (or val/, validation/) of one folder a class; or the class folders alone
  a folder of IDX files                 train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...; .gz or not
  a folder made by dataio.convert       (for --data.path only)"""


class SourceError(ValueError):
    """A source that is not there, not of an accepted kind, or not what its kind promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image. With a `refusal` (`kind: detail`) there are no bytes to use, and that is why."""

    key: str
    data: bytes
    label: int
    refusal: str | None = None


class Source(Protocol):
    """Samples in a fixed order, under keys that should be unique (convert makes them so)."""

    @property
    def kind(self) -> str: ...
    @property
    def identity(self) -> str:
        """Changes when the source's files change; does not need the data (no download)."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of files, or groups of files, in the source that are not read."""
        ...

    def splits(self) -> tuple[str, ...]: ...
    def count(self, split: str) -> int | None:
        """None if it is not known before all samples have been seen."""
        ...

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        """From sample `start` of the split on."""
        ...


class Renamed:
    """A source with other class names."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        if len(set(classes)) != len(classes):
            raise SourceError(f"class names must differ from each other; got {', '.join(classes)}")
        self._source, self._names = source, classes
        self.kind, self.ignored = source.kind, source.ignored
        self.identity = hashed(source.identity, *classes)

    @property
    def classes(self) -> tuple[str, ...]:
        if len(self._names) != len(self._source.classes):
            raise SourceError(f"{len(self._names)} class names were given; the source has {len(self._source.classes)} classes")
        return self._names

    def splits(self) -> tuple[str, ...]:
        return self._source.splits()

    def count(self, split: str) -> int | None:
        return self._source.count(split)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        return self._source.samples(split, start)


class Balanced:
    """A sample of a source: the same number of images of each class (one more of the first ones where it does not divide).

    Chosen by a hash of (seed, key), so whatever the source's order.
    """

    def __init__(self, source: Source, *, sizes: Mapping[str, int], seed: int) -> None:
        self._source, self._sizes, self._seed = source, dict(sizes), seed
        self.kind, self.ignored = source.kind, source.ignored
        self.identity = hashed(source.identity, json.dumps([sorted(self._sizes.items()), seed]))

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    def splits(self) -> tuple[str, ...]:
        return self._source.splits()

    def count(self, split: str) -> int | None:
        return self._sizes[split]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        chosen = self._chosen(split)[start:]
        wanted = set(chosen)
        for index, sample in enumerate(self._source.samples(split)):
            if index in wanted:
                yield sample

    def _chosen(self, split: str) -> list[int]:
        ranked: list[list[tuple[bytes, int]]] = [[] for _ in self.classes]
        for index, sample in enumerate(self._source.samples(split)):
            if 0 <= sample.label < len(ranked):
                rank = hashlib.blake2b(sample.key.encode(), digest_size=16, key=str(self._seed).encode()).digest()
                ranked[sample.label].append((rank, index))
        share, rest = divmod(self._sizes[split], len(ranked))
        chosen: list[int] = []
        for label, members in enumerate(ranked):
            wanted = share + (label < rest)
            if len(members) < wanted:
                raise SourceError(f"class {self.classes[label]} has {len(members)} {split} images; a sample of {wanted} was asked for")
            chosen += [index for _, index in sorted(members)[:wanted]]
        return sorted(chosen)


def png(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint8 as PNG; the same bytes for the same pixels and the same zlib."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)  # once; a tenth slower than level 1, and smaller
    return out.getvalue()


def hashed(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stat_hash(folder: Path, paths: Iterable[Path]) -> str:
    """Of the files' names under `folder`, sizes and times: a changed file is another source, a moved folder the same one."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            stat = path.stat()
            line = (os.fsencode(path.relative_to(folder)).hex(), stat.st_size, stat.st_mtime_ns)
        except OSError:  # a dangling link: samples() says so
            line = (os.fsencode(path.relative_to(folder)).hex(), -1, -1)
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def text_of(raw: bytes | str) -> str:
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw.encode("utf-8", "backslashreplace").decode()
