"""What the number of training images decides: the steps of a run, what `data.remainder` and `optim.warmup_fraction` are if they are left at
auto, and whether warm-up and batch fit. One function, which the run (trainer.drive.start) and its dry run (trainer.drive.plan) both call.
Pure.
"""

import dataclasses
from collections.abc import Iterator, Set
from dataclasses import dataclass

from dataio.manifest import Manifest
from dataio.order import Order
from trainer.settings.fields import replaced
from trainer.settings.rules import validate
from trainer.settings.selection import about_selection, selected
from trainer.settings.spec import order_of, total_steps_of
from trainer.settings.tree import RunConfig

WARMUP_MOST = 0.3
"""The fraction of a run that a recipe's warm-up may take: what it is in the quickstart, which takes the most."""
GOOD_STEPS = 4
"""An epoch of fewer steps than this is told, and a batch that makes this many is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How long a run is on its data."""

    config: RunConfig
    """Nothing is left at auto that the number of images decides."""
    steps_per_epoch: int
    total_steps: int
    said: tuple[str, ...]
    """What the user should know, a line each."""


def length_of(config: RunConfig, manifest: Manifest, *, workers: int, from_recipes: Set[str] = frozenset(), is_new: bool = True) -> Length:
    """The length of the run with these settings on this data. `workers`: virtual ranks, if the settings name none. `from_recipes`: the
    settings that nobody but a shipped recipe has set (trainer.settings.cli). `is_new`: it was never started; one that was keeps what it
    was started with. ValueError if the settings do not fit the data."""
    order = order_of(config, manifest, workers)
    whole = config.train.epochs * order.steps_per_epoch
    total = total_steps_of(config, order.steps_per_epoch)
    config = replaced(config, "data.background", config.data.behind)  # of any number, but decided once too
    config = selected(replaced(config, "data.remainder", "spread" if order.spread else "last"), manifest)
    said: list[str] = [*about_selection(config, manifest)]
    optim = config.optim
    if optim.warmup_fraction < 0:
        is_too_long = "optim.warmup_steps" in from_recipes and optim.warmup_steps > round(WARMUP_MOST * whole)
        optim = dataclasses.replace(optim, warmup_fraction=WARMUP_MOST if is_new and is_too_long else 0.0)
        config = dataclasses.replace(config, optim=optim)
        if optim.warmup_fraction:
            said.append(
                f"the recipe's warm-up of {optim.warmup_steps} steps is made for longer runs; this one of {total} steps warms up for "
                f"{optim.warmup_of(total)} (optim.warmup_fraction={optim.warmup_fraction:g})"
            )
    if is_new:
        validate(config, workers=workers, total_steps=whole)
        said += _about_steps(config, order, total)
    return Length(config=config, steps_per_epoch=order.steps_per_epoch, total_steps=total, said=tuple(said))


def _about_steps(config: RunConfig, order: Order, total: int) -> Iterator[str]:
    if order.steps_per_epoch >= GOOD_STEPS or order.count < GOOD_STEPS * order.virtual_ranks:
        return
    fits = 1
    while 2 * fits * order.virtual_ranks * GOOD_STEPS <= order.count:
        fits *= 2
    steps = "1 step" if order.steps_per_epoch == 1 else f"{order.steps_per_epoch} steps"
    yield (
        f"data.batch_size={config.data.batch_size} makes {steps} an epoch of {order.count} images, {total} in all; "
        f"--data.batch-size {fits * order.virtual_ranks} makes {-(-order.count // (fits * order.virtual_ranks))} an epoch"
    )
