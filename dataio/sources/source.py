"""The interface of a source of labelled images, and sources made from another one. Every kind of source imports it."""

import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from dataio.schema import Target
from dataio.sources.splits import HELD_OUT_RULE, Plan, plan_splits

ACCEPTED = """accepted are
  cifar10                               downloaded, hash-checked
  cifar-10-python.tar.gz                or another archive in that format, or the folder of its batches
  a folder of Parquet files             Hugging Face layout: train-*.parquet, test-*.parquet (or in data/); or one such file
  a folder with train/ and test/        (or val/, validation/) of one folder a class; or the class folders alone; unlabelled/ beside them
  a table: labels.csv or labels.tsv     a column image (of files, relative to the table), columns of labels, perhaps a column split;
                                        or a folder of images with one such table in it
  a folder of IDX files                 train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...; .gz or not
  a folder made by dataio.convert       (for --data.path only)"""
ACCEPTED_TEXTS = """accepted are
  a table (.csv, .tsv)                  a column text, columns of labels, perhaps a column split
  JSON lines (.jsonl, .ndjson)          an object a line, with the same keys
  a Parquet file                        with the same columns
  a folder of such files                train.csv, test.csv (or -00000-of-00002.parquet, ...; also in data/)
  a folder with train/ and test/        (or val/, validation/) of one folder a class with .txt files; or the class folders alone
  a folder made by dataio.convert       (for --data.path only)"""


class SourceError(ValueError):
    """A source that does not exist, is of no accepted kind, or breaks the rules of its kind."""

    failure_kind = "user"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image, or one text in UTF-8, and its target values. If it has a `refusal` (`kind: detail`), it cannot be used for that reason."""

    key: str
    data: bytes
    values: tuple[Any, ...]
    """One for each target of the source: for a label the class number, -1 if unknown; for labels (classes,) uint8 of 0, 1 and, if unknown,
    255; for a number a float, NaN if unknown."""
    refusal: str | None = None

    @property
    def label(self) -> int:
        """For a source whose first target is a label."""
        return int(self.values[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A sample of a source whose samples are files of their own, which need not be read whole to look at them."""

    key: str
    path: Path
    values: tuple[Any, ...]


@runtime_checkable
class HasFiles(Protocol):
    """What sources of files have beside `Source`."""

    def files(self, split: str) -> list[SourceFile]:
        """The files of a split, in the order of its samples."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to read a source; the `data.*` settings of the same names."""

    test_fraction: float
    validation_fraction: float = 0.0
    targets: str = ""
    image_column: str = ""
    label_column: str = ""
    text_column: str = ""
    holds_texts: bool = False
    """The source is one of texts."""
    whole: bool = False
    """Nothing is held out of a source that stores the training split alone."""


class Source(Protocol):
    """Samples in a fixed order, under keys that should be unique (convert makes them unique)."""

    @property
    def kind(self) -> str: ...
    @property
    def identity(self) -> str:
        """Changes when the source's files, or what is read of them, change; computed without the data (no download)."""
        ...

    @property
    def identities(self) -> tuple[str, ...]:
        """The identity, then earlier identities of the same files: they find what was converted under one of them."""
        ...

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of the samples. The mean and standard deviation of a number are not known here."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the first target; empty if it is a number."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of files, or groups of files, in the source that are not read."""
        ...

    @property
    def held_out(self) -> Mapping[str, float]:
        """Split -> the fraction of the training samples held out for it, for the splits that the source does not store."""
        ...

    def splits(self) -> tuple[str, ...]:
        """`train` and `test`, plus `validation` and `unlabelled` if they exist, in the order of `dataio.schema.SPLITS`."""
        ...

    def count(self, split: str) -> int | None:
        """Number of samples; None if it is only known after all samples were read."""
        ...

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        """Yields the samples of the split from number `start` on."""
        ...


class Renamed:
    """A source with other class names."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        if len(set(classes)) != len(classes):
            raise SourceError(f"class names must differ from each other; got {', '.join(classes)}")
        self._source, self._names = source, classes
        self.kind, self.ignored = source.kind, source.ignored
        self.identities = tuple(hashed(identity, *classes) for identity in source.identities)
        self.identity = self.identities[0]

    @property
    def targets(self) -> tuple[Target, ...]:
        targets = self._source.targets
        if len(targets) != 1 or targets[0].kind == "number":
            named = ", ".join(f"{target.name} ({target.kind})" for target in targets)
            raise SourceError(
                f"class names can be given where there is one target that has classes; the source has {named}; leave them out"
            )
        if len(self._names) != len(targets[0].classes):
            raise SourceError(f"{len(self._names)} class names were given; the source has {len(targets[0].classes)} classes")
        return (replace(targets[0], classes=self._names),)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.targets[0].classes

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._source.held_out

    def splits(self) -> tuple[str, ...]:
        return self._source.splits()

    def count(self, split: str) -> int | None:
        return self._source.count(split)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        return self._source.samples(split, start)


class Balanced:
    """A subset of a source: the same number of images of each class (one more for the first classes if it does not divide evenly).

    A hash of (seed, key) chooses them, so the source's order does not matter; the classes are those of the first target. Splits without a
    size are left out.
    """

    def __init__(self, source: Source, *, sizes: Mapping[str, int], seed: int) -> None:
        self._source, self._sizes, self._seed = source, dict(sizes), seed
        self.kind, self.ignored = source.kind, source.ignored
        chosen = json.dumps([sorted(self._sizes.items()), seed])
        self.identities = tuple(hashed(identity, chosen) for identity in source.identities)
        self.identity = self.identities[0]

    @property
    def targets(self) -> tuple[Target, ...]:
        return self._source.targets

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._source.held_out

    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in self._source.splits() if split in self._sizes)

    def count(self, split: str) -> int | None:
        return self._sizes[split]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        chosen = self._chosen(split)[start:]
        wanted = set(chosen)
        for index, sample in enumerate(self._source.samples(split)):
            if index in wanted:
                yield sample

    def _chosen(self, split: str) -> list[int]:
        if self.targets[0].kind != "label":
            raise SourceError(
                f"a sample has as many images of each class, but {self.targets[0].name} is of kind {self.targets[0].kind}; "
                f"name a target of kind label first, or take the whole source"
            )
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


def identities_of(files: str, stored: Collection[str], options: Options, *, former: str | None = None) -> tuple[str, ...]:
    """The identities of a source whose files (those that are read) have the `stat_hash` `files`: the present one, then the earlier one,
    `former`.

    For a source that stores just train and test, the identity never changed. With options that are newer, there is no earlier identity.
    """
    more = asked_for(options)
    if set(stored) == {"train", "test"}:
        return (hashed(files, "", *more),)
    if is_whole(stored, options):
        return (hashed(files, "whole", *more),)
    identity = hashed(files, "" if "test" in stored else repr(options.test_fraction), HELD_OUT_RULE, *more)
    return (identity,) if more or former is None else (identity, former)


def is_whole(stored: Collection[str], options: Options) -> bool:
    """Whether nothing is to be held out."""
    return options.whole and not {"test", "validation"} & set(stored)


def plan_of(stored: Collection[str], options: Options) -> Plan:
    """The splits of a source that stores these."""
    if is_whole(stored, options):
        return Plan(stored=frozenset(stored), held={})
    return plan_splits(stored, test_fraction=options.test_fraction, validation_fraction=options.validation_fraction)


def former_identity(files: str, options: Options, *, has_test: bool) -> str:
    """The identity that a source had when only keys decided its held-out test samples, and validation served as test."""
    return hashed(files, "" if has_test else repr(options.test_fraction))


def asked_for(options: Options) -> list[str]:
    """The parts of the identity for options that are not at their defaults; `test_fraction` is added where it is used."""
    more = [f"validation_fraction={options.validation_fraction!r}"] if options.validation_fraction else []
    names = ("targets", "image_column", "label_column", "text_column")
    return more + [f"{name}={value}" for name in names if (value := getattr(options, name))]


def no_columns(options: Options, what: str) -> None:
    """Refuses the names of columns for `what`, a kind of source that has none."""
    for name in ("image_column", "label_column", "text_column"):
        if value := getattr(options, name):
            raise SourceError(f"data.{name}={value!r}: {what} have no columns; leave it empty")


def png(pixels: np.ndarray) -> bytes:
    """Encodes (H, W) or (H, W, 3) uint8 as PNG; the same pixels and the same zlib give the same bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)  # runs once; a tenth slower than level 1, but smaller
    return out.getvalue()


def hashed(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stat_hash(folder: Path, paths: Iterable[Path]) -> str:
    """Hash of the files' names under `folder`, sizes and times: a changed file makes another source, a moved folder does not."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            stat = path.stat()
            line = (os.fsencode(path.relative_to(folder)).hex(), stat.st_size, stat.st_mtime_ns)
        except OSError:  # a dangling link: samples() reports it
            line = (os.fsencode(path.relative_to(folder)).hex(), -1, -1)
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def text_of(raw: bytes | str) -> str:
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw.encode("utf-8", "backslashreplace").decode()


_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


def key_of(name: bytes) -> str:
    """A file's name or path as text, from which `name_of` gets it back: a byte that is not UTF-8 becomes `\\xff`. Nearly all names stay as
    they are; only a backslash that stands before `x` and two digits becomes `\\x5c`."""
    return _ESCAPED.sub(rb"\\x5cx\1", name).decode("utf-8", "backslashreplace")


def name_of(key: str) -> bytes:
    """The name of which `key_of` made this key."""
    return _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), key.encode())
