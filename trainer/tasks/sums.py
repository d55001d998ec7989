"""Base class for evaluations that consist of a few sums over the samples (classification.py, multitask.py)."""

import torch
import torch.distributed as dist
from torch import Tensor

GRID = 2.0**20
"""A part's sums become multiples of 1 / GRID. Sums of such numbers are exact below 2**33, and then their order does not matter."""


class SummedEvaluation:
    """Adds up on the device in float64, and adds the ranks' sums. A subclass defines what it adds (`update`) and the result (`result`)."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.sums: Tensor = torch.zeros(size, dtype=torch.float64, device=device)  # (size,)
        self._parts: Tensor | None = None  # (size,): the parts that have ended

    def end_part(self) -> None:
        """What was added since the last call is one part of the split (trainer.tasks.task.Parted). Counts stay as they are."""
        part = (self.sums * GRID).round() / GRID
        self._parts = part if self._parts is None else self._parts + part
        self.sums.zero_()

    def combine(self, rank: int, world_size: int) -> None:
        """Add the other ranks' sums: one all-reduce."""
        if self._parts is not None:
            self.sums += self._parts
        if world_size > 1:
            dist.all_reduce(self.sums)


def nothing_to_evaluate() -> ValueError:
    return ValueError(
        "nothing to evaluate: the test split has no readable sample; give data with a test split, or --data.test-fraction 0.1"
    )
