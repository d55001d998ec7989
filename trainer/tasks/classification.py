"""Exact evaluation metrics: every sample counted once, on the device, over any number of ranks. Called by worker and `trainer.evaluate`.

A rank feeds its share of the test split to an `Evaluation`; the ranks' `tensors()` are added (one all-reduce); `result()` says the rest.
`Answers` keeps what each sample was answered, for `trainer.tasks.predictions`. Who evaluates which samples, and what is done with the
result,
is the callers'. (The run's Prometheus metrics are `cluster.metrics`.)
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dataio.loader import BAD


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
        self._sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=BAD)
        counted = labels != BAD
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


class Answers:
    """Keeps what each sample was answered, without waiting for the device: of all samples, or of more than `limit` the worst `limit`
    (mistakes, the surest first, then right answers, the least sure first)."""

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        self._limit = max(1, limit)
        self._ints = [torch.empty((0, 3), dtype=torch.int64, device=device)]  # (n, 3): id, label, answer
        self._floats = [torch.empty((0, 2), dtype=torch.float32, device=device)]  # (n, 2): confidence, loss
        self._held = 0

    @torch.no_grad()
    def update(self, ids: npt.NDArray[np.int64], logits: Tensor, labels: Tensor) -> None:
        """(n,), (n, classes), (n,) int64; a label of -1 stands for a sample that could not be read."""
        logits = logits.double()
        answers = logits.argmax(1)  # as Evaluation takes it, so that ties are the same
        confidence = logits.softmax(1).gather(1, answers[:, None])[:, 0]
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=BAD)
        self._ints.append(torch.stack([torch.from_numpy(ids).to(labels.device, non_blocking=True), labels, answers], 1))
        self._floats.append(torch.stack([confidence, losses], 1).float())
        self._held += len(ids)
        if self._held >= 2 * self._limit:
            self._cut()

    def gathered(self, rank: int, world_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """All ranks': (n, 3) id, label, answer and (n, 2) confidence, loss, on rank 0; None on the others. All ranks are to call
        it. Waits for the device."""
        self._cut()
        ints, floats = self._ints[0], self._floats[0]
        if world_size == 1:
            return ints.cpu().numpy(), floats.cpu().numpy()
        sizes = torch.zeros(world_size, dtype=torch.int64, device=ints.device)
        sizes[rank] = len(ints)
        dist.all_reduce(sizes)
        counts = sizes.tolist()
        parts = (self._from_all(ints, counts, rank), self._from_all(floats, counts, rank))
        return None if parts[0] is None or parts[1] is None else (parts[0].numpy(), parts[1].numpy())

    @staticmethod
    def _from_all(own: Tensor, counts: list[int], rank: int) -> Tensor | None:
        padded = own.new_zeros((max(counts), own.shape[1]))
        padded[: len(own)] = own
        everywhere = [torch.empty_like(padded) for _ in counts] if rank == 0 else None
        dist.gather(padded, everywhere, dst=0)
        return torch.cat([part[:count].cpu() for part, count in zip(everywhere, counts, strict=True)]) if everywhere else None

    def _cut(self) -> None:
        ints, floats = torch.cat(self._ints), torch.cat(self._floats)
        if len(ints) > self._limit:
            confidence = floats[:, 0].nan_to_num(0.0)
            badness = torch.where(ints[:, 1] != ints[:, 2], 2.0 + confidence, 1.0 - confidence)
            badness = torch.where(ints[:, 1] == BAD, -1.0, badness)
            worst = badness.sort(descending=True, stable=True).indices[: self._limit]
            ints, floats = ints[worst], floats[worst]
        self._ints, self._floats, self._held = [ints], [floats], len(ints)
