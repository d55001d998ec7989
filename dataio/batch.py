"""The batch that a step gets. The loader makes it, the task (trainer.tasks) takes it apart; this file does not know what the data mean."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]
Targets = Mapping[str, torch.Tensor]
"""Target name -> tensor (n, ...) on the device; an unknown value is its kind's `missing` (dataio.schema)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one virtual rank sees in one step; n may be 0 in the last step of an epoch."""

    samples: torch.Tensor
    """On the device: images (n, 3, H, W) uint8 channels_last, a bad one is zeros; or texts (n, T) int32, padded to what this step needs."""
    targets: Targets
    ids: Ids  # (n,)
    epoch: int
    step: int
    """Global step; in evaluation, the batch's number."""
    virtual_rank: int
    unlabelled: "Batch | None" = None
    """What the virtual rank sees of the second stream in this step, if the run has one (data.unlabelled). Its epoch is that stream's
    own."""
