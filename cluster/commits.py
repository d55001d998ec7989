"""Bookkeeping of checkpoints on their way to a commit: pending -> acknowledged by all ranks -> committed, or failed. Pure.

The coordinator holds one instance, behind its lock. Ranks acknowledge what they have staged. Once all ranks of an attempt have, the
Committer takes the checkpoint, writes the commit, and reports the result here. store.py defines what the files hold and what makes a
commit valid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.store import Receipt


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """A checkpoint that all ranks have staged."""

    attempt: int
    step: int
    receipts: Sequence[Receipt]
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """The newest commit."""

    step: int
    time: float
    """Unix time, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointNews:
    """What is known about checkpoints."""

    last: Committed | None
    """The newest commit, including those of earlier drivers."""
    failures: int
    """Checkpoints that could not be saved, over all attempts of this driver."""
    problem: str
    """Why the latest of them failed; "" if none did."""
    failed_steps: frozenset[int]
    """Steps of the current attempt whose checkpoints failed for good."""


@dataclass(kw_only=True, slots=True)
class _Pending:
    """A checkpoint that some ranks have staged."""

    receipts: dict[int, list[Receipt]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Commits:
    """See the module. `last`: the newest commit that already exists."""

    def __init__(self, last: Committed | None) -> None:
        self._last = last
        self._attempt, self._world_size = 0, 0
        self._pending: dict[int, _Pending] = {}  # by step
        self._failed_steps: set[int] = set()
        self._failures, self._problem = 0, ""
        self._in_hand = 0

    @property
    def last(self) -> Committed | None:
        return self._last

    @property
    def in_hand(self) -> int:
        """Number of staged checkpoints that are not yet committed or failed."""
        return self._in_hand

    def begin(self, attempt: int, world_size: int, last: Committed | None) -> None:
        """Begin another attempt, whose newest commit is `last`. Messages from older attempts are ignored from now on."""
        self._attempt, self._world_size, self._last = attempt, world_size, last
        self._pending, self._failed_steps = {}, set()

    def ack(self, attempt: int, rank: int, step: int, receipts: Iterable[Receipt], meta: Mapping[str, Any]) -> Staged | None:
        """A rank has staged its part. Returns the checkpoint to commit once all ranks have, with the ranks' metas merged."""
        if attempt != self._attempt:
            return None
        pending = self._pending.setdefault(step, _Pending())
        pending.receipts[rank] = list(receipts)
        pending.meta.update(meta)
        if len(pending.receipts) < self._world_size or step in self._failed_steps:
            return None
        everything = [receipt for number in sorted(pending.receipts) for receipt in pending.receipts[number]]
        # Ranks save in step order, so an incomplete checkpoint below this step can never complete.
        self._pending = {other: kept for other, kept in self._pending.items() if other > step}
        self._in_hand += 1
        return Staged(attempt=attempt, step=step, receipts=everything, meta=pending.meta)

    def withdraw(self, attempt: int, step: int) -> bool:
        """A rank could not stage its part. Returns False if the message is from an older attempt."""
        if attempt == self._attempt:
            self._pending.pop(step, None)
        return attempt == self._attempt

    def failed(self, attempt: int, step: int, problem: str) -> bool:
        """The checkpoint failed. Returns False if another rank has already reported it."""
        is_new = attempt != self._attempt or step not in self._failed_steps
        self._failures += is_new
        self._problem = problem
        if attempt == self._attempt:
            self._failed_steps.add(step)
        return is_new

    def committed(self, attempt: int, step: int, time: float) -> None:
        if attempt == self._attempt:  # a commit of an older attempt may be newer than this attempt's start
            self._last = Committed(step=step, time=time)

    def settled(self) -> None:
        """A checkpoint that ack() returned is now committed or failed."""
        self._in_hand -= 1

    def is_committed(self, step: int) -> bool:
        """True if this step's checkpoint, or a later one, is committed."""
        return self._last is not None and self._last.step >= step

    def is_failed(self, step: int) -> bool:
        return step in self._failed_steps

    def news(self) -> CheckpointNews:
        return CheckpointNews(last=self._last, failures=self._failures, problem=self._problem, failed_steps=frozenset(self._failed_steps))
