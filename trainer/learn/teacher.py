"""Distillation (Hinton et al. 2015): a finished model's answers are learned beside the labels. trainer.learn.build makes the Teacher and
the loss, trainer.learn.gradients asks the teacher for each virtual rank's batch, trainer.rank.teaching lets it remember a split whose
views never change.

Teacher and student see the same view of a sample, mixed and augmented ("patient and consistent", Beyer et al. 2022): the view is a pure
function of (seed, epoch, sample), and the teacher is in eval mode, so its answer is one too. A run that goes on gets the same bits.

The loss is (1 - w) * the run's own loss + w * T**2 * the divergence of the student's softened outputs from the teacher's: Kullback-Leibler
for a label, its mean over the labels for several, Huber for a number. It is 0 where both agree; T**2 keeps the size of the gradients as T
changes. A sample of which nothing is known, such as one that cannot be read, adds nothing.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataio.batch import Batch, Targets
from dataio.loader import BAD
from dataio.schema import Target
from trainer.export.model_folder import Exported, load_export
from trainer.learn.objectives import autocast_for
from trainer.models.vision import Preprocess
from trainer.runs.model_files import pinned_model
from trainer.tasks.image import outputs_of
from trainer.tasks.losses import UNKNOWN, huber_losses
from trainer.tasks.multitask import Multitask
from trainer.tasks.task import Task

SummedLoss = Callable[[Tensor, Targets], Tensor]
ANSWERS = "\0teacher"
"""Beside a batch's targets: (n, outputs) float32, the teacher's outputs. No target has such a name."""
MOST_REMEMBERED_BYTES = 1 << 30


class Teacher:
    """A model in eval mode that answers batches of the loader's samples."""

    def __init__(self, exported: Exported, task: Task, *, image_hw: tuple[int, int], device: torch.device, precision: str) -> None:
        """`task`: what is to be learned, of samples of `image_hw`. ValueError if the model does not answer that."""
        check_answers(exported.task, task)
        self._model, self._preprocess = exported.model, _fitting(exported, image_hw)
        self._autocast = autocast_for(device, precision)
        self._scale, self._shift = (part.to(device) for part in _to_students(exported.task, task))
        self._remembered: Tensor | None = None

    def answers(self, samples: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> (n, outputs) float32, in the student's units and without a graph."""
        with torch.no_grad(), self._autocast:
            outputs: Tensor = self._model(self._preprocess(samples))
        return outputs.float() * self._scale + self._shift

    def of(self, batch: Batch, samples: Tensor) -> Tensor:
        """The answers to `samples`, which is what became of the batch's own."""
        if self._remembered is None:
            return self.answers(samples)
        ids = torch.from_numpy(batch.ids).to(self._remembered.device)
        return self._remembered[ids]

    def remember(self, answers: Tensor) -> None:
        """From now on take the answers from here: (samples of the training split, outputs) float32, by sample id."""
        self._remembered = answers


def load_teacher(
    pinned: str, task: Task, *, image_hw: tuple[int, int], device: torch.device, precision: str, channels_last: bool
) -> Teacher:
    """The teacher that `train.teacher` names, with the hash of what it was (trainer.runs.model_files). ValueError if it is gone, is another
    model, or has not learned what `task` wants."""
    try:
        exported = load_export(pinned_model(pinned), device, channels_last=channels_last)
        teacher = Teacher(exported, task, image_hw=image_hw, device=device, precision=precision)
        _try(teacher, image_hw, device)
    except ValueError as error:
        raise ValueError(f"train.teacher: {error}") from error
    for parameter in exported.model.parameters():
        parameter.requires_grad = False
    return teacher


def try_teacher(pinned: str, task: Task, *, image_hw: tuple[int, int]) -> None:
    """ValueError that says why the model cannot teach `task`. On the CPU."""
    load_teacher(pinned, task, image_hw=image_hw, device=torch.device("cpu"), precision="fp32", channels_last=True)


def check_answers(teaches: Task, learns: Task) -> None:
    """ValueError unless the teacher's outputs stand for what is to be learned: the same targets, of the same classes in the same order."""
    ours, theirs = [_named(target) for target in learns.targets], [_named(target) for target in teaches.targets]
    if ours != theirs:
        raise ValueError(
            f"the teacher has learned {_told(teaches.targets)}, but the data have {_told(learns.targets)}; "
            "take a run that was trained on these targets, with the same classes"
        )
    wanted = sum(map(outputs_of, learns.targets))
    if (teaches.outputs, learns.outputs) != (wanted, wanted):
        raise ValueError(
            f"task.name={learns.info.name} has {learns.outputs} outputs and the teacher's task {teaches.outputs}, where the targets have "
            f"{wanted}; only tasks with one output for each class and number can be taught"
        )


def taught_loss(loss_sum: SummedLoss, task: Task, *, weight: float, temperature: float) -> SummedLoss:
    """`loss_sum` and the teacher's part, for batches with ANSWERS; for others `loss_sum` as it is."""

    def summed(outputs: Tensor, targets: Targets) -> Tensor:
        if ANSWERS not in targets:
            return loss_sum(outputs, targets)
        own = {name: values for name, values in targets.items() if name != ANSWERS}
        learned = divergence_sum(task, outputs, targets[ANSWERS], own, temperature=temperature)
        if weight == 1:
            return learned
        return (1 - weight) * loss_sum(outputs, own) + weight * learned

    return summed


def divergence_sum(task: Task, outputs: Tensor, answers: Tensor, targets: Targets, *, temperature: float) -> Tensor:
    """How far the outputs are from the teacher's, summed over the samples of which any target is known: () float32. Both (n, outputs);
    `targets` are prepared."""
    weights = [part.weight for part in task.parts] if isinstance(task, Multitask) else [1.0]
    counts = torch.stack([_knows(target, targets[target.name]) for target in task.targets]).any(0)  # (n,)
    start, total = 0, outputs.new_zeros(len(outputs))
    for target, weight in zip(task.targets, weights, strict=True):
        columns = slice(start, start := start + outputs_of(target))
        total = total + weight * _divergences(target, outputs[:, columns], answers[:, columns], temperature)
    return torch.where(counts, total, 0.0).sum()


def _divergences(target: Target, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of each sample, (n,). `student` and `teacher`: (n, outputs of the target)."""
    match target.kind:
        case "number":
            return huber_losses(student[:, 0], teacher[:, 0])
        case "label":
            softened, wanted = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
            return F.kl_div(softened, wanted, reduction="none", log_target=True).sum(1) * temperature**2
        case "labels":
            softened, wanted = student / temperature, teacher / temperature
            yes = wanted.sigmoid()
            # log p = -softplus(-x), log (1 - p) = -softplus(x)
            divergence = yes * (F.softplus(-softened) - F.softplus(-wanted)) + (1 - yes) * (F.softplus(softened) - F.softplus(wanted))
            return divergence.mean(1) * temperature**2


def _knows(target: Target, values: Tensor) -> Tensor:
    """(n,) bool: whether anything is known. `values` are prepared."""
    match target.kind:
        case "label":
            return values != BAD
        case "labels":
            return (values != UNKNOWN).any(1)
        case "number":
            return ~values.isnan()


def _to_students(teaches: Task, learns: Task) -> tuple[Tensor, Tensor]:
    """Factor and summand, (outputs,) each, that take the teacher's outputs to the student's units: of a number, each has learned
    (value - mean) / std with its own data's mean and std."""
    factors: list[float] = []
    summands: list[float] = []
    for theirs, ours in zip(teaches.targets, learns.targets, strict=True):
        if ours.kind == "number":
            factors.append((theirs.std or 1.0) / (ours.std or 1.0))
            summands.append((theirs.mean - ours.mean) / (ours.std or 1.0))
        else:
            factors += [1.0] * outputs_of(ours)
            summands += [0.0] * outputs_of(ours)
    return torch.tensor(factors), torch.tensor(summands)


def _fitting(exported: Exported, image_hw: tuple[int, int]) -> nn.Module:
    """The teacher's own preprocessing. If its images had another size, samples are brought to that; one that is not square takes what it
    gets."""
    height, width = exported.image_size
    if exported.image_size == image_hw or height != width or not isinstance(exported.preprocess, Preprocess):
        return exported.preprocess
    return exported.preprocess.resizing(height)


def _try(teacher: Teacher, image_hw: tuple[int, int], device: torch.device) -> None:
    """Ask it once, so that a size that does not fit fails before the first step."""
    blank = torch.zeros((1, 3, *image_hw), dtype=torch.uint8, device=device)
    try:
        teacher.answers(blank)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"the teacher does not take images of {image_hw[0]}x{image_hw[1]} pixels: {error}") from error


def _named(target: Target) -> tuple[str, str, tuple[str, ...]]:
    return target.name, target.kind, target.classes


def _told(targets: Sequence[Target]) -> str:
    return "; ".join(f"{target.name} ({target.kind}{_classes(target)})" for target in targets)


def _classes(target: Target) -> str:
    some = ", ".join(target.classes[:8])
    return f": {some}{', ...' if len(target.classes) > 8 else ''}" if target.classes else ""


def with_answers(targets: Targets, answers: Tensor) -> Targets:
    """Prepared targets, with the teacher's answers beside them."""
    return {**targets, ANSWERS: answers}
