"""Image files in one folder a class."""

import os
from collections.abc import Iterator
from pathlib import Path

from dataio.sources.source import Sample, SourceError, hashed, stat_hash, text_of
from dataio.sources.splits import HELD_OUT_SPLITS, held_out

IMAGE_SUFFIXES = frozenset(
    """
    .png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .heic .heif .avif .ico .tga
    """.split()  # noqa: SIM905 (a list of them fills the page)
)


class ImageFolder:
    """One folder a class, under train/ and a held-out folder, or alone. Classes are the folders' names, sorted."""

    kind = "folder"

    def __init__(self, folder: Path, train: Path, test: Path | None, test_fraction: float) -> None:
        self._folder = folder
        listed = {"train": _list_images(train)} | ({"test": _list_images(test)} if test is not None else {})
        self.classes = tuple(sorted(listed["train"]))
        if test is not None and (unknown := sorted(set(listed["test"]) - set(self.classes))):
            raise SourceError(f"{test} holds classes that {train} lacks: {', '.join(unknown[:5])}; both need the same class folders")
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._files: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
        ignored: dict[str, int] = {}
        for split, classes in listed.items():
            for name in sorted(classes):
                for path in classes[name]:
                    if path.suffix.lower() not in IMAGE_SUFFIXES:
                        ignored[path.suffix.lower()] = ignored.get(path.suffix.lower(), 0) + 1
                        continue
                    hold = test is None and held_out(self._key(path), test_fraction)
                    self._files["test" if hold else split].append((path, numbers[name]))
        self.ignored = tuple(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(ignored.items()))
        paths = [path for files in self._files.values() for path, _ in files]
        self.identity = hashed(stat_hash(folder, paths), "" if test is not None else repr(test_fraction))

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        return len(self._files[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for path, label in self._files[split][start:]:
            try:
                yield Sample(key=self._key(path), data=path.read_bytes(), label=label)
            except OSError as error:
                yield Sample(key=self._key(path), data=b"", label=label, refusal=f"unreadable: {error.strerror}")

    def _key(self, path: Path) -> str:
        return text_of(os.fsencode(path.relative_to(self._folder).as_posix()))


def find_folders(folder: Path) -> tuple[Path, Path | None] | None:
    """(training folder, held-out folder if there is one), or None if there are no class folders with images."""
    below = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if "train" in below and _has_images(below["train"]):
        return below["train"], next((below[name] for name in HELD_OUT_SPLITS if name in below and _has_images(below[name])), None)
    return (folder, None) if _has_images(folder) else None


def _has_images(folder: Path) -> bool:
    """Whether an image lies in a class folder of this folder."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for files in _list_images(folder).values() for path in files)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """class -> all its files, sorted; hidden ones left out, links to folders below a class folder not followed."""
    classes = {}
    for entry in folder.iterdir():
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files: list[Path] = []
        for where, folders, names in os.walk(entry):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(where, name) for name in names if not name.startswith(".")]
        if files:
            classes[text_of(os.fsencode(entry.name))] = sorted(files)
    return classes
