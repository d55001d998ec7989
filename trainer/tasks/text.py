"""Tasks on texts: what the tasks on images are, with a network that takes tokens. `trainer.tasks.make` makes them.

A task of your own on texts inherits from TextTask, as one on images does from ImageTask.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from trainer.settings.texts import check_libraries
from trainer.settings.tree import ModelConfig
from trainer.tasks.classification import Classification, LabelEvaluation
from trainer.tasks.image import ImageTask
from trainer.tasks.info import CLASSIFICATION, MULTILABEL, Measure
from trainer.tasks.multilabel import Multilabel
from trainer.tasks.multitask import Multitask
from trainer.tasks.task import Result

UNIT = "texts"
MCC = Measure(name="mcc", title="MCC", unit="number")


class TextTask(ImageTask):
    """An encoder with one linear layer of `outputs` outputs. The rest is as for images."""

    def build(self, model: ModelConfig, *, shape: tuple[int, ...], seed: int) -> nn.Module:
        check_libraries(f"model.name={model.name}", lora_rank=model.lora_rank)
        from trainer.models.text import build_text_model  # here: it imports transformers, which no run on images waits for

        return build_text_model(model, outputs=self.outputs, seed=seed, names=self.output_names)


class TextClassification(Classification, TextTask):
    """Learns one label of a text."""

    info = dataclasses.replace(CLASSIFICATION, unit=UNIT, measures=(*CLASSIFICATION.measures, MCC))

    def evaluation(self, device: torch.device) -> "TextLabelEvaluation":
        return TextLabelEvaluation(self.targets[0], device)


class TextMultilabel(Multilabel, TextTask):
    """Learns any number of labels of a text."""

    info = dataclasses.replace(MULTILABEL, unit=UNIT)


class TextMultitask(Multitask, TextTask):
    """Learns several targets of a text."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.info = dataclasses.replace(self.info, unit=UNIT)


class TextLabelEvaluation(LabelEvaluation):
    """With Matthews' correlation coefficient (Gorodkin 2004 for several classes), which text benchmarks report."""

    def result(self) -> Result:
        found = super().result()
        return dataclasses.replace(found, measures={**found.measures, MCC.name: mcc(found.details["confusion"])})


def mcc(confusion: list[list[int]]) -> float:
    """Matthews' correlation coefficient of a confusion matrix (label, prediction): 1 for all right, 0 for chance, and where only one class
    is tested or given. Counts are integers, so it is exact up to the last division."""
    total = sum(map(sum, confusion))
    right = sum(row[number] for number, row in enumerate(confusion))
    actual, claimed = [sum(row) for row in confusion], [sum(column) for column in zip(*confusion, strict=True)]
    covariance = right * total - sum(is_ * said for is_, said in zip(actual, claimed, strict=True))
    spread = (total**2 - sum(each**2 for each in claimed)) * (total**2 - sum(each**2 for each in actual))
    return covariance / math.sqrt(spread) if spread else 0.0
