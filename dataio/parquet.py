"""A converted data set on disk or in memory: Parquet shards, read by row group as zero-copy views of the encoded images.

Written by convert, one row group at a time; read by the loader, from any thread. Every page carries a checksum and every footer a hash in
the manifest: a flipped bit is a CorruptShard, never a wrong image. What the bytes decode to is decode's.
"""

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.manifest import MANIFEST_NAME, Manifest, ShardInfo

ROWS_PER_GROUP = 512
QUARANTINE_NAME = "quarantine.jsonl"
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
    ]
)
_MAGIC = b"PAR1"


class CorruptShard(ValueError):
    """A shard whose bytes are not those that were written; names the shard and, where known, the row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """The samples of one row group, in order."""

    encoded: list[np.ndarray]
    """Each (bytes,) uint8, a read-only view of the row group's buffer."""
    labels: np.ndarray
    """(n,) int64"""
    keys: list[str]


class Split:
    """One split: `count` samples in row groups of ROWS_PER_GROUP (the last may be short)."""

    def __init__(self, name: str, shards: Sequence[tuple[ShardInfo, Path | pa.Buffer]]) -> None:
        self.name = name
        self.count = sum(info.rows for info, _ in shards)
        rows = [group for info, _ in shards for group in info.row_group_rows]
        self.group_offsets: np.ndarray = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))  # (groups + 1,) int64
        self._shards = [_Shard(name, info, where) for info, where in shards]
        self._place = [(shard, group) for shard in self._shards for group in range(len(shard.info.row_group_rows))]
        self._labels: np.ndarray | None = None

    @property
    def groups(self) -> int:
        return len(self._place)

    def read_group(self, group: int) -> RowGroup:
        """Row group `group` of the split. Raises CorruptShard."""
        table = self._read(group, ["image", "label", "key"])
        return RowGroup(encoded=_views(table["image"]), labels=_ints(table["label"]), keys=table["key"].to_pylist())

    def labels(self) -> np.ndarray:
        """(count,) int64, read once."""
        if self._labels is None:
            parts = [_ints(self._read(group, ["label"])["label"]) for group in range(self.groups)]
            labels = np.concatenate(parts) if parts else np.empty(0, np.int64)
            labels.flags.writeable = False
            self._labels = labels
        return self._labels

    def keys(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of these samples, in the order asked for; reads the row groups they lie in."""
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.count):
            raise IndexError(f"sample ids of {self.name} run from 0 to {self.count - 1}; got {wanted.min()} to {wanted.max()}")
        groups = np.searchsorted(self.group_offsets, wanted, side="right") - 1
        columns = {int(group): self._read(int(group), ["key"])["key"] for group in np.unique(groups)}
        within = wanted - self.group_offsets[groups]
        return [columns[int(group)][int(row)].as_py() for group, row in zip(groups, within, strict=True)]

    def content(self) -> Iterator[tuple[str, int, bytes]]:
        """(key, label, content SHA-256) of each sample in order, without reading the images."""
        for group in range(self.groups):
            table = self._read(group, ["key", "label", "sha256"])
            yield from zip(table["key"].to_pylist(), table["label"].to_pylist(), table["sha256"].to_pylist(), strict=True)

    def verify(self) -> None:
        """Reads all bytes of all shards and compares their hashes. Raises CorruptShard."""
        for shard in self._shards:
            shard.verify()

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        if not 0 <= group < self.groups:
            raise IndexError(f"row groups of {self.name} run from 0 to {self.groups - 1}; got {group}")
        shard, local = self._place[group]
        return shard.read(local, columns)


class Dataset:
    """A converted data set: `manifest` and its splits."""

    def __init__(self, manifest: Manifest, files: Mapping[str, Path | pa.Buffer]) -> None:
        self.manifest = manifest
        self._files = dict(files)
        self._splits = {
            name: Split(name, [(shard, self._files[shard.name]) for shard in info.shards]) for name, info in manifest.splits.items()
        }

    def split(self, name: str) -> Split:
        if name not in self._splits:
            raise ValueError(f"there is no split {name!r}; the data set has {', '.join(self._splits)}")
        return self._splits[name]

    @property
    def size_bytes(self) -> int:
        """Of the shards: what handing the data set to another machine takes."""
        return sum(shard.size_bytes for split in self.manifest.splits.values() for shard in split.shards)

    def files(self) -> dict[str, Path | pa.Buffer]:
        """Every file by name, as open_dataset takes them."""
        return dict(self._files)


def open_dataset(location: str | Path | Mapping[str, pa.Buffer | bytes | memoryview]) -> Dataset:
    """Opens a converted folder, or its files in memory. Reads the manifest only; a shard is opened when it is first read.

    Raises ValueError for a folder that is not a converted one, CorruptShard if a shard is missing or has another size.
    """
    files: dict[str, Path | pa.Buffer] = {}
    if isinstance(location, Mapping):
        files = {name: data if isinstance(data, pa.Buffer) else pa.py_buffer(data) for name, data in location.items()}
        where = "the files in memory"
    else:
        folder = Path(location).expanduser()
        if not (folder / MANIFEST_NAME).is_file():
            raise ValueError(f"{folder} is no converted data set (no {MANIFEST_NAME}); make one: python -m dataio.convert SOURCE {folder}")
        files = {name: folder / name for name in (MANIFEST_NAME, QUARANTINE_NAME) if (folder / name).is_file()}
        where = str(folder)
    if MANIFEST_NAME not in files:
        raise ValueError(f"{where} lack {MANIFEST_NAME}; pass all of Dataset.files()")
    manifest = Manifest.from_json(_bytes(files[MANIFEST_NAME]))
    for split in manifest.splits.values():
        for shard in split.shards:
            if not isinstance(location, Mapping):
                files[shard.name] = folder / shard.name
            size = _size(files[shard.name]) if shard.name in files else None
            if size != shard.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {shard.size_bytes}"
                raise CorruptShard(f"shard {shard.name} of {where} {found}; convert the source again")
    return Dataset(manifest, files)


class ShardWriter:
    """Writes one shard row group by row group to `path`; `close` syncs it and says what was written.

    The caller renames: a shard counts once its ShardInfo is recorded somewhere.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._row_group_rows: list[int] = []
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        try:
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._file, mode="w"),
                SCHEMA,
                compression={"image": "NONE", "label": "ZSTD", "key": "ZSTD", "sha256": "NONE"},  # PNG and JPEG do not compress
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
            )
        except BaseException:
            self._file.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self._file.tell()

    def write_group(self, images: Sequence[bytes], labels: Sequence[int], keys: Sequence[str], hashes: Sequence[bytes]) -> None:
        arrays = [
            pa.chunked_array(_binary_chunks(images), pa.binary()),
            pa.chunked_array([pa.array(labels, pa.int64())]),
            pa.chunked_array([pa.array(keys, pa.string())]),
            pa.chunked_array([pa.array(hashes, pa.binary(32))]),
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=ROWS_PER_GROUP)
        self._row_group_rows.append(len(images))

    def close(self) -> ShardInfo:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return shard_info(self._path, tuple(self._row_group_rows))

    def abort(self) -> None:
        """Leaves the file as it is: incomplete."""
        self._writer.is_open = False  # else its destructor writes a footer, and fails
        self._file.close()


def shard_info(path: Path, row_group_rows: tuple[int, ...]) -> ShardInfo:
    """Hashes the finished shard at `path`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = pa.OSFile(str(path))
    return ShardInfo(
        name=path.name,
        rows=sum(row_group_rows),
        row_group_rows=row_group_rows,
        size_bytes=path.stat().st_size,
        sha256=digest,
        footer_sha256=hashlib.sha256(_footer(source)).hexdigest(),
    )


class _Shard:
    """One shard; the footer is read and checked once, each read opens the file anew (ParquetFile is not thread-safe)."""

    def __init__(self, split: str, info: ShardInfo, where: Path | pa.Buffer) -> None:
        self.info = info
        self._split = split
        self._where = where
        self._metadata: pq.FileMetaData | None = None
        self._lock = threading.Lock()

    def read(self, group: int, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(_open(self._where), metadata=self._checked_metadata(), page_checksum_verification=True)
            table = file.read_row_group(group, columns=columns, use_threads=False)
            if table.num_rows != self.info.row_group_rows[group] or any(column.null_count for column in table.columns):
                raise self._corrupt(group, f"it has {table.num_rows} rows or nulls")
        except CorruptShard:
            raise
        except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
            raise self._corrupt(group, str(error)) from error
        return table

    def verify(self) -> None:
        with _open(self._where) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != self.info.sha256:
            raise self._corrupt(None, "its SHA-256 is not the manifest's")

    def _checked_metadata(self) -> pq.FileMetaData:
        with self._lock:
            if self._metadata is None:
                with _open(self._where) as file:
                    if hashlib.sha256(_footer(file)).hexdigest() != self.info.footer_sha256:
                        raise self._corrupt(None, "its footer's SHA-256 is not the manifest's")
                    metadata = pq.read_metadata(file)
                rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
                if rows != self.info.row_group_rows:
                    raise self._corrupt(None, f"its row groups hold {rows[:4]}... rows instead of {self.info.row_group_rows[:4]}...")
                self._metadata = metadata
            return self._metadata

    def _corrupt(self, group: int | None, reason: str) -> CorruptShard:
        place = "" if group is None else f"row group {group} of "
        where = self._where if isinstance(self._where, Path) else f"{self.info.name} (in memory)"
        return CorruptShard(
            f"{place}shard {where} (split {self._split}) is damaged: {reason}; convert the source again or restore the file"
        )


def _open(where: Path | pa.Buffer) -> pa.NativeFile:
    return pa.OSFile(str(where)) if isinstance(where, Path) else pa.BufferReader(where)


def _bytes(where: Path | pa.Buffer) -> bytes:
    return where.read_bytes() if isinstance(where, Path) else where.to_pybytes()


def _size(where: Path | pa.Buffer) -> int | None:
    if not isinstance(where, Path):
        return int(where.size)
    return where.stat().st_size if where.is_file() else None


def _footer(file: pa.NativeFile) -> bytes:
    """The footer's bytes with its length and magic."""
    size = file.size()
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    if len(tail) < 8 or tail[4:] != _MAGIC:
        raise pa.ArrowInvalid("it does not end like a Parquet file")
    length = int.from_bytes(tail[:4], "little") + 8
    if length > size:
        raise pa.ArrowInvalid("its footer is longer than the file")
    file.seek(size - length)
    return bytes(file.read(length))


def _views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Zero-copy (bytes,) uint8 views of a binary column's values."""
    views: list[np.ndarray] = []
    for chunk in column.chunks:  # more than one where a row group's images exceed 2 GiB
        _, offsets_buffer, data_buffer = chunk.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
        data.flags.writeable = False
        views += [data[begin:end] for begin, end in itertools.pairwise(offsets)]
    return views


def _ints(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _binary_chunks(images: Sequence[bytes]) -> list[pa.Array]:
    """Arrays of less than 2 GiB each: the offsets of a binary array are 32-bit."""
    chunks, begin, size = [], 0, 0
    for index, image in enumerate(images):
        if size + len(image) >= 2**31 - 1:
            chunks.append(pa.array(images[begin:index], pa.binary()))
            begin, size = index, 0
        size += len(image)
    return [*chunks, pa.array(images[begin:], pa.binary())]
