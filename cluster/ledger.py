"""Which samples each step saw: the proof that every sample of an epoch was met once. Written by each rank into the run's `ledger/`
folder, read by tests, the fault campaign and the report. What the ids should have been is dataio's business.

    ledger/attempt-0002.rank-0001.jsonl      {"attempt", "rank", "start_step"}, then {"epoch", "step", "virtual_rank", "ids"} a line

A batch that was left out for its bad numbers is there too, with "skipped": true: each sample of an epoch is trained on or skipped, once."""

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
    """What one virtual rank saw in one step that counts."""

    epoch: int
    step: int
    virtual_rank: int
    ids: tuple[int, ...]
    attempt: int
    skipped: bool = False
    """Taken and left out: the weights know nothing of these samples."""


class LedgerWriter:
    """One rank's ledger in one attempt. `start_step` is where the attempt started: it voids what older attempts wrote from there on."""

    def __init__(self, folder: Path, attempt: int, rank: int, *, start_step: int) -> None:
        make_dirs(os.path.abspath(folder))
        path = folder / f"attempt-{attempt:04d}.rank-{rank:04d}.jsonl"
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError as error:
            raise FileExistsError(f"{path} exists: attempt numbers must count on over the drivers of a run") from error
        self._write({"attempt": attempt, "rank": rank, "start_step": start_step})

    def record(self, epoch: int, step: int, virtual_rank: int, ids: Iterable[int], *, skipped: bool = False) -> None:
        """One line, in the file when this returns: a killed process loses none that it recorded."""
        line = {"epoch": epoch, "step": step, "virtual_rank": virtual_rank, "ids": [int(i) for i in ids]}
        self._write(line | {"skipped": True} if skipped else line)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, line: dict[str, Any]) -> None:
        write_all(self._descriptor, (json.dumps(line, separators=(",", ":")) + "\n").encode())


def read_ledger(folder: Path) -> list[Record]:
    """The records that count, by (step, virtual rank): each from the newest attempt, and none that a later attempt started before.

    ValueError if ranks of one attempt disagree about its start, or two of them recorded the same virtual rank and step."""
    lines: dict[int, list[dict[str, Any]]] = {}
    starts: dict[int, int] = {}
    for path in sorted(folder.glob("attempt-*.jsonl")):
        match = _FILE.fullmatch(path.name)
        head, *records = _lines(path) or [{}]
        if match is None or "start_step" not in head:  # killed before its first line
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
    """The whole lines of a file; its last may be cut short by a kill."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]
