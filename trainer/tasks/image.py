"""What tasks on images have in common. A task, one of your own too, inherits what it does not care to say otherwise.

Left to the task: its info, its columns, the loss, the evaluation, the rows and the answers (trainer.tasks.task says what each is).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from trainer.models.vision import build_model
from trainer.settings.tree import ModelConfig, TaskConfig


class ImageTask:
    """A backbone by name with one linear layer of `outputs`: one for each class of a label, one for a number."""

    targets: tuple[Target, ...]
    outputs: int

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        self.config, self.targets, self.label_smoothing = config, tuple(targets), label_smoothing
        self.outputs = sum(outputs_of(target) for target in targets)

    def build(self, model: ModelConfig, *, image_hw: tuple[int, int], seed: int) -> nn.Module:
        return build_model(model, classes=self.outputs, seed=seed, image_hw=image_hw)

    def bind(self, model: nn.Module) -> None:
        """The loss needs nothing of the model."""

    def blank(self, count: int, device: torch.device) -> Targets:
        return {target.name: torch.from_numpy(target.blank(count)).zero_().to(device) for target in self.targets}

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        return samples, targets


def outputs_of(target: Target) -> int:
    """Numbers that a model says of it."""
    return 1 if target.kind == "number" else len(target.classes)
