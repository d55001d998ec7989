"""The samples of a split that does not stay decoded: each is decoded when a step needs it, from row groups that are read ahead.

Called by the loader where `data.cache` is none. stream.py decides what to read when, and what stays in memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

from dataio.codecs.codec import Codec, Ids, Store
from dataio.fetch import Fetched
from dataio.parquet import Split
from dataio.quarantine import BadSample
from dataio.stream import Reading, Shelf

T = TypeVar("T")


class Streamed:
    """Decodes the requested samples each time; holds row groups within `memory_bytes`."""

    def __init__(self, split: Split, codec: Codec, report: Callable[[BadSample], None], memory_bytes: int) -> None:
        self.shelf = Shelf(split, memory_bytes)
        self.codec, self.report = codec, report
        self.decode_seconds = 0.0
        self._decoded: Store = np.empty((0, *codec.row.shape), codec.row.dtype)

    def room(self, n: int) -> Store:
        """(n, *row), the same buffer each time: the batch has gathered its samples before it is reused. On a GPU that is the order of the
        stream, which is the one that this is called on: not that of the constructor."""
        if n > len(self._decoded):
            self._decoded = self.codec.room(n)
        return self._decoded[:n]

    @property
    def held_bytes(self) -> int:
        return self.shelf.held_bytes

    @property
    def groups_read(self) -> int:
        return self.shelf.groups_read

    @property
    def bytes_read(self) -> int:
        return self.shelf.bytes_read

    @property
    def waits_for_read(self) -> bool:
        return self.shelf.waits_for_read

    @property
    def read_wait_seconds(self) -> float:
        return self.shelf.wait_seconds

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> "_Fetches[T]":
        return _Fetches(self, self.shelf.read(plan, horizon=horizon))


class _Fetches(Generic[T]):
    def __init__(self, supply: Streamed, reading: Reading[T]) -> None:
        self._supply, self._reading = supply, reading

    def __iter__(self) -> Iterator[Fetched[T]]:
        supply, codec = self._supply, self._supply.codec
        split = supply.shelf.split
        started = time.perf_counter()
        codec.warm_up()  # while the first row groups are read
        for samples in self._reading:
            n = len(samples.ids)
            store = supply.room(n)
            for place, reason in codec.decode(samples.encoded, store):
                for target in split.schema:
                    samples.targets[target.name][place] = target.missing
                supply.report(BadSample(key=samples.keys[place], reason=reason, split=split.name, sample_id=int(samples.ids[place])))
            supply.decode_seconds += time.perf_counter() - started
            rows = np.arange(n, dtype=np.int64)
            yield Fetched(tag=samples.tag, ids=samples.ids, store=store, rows=rows, targets=samples.targets)
            started = time.perf_counter()

    def stop(self) -> None:
        self._reading.stop()

    def close(self) -> None:
        self._reading.close()
