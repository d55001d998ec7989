"""What the stages of a compression came to: a row for each, in words and as JSON. Pure. measure.py makes the rows; __main__.py writes them.

A row has two halves. What was answered (`Answered`) is a function of the weights: the same command gives the same again to the bit. What
was timed (`Timed`) is a measurement, and differs from time to time.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runs.certainty import Interval, interval_of, paired_interval
from trainer.settings.units import percent, size
from trainer.tasks.info import Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A stage's model, asked about the whole test split by ONNX Runtime."""

    stage: str
    file: str
    """The ONNX file, inside the job's folder."""
    weights_sha256: str
    """Of the model's file of weights."""
    bytes: int
    value: float
    """Of the task's headline measure."""
    count: int
    right: str = ""
    """A 0 or 1 for each image; empty where answers are not right or wrong."""
    refused: str = ""
    """Why the model is not to be used; "" if it is."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """What a file costs on this CPU."""

    milliseconds: Mapping[str, Sequence[float]]
    """Of each call, by the size of the batch."""
    peak_bytes: int
    """Memory beyond that of the process before it opened the file."""

    def to_json(self) -> dict[str, Any]:
        return {
            "milliseconds": {
                batch: {"median": statistics.median(each), "p99": p99(each), "calls": len(each)}
                for batch, each in self.milliseconds.items()
            },
            "peak_memory_bytes": self.peak_bytes,
        }


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99 % of them do not exceed; of fewer than a hundred, the largest."""
    ranked = sorted(values)
    return ranked[-(-99 * len(ranked) // 100) - 1]


def interval(row: Answered, measure: Measure) -> Interval | None:
    """The 95 % interval of the measure; None if it is no share of the images."""
    return interval_of({measure.key: row.value, "test_count": row.count}, measure)


def lost(first: Answered, row: Answered) -> Interval | None:
    """The 95 % interval of what the row lost of the first one's share, on the same images. None where answers are not right or wrong."""
    if not row.right or len(row.right) != len(first.right):
        return None
    pairs = list(zip(first.right, row.right, strict=True))
    return paired_interval(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def to_json(rows: Sequence[Answered], timed: Mapping[str, Timed], measure: Measure, *, threads: int) -> dict[str, Any]:
    """compress.json. `stages` is a function of the job; `measured` is not."""
    first = rows[0]
    return {
        "version": 1,
        "measure": measure.name,
        "stages": [
            {
                **{key: value for key, value in row.to_json().items() if key != "right"},
                "interval_95_percent": _listed(interval(row, measure)),
                "lost_95_percent": _listed(lost(first, row)) if row is not first else None,
            }
            for row in rows
        ],
        "measured": {"runtime": "ONNX Runtime, CPU", "threads": threads, **{name: each.to_json() for name, each in timed.items()}},
    }


def _listed(found: Interval | None) -> list[float] | None:
    return list(found) if found else None


# --- in words ---------------------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Answered], timed: Mapping[str, Timed], measure: Measure) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the one table."""
    batches = list(next(iter(timed.values())).milliseconds)
    head = ["stage", measure.in_words, "95 % interval", "lost", "size"]
    head += [f"ms, batch {batch} ({what})" for batch in batches for what in ("median", "p99")] + ["peak memory"]
    return head, [_row(rows[0], row, timed[row.stage], measure, batches) for row in rows]


def _row(first: Answered, row: Answered, timed: Timed, measure: Measure, batches: Sequence[str]) -> list[str]:
    is_ratio = measure.unit == "ratio"
    sure, gone = interval(row, measure), lost(first, row) if row is not first else None
    points = 100 * (first.value - row.value)
    return [
        row.stage + (" (refused)" if row.refused else ""),
        percent(row.value, 2) if is_ratio else f"{row.value:.4g}",
        "{:.1f} to {:.1f}".format(*(100 * each for each in sure)) if sure else "-",
        "{:.2f} ({:.1f} to {:.1f})".format(points, *(100 * each for each in gone)) if gone else "-",
        size(row.bytes),
        *(f"{each:.2f}" for batch in batches for each in (statistics.median(timed.milliseconds[batch]), p99(timed.milliseconds[batch]))),
        size(timed.peak_bytes),
    ]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The table as lines of text."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
