"""What a converted data set is: its classes, its shards with their hashes, and a fingerprint of its content.

Written last by convert, so a folder with a manifest is complete. Read by parquet (where the shards are) and by the loader (the fingerprint
keys the order of the samples).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dataio.config import DataConfig

VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "test")
_HEX = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")


class ManifestError(ValueError):
    """A manifest.json that is damaged, or written by another version."""

    failure_kind = "user"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One Parquet file of a split."""

    name: str
    rows: int
    row_group_rows: tuple[int, ...]
    size_bytes: int
    sha256: str
    footer_sha256: str
    """Of the Parquet footer alone: no page checksum covers it, and it is cheap to check when the file is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    count: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    classes: tuple[str, ...]
    splits: dict[str, SplitInfo]
    """By name: "train" and "test"."""
    fingerprint: str
    """SHA-256 over the classes and, by split, each (key, label, content hash) in order; does not depend on the sharding."""
    image_sizes: dict[str, int]
    """"HxW" as displayed -> images of that size, over all splits."""
    quarantined: int
    source: str
    """Kind of the source: cifar10, cifar-tar, cifar-batches, huggingface, folder, idx."""
    identity: str
    """Hash of the source (its files' names, sizes, times) and of the settings it was converted with."""
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Strict: raises ManifestError on a missing or unknown key, a wrong type, or numbers that do not add up."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"{MANIFEST_NAME} is not JSON ({error}); convert the source again") from None
        if isinstance(value, dict) and value.get("version") != VERSION:
            raise ManifestError(
                f"{MANIFEST_NAME} has version {value.get('version')!r}, this program reads {VERSION}; convert the source again"
            )
        manifest = cls(**_fields(cls, value, "manifest"))
        manifest._check()
        return manifest

    def _check(self) -> None:
        if set(self.splits) != set(SPLITS):
            raise ManifestError(f"{MANIFEST_NAME} has splits {sorted(self.splits)}, not {sorted(SPLITS)}; convert the source again")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ManifestError(f"{MANIFEST_NAME} has no classes, or the same class twice; convert the source again")
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        if len(set(names)) != len(names):
            raise ManifestError(f"{MANIFEST_NAME} names a shard twice; convert the source again")
        for name, split in self.splits.items():
            for shard in split.shards:
                if sum(shard.row_group_rows) != shard.rows or min(shard.row_group_rows, default=0) <= 0:
                    raise ManifestError(f"{MANIFEST_NAME}: the row groups of {shard.name} do not add up to {shard.rows} rows")
            if sum(shard.rows for shard in split.shards) != split.count:
                raise ManifestError(f"{MANIFEST_NAME}: the shards of {name} do not add up to {split.count} rows")
        if sum(self.image_sizes.values()) != sum(split.count for split in self.splits.values()):
            raise ManifestError(f"{MANIFEST_NAME}: image_sizes does not add up to the number of images")


class Fingerprint:
    """Hashes a data set's content, split after split, sample after sample."""

    def __init__(self, classes: Iterable[str]) -> None:
        self._hash = hashlib.sha256(json.dumps(["dataset", VERSION, list(classes)]).encode())
        self._split: str | None = None

    def add(self, split: str, key: str, label: int, sha256: bytes) -> None:
        if split != self._split:
            self._split = split
            self._hash.update(b"\xff" + split.encode() + b"\xff")  # 0xff is in no UTF-8 text: it cannot be part of a key
        raw = key.encode()
        self._hash.update(len(raw).to_bytes(4, "little") + raw + label.to_bytes(8, "little", signed=True) + sha256)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _fields(kind: Any, value: object, where: str) -> dict[str, Any]:
    """The checked constructor arguments of one of the dataclasses above."""
    if not isinstance(value, dict):
        raise ManifestError(f"{MANIFEST_NAME}: {where} is not an object; convert the source again")
    known = [field.name for field in fields(kind)]
    if set(value) != set(known):
        missing, extra = sorted(set(known) - set(value)), sorted(set(value) - set(known))
        raise ManifestError(f"{MANIFEST_NAME}: {where} lacks {missing} and has unknown {extra}; convert the source again")
    return {name: _READ[name](value[name], f"{where}.{name}") for name in known}


def _wrong(where: str, value: object, rule: str) -> ManifestError:
    return ManifestError(f"{MANIFEST_NAME}: {where} is {value!r:.60}, not {rule}; convert the source again")


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(where, value, "a count")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "text")
    return value


def _hex(value: object, where: str) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise _wrong(where, value, "64 hexadecimal digits")
    return value


def _shard_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _SHARD_NAME.fullmatch(value):  # a name, never a path out of the folder
        raise _wrong(where, value, "a plain name ending in .parquet")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    return value


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    return value


def _sizes(value: object, where: str) -> dict[str, int]:
    sizes = {key: _count(number, where) for key, number in _mapping(value, where).items()}
    if bad := [key for key in sizes if not _SIZE.fullmatch(key)]:
        raise _wrong(where, bad[0], "a size like 32x32")
    return sizes


_READ: dict[str, Any] = {
    "name": _shard_name,
    "rows": _count,
    "row_group_rows": lambda value, where: tuple(_count(item, where) for item in _list(value, where)),
    "size_bytes": _count,
    "sha256": _hex,
    "footer_sha256": _hex,
    "count": _count,
    "shards": lambda value, where: tuple(ShardInfo(**_fields(ShardInfo, item, where)) for item in _list(value, where)),
    "classes": lambda value, where: tuple(_text(item, where) for item in _list(value, where)),
    "splits": lambda value, where: {
        key: SplitInfo(**_fields(SplitInfo, item, f"{where}.{key}")) for key, item in _mapping(value, where).items()
    },
    "fingerprint": _hex,
    "image_sizes": _sizes,
    "quarantined": _count,
    "source": _text,
    "identity": _hex,
    "version": _count,
}


def resizes(manifest: Manifest, config: DataConfig) -> bool:
    """Whether any image has another size than the decoded ones, and is made that size."""
    height, width = image_size_of(manifest, config)
    return config.fit != "refuse" and set(manifest.image_sizes) != {f"{height}x{width}"}


def image_size_of(manifest: Manifest, config: DataConfig) -> tuple[int, int]:
    """(height, width) of the decoded images: `data.image_size`, or the size that all images share."""
    if config.image_size > 0:
        return config.image_size, config.image_size
    if len(manifest.image_sizes) == 1:
        height, _, width = next(iter(manifest.image_sizes)).partition("x")
        return int(height), int(width)
    common = sorted(manifest.image_sizes.items(), key=lambda item: (-item[1], item[0]))
    seen = ", ".join(f"{size} ({count:,} images)" for size, count in common[:3])
    raise ValueError(
        f"data.image_size=0 takes the size that all images share, but there are {len(common)} sizes (HxW): {seen}"
        f"{', ...' if len(common) > 3 else ''}; choose one and how to get there, e.g. --data.image-size 224 --data.fit crop"
    )
