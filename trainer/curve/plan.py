"""Which runs a curve is made of: the sizes, and the settings of a run of each size by a stated rule. Pure. __main__.py calls it.

The rule. A run on a part of the samples does fewer steps than one on all of them, though not in proportion, since fewer samples are seen
more often: the steps go with the square root of the samples, so a quarter of them is trained for half of the steps, twice as many epochs.
Warm-up and evaluations keep their share of the run. The batch stays, unless a size would make fewer than LEAST_STEPS steps an epoch: then
batch and rate are halved until it does. Everything else is as in the run on all samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.series.train import Member
from trainer.settings.fields import replaced
from trainer.settings.length import GOOD_STEPS
from trainer.settings.tree import RunConfig
from trainer.settings.units import number

LEAST_STEPS = GOOD_STEPS
MOST_RUNS = 1000
OF_ALL = {"run": "", "resume": "auto", "train.explain": 0, "train.novelty": 0, "train.ledger": False, "train.profile": False}
"""What the curve's runs do not take from the run's settings: none of it changes a result."""


def rule_words(unit: str) -> str:
    """The rule in words."""
    return f"steps go with the square root of the {unit}, warm-up and evaluations keep their share of a run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A run of the curve."""

    member: Member
    samples: int
    repeat: int
    """From 0. It chooses the samples (data.choice_seed) and the seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The settings of the runs of one size."""

    samples: int
    config: RunConfig
    steps: int


def sizes_of(parts: Sequence[float], whole: int, unit: str = "images") -> tuple[int, ...]:
    """Numbers of samples, from parts of the `whole` (up to 1) or numbers (above 1); each once, in order. ValueError for wrong ones."""
    sizes = set()
    for part in parts:
        if not (math.isfinite(part) and part > 0) or (part > 1 and part != int(part)):
            raise ValueError(
                f"--parts {part:g} is neither a fraction (above 0, up to 1) nor a whole number of {unit}; such as --parts 0.125 0.25 0.5 1"
            )
        samples = round(part * whole) if part <= 1 else int(part)
        if samples > whole:
            raise ValueError(f"--parts {part:g} asks for more than the {number(whole)} training {unit} that there are; leave it out")
        if samples < 2:
            raise ValueError(
                f"--parts {part:g} of {number(whole)} training {unit} is no {unit.removesuffix('s')} to learn from; give a larger part"
            )
        sizes.add(samples)
    return tuple(sorted(sizes))


def size_of(config: RunConfig, samples: int, *, whole: int, ranks: int, warmup_fraction: float) -> Size:
    """The runs on `samples` of the `whole`, whose run has the settings `config`, by the rule. `ranks`: virtual ranks. `warmup_fraction`: of
    the run on all samples. ValueError if the batch cannot be made small enough."""
    shorter = math.sqrt(samples / whole)  # steps, of those of the whole run
    values: dict[str, Any] = {**OF_ALL, "data.part": 1.0 if samples == whole else float(samples), "train.virtual_ranks": ranks}
    batch, rate = config.data.batch_size, config.optim.lr
    while -(-samples // batch) < LEAST_STEPS and batch % (2 * ranks) == 0:
        batch, rate = batch // 2, rate / 2
    if samples < ranks:
        raise ValueError(
            f"{samples} training samples do not go round {ranks} virtual ranks; give larger --parts, or fewer --train.virtual-ranks"
        )
    if samples < whole:
        values |= {"data.batch_size": batch, "optim.lr": rate}
        values |= {
            key: max(1, round(before / shorter))
            for key, before in (
                ("train.epochs", config.train.epochs),
                ("train.eval_every_epochs", config.train.eval_every_epochs),
                ("model.lp_epochs", config.model.lp_epochs),
            )
        }
        if config.train.max_steps:
            values["train.max_steps"] = max(1, round(config.train.max_steps * shorter))
    if warmup_fraction:
        values["optim.warmup_fraction"] = warmup_fraction
    made = config
    for key, value in values.items():
        made = replaced(made, key, value)
    steps = made.train.epochs * -(-samples // made.data.batch_size)
    return Size(samples=samples, config=made, steps=min(steps, made.train.max_steps or steps))


def planned(sizes: Sequence[Size], repeats: int) -> list[Planned]:
    """All runs, in the order in which they are done: each repeat from the largest size down, so that the first run that ends tells what a
    run on all samples takes, and an answer comes with each repeat. ValueError for too many."""
    if not 1 <= repeats * len(sizes) <= MOST_RUNS:
        raise ValueError(f"--repeats {repeats} of {len(sizes)} sizes makes no curve; 3 is the default, {MOST_RUNS} runs are the most")
    return [_one(size, repeat) for repeat in range(repeats) for size in sorted(sizes, key=lambda size: -size.samples)]


def _one(size: Size, repeat: int) -> Planned:
    config = size.config
    for key, before in (("train.seed", config.train.seed), ("data.choice_seed", config.data.choice_seed)):
        config = replaced(config, key, before + repeat)
    name = f"n{size.samples:07d}-r{repeat}"
    return Planned(member=Member(name=name, config=config, steps=size.steps), samples=size.samples, repeat=repeat)


def cost_lines(sizes: Sequence[Size], repeats: int, whole: int, unit: str = "images") -> list[str]:
    """What the curve costs, in steps."""
    runs = len(sizes) * repeats
    lines = [f"{runs} runs: {repeats} of each of {len(sizes)} sizes; {rule_words(unit)}"]
    lines += [
        f"  {number(size.samples):>9} {unit}: {number(size.config.train.epochs)} epochs in batches of {size.config.data.batch_size}, "
        f"{number(size.steps)} steps"
        for size in sizes
    ]
    total, largest = repeats * sum(size.steps for size in sizes), max(sizes, key=lambda size: size.samples)
    of_what = f"the run on all {unit}" if largest.samples == whole else f"a run on {number(largest.samples)} {unit}"
    lines.append(
        f"together {number(total)} steps, {total / largest.steps:.1f} times those of {of_what}, and the start and test of {runs} runs"
    )
    return lines
