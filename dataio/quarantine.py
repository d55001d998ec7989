"""Counts the unusable samples, by key and reason, and stops a run that has too many of them.

Used by convert (samples that it drops) and by the trainer's ranks (samples that the loader finds bad during a run). The caller handles each
record through a callback: a metric, a line in the journal or in quarantine.jsonl.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dataio.foreign import json_of
from dataio.text import json_line, shown

SHOWN = 5
FEW = 10
"""So many samples may be bad in any case, as long as they are no more than MOST_OF_FEW of all: a thousandth of a hundred photographs is
none, and some of a hundred usually cannot be read."""
MOST_OF_FEW = 0.1
MOST_TO_LEAVE_OUT = 0.5
"""No error advises to leave out more than this fraction of the samples."""


def allowed(fraction: float, total: int) -> int:
    """How many of `total` samples may be bad under the limit `fraction` (`data.max_bad_fraction`); 0 allows none, however few there are."""
    if fraction == 0.0:
        return 0
    return max(math.floor(fraction * total), min(FEW, math.floor(MOST_OF_FEW * total)))


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

    @classmethod
    def from_lines(cls, content: bytes) -> "tuple[BadSample, ...]":
        """The records of a quarantine.jsonl; a line that is none, for instance one that was cut short, is passed over."""
        found = []
        for line in content.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.append(cls.from_json(json_of(line)))
        return tuple(found)


class TooManyBadSamples(ValueError):
    """More samples than `data.max_bad_fraction` allows are bad."""

    failure_kind = "data"

    @classmethod
    def of(cls, records: Sequence[BadSample], *, count: int, total: int, fraction: float, so_far: str = "") -> "TooManyBadSamples":
        """The error that `count` of `total` samples are bad, of which `records` are known here."""
        listed = "".join(f"\n  {record.split} {shown(record.key)}: {shown(record.reason)}" for record in records[:SHOWN])
        more = f"\n  and {count - SHOWN} more" if len(records) > SHOWN else ""
        needed = math.ceil(count / max(total, 1) * 10_000) / 10_000
        fix = (
            f"Repair or remove them, or let them be left out: --data.max-bad-fraction {needed:g} or more "
            "(of `dataio.convert`: --max-bad-fraction)"
            if needed <= MOST_TO_LEAVE_OUT
            else "These are most of the samples: the reasons say why they cannot be read. Convert them to a kind that can, or give another "
            "source"
        )
        return cls(
            f"{count} of {total} samples are bad{so_far}, more than the {allowed(fraction, total)} that "
            f"data.max_bad_fraction={fraction:g} allows:{listed}{more}\n{fix}"
        )


class Quarantine:
    """The bad samples met so far; thread-safe.

    The limit is a fraction of `total`, or a few of a small one (`allowed`). While `total` is None it is not known yet, and nothing raises
    before `finish`. A sample counts once however often it is met.
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
        if self._total is None or self.count <= allowed(self._limit_fraction, self._total):
            return
        records = self.records
        raise TooManyBadSamples.of(records, count=len(records), total=self._total, fraction=self._limit_fraction, so_far=so_far)
