"""Rules about the settings of augmentation that concern several of them. trainer.settings.rules calls it; rules of one setting are at its
field."""

from collections.abc import Iterator

from dataio.config import DataConfig
from trainer.settings.tree import RunConfig

_BELONGS = {
    "crop_scale": ("crop", "resized"),
    "crop_ratio": ("crop", "resized"),
    "policy_ops": ("policy", "rand"),
    "policy_magnitude": ("policy", "rand"),
}
"""Settings that say more of another one, and the value that this one must have."""


def augments(data: DataConfig) -> bool:
    """Whether there is anything for `data.augment_backend` to do. Images without labels are always changed."""
    return bool(data.crop == "resized" or data.rotate or data.policy != "none" or any(data.jitter) or data.erase or data.unlabelled)


def augmentation_problems(config: RunConfig, *, batch_per_virtual_rank: int | None) -> Iterator[str]:
    """`batch_per_virtual_rank` is None where the number of virtual ranks is not known yet."""
    data, train, default = config.data, config.train, DataConfig()
    for name, (owner, needed) in _BELONGS.items():
        if getattr(data, name) != getattr(default, name) and getattr(data, owner) != needed:
            yield (
                f"data.{name} is set, but it belongs to data.{owner}={needed} and data.{owner}={getattr(data, owner)}; add "
                f"--data.{owner} {needed}, or leave it out"
            )
    if data.augment_backend == "dali" and not augments(data):
        yield (
            "data.augment_backend=dali does what data.crop=resized, rotate, policy, jitter and erase ask for, and none of them is on; turn "
            "one on, or leave it out (the library that crops and flips is data.backend)"
        )
    for name, alpha in (("mixup", train.mixup), ("cutmix", train.cutmix)):
        if alpha > 0 and batch_per_virtual_rank is not None and batch_per_virtual_rank < 2:
            yield (
                f"train.{name}={alpha:g} mixes the images of a virtual rank, but each has one image of a step; use a larger "
                f"data.batch_size, or --train.{name} 0"
            )
