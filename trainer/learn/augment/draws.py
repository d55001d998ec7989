"""What is drawn for a sample: a pure function of (settings, seed, epoch, sample id), in numpy on the host. Called by views.

Theorem: a sample's draw depends on nothing else: not on its batch, the worker, the device, the steps before it, or on which other
augmentations are on. Proof: each number below is one word of `dataio.codecs.image.augment.bits`, which is a hash of (seed, epoch, purpose,
id), and every augmentation has purposes of its own. Nothing is drawn for what is off. So there is no state to save in a checkpoint.

What is drawn becomes whole numbers as early as may be (pixels of a box, 1/65536 of a factor): then a last bit in which the mathematics of
two machines differ changes nothing.
"""

import itertools
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dataio.codecs.image.augment import Ids, bits
from trainer.learn.augment.tables import BINS, SIGNED, Op, Policy, magnitudes

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

ONE = 1 << 16
"""A factor of 1: factors are whole 65536ths."""
TRIES = 10  # for a box that fits, as in torchvision
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Fraction of the image's area and ratio of the sides of what is erased (Zhong et al. 2017), as in torchvision."""
ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4), of the four jitters


class Purpose(IntEnum):
    """Keys of independent draws. 0 is the codec's crop and flip. Numbers are for ever: another number is another run."""

    ROTATE = 1
    JITTER = 2  # to 6
    MIX = 8  # to 9; keyed by (seed, step, virtual rank)
    POLICY = 16  # one for each operation in a row
    CROP = 64  # two a try
    ERASE = 128  # one more than two a try


def uniform(*, seed: int, epoch: int, ids: Ids, purpose: int) -> Floats:
    """(n,) numbers in [0, 1)."""
    return (bits(seed=seed, epoch=epoch, ids=ids, purpose=purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """A rectangle of each of n images, in pixels. An erased one is of height 0 where nothing is erased."""

    top: Ints  # (n,)
    left: Ints
    height: Ints
    width: Ints

    def of(self, few: Any) -> "Boxes":
        return Boxes(top=self.top[few], left=self.left[few], height=self.height[few], width=self.width[few])


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """The samples to draw for."""

    seed: int
    epoch: int
    ids: Ids

    def uniform(self, purpose: int) -> Floats:
        return uniform(seed=self.seed, epoch=self.epoch, ids=self.ids, purpose=purpose)

    def halves(self, purpose: int) -> tuple[Words, Words]:
        """(n,) and (n,) whole numbers in [0, 2**32): the two halves of a word."""
        words = bits(seed=self.seed, epoch=self.epoch, ids=self.ids, purpose=purpose)
        return words & np.uint64(2**32 - 1), words >> np.uint64(32)

    def of(self, few: Ints) -> "Key":
        return Key(seed=self.seed, epoch=self.epoch, ids=self.ids[few])


def crops(key: Key, *, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> Boxes:
    """The rectangle that a random resized crop keeps (Szegedy et al. 2014), drawn as torchvision does: an area, the logarithm of a ratio
    width / height, a place; drawn again up to TRIES times if it does not fit. Then the largest centred one of an allowed ratio."""
    height, width = size
    boxes, todo = _fitting(key, Purpose.CROP, size=size, area=scale, ratio=ratio, is_upright=False)
    wide = width / height
    h, w = (round(width / ratio[0]), width) if wide < ratio[0] else (height, round(height * ratio[1])) if wide > ratio[1] else size
    boxes.top[todo], boxes.left[todo], boxes.height[todo], boxes.width[todo] = (height - h) // 2, (width - w) // 2, h, w
    return boxes


def erased(key: Key, *, size: tuple[int, int], probability: float) -> Boxes:
    """The rectangle of each image that is erased, with `probability`, and only if one fits."""
    boxes, todo = _fitting(key, Purpose.ERASE, size=size, area=ERASED_AREA, ratio=ERASED_RATIO, is_upright=True)
    boxes.height[todo] = 0
    boxes.height[key.uniform(Purpose.ERASE + 2 * TRIES) >= probability] = 0
    return boxes


def _fitting(
    key: Key, purpose: int, *, size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float], is_upright: bool
) -> tuple[Boxes, Ints]:
    """A box for each sample, and the samples that none of TRIES fits. The ratio is width / height, or height / width if `is_upright`; then
    a box is also smaller than the image on both sides."""
    (height, width), n = size, len(key.ids)
    boxes = Boxes(top=np.zeros(n, np.int64), left=np.zeros(n, np.int64), height=np.zeros(n, np.int64), width=np.zeros(n, np.int64))
    todo = np.arange(n)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    room = 0 if is_upright else 1
    for attempt in range(TRIES):
        if not len(todo):
            break
        these = key.of(todo)
        # Two words a try: 32 bits each for the area, the ratio and the two places.
        shape, place = (these.halves(purpose + 2 * attempt + which) for which in (0, 1))
        wanted = height * width * (area[0] + (area[1] - area[0]) * shape[0] * 2.0**-32)
        aspect = np.exp(low + (high - low) * shape[1] * 2.0**-32)
        long, short = np.rint(np.sqrt(wanted * aspect)).astype(np.int64), np.rint(np.sqrt(wanted / aspect)).astype(np.int64)
        h, w = (long, short) if is_upright else (short, long)
        fits = np.flatnonzero((h > 0) & (w > 0) & (h < height + room) & (w < width + room))
        found = todo[fits]
        boxes.height[found], boxes.width[found] = h[fits], w[fits]
        boxes.top[found] = _below(place[0][fits], height - h[fits] + 1)
        boxes.left[found] = _below(place[1][fits], width - w[fits] + 1)
        todo = np.delete(todo, fits)
    return boxes, todo


def _below(words: Words, limits: Ints) -> Ints:
    """(n,) in [0, limit) from words below 2**32, equally likely to 2**-32 of the limit."""
    return ((words * limits.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def angles(key: Key, degrees: float) -> Floats:
    """(n,) in [-degrees, degrees), in whole 65536ths."""
    return np.rint((2 * key.uniform(Purpose.ROTATE) - 1) * degrees * ONE) / ONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Changes of brightness, contrast, saturation and hue of n images, and the order in which they come."""

    factors: Ints  # (n, 3) of ONE
    hue: Floats  # (n,) fraction of the circle
    order: Ints  # (n, 4): the number of the change that comes first, second, ...


def jitter(key: Key, strengths: tuple[float, float, float, float]) -> Jitter:
    """Drawn as torchvision's ColorJitter: factors from [max(0, 1 - s), 1 + s], the hue's shift from [-s, s], in a random order."""
    drawn = np.stack([key.uniform(Purpose.JITTER + which) for which in range(4)], axis=1)  # (n, 4)
    s = np.array(strengths)
    low = np.maximum(0.0, 1 - s[:3])
    factors = np.rint((low + (1 + s[:3] - low) * drawn[:, :3]) * ONE).astype(np.int64)
    hue = np.rint((2 * drawn[:, 3] - 1) * s[3] * ONE) / ONE
    order = ORDERS[(key.uniform(Purpose.JITTER + 4) * len(ORDERS)).astype(np.int64)]
    return Jitter(factors=factors, hue=hue, order=order)


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One operation of a policy for each of n images."""

    ops: Ints  # (n,) of tables.Op
    magnitudes: Floats  # (n,) with their sign


def policy_rounds(key: Key, policy: Policy, *, ops: int, magnitude: int, size: tuple[int, int]) -> list[Round]:
    """One round for TrivialAugment, `ops` for RandAugment, which takes the bin `magnitude`. All operations are equally likely, and all bins
    (to 2**-21)."""
    table = magnitudes(policy, *size)
    rounds = []
    for number in range(1 if policy == "trivial" else ops):
        words = bits(seed=key.seed, epoch=key.epoch, ids=key.ids, purpose=Purpose.POLICY + number)
        field = np.uint64((1 << 21) - 1)
        chosen = (((words & field) * np.uint64(len(Op))) >> np.uint64(21)).astype(np.int64)
        drawn = ((((words >> np.uint64(21)) & field) * np.uint64(BINS)) >> np.uint64(21)).astype(np.int64)
        strength = table[chosen, drawn if policy == "trivial" else np.full_like(drawn, magnitude)]
        is_negative = np.isin(chosen, SIGNED) & ((words >> np.uint64(63)) > 0)
        rounds.append(Round(ops=chosen, magnitudes=np.where(is_negative, -strength, strength)))
    return rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """All that is drawn for n images, in the order in which it is done. None, or no round, where it is off."""

    boxes: Boxes | None
    """Of the random resized crop."""
    angles: Floats | None  # (n,)
    rounds: tuple[Round, ...]
    jitter: Jitter | None
    erased: Boxes | None
