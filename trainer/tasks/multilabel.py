"""Multilabel classification: each image has any number of labels, and the model predicts each label with its own probability.
`trainer.tasks.make` makes the task; trainer.tasks.multitask uses its head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.schema import Target
from trainer.settings.tree import TaskConfig
from trainer.tasks.gathering import all_gather_rows, counts_of
from trainer.tasks.heads import HeadTask
from trainer.tasks.image import only_target
from trainer.tasks.info import MULTILABEL
from trainer.tasks.losses import UNKNOWN, labels_loss_sum, labels_losses
from trainer.tasks.sums import nothing_to_evaluate
from trainer.tasks.task import Result, Rows

_CELLS_AT_ONCE = 2**22
"""Number of scores that average precision sorts at a time: some 200 MB."""


class Multilabel(HeadTask):
    """Learns any number of labels; outputs are logits (n, labels)."""

    info = MULTILABEL

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        """ValueError unless `targets` is one target of kind `labels`."""
        target = only_target(targets, kind="labels", task="multilabel")
        super().__init__(config, LabelsHead(target, config, label_smoothing=label_smoothing), label_smoothing=label_smoothing)


class LabelsHead:
    """Binary cross-entropy or the asymmetric loss, averaged over a sample's known labels."""

    measures = MULTILABEL.measures

    def __init__(self, target: Target, config: TaskConfig, *, label_smoothing: float) -> None:
        """ValueError if the settings and the target do not fit together."""
        if not target.classes:
            raise ValueError(f"target {target.name} has no labels; convert the data with at least one")
        if config.loss == "asymmetric" and label_smoothing:
            raise ValueError(
                f"optim.label_smoothing={label_smoothing:g} does not go with task.loss=asymmetric, which weighs labels in its own way; "
                "use --optim.label-smoothing 0 or --task.loss bce"
            )
        self.target, self._config, self._label_smoothing = target, config, label_smoothing
        self.columns: Mapping[str, pa.DataType] = {
            "labels": pa.list_(pa.int8(), len(target.classes)),  # 1, 0, or -1 where unknown
            "probabilities": pa.list_(pa.float32(), len(target.classes)),
            "loss": pa.float32(),
        }

    def prepare(self, values: Tensor) -> Tensor:
        return values

    def knows(self, values: Tensor) -> Tensor:
        return (values != UNKNOWN).any(1)

    def loss_sum(self, outputs: Tensor, values: Tensor) -> Tensor:
        return labels_loss_sum(outputs, values, loss=self._config.loss, label_smoothing=self._label_smoothing)

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        return labels_losses(outputs.double(), values, loss=self._config.loss)

    def evaluation(self, device: torch.device) -> "LabelsEvaluation":
        return LabelsEvaluation(self, threshold=self._config.threshold, device=device)

    def score(self, measures: Mapping[str, float]) -> float:
        return measures["map"]

    @torch.no_grad()
    def rows(self, outputs: Tensor, values: Tensor) -> Rows:
        """A larger loss is worse."""
        losses = self.losses(outputs, values)
        return Rows(
            columns={
                "labels": torch.where(values == UNKNOWN, -1, values.to(torch.int8)),
                "probabilities": outputs.float().sigmoid(),
                "loss": losses.float(),
            },
            known=self.knows(values),
            badness=losses.nan_to_num(torch.inf),
        )

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        """The labels at or above the threshold, the most probable first, at most `top`."""
        classes, threshold = self.target.classes, self._config.threshold
        values, indices = outputs.float().sigmoid().cpu().topk(min(top, len(classes)), dim=1)
        given = is_given(outputs, threshold).sum(1).tolist()
        return [
            {"labels": [{"class": classes[i], "probability": value} for i, value in zip(few[:count], theirs[:count], strict=True)]}
            for few, theirs, count in zip(indices.tolist(), values.tolist(), given, strict=True)
        ]

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return "  ".join(f"{each['class']} {100 * each['probability']:.1f} %" for each in answer["labels"]) or "no label"


class LabelsEvaluation:
    """Each label's average precision, and its precision, recall and F1 at the threshold; their means; the share of exact matches.

    Average precision needs all scores. A rank keeps 5 bytes for each label of each of its samples (float32 logit, uint8 truth), and after
    `combine` those of all ranks: 500 MB for 100,000 samples of 1,000 labels. Everything is computed from these scores in the samples'
    order, which gives the same bits for any number of ranks and any batch size.
    """

    def __init__(self, head: LabelsHead, *, threshold: float, device: torch.device | str = "cpu") -> None:
        self._head, self._threshold = head, threshold
        labels = len(head.target.classes)
        self._logits = [torch.empty((0, labels), device=device)]  # each (n, K) float32
        self._labels = [torch.empty((0, labels), dtype=torch.uint8, device=device)]  # each (n, K)

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Targets) -> None:
        """`outputs`: (n, K) logits of any float type. Targets of 255 do not count. n may be 0."""
        self._logits.append(outputs.float())
        self._labels.append(targets[self._head.target.name])

    def combine(self, rank: int, world_size: int) -> None:
        """Gather all ranks' scores: two collectives of their full size."""
        if world_size > 1:
            logits, labels = torch.cat(self._logits), torch.cat(self._labels)
            counts = counts_of(len(logits), rank, world_size, logits.device)
            self._logits, self._labels = [all_gather_rows(logits, counts)], [all_gather_rows(labels, counts)]

    @torch.no_grad()
    def result(self) -> Result:
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        known, positive, given = labels != UNKNOWN, labels == 1, is_given(logits, self._threshold)
        is_counted = known.any(1)
        count = int(is_counted.sum())
        if not count:
            raise nothing_to_evaluate()
        losses = self._head.losses(logits, labels)
        right = ((given == positive) | ~known).all(1) & is_counted
        hits = (given & positive).sum(0).tolist()
        support, predicted = positive.sum(0).tolist(), (given & known).sum(0).tolist()
        precisions = average_precision(logits, labels).tolist()
        occurring = [index for index, there in enumerate(support) if there]
        f1 = [2 * hit / (there + said) if there + said else None for hit, there, said in zip(hits, support, predicted, strict=True)]
        return Result(
            loss=float(losses.sum()) / count,
            count=count,
            measures={
                "map": _mean([precisions[index] for index in occurring]),
                "micro_f1": 2 * sum(hits) / (sum(support) + sum(predicted)) if any(support) or any(predicted) else 0.0,
                "macro_f1": _mean([f1[index] or 0.0 for index in occurring]),
                "exact_match": int(right.sum()) / count,
            },
            details={
                "labels": [
                    {
                        "name": name,
                        "support": support[index],
                        "predicted": predicted[index],
                        "average_precision": precisions[index] if support[index] else None,
                        "precision": hits[index] / predicted[index] if predicted[index] else None,
                        "recall": hits[index] / support[index] if support[index] else None,
                        "f1": f1[index],
                        "threshold": self._threshold,
                    }
                    for index, name in enumerate(self._head.target.classes)
                ]
            },
        )


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Each label's average precision, (K,) float64 on the host; 0 for a label that no sample has. `scores`: (n, K); `labels`: (n, K) uint8,
    where 255 does not count.

    It is scikit-learn's definition without interpolation, the sum over thresholds of (R_n - R_{n-1}) P_n: the mean, over a label's samples,
    of the precision among all samples that score at least as high."""
    columns = max(1, _CELLS_AT_ONCE // max(1, len(scores)))
    parts = [
        _average_precision(scores[:, start : start + columns], labels[:, start : start + columns])
        for start in range(0, scores.shape[1], columns)
    ]
    return torch.cat(parts).cpu()


def _average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    n = len(scores)
    if not n:
        return torch.zeros(scores.shape[1], dtype=torch.float64)
    known = labels != UNKNOWN
    # Unknown labels go to the end, where they add to neither count.
    ranked, order = torch.where(known, scores, -torch.inf).sort(dim=0, descending=True)
    positive, counted = (labels == 1).gather(0, order), known.gather(0, order)
    hits, seen = positive.cumsum(0), counted.cumsum(0)
    # Equal scores form one threshold: each has the precision at the last of them.
    places = torch.arange(n, device=scores.device)[:, None]
    is_last = torch.cat([ranked[1:] != ranked[:-1], torch.ones_like(known[:1])])
    last = torch.where(is_last, places, n).flip(0).cummin(0).values.flip(0)
    precision = hits.gather(0, last).double() / seen.gather(0, last).clamp(min=1)
    return torch.where(positive, precision, 0.0).sum(0) / hits[-1].clamp(min=1)


def is_given(logits: Tensor, threshold: float) -> Tensor:
    """(n, K) bool: the labels that the model predicts."""
    return logits.float().sigmoid() >= threshold


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
