"""A real photograph in pieces: matplotlib's picture of Grace Hopper, 512x600 pixels in colour."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor


@cache
def photographs(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8 channels_last: different parts of it, from large to small ones."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    rng = np.random.default_rng(0)
    with Image.open(path) as whole:
        width, height = whole.size
        parts = []
        for number in range(count):
            edge = int(rng.integers(min(width, height) // 4, min(width, height)))
            left, top = int(rng.integers(width - edge + 1)), int(rng.integers(height - edge + 1))
            part = whole.resize((side, side), box=(left, top, left + edge, top + edge))
            parts.append(np.asarray(part) // (1 + number % 3))  # some are dark
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
