"""The interface of a task: everything that a step, an evaluation and an export need from it.

`make_task` (trainer.tasks.make) makes the task for a run's settings and data. Every rank makes the same task. A task holds no state of the
run and draws no random numbers: its results are functions of its arguments. Its `info` describes it to code that does not compute with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from trainer.settings.tree import ModelConfig
from trainer.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of evaluating a split."""

    loss: float  # mean over the counted samples, without smoothing or learned weights
    count: int  # samples with a known target; unreadable ones do not count
    measures: Mapping[str, float]
    """All measures that the task's info lists, by Measure.name."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON for the report's panels: per_class, confusion, labels, heads, ..."""

    def entry(self, split: str = "test") -> dict[str, Any]:
        """The format for the journal, the history and summary.json."""
        measured = {f"{split}_{name}": value for name, value in self.measures.items()}
        return {f"{split}_loss": self.loss, **measured, f"{split}_count": self.count, **self.details}


class Evaluation(Protocol):
    """Adds up an evaluation without waiting for the device. Exact for any number of ranks."""

    def update(self, outputs: Tensor, targets: Targets) -> None:
        """Add a batch. `outputs`: (n, outputs) of any float type; n may be 0."""
        ...

    def combine(self, rank: int, world_size: int) -> None:
        """Add what the other ranks have, in rank order. A collective, called after the last update."""
        ...

    def result(self) -> Result:
        """The result. Waits for the device. ValueError if nothing was counted."""
        ...


@runtime_checkable
class Parted(Protocol):
    """An Evaluation whose sums can be made independent of the number of ranks. One that computes everything from gathered rows is so
    without it."""

    def end_part(self) -> None:
        """What was updated since the last call is a part of the split: the same samples in the same batches for any number of ranks. Called
        after each part; then `combine` and `result` give the same bits however the parts were spread over ranks."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Rows of predictions.parquet for n samples, on the device."""

    columns: Mapping[str, Tensor]  # each (n,) or (n, k), as Task.columns declares them
    known: Tensor  # (n,) bool: the sample has a known target
    badness: Tensor  # (n,) float64: if not all samples are kept, those with the largest badness are


class Task(Protocol):
    """What the model learns to predict for a sample."""

    info: TaskInfo
    targets: tuple[Target, ...]
    """The data's targets that it learns, in the order of the outputs."""
    outputs: int
    """Number of model outputs per sample."""
    columns: Mapping[str, pa.DataType]
    """Columns of predictions.parquet besides id and key."""

    def build(self, model: ModelConfig, *, shape: tuple[int, ...], seed: int) -> nn.Module:
        """Build the network on the CPU in float32, in train mode, with its weights: (n, 3, H, W) or, of texts, (n, T) -> (n, outputs).
        `shape` is that of the data: (height, width) of the images, (tokens,) of the longest text. Anything that the loss itself learns is a
        parameter of the network."""
        ...

    def bind(self, model: nn.Module) -> None:
        """Take from `model`, which is on its device, what the loss needs."""
        ...

    def blank(self, count: int, device: torch.device) -> Targets:
        """Targets of the right shapes for `count` samples, for compiling ahead and for a rank without samples."""
        ...

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Convert a virtual rank's batch to the form that the loss takes, on the device, before it is cut into micro-batches."""
        ...

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The loss summed over the samples, () float32. `outputs`: (n, outputs) float32; `targets` are prepared. Unknown targets add 0."""
        ...

    def evaluation(self, device: torch.device) -> Evaluation: ...

    def rows(self, outputs: Tensor, targets: Targets) -> Rows:
        """Rows for predictions.parquet. `outputs`: (n, outputs); `targets` come from the loader."""
        ...

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        """The model's answer for each of n samples, as JSON. For a label it has the `top` most probable classes."""
        ...

    def sentence(self, answer: Mapping[str, Any]) -> str:
        """An answer as one line of text for people."""
        ...
