"""A head: one target's part of what a model says, and all that a task asks of it. Three kinds: one label (trainer.tasks.classification),
several labels (multilabel), a number (numbers).

A task of one target is its head (`HeadTask`); trainer.tasks.multitask puts several together.
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
    """`outputs` are the head's own, (n, k); `values` its target's."""

    target: Target
    measures: tuple[Measure, ...]
    columns: Mapping[str, pa.DataType]
    """Of predictions.parquet; the last is the loss."""

    def prepare(self, values: Tensor) -> Tensor:
        """As the loss wants them."""
        ...

    def knows(self, values: Tensor) -> Tensor:
        """(n,) bool: whether anything is known of the target."""
        ...

    def loss_sum(self, outputs: Tensor, values: Tensor) -> Tensor:
        """() float32, of prepared values."""
        ...

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        """(n,) float64 without smoothing, of values as the loader gives them; 0 where nothing is known."""
        ...

    def evaluation(self, device: torch.device) -> Evaluation: ...

    def score(self, measures: Mapping[str, float]) -> float:
        """From 0 to 1: how good an evaluation is."""
        ...

    def rows(self, outputs: Tensor, values: Tensor) -> Rows: ...

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]: ...

    def sentence(self, answer: Mapping[str, Any]) -> str: ...


class HeadTask(ImageTask):
    """A task of one target."""

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
