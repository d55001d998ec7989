"""The images that a run, or the conversion of its data, left out: small pictures of them for the report. Called by files.

A left-out image is unusable by definition, and often made wrong on purpose, so it is read within limits: few files, few bytes, few pixels,
never through a name that leads out of the source's folder. What cannot be decoded has no picture, only its key and reason. Of a truncated
JPEG the part that is there is shown.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataio.config import DataConfig
from dataio.manifest import MANIFEST_NAME
from dataio.parquet import Dataset
from dataio.quarantine import BadSample
from dataio.remote import is_remote, is_uri, local_path
from dataio.schema import UNLABELLED
from trainer.report.thumbnails import FORMATS, thumbnail

SHOWN_PICTURES = 24
FILE_BYTES = 16_000_000
READ_BYTES = 128_000_000
MOST_PIXELS = 40_000_000
MOST_SCANS = 200
"""Of a JPEG: each passes over all pixels again."""
CONVERSION = "conversion"
"""The `stage` of a record that the conversion wrote; the run's own records have none."""
_FORMATS = (*FORMATS, "GIF")  # a GIF is refused by the data, and its first frame is as good as any
_SCAN = b"\xff\xda"
_COPY = re.compile(r"#[0-9]+$")  # what a conversion adds to a key that comes again

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """The samples that were left out."""

    records: Sequence[Record]
    """Lines of quarantine.jsonl: split, key, reason, sample_id, and `stage` if it was before the run."""
    pictures: Mapping[int, str] = field(default_factory=dict)
    """Index of the record -> its picture, as a data: URI."""


def with_pictures(records: Sequence[Record], dataset: Dataset, data: DataConfig) -> LeftOut:
    """`records` of a run, with their pictures. Those of the conversion are added if they are not among them, as in runs of older releases.
    `data` are the run's settings: they say where the source was."""
    if not any(record.get("stage") == CONVERSION for record in records):
        records = [*(asdict(bad) | {"stage": CONVERSION} for bad in _of_conversion(dataset)), *records]
    source = source_folder(data)
    # Images without labels are in other data, or in another folder.
    elsewhere = UNLABELLED if data.unlabelled else ""
    return LeftOut(records=records, pictures=_pictures(records, dataset, source, elsewhere))


def _of_conversion(dataset: Dataset) -> Sequence[BadSample]:
    try:
        return dataset.left_out()
    except (OSError, ValueError):  # the summary still counts them
        return ()


def _pictures(records: Sequence[Record], dataset: Dataset, source: Path | None, elsewhere: str) -> dict[int, str]:
    pictures: dict[int, str] = {}
    left = READ_BYTES
    for index, record in enumerate(records):
        if elsewhere and record.get("split") == elsewhere:
            continue
        if len(pictures) == SHOWN_PICTURES or left <= 0:
            break
        encoded = _encoded(record, dataset, source)
        left -= len(encoded)
        if encoded and encoded.count(_SCAN) <= MOST_SCANS:
            picture = _picture(encoded)
            if picture is not None:
                pictures[index] = picture
    return pictures


def source_folder(data: DataConfig) -> Path | None:
    """The folder that a conversion's keys are relative to; None if its source has no files, or is not known any more."""
    try:
        if is_remote(data.path):
            return None
        path = (local_path(data.path) if is_uri(data.path) else None) or Path(data.path).expanduser()
    except ValueError:  # an unknown scheme
        return None
    if path.is_file():
        return path.parent
    return path if path.is_dir() and not (path / MANIFEST_NAME).exists() else None


def _encoded(record: Record, dataset: Dataset, source: Path | None) -> bytes:
    """A left-out image's bytes; empty if they cannot be had. Never raises: anyone may have written the record and the file."""
    try:
        if record.get("stage") == CONVERSION:
            return _of_source(source, str(record["key"])) if source is not None else b""
        return _of_dataset(dataset, str(record["split"]), int(record["sample_id"]))
    except Exception:
        return b""


def _of_source(folder: Path, key: str) -> bytes:
    from dataio.sources import name_of, read_below  # sources take a tenth of a second to import, and few runs leave anything out

    for name in dict.fromkeys((key, _COPY.sub("", key))):
        path = os.fsdecode(name_of(name))
        if (folder / path).exists():
            return read_below(folder, path, FILE_BYTES)
    return b""


def _of_dataset(dataset: Dataset, split_name: str, sample_id: int) -> bytes:
    split = dataset.split(split_name)
    group = int(np.searchsorted(split.group_offsets, sample_id, side="right")) - 1
    if split.group_bytes(group) > FILE_BYTES * 4:
        return b""
    encoded: bytes = split.read_group(group).encoded[sample_id - int(split.group_offsets[group])].tobytes()
    return encoded if len(encoded) <= FILE_BYTES else b""


def _picture(encoded: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None
    except Exception:  # Pillow meets broken files with exceptions of a dozen kinds
        return None
    # Of a JPEG that ends too early, its end marker makes the decoder give what is there.
    return thumbnail(encoded, formats=_FORMATS) or thumbnail(encoded + b"\xff\xd9", formats=("JPEG",))
