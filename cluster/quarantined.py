"""The samples that a run could not read, over all its ranks and attempts; each counts once. Pure; the coordinator holds one instance and
writes it to quarantine.jsonl."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


class Quarantined:
    """Records {"key", "reason", "split", "sample_id"}, identified by split and id."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._records: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.add(records)

    @classmethod
    def from_lines(cls, content: bytes) -> "Quarantined":
        return cls(json.loads(line) for line in content.decode().splitlines() if line)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Add records; returns the new ones."""
        new = []
        for record in records:
            identity = record["split"], record["sample_id"]
            if identity not in self._records:
                self._records[identity] = dict(record)
                new.append(record)
        return new

    def to_lines(self) -> bytes:
        """One JSON object per line, in the order in which they were added."""
        return "".join(json.dumps(record, sort_keys=True) + "\n" for record in self._records.values()).encode()
