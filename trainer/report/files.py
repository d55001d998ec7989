"""Reads a run's folder for the pages. A damaged or missing file is reported, never fatal, because failed runs need reports too.
Called by the report's command line and, through sections, by the driver at a run's end. The other modules decide what to show."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from cluster.journal import read_journal
from dataio.foreign import json_of
from dataio.parquet import Dataset
from trainer.report.left_out import LeftOut, with_pictures
from trainer.report.page import number_or_none
from trainer.report.plots import Values
from trainer.report.thumbnails import NO_THUMBNAILS, Thumbnails, find_dataset, look_up
from trainer.runs.folder import RunFolder
from trainer.runs.measures import known_info
from trainer.settings.toml import from_toml
from trainer.settings.units import number
from trainer.tasks.explanations import EXPLANATIONS_FILE, Explanations
from trainer.tasks.highlights import Highlights, read_explanations
from trainer.tasks.info import CLASSIFICATION, TaskInfo
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

Counts = npt.NDArray[np.int64]
Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The content of a run's folder; a missing part is empty and named in `missing`."""

    location: str
    name: str
    summary: Mapping[str, Any]
    events: Sequence[Event]
    info: TaskInfo = CLASSIFICATION
    curves: Mapping[str, Values]
    """Columns of curves.parquet, each (rows,) float64."""
    left_out: LeftOut
    """The samples that the run, or the conversion of its data, left out."""
    config_text: str
    missing: Sequence[str]
    """Sentences that name what is missing."""
    predictions: Predictions | None = None
    """Of the evaluation in the summary."""
    thumbnails: Thumbnails = NO_THUMBNAILS
    no_thumbnails: str = ""
    """Why there are no images; empty if there are."""
    explanations: Explanations | Highlights | None = None
    """Of the model that made the predictions."""


def read_files(folder: RunFolder, dataset: Dataset | None = None, *, pictures: bool = True) -> RunFiles:
    """Reads everything that the report shows; with `pictures`, also images of the data set. `dataset` is the run's data set if the caller
    has it open; otherwise it is opened where the run had it."""
    missing: list[str] = []
    summary = _summary(folder, missing)
    events = read_journal(folder.storage, folder.name)
    if not events:
        missing.append("There is no journal: what failed is not known.")
    info, problem = known_info(summary, *(event for event in reversed(events) if event.get("event") == "run_started"))
    if problem:
        missing.append(f"{problem[0].upper()}{problem[1:]}.")
    curves = _curves(folder, missing)
    text = (folder.read("config.toml") or b"").decode(errors="replace")
    if not text:
        missing.append("There is no config.toml.")
    predictions, no_thumbnails = _predictions(folder, summary)
    explanations = _explanations(folder, predictions, missing)
    quarantined = _quarantined(folder, events)
    thumbnails, left_out = NO_THUMBNAILS, LeftOut(records=quarantined)
    if pictures and (predictions is not None or quarantined or summary.get("quarantined")):
        try:
            data = from_toml(text, origin=f"{folder.location}/config.toml").data
            if dataset is None:
                fingerprint = predictions.about.dataset_fingerprint if predictions else summary.get("dataset_fingerprint")
                dataset = find_dataset(data, str(fingerprint))
            left_out = with_pictures(quarantined, dataset, data)
            if predictions is not None:
                thumbnails = look_up(predictions, dataset, len(confusion_of(summary)), explanations)
        except Exception as error:  # the data set may be gone, or hold what no library expects
            no_thumbnails = no_thumbnails or f"There are no images here: {error}."
    return RunFiles(
        location=folder.location,
        name=folder.name,
        summary=summary,
        events=events,
        info=info,
        curves=curves,
        left_out=left_out,
        config_text=text,
        missing=missing,
        predictions=predictions,
        thumbnails=thumbnails,
        no_thumbnails=no_thumbnails,
        explanations=explanations,
    )


def _summary(folder: RunFolder, missing: list[str]) -> Mapping[str, Any]:
    data = folder.read("summary.json")
    if data is None:
        missing.append("There is no summary.json: the run has not ended, or was killed.")
        return {}
    try:
        loaded = json_of(data)
        return loaded if isinstance(loaded, dict) else {}
    except ValueError as error:
        missing.append(f"summary.json cannot be read: {error}.")
        return {}


def _curves(folder: RunFolder, missing: list[str]) -> Mapping[str, Values]:
    data = folder.read("curves.parquet")
    if data is None:
        missing.append("There are no curves (curves.parquet).")
        return {}
    try:
        table = pq.read_table(io.BytesIO(data))
        return {name: table[name].to_numpy().astype(np.float64) for name in table.column_names}
    except Exception as error:
        missing.append(f"curves.parquet cannot be read: {error}.")
        return {}


def _quarantined(folder: RunFolder, events: Sequence[Event]) -> Sequence[Mapping[str, Any]]:
    found = []
    for line in (folder.read("quarantine.jsonl") or b"").splitlines():
        try:
            record = json_of(line)
        except ValueError:  # a torn last line; the summary has the count
            continue
        if isinstance(record, dict):
            found.append(record)
    return found or [event for event in events if event.get("event") == "sample_quarantined"]


def _predictions(folder: RunFolder, summary: Mapping[str, Any]) -> tuple[Predictions | None, str]:
    """The predictions of the run's last evaluation, or why there are none."""
    data = folder.read(PREDICTIONS_FILE)
    if data is None:
        return None, f"There is no {PREDICTIONS_FILE}, which a run writes when it finishes: which images were mistaken is not known."
    try:
        found = Predictions.from_parquet(data)
        problem = next(_problems(found, summary), "")
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return (None, f"{PREDICTIONS_FILE} is not used: {problem}.") if problem else (found, "")


def _explanations(folder: RunFolder, predictions: Predictions | None, missing: list[str]) -> Explanations | Highlights | None:
    """The maps or marks, if they belong to the predictions: a run that went on has those of its end."""
    data = folder.read(EXPLANATIONS_FILE) if predictions is not None else None
    if data is None or predictions is None:
        return None
    try:
        found = read_explanations(data)
    except ValueError as error:
        missing.append(f"{EXPLANATIONS_FILE} cannot be read: {error}.")
        return None
    about, of = found.about, predictions.about
    same = (about.step, about.split, about.dataset_fingerprint) == (of.step, of.split, of.dataset_fingerprint)
    return found if same else None


def _problems(found: Predictions, summary: Mapping[str, Any]) -> Iterator[str]:
    """Reasons why these predictions do not belong to the run's last evaluation."""
    if found.about.step != summary.get("steps"):
        yield f"they are of step {number(found.about.step)}, the summary is of step {number(summary.get('steps'))}"
    elif found.about.dataset_fingerprint != summary.get("dataset_fingerprint"):
        yield "they are of another data set"
    elif found.is_classification:
        matrix = confusion_of(summary)
        if len(found.ids) and not _are_classes(found.labels, len(matrix)) & _are_classes(found.answers, len(matrix)):
            yield "they are of other classes"
        elif found.is_complete and not np.array_equal(found.confusion(len(matrix)), matrix):
            yield "they are of another evaluation: its confusion matrix is not the summary's"


def _are_classes(values: Counts, classes: int) -> bool:
    return bool(values.min() >= 0 and values.max() < classes)


# --- helpers for several parts of the pages ---------------------------------------------------------------------------------------------


def matrix_of(value: object) -> Counts:
    """(C, C) int64, rows are true classes; (0, 0) if `value` is not such a matrix."""
    try:
        matrix = np.asarray(value or [], dtype=np.int64)
    except (ValueError, TypeError):
        matrix = np.zeros(0, dtype=np.int64)
    return matrix if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] else np.zeros((0, 0), dtype=np.int64)


def confusion_of(summary: Mapping[str, Any]) -> Counts:
    return matrix_of(summary.get("confusion"))


def class_names(said: object, count: int) -> list[str]:
    """The names that a file gives its `count` classes; their numbers if the names do not match."""
    names = [str(name) for name in said] if isinstance(said, list | tuple) else []
    return names if len(names) == count else [str(index) for index in range(count)]


def evaluations(events: Iterable[Event]) -> list[Event]:
    """The last evaluation of each split at each step, so one that a restart repeated counts once."""
    by_step = {(event.get("step"), event.get("split")): event for event in events if event.get("event") == "evaluation"}
    return sorted(by_step.values(), key=lambda event: number_or_none(event.get("epoch")) or 0.0)


def last(events: Iterable[Event], kind: str, key: str) -> Any:
    """The value of `key` in the newest event of this kind that has it."""
    return next((event[key] for event in reversed(list(events)) if event.get("event") == kind and key in event), None)


def began(events: Sequence[Event]) -> float | None:
    """Start time of the run's first process."""
    return next((number_or_none(event.get("process_started", event.get("time"))) for event in events), None)
