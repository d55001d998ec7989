"""Losses of the tasks, each summed over its samples: who divides by what is the step's. Pure functions of tensors."""

import torch.nn.functional as F
from torch import Tensor

from dataio.loader import BAD


def cross_entropy_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the samples, () float32; labels of -1 count for nothing. (n, C), (n,) int64; n may be 0."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=BAD, label_smoothing=label_smoothing)
