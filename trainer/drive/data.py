"""Opens a run's data for the driver, converting them first if necessary, and ships them to nodes that cannot read their folder.

start.py calls `open_data`, `record_left_out` and `check_can_ship`, session.py calls `ship`. dataio defines the format of a converted data
set."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.names import QUARANTINE
from cluster.quarantined import STAGE
from cluster.storage import Storage
from dataio.conversion import Progress as ConvertProgress
from dataio.parquet import QUARANTINE_NAME, Dataset
from dataio.prepared import Prepared, prepared
from dataio.reading import described, warnings
from dataio.schema import UNLABELLED
from dataio.selection import Selected, selected
from dataio.unlabelled import prepare_unlabelled
from trainer.settings.tree import RunConfig
from trainer.settings.units import number

CONVERT_LINE_SECONDS = 5.0
MOST_COMPARED = 5_000_000
"""Images without labels; their hashes take a microsecond each to read."""


def open_data(config: RunConfig, console: Console) -> tuple[str, Dataset]:
    """The folder or URI of the run's converted data set, and the data set with the training samples that the run chooses. A source not
    converted yet is converted into `data.root`. ValueError if there are fewer samples than are asked for."""
    found = convert_data(config, console)
    dataset = selected(found.dataset, config.data)
    for line in (*lines_about(found, config), *about_choice(dataset.selected)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return found.location, dataset


def convert_data(config: RunConfig, console: Console) -> Prepared:
    """The run's converted data set. A source not converted yet is converted into `data.root`; of this alone something is said."""
    on_progress = _Told(config.data.path, console)
    found = prepared(config.data, on_progress=on_progress)
    if on_progress.has_told:
        console.print(f"converted into {found.dataset.where}", soft_wrap=True, markup=False)
    return found


class _Told:
    """Says from time to time how far a conversion is."""

    def __init__(self, source: str, console: Console) -> None:
        self._source, self._console = source, console
        self._told_at: float | None = None

    @property
    def has_told(self) -> bool:
        return self._told_at is not None

    def __call__(self, progress: ConvertProgress) -> None:
        if self._told_at is None or time.monotonic() - self._told_at > CONVERT_LINE_SECONDS:
            self._told_at = time.monotonic()
            self._console.print(f"converting {self._source}: {progress.describe()}", soft_wrap=True, markup=False)


def open_second(config: RunConfig, labelled: Dataset, console: Console) -> Prepared | None:
    """The images of `data.unlabelled`, if there are any. A source not converted yet is converted into `data.root`."""
    if not config.data.unlabelled:
        return None
    found = prepare_unlabelled(config.data, _Told(config.data.unlabelled, console))
    for line in about_second(found.dataset, labelled, config):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return found


def about_second(dataset: Dataset, labelled: Dataset, config: RunConfig) -> Iterator[str]:
    """What the user should know of the images without labels, a line each."""
    manifest = dataset.manifest
    count = manifest.splits[UNLABELLED].count
    left_out = f"; {number(manifest.quarantined)} that could not be used are left out" if manifest.quarantined else ""
    yield f"{number(count)} image{'' if count == 1 else 's'} without labels, learned by {config.train.semi}{left_out}"
    for split in ("test", "validation"):
        if copies := _copies(dataset, labelled, split):
            yield (
                f"warning: {number(copies)} of the images without labels {'is' if copies == 1 else 'are'} {split} images too: the model "
                f"sees them in training, and what the {split} split says of it flatters it; take them out"
            )


def _copies(dataset: Dataset, labelled: Dataset, split: str) -> int:
    """How many images without labels have the bytes of one of this split; 0 where nobody looks: far away, or among very many."""
    if split not in labelled.manifest.splits or dataset.is_remote or labelled.is_remote:
        return 0
    here = dataset.split(UNLABELLED)
    if here.count > MOST_COMPARED:
        return 0
    tested = set(labelled.split(split).hashes())
    return sum(sha256 in tested for sha256 in here.hashes())


def lines_about(found: Prepared, config: RunConfig) -> Iterator[str]:
    """What the user should know of the data before a run trains on them; the first line says what they are."""
    dataset, manifest, reading = found.dataset, found.dataset.manifest, found.dataset.reading
    yield f"data: {described(manifest, reading)}"
    if found.by_earlier_rule:
        yield f"these data were converted by an earlier version, whose rules they keep; to convert them again, remove {dataset.where}"
    if manifest.quarantined:
        one = manifest.quarantined == 1
        what = f"{manifest.unit.removesuffix('s') if one else manifest.unit} that could not be used {'is' if one else 'are'}"
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


def record_left_out(storage: Storage, run: str, dataset: Dataset, tell: Callable[[str], None], second: Dataset | None = None) -> None:
    """Write the samples that the conversion left out into the run's quarantine.jsonl, once, above those that the run itself sets aside: so
    nothing that was left out is lost when the converted folder is. `second`: the images without labels. Call it before the coordinator
    reads the file."""
    if not dataset.manifest.quarantined and (second is None or not second.manifest.quarantined):
        return
    path = f"{run}/{QUARANTINE}"
    there = storage.read(path) if storage.exists(path) else b""
    if f'"{STAGE}"'.encode() in there:
        return
    try:
        records = list(dataset.left_out())
        if second is not None:
            records += [replace(record, split=UNLABELLED) for record in second.left_out() if record.split in (UNLABELLED, "train")]
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
