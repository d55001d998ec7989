"""Reads CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html): downloaded, as an archive, or as a folder of its batches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataio.schema import Target
from dataio.sources.hostile import CIFAR_MEMBERS, CIFAR_TRAIN
from dataio.sources.pickled import load_cifar_pickle
from dataio.sources.source import Options, Sample, SourceError, asked_for, hashed, no_columns, plan_of, png, text_of
from dataio.sources.splits import Rows, divide
from dataio.sources.targets import label_target, only_label

CIFAR10 = "cifar10"


class Cifar:
    """CIFAR-10, or other images in its format: five training batches, a test batch and the class names."""

    ignored: tuple[str, ...] = ()

    def __init__(self, *, kind: str, identity: str, read: Callable[[], dict[str, bytes]], options: Options) -> None:
        no_columns(options, "CIFAR-10's images")
        only_label(options.targets, "CIFAR-10's images")
        more = asked_for(options)
        self.kind, self.identity, self._read = kind, hashed(identity, *more) if more else identity, read
        self.identities = (self.identity,)
        self._plan = plan_of(("train", "test"), options)

    @property
    def targets(self) -> tuple[Target, ...]:
        return label_target(self._content[0])

    @property
    def classes(self) -> tuple[str, ...]:
        return self._content[0]

    @property
    def held_out(self) -> Mapping[str, float]:
        return self._plan.held

    def splits(self) -> tuple[str, ...]:
        return self._plan.splits

    def count(self, split: str) -> int | None:
        return len(self._rows[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        images = self._images["test" if split == "test" else "train"]
        for row in self._rows[split][start:].tolist():
            batch, index, key = images[row]
            pixels = np.ascontiguousarray(batch.images[index].reshape(3, 32, 32).transpose(1, 2, 0))  # (32, 32, 3)
            yield Sample(key=key, data=png(pixels), values=(batch.labels[index],))

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """Split -> its rows within the stored split."""
        keys = [key for _, _, key in self._images["train"]]
        labels = np.array([batch.labels[index] for batch, index, _ in self._images["train"]], np.int64)
        return {"test": np.arange(len(self._images["test"]))} | divide(keys, labels, self._plan.held)

    @cached_property
    def _images(self) -> "dict[str, list[tuple[_CifarBatch, int, str]]]":
        """Stored split -> (batch, index in it, key) of each image; the key is the file's name, where every image has one."""
        images = {}
        for split, batches in self._content[1].items():
            names = [name for batch in batches for name in batch.filenames]
            unique = len(set(names)) == sum(len(batch.labels) for batch in batches)
            images[split] = [
                (batch, index, batch.filenames[index] if unique else f"{batch.name}/{index:05d}")
                for batch in batches
                for index in range(len(batch.labels))
            ]
        return images

    @cached_property
    def _content(self) -> tuple[tuple[str, ...], dict[str, list["_CifarBatch"]]]:
        members = self._read()
        if missing := [name for name in CIFAR_MEMBERS if name not in members]:
            raise SourceError(f"the CIFAR-10 batches are incomplete: {', '.join(missing)} missing; get cifar-10-python.tar.gz again")
        meta = load_cifar_pickle("batches.meta", members["batches.meta"])
        names = meta.get("label_names")
        if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
            raise SourceError("batches.meta does not hold label_names, a list of class names")
        classes = tuple(text_of(name) for name in names)
        return classes, {
            "train": [_cifar_batch(name, members[name]) for name in CIFAR_TRAIN],
            "test": [_cifar_batch("test_batch", members["test_batch"])],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _CifarBatch:
    name: str
    images: np.ndarray
    """(n, 3072) uint8: 1024 red, 1024 green, 1024 blue values, by row"""
    labels: list[int]
    filenames: list[str]
    """n names, or none"""


def _cifar_batch(name: str, raw: bytes) -> _CifarBatch:
    content = load_cifar_pickle(name, raw)
    images, labels, filenames = content.get("data"), content.get("labels"), content.get("filenames", [])
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.shape} {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise SourceError(f"{name}: data is {found}, not a (n, 3072) uint8 array")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(type(label) is int for label in labels):
        raise SourceError(f"{name}: labels is not a list of {len(images)} integers, one an image")
    if not all(-(2**63) <= label < 2**63 for label in labels):
        raise SourceError(f"{name}: a label is not a 64-bit integer")
    named = isinstance(filenames, list) and len(filenames) == len(labels) and all(isinstance(file, bytes | str) for file in filenames)
    return _CifarBatch(name=name, images=images, labels=labels, filenames=[text_of(file) for file in filenames] if named else [])


def torchvision_cifar10() -> Any:
    from torchvision.datasets import CIFAR10 as dataset  # imports torch: only where needed

    return dataset


def download(root: Path) -> Path:
    """Downloads torchvision's own archive with its own downloader and checks its MD5; a second call finds the file."""
    from torchvision.datasets.utils import download_url

    dataset = torchvision_cifar10()
    root.mkdir(parents=True, exist_ok=True)
    try:
        download_url(dataset.url, str(root), dataset.filename, dataset.tgz_md5)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise SourceError(
            f"CIFAR-10 could not be downloaded from {dataset.url} into {root}: {error}. Offline, give an archive that you have: "
            f"--data.path /path/to/{dataset.filename}; or train without it: --config quickstart, whose images are part of the repository"
        ) from error
    return root / str(dataset.filename)
