"""Exact evaluation metrics: every sample counted once, on the device, over any number of ranks. Called by worker and `trainer.evaluate`.

A rank feeds its share of the test split to an `Evaluation`; the ranks' `tensors()` are added (one all-reduce); `result()` says the rest.
Who evaluates which samples, and what is done with the result, is the callers'. (The run's Prometheus metrics are `cluster.metrics`.)
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.optim import IGNORED_LABEL


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One class against the rest. A ratio whose denominator is 0 is 0."""

    recall: float
    precision: float
    f1: float
    support: int  # samples of this class


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """An evaluated split."""

    loss: float  # mean cross-entropy, without label smoothing
    accuracy: float  # top-1
    count: int  # samples; quarantined ones are not among them
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]  # [label][prediction]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            **asdict(self),
            "per_class": [asdict(score) for score in self.per_class],
            "confusion": [list(row) for row in self.confusion],
        }


class Evaluation:
    """Adds up loss and confusion matrix without waiting for the device."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self._classes = classes
        # (loss sum | confusion, row by row). float64 holds counts exactly up to 2**53, so that one all-reduce adds all of it.
        self._sums = torch.zeros(1 + classes * classes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """(n, classes) of any float type, (n,) int64; labels of -1 are not counted. n may be 0."""
        logits = logits.double()
        self._sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
        counted = labels != IGNORED_LABEL
        cells = labels * self._classes + logits.argmax(1)
        # Quarantined samples add 0 to a cell that exists: dropping them would need their number, and so a wait.
        self._sums.scatter_add_(0, 1 + torch.where(counted, cells, 0), counted.double())

    def tensors(self) -> Tensor:
        """(1 + classes**2,) float64 on the device, not a copy: add the other ranks' to it in place, then ask for the result."""
        return self._sums

    def result(self) -> EvalResult:
        """Waits for the device. ValueError where nothing was counted."""
        sums = self._sums.cpu()
        confusion = sums[1:].long().view(self._classes, self._classes)  # (label, prediction)
        count = int(confusion.sum())
        if not count:
            raise ValueError(
                "nothing to evaluate: the test split has no readable sample; give data with a test split, or --data.test-fraction 0.1"
            )
        hits = confusion.diagonal().tolist()
        support, predicted = confusion.sum(1).tolist(), confusion.sum(0).tolist()
        return EvalResult(
            loss=float(sums[0]) / count,
            accuracy=sum(hits) / count,
            count=count,
            per_class=tuple(
                ClassScore(
                    recall=hit / actual if actual else 0.0,
                    precision=hit / claimed if claimed else 0.0,
                    f1=2 * hit / (actual + claimed) if actual + claimed else 0.0,
                    support=actual,
                )
                for hit, actual, claimed in zip(hits, support, predicted, strict=True)
            ),
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )
