"""How the columns of a shard are stored, and how their pages are read. Knows nothing of files, row groups or the manifest.

Called by parquet. A row holds a sample's bytes (the column `image`, whatever they encode), one column for each target, its key and the
SHA-256 of the bytes. Data with one label a sample have the single target column `label`; other targets are `target.NAME`: a label as int64,
labels as a byte a class, a number as float32. Of texts the bytes are tokens (the column `tokens`), and the last columns are `length`, the
number of tokens, and `text`, as people read it: a step reads neither.

All pages are of the one kind that parquet.ShardWriter writes (PLAIN, no nulls, no dictionary), so this file parses them itself: it reads
uncompressed pages as views.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from dataio.schema import LABEL, Target, is_single_label

LENGTH, TEXT = "length", "text"
Pages = list[tuple[int, np.ndarray]]
"""Pages of a column of a row group, in order: (number of values, their bytes in PLAIN encoding)."""


class Layout:
    """Which columns the shards of a data set with these targets have, and how each is stored and read. Columns that are read together lie
    next to each other."""

    def __init__(self, targets: tuple[Target, ...], *, holds_texts: bool = False) -> None:
        self.sample = "tokens" if holds_texts else "image"
        """The column of the samples' bytes."""
        self.targets = (LABEL,) if is_single_label(targets) else tuple(f"target.{target.name}" for target in targets)
        stored = dict(zip(self.targets, targets, strict=True))
        self.schema = pa.schema(
            [
                pa.field(self.sample, pa.binary(), nullable=False),
                *(pa.field(name, _arrow_type(target), nullable=False) for name, target in stored.items()),
                pa.field("key", pa.string(), nullable=False),
                pa.field("sha256", pa.binary(32), nullable=False),
                *([pa.field(LENGTH, pa.int64(), nullable=False), pa.field(TEXT, pa.string(), nullable=False)] if holds_texts else []),
            ]
        )
        # Encoded samples, hashes and numbers do not compress; labels of many classes stay uncompressed, to be read as views.
        compressed = [name for name, target in stored.items() if target.kind == "label"]
        self.compression = {name: "ZSTD" if name in (*compressed, "key", LENGTH, TEXT) else "NONE" for name in self.schema.names}
        self.index = {name: index for index, name in enumerate(self.schema.names)}
        read = (_ints,) if is_single_label(targets) else tuple(map(_reader_of, targets))
        self.values: dict[str, Callable[[Pages], Any]] = {
            self.sample: _byte_arrays,
            **dict(zip(self.targets, read, strict=True)),
            "key": _texts,
            "sha256": _hashes,
            **({LENGTH: _ints, TEXT: _texts} if holds_texts else {}),
        }


def _reader_of(target: Target) -> Callable[[Pages], np.ndarray]:
    match target.kind:
        case "label":
            return _class_numbers(len(target.classes))
        case "labels":
            return _flags(len(target.classes))
        case "number":
            return _floats


def _arrow_type(target: Target) -> pa.DataType:
    match target.kind:
        case "label":
            return pa.int64()
        case "labels":
            return pa.binary(len(target.classes))
        case "number":
            return pa.float32()


def arrow_array(target: Target, values: Any) -> pa.Array:
    """n values of a target, in the form of `schema.value_of`."""
    column = np.asarray(values, target.dtype)
    if target.kind != "labels":
        return pa.array(column, _arrow_type(target))
    assert column.shape[1:] == target.shape, (column.shape, target.shape)
    return pa.FixedSizeBinaryArray.from_buffers(_arrow_type(target), len(column), [None, pa.py_buffer(column.tobytes())])


def packed(column: np.ndarray) -> np.ndarray:
    """(n, bytes of a value) uint8, little-endian."""
    if column.ndim == 2:
        return column
    return np.ascontiguousarray(column, column.dtype.newbyteorder("<")).view(np.uint8).reshape(len(column), -1)


# --- Pages: https://parquet.apache.org/docs/file-format/data-pages, headers in Thrift's compact protocol --------------------------


def read_pages(chunk: np.ndarray, codec: str, most_bytes: int) -> Pages:
    """The pages of a column chunk, (bytes,) uint8, each checked against its CRC; uncompressed ones are not copied. ValueError for pages
    that ShardWriter does not write. `most_bytes` bounds the decompressed size, because headers have no checksum."""
    pages: Pages = []
    data, at = chunk.data, 0
    while at < len(data):
        header, at = _thrift(data, at, depth=0)
        kind, unpacked, size, crc, values = (header.get(field) for field in (1, 2, 3, 4, 5))
        if kind != 0 or not isinstance(values, dict) or values.get(2) != 0:
            raise ValueError("a page is not a PLAIN data page")
        if not (isinstance(unpacked, int) and isinstance(size, int) and isinstance(crc, int) and isinstance(values.get(1), int)):
            raise ValueError("a page's header lacks its sizes or its CRC")
        if not (0 <= size <= len(data) - at and 0 <= unpacked <= most_bytes):
            raise ValueError("a page is longer than its column")
        payload = data[at : at + size]
        if zlib.crc32(payload) != crc & 0xFFFFFFFF:
            raise ValueError("a page's CRC does not match its bytes")
        if codec == "UNCOMPRESSED":
            pages.append((values[1], chunk[at : at + size]))
        else:
            pages.append((values[1], np.frombuffer(pa.Codec(codec.lower()).decompress(pa.py_buffer(payload), unpacked), np.uint8)))
        at += size
    return pages


def _thrift(data: memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(fields by id, end) of the struct that begins at `at`. It parses integers and structs of them; page headers hold nothing else."""
    fields: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            field += step
        else:
            field, at = _zigzag(data, at)
        if kind in (1, 2):  # the value is part of the type
            fields[field] = kind == 1
        elif kind in (4, 5, 6):
            fields[field], at = _zigzag(data, at)
        elif kind == 12 and depth < 3:
            fields[field], at = _thrift(data, at, depth + 1)
        else:
            raise ValueError("a page's header is damaged")
    return fields, at + 1


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    """(value, end) of a variable-length integer."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value >> 1 ^ -(value & 1), at
    raise ValueError("a page's header is damaged")


def _byte_arrays(pages: Pages) -> list[np.ndarray]:
    """Zero-copy (bytes,) uint8 views of values that are each preceded by their length."""
    views: list[np.ndarray] = []
    length_at = struct.Struct("<I").unpack_from
    for count, data in pages:
        lengths, at = data.data, 0
        for _ in range(count):
            (length,) = length_at(lengths, at)
            begin, at = at + 4, at + 4 + length
            views.append(data[begin:at])
        if at != len(data):
            raise ValueError("a page's values do not fill it")
    return views


def _ints(pages: Pages) -> np.ndarray:
    return np.concatenate([_fixed(page, 8).view("<i8").reshape(-1) for page in pages]).astype(np.int64, copy=False)


def _class_numbers(classes: int) -> Callable[[Pages], np.ndarray]:
    def values(pages: Pages) -> np.ndarray:
        found = _ints(pages)
        if np.any((found < -1) | (found >= classes)):
            raise ValueError(f"a label is not in -1..{classes - 1}")
        return found

    return values


def _flags(classes: int) -> Callable[[Pages], np.ndarray]:
    def values(pages: Pages) -> np.ndarray:
        parts = [_fixed(page, classes) for page in pages]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)  # (n, classes) uint8
        if np.any((found > 1) & (found != 255)):
            raise ValueError("a label is neither 0, 1 nor 255")
        return found

    return values


def _floats(pages: Pages) -> np.ndarray:
    parts = [_fixed(page, 4).view("<f4").reshape(-1) for page in pages]
    found = np.concatenate(parts).astype(np.float32, copy=False)  # copied, because values in the page need not be aligned
    if np.any(np.isinf(found)):
        raise ValueError("a number is infinite")
    return found


def _texts(pages: Pages) -> list[str]:
    return [view.tobytes().decode() for view in _byte_arrays(pages)]


def _hashes(pages: Pages) -> list[bytes]:
    return [row.tobytes() for page in pages for row in _fixed(page, 32)]


def _fixed(page: tuple[int, np.ndarray], width: int) -> np.ndarray:
    """(values, width) uint8"""
    count, data = page
    if len(data) != count * width:
        raise ValueError("a page's values do not fill it")
    return data.reshape(count, width)
