"""What a step minimises: a forward pass and a summed loss. `trainer.learn.build` chooses the objective, and `trainer.learn.gradients` calls
it for each micro-batch.

An objective holds no state of the run and draws no random numbers. It is compiled together with the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataio.batch import Targets
from trainer.learn.own import SummedLoss
from trainer.tasks.task import Task

Forward = Callable[[Tensor], Tensor]
"""The model, possibly wrapped or compiled."""
Objective = Callable[[Forward, Tensor, Targets], Tensor]
"""(forward, samples from the loader, prepared targets) -> the loss summed over the samples, () float32 with its graph."""


def supervised(task: Task, preprocess: nn.Module, autocast: torch.autocast, loss: SummedLoss | None = None) -> Objective:
    """The task's own loss on labelled samples, or the `loss` that the user has put in its place."""
    loss_sum = loss or task.loss_sum

    def objective(forward: Forward, samples: Tensor, targets: Targets) -> Tensor:
        with autocast:
            outputs = forward(preprocess(samples))  # (n, task.outputs)
        return loss_sum(outputs.float(), targets)

    return objective


def autocast_for(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context of the forward pass: `fp32`, or `bf16` with float32 weights."""
    assert precision in ("fp32", "bf16"), f"precision {precision} is to be decided before (trainer.drive.capability)"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)
