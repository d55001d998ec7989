"""The plan of a job: which images or texts it answers, cut into shards, and with what. Written once, before the first answer; every worker
reads its shard's part of it, and a later command goes on with it, whatever has come to lie beside them since.

    OUT/_plan.parquet               the list of images, a row group a shard; the settings in its metadata
    OUT/predictions-00007.parquet   the answers of shard 7, in the list's order; complete if it is there
    OUT/_summary.json               counts, and the account of the last command

Names that begin with `_` are none of a data set's to pyarrow, pandas, Spark and Ray Data: they read OUT as a table of answers.
"""

import io
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from dataio.foreign import json_of
from trainer.inference.inputs import FILES, ROWS, Kind, Listed
from trainer.inference.parquet import opened_parquet

PLAN, SUMMARY = "_plan.parquet", "_summary.json"
FORMAT = 1
_PART = re.compile(r"predictions-(\d{5,})\.parquet")
_METADATA = b"finetune.plan"
_IN_WORDS = {
    "model": "the model",
    "inputs": "IMAGE...",
    "image_column": "--image-column",
    "text_column": "--text-column",
    "top": "--top",
    "calibrated": "--raw",
    "fit": "--fit",
    "shard_images": "--shard-images",
}
"""Settings that decide what the answers are, in the user's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a job does."""

    ident: str
    """Of this list: two commands may have made one at once, and a worker must not answer the images of the other's."""
    settings: Mapping[str, Any]
    kind: Kind
    places: tuple[str, ...]
    column: str
    shards: int
    images: int


def part_name(shard: int) -> str:
    """The file of a shard's answers."""
    return f"predictions-{shard:05d}.parquet"


def shard_of(name: str) -> int | None:
    """The shard whose answers a file of this name holds; None for another file."""
    found = _PART.fullmatch(name)
    return int(found[1]) if found else None


def parts_of(listed: Listed, shard_images: int) -> list[pa.Table]:
    """The list in shards, of `shard_images` images each; of Parquet files, of whole row groups until that many are reached."""
    if listed.kind == "files":
        return [listed.table.slice(start, shard_images) for start in range(0, listed.table.num_rows, shard_images)]
    parts, start, images = [], 0, 0
    rows = listed.table.column("rows").to_pylist()
    for index, count in enumerate(rows):
        images += count
        if images >= shard_images or index + 1 == len(rows):
            if images:
                parts.append(listed.table.slice(start, index + 1 - start))
            start, images = index + 1, 0
    return parts


def write_plan(storage: Storage, listed: Listed, settings: Mapping[str, Any], shard_images: int) -> Plan:
    """Write the plan of a new job. ValueError if there is nothing to answer."""
    parts = parts_of(listed, shard_images)
    if not parts:
        raise ValueError("the files hold no row")
    about = {
        "format": FORMAT,
        "ident": secrets.token_hex(8),
        "settings": dict(settings),
        "kind": listed.kind,
        "places": list(listed.places),
        "column": listed.column,
        "shards": len(parts),
        "images": listed.images,
    }
    schema = (FILES if listed.kind == "files" else ROWS).with_metadata({_METADATA: json.dumps(about).encode()})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part.cast(schema), row_group_size=max(1, part.num_rows))
    storage.make_dir("")
    storage.write_atomic(PLAN, buffer.getvalue())
    return _plan(about)


def read_plan(storage: Storage) -> Plan | None:
    """The plan that is there, if there is one. ValueError for one that another version wrote, or that is damaged."""
    if not storage.exists(PLAN):
        return None
    with _opened(storage) as file:
        return _plan_in(file, storage)


class Parts:
    """The list of a plan, for a worker that reads one shard's part after the other. ValueError as for `read_plan`."""

    def __init__(self, storage: Storage) -> None:
        self._open = ExitStack()  # for the worker's life: a footer of many shards is not read for each of them
        self._file = self._open.enter_context(_opened(storage))
        self.plan = _plan_in(self._file, storage)

    def part(self, shard: int) -> tuple[pa.Table, int]:
        """A shard's part of the list, and how many images the shards before it have."""
        part = self._file.read_row_group(shard)
        if self.plan.kind == "files":
            return part, shard * int(self.plan.settings["shard_images"])
        return part, int(part.column("start")[0].as_py())


def differences(plan: Plan, settings: Mapping[str, Any]) -> Sequence[str]:
    """In what a command differs from the one that wrote the plan, in words."""
    return [
        f"{words} was {_shown(plan.settings.get(name))} and is {_shown(settings.get(name))}"
        for name, words in _IN_WORDS.items()
        if plan.settings.get(name) != settings.get(name)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return str(value) if value != "" else "not given"


def _opened(storage: Storage) -> AbstractContextManager[pq.ParquetFile]:
    return opened_parquet(storage, PLAN, f"{storage.address}/{PLAN}", fix="give another --out")


def _plan_in(file: pq.ParquetFile, storage: Storage) -> Plan:
    try:
        about = json_of((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
        if about["format"] == FORMAT and file.metadata.num_row_groups == about["shards"]:
            return _plan(about)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{storage.address}/{PLAN} is of another version, or damaged; give another --out")


def _plan(about: Mapping[str, Any]) -> Plan:
    return Plan(
        ident=about["ident"],
        settings=about["settings"],
        kind=about["kind"],
        places=tuple(about["places"]),
        column=about["column"],
        shards=about["shards"],
        images=about["images"],
    )
