"""What a step minimises: from a forward pass to a summed loss. `trainer.learn.build` chooses the objective, `trainer.learn.gradients` calls
it for each micro-batch.

An objective holds no state of the run and draws no random number. It is compiled with the model, so it is made once a run.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataio.batch import Targets
from trainer.tasks.task import Task

Forward = Callable[[Tensor], Tensor]
"""What the model's inputs go through: the model, wrapped or compiled."""
Objective = Callable[[Forward, Tensor, Targets], Tensor]
"""(forward, samples as the loader gives them, prepared targets) -> the loss summed over the samples, () float32 with its graph."""


def supervised(task: Task, preprocess: nn.Module, autocast: torch.autocast) -> Objective:
    """The task's own loss of the labelled samples."""

    def objective(forward: Forward, samples: Tensor, targets: Targets) -> Tensor:
        with autocast:
            outputs = forward(preprocess(samples))  # (n, task.outputs)
        return task.loss_sum(outputs.float(), targets)

    return objective


def autocast_for(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass's precision: `fp32`, or `bf16` with float32 weights."""
    assert precision in ("fp32", "bf16"), f"precision {precision} is to be decided before (trainer.drive.capability)"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)
