"""What is read of a finished run's folder: `facts`, which are the same on every machine, and `bits`, which depend on how a CPU rounds.

Read as any other program would, with JSON, TOML and Parquet readers.
"""

import hashlib
import json
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.golden.commands import flat

# Of summary.json: what a run counts.
COUNTED = (
    *("status", "steps", "epochs", "workers", "virtual_ranks", "restarts", "preemptions", "resized", "hangs", "batches_skipped"),
    *("samples_seen", "quarantined", "dataset_fingerprint", "checkpoints", "parameters", "device", "threads_per_worker", "backend"),
    *("cache", "classes", "test_count"),
)
# Of config.toml: where this machine keeps things, and what `auto` becomes on its CPU.
OF_THIS_MACHINE = ("storage", "data.path", "data.root", "train.small_maps")


def facts(folder: Path) -> dict[str, Any]:
    """Of a run that was not disturbed: all that does not depend on rounding or on the clock."""
    summary = json.loads((folder / "summary.json").read_text())
    settings = flat(tomllib.loads((folder / "config.toml").read_text()))
    curves = pq.read_table(folder / "curves.parquet")
    predictions = pq.read_table(folder / "predictions.parquet")
    return {
        "run": folder.name,
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        "events": {event["event"]: dict.fromkeys(sorted(event), "there") for event in events(folder)},
        "settings": {key: value for key, value in settings.items() if key not in OF_THIS_MACHINE},
        "summary": shape(summary),
        "counted": {key: summary[key] for key in COUNTED},
        "curves": columns(curves),
        "predictions": columns(predictions),
        "about_predictions": {key.decode(): shape(json.loads(value)) for key, value in (predictions.schema.metadata or {}).items()},
        "learning_rates": [row["learning_rate"] for row in curves.sort_by("step").to_pylist()],
        "order_sha256": order_sha256(folder),
        "model": shape(json.loads((folder / "model" / "config.json").read_text())),
        "targets": shape(json.loads((folder / "prometheus-targets.json").read_text())),
        "checkpoint": checkpoint(newest_checkpoint(folder)),
    }


def bits(folder: Path) -> dict[str, Any]:
    """Of a finished run: its numbers, exactly."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights_sha256": summary["weights_sha256"],
        "exported_sha256": json.loads((folder / "model" / "config.json").read_text())["file_sha256"],
        "train_loss": summary["train_loss"],
        "test_loss": summary["test_loss"],
        "test_accuracy": summary["test_accuracy"],
        "losses": losses(folder),
        "predictions_sha256": predictions_sha256(folder),
    }


def losses(folder: Path) -> list[float]:
    """The training loss of each step that counts, in order."""
    return [row["train_loss"] for row in pq.read_table(folder / "curves.parquet").sort_by("step").to_pylist()]


def predictions_sha256(folder: Path) -> str:
    """Of the rows, not of the file: pyarrow's version is in that."""
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return sha256([[row[key].hex() if isinstance(row[key], float) else row[key] for key in sorted(row)] for row in rows])


def order_sha256(folder: Path) -> str:
    """Which sample was seen in which step by which virtual rank, however often a step was done again."""
    return sha256(sorted(order(folder)))


def order(folder: Path) -> set[tuple[int, int, int, tuple[int, ...]]]:
    """(epoch, step, virtual rank, ids) of all ledgers; steps that were done again are there once if they saw the same samples."""
    seen = set()
    for ledger in (folder / "ledger").iterdir():
        _, *lines = ledger.read_text().splitlines()
        for line in map(json.loads, lines):
            seen.add((line["epoch"], line["step"], line["virtual_rank"], tuple(line["ids"])))
    return seen


def events(folder: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (folder / "journal.jsonl").read_text().splitlines())


def newest_checkpoint(folder: Path) -> Path:
    return max(path.parent for path in folder.glob("checkpoints/*/COMMIT"))


def checkpoint(folder: Path) -> dict[str, Any]:
    """What is in a checkpoint, but for the numbers."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "manifest": shape(manifest),
        "curves": columns(pq.read_table(folder / "curves.parquet")),
        **{
            path.name: shape(newest_first(json.loads(path.read_text())))
            for path in sorted(folder.glob("*.json"))
            if path.name != "MANIFEST.json"
        },
        **{path.name: tensors(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def newest_first(value: dict[str, Any]) -> dict[str, Any]:
    """A history whose newest evaluation speaks for all: only that one keeps its tables."""
    return value | {"evaluations": value["evaluations"][::-1]} if "evaluations" in value else value


def tensors(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself, and its tensors' names, types and shapes: many, so by their hash."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = header.pop("__metadata__", {})
    named = {name: [entry["dtype"], entry["shape"]] for name, entry in sorted(header.items())}
    return {"about": about, "count": len(named), "names_sha256": sha256(named)}


def columns(table: Any) -> dict[str, str]:
    return {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in table.schema}


def shape(value: Any) -> Any:
    """The keys of JSON at all depths, and the types of its values; of a list the first item speaks for all."""
    match value:
        case dict():
            return {key: shape(item) for key, item in sorted(value.items())}
        case list():
            return [shape(item) for item in value[:1]]
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "number"
    return "text"


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def differences(found: Any, pinned: Any, where: str = "") -> list[str]:
    """Where `found` lacks or changes what is pinned, one line each: `summary.goodput: 'number' is pinned, this run has nothing`. Keys
    that a later release adds are no difference: nobody who reads the others minds them."""
    if isinstance(found, dict) and isinstance(pinned, dict):
        return [
            line for key in pinned for line in differences(found.get(key, _Nothing), pinned[key], f"{where}.{key}" if where else str(key))
        ]
    if isinstance(found, list) and isinstance(pinned, list) and len(found) == len(pinned):
        return [line for i, pair in enumerate(zip(found, pinned, strict=True)) for line in differences(*pair, f"{where}[{i}]")]
    return [] if found == pinned else [f"{where}: {_shown(pinned)} is pinned, this run has {_shown(found)}"]


class _Nothing:
    pass


def _shown(value: Any) -> str:
    return "nothing" if value is _Nothing else repr(value)
