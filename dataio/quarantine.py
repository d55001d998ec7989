"""Counts the unusable samples, by key and reason, and stops a run that has too many of them.

Used by convert (samples that it drops) and by the trainer's ranks (samples that the loader finds bad during a run). The caller handles each
record through a callback: a metric, a line in the journal or in quarantine.jsonl.
"""

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dataio.text import json_line, shown

SHOWN = 5
MOST = 0.5
"""Of the samples: above it, to leave them out is no advice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """One unusable sample. `reason` reads `kind: detail`; `kind` is one of a handful of words, usable as a metric's label."""

    key: str
    reason: str
    split: str
    sample_id: int
    """Position in the split; during a conversion, in the source's split."""

    @property
    def kind(self) -> str:
        return self.reason.split(":", 1)[0]

    def to_line(self) -> str:
        """One line of quarantine.jsonl."""
        return json_line(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "BadSample":
        return cls(key=str(value["key"]), reason=str(value["reason"]), split=str(value["split"]), sample_id=int(value["sample_id"]))


class TooManyBadSamples(ValueError):
    """More samples than `data.max_bad_fraction` allows are bad."""

    failure_kind = "data"


class Quarantine:
    """The bad samples met so far; thread-safe.

    The limit is a fraction of `total`. While `total` is None it is not known yet, and nothing raises before `finish`. A sample counts
    once however often it is met.
    """

    def __init__(self, limit_fraction: float, total: int | None, on_record: Callable[[BadSample], None] | None = None) -> None:
        if not 0.0 <= limit_fraction <= 1.0:
            raise ValueError(f"data.max_bad_fraction={limit_fraction} is not a fraction; use a number from 0 to 1, such as 0.001")
        self._limit_fraction = limit_fraction
        self._total = total
        self._on_record = on_record
        self._records: dict[tuple[str, int], BadSample] = {}
        self._lock = threading.Lock()

    @property
    def records(self) -> tuple[BadSample, ...]:
        with self._lock:
            return tuple(self._records.values())

    @property
    def count(self) -> int:
        return len(self._records)

    def __contains__(self, place: tuple[str, int]) -> bool:
        """Whether (split, sample id) is known to be bad."""
        return place in self._records

    def add(self, key: str, reason: str, split: str, sample_id: int) -> bool:
        """Records a bad sample; returns False if it was known already. Raises TooManyBadSamples once the limit is passed."""
        record = BadSample(key=key, reason=reason, split=split, sample_id=sample_id)
        with self._lock:
            if (split, sample_id) in self._records:
                return False
            self._records[split, sample_id] = record
        if self._on_record is not None:
            self._on_record(record)
        self._check()
        return True

    def restore(self, records: Iterable[BadSample]) -> None:
        """Takes over records from an earlier part of the same work, without calling back."""
        with self._lock:
            self._records.update({(record.split, record.sample_id): record for record in records})
        self._check()

    def finish(self, total: int) -> None:
        """Sets the total, now that it is known; raises TooManyBadSamples if the limit is passed."""
        self._total = total
        self._check(so_far="")

    def _check(self, so_far: str = " so far") -> None:
        if self._total is None or self.count <= self._limit_fraction * self._total:
            return
        records = self.records
        needed = math.ceil(len(records) / max(self._total, 1) * 10_000) / 10_000
        listed = "".join(f"\n  {record.split} {shown(record.key)}: {shown(record.reason)}" for record in records[:SHOWN])
        more = f"\n  and {len(records) - SHOWN} more" if len(records) > SHOWN else ""
        fix = (  # one cause, most likely; a model of what is left would be of little use
            "That is most of them: look at the reasons, repair the images, or name other data with --data.path"
            if len(records) > MOST * self._total
            else f"Repair or remove them, or let them be left out: --data.max-bad-fraction {needed:g} or more "
            f"(of `dataio.convert`: --max-bad-fraction)"
        )
        raise TooManyBadSamples(
            f"{len(records)} of {self._total} samples are bad{so_far}, more than the {math.floor(self._limit_fraction * self._total)} that "
            f"data.max_bad_fraction={self._limit_fraction:g} allows:{listed}{more}\n{fix}"
        )
