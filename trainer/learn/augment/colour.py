"""Operations that change colours and leave pixels where they are, on the device, each once for a batch of uint8 images (n, 3, H, W) with a
factor for each image. Called by views; draws.py draws.

All but the hue compute in whole numbers: factors are 65536ths (draws.ONE) and results are rounded down, as torchvision rounds its floats.
So they have the same bits on every device and for any cut of a batch. torchvision's floats are sometimes one level lower where a result
should be whole: at a factor of 0.9 its saturation darkens a grey image.

An operation by which a level becomes another one, whatever its neighbours, is a table of 256 levels for each channel. `levels_changed`
applies the tables of all such operations at once.
"""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dataio.codecs.device import upload
from trainer.learn.augment.draws import ONE, Ints

Tables = npt.NDArray[np.uint8]
LEVELS = np.arange(256)
LARGE_PIXELS = 96 * 96
_HALF = 16  # bits of ONE
# ITU-R 601-2 luma with torchvision's digits, in 22 bits: the largest that 255 leaves room for in 31.
GREY_BITS = 22
RED, GREEN, BLUE = (round(part * (1 << GREY_BITS)) for part in (0.2989, 0.587, 0.114))


# --- by level ---------------------------------------------------------------------------------------------------------------------------


def levels_changed(images: Tensor, tables: Tensor) -> Tensor:
    """Each level of each channel by its table, (n, 3, 256) uint8. Large images on a CPU by Pillow, one by one: 190 us at 224 pixels, where
    gathering takes 680 for its indices of 8 bytes; at 32 pixels it is 14 us against 50."""
    n = len(images)
    lines = images.permute(0, 2, 3, 1)  # (n, H, W, 3)
    if images.device.type == "cpu" and lines.shape[1] * lines.shape[2] >= LARGE_PIXELS:
        pixels = lines.contiguous().numpy()
        changed = [
            np.asarray(Image.fromarray(each).point(table)) for each, table in zip(pixels, tables.reshape(n, 768).tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)
    where = lines + torch.arange(3, device=images.device) * 256  # (n, H, W, 3) int64
    done = tables.reshape(n, 768).gather(1, where.reshape(n, -1))
    return done.view(lines.shape).permute(0, 3, 1, 2)


def brightness_tables(factors: Ints) -> Tables:
    """(n, 256)"""
    changed: Ints = (factors[:, None] * LEVELS) >> _HALF
    return np.clip(changed, 0, 255).astype(np.uint8)


def posterise_tables(bits: Ints) -> Tables:
    """(n, 256): the highest `bits` of 8 bits are kept."""
    masks: Ints = (0xFF00 >> bits)[:, None]
    return (LEVELS & masks & 0xFF).astype(np.uint8)


def solarise_tables(thresholds: Ints) -> Tables:
    """(n, 256): levels at and above the threshold are inverted."""
    return np.where(thresholds[:, None] <= LEVELS, 255 - LEVELS, LEVELS).astype(np.uint8)


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """(n, 3, 256): away from, or towards, the image's mean grey. `factors`: (n,) int64 of ONE."""
    n, _, height, width = images.shape
    grey = _grey(images).view(n, -1).sum(1)  # (n,) int64
    offsets = (((grey << _HALF) // (height * width)) * (ONE - factors)) >> _HALF  # (n,) of ONE
    levels = torch.arange(256, device=images.device)
    tables = ((levels * factors[:, None] + offsets[:, None]) >> _HALF).clamp_(0, 255)  # (n, 256)
    return tables.to(torch.uint8)[:, None].expand(n, 3, 256)


def autocontrast_tables(images: Tensor) -> Tensor:
    """(n, 3, 256): each channel's darkest level becomes 0, its brightest 255."""
    pixels = images.flatten(2)  # (n, 3, H * W)
    low, high = pixels.amin(2, keepdim=True).int(), pixels.amax(2, keepdim=True).int()  # (n, 3, 1)
    levels = torch.arange(256, device=images.device, dtype=torch.int32)
    stretched = ((levels - low) * 255).div((high - low).clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def equalise_tables(images: Tensor) -> Tensor:
    """(n, 3, 256): each channel's levels become about equally frequent, by Pillow's rule."""
    pixels = images.flatten(2).long()  # (n, 3, H * W)
    counts = torch.zeros((*pixels.shape[:2], 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int64, device=images.device).expand_as(pixels))
    sums = counts.cumsum(2)
    brightest = pixels.amax(2, keepdim=True)
    step = (pixels.shape[2] - counts.gather(2, brightest)).div(255, rounding_mode="floor")  # (n, 3, 1)
    before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], 2)
    equal = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    return torch.where(step > 0, equal, torch.arange(256, device=images.device)).to(torch.uint8)


# --- by pixel and its neighbours --------------------------------------------------------------------------------------------------------


def saturated(images: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, each pixel's grey. `factors`: (n,) int32 of ONE."""
    f = factors.view(-1, 1, 1, 1)
    return _as_images((images * f + _grey(images) * (ONE - f)) >> _HALF)


def sharpened(images: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, each pixel's mean over 3x3 pixels, in which it counts five times; pixels at the edge stay. `factors`: (n,)
    int32 of ONE."""
    if min(images.shape[-2:]) <= 2:
        return images
    pixels = images.int()
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * inner  # of 13 pixels
    means = ((2 * sums + 13) * TWENTY_SIXTH) >> 20
    f = factors.view(-1, 1, 1, 1)
    out = images.clone()
    out[:, :, 1:-1, 1:-1] = ((inner * f + means * (ONE - f)) >> _HALF).clamp_(0, 255).to(torch.uint8)
    return out


TWENTY_SIXTH = -(-(1 << 20) // 26)
"""Multiplied and shifted by 20 bits, it divides by 26, exactly for all sums of 13 pixels."""


def hue_turned(images: Tensor, shifts: Tensor) -> Tensor:
    """The hue turned by `shifts`, (n,) float32 fractions of the circle, in floats: through HSV and back, rounded as torchvision does."""
    pixels = images.float().div_(255)
    red, green, blue = pixels.unbind(1)  # (n, H, W)
    most, least = pixels.amax(1), pixels.amin(1)
    span = most - least
    safe = torch.where(span > 0, span, 1.0)
    hue = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    turned = hue + shifts.view(-1, 1, 1) * 6
    channels = []
    for offset in (5, 3, 1):  # of red, green and blue on the circle of 6
        k = (turned + offset).remainder(6.0)
        channels.append(most - span * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return (torch.stack(channels, 1) * (256 - 1e-3)).to(torch.uint8, memory_format=torch.channels_last)


def _grey(images: Tensor) -> Tensor:
    """(n, 1, H, W) int32."""
    red, green, blue = (channel.int() for channel in images.unbind(1))
    return ((red * RED + green * GREEN + blue * BLUE) >> GREY_BITS)[:, None]


def _as_images(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)


# --- from magnitudes --------------------------------------------------------------------------------------------------------------------


def factors_of(magnitudes: npt.NDArray[np.float64]) -> Ints:
    """Factors of ONE from a policy's magnitudes, which are relative to 1."""
    return np.rint((1.0 + magnitudes) * ONE).astype(np.int64)


def thresholds_of(magnitudes: npt.NDArray[np.float64]) -> Ints:
    """The lowest level that is inverted, from a policy's fraction of white; in 32 bits, as torchvision compares."""
    return np.ceil((255 * magnitudes).astype(np.float32)).astype(np.int64)


def on_device(values: Ints, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return upload(values, device).to(dtype)
