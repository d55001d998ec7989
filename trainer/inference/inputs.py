"""Lists the images that a command names, wherever they are: image files, folders of them, and the rows of Parquet files, local or at a URI.

A list is a table, so that millions of names are cheap to keep and each worker reads its own part of them. `encoded` reads the images of
such a part. How a column of images is told and read is dataio's, as for training.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.storage import Storage, is_uri, open_storage
from dataio.foreign import MAX_IMAGE_BYTES, read_regular
from dataio.formats import JUNK, SUFFIXES, images_below
from dataio.sources.image_column import IMAGE_COLUMNS, holds_images, images_in, key_of_row, paths_in, why_no_image
from dataio.sources.source import key_of, text_of
from dataio.text import address
from trainer.inference.parquet import opened_parquet

Kind = Literal["files", "rows"]

FILES = pa.schema([("key", pa.string()), ("where", pa.int32()), ("path", pa.binary())])
"""A row is an image: what its answer is called, which of the list's places it lies in, and its path there."""
ROWS = pa.schema(
    [
        ("where", pa.int32()),
        ("path", pa.binary()),
        ("group", pa.int32()),
        ("first", pa.int64()),
        ("rows", pa.int64()),
        ("start", pa.int64()),
        ("mark", pa.int64()),
    ]
)
"""A row is a row group of a Parquet file: its number there, the number of its first row in the file, how many it has, how many the list
has before it, and a mark by which it is known again."""
KEY_COLUMNS = ("key", "id", "image_id", "path", "file_name", "filename", "file", "name", "url")
PARQUET = ".parquet"
MAX_GROUP_BYTES = 4 << 30
"""Of a row group's images, unpacked: a worker reads them batch by batch, and a file may be made to fill memory."""
ROWS_AT_ONCE = 64
_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """All images of a command."""

    kind: Kind
    places: tuple[str, ...]
    """Roots that the paths are relative to: "" for this machine's files, otherwise URIs."""
    table: pa.Table
    """FILES or ROWS."""
    column: str = ""
    """Of Parquet files: the one that holds the images."""

    @property
    def images(self) -> int:
        if self.kind == "files":
            return int(self.table.num_rows)
        return sum(self.table.column("rows").to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """An image as it is stored."""

    key: str
    data: bytes
    error: str = ""
    """Why there are no bytes."""


def listed(given: Sequence[str], *, column: str = "") -> Listed:
    """What the words of a command name. ValueError if they name nothing, or images and Parquet files at once; `column` says which one of
    Parquet files holds the images."""
    if not given:
        raise ValueError("no IMAGE given; name image files, folders of them, or Parquet files; URIs too")
    places: dict[str, int] = {}
    files: list[tuple[str, int, bytes]] = []
    parquet: list[tuple[int, bytes, str]] = []
    for word in given:
        before = len(files) + len(parquet)
        if is_uri(word):
            storage = open_storage(word)
            place = places.setdefault(word, len(places))
            for path in _remote_paths(storage, word):
                name = _name_at(word, path)
                if path.lower().endswith(PARQUET) or (not path and word.partition("?")[0].lower().endswith(PARQUET)):
                    parquet.append((place, path.encode(), name))
                else:
                    files.append((key_of(name.encode(errors="surrogateescape")), place, path.encode()))
        else:
            place = places.setdefault("", len(places))
            where = os.path.expanduser(open_storage(word).root if word.startswith("file:") else word)
            if not os.path.lexists(where):
                raise ValueError(f"{word} does not exist; name image files, folders of them, or Parquet files")
            if os.path.isdir(where):
                parquet += [(place, os.fsencode(os.path.abspath(path)), path) for path in sorted(_parquet_below(where))]
                images = sorted(images_below(where))
            elif where.lower().endswith(PARQUET):
                parquet.append((place, os.fsencode(os.path.abspath(where)), where))
                images = []
            else:
                images = [where]
            files += [(key_of(os.fsencode(path)), place, os.fsencode(os.path.abspath(path))) for path in images]
        if len(files) + len(parquet) == before:
            raise ValueError(f"{address(word)} holds no image (.jpg, .png, .webp, ...) and no Parquet file; name another folder or file")
    if files and parquet:
        raise ValueError(
            f"there are {len(files)} image files and {len(parquet)} Parquet files ({parquet[0][2]}); name the ones or the others"
        )
    roots = tuple(places)
    if files:
        columns = [list(column) for column in zip(*files, strict=True)]
        return Listed(kind="files", places=roots, table=pa.table(dict(zip(FILES.names, columns, strict=True)), FILES))
    return _rows(roots, parquet, column)


def _parquet_below(folder: str) -> Iterator[str]:
    """OSError for a folder that cannot be listed: its files would be left out in silence."""

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_")) and name.lower() not in JUNK]
        yield from (os.path.join(where, name) for name in names if name.lower().endswith(PARQUET) and not name.startswith((".", "_")))


def _remote_paths(storage: Storage, word: str) -> list[str]:
    """Paths below the storage's root of images and Parquet files, sorted; "" for the root itself, if it is a file."""

    def find() -> list[Any] | None:
        if storage.fs.get_file_info(storage.root).type == pafs.FileType.File:
            return None
        return list(storage.fs.get_file_info(pafs.FileSelector(storage.root, recursive=True, allow_not_found=True)))

    infos = storage.retry.call(find, address(word))
    if infos is None:
        return [""]
    paths = [info.path.removeprefix(storage.root).lstrip("/") for info in infos if info.type == pafs.FileType.File]
    return sorted(path for path in paths if PurePosixPath(path).suffix.lower() in _SUFFIXES | {PARQUET} and not _is_hidden(path))


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) or part.lower() in JUNK for part in path.split("/"))


def _rows(places: tuple[str, ...], parquet: Sequence[tuple[int, bytes, str]], column: str) -> Listed:
    """The row groups of these files."""
    table: dict[str, list[Any]] = {name: [] for name in ROWS.names}
    start = 0
    for place, path, name in parquet:
        with _parquet(places[place], path, name) as file:
            column = column or _image_column(file.schema_arrow, name)
            if column not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{name} has no column {column!r}; its columns are {found:.300}: give --image-column NAME")
            if not holds_images(file.schema_arrow.field(column).type):
                kind = file.schema_arrow.field(column).type
                raise ValueError(
                    f"column {column!r} of {name} is {kind}; it must be binary or struct{{bytes, path}}: give --image-column NAME"
                )
            first = 0
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                rows = about.num_rows
                for key, value in zip(ROWS.names, (place, path, group, first, rows, start, _mark_of(about)), strict=True):
                    table[key].append(value)
                first, start = first + rows, start + rows
    return Listed(kind="rows", places=places, table=pa.table(table, ROWS), column=column)


def _mark_of(group: pq.RowGroupMetaData) -> int:
    """Differs where a row group was written anew with other images: where its columns lie in the file, and how long they are."""
    columns = [group.column(index) for index in range(group.num_columns)]
    where = [[each.path_in_schema, each.data_page_offset, each.total_compressed_size, each.num_values] for each in columns]
    return int.from_bytes(hashlib.sha256(json.dumps(where).encode()).digest()[:8], signed=True)


def _image_column(schema: Any, name: str) -> str:
    for column in IMAGE_COLUMNS:
        if column in schema.names and holds_images(schema.field(column).type):
            return column
    binary = [field.name for field in schema if holds_images(field.type)]
    if len(binary) == 1:
        return str(binary[0])
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise ValueError(
        f"{name} has no column {IMAGE_COLUMNS[0]} of struct{{bytes, path}} or binary, but {found:.300}: give --image-column NAME"
    )


def _parquet(place: str, path: bytes, name: str) -> AbstractContextManager[pq.ParquetFile]:
    storage = open_storage(place) if place else None
    where = path.decode() if place else os.fsdecode(path)
    return opened_parquet(storage, where, name, fix="give another file in its place, or leave it out")


def _name_at(place: str, path: str) -> str:
    """What a file at a URI is called."""
    return f"{address(place)}/{path}".rstrip("/")


def encoded(kind: Kind, places: Sequence[str], column: str, part: pa.Table) -> Iterator[list[Encoded]]:
    """The images of a part of the list, in order, some at a time. An image that cannot be read says so; OSError if a place or a Parquet
    file cannot, ValueError if that file is not what was listed."""
    if kind == "files":
        yield from _files(places, part)
    else:
        for row in part.to_pylist():
            yield from _group(places[row["where"]], column, row)


def _files(places: Sequence[str], part: pa.Table) -> Iterator[list[Encoded]]:
    storages = [open_storage(place) if place else None for place in places]
    for start in range(0, part.num_rows, ROWS_AT_ONCE):
        batch = []
        for row in part.slice(start, ROWS_AT_ONCE).to_pylist():
            storage = storages[row["where"]]
            path = os.fsdecode(row["path"])
            try:
                data = read_regular(path, MAX_IMAGE_BYTES) if storage is None else _read(storage, path)
            except OSError as error:
                if storage is not None and not isinstance(error, FileNotFoundError):
                    raise  # no fault of an image: the storage is away, or refuses
                batch.append(Encoded(key=row["key"], data=b"", error=f"cannot be read: {error.strerror or error}"))
            except ValueError as error:
                batch.append(Encoded(key=row["key"], data=b"", error=f"cannot be read: {error}"))
            else:
                batch.append(Encoded(key=row["key"], data=data))
        yield batch


def _read(storage: Storage, path: str) -> bytes:
    """ValueError for a file that is too large."""

    def read() -> bytes:
        with storage.fs.open_input_file(storage.at(path)) as file:
            if (size := file.size()) > MAX_IMAGE_BYTES:
                raise ValueError(f"{size} bytes; {MAX_IMAGE_BYTES} are the most")
            return bytes(file.read())

    return storage.retry.call(read, path)


def _group(place: str, column: str, row: dict[str, Any]) -> Iterator[list[Encoded]]:
    """The images of a row group, which is the one that was listed."""
    name = _name_at(place, row["path"].decode()) if place else key_of(row["path"])
    try:
        with _parquet(place, row["path"], name) as file:
            schema = file.schema_arrow
            has_column = column in schema.names and holds_images(schema.field(column).type)
            has_group = row["group"] < file.metadata.num_row_groups and _mark_of(file.metadata.row_group(row["group"])) == row["mark"]
            if not (has_column and has_group):
                raise ValueError(
                    f"{name} is not the file any more that was listed; put that one back, and the same command goes on, "
                    "or give another --out for the new one"
                )
            keys = next((key for key in KEY_COLUMNS if key != column and key in schema.names), None)
            yield from _rows_of(file, name, row, column, keys)
    except FileNotFoundError:
        raise ValueError(
            f"{name} is not there any more; put it back, and the same command goes on, or give another --out for what is there now"
        ) from None


def _rows_of(file: pq.ParquetFile, name: str, row: dict[str, Any], column: str, keys: str | None) -> Iterator[list[Encoded]]:
    unpacked, at = 0, row["first"]
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[row["group"]], columns=[column, *([keys] if keys else [])]):
        unpacked += batch.nbytes
        if unpacked > MAX_GROUP_BYTES:
            raise ValueError(f"row group {row['group']} of {name} unpacks to more than {MAX_GROUP_BYTES} bytes; write smaller row groups")
        images, paths = images_in(batch.column(column)), paths_in(batch.column(column), len(batch))
        named = batch.column(keys).to_pylist() if keys else [None] * len(batch)
        found = []
        for index, (key, path, data) in enumerate(zip(named, paths, images.to_pylist(), strict=True)):
            called = text_of(str(key)) if key is not None else key_of_row(path, PurePosixPath(name).stem, at + index)
            found.append(Encoded(key=called, data=data or b"", error="" if data is not None else why_no_image(path)))
        at += len(batch)
        yield found
