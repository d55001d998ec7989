"""What of a model's outputs an explanation is about. Called by trainer.rank.explain and trainer.predict; trainer.models.cam finds where in
the image it comes from."""

import torch
from torch import Tensor

from trainer.tasks.score_log import parts_of
from trainer.tasks.task import Task


def answer_score(task: Task, outputs: Tensor, answers: Tensor | None = None) -> Tensor:
    """(n, outputs) -> (n,): how strongly the model says what it says. Of a label, the logit of the answer, or that of the class in
    `answers`, (n,). Of several labels, the logits of those above 0, or of the most probable. Several targets add up; a number has no
    strength and counts only where there is nothing else. Of a task of your own it is the largest output."""
    outputs = outputs.float()
    if answers is not None:
        return outputs.gather(1, answers[:, None])[:, 0]
    scores = []
    for part in parts_of(task):
        logits = outputs[:, part.start : part.stop]
        top = logits.amax(1)
        scores.append(top if part.kind == "label" else torch.where(top > 0, logits.clamp(min=0).sum(1), top))
    return torch.stack(scores).sum(0) if scores else outputs.amax(1)
