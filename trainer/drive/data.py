"""Opens a run's data for the driver, converting them first if necessary, and ships them to nodes that cannot read their folder.

start.py calls `open_data`, `record_left_out` and `check_can_ship`, session.py calls `ship`. dataio defines the format of a converted data
set."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.names import QUARANTINE
from cluster.quarantined import STAGE
from cluster.storage import Storage
from dataio.convert import Prepared, prepared
from dataio.convert import Progress as ConvertProgress
from dataio.parquet import QUARANTINE_NAME, Dataset
from dataio.reading import described, warnings
from dataio.selection import Selected, selected
from trainer.settings.tree import RunConfig

CONVERT_LINE_SECONDS = 5.0


def open_data(config: RunConfig, console: Console) -> tuple[str, Dataset]:
    """The folder or URI of the run's converted data set, and the data set with the training samples that the run chooses. A source not
    converted yet is converted into `data.root`. ValueError if there are fewer samples than are asked for."""
    shown_at: float | None = None

    def on_progress(progress: ConvertProgress) -> None:
        nonlocal shown_at
        if shown_at is None or time.monotonic() - shown_at > CONVERT_LINE_SECONDS:
            shown_at = time.monotonic()
            console.print(f"converting {config.data.path}: {progress.describe()}", soft_wrap=True, markup=False)

    found = prepared(config.data, on_progress=on_progress)
    if shown_at is not None:
        console.print(f"converted into {found.dataset.where}", soft_wrap=True, markup=False)
    dataset = selected(found.dataset, config.data)
    for line in (*lines_about(found, config), *about_choice(dataset.selected)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return found.location, dataset


def lines_about(found: Prepared, config: RunConfig) -> Iterator[str]:
    """What the user should know of the data before a run trains on them; the first line says what they are."""
    dataset, manifest, reading = found.dataset, found.dataset.manifest, found.dataset.reading
    yield f"data: {described(manifest, reading)}"
    if found.by_earlier_rule:
        yield f"these data were converted by an earlier version, whose rules they keep; to convert them again, remove {dataset.where}"
    if manifest.quarantined:
        what = "image that could not be used is" if manifest.quarantined == 1 else "images that could not be used are"
        yield f"{manifest.quarantined:,} {what} left out: {dataset.where}/{QUARANTINE_NAME}"
    for line in warnings(manifest, reading, dataset.where):
        yield f"warning: {line}"


def about_choice(chosen: Selected | None) -> Iterator[str]:
    """What the user should know of the choice among the training images."""
    if chosen is None:
        return
    yield chosen.line
    for line in chosen.warnings:
        yield f"warning: {line}"


def about_transparency(dataset: Dataset, config: RunConfig) -> tuple[str, ...]:
    """What becomes of images with an alpha channel in a run with these settings, in which no auto is left."""
    count = dataset.reading.transparent if dataset.reading is not None else 0
    if not count:
        return ()
    what = f"{count:,} image{' has' if count == 1 else 's have'} an alpha channel"
    if config.data.behind:
        return (f"{what}: put on {config.data.behind} (data.background)",)
    return (f"{what}, which is dropped: what is transparent shows the colour stored below it; a new run puts them on white",)


def record_left_out(storage: Storage, run: str, dataset: Dataset, tell: Callable[[str], None]) -> None:
    """Write the samples that the conversion left out into the run's quarantine.jsonl, once, above those that the run itself sets aside: so
    nothing that was left out is lost when the converted folder is. Call it before the coordinator reads the file."""
    if not dataset.manifest.quarantined:
        return
    path = f"{run}/{QUARANTINE}"
    there = storage.read(path) if storage.exists(path) else b""
    if f'"{STAGE}"'.encode() in there:
        return
    try:
        records = dataset.left_out()
    except (OSError, ValueError) as error:
        tell(f"warning: what the conversion left out is not listed in the run's folder: {error}")
        return
    lines = "".join(json.dumps(asdict(record) | {STAGE: "conversion"}, sort_keys=True) + "\n" for record in records)
    storage.write_atomic(path, lines.encode() + there)


def check_can_ship(dataset: Dataset, config: RunConfig) -> None:
    """ValueError or OSError if the data set cannot go through Ray's object store to nodes that cannot read its folder."""
    if dataset.is_remote:
        dataset.files()  # raises: every node must reach a remote data set by itself
    if dataset.size_bytes > config.cluster.object_store_limit_bytes:
        raise ValueError(
            f"data set {dataset.where} ({dataset.size_bytes:,} bytes) can be read on this node only and is larger than "
            f"cluster.object_store_limit_bytes={config.cluster.object_store_limit_bytes:,}; put it on storage that every node mounts "
            "and give that path to --data.path, or raise the limit if the nodes' object stores can hold it"
        )


def ship(dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """Put the data set's files into Ray's object store, for nodes that cannot read its folder. Returns a reference for each file name."""
    import numpy as np
    import ray

    check_can_ship(dataset, config)
    return {
        name: ray.put(np.fromfile(file, dtype=np.uint8) if isinstance(file, Path) else np.frombuffer(file, dtype=np.uint8))
        for name, file in dataset.files().items()
    }
