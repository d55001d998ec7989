"""A task from outside the packages (--task.name tests.trainer.toy_task:Toy): classes are steps of a scale, guessed as one number."""

import pyarrow as pa
import torch

from trainer.tasks.image import ImageTask, only_target
from trainer.tasks.info import Measure, TaskInfo
from trainer.tasks.sums import SummedEvaluation, nothing_to_evaluate
from trainer.tasks.task import Result, Rows


class Toy(ImageTask):
    info = TaskInfo(name="scale", measures=(Measure(name="within_one", title="Within one step"),), panels=("measures", "examples"))
    columns = {"step": pa.int32(), "guess": pa.float32(), "loss": pa.float32()}  # noqa: RUF012

    def __init__(self, config, targets, *, label_smoothing=0.0):
        super().__init__(config, targets, label_smoothing=label_smoothing)
        self.target = only_target(targets, kind="label", task="scale")
        self.outputs = 1

    def losses(self, outputs, targets):
        steps = targets[self.target.name]
        return torch.where(steps >= 0, self.guess(outputs) - steps, 0.0).square()

    def guess(self, outputs):  # from the middle of the scale
        return outputs[:, 0] + (len(self.target.classes) - 1) / 2

    def loss_sum(self, outputs, targets):
        return self.losses(outputs, targets).sum()

    def evaluation(self, device):
        return Within(self, device)

    def rows(self, outputs, targets):
        steps, losses = targets[self.target.name], self.losses(outputs.double(), targets)
        return Rows(columns={"step": steps, "guess": self.guess(outputs), "loss": losses}, known=steps >= 0, badness=losses)

    def answers(self, outputs, *, top):
        return [{"step": guess} for guess in self.guess(outputs).tolist()]

    def sentence(self, answer):
        return f"step {answer['step']:.1f} of {len(self.target.classes) - 1}"


class Within(SummedEvaluation):
    def __init__(self, task, device):
        super().__init__(3, device)  # loss, within one step, samples
        self.task = task

    def update(self, outputs, targets):
        losses, known = self.task.losses(outputs.double(), targets), targets[self.task.target.name] >= 0
        self.sums += torch.stack([losses.sum(), ((losses.sqrt() <= 1) & known).sum(), known.sum()])

    def result(self):
        loss, within, count = self.sums.tolist()
        if not count:
            raise nothing_to_evaluate()
        return Result(loss=loss / count, count=int(count), measures={"within_one": within / count})
