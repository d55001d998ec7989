"""A learning rate range test (Smith 2017): a few steps of a run with a rate that grows from step to step, and the rate that its losses
speak for. trainer/find_rate.py calls it and draws the result.

One process does the steps, without Ray, on all virtual ranks in turn: the batches, augmentation, loss and step of the run. It keeps
nothing: the model that it has trained is thrown away.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch

from dataio.loader import Loader
from dataio.parquet import Dataset
from dataio.quarantine import BadSample, Quarantine
from trainer.learn.build import Learner, build_learner, class_counts_of, task_of
from trainer.learn.step import train_steps
from trainer.rank.worker import make_repeatable
from trainer.settings.spec import make_order
from trainer.settings.tree import RunConfig

SMOOTHING = 0.9
"""Weight of the losses before, in the smoothed loss."""
DIVERGED = 4.0
"""The test ends where the smoothed loss is this many times its lowest value so far."""
BELOW_LOWEST = 10.0
"""The rate that is picked is that of the lowest smoothed loss divided by this: a run stays there for long, the test for one step."""
FALLEN = 0.02
"""The smoothed loss has fallen if its lowest value is below its first by this fraction; what is less may be chance."""
FEWEST = 10
"""Losses that are needed to say anything."""

End = Literal["diverged", "not finite", "all steps done"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeTest:
    """What the steps showed."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """The finite ones, of as many of the first steps."""
    end: End

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The moving average of the losses, without the bias of its beginning."""
        mean, found = 0.0, []
        for number, loss in enumerate(self.losses, start=1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            found.append(mean / (1 - SMOOTHING**number))
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """The rates that the losses speak for."""

    rate: float
    """Of the lowest smoothed loss, divided by BELOW_LOWEST."""
    steepest: float
    """Where the smoothed loss falls fastest over the logarithm of the rate."""
    lowest: float
    is_bounded: bool
    """The loss had its lowest value before the last rate: with more, it would rise again."""


def growing_rates(first: float, last: float, steps: int) -> list[float]:
    """`steps` rates from `first` to `last`, each the same multiple of the one before."""
    return [first * (last / first) ** (number / (steps - 1)) for number in range(steps)]


def picked(tested: RangeTest) -> Picked:
    """ValueError if the losses speak for no rate."""
    smoothed = tested.smoothed
    if len(smoothed) < FEWEST:
        raise ValueError(
            f"the loss was {tested.end} after {len(smoothed)} steps, which say nothing; begin with a lower rate (--first), or look at the "
            "data and the loss"
        )
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    if lowest == 0 or smoothed[lowest] > smoothed[0] * (1 - FALLEN):
        raise ValueError(
            f"the smoothed loss never fell: {smoothed[0]:.4g} at first and {smoothed[lowest]:.4g} at its lowest; try other rates (--first, "
            "--last), more steps (--steps), or see whether the model can learn at all"
        )
    slopes = [(smoothed[at + 1] - smoothed[at - 1], at) for at in range(1, lowest)] or [(0.0, lowest)]
    return Picked(
        rate=tested.rates[lowest] / BELOW_LOWEST,
        steepest=tested.rates[min(slopes)[1]],
        lowest=tested.rates[lowest],
        is_bounded=lowest < len(tested.rates) - 1,
    )


def rounded(rate: float) -> float:
    """To two digits: the test knows no more."""
    return float(f"{rate:.1e}")


def range_test(
    config: RunConfig, dataset: Dataset, device: torch.device, rates: Sequence[float], *, threads: int, on_step: Callable[[int], None]
) -> RangeTest:
    """Train for a step at each rate. `config` has nothing left at auto. `on_step` is told the number of each step."""
    make_repeatable(threads)
    order = make_order(config, dataset)
    total = sum(split.count for split in dataset.manifest.splits.values())
    quarantine = Quarantine(config.data.max_bad_fraction, total)
    loader = Loader(
        dataset,
        config.data,
        order=order,
        virtual_ranks=range(order.virtual_ranks),
        device=device,
        seed=config.train.seed,
        threads=threads,
        on_bad=lambda bad: _left_out(quarantine, bad),
    )
    counts = class_counts_of(config, dataset)
    learner = build_learner(config, task_of(config, dataset.manifest), loader.shape, device, class_counts=counts)
    # What trains longest: with lp-ft everything, as after its first epochs.
    learner.set_trainable(config.model.lp_epochs if config.model.freeze == "lp-ft" else 0)
    stepper = learner.stepper(order=order)
    stepper.compile_ahead((3, *loader.shape))  # of images: a model of texts is not compiled

    def arrived() -> Generator[float, None, None]:
        with closing(loader.train(0, len(rates))) as batches:
            for stats in train_steps(
                stepper,
                batches,
                start_step=0,
                stop_step=len(rates),
                steps_per_epoch=order.steps_per_epoch,
                batch_count=order.batch_count,
                set_learning_rate=lambda step: set_rate(learner, rates[step]),
                device=device,
                sum_over_ranks=False,
            ):
                on_step(stats.steps_done)
                yield from (loss for _, loss in stats.losses)

    with closing(arrived()) as losses:
        return judged(rates, losses)


def judged(rates: Sequence[float], losses: Iterator[float]) -> RangeTest:
    """Take losses, in the order of the rates, until they diverge."""
    kept: list[float] = []
    lowest = math.inf
    for loss in losses:
        if not math.isfinite(loss):
            return RangeTest(rates=tuple(rates), losses=tuple(kept), end="not finite")
        kept.append(loss)
        smoothed = RangeTest(rates=tuple(rates), losses=tuple(kept), end="diverged").smoothed[-1]
        lowest = min(lowest, smoothed)
        if len(kept) >= FEWEST and smoothed > DIVERGED * lowest:
            return RangeTest(rates=tuple(rates), losses=tuple(kept), end="diverged")
    return RangeTest(rates=tuple(rates), losses=tuple(kept), end="all steps done")


def set_rate(learner: Learner, rate: float) -> float:
    """Set the backbone's rate, and those of head and blocks by their factors."""
    for group in learner.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    return rate


def _left_out(quarantine: Quarantine, bad: BadSample) -> None:
    quarantine.add(bad.key, bad.reason, bad.split, bad.sample_id)
