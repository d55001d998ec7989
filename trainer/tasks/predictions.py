"""The file predictions.parquet: the finished model's prediction for each test sample. Rank 0 writes it at a run's last evaluation, and
`trainer.evaluate --predictions` writes one too; the report reads it. `trainer.tasks.prediction_log` records the rows without waiting for
the device. Imports no torch.

The file has one row per sample: its id in the split, its key, and the columns that the task declares. A classification has the label, the
prediction, its probability and the loss. The numbers are the evaluation's own, so counting the rows gives its confusion matrix exactly. If
the test split has more samples than `rows_to_keep`, only the worst are recorded: for a classification the most confident mistakes first,
then the least confident correct ones.
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
"""Largest number of recorded samples. For a classification they take some 100 MB of rank 0's memory while it writes them, keys included."""
_ROOM_BYTES = 256 * 2**20
_META = b"finetune.predictions"
_KEYS_AT_ONCE = 8192

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Column = npt.NDArray[Any]


def rows_to_keep(columns: Mapping[str, pa.DataType]) -> int:
    """Largest number of recorded samples over all ranks: LIMIT, or fewer if rows are long (a probability for each of 1,000 labels)."""
    row_bytes = 8 + sum(_width_bytes(kind) for kind in columns.values())
    return min(LIMIT, _ROOM_BYTES // row_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What was predicted: which model on which data."""

    step: int
    """Number of steps that the model had been trained for."""
    split: str
    dataset_fingerprint: str
    count: int
    """Number of evaluated samples. It exceeds the number of rows if not all are recorded."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """Rows without keys, in the order in which ranks hand them in."""

    ids: Ints  # (n,)
    columns: Mapping[str, Column]  # each (n,) or (n, k)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Rows sorted by id, without samples that have no known target or could not be read."""

    about: About
    ids: Ints  # (n,)
    keys: Sequence[str]
    columns: Mapping[str, Column]
    """Each (n,) or (n, k), with its type in the file."""

    @property
    def is_complete(self) -> bool:
        return len(self.ids) == self.about.count

    @property
    def is_classification(self) -> bool:
        """Whether there are columns for label, prediction and confidence."""
        return {"label", "prediction", "confidence"} <= self.columns.keys()

    @property
    def labels(self) -> Ints:
        """(n,) true labels; for a classification only."""
        return self._column("label").astype(np.int64)

    @property
    def answers(self) -> Ints:
        """(n,) predicted classes; for a classification only."""
        return self._column("prediction").astype(np.int64)

    @property
    def confidence(self) -> Floats:
        """(n,) probability of the prediction; for a classification only."""
        return self._column("confidence")

    @property
    def losses(self) -> Floats:
        """(n,)"""
        return self._column("loss")

    def confusion(self, classes: int) -> Ints:
        """Confusion matrix of the rows, (classes, classes) int64 [label][prediction]."""
        cells = np.bincount(self.labels * classes + self.answers, minlength=classes * classes)
        return cells.reshape(classes, classes)

    def to_parquet(self) -> bytes:
        arrays = {"id": pa.array(self.ids, pa.int64()), "key": pa.array(self.keys, pa.string())}
        arrays |= {name: _array(column) for name, column in self.columns.items()}
        schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()])
        about = {name: getattr(self.about, name) for name in About.__slots__}
        table = pa.Table.from_arrays(list(arrays.values()), schema=schema.with_metadata({_META: json.dumps(about)}))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Predictions":
        """ValueError if `data` did not come from `to_parquet`."""
        try:
            table = pq.read_table(io.BytesIO(data))
            names = table.schema.names
            if names[:2] != ["id", "key"] or _META not in (table.schema.metadata or {}):
                raise ValueError(f"its columns are {', '.join(names)}, not id, key and what a task says of a sample")
            about = About(**json.loads(table.schema.metadata[_META]))
            columns = {name: _numbers(table[name].combine_chunks()) for name in names[2:]}
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise ValueError(f"it is no file of predictions ({error})") from error
        return cls(about=about, ids=table["id"].to_numpy(), keys=table["key"].to_pylist(), columns=columns)

    def _column(self, name: str) -> Column:
        if name not in self.columns:
            raise ValueError(f"these predictions have no column {name}, only {', '.join(self.columns)}")
        return self.columns[name]


def named(found: Recorded, split: Split, about: About, on_part: Callable[[], None] = lambda: None) -> Predictions:
    """Sort the rows from PredictionLog.gathered by id, and add their keys. Reading the keys of a large split takes a while, so `on_part` is
    called after each part."""
    order = np.argsort(found.ids, kind="stable")
    ids = found.ids[order]
    keys: list[str] = []
    for start in range(0, len(ids), _KEYS_AT_ONCE):
        keys += split.keys(ids[start : start + _KEYS_AT_ONCE])
        on_part()
    return Predictions(about=about, ids=ids, keys=keys, columns={name: column[order] for name, column in found.columns.items()})


def worst_first(found: Predictions, among: Ints | None = None) -> Ints:
    """(n,) indices of rows, the worst first. For a classification: mistakes, the most confident first, then correct predictions, the least
    confident first. For other tasks: the largest losses first. Ties are sorted by id."""
    rows = np.arange(len(found.ids)) if among is None else among
    if not found.is_classification:
        return rows[np.lexsort((found.ids[rows], -np.nan_to_num(found.losses[rows].astype(np.float64), nan=np.inf)))]
    wrong = found.labels[rows] != found.answers[rows]
    sure = np.nan_to_num(found.confidence[rows].astype(np.float64), nan=0.0)
    return rows[np.lexsort((found.ids[rows], np.where(wrong, -sure, sure), ~wrong))]


def _width_bytes(kind: pa.DataType) -> int:
    is_list = pa.types.is_fixed_size_list(kind)
    bits: int = kind.list_size * kind.value_type.bit_width if is_list else kind.bit_width
    return bits // 8


def _array(column: Column) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])


def _numbers(array: pa.Array) -> Column:
    """The column's numbers: (n,), or (n, k) for a column of lists."""
    if not pa.types.is_fixed_size_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), array.type.list_size)
