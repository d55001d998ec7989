"""Records each evaluated sample's prediction until rank 0 writes the file (trainer.tasks.predictions). trainer.rank.evaluation and
trainer.rank.finished fill it.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from trainer.tasks.gathering import counts_of, gather_rows
from trainer.tasks.predictions import Recorded
from trainer.tasks.task import Rows

_IDS, _BADNESS = 0, 1


class PredictionLog:
    """Holds the rows of all samples, or the worst `limit` if there are more. It does not wait for the device before it is full."""

    def __init__(self, columns: Mapping[str, pa.DataType], limit: int, device: torch.device | str = "cpu") -> None:
        """`columns` as the task declares them: numbers, or fixed-size lists of numbers."""
        self._limit = max(1, limit)
        self._names = tuple(columns)
        # Ids, badness (-inf if nothing is known), then the columns; each is a list of parts, one per batch.
        empty = [torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), *(_empty(kind) for kind in columns.values())]
        self._parts = [[part.to(device)] for part in empty]
        self._held = 0

    @torch.no_grad()
    def update(self, ids: npt.NDArray[np.int64], rows: Rows) -> None:
        """Add n samples; n may be 0."""
        badness = torch.where(rows.known, rows.badness.double(), -torch.inf)
        held = torch.from_numpy(ids).to(badness.device, non_blocking=True)
        new = [held, badness, *(rows.columns[name] for name in self._names)]
        for parts, part in zip(self._parts, new, strict=True):
            parts.append(part.to(parts[0].dtype))
        self._held += len(ids)
        if self._held >= 2 * self._limit:
            self._cut()

    def gathered(self, rank: int, world_size: int) -> Recorded | None:
        """All ranks' known rows, for rank 0; None for the others. A collective: all ranks call it. Waits for the device."""
        parts = self._cut()
        is_known = parts[_BADNESS] != -torch.inf
        own = [part[is_known] for part in (parts[_IDS], *parts[_BADNESS + 1 :])]
        counts = counts_of(len(own[0]), rank, world_size, own[0].device)
        everything = [gather_rows(part, counts, rank) for part in own]
        if rank != 0:
            return None
        ids, *columns = (part.numpy() for part in everything if part is not None)
        return Recorded(ids=ids, columns=dict(zip(self._names, columns, strict=True)))

    def _cut(self) -> list[Tensor]:
        whole = [torch.cat(parts) for parts in self._parts]
        if len(whole[_IDS]) > self._limit:
            worst = whole[_BADNESS].sort(descending=True, stable=True).indices[: self._limit]
            whole = [part[worst] for part in whole]
        self._parts, self._held = [[part] for part in whole], len(whole[_IDS])
        return whole


def _empty(kind: pa.DataType) -> Tensor:
    """An empty tensor, (0,) or (0, k), of the type in which a column is written."""
    is_list = pa.types.is_fixed_size_list(kind)
    number = kind.value_type if is_list else kind
    return torch.from_numpy(np.empty((0, kind.list_size) if is_list else 0, number.to_pandas_dtype()))
