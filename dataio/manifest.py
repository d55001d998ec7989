"""The description of a converted data set: its targets, its shards with their hashes, and a fingerprint of its content.

Convert writes the manifest last, so a folder with a manifest is complete. Parquet reads it to find the shards, the loader for the
fingerprint, which keys the order of the samples.

There are three versions, and the data decide which one applies. Version 1 is for images with one label a sample (`schema.single_label`) and
the splits train and test: it names the classes, and its form never changed. Version 2 is for all other images: it names the targets.
Version 3 is for texts: it says how they became tokens. A program that knows only earlier versions refuses a later one, so none mistakes a
validation split for another one, or tokens for images.

Splits are a set: `train` must exist, the other splits of schema.SPLITS are optional; a set of images without labels has `unlabelled`
alone. A run needs `test` too, and says so; data that are only evaluated need it not. `parquet.Dataset.split` lists the existing splits
when asked for a missing one.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dataio.config import DataConfig, TooLong
from dataio.foreign import json_of
from dataio.schema import KINDS, SPLITS, UNLABELLED, Kind, Target, fault_of_targets, is_single_label, single_label
from dataio.texts import padded

VERSIONS = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
USUAL_SIDE = 224
"""Side in pixels that most networks for photographs were trained at."""
_HEX = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")
_TOO_LONG: tuple[TooLong, ...] = ("cut", "refuse")
_LENGTH = re.compile(r"[1-9][0-9]{0,8}")
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")


class ManifestError(ValueError):
    """A manifest.json that is damaged, or was written by another version."""

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
    """Hash of the Parquet footer alone: no page checksum covers it, and it is cheap to check when the file is opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    count: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextInfo:
    """How the texts of a data set became tokens, and what came of it."""

    tokenizer_sha256: str
    """Of the tokenizer's file: a model is to be asked with the tokens that it knows."""
    vocabulary: int
    """Tokens that there are; each is a number below it."""
    max_tokens: int
    too_long: TooLong
    lengths: dict[str, int]
    """Tokens of a text -> number of texts with so many, over all splits."""
    cut: int
    """Texts that were longer, of which the beginning was kept."""

    @property
    def longest(self) -> int:
        return max(map(int, self.lengths), default=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    targets: tuple[Target, ...]
    """In the order of their columns."""
    splits: dict[str, SplitInfo]
    """By name, in the order of schema.SPLITS."""
    fingerprint: str
    """SHA-256 over the targets and, by split, each (key, values, content hash) in order; it does not depend on the sharding."""
    image_sizes: dict[str, int]
    """Size as the codec names it (for an image "HxW" as displayed) -> number of samples of that size, over all splits."""
    quarantined: int
    source: str
    """Kind of source: cifar10, cifar-tar, cifar-batches, huggingface, folder, idx, table, texts, text-folder."""
    identity: str
    """Hash of the source (names, sizes and times of its files) and of the settings of the conversion."""
    texts: TextInfo | None = None
    """None for images."""

    @property
    def unit(self) -> str:
        """What the samples are, in the plural."""
        return "images" if self.texts is None else "texts"

    @property
    def version(self) -> int:
        if self.texts is not None:
            return 3
        return 1 if is_single_label(self.targets) and set(self.splits) == {"train", "test"} else 2

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the only target that has any; empty if several targets have classes, or none has."""
        with_classes = [target for target in self.targets if target.classes]
        return with_classes[0].classes if len(with_classes) == 1 else ()

    def fingerprint_of(self, split: str) -> str:
        """SHA-256 of the targets and one split, from its shards' hashes: without reading a sample. Equal ones have the same samples in the
        same order under the same classes. The same samples in other shards, or written by another version of pyarrow, have another one.
        "" if there is no such split."""
        if split not in self.splits:
            return ""
        described = [[target.name, target.kind, list(target.classes)] for target in self.targets]
        shards = [[shard.rows, shard.sha256] for shard in self.splits[split].shards]
        return hashlib.sha256(json.dumps(["split", 1, described, shards]).encode()).hexdigest()

    def with_counts(self, counts: Mapping[str, int]) -> "Manifest":
        """Of a data set of which some samples are chosen: with these splits, of so many samples. It is never written."""
        splits = {
            name: SplitInfo(count=counts[name], shards=self.splits[name].shards if name in self.splits else ())
            for name in SPLITS
            if name in counts
        }
        return replace(self, splits=splits)

    def to_json(self) -> str:
        left_out = ("targets", "texts") if self.texts is None else ("targets", "image_sizes")
        value: dict[str, Any] = {name: content for name, content in asdict(self).items() if name not in left_out}
        first = {"classes": self.classes} if self.version == 1 else {"targets": [asdict(target) for target in self.targets]}
        return json.dumps({**first, **value, "version": self.version}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parses strictly: raises ManifestError on a missing or unknown key, a wrong type, or numbers that do not add up."""
        try:
            value = json_of(text)
        except ValueError as error:
            raise ManifestError(f"{MANIFEST_NAME} is not JSON ({error}); convert the source again") from None
        version = value.get("version") if isinstance(value, dict) else 1
        if isinstance(version, bool) or version not in VERSIONS:
            known = f"{', '.join(map(str, VERSIONS[:-1]))} and {VERSIONS[-1]}"
            raise ManifestError(f"{MANIFEST_NAME} has version {version!r:.60}, this program reads {known}; convert the source again")
        left_out = "image_sizes" if version == 3 else "texts"
        names = [field.name for field in fields(cls) if field.name != left_out]
        read = _read(value, [*("classes" if name == "targets" and version == 1 else name for name in names), "version"], "manifest")
        if version == 1:
            read["targets"] = single_label(read.pop("classes"))
        del read["version"]
        manifest = cls(**({"image_sizes": {}} | read))
        manifest._check(version)
        return manifest

    def _check(self, version: int) -> None:
        if (fault := fault_of_splits(self.splits)) is not None:
            raise ManifestError(f"{MANIFEST_NAME}: {fault}; convert the source again")
        if (fault := fault_of_targets(self.targets)) is not None:
            raise ManifestError(f"{MANIFEST_NAME}: {fault}; convert the source again")
        if version != self.version:
            raise ManifestError(f"{MANIFEST_NAME} has version {version}, its targets and splits are those of {self.version}")
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        if len(set(names)) != len(names):
            raise ManifestError(f"{MANIFEST_NAME} names a shard twice; convert the source again")
        for name, split in self.splits.items():
            for shard in split.shards:
                if sum(shard.row_group_rows) != shard.rows or min(shard.row_group_rows, default=0) <= 0:
                    raise ManifestError(f"{MANIFEST_NAME}: the row groups of {shard.name} do not add up to {shard.rows} rows")
            if sum(shard.rows for shard in split.shards) != split.count:
                raise ManifestError(f"{MANIFEST_NAME}: the shards of {name} do not add up to {split.count} rows")
        count = sum(split.count for split in self.splits.values())
        if self.texts is not None:
            if sum(self.texts.lengths.values()) != count:
                raise ManifestError(f"{MANIFEST_NAME}: texts.lengths does not add up to the number of texts")
            if not 0 < self.texts.longest <= self.texts.max_tokens:
                raise ManifestError(f"{MANIFEST_NAME}: a text of {self.texts.longest} tokens has more than {self.texts.max_tokens}")
        elif sum(self.image_sizes.values()) != count:
            raise ManifestError(f"{MANIFEST_NAME}: image_sizes does not add up to the number of images")


def fault_of_splits(splits: Collection[str]) -> str | None:
    """What is wrong with this set of splits; None if nothing is."""
    if unknown := sorted(set(splits) - set(SPLITS)):
        return f"there is a split {unknown[0]!r:.60}; those that there may be are {', '.join(SPLITS)}"
    if "train" not in splits and set(splits) != {UNLABELLED}:
        return f"the splits are {', '.join(splits) or 'none'}: there is none to train on, named train"
    return None


class Fingerprint:
    """Hashes a data set's content, split after split, sample after sample."""

    def __init__(self, targets: Sequence[Target], texts: Sequence[Any] = ()) -> None:
        """`texts`: what decides their tokens (TextForm.identity); empty for images."""
        described: list[Any]
        if texts:
            described = ["dataset", 3, [[target.name, target.kind, list(target.classes)] for target in targets], list(texts)]
        elif is_single_label(targets):
            described = ["dataset", 1, list(targets[0].classes)]
        else:
            described = ["dataset", 2, [[target.name, target.kind, list(target.classes)] for target in targets]]
        self._hash = hashlib.sha256(json.dumps(described).encode())
        self._split: str | None = None

    def add(self, split: str, key: str, values: bytes, sha256: bytes) -> None:
        """`values` are the targets' bytes in order, each of the length that its kind has (`parquet.Split.content`)."""
        if split != self._split:
            self._split = split
            self._hash.update(b"\xff" + split.encode() + b"\xff")  # 0xff never occurs in UTF-8 text, so it cannot be part of a key
        raw = key.encode()
        self._hash.update(len(raw).to_bytes(4, "little") + raw + values + sha256)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _fields(kind: Any, value: object, where: str) -> dict[str, Any]:
    """Checks and returns the constructor arguments of one of the dataclasses above."""
    return _read(value, [field.name for field in fields(kind)], where)


def _read(value: object, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{MANIFEST_NAME}: {where} is not an object; convert the source again")
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
    if not isinstance(value, str) or not _SHARD_NAME.fullmatch(value):  # a plain name, never a path out of the folder
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


def _target(value: object, where: str) -> Target:
    """Checks types only; schema checks the other rules of a target."""
    known = [field.name for field in fields(Target)]
    if not isinstance(value, dict) or set(value) != set(known):
        raise _wrong(where, value, f"an object of {', '.join(known)}")
    return Target(
        name=_text(value["name"], f"{where}.name"),
        kind=_kind(value["kind"], f"{where}.kind"),
        classes=_texts(value["classes"], f"{where}.classes"),
        mean=_number(value["mean"], f"{where}.mean"),
        std=_number(value["std"], f"{where}.std"),
    )


def _kind(value: object, where: str) -> Kind:
    found = next((kind for kind in KINDS if kind == value), None)
    if found is None:
        raise _wrong(where, value, f"one of {', '.join(KINDS)}")
    return found


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > 1 << 1000):
        raise _wrong(where, value, "a number")
    return float(value)


def _texts(value: object, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in _list(value, where))


def _splits(value: object, where: str) -> dict[str, SplitInfo]:
    found = _mapping(value, where)
    ordered = sorted(found, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
    return {name: SplitInfo(**_fields(SplitInfo, found[name], f"{where}.{name}")) for name in ordered}


def _lengths(value: object, where: str) -> dict[str, int]:
    lengths = {key: _count(number, where) for key, number in _mapping(value, where).items()}
    if bad := [key for key in lengths if not _LENGTH.fullmatch(key)]:
        raise _wrong(where, bad[0], "a number of tokens")
    return lengths


def _too_long(value: object, where: str) -> TooLong:
    for known in _TOO_LONG:
        if known == value:
            return known
    raise _wrong(where, value, f"one of {', '.join(_TOO_LONG)}")


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
    "classes": _texts,
    "targets": lambda value, where: tuple(_target(item, f"{where}[{index}]") for index, item in enumerate(_list(value, where))),
    "splits": _splits,
    "fingerprint": _hex,
    "image_sizes": _sizes,
    "texts": lambda value, where: TextInfo(**_fields(TextInfo, value, where)),
    "tokenizer_sha256": _hex,
    "vocabulary": _count,
    "max_tokens": _count,
    "too_long": _too_long,
    "lengths": _lengths,
    "cut": _count,
    "quarantined": _count,
    "source": _text,
    "identity": _hex,
    "version": _count,
}


def shape_of(manifest: Manifest, config: DataConfig) -> tuple[int, ...]:
    """(height, width) of the decoded images, or (tokens,) of the longest text, padded. ValueError where the settings leave it open."""
    return image_size_of(manifest, config) if manifest.texts is None else (padded(manifest.texts.longest),)


def image_hw(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of images, where nothing but images may come."""
    height, width = shape
    return height, width


def resizes(manifest: Manifest, config: DataConfig) -> bool:
    """Whether any image has another size than the decoded size, and is resized to it."""
    if manifest.texts is not None:
        return False
    height, width = image_size_of(manifest, config)
    return config.fit != "refuse" and set(manifest.image_sizes) != {f"{height}x{width}"}


def image_size_of(manifest: Manifest, config: DataConfig) -> tuple[int, int]:
    """(height, width) of the decoded images: `data.image_size`, or the size that all images share. Images of several sizes, with a
    `data.fit` that says how to bring them to one, get the side USUAL_SIDE, or the largest image's shorter side where that is less."""
    if config.image_size > 0:
        return config.image_size, config.image_size
    sizes = [(int(height), int(width)) for height, _, width in (size.partition("x") for size in manifest.image_sizes)]
    if len(sizes) == 1:
        return sizes[0]
    if config.fit != "refuse" and sizes:
        side = min(USUAL_SIDE, max(map(min, sizes)))
        return side, side
    common = sorted(manifest.image_sizes.items(), key=lambda item: (-item[1], item[0]))
    seen = ", ".join(f"{size} ({count:,} image{'' if count == 1 else 's'})" for size, count in common[:3])
    raise ValueError(
        f"data.image_size=0 takes the size that all images share, but there are {len(common)} sizes (HxW): {seen}"
        f"{', ...' if len(common) > 3 else ''}; choose one and how to get there, e.g. --data.image-size 224 --data.fit crop"
    )
