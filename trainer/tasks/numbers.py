"""Regression of a number per image: the head for trainer.tasks.multitask. The model predicts (value - mean) / std, with mean and std from
the training split; people see everything in the target's own unit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.schema import Target
from trainer.tasks.gathering import all_gather_rows, counts_of
from trainer.tasks.info import Measure
from trainer.tasks.losses import huber_losses, huber_sum
from trainer.tasks.sums import nothing_to_evaluate
from trainer.tasks.task import Result, Rows


class NumberHead:
    """The Huber loss of the normalised value; one output."""

    measures: tuple[Measure, ...] = (
        Measure(name="mae", title="MAE", unit="number", higher_is_better=False),
        Measure(name="rmse", title="RMSE", unit="number", higher_is_better=False),
        Measure(name="r2", title="R²", unit="number"),
    )
    columns: Mapping[str, pa.DataType] = {"target": pa.float32(), "prediction": pa.float32(), "loss": pa.float32()}

    def __init__(self, target: Target) -> None:
        self.target = target
        self._scale = target.std or 1.0  # a constant target is only shifted

    def prepare(self, values: Tensor) -> Tensor:
        """NaN stays NaN."""
        return (values - self.target.mean) / self._scale

    def in_own_unit(self, outputs: Tensor) -> Tensor:
        """Outputs (n, 1) -> values in the target's unit, (n,) float64."""
        return outputs[:, 0].double() * self._scale + self.target.mean

    def knows(self, values: Tensor) -> Tensor:
        return ~values.isnan()

    def loss_sum(self, outputs: Tensor, values: Tensor) -> Tensor:
        return huber_sum(outputs[:, 0], values)

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        return huber_losses(outputs[:, 0].double(), self.prepare(values.double()))

    def evaluation(self, device: torch.device) -> "NumberEvaluation":
        return NumberEvaluation(self, device)

    def score(self, measures: Mapping[str, float]) -> float:
        return max(0.0, measures["r2"])

    @torch.no_grad()
    def rows(self, outputs: Tensor, values: Tensor) -> Rows:
        """A larger error is worse."""
        losses = self.losses(outputs, values)
        return Rows(
            columns={"target": values, "prediction": self.in_own_unit(outputs).float(), "loss": losses.float()},
            known=self.knows(values),
            badness=losses.nan_to_num(torch.inf),
        )

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        return [{"value": value} for value in self.in_own_unit(outputs).tolist()]

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return f"{answer['value']:.4g}"


class NumberEvaluation:
    """Mean absolute error, root mean squared error and R2, in the target's unit; the loss is the mean Huber loss of the normalised values.

    A rank keeps 8 bytes for each of its samples, and after `combine` those of all ranks. Everything is computed in the samples' order,
    which gives the same bits for any number of ranks and any batch size.
    """

    def __init__(self, head: NumberHead, device: torch.device | str = "cpu") -> None:
        self._head = head
        self._pairs = [torch.empty((0, 2), device=device)]  # each (n, 2) float32: the normalised prediction, the true value

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Targets) -> None:
        """`outputs`: (n, 1) of any float type. Targets of NaN do not count. n may be 0."""
        self._pairs.append(torch.stack([outputs[:, 0].float(), targets[self._head.target.name]], 1))

    def combine(self, rank: int, world_size: int) -> None:
        if world_size > 1:
            own = torch.cat(self._pairs)
            self._pairs = [all_gather_rows(own, counts_of(len(own), rank, world_size, own.device))]

    def result(self) -> Result:
        pairs = torch.cat(self._pairs)
        pairs = pairs[self._head.knows(pairs[:, 1])]
        said, true = pairs[:, :1], pairs[:, 1].double()
        if not len(true):
            raise nothing_to_evaluate()
        errors = self._head.in_own_unit(said) - true
        residual, spread = float(errors.square().sum()), float((true - true.mean()).square().sum())
        return Result(
            loss=float(self._head.losses(said, true).mean()),
            count=len(true),
            measures={
                "mae": float(errors.abs().mean()),
                "rmse": (residual / len(true)) ** 0.5,
                # If all values of the split are the same: 1 if every prediction is exact, else 0.
                "r2": 1 - residual / spread if spread else float(residual == 0),
            },
        )
