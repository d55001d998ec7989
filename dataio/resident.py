"""All samples of a split, decoded once and kept on the host or the device.

Called by the loader where `data.cache` is device or host; `decode_split` alone decodes a whole split for anyone. The codec decodes a
sample; the loader decides the order in which samples are used.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dataio.codecs.codec import Codec, Ids, Store
from dataio.fetch import Fetched
from dataio.parquet import Split
from dataio.quarantine import BadSample
from dataio.stream import in_order

T = TypeVar("T")
Columns = Mapping[str, npt.NDArray[Any]]
"""Target name -> (count, *shape)."""


class Resident:
    """All decoded samples of a split."""

    def __init__(
        self,
        split: Split,
        codec: Codec,
        report: Callable[[BadSample], None],
        device: torch.device,
        on_group: Callable[[], None] = lambda: None,
    ) -> None:
        started = time.perf_counter()
        self.codec = codec
        self._targets = {target.name: target.blank(split.count) for target in split.schema}
        with closing(codec):
            decoded = decode_split(split, codec, on_bad=report, targets=self._targets, on_group=on_group)  # (count, *row)
        self.held_bytes = decoded.nbytes
        self.groups_read = split.groups
        self.bytes_read = sum(split.group_bytes(group) for group in range(split.groups))
        self.waits_for_read = False
        self.read_wait_seconds = 0.0  # decode_seconds includes all reading
        self._store: Store = decoded
        if device.type == "cuda":
            self._store = torch.from_numpy(decoded).to(device)
            torch.cuda.synchronize(device)  # once, because other streams read it from now on
        self.decode_seconds = time.perf_counter() - started

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> "_Fetches[T]":
        return _Fetches(self._store, self._targets, plan)


class _Fetches(Generic[T]):
    def __init__(self, store: Store, targets: Columns, plan: Iterable[tuple[T, Ids]]) -> None:
        self._store, self._targets, self._plan = store, targets, plan

    def __iter__(self) -> Iterator[Fetched[T]]:
        for tag, ids in self._plan:
            targets = {name: column[ids] for name, column in self._targets.items()}
            yield Fetched(tag=tag, ids=ids, store=self._store, rows=ids, targets=targets)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def decode_split(
    split: Split,
    codec: Codec,
    *,
    on_bad: Callable[[BadSample], None],
    out: npt.NDArray[Any] | None = None,
    targets: Columns | None = None,
    groups: Iterable[int] | None = None,
    on_group: Callable[[], None] = lambda: None,
) -> npt.NDArray[Any]:
    """Decodes a whole split, or some of its row groups, into `out` ((count, *row); a new array of zeros if None), and returns it.

    Each sample is stored at its id. Targets go into `targets` by name, if given. Each bad sample is passed to `on_bad`, its row is zeroed,
    and all its targets are set to missing. The next row groups are read meanwhile. `on_group` is called when a row group is decoded.
    """
    if out is None:
        out = np.zeros((split.count, *codec.row.shape), codec.row.dtype)
    with closing(in_order(split, range(split.groups) if groups is None else groups)) as reading:
        for samples in reading:
            begin = int(samples.ids[0])
            place = slice(begin, begin + len(samples.ids))
            bad = codec.decode(samples.encoded, out[place])
            if targets is not None:
                for target in split.schema:
                    column = targets[target.name]
                    column[place] = samples.targets[target.name]
                    column[[begin + index for index, _ in bad]] = target.missing
            for index, reason in bad:
                on_bad(BadSample(key=samples.keys[index], reason=reason, split=split.name, sample_id=begin + index))
            on_group()
    return out
