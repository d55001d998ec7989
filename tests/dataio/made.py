"""Sources of images, made here: what the tests of sources read."""

import gzip
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from corpus import encode, picture, pillow

from dataio.sources import Sample, Source, open_source


def read(path: Path | str, **options: Any) -> Source:
    return open_source(str(path), **({"root": Path("/nonexistent"), "test_fraction": 0.2} | options))


def pixels(sample: Sample) -> np.ndarray:
    return pillow(sample.data)


def write_hf(path: Path, rows: list[tuple[bytes | None, str | None, Any]], *, null_structs: tuple[int, ...] = (), **options: Any) -> None:
    """Options: image, label (columns' names), names (of the classes), label_type."""
    image, label, names = options.get("image", "image"), options.get("label", "label"), options.get("names")
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if index in null_structs else {"bytes": data, "path": where} for index, (data, where, _) in enumerate(rows)]
    array = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({image: array, label: pa.array([row[2] for row in rows], options.get("label_type") or pa.int64())})
    if names is not None:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=3)


def hf_rows(count: int, first: int = 0, paths: bool = False) -> list[tuple[bytes | None, str | None, Any]]:
    return [(encode(picture(first + index, 4, 4)), f"{first + index}.png" if paths else None, index % 3) for index in range(count)]


def write_folder(root: Path, classes: dict[str, int], first: int = 0) -> None:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(encode(picture(first + index, 4, 4)))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape) + array.tobytes()


def write_idx(folder: Path, *, pattern: str = "{}-{}-idx{}-ubyte", packed: bool = False, counts: dict[str, int] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for split, count in (counts or {"train": 30, "t10k": 10}).items():
        images = np.stack([picture(index, 8, 9)[..., 0] for index in range(count)])
        labels = np.arange(count, dtype=np.uint8) % 10
        for what, array in (("images", images), ("labels", labels)):
            name = pattern.format(split, what, array.ndim)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(idx(array)) if packed else idx(array))


def write_table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    """A table whose {0}, {1}, ... are images beside it, `images/0.png`, each another picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number}.png" for number in range(20)]
    for number, image in enumerate(names):
        (folder / image).write_bytes(encode(picture(number, 4, 4)))
    path = folder / name
    path.write_text(text.format(*names))
    return path


def former_identity(folder: Path, files: list[Path], held_out: str) -> str:
    """A source's identity as it was when test samples were held out by their keys alone."""
    digest = hashlib.sha256()
    for path in sorted(files):
        stat = path.stat()
        digest.update(json.dumps((os.fsencode(path.relative_to(folder)).hex(), stat.st_size, stat.st_mtime_ns)).encode())
    return hashlib.sha256(json.dumps([digest.hexdigest(), held_out]).encode()).hexdigest()
