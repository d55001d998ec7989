"""Defaults that tasks on images share. Every task, including your own, may inherit from ImageTask and override what it needs.

The task itself adds its info, columns, loss, evaluation, rows and answers (trainer.tasks.task defines them).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from trainer.models.vision import build_model
from trainer.settings.tree import ModelConfig, TaskConfig


class ImageTask:
    """A backbone by name with one linear layer of `outputs` outputs: one for each class of a label, one for a number."""

    targets: tuple[Target, ...]
    outputs: int

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        self.config, self.targets, self.label_smoothing = config, tuple(targets), label_smoothing
        self.outputs = sum(outputs_of(target) for target in targets)

    def build(self, model: ModelConfig, *, shape: tuple[int, ...], seed: int) -> nn.Module:
        height, width = shape
        return build_model(model, classes=self.outputs, seed=seed, image_hw=(height, width), names=self.output_names)

    @property
    def output_names(self) -> list[str] | None:
        """What each output stands for; None if nobody can say."""
        names = [name for target in self.targets for name in (target.classes or (target.name,))]
        return names if len(names) == self.outputs else None

    def bind(self, model: nn.Module) -> None:
        """Do nothing: the loss needs nothing from the model."""

    def blank(self, count: int, device: torch.device) -> Targets:
        return {target.name: torch.from_numpy(target.blank(count)).zero_().to(device) for target in self.targets}

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        return samples, targets


def outputs_of(target: Target) -> int:
    """Number of model outputs for the target."""
    return 1 if target.kind == "number" else len(target.classes)


def only_target(targets: Sequence[Target], *, kind: str, task: str) -> Target:
    """The only target, of the kind `kind`. ValueError if there is none, several, or one of another kind."""
    if len(targets) == 1 and targets[0].kind == kind:
        return targets[0]
    there = ", ".join(f"{target.name} ({target.kind})" for target in targets) or "none"
    raise ValueError(
        f"task.name={task} learns one target of the kind {kind}; the data's targets are: {there}. "
        "Use --task.name auto, which follows the data, or convert the data with the one target that is to be learned"
    )
