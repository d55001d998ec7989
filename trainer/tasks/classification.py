"""Image classification: one label of several for each image. Made by `trainer.tasks.make`; trainer.tasks.multitask takes its parts for a
head of one label.

How a run evaluates (which samples, which rank) is the caller's; what the numbers look like is the report's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.batch import Targets
from dataio.loader import BAD
from dataio.schema import Target
from trainer.settings.tree import TaskConfig
from trainer.tasks.image import ImageTask
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.losses import cross_entropy_sum
from trainer.tasks.sums import SummedEvaluation, nothing_to_evaluate
from trainer.tasks.task import Evaluation, Result, Rows

LABEL_COLUMNS: Mapping[str, pa.DataType] = {
    "label": pa.int32(),
    "prediction": pa.int32(),
    "confidence": pa.float32(),  # probability of the prediction
    "loss": pa.float32(),  # cross-entropy
}


class Classification(ImageTask):
    """Cross-entropy over the classes; outputs are logits (n, classes)."""

    info = CLASSIFICATION
    columns = LABEL_COLUMNS

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        """ValueError where `targets` is not one target of one label of at least two classes."""
        super().__init__(config, targets, label_smoothing=label_smoothing)
        self._target = only_target(targets, kind="label", task="classification")
        if len(self._target.classes) < 2:
            raise ValueError(f"{len(self._target.classes)} classes cannot be told apart; a data set needs at least 2")

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        return cross_entropy_sum(outputs, targets[self._target.name], label_smoothing=self.label_smoothing)

    def evaluation(self, device: torch.device) -> Evaluation:
        return LabelEvaluation(self._target, device)

    def rows(self, outputs: Tensor, targets: Targets) -> Rows:
        return label_rows(outputs, targets[self._target.name])

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        return [{"predictions": best} for best in likeliest(outputs, self._target.classes, top=top)]

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return "  ".join(f"{best['class']} {100 * best['probability']:.1f} %" for best in answer["predictions"])


class LabelEvaluation(SummedEvaluation):
    """Mean cross-entropy, without smoothing, and the confusion matrix with what follows from it."""

    def __init__(self, target: Target, device: torch.device | str = "cpu") -> None:
        self._target, self._classes = target.name, len(target.classes)
        # (loss sum | confusion, row by row). float64 holds counts exactly up to 2**53, so that one all-reduce adds all of it.
        super().__init__(1 + self._classes**2, device)

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Targets) -> None:
        """(n, classes) logits of any float type; labels of -1 are not counted. n may be 0."""
        labels, logits = targets[self._target], outputs.double()
        self.sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=BAD)
        counted = labels != BAD
        cells = labels * self._classes + logits.argmax(1)
        # Quarantined samples add 0 to a cell that exists: dropping them would need their number, and so a wait.
        self.sums.scatter_add_(0, 1 + torch.where(counted, cells, 0), counted.double())

    def result(self) -> Result:
        sums = self.sums.cpu()
        confusion = sums[1:].long().view(self._classes, self._classes)  # (label, prediction)
        count = int(confusion.sum())
        if not count:
            raise nothing_to_evaluate()
        hits = confusion.diagonal().tolist()
        return Result(
            loss=float(sums[0]) / count,
            count=count,
            measures={"accuracy": sum(hits) / count},
            details={
                "per_class": [
                    class_score(hit, support=actual, predicted=claimed)
                    for hit, actual, claimed in zip(hits, confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
                ],
                "confusion": confusion.tolist(),
            },
        )


def class_score(hits: int, *, support: int, predicted: int) -> dict[str, Any]:
    """One class against the rest. A ratio whose denominator is 0 is 0."""
    return {
        "recall": hits / support if support else 0.0,
        "precision": hits / predicted if predicted else 0.0,
        "f1": 2 * hits / (support + predicted) if support + predicted else 0.0,
        "support": support,
    }


@torch.no_grad()
def label_rows(logits: Tensor, labels: Tensor) -> Rows:
    """What is recorded of (n, classes) and (n,). Mistakes are worse than right answers; the surest mistakes are the worst, the surest right
    answers the best."""
    logits = logits.double()
    predictions = logits.argmax(1)  # as the evaluation takes it, so that ties are the same
    confidence = logits.softmax(1).gather(1, predictions[:, None])[:, 0].float()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=BAD).float()
    sure = confidence.nan_to_num(0.0)
    return Rows(
        columns={"label": labels, "prediction": predictions, "confidence": confidence, "loss": losses},
        known=labels != BAD,
        badness=torch.where(labels != predictions, 2.0 + sure, 1.0 - sure).double(),
    )


def likeliest(logits: Tensor, classes: Sequence[str], *, top: int) -> list[list[dict[str, Any]]]:
    """For each of (n, classes) the `top` classes of the highest probability, in order."""
    probabilities = logits.float().softmax(dim=1).cpu()
    values, indices = probabilities.topk(min(top, len(classes)), dim=1)
    return [
        [{"class": classes[index], "probability": value} for index, value in zip(row, row_values, strict=True)]
        for row, row_values in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def only_target(targets: Sequence[Target], *, kind: str, task: str) -> Target:
    """The one target of that kind. ValueError where there is another or none."""
    if len(targets) == 1 and targets[0].kind == kind:
        return targets[0]
    there = ", ".join(f"{target.name} ({target.kind})" for target in targets) or "none"
    raise ValueError(
        f"task.name={task} learns one target of the kind {kind}; the data's targets are: {there}. "
        "Use --task.name auto, which follows the data, or convert the data with the one target that is to be learned"
    )
