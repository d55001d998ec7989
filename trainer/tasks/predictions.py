"""predictions.parquet: what the finished model answered to each test sample. A rank writes it at a run's last evaluation, and
`trainer.evaluate --predictions`; the report reads it. What is recorded, without waiting for the device, is
`trainer.tasks.prediction_log`. Imports no torch.

One row a sample: its id in the split, its key, and the columns that the task declares; of a classification the class, the answer, the
answer's probability, the loss. The numbers are those of the evaluation itself, so that counting the rows gives its confusion matrix
exactly. A test split of more samples than `rows_to_keep` is recorded in part, the worst samples: of a classification the surest mistakes
first, then the least sure right ones.
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
"""Samples that are recorded at most: of a classification some 100 MB in rank 0's memory while it writes them, keys included."""
_ROOM_BYTES = 256 * 2**20
_META = b"finetune.predictions"
_KEYS_AT_ONCE = 8192

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Column = npt.NDArray[Any]


def rows_to_keep(columns: Mapping[str, pa.DataType]) -> int:
    """Samples that are recorded at most, over all ranks: LIMIT, or fewer where rows are long (a probability for each of 1,000 labels)."""
    row_bytes = 8 + sum(_width_bytes(kind) for kind in columns.values())
    return min(LIMIT, _ROOM_BYTES // row_bytes)


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
class Recorded:
    """Rows in the order in which ranks hand them in, without keys."""

    ids: Ints  # (n,)
    columns: Mapping[str, Column]  # each (n,) or (n, k)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Rows by id, without the samples of which nothing is known (those that could not be read)."""

    about: About
    ids: Ints  # (n,)
    keys: Sequence[str]
    columns: Mapping[str, Column]
    """Each (n,) or (n, k), of the type that it has in the file."""

    @property
    def is_complete(self) -> bool:
        return len(self.ids) == self.about.count

    @property
    def is_classification(self) -> bool:
        """Whether there are labels, answers and confidence."""
        return {"label", "prediction", "confidence"} <= self.columns.keys()

    @property
    def labels(self) -> Ints:
        """(n,) of a classification."""
        return self._column("label").astype(np.int64)

    @property
    def answers(self) -> Ints:
        """(n,) of a classification."""
        return self._column("prediction").astype(np.int64)

    @property
    def confidence(self) -> Floats:
        """(n,) of a classification: the answer's probability."""
        return self._column("confidence")

    @property
    def losses(self) -> Floats:
        """(n,)"""
        return self._column("loss")

    def confusion(self, classes: int) -> Ints:
        """(classes, classes) int64 [label][prediction], of the rows."""
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
        """ValueError where `data` is nothing that `to_parquet` gave."""
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
    """`found` by id, as PredictionLog.gathered gives it. The keys are read from the split, which for a large one takes a while: `on_part`
    is called now and then."""
    order = np.argsort(found.ids, kind="stable")
    ids = found.ids[order]
    keys: list[str] = []
    for start in range(0, len(ids), _KEYS_AT_ONCE):
        keys += split.keys(ids[start : start + _KEYS_AT_ONCE])
        on_part()
    return Predictions(about=about, ids=ids, keys=keys, columns={name: column[order] for name, column in found.columns.items()})


def worst_first(found: Predictions, among: Ints | None = None) -> Ints:
    """(n,) indices of rows: mistakes, the surest first, then right answers, the least sure first; of another task than classification the
    largest losses first. Equals by their id."""
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
    """(n,), or (n, k) of a column of lists."""
    if not pa.types.is_fixed_size_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), array.type.list_size)
