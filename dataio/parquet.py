"""A converted data set on disk, in memory or on remote storage: Parquet shards, read by row group as views of the encoded samples.

Convert writes it, one row group at a time; the loader reads it, from any thread. Every page has a checksum, and the manifest holds a hash
of every footer: a flipped bit raises CorruptShard and never becomes a wrong sample. The codec decodes the bytes.

Arrow reads the footers; columns.py parses the pages. The wanted columns of a row group lie next to each other, so a group takes one ranged
read, and only that range stays in memory. Arrow's own reader copies images into columns: it needs three times the memory meanwhile, and
reaches 1.6 GB/s instead of 2.2.
"""

import copy
import hashlib
import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.columns import LENGTH, TEXT, Layout, arrow_array, packed, read_pages
from dataio.foreign import MAX_MANIFEST_BYTES, read_regular
from dataio.manifest import MANIFEST_NAME, Manifest, ShardInfo
from dataio.quarantine import BadSample
from dataio.reading import READING_NAME, Reading
from dataio.remote import RETRY_SECONDS, Remote, RemoteFile, is_remote, is_uri, local_path
from dataio.schema import LABEL, Target, is_single_label, single_label

if TYPE_CHECKING:
    from dataio.selection import Selected

ROWS_PER_GROUP = 512
QUARANTINE_NAME = "quarantine.jsonl"
File: TypeAlias = "Path | pa.Buffer | RemoteFile"
"""Location of one file's bytes."""

_MAGIC = b"PAR1"
_TAIL_BYTES = 64 << 10
"""Bytes read at once from a shard's end: enough for the footer of some 150 row groups."""
_VERIFY_BYTES = 8 << 20
_ROW_BYTES = 256
"""Memory of a row in addition to its bytes in the file: a view, a value of a target, a key."""
_ONE_LABEL = single_label(())
_VALUE_BYTES = 8
"""Memory of each further target in addition to that; labels are views."""


class CorruptShard(ValueError):
    """A shard whose bytes are not those that were written. The message names the shard and, where known, the row group."""

    failure_kind = "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """The samples of one row group, in order."""

    encoded: list[np.ndarray]
    """Each (bytes,) uint8, a read-only view of the row group's buffer."""
    targets: dict[str, np.ndarray]
    """Target name -> (n, *shape) of the target's dtype."""
    keys: list[str]

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64, for data with one label a sample."""
        return self.targets[LABEL]


class Split:
    """One split: `count` samples in row groups of ROWS_PER_GROUP (the last may be short)."""

    def __init__(
        self,
        name: str,
        shards: Sequence[tuple[ShardInfo, File]],
        schema: tuple[Target, ...] = _ONE_LABEL,
        *,
        holds_texts: bool = False,
    ) -> None:
        self.name, self.schema, self.holds_texts = name, schema, holds_texts
        layout = Layout(schema, holds_texts=holds_texts)
        self._of_a_row_group = (layout.sample, *layout.targets, "key")
        self.count = sum(info.rows for info, _ in shards)
        self.is_remote = any(isinstance(where, RemoteFile) for _, where in shards)
        rows = [group for info, _ in shards for group in info.row_group_rows]
        self.group_offsets: np.ndarray = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))  # (groups + 1,) int64
        self._shards = [_Shard(name, info, where, layout) for info, where in shards]
        self._place = [(shard, group) for shard in self._shards for group in range(len(shard.info.row_group_rows))]
        self._target_columns = layout.targets
        self._targets: dict[str, np.ndarray] | None = None
        self._lengths: np.ndarray | None = None

    @property
    def groups(self) -> int:
        return len(self._place)

    def read_group(self, group: int) -> RowGroup:
        """Reads row group `group` of the split, by one read. Raises CorruptShard; for remote shards also DataOutage and DataRefused."""
        encoded, *values, keys = self._read(group, *self._of_a_row_group)
        return RowGroup(encoded=encoded, targets=self._by_name(values), keys=keys)

    def group_bytes(self, group: int) -> int:
        """The memory that `read_group(group)` takes while any of its samples is held: its bytes in the file, plus some per row for the
        objects around them. Reads the shard's footer if that was not done yet; raises what read_group raises."""
        shard, local = self._locate(group)
        row_bytes = _ROW_BYTES + _VALUE_BYTES * (len(self.schema) - 1)
        return shard.span(local, self._of_a_row_group)[1] + row_bytes * shard.info.row_group_rows[local]

    def targets(self) -> dict[str, np.ndarray]:
        """Target name -> (count, *shape) of the target's dtype, read-only; read once."""
        if self._targets is None:
            parts = [self._read(group, *self._target_columns) for group in range(self.groups)]
            columns = [
                np.concatenate([np.empty((0, *target.shape), target.dtype), *(part[index] for part in parts)])
                for index, target in enumerate(self.schema)
            ]
            for column in columns:
                column.flags.writeable = False
            self._targets = self._by_name(columns)
        return self._targets

    def labels(self) -> np.ndarray:
        """(count,) int64, for data with one label a sample. Raises ValueError for other data."""
        if not is_single_label(self.schema):
            raise ValueError(f"the data set has not one label a sample; its targets are {', '.join(each.name for each in self.schema)}")
        return self.targets()[LABEL]

    def values(self, name: str) -> Iterator[np.ndarray]:
        """Yields the values of one target, (n, *shape) for each row group, in order: for callers that must not hold them all."""
        column = self._target_columns[[target.name for target in self.schema].index(name)]
        return (self._read(group, column)[0] for group in range(self.groups))

    def keys(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of these samples, in the given order; reads the row groups that hold them."""
        return self._column_at("key", ids)

    def _column_at(self, column: str, ids: Sequence[int] | np.ndarray) -> list[Any]:
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.count):
            raise IndexError(f"sample ids of {self.name} run from 0 to {self.count - 1}; got {wanted.min()} to {wanted.max()}")
        groups = np.searchsorted(self.group_offsets, wanted, side="right") - 1
        columns = {int(group): self._read(int(group), column)[0] for group in np.unique(groups)}
        within = wanted - self.group_offsets[groups]
        return [columns[int(group)][int(row)] for group, row in zip(groups, within, strict=True)]

    def lengths(self) -> np.ndarray:
        """(count,) int32, read-only: the tokens of each text. Reads nothing else of them, and once."""
        assert self.holds_texts, f"{self.name} holds images"
        if self._lengths is None:
            parts = [self._read(group, LENGTH)[0] for group in range(self.groups)]
            self._lengths = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int32)
            self._lengths.flags.writeable = False
        return self._lengths

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """These texts as people read them, in the given order; reads the row groups that hold them."""
        assert self.holds_texts, f"{self.name} holds images"
        return self._column_at(TEXT, ids)

    def content(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Yields (key, values, content SHA-256) of each sample in order, without reading the samples. The values are the bytes of all
        targets in order, little-endian: 8 for a label, one a class for labels, 4 for a number."""
        for group in range(self.groups):
            keys, hashes, *columns = self._read(group, "key", "sha256", *self._target_columns)
            values = np.concatenate([packed(column) for column in columns], axis=1)  # (n, bytes) uint8
            yield from zip(keys, (row.tobytes() for row in values), hashes, strict=True)

    def hashes(self) -> Iterator[bytes]:
        """Yields the content SHA-256 of each sample in order."""
        for group in range(self.groups):
            yield from self._read(group, "sha256")[0]

    def marks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of one target (count, *shape), and the first 8 bytes of each sample's SHA-256 (count,) uint64."""
        index = [target.name for target in self.schema].index(name)
        target = self.schema[index]
        values, hashes = np.empty((self.count, *target.shape), target.dtype), np.empty(self.count, np.uint64)
        for group, (begin, end) in enumerate(itertools.pairwise(self.group_offsets.tolist())):
            values[begin:end], sha256 = self._read(group, self._target_columns[index], "sha256")
            hashes[begin:end] = np.frombuffer(b"".join(each[:8] for each in sha256), "<u8")
        return values, hashes

    def verify(self) -> None:
        """Reads all bytes of all shards and compares their hashes. Raises CorruptShard."""
        for shard in self._shards:
            shard.verify()

    def _by_name(self, columns: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {target.name: column for target, column in zip(self.schema, columns, strict=True)}

    def _read(self, group: int, *columns: str) -> list[Any]:
        shard, local = self._locate(group)
        return shard.read(local, columns)

    def _locate(self, group: int) -> tuple["_Shard", int]:
        if not 0 <= group < self.groups:
            raise IndexError(f"row groups of {self.name} run from 0 to {self.groups - 1}; got {group}")
        return self._place[group]


class PartOfSplit(Split):
    """Some samples of a split as a split of their own, numbered anew in the order in which they are stored. Row groups are read as those of
    the whole split, and those without any of the samples are not. It holds a bit for each sample of the whole split."""

    def __init__(self, name: str, whole: Split, is_chosen: np.ndarray) -> None:
        """`is_chosen`: (whole.count,) bool."""
        assert is_chosen.shape == (whole.count,)
        assert is_chosen.dtype == bool
        vars(self).update(vars(whole))
        self.name, self._targets, self._lengths = name, None, None
        before = np.concatenate(([0], np.cumsum(is_chosen, dtype=np.int64)))[whole.group_offsets]  # (groups + 1,)
        rows = np.diff(before)
        self._chosen_groups = np.flatnonzero(rows)
        self._place = [whole._place[group] for group in self._chosen_groups.tolist()]
        self.group_offsets = np.concatenate(([0], np.cumsum(rows[self._chosen_groups], dtype=np.int64)))
        self.count = int(before[-1])
        self._bits = np.packbits(is_chosen)
        self._stored_offsets = whole.group_offsets

    def _read(self, group: int, *columns: str) -> list[Any]:
        values = super()._read(group, *columns)
        begin, end = self._stored_offsets[self._chosen_groups[group]], self._stored_offsets[self._chosen_groups[group] + 1]
        bits = np.unpackbits(self._bits[begin // 8 : -(-end // 8)])[begin % 8 :][: end - begin]
        rows = np.flatnonzero(bits)
        return [column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()] for column in values]


class Dataset:
    """A converted data set: `manifest` and its splits."""

    def __init__(self, manifest: Manifest, files: Mapping[str, File], where: str = "files in memory") -> None:
        self.manifest = manifest
        self.where = where
        """The location it was opened from, without credentials, for display."""
        self._files = dict(files)
        self._splits = {
            name: Split(
                name,
                [(shard, self._files[shard.name]) for shard in info.shards],
                manifest.targets,
                holds_texts=manifest.texts is not None,
            )
            for name, info in manifest.splits.items()
        }
        self._class_counts: Mapping[str, tuple[int, ...]] = {}
        self.selected: Selected | None = None
        """Which of the training samples are in the training split; None: all of them."""

    def with_parts(self, parts: Mapping[str, Split], *, class_counts: Mapping[str, tuple[int, ...]], selected: "Selected") -> "Dataset":
        """With these splits in the place of its own, or beside them, and with what the conversion would have counted of them. For
        dataio.selection, whose promises they keep."""
        view = copy.copy(self)
        view._splits = self._splits | dict(parts)
        view.manifest = self.manifest.with_counts({name: split.count for name, split in view._splits.items()})
        view._class_counts, view.selected = class_counts, selected
        return view

    def split(self, name: str) -> Split:
        if name not in self._splits:
            raise ValueError(f"there is no split {name!r}; the data set has {', '.join(self._splits)}")
        return self._splits[name]

    def only(self, split: str, *, called: str) -> "Dataset":
        """A data set of this split alone, under another name. Its fingerprint is still that of all splits."""
        self.split(split)
        manifest = replace(self.manifest, splits={called: self.manifest.splits[split]})
        return Dataset(manifest, self._files, self.where)

    def left_out(self) -> tuple[BadSample, ...]:
        """The samples that the conversion left out. Raises OSError or ValueError if the file with them cannot be read."""
        file = self._files.get(QUARANTINE_NAME)
        return BadSample.from_lines(_read_all(file)) if file is not None else ()

    @property
    def size_bytes(self) -> int:
        """Total size of the shards: the bytes to transfer to another machine."""
        return sum(shard.size_bytes for split in self.manifest.splits.values() for shard in split.shards)

    @property
    def reading(self) -> Reading | None:
        """What the conversion found besides the samples; None where that was not written down."""
        file = self._files.get(READING_NAME)
        reading = None if file is None else Reading.from_json(_read_all(file))
        if reading is None or self.selected is None:
            return reading
        return replace(reading, class_counts={**reading.class_counts, **self._class_counts})

    @property
    def is_remote(self) -> bool:
        """Whether it is read over a network."""
        return any(isinstance(file, RemoteFile) for file in self._files.values())

    def files(self) -> dict[str, Path | pa.Buffer]:
        """Every file by name, in the form that open_dataset takes. Raises ValueError for a remote data set, whose files are not local."""
        files: dict[str, Path | pa.Buffer] = {}
        for name, file in self._files.items():
            if isinstance(file, RemoteFile):
                raise ValueError(f"data set {self.where} is remote and cannot be handed on; make sure that every node can read it there")
            files[name] = file
        return files


def open_dataset(location: str | Path | Mapping[str, pa.Buffer | bytes | memoryview], *, retry_seconds: float = RETRY_SECONDS) -> Dataset:
    """Opens a converted folder, by path or URI (s3://bucket/prefix, ...), or its files in memory. Reads the manifest, and the names and
    sizes of the shards; a shard is opened when it is first read. Failed operations on remote storage are retried for `retry_seconds`.

    Raises ValueError for a folder that is not a converted one, CorruptShard if a shard is missing or has another size, DataRefused (a
    ValueError) where remote storage refuses, DataOutage (an OSError) where it does not answer.
    """
    if isinstance(location, Mapping):
        files: dict[str, File] = {name: data if isinstance(data, pa.Buffer) else pa.py_buffer(data) for name, data in location.items()}
        if MANIFEST_NAME not in files:
            raise ValueError(f"the files in memory lack {MANIFEST_NAME}; pass all of Dataset.files()")
        return _open_files(files, lambda name: _size(files[name]) if name in files else None, "the files in memory")
    if is_remote(location):
        remote = Remote(str(location), retry_seconds=retry_seconds)
        sizes = remote.list()
        if MANIFEST_NAME not in sizes:
            raise ValueError(
                f"{remote.address} is no converted data set (no {MANIFEST_NAME}); convert the source, then copy the folder there: "
                f"python -m dataio.convert SOURCE DEST"
            )
        return _open_files({name: remote.file(name) for name in sizes}, sizes.get, remote.address)
    folder = (local_path(str(location)) if is_uri(location) else None) or Path(location).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(f"{folder} is no converted data set (no {MANIFEST_NAME}); make one: python -m dataio.convert SOURCE {folder}")
    names = [MANIFEST_NAME, *(name for name in (QUARANTINE_NAME, READING_NAME) if (folder / name).is_file())]
    return _open_files({name: folder / name for name in names}, lambda name: _size(folder / name), str(folder), folder)


def _open_files(files: Mapping[str, File], size_of: Callable[[str], int | None], where: str, folder: Path | None = None) -> Dataset:
    """Makes the data set of these files; looks for shards in `folder`, if given."""
    manifest = Manifest.from_json(_read_all(files[MANIFEST_NAME]))
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard in shards:
        size = size_of(shard.name)
        if size != shard.size_bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard.size_bytes}"
            raise CorruptShard(f"shard {shard.name} of {where} {found}; convert the source again")
    return Dataset(manifest, {**files, **({shard.name: folder / shard.name for shard in shards} if folder else {})}, where)


class ShardWriter:
    """Writes one shard, row group by row group, to `path`; `close` syncs the file and describes it.

    The caller renames it: a shard counts once its ShardInfo is recorded somewhere.
    """

    def __init__(self, path: Path, targets: tuple[Target, ...] = _ONE_LABEL, *, holds_texts: bool = False) -> None:
        self._path, self._targets = path, targets
        layout = Layout(targets, holds_texts=holds_texts)
        self._schema = layout.schema
        self._row_group_rows: list[int] = []
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        try:
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._file, mode="w"),
                layout.schema,
                compression=layout.compression,
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

    def write_group(
        self,
        encoded: Sequence[bytes],
        targets: Mapping[str, Any],
        keys: Sequence[str],
        hashes: Sequence[bytes],
        texts: Sequence[tuple[int, str]] = (),
    ) -> None:
        """`targets`: name -> n values, in the form of `schema.value_of`. `texts`: of texts, how many tokens each has and how it reads."""
        arrays = [
            pa.chunked_array(_binary_chunks(encoded), pa.binary()),
            *(pa.chunked_array([arrow_array(target, targets[target.name])]) for target in self._targets),
            pa.chunked_array([pa.array(keys, pa.string())]),
            pa.chunked_array([pa.array(hashes, pa.binary(32))]),
        ]
        if texts:
            arrays.append(pa.chunked_array([pa.array([length for length, _ in texts], pa.int64())]))
            arrays.append(pa.chunked_array([pa.array([text for _, text in texts], pa.string())]))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=ROWS_PER_GROUP)
        self._row_group_rows.append(len(encoded))

    def close(self) -> ShardInfo:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return shard_info(self._path, tuple(self._row_group_rows))

    def abort(self) -> None:
        """Leaves the file incomplete."""
        self._writer.is_open = False  # otherwise its destructor writes a footer, and fails
        self._file.close()


def shard_info(path: Path, row_group_rows: tuple[int, ...]) -> ShardInfo:
    """Hashes the finished shard at `path`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    footer = _footer(lambda offset, length: _read_range(path, offset, length), size)
    return ShardInfo(
        name=path.name,
        rows=sum(row_group_rows),
        row_group_rows=row_group_rows,
        size_bytes=size,
        sha256=digest,
        footer_sha256=hashlib.sha256(footer).hexdigest(),
    )


class _Shard:
    """One shard, usable from any thread; its footer is read and checked once."""

    def __init__(self, split: str, info: ShardInfo, where: File, layout: "Layout") -> None:
        self.info = info
        self._layout = layout
        self._split = split
        self._where = where
        self._metadata: pq.FileMetaData | None = None
        self._lock = threading.Lock()

    def read(self, group: int, columns: Sequence[str]) -> list[Any]:
        """The values of these columns of a row group, by one read of the range that spans them."""
        begin, size = self.span(group, columns)
        data = np.frombuffer(self._range(begin, size, group), np.uint8)
        data.flags.writeable = False
        row_group = self._checked_metadata().row_group(group)
        rows = self.info.row_group_rows[group]
        values = []
        for name in columns:
            chunk = row_group.column(self._layout.index[name])
            at = chunk.data_page_offset - begin
            try:
                pages = read_pages(data[at : at + chunk.total_compressed_size], chunk.compression, chunk.total_uncompressed_size)
                if sum(count for count, _ in pages) != rows:
                    raise ValueError(f"it has {sum(count for count, _ in pages)} rows instead of {rows}")
                values.append(self._layout.values[name](pages))
            except (pa.ArrowException, ValueError, IndexError, OSError, MemoryError, struct.error) as error:
                raise self._corrupt(group, f"{error} (column {name})") from error
        return values

    def span(self, group: int, columns: Sequence[str]) -> tuple[int, int]:
        """(offset, bytes) of the range that spans these columns of a row group."""
        row_group = self._checked_metadata().row_group(group)
        chunks = [row_group.column(self._layout.index[name]) for name in columns]
        begin = min(chunk.data_page_offset for chunk in chunks)
        return begin, max(chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks) - begin

    def verify(self) -> None:
        digest = hashlib.sha256()
        for begin in range(0, self.info.size_bytes, _VERIFY_BYTES):
            digest.update(self._range(begin, min(_VERIFY_BYTES, self.info.size_bytes - begin)))
        if digest.hexdigest() != self.info.sha256:
            raise self._corrupt(None, "its SHA-256 is not the manifest's")

    def _checked_metadata(self) -> pq.FileMetaData:
        with self._lock:
            if self._metadata is None:
                try:
                    size = _size(self._where)
                    if size is None:
                        raise self._corrupt(None, "it is missing")
                    footer = _footer(self._range, size)
                    if hashlib.sha256(footer).hexdigest() != self.info.footer_sha256:
                        raise self._corrupt(None, "its footer's SHA-256 is not the manifest's")
                    metadata = pq.read_metadata(pa.BufferReader(footer))
                except pa.ArrowException as error:
                    raise self._corrupt(None, str(error)) from error
                rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
                if rows != self.info.row_group_rows:
                    raise self._corrupt(None, f"its row groups hold {rows[:4]}... rows instead of {self.info.row_group_rows[:4]}...")
                if metadata.schema.names != self._layout.schema.names:
                    raise self._corrupt(None, f"its columns are {metadata.schema.names}, not {self._layout.schema.names}")
                self._metadata = metadata
            return self._metadata

    def _range(self, offset: int, size: int, group: int | None = None) -> pa.Buffer:
        try:
            data = _read_range(self._where, offset, size)
        except FileNotFoundError as error:
            raise self._corrupt(group, "it is missing") from error
        except (OSError, MemoryError) as error:
            if isinstance(self._where, RemoteFile):
                raise  # an outage is not damage
            raise self._corrupt(group, str(error)) from error
        if data.size != size:
            raise self._corrupt(group, f"it ends after {offset + data.size} bytes instead of {self.info.size_bytes}")
        return data

    def _corrupt(self, group: int | None, reason: str) -> CorruptShard:
        place = "" if group is None else f"row group {group} of "
        where = f"{self.info.name} (in memory)" if isinstance(self._where, pa.Buffer) else self._where
        return CorruptShard(
            f"{place}shard {where} (split {self._split}) is damaged: {reason}; convert the source again or restore the file"
        )


def _read_range(where: File, offset: int, size: int) -> pa.Buffer:
    """Reads `size` bytes from `offset`, fewer where the file ends."""
    if isinstance(where, pa.Buffer):
        return where.slice(offset, min(size, max(where.size - offset, 0)))
    if isinstance(where, RemoteFile):
        return where.read(offset, size)
    with pa.OSFile(str(where)) as file:
        return pa.py_buffer(file.read_at(size, offset))


def _read_all(where: File) -> bytes:
    match where:
        case Path():
            return read_regular(where, MAX_MANIFEST_BYTES)
        case RemoteFile():
            return where.read_all()
        case _:
            return bytes(where.to_pybytes())


def _size(where: File) -> int | None:
    if isinstance(where, Path):
        return where.stat().st_size if where.is_file() else None
    try:
        return int(where.size)
    except FileNotFoundError:
        return None


def _footer(read: Callable[[int, int], pa.Buffer], size: int) -> bytes:
    """The footer's bytes, with its length and magic, of a Parquet file of `size` bytes."""
    tail = read(max(size - _TAIL_BYTES, 0), min(_TAIL_BYTES, size)).to_pybytes()
    if len(tail) < 8 or tail[-4:] != _MAGIC:
        raise pa.ArrowInvalid("it does not end like a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:
        raise pa.ArrowInvalid("its footer is longer than the file")
    if length > len(tail):
        tail = read(size - length, length).to_pybytes()
    return bytes(tail[-length:])


def _binary_chunks(encoded: Sequence[bytes]) -> list[pa.Array]:
    """Splits into arrays of less than 2 GiB each, because the offsets of a binary array are 32-bit."""
    chunks, begin, size = [], 0, 0
    for index, sample in enumerate(encoded):
        if size + len(sample) >= 2**31 - 1:
            chunks.append(pa.array(encoded[begin:index], pa.binary()))
            begin, size = index, 0
        size += len(sample)
    return [*chunks, pa.array(encoded[begin:], pa.binary())]
