"""Bookkeeping of checkpoints on their way to a commit: pending -> acknowledged by all ranks -> committed, or failed. Pure.

The coordinator's State holds one instance. Ranks acknowledge what they have staged. Once all ranks of an attempt have, the Committer takes
the checkpoint, writes the commit, and reports the result here. store.py defines what the files hold and what makes a commit valid.

Every message may come twice: a second one changes nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.store import Receipt

STEPS_KEPT = 64
"""Commits, failed steps and incomplete checkpoints that are remembered; ranks and driver ask about the newest only."""


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
    is_refused: bool
    """The storage refused that one, and would refuse it again."""
    failed_steps: frozenset[int]
    """Steps of the current attempt whose checkpoints failed for good: the newest ones, above the newest commit."""
    waiting: str = ""
    """Why a checkpoint that all ranks have staged waits for the storage; "" if none does."""


@dataclass(kw_only=True, slots=True)
class _Pending:
    """A checkpoint that some ranks have staged."""

    receipts: dict[int, list[Receipt]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Commits:
    """See the module. `existing`: the commits that already exist."""

    def __init__(self, existing: Iterable[Committed] = ()) -> None:
        self._existing = {commit.step: commit for commit in existing}
        self._last: Committed | None = self._newest()
        self._attempt, self._world_size = 0, 0
        self._pending: dict[int, _Pending] = {}  # by step
        self._handed_step = -1  # the newest step of this attempt that ack() returned
        self._failed_steps: set[int] = set()
        self._withdrawn: set[tuple[int, int]] = set()  # (step, rank), of failed steps
        self._failures, self._problem, self._is_refused, self._waiting = 0, "", False, ""
        self._in_hand: dict[tuple[int, int], Staged] = {}  # by attempt and step
        self._made: set[tuple[int, int]] = set()  # those in hand whose commit is made, and which are still being cleaned up after

    @property
    def last(self) -> Committed | None:
        return self._last

    @property
    def in_hand(self) -> int:
        """Number of staged checkpoints that are not yet committed or failed."""
        return len(self._in_hand)

    def begin(self, attempt: int, world_size: int, start_step: int) -> None:
        """Begin another attempt from a state after `start_step` steps. Newer commits do not count for it: they were found bad, or rolled
        back. Messages from older attempts are ignored from now on."""
        self._attempt, self._world_size, self._last = attempt, world_size, self._newest(start_step)
        self._pending, self._failed_steps, self._withdrawn, self._handed_step = {}, set(), set(), -1

    def ack(self, attempt: int, rank: int, step: int, receipts: Iterable[Receipt], meta: Mapping[str, Any]) -> Staged | None:
        """A rank has staged its part. Returns the checkpoint to commit once all ranks have, with the ranks' metas merged."""
        # Ranks save in step order, so an incomplete checkpoint below a complete one can never complete.
        if attempt != self._attempt or step <= self._handed_step or step in self._failed_steps:
            return None
        pending = self._pending.setdefault(step, _Pending())
        pending.receipts[rank] = list(receipts)
        pending.meta.update(meta)
        if len(pending.receipts) < self._world_size:
            self._forget_oldest(self._pending)
            return None
        everything = [receipt for number in sorted(pending.receipts) for receipt in pending.receipts[number]]
        self._pending = {other: kept for other, kept in self._pending.items() if other > step}
        self._handed_step = step
        staged = Staged(attempt=attempt, step=step, receipts=everything, meta=pending.meta)
        self._in_hand[attempt, step] = staged
        return staged

    def withdraw(self, attempt: int, rank: int, step: int) -> bool:
        """A rank could not stage its part. Returns False if the message is from an older attempt, or has come before."""
        if attempt != self._attempt or step <= self._handed_step or (step, rank) in self._withdrawn:
            return False
        self._pending.pop(step, None)
        self._withdrawn.add((step, rank))
        return True

    def failed(self, attempt: int, step: int, problem: str, *, is_refused: bool = False) -> bool:
        """The checkpoint failed. `is_refused`: the storage would refuse it again. Returns False if another rank has already reported
        it."""
        is_new = attempt != self._attempt or step not in self._failed_steps
        self._failures += is_new
        self._problem, self._is_refused = problem, is_refused
        if attempt == self._attempt:
            self._failed_steps.add(step)
            self._failed_steps = set(sorted(self._failed_steps)[-STEPS_KEPT:])
            self._withdrawn = {(failed, rank) for failed, rank in self._withdrawn if failed in self._failed_steps}
        return is_new

    def committed(self, attempt: int, step: int, time: float) -> None:
        commit = Committed(step=step, time=time)
        self._existing[step] = commit
        self._forget_oldest(self._existing)
        self._waiting = ""
        if (attempt, step) in self._in_hand:
            self._made.add((attempt, step))
        if attempt == self._attempt:  # a commit of an older attempt may be newer than this attempt's start
            self._last = commit
            self._failed_steps = {failed for failed in self._failed_steps if failed > step}

    def waits(self, problem: str) -> None:
        """The checkpoint that is being committed waits for the storage."""
        self._waiting = problem

    def settled(self, attempt: int, step: int) -> None:
        """A checkpoint that ack() returned is now committed or failed."""
        self._waiting = ""
        self._in_hand.pop((attempt, step), None)
        self._made.discard((attempt, step))

    def left_over(self) -> list[Staged]:
        """After the death of who committed: what is to be committed again, in order."""
        for key in tuple(self._made):
            self.settled(*key)
        self._waiting = ""
        return list(self._in_hand.values())

    def is_committed(self, step: int) -> bool:
        """True if this step's checkpoint, or a later one, is committed."""
        return self._last is not None and self._last.step >= step

    def is_failed(self, step: int) -> bool:
        return step in self._failed_steps

    def news(self) -> CheckpointNews:
        return CheckpointNews(
            last=self._last,
            failures=self._failures,
            problem=self._problem,
            is_refused=self._is_refused,
            failed_steps=frozenset(self._failed_steps),
            waiting=self._waiting,
        )

    def _newest(self, up_to: int | None = None) -> Committed | None:
        steps = [step for step in self._existing if up_to is None or step <= up_to]
        return self._existing[max(steps)] if steps else None

    @staticmethod
    def _forget_oldest(by_step: dict[int, Any]) -> None:
        while len(by_step) > STEPS_KEPT:
            del by_step[min(by_step)]
