"""Which steps an attempt does, and what follows each of them. Pure. worker.py, saving.py, evaluation.py and observers.py read it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.settings.spec import total_steps_of
from trainer.settings.tree import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """The steps of a run, for an attempt that begins after `start_step` steps."""

    start_step: int
    total_steps: int
    """Steps of the whole run."""
    steps_per_epoch: int
    eval_every_epochs: int
    thaws: tuple[int, ...] = ()
    """Steps before which the set of trained parameters changes."""

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int, *, start_step: int = 0) -> "StepPlan":
        return cls(
            start_step=start_step,
            total_steps=total_steps_of(config, steps_per_epoch),
            steps_per_epoch=steps_per_epoch,
            eval_every_epochs=config.train.eval_every_epochs,
            thaws=(config.model.lp_epochs * steps_per_epoch,) if config.model.freeze == "lp-ft" else (),
        )

    def phases(self) -> Iterator[tuple[int, int]]:
        """(first step, one past the last) of each remaining phase. A phase ends where the set of trained parameters changes."""
        total = self.total_steps
        edges = [0, *(min(total, step) for step in self.thaws), total]
        for first, last in itertools.pairwise(edges):
            if max(first, self.start_step) < last:
                yield max(first, self.start_step), last

    def is_last(self, steps_done: int) -> bool:
        return steps_done == self.total_steps

    def ends_epoch(self, steps_done: int) -> bool:
        return steps_done % self.steps_per_epoch == 0

    def evaluates(self, steps_done: int) -> bool:
        """Whether an evaluation follows: after every `eval_every_epochs` epochs, and at the end."""
        epochs = steps_done // self.steps_per_epoch
        return self.is_last(steps_done) or (self.ends_epoch(steps_done) and epochs % self.eval_every_epochs == 0)
