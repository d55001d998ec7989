"""predictions.parquet: what the finished model answered to each test sample. Written by worker.py at a run's last evaluation and by
`trainer.evaluate --predictions`; read by the report. What is recorded, without waiting for the device, is
`trainer.tasks.classification.Answers`.

One row a sample: its id in the split, its key, its class, the answer, the answer's probability, the loss. The numbers are those of the
evaluation itself, so that counting the rows gives its confusion matrix exactly. A test split of more than LIMIT samples is recorded in
part: the worst LIMIT, the surest mistakes first, then the least sure right ones.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dataio.parquet import Split

PREDICTIONS_FILE = "predictions.parquet"
LIMIT = 1_000_000
"""Samples that are recorded: some 100 MB in rank 0's memory while it writes them, keys included."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("prediction", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
    ]
)
_META = b"finetune.predictions"
_KEYS_AT_ONCE = 8192

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What the predictions are of."""

    step: int
    """Steps that the model had been trained for."""
    split: str
    dataset_fingerprint: str
    count: int
    """Samples that were evaluated; more than there are rows where not all of them are recorded."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Rows by id, without the samples that could not be read."""

    about: About
    ids: Ints  # (n,)
    keys: Sequence[str]
    labels: Ints  # (n,)
    answers: Ints  # (n,)
    confidence: Floats  # (n,) the answer's probability
    losses: Floats  # (n,) cross-entropy

    @property
    def is_complete(self) -> bool:
        return len(self.ids) == self.about.count

    @property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self.labels, "prediction": self.answers, "confidence": self.confidence, "loss": self.losses}

    @property
    def is_classification(self) -> bool:
        return True

    def confusion(self, classes: int) -> Ints:
        """(classes, classes) int64 [label][prediction], of the rows."""
        cells = np.bincount(self.labels * classes + self.answers, minlength=classes * classes)
        return cells.reshape(classes, classes)

    def to_parquet(self) -> bytes:
        columns = (self.ids, self.keys, self.labels, self.answers, self.confidence, self.losses)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        about = {name: getattr(self.about, name) for name in About.__slots__}
        table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({_META: json.dumps(about)}))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Predictions":
        """ValueError where `data` is nothing that `to_parquet` gave."""
        try:
            table = pq.read_table(io.BytesIO(data))
            if not table.schema.equals(SCHEMA):
                raise ValueError(f"its columns are {', '.join(table.schema.names)}, not {', '.join(SCHEMA.names)}")
            about = About(**json.loads((table.schema.metadata or {})[_META]))
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise ValueError(f"it is no file of predictions ({error})") from error
        return cls(
            about=about,
            ids=table["id"].to_numpy(),
            keys=table["key"].to_pylist(),
            labels=table["label"].to_numpy().astype(np.int64),
            answers=table["prediction"].to_numpy().astype(np.int64),
            confidence=table["confidence"].to_numpy(),
            losses=table["loss"].to_numpy(),
        )


def named(ints: Ints, floats: Floats, split: Split, about: About, on_part: Callable[[], None] = lambda: None) -> Predictions:
    """`ints` (n, 3) are id, label, answer; `floats` (n, 2) confidence, loss: as Answers.gathered gives them. The keys are read from the
    split, which for a large one takes a while: `on_part` is called now and then."""
    known = ints[:, 1] >= 0  # not what could not be decoded
    ints, floats = ints[known], floats[known]
    order = np.argsort(ints[:, 0], kind="stable")
    ints, floats = ints[order], floats[order]
    keys: list[str] = []
    for start in range(0, len(ints), _KEYS_AT_ONCE):
        keys += split.keys(ints[start : start + _KEYS_AT_ONCE, 0])
        on_part()
    return Predictions(
        about=about, ids=ints[:, 0], keys=keys, labels=ints[:, 1], answers=ints[:, 2], confidence=floats[:, 0], losses=floats[:, 1]
    )


def worst_first(found: Predictions, among: Ints | None = None) -> Ints:
    """(n,) indices of rows: mistakes, the surest first, then right answers, the least sure first; equals by their id."""
    rows = np.arange(len(found.ids)) if among is None else among
    wrong = found.labels[rows] != found.answers[rows]
    sure = np.nan_to_num(found.confidence[rows].astype(np.float64), nan=0.0)
    return rows[np.lexsort((found.ids[rows], np.where(wrong, -sure, sure), ~wrong))]
