"""The seam between a rank and what it is trained for: everything that a step, an evaluation and an export ask of a task.

`make_task` (trainer.tasks.make) builds the one that a run's settings and data call for. A task is made alike on every rank, holds no state
of the run, and draws no random number: what it computes is a function of its arguments. What is said of it without computing is its `info`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from trainer.settings.tree import ModelConfig
from trainer.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """An evaluated split."""

    loss: float  # mean over what was counted, without smoothing or learned weights
    count: int  # samples that have anything to be judged by; unreadable ones are not among them
    measures: Mapping[str, float]
    """By Measure.name, all that the task's info lists."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON for the report's panels: per_class, confusion, labels, heads, ..."""

    def entry(self) -> dict[str, Any]:
        """As the journal, the history and summary.json hold it."""
        measured = {f"test_{name}": value for name, value in self.measures.items()}
        return {"test_loss": self.loss, **measured, "test_count": self.count, **self.details}


class Evaluation(Protocol):
    """Adds up an evaluation without waiting for the device; exact over any number of ranks."""

    def update(self, outputs: Tensor, targets: Targets) -> None:
        """(n, outputs) of any float type; n may be 0."""
        ...

    def combine(self, rank: int, world_size: int) -> None:
        """Take in what the other ranks added up: a collective, after the last update, in the ranks' order."""
        ...

    def result(self) -> Result:
        """Waits for the device. ValueError where nothing was counted."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """What predictions.parquet says of samples: n of them, on the device."""

    columns: Mapping[str, Tensor]  # each (n,) or (n, k), as Task.columns declares them
    known: Tensor  # (n,) bool: has anything to be judged by
    badness: Tensor  # (n,) float64: where not all samples are kept, those of the largest are


class Task(Protocol):
    """What the model is trained to say of a sample."""

    info: TaskInfo
    targets: tuple[Target, ...]
    """Those of the data that it learns, in the order of the outputs."""
    outputs: int
    """Numbers that the model says of a sample."""
    columns: Mapping[str, pa.DataType]
    """Of predictions.parquet, beside id and key."""

    def build(self, model: ModelConfig, *, image_hw: tuple[int, int], seed: int) -> nn.Module:
        """The network on the CPU in float32, weights loaded, in train mode: (n, 3, H, W) -> (n, outputs). What the loss learns itself is a
        parameter of it."""
        ...

    def bind(self, model: nn.Module) -> None:
        """Take from `model`, which is on its device, what the loss needs of it."""
        ...

    def blank(self, count: int, device: torch.device) -> Targets:
        """Targets of the right shapes: for compiling ahead, counting work, and a rank without samples."""
        ...

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """A virtual rank's batch as the loss wants it, on the device, before it is cut into micro-batches."""
        ...

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        """() float32: the loss summed over the samples, of (n, outputs) float32 and prepared targets. What is not known adds 0."""
        ...

    def evaluation(self, device: torch.device) -> Evaluation: ...

    def rows(self, outputs: Tensor, targets: Targets) -> Rows:
        """Of (n, outputs) and targets as the loader gives them."""
        ...

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        """What the model says of each of n samples, as JSON: of a label the `top` likeliest classes."""
        ...

    def sentence(self, answer: Mapping[str, Any]) -> str:
        """An answer for people, on one line."""
        ...
