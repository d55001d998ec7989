"""The features that are measured. One line each: a name, the flags that switch it on, those that it is compared with (none: the task as it
is), and the tasks on which it could pay. To have another one measured, add a line."""

from dataclasses import dataclass

from benchmarks.learning.tasks import TASKS

EVERYWHERE = tuple(name for name in TASKS if name != "few")


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """A feature on and off. Both are flags of trainer.run, added to the task's own."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...] = ()
    tasks: tuple[str, ...] = EVERYWHERE
    whole_run: bool = False
    """It lives outside the step and the evaluation (early stopping, best weights): measured by `trainer.run`, which costs Ray's start."""
    teacher: tuple[str, ...] | None = None
    """The task's run with these flags is done before, and what is on learns from it (`train.teacher`)."""


FROM_SCRATCH = (
    *("--model.name", "mobilenet_v3_small", "--model.weights", "none", "--optim.lr", "0.1", "--optim.head-lr-factor", "1"),
    *("--train.epochs", "20"),
)
"""A small student that knows nothing yet."""

VALIDATED = ("--data.validation-fraction", "0.2", "--train.epochs", "20")
"""Some images choose an evaluation, in a run that is long enough to learn wrong labels by heart."""

LISTED = (
    Feature(name="balance_weights", on=("--data.balance", "weights"), tasks=("longtail", "folder")),
    Feature(name="logit_adjustment", on=("--data.balance", "logit_adjustment"), tasks=("longtail", "folder")),
    Feature(name="layer_decay_0.9", on=("--optim.layer-decay", "0.9")),
    Feature(name="layer_decay_0.75", on=("--optim.layer-decay", "0.75")),
    Feature(name="one_cycle", on=("--optim.schedule", "one-cycle", "--optim.warmup-steps", "0", "--optim.warmup-fraction", "0")),
    Feature(name="label_smoothing", on=("--optim.label-smoothing", "0.1"), off=("--optim.label-smoothing", "0")),
    Feature(name="ema", on=("--train.ema", "0.99")),
    Feature(name="lp_ft", on=("--model.freeze", "lp-ft")),
    Feature(name="resized_crop", on=("--data.crop", "resized", "--data.crop-scale", "0.35", "1")),
    Feature(name="trivial_augment", on=("--data.policy", "trivial")),
    Feature(name="jitter", on=("--data.jitter", "0.4", "0.4", "0.4", "0")),
    Feature(name="erase", on=("--data.erase", "0.25")),
    Feature(name="mixup", on=("--train.mixup", "0.2")),
    Feature(name="cutmix", on=("--train.cutmix", "1")),
    Feature(
        name="best_weights",
        on=(*VALIDATED, "--train.select", "best"),
        off=(*VALIDATED, "--train.select", "last"),
        tasks=("quickstart", "noise"),
        whole_run=True,
    ),
    Feature(
        name="distillation",
        on=(*FROM_SCRATCH, "--train.teacher-weight", "0.9", "--train.teacher-temperature", "2"),
        off=FROM_SCRATCH,
        teacher=("--model.image-size", "96", "--train.epochs", "4"),  # as the recipe: 88 % where the student alone has some 80
        tasks=("quickstart", "noise"),
    ),
    Feature(name="enlarged_to_96", on=("--model.image-size", "96"), off=("--model.image-size", "0"), tasks=("quickstart",)),
    Feature(name="250_steps", on=("--train.epochs", "40"), off=("--train.epochs", "20"), tasks=("few",)),
    Feature(name="500_steps", on=("--train.epochs", "80"), off=("--train.epochs", "20"), tasks=("few",)),
    Feature(name="1000_steps", on=("--train.epochs", "160"), off=("--train.epochs", "20"), tasks=("few",)),
    Feature(name="weight_decay", on=("--optim.weight-decay", "0.0005"), off=("--optim.weight-decay", "0")),
)
FEATURES = {feature.name: feature for feature in LISTED}
