"""Row groups read ahead of their use, by threads, within a budget of bytes.

Called by the loader, which knows the order of training and so which samples the next steps need, and by decode for whole splits. A `Shelf`
holds the row groups of one split; a `Reading` is one walk through a plan with them. Where bytes come from, and what is tried again, is
parquet's and remote's; what they decode to is decode's.

How the budget is kept: a group is charged with all the memory it will take before it is read (its footer tells), and until it is dropped.
Groups are read in the order of their use; one that does not fit waits for those before it to be used (back-pressure). To make room the
group is dropped whose next use is the farthest, which is known, as the plan is: no other choice reads less (Belady 1966). What is needed
before the group that wants the room is never dropped. Where the groups of a single step exceed the budget, the step's images are copied out
of them: then the most that is held is the budget, or one group where that is larger, and copies of one step's images.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

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
"""Budget of reading a split from its begin to its end."""
_PLAN_AT_START = 16
"""Steps planned before the first is consumed, unless something must be dropped: the first batch does not wait for plans of later ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples(Generic[T]):
    """Encoded samples, in the order asked for; the images are valid until the next are asked for."""

    tag: T
    """What the plan gave with them."""
    ids: Ids  # (n,)
    encoded: list[npt.NDArray[np.uint8]]
    """n times (bytes,)"""
    labels: npt.NDArray[np.int64]  # (n,)
    keys: list[str]


class Shelf:
    """The row groups of a split that are in memory; they stay from one reading to the next. One reading at a time."""

    def __init__(self, split: Split, budget_bytes: int) -> None:
        self.split, self.budget_bytes = split, budget_bytes
        self.held_bytes = 0
        """Of the groups that are held or being read: at most the budget, or one group where that is larger."""
        self.peak_bytes = 0
        self.groups_read = 0
        self.bytes_read = 0
        self.wait_seconds = 0.0
        """Time for which whoever asked for samples waited for reads."""
        self._groups: dict[int, RowGroup] = {}  # the least recently used first
        self._charges: dict[int, int] = {}  # of what is held or being read
        self._busy = False

    def read(self, plan: Iterable[tuple[T, Ids]], *, horizon: int, name: str = "reads") -> "Reading[T]":
        """Starts to read what `plan` wants, (tag, ids) a step. The plan is asked for at most `horizon` steps beyond the one in use."""
        assert not self._busy, "one reading at a time: close the other first"
        return Reading(self, iter(plan), horizon, name)


class Reading(Generic[T]):
    """Steps of a plan, one after the other, with their samples; iterated once, by one thread. Close it: its threads end then.

    What a read or the plan raises is raised at the step that needs it, after the steps before it.
    """

    def __init__(self, shelf: Shelf, plan: Iterator[tuple[T, Ids]], horizon: int, name: str) -> None:
        shelf._busy = True
        self._shelf, self._split, self._plan, self._horizon = shelf, shelf.split, plan, horizon
        self._changed = threading.Condition()
        self._stop = threading.Event()
        # Uses are numbered in the order in which the plan makes them: each step uses each of its groups once.
        self._steps: deque[tuple[T, Ids, Ids]] = deque()  # (tag, ids, their groups), planned and not begun
        self._plan_ended = False
        self._plan_failure: BaseException | None = None
        self._planned_uses = self._taken_uses = 0
        self._planned_steps = self._begun_steps = 0
        self._unread: deque[tuple[int, int]] = deque()  # (use, group) that no reader has looked at
        self._uses: dict[int, deque[int]] = {}  # by group: its uses that are planned and not taken
        self._sizes: dict[int, int] = {}
        self._reading: set[int] = set()
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
            samples.encoded.clear()  # a view kept by the consumer would keep its group in memory, uncounted
            self._unpin()

    def stop(self) -> None:
        """Ends the iteration from another thread: it yields no further step. Threads may still be at work."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads: at once, or when the request that one waits for is answered or fails."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._pinned.clear()
        self._shelf._busy = False

    # --- the consumer's side

    def _next_step(self) -> tuple[T, Ids, Ids] | None:
        with self._changed:
            if not self._steps:
                self._plan_step()
            if self._stop.is_set():
                return None
            if not self._steps:
                if self._plan_failure is not None:
                    raise self._plan_failure
                return None
            self._begun_steps += 1
            self._changed.notify_all()
            return self._steps.popleft()

    def _collect(self, tag: T, ids: Ids, groups: Ids) -> Samples[T]:
        n = len(ids)
        encoded: list[npt.NDArray[np.uint8]] = [_NOTHING] * n
        labels = np.empty(n, np.int64)
        keys = [""] * n
        by_group = np.argsort(groups, kind="stable")  # (n,) places in the step, those of a group together
        views: list[int] = []  # places whose image is a view into a pinned group
        for group, places in _runs(groups[by_group], by_group):
            rows = self._take(group)
            if rows is None:  # no room for it beside the groups of this step: keep copies of what is wanted of those
                for place in views:
                    encoded[place] = encoded[place].copy()
                views.clear()
                self._unpin()
                rows = self._take(group)
                assert rows is not None
            within = ids[places] - self._split.group_offsets[group]
            labels[places] = rows.labels[within]
            for place, row in zip(places.tolist(), within.tolist(), strict=True):
                encoded[place] = rows.encoded[row]
                keys[place] = rows.keys[row]
                views.append(place)
            del rows  # what is dropped is freed
        return Samples(tag=tag, ids=ids, encoded=encoded, labels=labels, keys=keys)

    def _take(self, group: int) -> RowGroup | None:
        """The group, pinned; None if what is pinned leaves no room for it."""
        shelf, began = self._shelf, time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: group in shelf._groups or group in self._failed or self._crowded or self._stop.is_set())
            shelf.wait_seconds += time.perf_counter() - began
            if self._crowded:
                return None
            if group in self._failed:
                raise self._failed[group]
            if group not in shelf._groups:
                raise Stopped
            self._uses[group].popleft()
            self._taken_uses += 1
            self._pinned.add(group)
            rows = shelf._groups.pop(group)
            shelf._groups[group] = rows  # the most recently used
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
                    self._reading.discard(group)
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
                    if self._plan_ended:
                        return None
                    if not self._may_plan(min(self._horizon, _PLAN_AT_START * (1 + self._begun_steps))):
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
        """An outage is one only for a step that waited for all of it; until then there is time to try again."""
        while True:
            with self._changed:
                awaited = self._uses[group][0] <= self._taken_uses
            try:
                return read(group)
            except DataOutage:
                if awaited or self._stop.is_set():
                    raise

    def _first_unread(self) -> int | None:
        shelf = self._shelf
        while self._unread:
            use, group = self._unread[0]
            if use >= self._taken_uses and group not in shelf._charges and group not in self._failed:
                return group
            self._unread.popleft()
        return None

    def _charge(self, group: int, size: int) -> bool:
        """Makes room for the group that is needed next and charges it; False where that had to wait, and things may have changed."""
        shelf = self._shelf
        use = self._unread[0][0]
        while shelf.held_bytes + size > shelf.budget_bytes and shelf._charges:
            if self._may_plan(self._horizon):  # to drop the right one, its next use must be known
                return False
            dropped = self._farthest(use)
            if dropped is None:
                if use == self._taken_uses and self._pinned:  # the step that waits for it holds the place itself
                    self._crowded = True
                    self._changed.notify_all()
                self._changed.wait()
                return False
            del shelf._groups[dropped]
            shelf.held_bytes -= shelf._charges.pop(dropped)
        shelf._charges[group] = size
        shelf.held_bytes += size
        shelf.peak_bytes = max(shelf.peak_bytes, shelf.held_bytes)
        self._reading.add(group)
        self._unread.popleft()
        return True

    def _farthest(self, use: int) -> int | None:
        """The group whose next use after `use` is the farthest; None if that one must be waited for, as it is needed before, or in use. Of
        those without a next use, the least recently used that is free."""
        farthest, when, waited_for = None, use, False
        for group in self._shelf._groups:
            uses = self._uses.get(group, ())
            is_free = group not in self._pinned and not (uses and uses[0] < use)
            following = next((later for later in uses if later > use), None)
            if following is None:
                if is_free:
                    return group
                waited_for = True
            elif following > when:
                farthest, when = (group if is_free else None), following
        return None if waited_for else farthest

    def _may_plan(self, steps: int) -> bool:
        """Plans one more step, if there is one and no more than `steps` are planned and not begun."""
        if self._plan_ended or self._planned_steps - self._begun_steps >= steps:
            return False
        self._plan_step()
        return True

    def _plan_step(self) -> None:
        if self._plan_ended:
            return
        try:
            tag, ids = next(self._plan)
        except StopIteration:
            self._plan_ended = True
            return
        except BaseException as error:
            self._plan_ended, self._plan_failure = True, error
            return
        groups = np.searchsorted(self._split.group_offsets, ids, side="right") - 1  # (n,)
        self._steps.append((tag, ids, groups))
        self._planned_steps += 1
        for group in np.unique(groups).tolist():  # in the order in which _collect takes them
            self._uses.setdefault(group, deque()).append(self._planned_uses)
            self._unread.append((self._planned_uses, group))
            self._planned_uses += 1

    def _fail(self, group: int, error: BaseException) -> None:
        with self._changed:
            self._failed[group] = error
            self._reading.discard(group)
            self._shelf.held_bytes -= self._shelf._charges.pop(group, 0)
            self._changed.notify_all()


class Stopped(Exception):
    """A reading was stopped while a step waited for it."""


def in_order(split: Split, groups: Iterable[int]) -> Generator[Samples[int], None, None]:
    """The samples of each of these row groups, read ahead."""
    offsets = split.group_offsets
    plan = ((group, np.arange(offsets[group], offsets[group + 1], dtype=np.int64)) for group in groups)
    with closing(Shelf(split, IN_ORDER_BYTES).read(plan, horizon=2 * REMOTE_READERS)) as reading:
        yield from reading


_NOTHING = np.empty(0, np.uint8)


def _runs(sorted_groups: Ids, places: Ids) -> Iterator[tuple[int, Ids]]:
    """(group, its places) for each run of equal groups."""
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=-1))
    pieces = np.split(places, starts[1:]) if len(starts) else []
    for start, piece in zip(starts.tolist(), pieces, strict=True):
        yield int(sorted_groups[start]), piece
