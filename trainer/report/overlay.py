"""Draws a map over the image that it explains. Called by the report's thumbnails and by `trainer.predict --explain`; imports no torch.

The image is shown in grey, so that colour is the map's alone: red where the answer rests on a place, yellow where it does most.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataio.codecs.image.decode import window_of
from dataio.config import Fit

_STRONGEST = 0.75
"""The part of a pixel that the colour takes where the map is 1."""
_GREY = 0.8
"""The grey image's brightness: the colours are to stand out on white too."""


def overlay(image: Image.Image, heat: npt.NDArray[np.uint8], *, side: int) -> Image.Image:
    """`image` (RGB) at a size of `side` for its longer side, with `heat` (rows, columns) over it."""
    shown = sized(image, side)
    size = (shown.width, shown.height)
    smooth = Image.fromarray(heat.astype(np.float32) / 255).resize(size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth), 0.0, 1.0)[..., None]  # (H, W, 1)
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None] * _GREY
    colour = np.concatenate([np.full_like(strength, 255.0), 230.0 * strength**2, np.zeros_like(strength)], axis=2)
    share = _STRONGEST * strength
    return Image.fromarray(np.rint(grey * (1 - share) + colour * share).astype(np.uint8))


def sized(image: Image.Image, side: int) -> Image.Image:
    """The image with `side` pixels on its longer side; a smaller one keeps its pixels as squares."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def seen(image: Image.Image, image_hw: tuple[int, int], fit: Fit) -> Image.Image:
    """The part of a data set's image that the model saw, in the shape in which it saw it."""
    height, width = image_hw
    if (image.height, image.width) == image_hw:
        return image
    if fit == "crop":
        top, left, tall, wide = window_of(image.height, image.width, height, width)
        return image.crop((left, top, left + wide, top + tall))
    return image.resize((max(1, round(image.height * width / height)), image.height))
