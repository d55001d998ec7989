"""Records which samples each step saw, to prove that an epoch visits every sample once. Each rank writes its part into the run's `ledger/`
folder; tests and the fault campaign read it. dataio decides what the ids should be.

    ledger/attempt-0002.rank-0001.jsonl      {"attempt", "rank", "start_step"}, then {"epoch", "step", "virtual_rank", "ids"} a line

A batch that was left out for its bad numbers is recorded too, with "skipped": true: an epoch trains on each sample or skips it, once."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import make_dirs, write_all

_FILE = re.compile(r"attempt-(\d+)\.rank-(\d+)\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one virtual rank saw in one valid step."""

    epoch: int
    step: int
    virtual_rank: int
    ids: tuple[int, ...]
    attempt: int
    skipped: bool = False
    """The samples were loaded but left out: they did not change the weights."""


class LedgerWriter:
    """One rank's ledger in one attempt. `start_step` is where the attempt started; it invalidates older attempts' records from there on."""

    def __init__(self, folder: Path, attempt: int, rank: int, *, start_step: int) -> None:
        make_dirs(os.path.abspath(folder))
        path = folder / f"attempt-{attempt:04d}.rank-{rank:04d}.jsonl"
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError as error:
            raise FileExistsError(f"{path} exists: attempt numbers must count on over the drivers of a run") from error
        self._write({"attempt": attempt, "rank": rank, "start_step": start_step})

    def record(self, epoch: int, step: int, virtual_rank: int, ids: Iterable[int], *, skipped: bool = False) -> None:
        """Write one line. It is in the file when this returns, so a killed process loses no record."""
        line = {"epoch": epoch, "step": step, "virtual_rank": virtual_rank, "ids": [int(i) for i in ids]}
        self._write(line | {"skipped": True} if skipped else line)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, line: dict[str, Any]) -> None:
        write_all(self._descriptor, (json.dumps(line, separators=(",", ":")) + "\n").encode())


def read_ledger(folder: Path) -> list[Record]:
    """The valid records, by (step, virtual rank): each from its newest attempt, without those at or after the start step of a later
    attempt.

    ValueError if ranks of one attempt disagree about its start, or if two of them recorded the same virtual rank and step."""
    lines: dict[int, list[dict[str, Any]]] = {}
    starts: dict[int, int] = {}
    for path in sorted(folder.glob("attempt-*.jsonl")):
        match = _FILE.fullmatch(path.name)
        head, *records = _lines(path) or [{}]
        if match is None or "start_step" not in head:  # the writer was killed before its first line
            continue
        attempt = int(match[1])
        if starts.setdefault(attempt, head["start_step"]) != head["start_step"]:
            raise ValueError(f"{path} says attempt {attempt} started at step {head['start_step']}, another rank says {starts[attempt]}")
        lines.setdefault(attempt, []).extend(records)
    effective: dict[tuple[int, int], Record] = {}
    for attempt in sorted(starts):
        effective = {key: record for key, record in effective.items() if record.step < starts[attempt]}
        for line in lines[attempt]:
            record = Record(
                epoch=line["epoch"],
                step=line["step"],
                virtual_rank=line["virtual_rank"],
                ids=tuple(line["ids"]),
                attempt=attempt,
                skipped=line.get("skipped", False),
            )
            former = effective.get((record.step, record.virtual_rank))
            if former is not None:
                raise ValueError(
                    f"step {record.step} of virtual rank {record.virtual_rank} is there twice, in attempts {former.attempt} and {attempt}"
                )
            effective[record.step, record.virtual_rank] = record
    return [effective[key] for key in sorted(effective)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a kill may cut the last one short."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]
