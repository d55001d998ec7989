"""The tasks' losses, summed over the samples: the step divides. Pure functions of tensors, called by the heads.

An unknown target adds exactly 0 to the sum and to the gradient of its outputs.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.loader import BAD

LabelsLoss = Literal["bce", "asymmetric"]
UNKNOWN = 255
"""Value of a label that a sample may or may not have (dataio.schema, kind `labels`)."""
GAMMA_NEGATIVE, CLIP = 4, 0.05


def cross_entropy_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the samples, () float32. `logits`: (n, C); `labels`: (n,) int64, where -1 does not count. n may be 0."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=BAD, label_smoothing=label_smoothing)


def labels_losses(logits: Tensor, labels: Tensor, *, loss: LabelsLoss = "bce", label_smoothing: float = 0.0) -> Tensor:
    """Each sample's mean loss over its known labels, (n,) of the logits' type; 0 if none is known. `logits`: (n, K); `labels`: (n, K) uint8
    with 0, 1 and 255 (unknown).

    It is the mean and not the sum so that one learning rate fits data with five labels and with five thousand.
    """
    known = labels != UNKNOWN
    each = _LOSSES[loss](logits, torch.where(known, labels, 0).to(logits.dtype), label_smoothing)
    return torch.where(known, each, 0.0).sum(1) / known.sum(1).clamp(min=1)


def labels_loss_sum(logits: Tensor, labels: Tensor, *, loss: LabelsLoss = "bce", label_smoothing: float = 0.0) -> Tensor:
    """`labels_losses` summed over the samples, () float32."""
    return labels_losses(logits.float(), labels, loss=loss, label_smoothing=label_smoothing).sum()


def huber_sum(values: Tensor, true: Tensor) -> Tensor:
    """`huber_losses` summed over the samples, () float32. `values`: (n,); `true`: (n,), where NaN means unknown."""
    return huber_losses(values.float(), true).sum()


def huber_losses(values: Tensor, true: Tensor) -> Tensor:
    """Half the squared error up to an error of 1, and linear beyond (Huber 1964), so that no value has a larger gradient than an error of
    1. (n,) of the values' type; 0 where `true` is NaN."""
    known = ~true.isnan()
    errors = torch.where(known, values - torch.where(known, true, 0.0), 0.0)
    return F.huber_loss(errors, torch.zeros_like(errors), reduction="none")


def _binary(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy, (n, K). Smoothing moves both targets towards 1/2."""
    return F.binary_cross_entropy_with_logits(logits, positive * (1 - label_smoothing) + label_smoothing / 2, reduction="none")


def _asymmetric(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Asymmetric loss, (n, K): Ridnik et al. 2021, equations 5 to 7, with the paper's gamma+ = 0, gamma- = 4 and margin 0.05. For an absent
    label, p is lowered by the margin and the loss weighed by p ** 4, so that the many easy negatives hardly count."""
    assert not label_smoothing, "the task has refused this"
    shifted = (logits.sigmoid() - CLIP).clamp(min=0.0)
    absent = -(shifted**GAMMA_NEGATIVE) * torch.log1p(-shifted)
    return torch.where(positive > 0, F.softplus(-logits), absent)


_LOSSES: dict[LabelsLoss, Callable[[Tensor, Tensor, float], Tensor]] = {"bce": _binary, "asymmetric": _asymmetric}
