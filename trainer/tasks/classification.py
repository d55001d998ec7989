"""Image classification: one of several labels for each image. `trainer.tasks.make` makes the task; trainer.tasks.multitask uses its head.

The caller decides which samples a rank evaluates; trainer.report shows the numbers.
"""

import statistics
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
from trainer.tasks.heads import HeadTask
from trainer.tasks.image import only_target
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.losses import cross_entropy_sum
from trainer.tasks.sums import SummedEvaluation, nothing_to_evaluate
from trainer.tasks.task import Result, Rows

LABEL_COLUMNS: Mapping[str, pa.DataType] = {
    "label": pa.int32(),
    "prediction": pa.int32(),
    "confidence": pa.float32(),  # probability of the prediction
    "loss": pa.float32(),  # cross-entropy
}


class Classification(HeadTask):
    """Learns one label; outputs are logits (n, classes)."""

    info = CLASSIFICATION

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        """ValueError unless `targets` is one target of kind `label` with at least two classes."""
        target = only_target(targets, kind="label", task="classification")
        super().__init__(config, LabelHead(target, label_smoothing=label_smoothing), label_smoothing=label_smoothing)


class LabelHead:
    """Cross-entropy over the classes."""

    measures = CLASSIFICATION.measures
    columns = LABEL_COLUMNS

    def __init__(self, target: Target, *, label_smoothing: float) -> None:
        """ValueError if there are fewer than two classes."""
        if len(target.classes) < 2:
            only = "".join(f", {name!r:.60}" for name in target.classes)
            raise ValueError(
                f"target {target.name}: there is {'only one class' if only else 'no class'}{only}, and nothing to tell it from; "
                "a data set needs at least two: a folder for each"
            )
        self.target, self._label_smoothing = target, label_smoothing

    def prepare(self, values: Tensor) -> Tensor:
        return values

    def knows(self, values: Tensor) -> Tensor:
        return values != BAD

    def loss_sum(self, outputs: Tensor, values: Tensor) -> Tensor:
        return cross_entropy_sum(outputs, values, label_smoothing=self._label_smoothing)

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        return F.cross_entropy(outputs.double(), values, reduction="none", ignore_index=BAD)

    def evaluation(self, device: torch.device) -> "LabelEvaluation":
        return LabelEvaluation(self.target, device)

    def score(self, measures: Mapping[str, float]) -> float:
        return measures["accuracy"]

    @torch.no_grad()
    def rows(self, outputs: Tensor, values: Tensor) -> Rows:
        """Mistakes are worse than correct predictions. Confident mistakes are the worst, confident correct predictions the best."""
        logits = outputs.double()
        predictions = logits.argmax(1)  # (n,); the evaluation's rule, so that ties resolve alike
        confidence = logits.softmax(1).gather(1, predictions[:, None])[:, 0].float()  # (n,)
        sure = confidence.nan_to_num(0.0)
        return Rows(
            columns={"label": values, "prediction": predictions, "confidence": confidence, "loss": self.losses(outputs, values).float()},
            known=self.knows(values),
            badness=torch.where(values != predictions, 2.0 + sure, 1.0 - sure).double(),
        )

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        """The `top` most probable classes, in order."""
        classes = self.target.classes
        values, indices = outputs.float().softmax(dim=1).cpu().topk(min(top, len(classes)), dim=1)
        return [
            {"predictions": [{"class": classes[index], "probability": value} for index, value in zip(few, theirs, strict=True)]}
            for few, theirs in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return "  ".join(f"{best['class']} {100 * best['probability']:.1f} %" for best in answer["predictions"])


class LabelEvaluation(SummedEvaluation):
    """Mean cross-entropy without smoothing, and the confusion matrix with the measures that follow from it: accuracy; balanced accuracy,
    the mean recall of the classes that are tested; macro F1, the mean F1 of the classes that are tested or given."""

    def __init__(self, target: Target, device: torch.device | str = "cpu") -> None:
        self._target, self._classes = target.name, len(target.classes)
        # (loss sum | confusion matrix, row by row). float64 holds counts exactly up to 2**53, so one all-reduce adds everything.
        super().__init__(1 + self._classes**2, device)

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Targets) -> None:
        """`outputs`: (n, classes) logits of any float type. Labels of -1 do not count. n may be 0."""
        labels, logits = targets[self._target], outputs.double()
        self.sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=BAD)
        counted = labels != BAD
        cells = labels * self._classes + logits.argmax(1)
        # Quarantined samples add 0 to an existing cell: dropping them would need their number and hence a wait for the device.
        self.sums.scatter_add_(0, 1 + torch.where(counted, cells, 0), counted.double())

    def result(self) -> Result:
        sums = self.sums.cpu()
        confusion = sums[1:].long().view(self._classes, self._classes)  # (label, prediction)
        count = int(confusion.sum())
        if not count:
            raise nothing_to_evaluate()
        hits, actual, claimed = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
        scores = [class_score(hit, support=is_, predicted=said) for hit, is_, said in zip(hits, actual, claimed, strict=True)]
        return Result(
            loss=float(sums[0]) / count,
            count=count,
            measures={
                "accuracy": sum(hits) / count,
                "balanced_accuracy": statistics.fmean(score["recall"] for score in scores if score["support"]),
                "macro_f1": statistics.fmean(score["f1"] for score, said in zip(scores, claimed, strict=True) if score["support"] or said),
            },
            details={"per_class": scores, "confusion": confusion.tolist()},
        )


def class_score(hits: int, *, support: int, predicted: int) -> dict[str, Any]:
    """Scores of one class against the rest. A ratio with denominator 0 is 0."""
    return {
        "recall": hits / support if support else 0.0,
        "precision": hits / predicted if predicted else 0.0,
        "f1": 2 * hits / (support + predicted) if support + predicted else 0.0,
        "support": support,
    }
