"""Labelled images as they come, under one interface: CIFAR-10, Hugging Face Parquet, folders by class, IDX files.

Called by convert, which judges the images; here they are bytes. Archives and pickles are treated as hostile: members are streamed, nothing
is extracted by path, sizes are limited, and the unpickler builds nothing but numbers, text, lists, dicts and checked uint8 arrays.
"""

import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataio.manifest import MANIFEST_NAME
from dataio.schema import Target, single_label

CIFAR10 = "cifar10"
ACCEPTED = """accepted are
  cifar10                               downloaded, hash-checked
  cifar-10-python.tar.gz                or another archive in that format, or the folder of its batches
  a folder of Parquet files             Hugging Face layout: train-*.parquet, test-*.parquet (or in data/); or one such file
  a folder with train/ and test/        (or val/, validation/) of one folder a class; or the class folders alone
  a folder of IDX files                 train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...; .gz or not
  a folder made by dataio.convert       (for --data.path only)"""
IMAGE_SUFFIXES = frozenset(
    """
    .png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .heic .heif .avif .ico .tga
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
MAX_MEMBER_BYTES = 256 << 20
MAX_ARCHIVE_BYTES = 1 << 30
HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev")  # the first that there is serves as "test"


class SourceError(ValueError):
    """A source that is not there, not of an accepted kind, or not what its kind promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image. With a `refusal` (`kind: detail`) there are no bytes to use, and that is why."""

    key: str
    data: bytes
    values: tuple[Any, ...]
    """Of the source's targets, in their order, as `schema.value_of` takes them."""
    refusal: str | None = None

    @property
    def label(self) -> int:
        """Of a source of one label a sample."""
        return int(self.values[0])


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
    def targets(self) -> tuple[Target, ...]:
        """What is known of a sample; their means and deviations are convert's to find."""
        ...

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


class _Labelled:
    """A source of one label a sample."""

    @property
    def targets(self) -> tuple[Target, ...]:
        classes: tuple[str, ...] = self.classes  # type: ignore[attr-defined]
        return single_label(classes)


def open_source(path: str, *, root: Path, test_fraction: float, classes: tuple[str, ...] | None = None) -> Source:
    """Recognises what `path` is. `root` is where a download goes; `test_fraction` of the keys is held out where there is no test split.

    `classes` replaces the source's class names. Raises SourceError (a ValueError) that lists what is accepted and says what was found.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"data.test_fraction={test_fraction} leaves nothing to train or to test with; use a number between 0 and 1, such as 0.1"
        )
    source = _open_source(path, root, test_fraction)
    return source if classes is None else Renamed(source, classes)


def _open_source(path: str, root: Path, test_fraction: float) -> Source:
    if path == CIFAR10:
        return Cifar(kind="cifar10", identity=_hash(CIFAR10, _torchvision_cifar10().tgz_md5), read=lambda: _read_archive(_download(root)))
    where = Path(path).expanduser()
    if not where.exists():
        raise SourceError(f"data.path={path!r} does not exist; {ACCEPTED}")
    if where.is_file():
        return _open_file(where, test_fraction)
    if (where / MANIFEST_NAME).exists():
        raise SourceError(f"{path} is converted already; read it as it is: --data.path {path}")
    if (where / "conversion.json").exists():
        raise SourceError(f"{path} is an unfinished conversion; run the same dataio.convert command again to finish it")
    for folder in (where, where / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            files = [file for name in CIFAR_MEMBERS if (file := folder / name).is_file()]
            return Cifar(kind="cifar-batches", identity=_stat_hash(folder, files), read=functools.partial(_read_batches, files))
    if (where / "cifar-10-python.tar.gz").is_file():
        return _open_file(where / "cifar-10-python.tar.gz", test_fraction)
    if idx := _find_idx(where):
        return Idx(where, idx, test_fraction)
    if parquet := _find_parquet(where):
        return HuggingFace(where, parquet, test_fraction)
    if (folders := _find_folders(where)) is not None:
        return ImageFolder(where, *folders, test_fraction)
    names = sorted(entry.name + "/" * entry.is_dir() for entry in where.iterdir())
    found = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"
    raise SourceError(f"data.path={path!r} is no data set that can be read: it holds {found}; {ACCEPTED}")


def _open_file(file: Path, test_fraction: float) -> Source:
    with open(file, "rb") as opened:
        start = opened.read(512)
    if start[:4] == b"PAR1":
        return HuggingFace(file.parent, {"": [file]}, test_fraction)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return Cifar(kind="cifar-tar", identity=_stat_hash(file.parent, [file]), read=lambda: _read_archive(file))
    raise SourceError(f"{file} is neither a Parquet file nor a tar archive (it begins with {start[:8]!r}); {ACCEPTED}")


def held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the test split of a source that has none: a pure function of its key."""
    raw = hashlib.blake2b(key.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(raw, "little") < fraction * 2**64


class Renamed(_Labelled):
    """A source with other class names."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        if len(set(classes)) != len(classes):
            raise SourceError(f"class names must differ from each other; got {', '.join(classes)}")
        self._source, self._names = source, classes
        self.kind, self.ignored = source.kind, source.ignored
        self.identity = _hash(source.identity, *classes)

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


class Balanced(_Labelled):
    """A sample of a source: the same number of images of each class (one more of the first ones where it does not divide).

    Chosen by a hash of (seed, key), so whatever the source's order.
    """

    def __init__(self, source: Source, *, sizes: Mapping[str, int], seed: int) -> None:
        self._source, self._sizes, self._seed = source, dict(sizes), seed
        self.kind, self.ignored = source.kind, source.ignored
        self.identity = _hash(source.identity, json.dumps([sorted(self._sizes.items()), seed]))

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


# CIFAR-10: https://www.cs.toronto.edu/~kriz/cifar.html

CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_MEMBERS = (*CIFAR_TRAIN, "test_batch", "batches.meta")


class Cifar(_Labelled):
    """CIFAR-10, or other images in its format, from its five training batches, its test batch and its class names."""

    ignored: tuple[str, ...] = ()

    def __init__(self, *, kind: str, identity: str, read: Callable[[], dict[str, bytes]]) -> None:
        self.kind, self.identity, self._read = kind, identity, read

    @property
    def classes(self) -> tuple[str, ...]:
        return self._content[0]

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        return sum(len(batch.labels) for batch in self._content[1][split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        batches = self._content[1][split]
        names = [name for batch in batches for name in batch.filenames]
        unique = len(set(names)) == sum(len(batch.labels) for batch in batches)
        at = 0
        for batch in batches:
            for index in range(max(start - at, 0), len(batch.labels)):
                key = batch.filenames[index] if unique else f"{batch.name}/{index:05d}"
                pixels = np.ascontiguousarray(batch.images[index].reshape(3, 32, 32).transpose(1, 2, 0))  # (32, 32, 3)
                yield Sample(key=key, data=png(pixels), values=(batch.labels[index],))
            at += len(batch.labels)

    @cached_property
    def _content(self) -> tuple[tuple[str, ...], dict[str, list["_CifarBatch"]]]:
        members = self._read()
        if missing := [name for name in CIFAR_MEMBERS if name not in members]:
            raise SourceError(f"the CIFAR-10 batches are incomplete: {', '.join(missing)} missing; get cifar-10-python.tar.gz again")
        meta = load_cifar_pickle("batches.meta", members["batches.meta"])
        names = meta.get("label_names")
        if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
            raise SourceError("batches.meta does not hold label_names, a list of class names")
        classes = tuple(_text(name) for name in names)
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
    return _CifarBatch(name=name, images=images, labels=labels, filenames=[_text(file) for file in filenames] if named else [])


def _torchvision_cifar10() -> Any:
    from torchvision.datasets import CIFAR10 as dataset  # imports torch: only where needed

    return dataset


def _download(root: Path) -> Path:
    """torchvision's own archive by its own downloader, checked against its MD5; a second call finds the file."""
    from torchvision.datasets.utils import download_url

    dataset = _torchvision_cifar10()
    root.mkdir(parents=True, exist_ok=True)
    try:
        download_url(dataset.url, str(root), dataset.filename, dataset.tgz_md5)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise SourceError(
            f"CIFAR-10 could not be downloaded from {dataset.url} into {root}: {error}. Offline, give an archive that you have: "
            f"--data.path /path/to/{dataset.filename}; or train without it: --config quickstart, whose images are part of the repository"
        ) from error
    return root / str(dataset.filename)


def _read_batches(files: Iterable[Path]) -> dict[str, bytes]:
    members = {}
    for file in files:
        if file.stat().st_size > MAX_MEMBER_BYTES:
            raise SourceError(f"{file} has {file.stat().st_size} bytes, a CIFAR-10 batch at most {MAX_MEMBER_BYTES}")
        members[file.name] = file.read_bytes()
    return members


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes: a compressed bomb's guard."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(f"the archive unpacks to more than {self._limit} bytes; a CIFAR-10 archive has 186 MB")
        return data


def _read_archive(path: Path) -> dict[str, bytes]:
    """The expected members of a CIFAR-10 archive, read front to back. Everything else is passed over or, if it is an attack, refused."""
    members: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            plain: Any = gzip.GzipFile(fileobj=file) if packed else file
            limited = _Limited(plain, MAX_ARCHIVE_BYTES)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    if place.is_absolute() or ".." in place.parts:
                        raise SourceError(f"{path}: member {member.name!r} points out of the archive; this is no CIFAR-10 archive")
                    if place.name not in CIFAR_MEMBERS:
                        continue
                    if not member.isreg():
                        raise SourceError(f"{path}: member {member.name!r} is a link or a device, not a file")
                    if place.name in members:
                        raise SourceError(f"{path}: there are two members named {place.name}")
                    if member.size > MAX_MEMBER_BYTES:
                        raise SourceError(
                            f"{path}: member {member.name!r} claims {member.size} bytes; a batch has at most {MAX_MEMBER_BYTES}"
                        )
                    content = archive.extractfile(member)
                    assert content is not None
                    members[place.name] = content.read()
            while limited.read(1 << 20):  # gzip's checksum is at its end, behind what tar reads
                pass
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OverflowError) as error:
        raise SourceError(f"{path} is no readable tar archive ({error}); get it again") from error
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise SourceError(f"{path} is damaged ({error}); get it again") from error
        raise
    if not members:
        raise SourceError(f"{path} holds no CIFAR-10 batches (data_batch_1, ..., test_batch, batches.meta); {ACCEPTED}")
    return members


# What CIFAR batches contain, and nothing else. All that is callable here is an instance without attributes of its own, so that a pickle can
# neither reach code nor change any.

_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET
    PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
_ARRAY_LIMIT = 1 << 20  # images a batch


class _Dtype:
    """Stands for numpy.dtype in a pickle: remembers what was asked for, makes nothing."""

    __slots__ = ("name",)

    def __init__(self, name: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment: a single byte has neither


class _Array:
    """Stands for an ndarray until its state has been checked."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array's state is not (version, shape, dtype, order, bytes)")
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


class _Allowed:
    """One allowed global of a pickle."""

    __slots__ = ("_name",)
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name} of {self._name}")

    def __call__(self, *args: object) -> object:
        match self._name, args:
            case "_reconstruct", (_Allowed(), _, _):
                return _Array()
            case "dtype", (name, *_):
                return _Dtype(_text(name) if isinstance(name, bytes | str) else name)
            case "_frombuffer", (raw, dtype, shape, order):
                array = _Array()
                array.value = _array(raw, dtype, shape, order)
                return array
            case "encode", (str(text), "latin1" | b"latin1"):  # how Python 3 writes bytes for Python 2
                return text.encode("latin1")
        raise pickle.UnpicklingError(f"calls {self._name} with unexpected arguments")


_GLOBALS = {
    (module, name): _Allowed(name)
    for name, modules in {
        "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
        "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"),
        "ndarray": ("numpy",),
        "dtype": ("numpy",),
        "encode": ("_codecs",),
    }.items()
    for module in modules
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refers to {module}.{name}") from None


def load_cifar_pickle(name: str, raw: bytes) -> dict[str, Any]:
    """The dict in a CIFAR batch; texts are bytes or str, arrays (n, m) uint8. Raises SourceError that says what was refused."""
    try:
        count = 0
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(f"uses the opcode {opcode.name}")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:  # a memo of gigabytes
                raise pickle.UnpicklingError(f"numbers a memo entry {argument}")
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise SourceError(f"{name} is not a CIFAR-10 batch: its pickle is refused ({error}), nothing of it was executed") from error
    if not isinstance(content, dict) or not all(isinstance(key, bytes | str) for key in content):
        raise SourceError(f"{name} is not a CIFAR-10 batch: it holds a {type(content).__name__}, not a dict of named values")
    return {_text(key): value.value if isinstance(value, _Array) else value for key, value in content.items()}


def _array(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "|u1", "uint8"):
        raise pickle.UnpicklingError(f"holds an array of {getattr(dtype, 'name', dtype)!r:.40}, not of uint8")
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(side) is int and 0 <= side <= _ARRAY_LIMIT for side in shape):
        raise pickle.UnpicklingError(f"holds an array of shape {shape!r:.60}")
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape):
        raise pickle.UnpicklingError(f"holds an array of shape {shape} without its bytes")
    return np.frombuffer(bytes(raw), np.uint8).reshape(shape, order="F" if order in ("F", b"F") else "C")


def _text(raw: bytes | str) -> str:
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw.encode("utf-8", "backslashreplace").decode()


# IDX: http://yann.lecun.com/exdb/mnist/

_IDX_NAME = re.compile(r"(?P<split>train|t10k|test)-(?P<what>images|labels)[.-]idx(?P<dims>[13])-ubyte(?:\.gz)?")


class Idx(_Labelled):
    """Gray images of the MNIST family, each written as a PNG. Classes are named by classes.txt (a name a line), else by number."""

    kind = "idx"
    ignored: tuple[str, ...] = ()

    def __init__(self, folder: Path, files: dict[str, tuple[Path, Path]], test_fraction: float) -> None:
        self._files, self._fraction = files, test_fraction
        self._labels = {split: _idx_labels(labels) for split, (_, labels) in files.items()}
        names = folder / "classes.txt"
        paths = [path for pair in files.values() for path in pair] + ([names] if names.is_file() else [])
        self.identity = _hash(_stat_hash(folder, paths), "" if "test" in files else repr(test_fraction))
        highest = max(int(labels.max(initial=0)) for labels in self._labels.values())
        self.classes = tuple(str(number) for number in range(highest + 1))
        if names.is_file():
            self.classes = tuple(line.strip() for line in names.read_text().splitlines() if line.strip())
            if len(self.classes) <= highest:
                raise SourceError(f"{names} names {len(self.classes)} classes, the labels go up to {highest}; name them all, one a line")

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        if "test" in self._files:
            return len(self._labels[split])
        return sum(1 for index in range(len(self._labels["train"])) if held_out(f"train/{index:05d}", self._fraction) == (split == "test"))

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        stored = split if "test" in self._files else "train"
        labels, seen = self._labels[stored], 0
        for index, image in enumerate(_idx_images(self._files[stored][0], len(labels))):
            key = f"{stored}/{index:05d}"
            if "test" not in self._files and held_out(key, self._fraction) != (split == "test"):
                continue
            seen += 1
            if seen > start:
                yield Sample(key=key, data=png(image), values=(int(labels[index]),))


def _find_idx(folder: Path) -> dict[str, tuple[Path, Path]]:
    """split -> (images, labels); empty if there are no IDX files."""
    found: dict[tuple[str, str], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _IDX_NAME.fullmatch(entry.name)
        if match and entry.is_file():
            place = ("train" if match["split"] == "train" else "test", match["what"])
            found.setdefault(place, entry)  # of a file and its .gz, the file: it sorts first
    splits = sorted({split for split, _ in found}, reverse=True)
    for split in splits:
        if missing := [what for what in ("images", "labels") if (split, what) not in found]:
            raise SourceError(f"{folder} holds IDX files for {split}, but not its {missing[0]}")
    if splits and "train" not in splits:
        raise SourceError(f"{folder} holds IDX files for testing, but no train-images-idx3-ubyte")
    return {split: (found[split, "images"], found[split, "labels"]) for split in splits}


def _idx_open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    opened: Any = gzip.open(path) if packed else open(path, "rb")  # noqa: SIM115 (the caller closes)
    return opened  # type: ignore[no-any-return]


def _idx_header(path: Path, file: BinaryIO, dimensions: int) -> list[int]:
    header = file.read(4 + 4 * dimensions)
    if len(header) != 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise SourceError(f"{path} does not begin like an IDX file of uint8 in {dimensions} dimension(s): {header[:4].hex()}")
    return [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]


def _idx_labels(path: Path) -> np.ndarray:
    try:
        with _idx_open(path) as file:
            (count,) = _idx_header(path, file, 1)
            raw = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile) as error:
        raise SourceError(f"{path} is damaged: {error}") from error
    if len(raw) != count:
        raise SourceError(f"{path} says it has {count} labels; it has {'more' if len(raw) > count else len(raw)}")
    return np.frombuffer(raw, np.uint8)


def _idx_images(path: Path, labels: int) -> Iterator[np.ndarray]:
    """(height, width) uint8 each."""
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
    except (EOFError, gzip.BadGzipFile) as error:
        raise SourceError(f"{path} is damaged: {error}") from error


# Hugging Face Parquet


class HuggingFace(_Labelled):
    """Parquet files of `image|img: struct{bytes, path}` (or plain binary) and `label|fine_label`, as the Hugging Face hub stores them."""

    kind = "huggingface"

    def __init__(self, folder: Path, files: dict[str, list[Path]], test_fraction: float) -> None:
        self._folder, self._fraction = folder, test_fraction
        tests = [split for split in HELD_OUT_SPLITS if split in files]
        train = files.get("train") or files.get("")
        if not train:
            raise SourceError(f"{folder} holds Parquet files for {', '.join(files)}, but none for training (train-*.parquet)")
        self._files = {"train": train} | ({"test": files[tests[0]]} if tests else {})
        used = {path for paths in self._files.values() for path in paths}
        self.ignored = tuple(str(path.relative_to(folder)) for paths in files.values() for path in paths if path not in used)
        paths = [path for paths in self._files.values() for path in paths]
        self.identity = _hash(_stat_hash(folder, paths), "" if tests else repr(test_fraction))
        self._columns = _columns(train[0])
        self._texts: dict[str, int] | None = None
        names = _class_names(pq.read_schema(train[0]), self._columns[1])
        labels = self._distinct_labels(paths)
        if labels and isinstance(labels[0], str):
            self._texts = {str(name): number for number, name in enumerate(labels)}
            names = tuple(self._texts)
        self.classes = names or tuple(str(number) for number in range(max((int(label) for label in labels), default=-1) + 1))
        if not self.classes:
            raise SourceError(f"column {self._columns[1]!r} of {train[0]} holds no label")

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        if "test" not in self._files:
            return None
        return sum(int(pq.read_metadata(path).num_rows) for path in self._files[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        if "test" in self._files:
            yield from self._rows(split, start)
            return
        kept = (sample for sample in self._rows("train", 0) if held_out(sample.key, self._fraction) == (split == "test"))
        for index, sample in enumerate(kept):
            if index >= start:
                yield sample

    def _rows(self, stored: str, start: int) -> Iterator[Sample]:
        image, label = self._columns
        at = 0
        for path in self._files[stored]:
            try:
                with pq.ParquetFile(path) as file:
                    if at + file.metadata.num_rows <= start:
                        at += file.metadata.num_rows
                        continue
                    row = 0
                    for batch in file.iter_batches(batch_size=128, columns=[image, label]):
                        if at + row + len(batch) > start:
                            yield from self._batch(f"{path.stem}", row, batch, max(start - at - row, 0))
                        row += len(batch)
                    at += row
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path} cannot be read: {error}") from error

    def _batch(self, stem: str, row: int, batch: pa.RecordBatch, skip: int) -> Iterator[Sample]:
        images, labels = batch.column(0), batch.column(1).to_pylist()
        paths: list[str | None] = [None] * len(batch)
        if pa.types.is_struct(images.type):
            children = dict(zip([field.name for field in images.type], images.flatten(), strict=True))  # flatten applies the struct's nulls
            images = children["bytes"]
            if "path" in children:
                paths = children["path"].to_pylist()
        for index in range(skip, len(batch)):
            key = _text(paths[index] or f"{stem}/{row + index:08d}")
            data, label = images[index].as_py(), labels[index]
            number = self._texts.get(label, -1) if self._texts is not None else label
            refusal = None
            if data is None:
                refusal = "no image: null" if paths[index] is None else "no image: the row holds a path, but no bytes"
            elif number is None:
                refusal = "bad label: null"
            yield Sample(key=key, data=data or b"", values=(-1 if number is None else number,), refusal=refusal)

    def _distinct_labels(self, paths: list[Path]) -> list[Any]:
        column, seen = self._columns[1], set()
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=1 << 16, columns=[column]):
                        seen.update(batch.column(0).unique().to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path} cannot be read: {error}") from error
        seen.discard(None)
        return sorted(seen)


def _find_parquet(folder: Path) -> dict[str, list[Path]]:
    """split -> files, "" for files named after no split; empty if there are none."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.parquet")))
    for place in (folder, folder / "data", *(below if len(below) == 1 else [])):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = re.match(r"(train|test|validation|valid|val|dev)(?![A-Za-z])", path.name)
            files.setdefault(match[1] if match else "", []).append(path)
        if files:
            return files
    return {}


def _columns(path: Path) -> tuple[str, str]:
    """The names of the image and the label column."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is no readable Parquet file: {error}") from error

    def pick(names: tuple[str, ...], fits: Callable[[Any], bool], what: str) -> str:
        for name in names:
            if name in schema.names and fits(schema.field(name).type):
                return name
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise SourceError(f"{path} has no {what}; its columns are {found:.500}")

    def is_image(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and is_image(field.type) for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def is_label(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))

    return (
        pick(("image", "img"), is_image, "column image or img of struct{bytes, path} or binary"),
        pick(("label", "labels", "fine_label"), is_label, "column label or fine_label of integers or text"),
    )


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that the Hugging Face metadata gives the label's values; empty if it gives none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    if isinstance(names, dict):  # {"0": "airplane", ...} in older files
        names = [names[str(number)] for number in range(len(names)) if str(number) in names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return ()
    return tuple(names)


# Folders by class


class ImageFolder(_Labelled):
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
        self.identity = _hash(_stat_hash(folder, paths), "" if test is not None else repr(test_fraction))

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        return len(self._files[split])

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        for path, label in self._files[split][start:]:
            try:
                yield Sample(key=self._key(path), data=path.read_bytes(), values=(label,))
            except OSError as error:
                yield Sample(key=self._key(path), data=b"", values=(label,), refusal=f"unreadable: {error.strerror}")

    def _key(self, path: Path) -> str:
        return _text(os.fsencode(path.relative_to(self._folder).as_posix()))


def _find_folders(folder: Path) -> tuple[Path, Path | None] | None:
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
            classes[_text(os.fsencode(entry.name))] = sorted(files)
    return classes


def png(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint8 as PNG; the same bytes for the same pixels and the same zlib."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)  # once; a tenth slower than level 1, and smaller
    return out.getvalue()


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stat_hash(folder: Path, paths: Iterable[Path]) -> str:
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
