"""What a run's folder has for a tracker: settings, points of its curves and evaluations, its end, the files worth keeping.

Curves are those of the newest checkpoint (curves.parquet), so that steps that a failure undid are never shown; they come again with the
same values, as the run's promise is. Evaluations are the journal's.
"""

import io
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.redact import redacted
from dataio.foreign import json_of
from trainer.runs.events import STRANGE
from trainer.runs.folder import RunFolder
from trainer.runs.journal_tail import Event

CURVES = {
    "train_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "images_per_second": "speed/images_per_second",
    "data_wait_seconds": "speed/data_wait_seconds",
    "step_seconds": "speed/step_seconds",
}
"""Column of curves.parquet -> the name that a tracker shows."""
_NO_MEASURES = frozenset({"time", "event", "attempt", "step", "epoch", "generation"})
_SPLITS = ("train", "validation", "test")
FILES = ("report.html", "summary.json", "config.toml")
MODEL = ("model/config.json", "model/model.safetensors", "model/README.md")
_LONG = 1000
"""Numbers and lists of summary.json that are longer are no result to compare runs by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Values at a step."""

    step: int
    time: float
    """Unix time."""
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a tracker is told at first."""

    name: str
    location: str
    settings: Mapping[str, Any]
    """Flat, by the command line's names: `train.epochs`."""
    text: str
    """config.toml."""
    started: float
    command: str
    task: str


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a run ended."""

    status: str
    """finished, stopped, failed or killed."""
    time: float
    why: str
    results: Mapping[str, float]
    """The numbers of summary.json."""
    texts: Mapping[str, str] = field(default_factory=dict)


def run_of(folder: RunFolder, events: Sequence[Event]) -> Run:
    """What is known of a run. ValueError if its settings cannot be read."""
    data = folder.read("config.toml")
    try:
        text = (data or b"").decode()
        settings = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{folder.location}/config.toml cannot be read: {error}") from None
    first: Mapping[str, Any] = next((event for event in events if event["event"] == "run_started"), {})
    task = first.get("task")
    return Run(
        name=folder.name.rpartition("/")[2],
        location=folder.location,
        settings=dict(redacted(dict(flat(settings)))),
        text=str(redacted(text)),
        started=float(first.get("time", 0.0)),
        command=str(redacted(str(first.get("command", "")))),
        task=str(task.get("name", "")) if isinstance(task, Mapping) else "",
    )


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as `train.epochs`; lists as text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", json.dumps(value) if isinstance(value, list) else value


def curve_points(folder: RunFolder, after: int) -> list[Point]:
    """The points of the curves behind step `after`, in order. [] if there are none yet; ValueError for a file that cannot be read."""
    data = folder.read("curves.parquet")
    if data is None:
        return []
    try:
        table = pq.read_table(io.BytesIO(data))
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{folder.location}/curves.parquet cannot be read: {error}") from None
    names = {name: CURVES.get(name, f"train/{name}") for name in table.column_names if name not in ("step", "epoch", "attempt", "time")}
    return [
        Point(
            step=row["step"],
            time=row["time"],
            values={"epoch": row["epoch"], **{name: float(row[column]) for column, name in names.items() if row[column] is not None}},
        )
        for row in rows
        if row["step"] > after
    ]


def evaluation_points(events: Sequence[Event], after: int) -> list[Point]:
    """The evaluations behind step `after`, each step once: a repeated one says the same."""
    found: dict[int, Point] = {}
    for event in events:
        if event["event"] == "evaluation" and isinstance(event.get("step"), int) and event["step"] > after:
            values = {
                shown(key): float(value)
                for key, value in event.items()
                if key not in _NO_MEASURES and isinstance(value, int | float) and not isinstance(value, bool)
            }
            found.setdefault(event["step"], Point(step=event["step"], time=float(event["time"]), values=values))
    return [found[step] for step in sorted(found)]


def shown(key: str) -> str:
    """`test_accuracy` -> `test/accuracy`; `mean_train_loss` -> `train/mean_loss`."""
    if key == "mean_train_loss":
        return "train/mean_loss"
    if key == "train_loss":
        return "train/loss_at_evaluation"
    split, _, rest = key.partition("_")
    return f"{split}/{rest}" if split in _SPLITS and rest else f"evaluation/{key}"


def end_of(folder: RunFolder, status: str, why: str, time: float) -> End:
    """What to say of a run that has ended."""
    results: dict[str, float] = {}
    texts: dict[str, str] = {}
    try:
        summary = json_of(folder.read("summary.json") or b"{}")
        for key, value in summary.items() if isinstance(summary, Mapping) else ():
            if isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                results[key] = float(value)
            elif isinstance(value, str) and len(value) < _LONG:
                texts[key] = str(redacted(value))
    except STRANGE:
        texts["summary.json"] = "cannot be read"
    return End(status=status, time=time, why=str(redacted(why)), results=results, texts=texts)
