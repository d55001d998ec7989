"""Reads row groups ahead of their use, with threads, within a budget of bytes.

Called by the loader's supplies (streamed, and resident for whole splits), which know what the next steps need. A `Shelf` holds the row
groups of one split; a `Reading` is one pass through a plan with them. Parquet and remote fetch the bytes and retry; the codec decodes them.

How the budget is kept: a group is charged with all the memory it will take (its footer says how much), from before it is read until it is
dropped. Groups are read in the order of their use; one that does not fit waits until those before it have been used (back-pressure). To
make room, the group with the farthest next use is dropped. The plan is known, so its next use is too, and no other choice reads less
(Belady 1966). A group that is needed before the one that wants the room is never dropped. Where the groups of a single step exceed the
budget, the step's samples are copied out of them. Then the maximum held is the budget, or one group if that is larger, plus copies of one
step's samples.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dataio.parquet import RowGroup, Split
from dataio.remote import DataOutage, in_a_hurry

Ids = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")

LOCAL_READERS = 1
REMOTE_READERS = 8
"""An object store answers one request at 50 to 100 MB/s, and several at once."""
IN_ORDER_BYTES = 256 << 20
"""Budget for reading a split from start to end."""
_PLAN_AT_START = 16
"""Steps planned before the first one is consumed, unless something must be dropped: the first batch does not wait for later plans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples(Generic[T]):
    """Encoded samples, in the requested order; their bytes are valid until the next step's are requested."""

    tag: T
    """The plan's tag for this step."""
    ids: Ids  # (n,)
    encoded: list[npt.NDArray[np.uint8]]
    """n arrays of (bytes,)"""
    targets: dict[str, npt.NDArray[Any]]  # by name, each (n, *shape)
    keys: list[str]


class Shelf:
    """The row groups of a split that are in memory; they stay from one reading to the next. One reading at a time."""

    def __init__(self, split: Split, budget_bytes: int) -> None:
        self.split, self.budget_bytes = split, budget_bytes
        self.held_bytes = 0
        """Memory of the groups held or being read: at most the budget, or one group if that is larger."""
        self.peak_bytes = 0
        self.groups_read = 0
        self.bytes_read = 0
        self.wait_seconds = 0.0
        """Time that consumers waited for reads."""
        self.waits_for_read = False
        """A consumer waits for a read at this moment."""
        self._groups: dict[int, RowGroup] = {}  # least recently used first
        self._charges: dict[int, int] = {}  # of the groups held or being read
        self._busy = False

    def read(self, plan: Iterable[tuple[T, Ids]], *, horizon: int, name: str = "reads") -> "Reading[T]":
        """Starts to read for `plan`, which yields (tag, ids) for each step, at most `horizon` steps beyond the one in use."""
        assert not self._busy, "one reading at a time: close the other first"
        return Reading(self, iter(plan), horizon, name)


class _Plan(Generic[T]):
    """Which steps of a plan need which groups, as far as the plan has been requested. Uses are numbered in the order of the plan: each
    step uses each of its groups once. The caller holds the reading's lock."""

    def __init__(self, steps: Iterator[tuple[T, Ids]], offsets: Ids) -> None:
        self._asked, self._offsets = steps, offsets
        self.steps: deque[tuple[T, Ids, Ids]] = deque()  # (tag, ids, their groups), planned but not begun
        self.ended = False
        self.failure: BaseException | None = None
        self.planned_uses = self.taken_uses = 0
        self.planned_steps = self.begun_steps = 0
        self.unread: deque[tuple[int, int]] = deque()  # (use, group) that no reader has looked at
        self.uses: dict[int, deque[int]] = {}  # group -> its uses that are planned but not taken

    def _extend(self) -> None:
        if self.ended:
            return
        try:
            tag, ids = next(self._asked)
        except StopIteration:
            self.ended = True
            return
        except BaseException as error:
            self.ended, self.failure = True, error
            return
        groups = np.searchsorted(self._offsets, ids, side="right") - 1  # (n,)
        self.steps.append((tag, ids, groups))
        self.planned_steps += 1
        for group in np.unique(groups).tolist():  # in the order in which the reading takes them
            self.uses.setdefault(group, deque()).append(self.planned_uses)
            self.unread.append((self.planned_uses, group))
            self.planned_uses += 1

    def extend_to(self, steps: int) -> bool:
        """Plans one more step; False if there is none, or if `steps` steps are planned and not begun."""
        if self.ended or self.planned_steps - self.begun_steps >= steps:
            return False
        self._extend()
        return True

    def begin(self) -> tuple[T, Ids, Ids] | None:
        """The next step; None after the last. Raises the plan's exception."""
        if not self.steps:
            self._extend()
        if not self.steps:
            if self.failure is not None:
                raise self.failure
            return None
        self.begun_steps += 1
        return self.steps.popleft()

    def take(self, group: int) -> None:
        """Marks the group's next use as begun."""
        self.uses[group].popleft()
        self.taken_uses += 1


class Reading(Generic[T]):
    """The steps of a plan, one after the other, with their samples. One thread iterates over it, once. `close` ends its threads.

    An exception from a read or from the plan is raised at the step that needs it, after the steps before it.
    """

    def __init__(self, shelf: Shelf, plan: Iterator[tuple[T, Ids]], horizon: int, name: str) -> None:
        shelf._busy = True
        self._shelf, self._split, self._horizon = shelf, shelf.split, horizon
        self._plan = _Plan(plan, shelf.split.group_offsets)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._sizes: dict[int, int] = {}
        self._failed: dict[int, BaseException] = {}
        self._pinned: set[int] = set()
        self._crowded = False
        readers = REMOTE_READERS if self._split.is_remote else LOCAL_READERS
        self._threads = [threading.Thread(target=self._read, name=f"{name}-{n}", daemon=True) for n in range(readers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Samples[T]]:
        while (step := self._next_step()) is not None:
            samples = self._collect(*step)
            yield samples
            samples.encoded.clear()  # otherwise a view kept by the consumer would keep its group in memory, uncounted
            self._unpin()

    def stop(self) -> None:
        """Ends the iteration from another thread: it yields no further step. Reader threads may still be at work."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads: at once, or when the request that a thread waits for is answered or fails."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._pinned.clear()
        self._shelf._busy = False

    # --- the consumer's side

    def _next_step(self) -> tuple[T, Ids, Ids] | None:
        with self._changed:
            if self._stop.is_set():
                return None
            step = self._plan.begin()
            self._changed.notify_all()
            return step

    def _collect(self, tag: T, ids: Ids, groups: Ids) -> Samples[T]:
        n = len(ids)
        encoded: list[npt.NDArray[np.uint8]] = [_NOTHING] * n
        targets = {target.name: np.empty((n, *target.shape), target.dtype) for target in self._split.schema}
        keys = [""] * n
        by_group = np.argsort(groups, kind="stable")  # (n,) places in the step, sorted by group
        views: list[int] = []  # places whose bytes are a view into a pinned group
        for group, places in _runs(groups[by_group], by_group):
            rows = self._take(group)
            if rows is None:  # no room for it next to this step's other groups: copy the needed samples of those
                for place in views:
                    encoded[place] = encoded[place].copy()
                views.clear()
                self._unpin()
                rows = self._take(group)
                assert rows is not None
            within = ids[places] - self._split.group_offsets[group]
            for name, column in rows.targets.items():
                targets[name][places] = column[within]
            for place, row in zip(places.tolist(), within.tolist(), strict=True):
                encoded[place] = rows.encoded[row]
                keys[place] = rows.keys[row]
                views.append(place)
            del rows  # so that a dropped group is freed
        return Samples(tag=tag, ids=ids, encoded=encoded, targets=targets, keys=keys)

    def _take(self, group: int) -> RowGroup | None:
        """The group, pinned; None if the pinned groups leave no room for it."""
        shelf, began = self._shelf, time.perf_counter()
        with self._changed:
            shelf.waits_for_read = True
            self._changed.wait_for(lambda: group in shelf._groups or group in self._failed or self._crowded or self._stop.is_set())
            shelf.waits_for_read = False
            shelf.wait_seconds += time.perf_counter() - began
            if self._crowded:
                return None
            if group in self._failed:
                raise self._failed[group]
            if group not in shelf._groups:
                raise Stopped
            self._plan.take(group)
            self._pinned.add(group)
            rows = shelf._groups.pop(group)
            shelf._groups[group] = rows  # now the most recently used
            self._changed.notify_all()
            return rows

    def _unpin(self) -> None:
        with self._changed:
            self._pinned.clear()
            self._crowded = False
            self._changed.notify_all()

    # --- the readers' side

    def _read(self) -> None:
        with in_a_hurry(self._stop):
            while (group := self._next_group()) is not None:
                try:
                    rows = self._patiently(group, self._split.read_group)
                except BaseException as error:
                    self._fail(group, error)
                    continue
                with self._changed:
                    self._shelf._groups[group] = rows
                    self._shelf.groups_read += 1
                    self._shelf.bytes_read += self._sizes[group]
                    self._changed.notify_all()
                del rows

    def _next_group(self) -> int | None:
        """The next group to read, charged to the budget; None when there are no more."""
        while True:
            with self._changed:
                if self._stop.is_set():
                    return None
                group = self._first_unread()
                if group is None:
                    if self._plan.ended:
                        return None
                    if not self._plan.extend_to(min(self._horizon, _PLAN_AT_START * (1 + self._plan.begun_steps))):
                        self._changed.wait()
                    continue
                size = self._sizes.get(group)
                if size is not None:
                    if self._charge(group, size):
                        return group
                    continue
            try:
                size = self._patiently(group, self._split.group_bytes)  # may have to read a footer
            except BaseException as error:
                self._fail(group, error)
            else:
                with self._changed:
                    self._sizes[group] = size

    def _patiently(self, group: int, read: Callable[[int], R]) -> R:
        """Reads, and retries during an outage. The outage is raised only if a step waited for the whole of it."""
        while True:
            with self._changed:
                awaited = self._plan.uses[group][0] <= self._plan.taken_uses
            try:
                return read(group)
            except DataOutage:
                if awaited or self._stop.is_set():
                    raise

    def _first_unread(self) -> int | None:
        shelf, plan = self._shelf, self._plan
        while plan.unread:
            use, group = plan.unread[0]
            if use >= plan.taken_uses and group not in shelf._charges and group not in self._failed:
                return group
            plan.unread.popleft()
        return None

    def _charge(self, group: int, size: int) -> bool:
        """Makes room for the next needed group and charges it; False if it had to wait, since things may have changed meanwhile."""
        shelf, plan = self._shelf, self._plan
        use = plan.unread[0][0]
        while shelf.held_bytes + size > shelf.budget_bytes and shelf._charges:
            if plan.extend_to(self._horizon):  # its next use must be known to drop the right group
                return False
            dropped = self._farthest(use)
            if dropped is None:
                if use == plan.taken_uses and self._pinned:  # the waiting step itself holds the place
                    self._crowded = True
                    self._changed.notify_all()
                self._changed.wait()
                return False
            del shelf._groups[dropped]
            shelf.held_bytes -= shelf._charges.pop(dropped)
        shelf._charges[group] = size
        shelf.held_bytes += size
        shelf.peak_bytes = max(shelf.peak_bytes, shelf.held_bytes)
        plan.unread.popleft()
        return True

    def _farthest(self, use: int) -> int | None:
        """The group with the farthest next use after `use`. None if that group is needed before `use` or is pinned, so the caller must
        wait. Of the groups without a next use, the least recently used that is free."""
        farthest, when, waited_for = None, use, False
        for group in self._shelf._groups:
            uses = self._plan.uses.get(group, ())
            is_free = group not in self._pinned and not (uses and uses[0] < use)
            following = next((later for later in uses if later > use), None)
            if following is None:
                if is_free:
                    return group
                waited_for = True
            elif following > when:
                farthest, when = (group if is_free else None), following
        return None if waited_for else farthest

    def _fail(self, group: int, error: BaseException) -> None:
        with self._changed:
            self._failed[group] = error
            self._shelf.held_bytes -= self._shelf._charges.pop(group, 0)
            self._changed.notify_all()


class Stopped(Exception):
    """A reading was stopped while a step waited for it."""


def in_order(split: Split, groups: Iterable[int]) -> Generator[Samples[int], None, None]:
    """Yields the samples of each of these row groups, read ahead."""
    offsets = split.group_offsets
    plan = ((group, np.arange(offsets[group], offsets[group + 1], dtype=np.int64)) for group in groups)
    with closing(Shelf(split, IN_ORDER_BYTES).read(plan, horizon=2 * REMOTE_READERS)) as reading:
        yield from reading


_NOTHING = np.empty(0, np.uint8)


def _runs(sorted_groups: Ids, places: Ids) -> Iterator[tuple[int, Ids]]:
    """Yields (group, its places) for each run of equal groups."""
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=-1))
    pieces = np.split(places, starts[1:]) if len(starts) else []
    for start, piece in zip(starts.tolist(), pieces, strict=True):
        yield int(sorted_groups[start]), piece
