"""Reads image files in one folder per class: a folder of such folders for each split, or the class folders alone.

An image has one label, that of its folder. With `data.targets=NAME:labels` it has the labels of all class folders that hold it. Images in
a folder `unlabelled` need no class folder.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataio.foreign import MAX_IMAGE_BYTES, open_regular, read_regular
from dataio.schema import LABEL, Target
from dataio.sources.source import Options, Sample, SourceError, SourceFile, former_identity, identities_of, key_of, stat_hash
from dataio.sources.splits import ALIASES, divide, formerly_read, plan_splits, strata
from dataio.sources.targets import Asked, parse_targets, unknown

IMAGE_SUFFIXES = frozenset(
    """
    .png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .heic .heif .avif .ico .tga
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
NO_LABELS = "_none"
"""The class folder of images without labels, where images may have several. Where images have one label, it is a class like any other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    key: str
    path: Path
    values: tuple[Any, ...]


class ImageFolder:
    """The classes are the sorted names of the training folders.

    Keys are the files' names below the source, `train/cat/1.png`; for images with several labels, the names below the class folder,
    `1.png`.
    """

    kind = "folder"

    def __init__(self, folder: Path, folders: Mapping[str, Path], options: Options) -> None:
        """`folders` is the result of find_folders."""
        asked = _asked(options.targets)
        unlabelled = folders.get("unlabelled")
        listed = {split: _list_images(where, leave_out=unlabelled) for split, where in folders.items() if split != "unlabelled"}
        several = asked.kind == "labels"
        self.classes = tuple(sorted(name for name in listed["train"] if not (several and name == NO_LABELS)))
        _check_classes(folders, listed, self.classes, several=several)
        target = Target(name=asked.name, kind="labels" if several else "label", classes=self.classes)
        self.targets = (target,)

        ignored: Counter[str] = Counter()
        files = {split: {name: _images_of(paths, ignored) for name, paths in sorted(found.items())} for split, found in listed.items()}
        read = {split: [path for paths in found.values() for path in paths] for split, found in files.items()}
        images = {
            split: _with_labels(folders[split], found, target) if several else _with_label(folder, found, target)
            for split, found in files.items()
        }
        if unlabelled is not None:
            read["unlabelled"] = _images_of(_walk(unlabelled), ignored)
            blank = unknown(self.targets)
            images["unlabelled"] = [_Image(key=_key(folder, path), path=path, values=blank) for path in read["unlabelled"]]
        self.ignored = tuple(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(ignored.items()))
        self.identities = _identities(folder, folders, read, options)
        self.identity = self.identities[0]
        self._plan = plan_splits(images, test_fraction=options.test_fraction, validation_fraction=options.validation_fraction)
        self._images = images | _divided(images["train"], target, self._plan.held)

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._images[split])

    def files(self, split: str) -> list[SourceFile]:
        return [SourceFile(key=image.key, path=image.path, values=image.values) for image in self._images[split]]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for image in self._images[split][start:]:
            try:
                yield Sample(key=image.key, data=read_regular(image.path, MAX_IMAGE_BYTES), values=image.values)
            except OSError as error:
                yield Sample(key=image.key, data=b"", values=image.values, refusal=f"unreadable: {error.strerror}")


def find_folders(folder: Path) -> dict[str, Path]:
    """Split -> the folder that holds its class folders, or its images (unlabelled); empty if no class folder has images."""
    below = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    named = {split: [below[name] for name in names if name in below] for split, names in ALIASES.items()}
    unlabelled = next((path for path in named.pop("unlabelled") if any(map(_is_image, _walk(path)))), None)
    found = {split: next((path for path in paths if _has_images(path)), None) for split, paths in named.items()}
    if found["train"] is None:
        found = {"train": folder if _has_images(folder, leave_out=unlabelled) else None}
    if found["train"] is None:
        return {}
    return {split: path for split, path in (found | {"unlabelled": unlabelled}).items() if path is not None}


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
"""Class -> the files in its folder."""


def _check_classes(folders: Mapping[str, Path], listed: Mapping[str, Listed], classes: tuple[str, ...], *, several: bool) -> None:
    for split, found in listed.items():
        if lacking := sorted(set(found) - set(classes) - ({NO_LABELS} if several else set())):
            raise SourceError(
                f"{folders[split]} holds classes that {folders['train']} lacks: {', '.join(lacking[:5])}; both need the same class folders"
            )
    if not classes:
        raise SourceError(f"{folders['train']} holds no class folder but {NO_LABELS}; there must be a class to learn")


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


def _identities(folder: Path, folders: Mapping[str, Path], images: Mapping[str, list[Path]], options: Options) -> tuple[str, ...]:
    """`images`: all files that are read, by split."""
    formerly = {*formerly_read(images), *(("unlabelled",) if folders["train"] == folder else ())}  # it was a class then
    stat = stat_hash(folder, [path for paths in images.values() for path in paths])
    before = stat if formerly >= set(images) else stat_hash(folder, [path for split in formerly for path in images.get(split, [])])
    former = former_identity(before, options, has_test=bool({"test", "validation"} & set(images)))
    return identities_of(stat, images, options, former=former)


def _has_images(folder: Path, leave_out: Path | None = None) -> bool:
    """Whether a class folder of this folder holds an image."""
    return any(_is_image(path) for files in _list_images(folder, leave_out).values() for path in files)


def _list_images(folder: Path, leave_out: Path | None = None) -> dict[str, list[Path]]:
    """Class -> all its files, sorted, without hidden ones."""
    classes = {}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith(".") and entry != leave_out and (files := _walk(entry)):
            classes[key_of(os.fsencode(entry.name))] = files
    return classes


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones; links to folders are not followed."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _images_of(files: Iterable[Path], ignored: Counter[str]) -> list[Path]:
    """The files that are images by their names; counts the others by suffix."""
    files = list(files)
    ignored.update(path.suffix.lower() for path in files if not _is_image(path))
    return [path for path in files if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _key(folder: Path, path: Path) -> str:
    return key_of(os.fsencode(path.relative_to(folder).as_posix()))
