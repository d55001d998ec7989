"""The order of training on texts: batches of similar length, so that little is padded. A pure function, as dataio.order is.

The order of `dataio.order` is cut into windows of `sort_steps` steps. The samples of a window's steps, over all virtual ranks, are sorted
by their length and dealt out anew: each step gets texts that follow one another in length, which step gets which of them is drawn, and so
is which virtual rank of the step gets which text. So a step has as many samples as before, an epoch has each sample once, and nothing
depends on who carries which virtual rank. All virtual ranks of a step pad to the same length (`width`).

To know a window's samples, a rank computes the order of all virtual ranks in it. The lengths of all texts are held in memory, four bytes
each.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dataio.order import Ids, Order, permuted
from dataio.texts import padded

_HELD = 64
"""Windows that are remembered: a block of steps may take several, and is asked for once for each virtual rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthOrder(Order):
    """`Order` with the samples of `sort_steps` steps dealt out by length."""

    lengths: npt.NDArray[np.int32] = field(compare=False, repr=False)
    """(count,): the tokens of each text."""
    sort_steps: int = 1
    _windows: dict[tuple[int, int], "_Window"] = field(default_factory=dict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    """Of `_windows`: one thread plans reads while another makes batches."""

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        assert len(self.lengths) == self.count, (len(self.lengths), self.count)
        if self.sort_steps < 1:
            raise ValueError(f"data.sort_steps={self.sort_steps} is not positive; use 1 to sort nothing")

    def width(self, step: int) -> int:
        """To how many tokens the texts of the run's step `step` are padded, on all virtual ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        window, place = divmod(step_in_epoch, self.sort_steps)
        return self._window(epoch, window).widths[place]

    def lane(self, epoch: int, steps: range, virtual_rank: int) -> list[Ids]:
        assert 0 <= virtual_rank < self.virtual_ranks, virtual_rank
        assert 0 <= steps.start < steps.stop <= self.steps_per_epoch, steps
        places = (divmod(step, self.sort_steps) for step in steps)
        return [self._window(epoch, window).ids[place][virtual_rank] for window, place in places]

    def _window(self, epoch: int, window: int) -> "_Window":
        with self._lock:
            found = self._windows.get((epoch, window))
            if found is None:
                found = self._dealt(epoch, window)
                while len(self._windows) >= _HELD:
                    del self._windows[next(iter(self._windows))]
                self._windows[epoch, window] = found
            return found

    def _dealt(self, epoch: int, window: int) -> "_Window":
        first = window * self.sort_steps
        steps = range(first, min(first + self.sort_steps, self.steps_per_epoch))
        lanes = [Order.lane(self, epoch, steps, virtual_rank) for virtual_rank in range(self.virtual_ranks)]
        sizes = [[len(lane[place]) for lane in lanes] for place in range(len(steps))]
        if self.sort_steps == 1:
            ids = [[lane[0] for lane in lanes]]
        else:
            drawn = np.concatenate([part for lane in lanes for part in lane])
            ids = self._by_length(epoch, window, drawn, sizes)
        widths = [padded(max((int(self.lengths[part].max()) for part in parts if len(part)), default=1)) for parts in ids]
        return _Window(ids=ids, widths=widths)

    def _by_length(self, epoch: int, window: int, drawn: Ids, sizes: Sequence[Sequence[int]]) -> list[list[Ids]]:
        """The samples `drawn` for a window, sorted and dealt out to its steps and their virtual ranks, of which each has as many as
        before."""
        by_length = drawn[np.argsort(self.lengths[drawn], kind="stable")]  # equal ones stay in the order that was drawn
        turns = permuted(np.arange(len(sizes)), len(sizes), self._key(epoch, f"lengths {window}"))
        ids: list[list[Ids]] = [[] for _ in sizes]
        start = 0
        for place in turns.tolist():
            count = sum(sizes[place])
            step = by_length[start : start + count]
            start += count
            if count:
                step = step[permuted(np.arange(count), count, self._key(epoch, f"lengths {window} {place}"))]
            ids[place] = np.split(step, np.cumsum(sizes[place])[:-1])
        return ids


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Window:
    ids: list[list[Ids]]
    """For each step, for each virtual rank, its samples."""
    widths: list[int]
