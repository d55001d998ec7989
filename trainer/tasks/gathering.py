"""Gathers rows from all ranks, in rank order, where ranks hold unequal numbers of rows. These are collectives: every rank must call them.
Called by the evaluations (multilabel.py, numbers.py) and prediction_log.py."""

import torch
import torch.distributed as dist
from torch import Tensor


def counts_of(count: int, rank: int, world_size: int, device: torch.device) -> list[int]:
    """Number of rows that each rank holds. Waits for the device."""
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)  # (ranks,)
    sizes[rank] = count
    if world_size > 1:
        dist.all_reduce(sizes)
    counts: list[int] = sizes.tolist()
    return counts


def gather_rows(own: Tensor, counts: list[int], rank: int) -> Tensor | None:
    """All ranks' rows, on the host, for rank 0; None for the other ranks. `own`: (rows of this rank, ...)."""
    if len(counts) == 1 or not max(counts):
        return own.cpu() if rank == 0 else None
    padded = _padded(own, max(counts))
    everywhere = [torch.empty_like(padded) for _ in counts] if rank == 0 else None
    dist.gather(padded, everywhere, dst=0)
    return torch.cat([part[:count].cpu() for part, count in zip(everywhere, counts, strict=True)]) if everywhere else None


def all_gather_rows(own: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows, on every rank's device. `own`: (rows of this rank, ...)."""
    if len(counts) == 1 or not max(counts):
        return own
    padded = _padded(own, max(counts))
    everywhere = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everywhere, padded)
    return torch.cat([part[:count] for part, count in zip(everywhere, counts, strict=True)])


def _padded(own: Tensor, count: int) -> Tensor:
    padded = own.new_zeros((count, *own.shape[1:]))
    padded[: len(own)] = own
    return padded
