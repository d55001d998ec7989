"""Multitask learning: several targets per image, each with its head (one label, several labels or a number), on one backbone.
`trainer.tasks.make` makes the task.

One linear layer computes all outputs, and each head uses its own columns. A head is trained and evaluated like the task with that target
alone (trainer.tasks.heads). Unknown targets add nothing to any head's loss.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from trainer.models.vision import head_of
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.settings.values import loss_weights
from trainer.tasks.classification import LabelHead
from trainer.tasks.heads import Head
from trainer.tasks.image import ImageTask, outputs_of
from trainer.tasks.info import Measure, TaskInfo, measure_name
from trainer.tasks.multilabel import LabelsHead
from trainer.tasks.numbers import NumberHead
from trainer.tasks.sums import SummedEvaluation, nothing_to_evaluate
from trainer.tasks.task import Evaluation, Parted, Result, Rows

LOG_VARIANCES = "task_log_variances"
"""Name of the parameter for learned weights: (heads,), s = log(sigma ** 2) of each head. It belongs to the model's last layer."""
_OF_A_HEAD = {"accuracy", "map", "mae", "rmse", "r2"}
"""A head's measures that are also the task's measures. The others are only in the head's details."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A head's place in the outputs."""

    head: Head
    start: int
    stop: int
    weight: float
    """Weight of the head's loss; 1 if weights are learned."""

    @property
    def name(self) -> str:
        return self.head.target.name

    def of(self, outputs: Tensor) -> Tensor:
        """(n, all outputs) -> (n, the head's)."""
        return outputs[:, self.start : self.stop]

    @property
    def measures(self) -> Iterator[Measure]:
        return (measure for measure in self.head.measures if measure.name in _OF_A_HEAD)


class Multitask(ImageTask):
    """Learns several targets. A sample's loss is the weighted sum of the losses of its known heads."""

    def __init__(self, config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0) -> None:
        """ValueError if settings and targets do not fit together."""
        super().__init__(config, targets, label_smoothing=label_smoothing)
        self._is_learned = config.head_weights == "learned"
        self.parts = tuple(_parts(self.targets, config, label_smoothing))
        self.info = _info(self.parts, is_learned=self._is_learned)
        self.columns: Mapping[str, pa.DataType] = {
            **{f"{part.name}_{name}": kind for part in self.parts for name, kind in part.head.columns.items() if name != "loss"},
            "loss": pa.float32(),
        }
        self._log_variances: Tensor | None = None

    def build(self, model: ModelConfig, *, shape: tuple[int, ...], seed: int) -> nn.Module:
        built = super().build(model, shape=shape, seed=seed)
        if self._is_learned:
            _, layer = head_of(built)
            layer.register_parameter(LOG_VARIANCES, nn.Parameter(torch.zeros(len(self.parts))))
        return built

    def bind(self, model: nn.Module) -> None:
        if self._is_learned:
            (self._log_variances,) = (value for name, value in model.named_parameters() if name.endswith(f".{LOG_VARIANCES}"))

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        return samples, {**targets, **{part.name: part.head.prepare(targets[part.name]) for part in self.parts}}

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        """With fixed weights w: the sum of w L over the heads. With learned weights (Kendall et al. 2018, equation 10, s = log(sigma **
        2)): the sum of exp(-s) L + s / 2 over each sample's known heads. A number's Huber loss already includes the paper's factor of
        1/2."""
        losses = [part.head.loss_sum(part.of(outputs), targets[part.name]) for part in self.parts]
        if not self._is_learned:
            return torch.stack([part.weight * loss for part, loss in zip(self.parts, losses, strict=True)]).sum()
        assert self._log_variances is not None, "bind(model) comes before the first loss"
        terms = []
        for part, loss, log_variance in zip(self.parts, losses, self._log_variances, strict=True):
            count = part.head.knows(targets[part.name]).sum()
            terms.append(torch.exp(-log_variance) * loss + 0.5 * log_variance * count)
        return torch.stack(terms).sum()

    def evaluation(self, device: torch.device) -> Evaluation:
        return _PartsEvaluation(self, device)

    @torch.no_grad()
    def rows(self, outputs: Tensor, targets: Targets) -> Rows:
        """A larger loss is worse."""
        columns: dict[str, Tensor] = {}
        for part in self.parts:
            said = part.head.rows(part.of(outputs), targets[part.name]).columns
            columns |= {f"{part.name}_{name}": values for name, values in said.items() if name != "loss"}
        losses = self.losses(outputs, targets)
        return Rows(columns={**columns, "loss": losses.float()}, known=self.knows(targets), badness=losses.nan_to_num(torch.inf))

    def losses(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Each sample's loss, (n,) float64, without smoothing, and with weights of 1 if they are learned; `targets` as loaded."""
        return torch.stack([part.weight * part.head.losses(part.of(outputs), targets[part.name]) for part in self.parts]).sum(0)

    def knows(self, targets: Targets) -> Tensor:
        """(n,) bool: whether any target of a sample is known."""
        return torch.stack([part.head.knows(targets[part.name]) for part in self.parts]).any(0)

    def weights(self) -> list[float]:
        """The present factor of each head's loss. Waits for the device if weights are learned."""
        if self._log_variances is None:
            return [part.weight for part in self.parts]
        logs = self._log_variances.tolist()
        return [math.exp(-log) for log in logs]

    def answers(self, outputs: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        said = {part.name: part.head.answers(part.of(outputs), top=top) for part in self.parts}
        return [{"heads": {name: answers[index] for name, answers in said.items()}} for index in range(len(outputs))]

    def sentence(self, answer: Mapping[str, Any]) -> str:
        return "; ".join(f"{part.name}: {part.head.sentence(answer['heads'][part.name])}" for part in self.parts)


class _PartsEvaluation(SummedEvaluation):
    """Evaluates each head, and computes the joint loss and headline.

    The headline `score` is the mean over the heads of accuracy, mAP or R2 (for a number; 0 if negative). A head whose target is unknown in
    the whole split gets measures of NaN and does not count in the score.
    """

    def __init__(self, task: Multitask, device: torch.device) -> None:
        super().__init__(2, device)  # (sum of the samples' losses, number of samples with a known target)
        self._task = task
        self._evaluations = [part.head.evaluation(device) for part in task.parts]

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Targets) -> None:
        for part, evaluation in zip(self._task.parts, self._evaluations, strict=True):
            evaluation.update(part.of(outputs), targets)
        self.sums += torch.stack([self._task.losses(outputs, targets).sum(), self._task.knows(targets).sum().double()])

    def end_part(self) -> None:
        super().end_part()
        for evaluation in self._evaluations:
            if isinstance(evaluation, Parted):
                evaluation.end_part()

    def combine(self, rank: int, world_size: int) -> None:
        super().combine(rank, world_size)
        for evaluation in self._evaluations:
            evaluation.combine(rank, world_size)

    def result(self) -> Result:
        loss, count = self.sums.tolist()
        if not count:
            raise nothing_to_evaluate()
        found = [_result_or_none(evaluation) for evaluation in self._evaluations]
        scores = [part.head.score(result.measures) for part, result in zip(self._task.parts, found, strict=True) if result]
        measures = {"score": sum(scores) / len(scores)}
        for part, result in zip(self._task.parts, found, strict=True):
            for measure in part.measures:
                measures[measure_name(part.name, measure.name)] = result.measures[measure.name] if result else math.nan
        heads = {
            part.name: {"kind": part.head.target.kind, "weight": weight, **_described(part, result)}
            for part, weight, result in zip(self._task.parts, self._task.weights(), found, strict=True)
        }
        return Result(loss=loss / count, count=int(count), measures=measures, details={"heads": heads})


def _result_or_none(evaluation: Evaluation) -> Result | None:
    try:
        return evaluation.result()
    except ValueError:  # no sample has this head's target, but some have others
        return None


def _described(part: Part, result: Result | None) -> dict[str, Any]:
    if result is None:
        return {"loss": None, "count": 0, "measures": {}, "details": {}}
    # Nothing else in the summary names the rows of a head's confusion matrix.
    named = {"classes": list(part.head.target.classes)} if "confusion" in result.details else {}
    return {"loss": result.loss, "count": result.count, "measures": dict(result.measures), "details": {**result.details, **named}}


def _parts(targets: Sequence[Target], config: TaskConfig, label_smoothing: float) -> Iterator[Part]:
    weights, start = _weights(config, targets), 0
    for target in targets:
        stop = start + outputs_of(target)
        head = _head_for(target, config, label_smoothing)
        yield Part(head=head, start=start, stop=stop, weight=weights.get(target.name, 1.0))
        start = stop


def _head_for(target: Target, config: TaskConfig, label_smoothing: float) -> Head:
    match target.kind:
        case "label":
            return LabelHead(target, label_smoothing=label_smoothing)
        case "labels":
            return LabelsHead(target, config, label_smoothing=label_smoothing)
        case "number":
            return NumberHead(target)


def _weights(config: TaskConfig, targets: Sequence[Target]) -> Mapping[str, float]:
    weights = loss_weights(config.weights)
    unknown = [name for name in weights if name not in [target.name for target in targets]]
    if unknown:
        raise ValueError(
            f"task.weights={config.weights}: the data have no target {', '.join(unknown)}; they have "
            f"{', '.join(target.name for target in targets)}"
        )
    if weights and config.head_weights == "learned":
        raise ValueError(f"task.weights={config.weights} is not used with task.head_weights=learned; leave one of them out")
    return weights


def _info(parts: Sequence[Part], *, is_learned: bool) -> TaskInfo:
    measures = [Measure(name="score", title="Score")]
    owners: dict[str, str] = {}
    for part in parts:
        for measure in part.measures:
            name = measure_name(part.name, measure.name)
            if name in owners:
                raise ValueError(
                    f"the targets {owners[name]!r} and {part.name!r} would both be measured as {name}; rename one of them in the data"
                )
            owners[name] = part.name
            measures.append(
                Measure(name=name, title=f"{part.name} {measure.in_words}", unit=measure.unit, higher_is_better=measure.higher_is_better)
            )
    return TaskInfo(name="multitask", measures=tuple(measures), panels=("heads", "examples"), loss_floor=None if is_learned else 0.0)
