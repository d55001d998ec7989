"""Keeps outputs and targets of evaluated samples, from which confidence is calibrated (trainer.tasks.calibration), and applies the result
to outputs. trainer.rank.evaluation and trainer.rank.finished fill it; trainer.predict asks `calibrated_answers`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.loader import BAD
from trainer.tasks.calibration import Kind, Scores, Temperature
from trainer.tasks.gathering import counts_of, gather_rows
from trainer.tasks.heads import HeadTask
from trainer.tasks.image import outputs_of
from trainer.tasks.multitask import Multitask
from trainer.tasks.task import Task

MOST_SAMPLES = 100_000
MOST_LOGITS = 2**22
"""16 MB over all ranks. Of a larger split every n-th sample is kept: a temperature is one number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A head whose outputs are logits of probabilities, and its place in the outputs."""

    name: str
    kind: Kind
    start: int
    stop: int


def parts_of(task: Task) -> tuple[Part, ...]:
    """The task's heads that speak in probabilities: those of the built-in tasks for one or several labels. What the outputs of a task of
    your own mean is not known here."""
    return tuple(_parts(task)) if isinstance(task, HeadTask | Multitask) else ()


def _parts(task: Task) -> Iterator[Part]:
    start = 0
    for target in task.targets:
        stop = start + outputs_of(target)
        if target.kind != "number":
            yield Part(name=target.name, kind=target.kind, start=start, stop=stop)
        start = stop


class ScoreLog:
    """Outputs and targets of a split's samples, of every n-th if there are too many. It does not wait for the device."""

    def __init__(self, task: Task, count: int, device: torch.device | str = "cpu") -> None:
        """`count`: samples of the split."""
        self._parts = parts_of(task)
        most = max(1, min(MOST_SAMPLES, MOST_LOGITS // max(1, task.outputs)))
        self._each = max(1, -(-count // most))
        self._ids: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        self._outputs = [torch.empty((0, task.outputs), device=device)]  # each (n, outputs) float32
        self._targets: dict[str, list[Tensor]] = {part.name: [] for part in self._parts}

    def wanted(self, share: range) -> range:
        """The samples of `share` that are kept."""
        return share[-share.start % self._each :: self._each]

    @torch.no_grad()
    def update(self, ids: npt.NDArray[np.int64], outputs: Tensor, targets: Targets) -> None:
        """Add n samples; n may be 0."""
        if not self._parts:
            return
        kept = np.flatnonzero(ids % self._each == 0)
        rows = torch.from_numpy(kept).to(outputs.device, non_blocking=True)
        self._ids.append(ids[kept])
        self._outputs.append(outputs[rows].float())
        for part in self._parts:
            self._targets[part.name].append(targets[part.name][rows])

    def gathered(self, rank: int, world_size: int) -> dict[str, Scores] | None:
        """All ranks' scores by target, in the order of the samples, for rank 0; None for the others. A collective: all ranks call it."""
        if not self._parts:
            return {} if rank == 0 else None
        device = self._outputs[0].device
        ids = torch.from_numpy(np.concatenate(self._ids)).to(device)
        counts = counts_of(len(ids), rank, world_size, device)
        all_ids, outputs = gather_rows(ids, counts, rank), gather_rows(torch.cat(self._outputs), counts, rank)
        truths = {}
        for part in self._parts:
            truths[part.name] = gather_rows(self._truth(part, device), counts, rank)
        if all_ids is None or outputs is None:
            return None
        return {
            part.name: Scores(
                kind=part.kind, logits=outputs[:, part.start : part.stop].numpy(), truth=truth.numpy().astype(np.int64), ids=all_ids.numpy()
            )
            for part in self._parts
            if (truth := truths[part.name]) is not None
        }

    def _truth(self, part: Part, device: torch.device) -> Tensor:
        given = self._targets[part.name]
        if given:
            return torch.cat(given)
        shape = (0,) if part.kind == "label" else (0, part.stop - part.start)
        return torch.empty(shape, dtype=torch.int64 if part.kind == "label" else torch.uint8, device=device)


assert BAD < 0, "calibration takes a class below 0 as unknown"


def calibrated_answers(task: Task, outputs: Tensor, temperatures: Mapping[str, Temperature], *, top: int) -> Sequence[Mapping[str, Any]]:
    """`task.answers`, with the probabilities that the temperatures of its targets give. Which class or label is answered stays."""
    parts = [part for part in parts_of(task) if part.name in temperatures]
    scaled = outputs.float().clone()
    for part in parts:
        if part.kind == "label":
            scaled[:, part.start : part.stop] /= temperatures[part.name].value
    answers = task.answers(scaled, top=top)
    for part in parts:
        if part.kind == "labels":  # the threshold is one of uncalibrated probabilities
            for answer in answers:
                said = answer["heads"][part.name] if "heads" in answer else answer
                for label in said["labels"]:
                    label["probability"] = _tempered(label["probability"], temperatures[part.name].value)
    return answers


def _tempered(probability: float, temperature: float) -> float:
    if not 0 < probability < 1:
        return probability
    return 1 / (1 + math.exp(-math.log(probability / (1 - probability)) / temperature))
