"""The operations of TrivialAugment and RandAugment and their magnitudes, exactly torchvision's (transforms.v2: TrivialAugmentWide with its
31 bins, RandAugment with 31). Pure; called by draws and views.

TrivialAugment (Müller and Hutter 2021) draws one operation and one bin for an image. RandAugment (Cubuk et al. 2019) draws several
operations, all at the bin that the settings name.
"""

from enum import IntEnum
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Policy = Literal["trivial", "rand"]
BINS = 31


class Op(IntEnum):
    """In torchvision's order."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOUR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERISE = 10
    SOLARISE = 11
    AUTOCONTRAST = 12
    EQUALISE = 13


SIGNED = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.BRIGHTNESS, Op.COLOUR, Op.CONTRAST, Op.SHARPNESS)
"""These go one way or the other, with probability one half each."""


@cache
def magnitudes(policy: Policy, height: int, width: int) -> npt.NDArray[np.float64]:
    """(operations, BINS): how strong each operation is in each bin, for images of this size. 0 where an operation has no strength. Shears
    as a tangent, translations in pixels, rotations in degrees, colours relative to 1, posterise in bits, solarise as a fraction of
    white."""
    is_wide = policy == "trivial"
    shear, blend, degrees, bits = (0.99, 0.99, 135.0, 6) if is_wide else (0.3, 0.9, 30.0, 4)
    across, down = (32.0, 32.0) if is_wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    most = {
        Op.SHEAR_X: shear,
        Op.SHEAR_Y: shear,
        Op.TRANSLATE_X: across,
        Op.TRANSLATE_Y: down,
        Op.ROTATE: degrees,
        Op.BRIGHTNESS: blend,
        Op.COLOUR: blend,
        Op.CONTRAST: blend,
        Op.SHARPNESS: blend,
    }
    table = torch.zeros(len(Op), BINS)
    for op, strongest in most.items():
        table[op] = torch.linspace(0.0, strongest, BINS)
    table[Op.POSTERISE] = (8 - (torch.arange(BINS) / ((BINS - 1) / bits))).round()
    table[Op.SOLARISE] = torch.linspace(1.0, 0.0, BINS)
    return table.double().numpy()
