"""Lists the images or texts that a command names, wherever they are: files, folders of them, and the rows of Parquet files, local or at a
URI; of texts also the rows of tables on this machine.

A list is a table, so that millions of names are cheap to keep and each worker reads its own part of them. `encoded` reads the samples of
such a part. What differs between images and texts is in a `Sort`: IMAGES is here, that of texts in text_inputs.py. How a column is told and
read is dataio's, as for training.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.storage import Storage, is_uri, open_storage
from dataio.foreign import MAX_IMAGE_BYTES, open_regular, read_regular
from dataio.formats import JUNK, SUFFIXES, images_below
from dataio.sources.image_column import IMAGE_COLUMNS, holds_images, images_in, key_of_row, paths_in, why_no_image
from dataio.sources.source import key_of, text_of
from dataio.text import address
from trainer.inference.parquet import opened_parquet

Kind = Literal["files", "rows"]

FILES = pa.schema([("key", pa.string()), ("where", pa.int32()), ("path", pa.binary())])
"""A row is a sample: what its answer is called, which of the list's places it lies in, and its path there."""
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
has before it, and a mark by which it is known again. Or some rows of a table, whose group is NO_GROUP."""
NO_GROUP = -1
KEY_COLUMNS = ("key", "id", "image_id", "path", "file_name", "filename", "file", "name", "url")
PARQUET = ".parquet"
MAX_GROUP_BYTES = 4 << 30
"""Of a row group's samples, unpacked: a worker reads them batch by batch, and a file may be made to fill memory."""
ROWS_AT_ONCE = 64
_ENDS_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """All samples of a command."""

    kind: Kind
    places: tuple[str, ...]
    """Roots that the paths are relative to: "" for this machine's files, otherwise URIs."""
    table: pa.Table
    """FILES or ROWS."""
    column: str = ""
    """Of rows: the one that holds the images; of texts perhaps two, with a comma between them."""

    @property
    def images(self) -> int:
        if self.kind == "files":
            return int(self.table.num_rows)
        return sum(self.table.column("rows").to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A sample as it is stored."""

    key: str
    data: bytes
    error: str = ""
    """Why there are no bytes."""


Cell = tuple[str | None, bytes, str]
"""What is known of a row: the path that it names, its image or text, and why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sort:
    """What a job answers, images or texts, as far as it is listed and read."""

    unit: str
    one: str
    files: str
    """What such files are called, for people."""
    suffixes: frozenset[str]
    max_bytes: int
    """Of a file."""
    below: Callable[[str], Iterator[str]]
    """The files below a folder."""
    column_of: Callable[[Any, str, str], str]
    """(schema of a Parquet file, its name, the column that was given or found before, or "") -> the column. ValueError if there is none."""
    columns: Callable[[str], Sequence[str]]
    """Those that such a column stands for."""
    holds: Callable[[Any, str], bool]
    """Whether a schema has the column."""
    cells: Callable[[pa.RecordBatch, str], Iterator[Cell]]
    tables: frozenset[str] = frozenset()
    """Suffixes of files with a sample a row, other than Parquet."""
    column_of_table: Callable[[str, str], str] | None = None
    """(path, the column that was given) -> the column."""
    rows_of_table: Callable[[str, str], Iterator[tuple[str, Cell]]] | None = None
    """(path, column) -> of each row its key and what is known of it. ValueError for a file that cannot be read."""


def _image_column(schema: Any, name: str, column: str) -> str:
    if not column:
        column = next((each for each in IMAGE_COLUMNS if _holds_images(schema, each)), "")
        binary = [field.name for field in schema if holds_images(field.type)]
        column = column or (str(binary[0]) if len(binary) == 1 else "")
    if not column:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"{name} has no column {IMAGE_COLUMNS[0]} of struct{{bytes, path}} or binary, but {found:.300}: give --image-column NAME"
        )
    if column not in schema.names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(schema.names):.300}: give --image-column NAME")
    if not _holds_images(schema, column):
        kind = schema.field(column).type
        raise ValueError(f"column {column!r} of {name} is {kind}; it must be binary or struct{{bytes, path}}: give --image-column NAME")
    return column


def _holds_images(schema: Any, column: str) -> bool:
    return column in schema.names and holds_images(schema.field(column).type)


def _image_cells(batch: pa.RecordBatch, column: str) -> Iterator[Cell]:
    images, paths = images_in(batch.column(column)), paths_in(batch.column(column), len(batch))
    for path, data in zip(paths, images.to_pylist(), strict=True):
        yield path, data or b"", "" if data is not None else why_no_image(path)


IMAGES = Sort(
    unit="images",
    one="image",
    files="image files",
    suffixes=frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes),
    max_bytes=MAX_IMAGE_BYTES,
    below=images_below,
    column_of=_image_column,
    columns=lambda column: [column],
    holds=_holds_images,
    cells=_image_cells,
)


def listed(given: Sequence[str], *, sort: Sort = IMAGES, column: str = "", most_rows: int = 2048) -> Listed:
    """What the words of a command name. ValueError if they name nothing, or files of one sample and of many at once; `column` says which
    one holds them. Of a table, an entry of the list has `most_rows` at most."""
    if not given:
        raise ValueError(f"no {sort.one.upper()} given; name {sort.files}, folders of them, or Parquet files; URIs too")
    places: dict[str, int] = {}
    files: list[tuple[str, int, bytes]] = []
    many: list[tuple[int, bytes, str]] = []
    with_rows = sort.tables | {PARQUET}
    for word in given:
        before = len(files) + len(many)
        if is_uri(word):
            if (suffix := PurePosixPath(word.partition("?")[0]).suffix.lower()) in sort.tables:
                raise ValueError(
                    f"{address(word)} is a table ({suffix}), which is read on this machine alone; copy it, or write it as Parquet"
                )
            storage = open_storage(word)
            place = places.setdefault(word, len(places))
            for path in _remote_paths(storage, word, sort.suffixes):
                name = _name_at(word, path)
                if path.lower().endswith(PARQUET) or (not path and word.partition("?")[0].lower().endswith(PARQUET)):
                    many.append((place, path.encode(), name))
                else:
                    files.append((key_of(name.encode(errors="surrogateescape")), place, path.encode()))
        else:
            place = places.setdefault("", len(places))
            where = os.path.expanduser(open_storage(word).root if word.startswith("file:") else word)
            if not os.path.lexists(where):
                raise ValueError(f"{word} does not exist; name {sort.files}, folders of them, or Parquet files")
            if os.path.isdir(where):
                many += [(place, os.fsencode(os.path.abspath(path)), path) for path in sorted(_below(where, with_rows))]
                single = sorted(sort.below(where))
            elif PurePosixPath(where).suffix.lower() in with_rows:
                many.append((place, os.fsencode(os.path.abspath(where)), where))
                single = []
            else:
                single = [where]
            files += [(key_of(os.fsencode(path)), place, os.fsencode(os.path.abspath(path))) for path in single]
        if len(files) + len(many) == before:
            raise ValueError(f"{address(word)} holds {_nothing(sort, is_uri(word))}; name another folder or file")
    if files and many:
        kinds = "Parquet files" if not sort.tables else "tables"
        raise ValueError(f"there are {len(files)} {sort.files} and {len(many)} {kinds} ({many[0][2]}); name the ones or the others")
    roots = tuple(places)
    if files:
        columns = [list(column) for column in zip(*files, strict=True)]
        return Listed(kind="files", places=roots, table=pa.table(dict(zip(FILES.names, columns, strict=True)), FILES))
    return _rows(roots, many, column, sort, most_rows)


def _nothing(sort: Sort, is_remote: bool) -> str:
    endings = ", ".join(sorted(sort.suffixes)[:3]) + (", ..." if len(sort.suffixes) > 3 else "")
    return f"no {sort.one} ({endings}) and no {'table' if sort.tables and not is_remote else 'Parquet file'}"


def _below(folder: str, suffixes: Set[str]) -> Iterator[str]:
    """OSError for a folder that cannot be listed: its files would be left out in silence."""

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_")) and name.lower() not in JUNK]
        yield from (os.path.join(where, name) for name in names if _ends(name, suffixes) and not name.startswith((".", "_")))


def _ends(name: str, suffixes: Set[str]) -> bool:
    return PurePosixPath(name).suffix.lower() in suffixes


def _remote_paths(storage: Storage, word: str, suffixes: Set[str]) -> list[str]:
    """Paths below the storage's root of files that end so and of Parquet files, sorted; "" for the root itself, if it is a file."""

    def find() -> list[Any] | None:
        if storage.fs.get_file_info(storage.root).type == pafs.FileType.File:
            return None
        return list(storage.fs.get_file_info(pafs.FileSelector(storage.root, recursive=True, allow_not_found=True)))

    infos = storage.retry.call(find, address(word))
    if infos is None:
        return [""]
    paths = [info.path.removeprefix(storage.root).lstrip("/") for info in infos if info.type == pafs.FileType.File]
    return sorted(path for path in paths if _ends(path, suffixes | {PARQUET}) and not _is_hidden(path))


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) or part.lower() in JUNK for part in path.split("/"))


def _rows(places: tuple[str, ...], files: Sequence[tuple[int, bytes, str]], column: str, sort: Sort, most_rows: int) -> Listed:
    """The row groups of Parquet files, and the rows of tables."""
    table: dict[str, list[Any]] = {name: [] for name in ROWS.names}
    start = 0

    def add(place: int, path: bytes, group: int, first: int, rows: int, mark: int) -> None:
        nonlocal start
        for key, value in zip(ROWS.names, (place, path, group, first, rows, start, mark), strict=True):
            table[key].append(value)
        start += rows

    for place, path, name in files:
        if _ends(name, sort.tables):
            assert sort.column_of_table is not None
            assert sort.rows_of_table is not None
            where = os.fsdecode(path)
            column = sort.column_of_table(where, column)
            mark, count = _mark_of_table(where), sum(1 for _ in sort.rows_of_table(where, column))
            for first in range(0, count, most_rows):
                add(place, path, NO_GROUP, first, min(most_rows, count - first), mark)
            continue
        with _parquet(places[place], path, name) as file:
            column = sort.column_of(file.schema_arrow, name, column)
            first = 0
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                add(place, path, group, first, about.num_rows, _mark_of(about))
                first += about.num_rows
    return Listed(kind="rows", places=places, table=pa.table(table, ROWS), column=column)


def _mark_of_table(path: str) -> int:
    """Differs where a table has another size, beginning or end."""
    with open_regular(path) as file:
        begin = file.read(_ENDS_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ENDS_BYTES))
        found = hashlib.sha256(size.to_bytes(8) + begin + file.read(_ENDS_BYTES))
    return int.from_bytes(found.digest()[:8], signed=True)


def _mark_of(group: pq.RowGroupMetaData) -> int:
    """Differs where a row group was written anew with other images: where its columns lie in the file, and how long they are."""
    columns = [group.column(index) for index in range(group.num_columns)]
    where = [[each.path_in_schema, each.data_page_offset, each.total_compressed_size, each.num_values] for each in columns]
    return int.from_bytes(hashlib.sha256(json.dumps(where).encode()).digest()[:8], signed=True)


def _parquet(place: str, path: bytes, name: str) -> AbstractContextManager[pq.ParquetFile]:
    storage = open_storage(place) if place else None
    where = path.decode() if place else os.fsdecode(path)
    return opened_parquet(storage, where, name, fix="give another file in its place, or leave it out")


def _name_at(place: str, path: str) -> str:
    """What a file at a URI is called."""
    return f"{address(place)}/{path}".rstrip("/")


def encoded(kind: Kind, places: Sequence[str], column: str, part: pa.Table, *, sort: Sort = IMAGES) -> Iterator[list[Encoded]]:
    """The samples of a part of the list, in order, some at a time. One that cannot be read says so; OSError if a place or a file of rows
    cannot, ValueError if that file is not what was listed."""
    if kind == "files":
        yield from _files(places, part, sort.max_bytes)
    else:
        for row in part.to_pylist():
            yield from (_group if row["group"] != NO_GROUP else _lines)(places[row["where"]], column, row, sort)


def _files(places: Sequence[str], part: pa.Table, max_bytes: int) -> Iterator[list[Encoded]]:
    storages = [open_storage(place) if place else None for place in places]
    for start in range(0, part.num_rows, ROWS_AT_ONCE):
        batch = []
        for row in part.slice(start, ROWS_AT_ONCE).to_pylist():
            storage = storages[row["where"]]
            path = os.fsdecode(row["path"])
            try:
                data = read_regular(path, max_bytes) if storage is None else _read(storage, path, max_bytes)
            except OSError as error:
                if storage is not None and not isinstance(error, FileNotFoundError):
                    raise  # no fault of a sample: the storage is away, or refuses
                batch.append(Encoded(key=row["key"], data=b"", error=f"cannot be read: {error.strerror or error}"))
            except ValueError as error:
                batch.append(Encoded(key=row["key"], data=b"", error=f"cannot be read: {error}"))
            else:
                batch.append(Encoded(key=row["key"], data=data))
        yield batch


def _read(storage: Storage, path: str, max_bytes: int) -> bytes:
    """ValueError for a file that is too large."""

    def read() -> bytes:
        with storage.fs.open_input_file(storage.at(path)) as file:
            if (size := file.size()) > max_bytes:
                raise ValueError(f"{size} bytes; {max_bytes} are the most")
            return bytes(file.read())

    return storage.retry.call(read, path)


def _group(place: str, column: str, row: dict[str, Any], sort: Sort) -> Iterator[list[Encoded]]:
    """The samples of a row group, which is the one that was listed."""
    name = _name_at(place, row["path"].decode()) if place else key_of(row["path"])
    with _still_there(name), _parquet(place, row["path"], name) as file:
        schema = file.schema_arrow
        has_group = row["group"] < file.metadata.num_row_groups and _mark_of(file.metadata.row_group(row["group"])) == row["mark"]
        if not (sort.holds(schema, column) and has_group):
            raise _other(name)
        columns = list(sort.columns(column))
        keys = next((key for key in KEY_COLUMNS if key not in columns and key in schema.names), None)
        yield from _rows_of(file, name, row, column, keys, sort)


def _rows_of(file: pq.ParquetFile, name: str, row: dict[str, Any], column: str, keys: str | None, sort: Sort) -> Iterator[list[Encoded]]:
    unpacked, at = 0, row["first"]
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[row["group"]], columns=[*sort.columns(column), *([keys] if keys else [])]):
        unpacked += batch.nbytes
        if unpacked > MAX_GROUP_BYTES:
            raise ValueError(f"row group {row['group']} of {name} unpacks to more than {MAX_GROUP_BYTES} bytes; write smaller row groups")
        named = batch.column(keys).to_pylist() if keys else [None] * len(batch)
        found = []
        for index, (key, (path, data, error)) in enumerate(zip(named, sort.cells(batch, column), strict=True)):
            called = text_of(str(key)) if key is not None else key_of_row(path, PurePosixPath(name).stem, at + index)
            found.append(Encoded(key=called, data=data, error=error))
        at += len(batch)
        yield found


def _lines(place: str, column: str, row: dict[str, Any], sort: Sort) -> Iterator[list[Encoded]]:
    """The samples of some rows of a table, which is the one that was listed."""
    assert not place
    assert sort.rows_of_table is not None
    path = os.fsdecode(row["path"])
    name = key_of(row["path"])
    with _still_there(name):
        if _mark_of_table(path) != row["mark"]:
            raise _other(name)
        rows = itertools.islice(sort.rows_of_table(path, column), row["first"], row["first"] + row["rows"])
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            yield [Encoded(key=key, data=data, error=error) for key, (_, data, error) in some]


@contextmanager
def _still_there(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(
            f"{name} is not there any more; put it back, and the same command goes on, or give another --out for what is there now"
        ) from None


def _other(name: str) -> ValueError:
    return ValueError(
        f"{name} is not the file any more that was listed; put that one back, and the same command goes on, or give another --out for the "
        "new one"
    )
