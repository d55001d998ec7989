"""Whether a local storage has room for a run's checkpoints, found out before the run begins. Called by start.py.

A checkpoint holds weights, their average if there is one, the best so far if they are kept, and what the optimizer remembers. While one is
written, those that are kept stay, and each of its files needs twice its room (cluster.store).
"""

import os
from collections.abc import Callable
from typing import Literal

from cluster.spill import is_another_disk
from cluster.storage import Storage
from cluster.store import Store
from trainer.settings.tree import RunConfig
from trainer.settings.units import size


def check_room(storage: Storage, config: RunConfig, weights_bytes: int, tell: Callable[[str], None], *, resting_bytes: int = 0) -> None:
    """ValueError if not even one checkpoint fits; a line to `tell` if not all that are to be kept do. A remote storage has no such number.

    `weights_bytes`: of the model's parameters and buffers, of which those of `resting_bytes` are never trained."""
    if not storage.is_local:
        return
    state, keep = state_bytes(config, weights_bytes, resting_bytes), config.cluster.keep_checkpoints
    has_already = min(keep, len(Store.open(storage, config.run).commits()))
    found = os.statvfs(storage.root)
    free = found.f_bavail * found.f_frsize
    has_spill = is_another_disk(config.cluster.spill_dir, storage)
    match judge(free_bytes=free, state_bytes=state, keep=keep, has_already=has_already, has_spill=has_spill):
        case "refuse":
            raise ValueError(
                f"storage {storage.uri!r} has {size(free)} free, and a checkpoint of this run takes {size(state)}; free some space, or "
                "give a larger disk with --storage"
            )
        case "warn":
            tell(
                f"warning: storage {storage.uri} has {size(free)} free, and {keep} checkpoints of {size(state)} with one more being "
                f"written may need {size(needed_bytes(state, keep, has_already))}; free some space, or lower --cluster.keep-checkpoints"
            )


def judge(*, free_bytes: int, state_bytes: int, keep: int, has_already: int, has_spill: bool) -> Literal["enough", "warn", "refuse"]:
    """`has_already`: checkpoints of this run that are there and count among the kept ones. `has_spill`: another disk of the node takes what
    this one does not."""
    if free_bytes < state_bytes and not has_spill:
        return "refuse"
    return "enough" if free_bytes >= needed_bytes(state_bytes, keep, has_already) else "warn"


def needed_bytes(state_bytes: int, keep: int, has_already: int) -> int:
    """Room for the checkpoints that are still to come, and twice that of the one being written."""
    return state_bytes * (max(0, keep - has_already) + 2)


def state_bytes(config: RunConfig, weights_bytes: int, resting_bytes: int = 0) -> int:
    """Size of a checkpoint, from above: as if all parameters but those of `resting_bytes` were trained."""
    moments = 2 if config.optim.name == "adamw" else 1 if config.optim.momentum > 0 else 0
    copies = 1 + bool(config.train.ema) + (config.train.select == "best")
    return weights_bytes * copies + (weights_bytes - resting_bytes) * moments
