"""What a run does about classes of unequal size: `data.balance` and `data.class_weights` on its data, decided once before the run has a
name, and what the user is told. Pure. Called by trainer.drive, which starts runs and dry runs; no torch.

The default trains as ever and warns. `auto` is decided by the training images alone, so that the same command means the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dataio.balance import Method, balance_of, balanced_weights, class_weights_of, imbalance_of, table_weights
from dataio.schema import Target
from trainer.settings.fields import replaced
from trainer.settings.tree import RunConfig
from trainer.settings.units import number
from trainer.settings.words import did_you_mean

PAYS: Method = "logit_adjustment"
"""What `auto` takes for unequal classes: the better one in benchmarks/results/learning.json."""
SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Balanced:
    """A run's settings with nothing left at auto about its classes, and what the user should know."""

    config: RunConfig
    said: tuple[str, ...] = ()


def asks_for_balance(config: RunConfig) -> bool:
    return config.data.balance != "none" or bool(config.data.class_weights)


def is_classification(config: RunConfig, targets: Sequence[Target]) -> bool:
    """Whether the run learns one label, as `task.name` and the data say."""
    return config.task.name in ("auto", "classification") and len(targets) == 1 and targets[0].kind == "label"


def check_balance(config: RunConfig, targets: Sequence[Target]) -> None:
    """ValueError if what is asked for does not fit the data's targets."""
    if not asks_for_balance(config):
        return
    data = config.data
    asked = f"data.class_weights={data.class_weights}" if data.class_weights else f"data.balance={data.balance}"
    if not is_classification(config, targets):
        kinds = [target.kind for target in targets]
        fix = (
            "--task.loss asymmetric gives rare labels more weight"
            if kinds == ["labels"]
            else "--task.weights weighs the targets"
            if len(kinds) > 1
            else "weigh the classes in your task's loss"
        )
        raise ValueError(f"{asked} is about the classes of one label, and this run learns something else; leave it out: {fix}")
    known = targets[0].classes
    for name in class_weights_of(data.class_weights):
        if name not in known:
            some = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise ValueError(f"data.class_weights names {name!r}, no class of the data;{did_you_mean(name, known)} they are {some}")


def balanced(config: RunConfig, targets: Sequence[Target], counts: Sequence[int]) -> Balanced:
    """Decide `auto`. `counts`: training images of each class; empty if nobody knows, which `auto` needs. ValueError as by
    `check_balance`."""
    check_balance(config, targets)
    if not is_classification(config, targets) or not counts:
        return Balanced(config=config)
    names, found = targets[0].classes, imbalance_of(counts)
    sizes = (
        f"the largest class ({names[found.largest]}) has {number(counts[found.largest])} training images, "
        f"{found.ratio:.3g} times those of the smallest ({names[found.smallest]}: {number(counts[found.smallest])})"
    )
    method = balance_of(config.data.balance)
    if method == "auto":
        method = PAYS if found.is_notable else "none"
        config = replaced(config, "data.balance", method)
        why = f"{sizes}; auto takes {PAYS} from 3 times on"
        return Balanced(config=config, said=(f"data.balance={method}: {why}",))
    if method == "weights" or config.data.class_weights:
        return Balanced(config=config, said=(_weights_told(weights_of(config, names, counts), names),))
    if method == "none" and found.is_notable:
        return Balanced(
            config=config,
            said=(
                f"warning: {sizes}. All images count alike, so small classes may be learnt poorly, and accuracy hides it: look at balanced "
                "accuracy; --data.balance auto makes up for it",
            ),
        )
    return Balanced(config=config)


def weights_of(config: RunConfig, names: Sequence[str], counts: Sequence[int]) -> list[float] | None:
    """The weight of each class in the training loss; None if all count alike there."""
    if config.data.class_weights:
        table = class_weights_of(config.data.class_weights)
        return table_weights([table.get(name, 1.0) for name in names], counts)
    return balanced_weights(counts) if config.data.balance == "weights" else None


def _weights_told(weights: Sequence[float] | None, names: Sequence[str]) -> str:
    assert weights is not None
    ordered = sorted(range(len(names)), key=lambda index: -weights[index])
    ends = ordered if len(ordered) <= 2 * SHOWN else [*ordered[:SHOWN], *ordered[-SHOWN:]]
    listed = [f"{names[index]} {weights[index]:.3g}" for index in ends]
    if len(ends) < len(ordered):
        listed.insert(SHOWN, "...")
    return f"weights of the classes in the training loss, with a mean of 1 over the images: {', '.join(listed)}"
