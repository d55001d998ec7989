"""A head: the part of a model's outputs for one target, with its loss, evaluation and predictions. There are three kinds: one label
(trainer.tasks.classification), several labels (multilabel), a number (numbers).

A task with one target wraps one head (`HeadTask`); trainer.tasks.multitask combines several.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.schema import Target
from trainer.settings.tree import TaskConfig
from trainer.tasks.image import ImageTask
from trainer.tasks.info import Measure
from trainer.tasks.task import Evaluation, Rows


class Head(Protocol):
    """What a task needs from a head. `outputs` are the head's own, (n, k); `values` are those of its target, (n,) or (n, labels)."""

    target: Target
    measures: tuple[Measure, ...]
    columns: Mapping[str, pa.DataType]
    """Columns of predictions.parquet; the last one is the loss."""

    def prepare(self, values: Tensor) -> Tensor:
        """`values` in the form that the loss takes."""
        ...

    def knows(self, values: Tensor) -> Tensor:
        """(n,) bool: whether anything is known about a sample's target."""
        ...

    def loss_sum(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Loss summed over the samples, () float32. `values` are prepared."""
        ...

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Each sample's loss without smoothing, (n,) float64; 0 if nothing is known. `values` come from the loader, unprepared."""
        ...

    def evaluation(self, device: torch.device) -> Evaluation: ...

    def score(self, measures: Mapping[str, float]) -> float:
        """How good an evaluation is, from 0 to 1."""
        ...

    def rows(self, outputs: Tensor, values: Tensor) -> Rows: ...

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]: ...

    def sentence(self, answer: Mapping[str, Any]) -> str: ...


class HeadTask(ImageTask):
    """A task with one target."""

    def __init__(self, config: TaskConfig, head: Head, *, label_smoothing: float) -> None:
        super().__init__(config, (head.target,), label_smoothing=label_smoothing)
        self._head = head
        self.columns = head.columns

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        return samples, {**targets, self._head.target.name: self._head.prepare(self._values(targets))}

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        return self._head.loss_sum(outputs, self._values(targets))

    def evaluation(self, device: torch.device) -> Evaluation:
        return self._head.evaluation(device)

    def rows(self, outputs: Tensor, targets: Targets) -> Rows:
        return self._head.rows(outputs, self._values(targets))

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        return self._head.answers(outputs, top=top)

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return self._head.sentence(answer)

    def _values(self, targets: Targets) -> Tensor:
        return targets[self._head.target.name]
