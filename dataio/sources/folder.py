"""Reads image files in one folder per class: a folder of such folders for each split, or the class folders alone.

layout.py says which folders these are. An image has one label, that of its folder. With `data.targets=NAME:labels` it has the labels of all
class folders that hold it. Images in a folder `unlabelled` need no class folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dataio.foreign import MAX_IMAGE_BYTES, MAX_TEXT_FILE_BYTES, open_regular, read_regular
from dataio.schema import LABEL, Target
from dataio.sources.layout import Former, Layout, Tree, formerly_found
from dataio.sources.source import (
    Options,
    Sample,
    SourceError,
    SourceFile,
    former_identity,
    hashed,
    identities_of,
    key_of,
    no_columns,
    plan_of,
    stat_hash,
)
from dataio.sources.splits import divide, formerly_read, strata
from dataio.sources.targets import Asked, parse_targets, unknown

NO_LABELS = "_none"
"""The class folder of images without labels, where images may have several. Where images have one label, it is a class like any other."""
RULE = "folders 2"
"""Part of the identity of a folder that layout.py reads otherwise than the earlier rule did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    key: str
    path: Path
    values: tuple[Any, ...]


class ImageFolder:
    """The classes are the sorted names of the class folders of all splits.

    Keys are the files' names below the source, `train/cat/1.png`; for images with several labels, the names below the class folder,
    `1.png`.
    """

    kind = "folder"
    most_bytes = MAX_IMAGE_BYTES
    """Of a file."""

    def __init__(self, tree: Tree, layout: Layout, options: Options) -> None:
        no_columns(options, "class folders")
        asked = _asked(options.targets)
        several = asked.kind == "labels"
        listed = {split: layout.classes(split) for split in layout.splits if split != "unlabelled"}
        names = {name for found in listed.values() for name in found}
        self.classes = tuple(sorted(name for name in names if not (several and name == NO_LABELS)))
        if not self.classes:
            raise SourceError(f"{layout.splits['train'].path} holds no class folder but {NO_LABELS}; there must be a class to learn")
        target = Target(name=asked.name, kind="labels" if several else "label", classes=self.classes)
        self.targets = (target,)

        files = {split: {name: list(found.all_images) for name, found in folders.items()} for split, folders in listed.items()}
        images = {
            split: _with_labels(layout.splits[split].path, found, target) if several else _with_label(tree.path, found, target)
            for split, found in files.items()
        }
        if (unlabelled := layout.splits.get("unlabelled")) is not None:
            files["unlabelled"] = {"": list(unlabelled.all_images)}
            blank = unknown(self.targets)
            images["unlabelled"] = [_Image(key=_key(tree.path, path), path=path, values=blank) for path in unlabelled.all_images]
        self.ignored = layout.not_read
        self.identities = _identities(tree, files, options)
        self.identity = self.identities[0]
        self._plan = plan_of(images, options)
        self._images = images | _divided(images["train"], target, self._plan.held)

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._images[split])

    def files(self, split: str) -> list[SourceFile]:
        return [SourceFile(key=image.key, path=image.path, values=image.values) for image in self._images[split]]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for image in self._images[split][start:]:
            try:
                yield Sample(key=image.key, data=read_regular(image.path, self.most_bytes), values=image.values)
            except OSError as error:
                yield Sample(key=image.key, data=b"", values=image.values, refusal=f"unreadable: {error.strerror}")


class TextFolder(ImageFolder):
    """Texts (.txt) in one folder a class, found as images are."""

    kind = "text-folder"
    most_bytes = MAX_TEXT_FILE_BYTES


class RefusedFolder:
    """A folder that layout.py refuses, and that was read by the earlier rule: what was converted then is found by its identity. Anything
    else raises the refusal."""

    kind = "folder"
    ignored: tuple[str, ...] = ()
    held_out: Mapping[str, float] = {}

    def __init__(self, problem: SourceError, former: Former, root: Path, options: Options) -> None:
        self._problem = problem
        self.identities = (hashed(str(problem), RULE), *_former_identities(root, former, options))
        self.identity = self.identities[0]

    @property
    def targets(self) -> NoReturn:
        raise self._problem

    @property
    def classes(self) -> NoReturn:
        raise self._problem

    def splits(self) -> NoReturn:
        raise self._problem

    def count(self, split: str) -> NoReturn:
        raise self._problem

    def samples(self, split: str, start: int = 0) -> NoReturn:
        raise self._problem


def _asked(targets: str) -> Asked:
    """The one target that a folder has."""
    asked = parse_targets(targets) or (Asked(name=LABEL, kind="label"),)
    if len(asked) != 1 or asked[0].kind == "number":
        raise SourceError(
            f"data.targets={targets!r}: a folder of class folders has one target, of kind label or labels; "
            f"write {LABEL}:labels where an image lies in several class folders, or name a table (labels.csv) as data.path"
        )
    return asked[0]


Listed = Mapping[str, list[Path]]
"""Class -> the images in its folder."""


def _with_label(folder: Path, found: Listed, target: Target) -> list[_Image]:
    """The images by class, each with the label of its folder."""
    numbers = {name: number for number, name in enumerate(target.classes)}
    return [_Image(key=_key(folder, path), path=path, values=(numbers[name],)) for name, paths in found.items() for path in paths]


def _with_labels(folder: Path, found: Listed, target: Target) -> list[_Image]:
    """The images of a split's folder by name, each with the labels of all class folders that hold it."""
    by_name: dict[str, dict[str, Path]] = {}
    for name, paths in found.items():
        for path in paths:
            below = Path(*path.relative_to(folder).parts[1:])
            by_name.setdefault(key_of(os.fsencode(below.as_posix())), {})[name] = path
    images = []
    for key, same in sorted(by_name.items()):
        if NO_LABELS in same and len(same) > 1:
            other = next(path for name, path in same.items() if name != NO_LABELS)
            raise SourceError(f"{same[NO_LABELS]} is said to have no label, {other} to have one; remove one of the two")
        first, *others = same.values()
        for path in others:
            _check_same(first, path)
        images.append(_Image(key=key, path=first, values=(np.array([name in same for name in target.classes], target.dtype),)))
    return images


def _check_same(one: Path, other: Path) -> None:
    """Refuses two files with one name and different content."""
    hashes = []
    for path in (one, other):
        try:
            with open_regular(path) as file:
                hashes.append(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SourceError(f"{one} and {other} cannot be compared: {path}: {error.strerror}; mend or remove it") from error
    if hashes[0] != hashes[1]:
        raise SourceError(
            f"{one} and {other} have one name, so should be one image with both labels, but their bytes differ; rename one of the two"
        )


def _divided(train: list[_Image], target: Target, held: Mapping[str, float]) -> dict[str, list[_Image]]:
    """The images of train, and of each split that is held out of it."""
    if not held:
        return {"train": train}
    column = np.array([image.values[0] for image in train], target.dtype).reshape(len(train), *target.shape)
    rows = divide([image.key for image in train], strata(target, column), held)
    return {split: [train[row] for row in rows[split].tolist()] for split in rows}


def _identities(tree: Tree, files: Mapping[str, Listed], options: Options) -> tuple[str, ...]:
    """`files`: split -> class -> all images that are read. Where the earlier rule read the same, the identity is still the one it had."""
    former = formerly_found(tree)
    before = _former_identities(tree.path, former, options) if former is not None else ()
    if former is not None and _plain(former.splits) == _plain(files):
        return before
    stat = stat_hash(tree.path, [path for found in files.values() for paths in found.values() for path in paths])
    classes = {split: list(found) for split, found in files.items()}
    return (hashed(identities_of(stat, files, options)[0], RULE, json.dumps(classes)), *before)


def _plain(files: Mapping[str, Mapping[str, Iterable[Path]]]) -> dict[str, dict[str, list[Path]]]:
    return {split: {name: list(paths) for name, paths in found.items()} for split, found in files.items()}


def _former_identities(root: Path, former: Former, options: Options) -> tuple[str, ...]:
    """The identities of a folder by the earlier rule."""
    images = {split: former.files(split) for split in former.splits}
    formerly = {*formerly_read(images), *(("unlabelled",) if former.train_is_root else ())}  # it was a class then
    stat = stat_hash(root, [path for paths in images.values() for path in paths])
    before = stat if formerly >= set(images) else stat_hash(root, [path for split in formerly for path in images.get(split, [])])
    oldest = former_identity(before, options, has_test=bool({"test", "validation"} & set(images)))
    return identities_of(stat, images, options, former=oldest)


def _key(folder: Path, path: Path) -> str:
    return key_of(os.fsencode(path.relative_to(folder).as_posix()))
