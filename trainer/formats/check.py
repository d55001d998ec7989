"""Compares a model in another format with the model itself, on a whole split of the run's data: every image, or text, through both. Called
by trainer.formats.command, which refuses what is not the same.

The model is asked twice: in float32, which is what the format has to reproduce, and in the run's own precision, whose answers the run has
reported. Both see the same decoded images or the same tokens, so nothing but the format can differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.learn.gradients import evaluating
from trainer.learn.objectives import autocast_for
from trainer.rank.evaluation import EVALUATION_BATCH
from trainer.rank.finished import Opened
from trainer.runs.certainty import Interval, paired_interval
from trainer.tasks.info import Measure
from trainer.tasks.task import Result, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What a comparison found."""

    split: str
    unit: str
    """`images` or `texts`."""
    samples: int
    largest_difference: float
    """Of an output from the float32 model's, as a fraction of the largest output."""
    changed: int | None
    """Samples whose answer is not the float32 model's; None where an answer is a number, and nothing but the outputs can be compared."""
    changed_from_run: int | None
    """Samples whose answer is not the model's in the run's own precision."""
    precision: str
    result: Result
    """The format's."""
    own: Result
    """The float32 model's."""
    drop: Interval | None
    """The 95 % interval of how much of the headline is lost, float32 minus format; None if the headline is no share of the samples."""
    right: tuple[bool, ...] = ()
    """Whether the format's answer is right, by sample, of those with a known label; empty where answers are not right or wrong."""

    def to_json(self, headline: str) -> dict[str, Any]:
        return {
            "split": self.split,
            self.unit: self.samples,
            "largest_difference": self.largest_difference,
            "answers_changed": self.changed,
            f"answers_changed_from_{self.precision}": self.changed_from_run,
            headline: self.result.measures[headline],
            f"{headline}_of_the_model": self.own.measures[headline],
            **({f"{headline}_lost_95_percent": list(self.drop)} if self.drop else {}),
        }


@torch.inference_mode()
def compare(opened: Opened, ask: Callable[[Tensor], Tensor], *, on_batch: Callable[[int, int], None] = lambda done, of: None) -> Compared:
    """Ask both about every sample of the split. `ask`: images (n, 3, H, W) uint8, or texts (n, T) int32 -> (n, outputs). `on_batch` hears
    of samples done."""
    exported, task, device = opened.exported, opened.exported.task, opened.device
    theirs, own = task.evaluation(device), task.evaluation(device)
    largest = torch.zeros(())
    scale = torch.zeros(())
    changed = changed_from_run = done = 0
    only_theirs = only_own = known = 0
    rights: list[bool] = []
    decides = False
    precision = opened.config.train.precision
    with evaluating(exported.model):
        for batch in opened.loader.evaluate(opened.split, range(opened.count), batch_size=EVALUATION_BATCH):
            targets = opened.as_learned(batch.targets)
            prepared = exported.preprocess(batch.samples)
            expected = exported.model(prepared).float()  # (n, outputs)
            with autocast_for(device, precision):
                as_run = exported.model(prepared).float()
            given = ask(batch.samples).float()
            if given.shape != expected.shape:
                raise ValueError(f"the format gives outputs of the shape {tuple(given.shape)}, the model {tuple(expected.shape)}")
            theirs.update(given, targets)
            own.update(expected, targets)
            difference = (given - expected).abs().nan_to_num(torch.inf)
            largest, scale = torch.maximum(largest, difference.max()), torch.maximum(scale, expected.abs().max())
            said = decisions(task, given)
            decides = decides or any(map(is_decision, said))
            changed += sum(one != other for one, other in zip(said, decisions(task, expected), strict=True))
            changed_from_run += sum(one != other for one, other in zip(said, decisions(task, as_run), strict=True))
            if (right := right_of(task, given, targets)) is not None and (right_own := right_of(task, expected, targets)) is not None:
                only_theirs += int((right & ~right_own).sum())
                only_own += int((right_own & ~right).sum())
                known += len(right)
                rights += right.tolist()
            done += len(batch.ids)
            on_batch(done, opened.count)
    return Compared(
        split=opened.split,
        unit=opened.dataset.manifest.unit,
        samples=done,
        largest_difference=float(largest / scale) if float(scale) else float(largest),
        changed=changed if decides else None,
        changed_from_run=changed_from_run if decides else None,
        precision=precision,
        result=theirs.result(),
        own=own.result(),
        drop=paired_interval(only_own, only_theirs, known) if known else None,
        right=tuple(rights),
    )


def points_lost(own: float, found: float, measure: Measure) -> float:
    """By how many points `found` is worse than `own`; of a measure that is no ratio, by how many per cent. Negative: it is better."""
    gone = (own - found) * (1 if measure.higher_is_better else -1)
    return 100 * (gone if measure.unit == "ratio" else gone / abs(own) if own else gone)


def decisions(task: Task, outputs: Tensor) -> Sequence[Any]:
    """The answers without their probabilities: what somebody acts on."""
    return [_without_numbers(answer) for answer in task.answers(outputs, top=1)]


def is_decision(said: Any) -> bool:
    """Whether anything but a number was said."""
    match said:
        case Mapping():
            return any(map(is_decision, said.values()))
        case list():
            return any(map(is_decision, said))
    return said is not None


def _without_numbers(value: Any) -> Any:
    match value:
        case float():
            return None
        case Mapping():
            return {key: _without_numbers(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_numbers(each) for each in value]
    return value


def right_of(task: Task, outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor | None:
    """(n,) bool: whether the answer is right, of the samples with a known label; None if the task's answers are not right or wrong."""
    rows = task.rows(outputs, targets)
    if not {"label", "prediction"} <= set(rows.columns):
        return None
    right = rows.columns["label"] == rows.columns["prediction"]
    return right[rows.known]
