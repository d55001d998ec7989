"""Augmentation of a sample as a pure function of (seed, epoch, sample id): the offset of its crop, and whether it is mirrored.

Called by the codec for every batch. The backends apply the drawn crop and flip, all with the same bits as `reference` below. A sample's
draw depends neither on its batch nor on the worker that reads it.

Other augmentations interpolate or change colours. They run in one place for all backends, on the device, after the codec's batch
(trainer.learn.augment), and take their random numbers from `bits` under purposes of their own.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Images = npt.NDArray[np.uint8]

CROP_AND_FLIP = 0
"""Purpose of the draw below; other draws use other small numbers (trainer.learn.augment.draws), which makes their random numbers
independent."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Crop and flip of n samples, in this order: out[y, x] = padded[y + dy, x' + dx], x' = x or, mirrored, width - 1 - x."""

    dy: npt.NDArray[np.int32]  # (n,) rows from the top of the padded image, 0..2*pad
    dx: npt.NDArray[np.int32]  # (n,) columns from its left, 0..2*pad
    flip: npt.NDArray[np.bool_]  # (n,)


def draw(*, seed: int, epoch: int, ids: Ids, pad: int, flip: bool) -> Draw:
    """All crops of the padded image are equally likely (to 1e-5), a flip has probability one half; pad=0 and flip=False disable them."""
    words = bits(seed=seed, epoch=epoch, ids=ids, purpose=CROP_AND_FLIP)
    # Three separate fields of the 64-bit word: bits 0-20 and 21-41 scaled to 0..2*pad, and the highest bit.
    field, choices = np.uint64((1 << 21) - 1), np.uint64(2 * pad + 1)
    dy = ((words & field) * choices) >> np.uint64(21)
    dx = (((words >> np.uint64(21)) & field) * choices) >> np.uint64(21)
    mirrored = (words >> np.uint64(63)).astype(np.bool_) if flip else np.zeros(len(ids), dtype=np.bool_)
    return Draw(dy=dy.astype(np.int32), dx=dx.astype(np.int32), flip=mirrored)


def centre(n: int, pad: int) -> Draw:
    """The draw that leaves n images unchanged, for evaluation."""
    middle = np.full(n, pad, dtype=np.int32)
    return Draw(dy=middle, dx=middle.copy(), flip=np.zeros(n, dtype=np.bool_))


def bits(*, seed: int, epoch: int, ids: Ids, purpose: int) -> npt.NDArray[np.uint64]:
    """64 random bits a sample, (n,) uint64: the splitmix64 finaliser (Steele, Lea, Flood 2014) in counter mode, keyed by the arguments.

    It takes 28 us for 512 samples; making a generator object takes 46 us for a single sample.
    """
    key = 0
    for part in (seed, epoch, purpose):
        key = int(_finalise(np.array([(key ^ part & _MASK) * _GOLDEN + _GOLDEN & _MASK], dtype=np.uint64))[0])
    return _finalise(ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def reference(images: Images, drawn: Draw, pad: int) -> Images:
    """Pads, crops and mirrors one pixel at a time: (n, H, W, 3) uint8 -> the same shape. Every backend is tested against it."""
    n, height, width, _ = images.shape
    out = np.zeros_like(images)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                from_y = y + int(drawn.dy[i]) - pad
                from_x = (width - 1 - x if drawn.flip[i] else x) + int(drawn.dx[i]) - pad
                if 0 <= from_y < height and 0 <= from_x < width:
                    out[i, y, x] = images[i, from_y, from_x]
    return out


def _finalise(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
