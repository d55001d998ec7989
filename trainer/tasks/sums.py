"""Base class for evaluations that consist of a few sums over the samples (classification.py, multitask.py)."""

import torch
import torch.distributed as dist
from torch import Tensor


class SummedEvaluation:
    """Adds up on the device in float64, and adds the ranks' sums. A subclass defines what it adds (`update`) and the result (`result`)."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.sums: Tensor = torch.zeros(size, dtype=torch.float64, device=device)  # (size,)

    def combine(self, rank: int, world_size: int) -> None:
        """Add the other ranks' sums: one all-reduce."""
        if world_size > 1:
            dist.all_reduce(self.sums)


def nothing_to_evaluate() -> ValueError:
    return ValueError(
        "nothing to evaluate: the test split has no readable sample; give data with a test split, or --data.test-fraction 0.1"
    )
