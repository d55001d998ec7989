"""The file explanations.parquet of a run on texts: which characters of the worst and most telling test samples the model's answers come
from. Rank 0 writes it at a run's end (trainer.rank.explain), the report reads it. Imports no torch. That of images is explanations.py.

A row has a sample's id in the split and its marks. What they are is in the file's metadata.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.tasks.explanations import Explanations

STRONGEST = 255
_META = b"finetune.highlights"
_MARKS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("strength", pa.uint8())]))


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Mark:
    """Characters of a text that an answer rests on."""

    start: int
    end: int
    """Behind the last one."""
    strength: int
    """1 to 255, of the token on which it rests most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AboutMarks:
    """What was explained, and how."""

    step: int
    split: str
    dataset_fingerprint: str
    method: str
    note: str = ""
    """Why there are no marks; empty if there are."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Highlights:
    """Marks by sample."""

    about: AboutMarks
    ids: npt.NDArray[np.int64]  # (n,)
    marks: Sequence[Sequence[Mark]]
    """Of each sample, in the order of the text, not overlapping."""

    def by_id(self) -> dict[int, Sequence[Mark]]:
        return {int(sample): each for sample, each in zip(self.ids, self.marks, strict=True)}

    def to_parquet(self) -> bytes:
        schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("marks", _MARKS, nullable=False)])
        marks = pa.array([[asdict(mark) for mark in each] for each in self.marks], _MARKS)
        meta = {_META: json.dumps(asdict(self.about))}
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_arrays([pa.array(self.ids, pa.int64()), marks], schema=schema.with_metadata(meta)), sink)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Highlights":
        """ValueError if `data` did not come from `to_parquet`."""
        try:
            table = pq.read_table(io.BytesIO(data))
            about = AboutMarks(**json.loads((table.schema.metadata or {})[_META]))
            marks = [tuple(Mark(**mark) for mark in each) for each in table["marks"].to_pylist()]
            if not all(map(_follow, marks)):
                raise ValueError("marks do not follow each other")
        except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is no file of explanations ({error})") from error
        return cls(about=about, ids=table["id"].to_numpy(), marks=marks)


def read_explanations(data: bytes) -> Explanations | Highlights:
    """What explanations.parquet holds, of images or of texts. ValueError if it is damaged."""
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it is no file of explanations ({error})") from error
    return Highlights.from_parquet(data) if _META in metadata else Explanations.from_parquet(data)


def marks_of(places: Sequence[Sequence[int]], strengths: Sequence[float]) -> tuple[Mark, ...]:
    """The marks of a text from its tokens: `places`, the characters of each as (start, end), of a token that stands for none start = end;
    `strengths`, of which those above 0 count. Tokens of the same characters (bytes of one) add up."""
    found: dict[tuple[int, int], float] = {}
    for (start, end), strength in zip(places, strengths, strict=True):
        if end > start:
            found[start, end] = found.get((start, end), 0.0) + float(strength)
    most = max(found.values(), default=0.0)
    if not 0 < most < float("inf"):
        return ()
    rounded = {place: round(STRONGEST * max(0.0, strength) / most) for place, strength in found.items()}
    return tuple(_apart(Mark(start=start, end=end, strength=strength) for (start, end), strength in sorted(rounded.items()) if strength))


def _apart(marks: Iterator[Mark]) -> Iterator[Mark]:
    """Without those that overlap an earlier one, which some tokenizers of bytes give."""
    behind = 0
    for mark in marks:
        if mark.start >= behind:
            behind = mark.end
            yield mark


def _follow(marks: Sequence[Mark]) -> bool:
    ends = [0, *(mark.end for mark in marks)]
    return all(end <= mark.start < mark.end and 0 < mark.strength <= STRONGEST for end, mark in zip(ends, marks, strict=False))
