"""The training loss of a classification whose classes differ in size: cross-entropy with a weight for each class, or with adjusted logits.
Called by trainer.learn.build; trainer.settings.balance has decided which. Tests measure plain cross-entropy in any case.

The step divides by the global number of samples. Weights have a mean of 1 over the training images, so the learning rate fits as before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.balance import log_priors
from dataio.batch import Targets
from dataio.loader import BAD
from trainer.learn.own import SummedLoss
from trainer.settings.balance import asks_for_balance, check_balance, weights_of
from trainer.settings.tree import RunConfig
from trainer.tasks.task import Task


def balanced_loss(config: RunConfig, task: Task, counts: Sequence[int], device: torch.device) -> SummedLoss | None:
    """The loss that `data.balance` or `data.class_weights` asks for, summed over the samples whose label is known; None if neither does.
    `counts`: training images of each class. ValueError if that does not fit the task."""
    if not asks_for_balance(config):
        return None
    check_balance(config, task.targets)
    assert config.data.balance != "auto", "data.balance=auto is to be decided before (trainer.settings.balance)"
    (target,) = task.targets
    if len(counts) != len(target.classes):
        raise ValueError(f"data.balance={config.data.balance} needs the number of training images of each class; got {list(counts)}")
    if (weights := weights_of(config, target.classes, counts)) is not None:
        return _weighted(target.name, torch.tensor(weights, device=device), config.optim.label_smoothing)
    return _adjusted(task, torch.tensor(log_priors(counts), device=device))


def heaviest_of(config: RunConfig, task: Task, counts: Sequence[int]) -> float:
    """How many times an image of the class that counts most may count in the training loss; at least 1."""
    if not asks_for_balance(config):
        return 1.0
    weights = weights_of(config, task.targets[0].classes, counts) or [1.0] * len(counts)
    return max([1.0, *(weight for weight, count in zip(weights, counts, strict=True) if count)])


def _weighted(target: str, weights: Tensor, label_smoothing: float) -> SummedLoss:
    """`weights`: (C,) float32 on the device."""

    def loss_sum(outputs: Tensor, targets: Targets) -> Tensor:
        labels = targets[target]
        each = F.cross_entropy(outputs, labels, reduction="none", ignore_index=BAD, label_smoothing=label_smoothing)  # (n,)
        return (each * weights[labels.clamp(min=0)]).sum()

    return loss_sum


def _adjusted(task: Task, priors: Tensor) -> SummedLoss:
    """Menon et al. 2021, equation 10 with tau = 1: a rare class must win by a margin in training, and needs none afterwards. `priors`: (C,)
    float32, the logarithms of the classes' shares."""

    def loss_sum(outputs: Tensor, targets: Targets) -> Tensor:
        return task.loss_sum(outputs + priors, targets)

    return loss_sum
