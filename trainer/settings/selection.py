"""What the data's splits decide of `train.select` and `train.patience`. The run and its dry run call it (trainer.settings.length); pure.

Without a validation split nothing chooses: the test split is no choice, as a number that chose the weights says too much of them.
"""

import dataclasses
from collections.abc import Iterator

from dataio.manifest import Manifest
from trainer.settings.tree import RunConfig

VALIDATION = "validation"


def has_validation(manifest: Manifest) -> bool:
    return VALIDATION in manifest.splits and manifest.splits[VALIDATION].count > 0


def watched_split(manifest: Manifest) -> str:
    """The split that evaluations during training read."""
    return VALIDATION if has_validation(manifest) else "test"


def selected(config: RunConfig, manifest: Manifest) -> RunConfig:
    """`config` with `train.select` decided. ValueError if the settings need a validation split that is not there."""
    if problem := problem_of_splits(config, manifest):
        raise ValueError(problem)
    select = config.train.select
    if select == "auto":
        select = "best" if has_validation(manifest) else "last"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, select=select))


def problem_of_splits(config: RunConfig, manifest: Manifest) -> str | None:
    """The settings that need a validation split that is not there, as text: the value, the rule, the fix."""
    train = config.train
    wants = [
        *(["train.select=best"] if train.select == "best" else []),
        *([f"train.patience={train.patience}"] if train.patience else []),
    ]
    if not wants or has_validation(manifest):
        return None
    return (
        f"{' and '.join(wants)} needs a validation split, and {config.data.path} has {', '.join(manifest.splits)}; hold one out of train "
        "with --data.validation-fraction 0.1 (converting the source anew), or add a folder val/"
    )


def about_selection(config: RunConfig, manifest: Manifest) -> Iterator[str]:
    """What the user should know of what the splits are for. `config` is decided."""
    if not has_validation(manifest):
        return
    train = config.train
    measure = f"by {train.select_measure}" if train.select_measure else "by the task's first measure"
    kept = f"its best epoch is kept ({measure})" if train.select == "best" else "the last weights are kept (train.select=last)"
    early = f", and {train.patience} evaluations without a better one end the run" if train.patience else ""
    yield f"the validation split is scored during training: {kept}{early}; the test split is read once, at the end"
