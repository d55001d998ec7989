"""Reads images whose labels do not matter: any folder of images, and all the kinds of sources that have labels, without them.

Called by dataio.unlabelled. All images are one split, `unlabelled`. A label that is there anyway is kept, because a report can then say how
good a model's guesses were: in a folder, the name of the folder that holds the image. Nothing is refused for its label.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from dataio.foreign import MAX_IMAGE_BYTES, open_regular, read_regular
from dataio.schema import UNLABELLED, Target, single_label
from dataio.sources import ACCEPTED, Sample, Source, SourceError, SourceFile, open_source
from dataio.sources.huggingface import UnlabelledRows, find_parquet
from dataio.sources.idx import find_idx
from dataio.sources.layout import Tree, scan, without_labels
from dataio.sources.source import hashed, key_of, stat_hash

UNKNOWN = "unknown"
"""The class of a source that has none: a label needs one. No image has it."""


def open_unlabelled(path: str, *, root: Path, image_column: str = "") -> Source:
    """The images at `path`; downloads go to `root`. SourceError for what cannot be read."""
    where = Path(path).expanduser()
    try:
        if where.is_dir():
            if not find_idx(where) and not (where / "data_batch_1").is_file():
                if parquet := find_parquet(where):
                    return UnlabelledRows(where, parquet, image_column)
                if (tree := without_labels(scan(where))).has_images:
                    return UnlabelledFolder(where, tree)
        elif where.is_file() and _is_parquet(where):
            return UnlabelledRows(where.parent, {"": [where]}, image_column)
        return WithoutLabels(open_source(path, root=root, test_fraction=0.1, image_column=image_column, whole=True))
    except SourceError as error:
        if not where.exists():
            raise SourceError(f"data.unlabelled={path!r} does not exist; give a folder of images, or a source: {ACCEPTED}") from error
        raise SourceError(str(error).replace("data.path", "data.unlabelled")) from error


def _is_parquet(file: Path) -> bool:
    with open_regular(file) as opened:
        return opened.read(4) == b"PAR1"


class UnlabelledFolder:
    """All images below a folder, sorted. Keys are the files' names below it. Images directly in it have no label."""

    kind = "unlabelled-folder"
    ignored: tuple[str, ...] = ()
    held_out: Mapping[str, float] = {}

    def __init__(self, folder: Path, tree: Tree) -> None:
        names = [("" if path.parent == tree.path else key_of(os.fsencode(path.parent.name)), path) for path in tree.all_images]
        self.classes = tuple(sorted({name for name, _ in names if name})) or (UNKNOWN,)
        self.targets = single_label(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)} | {"": -1}
        self._files = [
            SourceFile(key=key_of(os.fsencode(path.relative_to(folder).as_posix())), path=path, values=(numbers[name],))
            for name, path in names
        ]
        self.identity = hashed(stat_hash(folder, tree.all_images))
        self.identities = (self.identity,)

    def splits(self) -> tuple[str, ...]:
        return (UNLABELLED,)

    def count(self, split: str) -> int | None:
        return len(self._files)

    def files(self, split: str) -> list[SourceFile]:
        return list(self._files)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for file in self._files[start:]:
            try:
                yield Sample(key=file.key, data=read_regular(file.path, MAX_IMAGE_BYTES), values=file.values)
            except OSError as error:
                yield Sample(key=file.key, data=b"", values=file.values, refusal=f"unreadable: {error.strerror}")


class WithoutLabels:
    """The split `unlabelled` of a source if it has one, else `train`. A label counts if it is the source's only target, and a bad one is
    none."""

    held_out: Mapping[str, float] = {}

    def __init__(self, source: Source) -> None:
        self._source = source
        self.kind, self.ignored = f"{UNLABELLED}-{source.kind}", source.ignored
        self.identities = tuple(hashed(identity, UNLABELLED) for identity in source.identities)
        self.identity = self.identities[0]

    @cached_property
    def _is_label(self) -> bool:  # asked late: CIFAR-10 would be downloaded
        targets = self._source.targets
        return len(targets) == 1 and targets[0].kind == "label"

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.targets[0].classes if self._is_label else (UNKNOWN,)

    @property
    def targets(self) -> tuple[Target, ...]:
        return single_label(self.classes)

    def splits(self) -> tuple[str, ...]:
        return (UNLABELLED,)

    def count(self, split: str) -> int | None:
        return self._source.count(self._stored)

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for sample in self._source.samples(self._stored, start):
            is_bad_label = sample.refusal is not None and sample.refusal.startswith("bad label")
            yield replace(sample, values=(self._label(sample.values[0]),), refusal=None if is_bad_label else sample.refusal)

    @property
    def _stored(self) -> str:
        return UNLABELLED if UNLABELLED in self._source.splits() else "train"

    def _label(self, value: object) -> int:
        return value if self._is_label and isinstance(value, int) and 0 <= value < len(self.classes) else -1
