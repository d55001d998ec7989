"""Mixing of the samples of a virtual rank's batch: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), and the loss of what is mixed.
trainer.learn.build makes a Mix and the loss, `batches` and trainer.learn.gradients call them for each batch.

Theorem: what is mixed with what, and in which share, is a pure function of (settings, seed, step, virtual rank). Proof: a sample's partner
is the one before it in its virtual rank's batch, which the order has shuffled; share, rectangle and kind follow from words of
`dataio.codecs.image.augment.bits` for (seed, step, virtual rank). A whole batch has one share, as in torchvision. In ddp mode the virtual
ranks that go through the model together have the share of the first; that mode promises nothing for another number of workers.

Not the targets are mixed but the losses: share * loss(own targets) + (1 - share) * loss(the partners'). For cross-entropy, with or without
smoothing, and for binary cross-entropy that is the loss of the mixed targets, exactly, as these losses are linear in the targets. It needs
nothing of a task but its loss, so that every task, every head of several, and a loss of the user's own can be trained with it. An unknown
target adds 0 for its part. A number's Huber loss of an error below 1 is least at the mixed number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.codecs.image.augment import bits
from trainer.learn.augment.draws import ONE, Purpose

SummedLoss = Callable[[Tensor, Targets], Tensor]
SHARE = "\0share"
"""Beside a batch's targets: (n,) float32, the share of its own targets, the same for all its samples. No target has such a name."""
PARTNERS = "\0partner's "
"""Before the name of a target: its values of the partners."""
CHUNK_BYTES = 2**19
_HALF = 16  # bits of ONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What is drawn for a batch."""

    kind: Literal["mixup", "cutmix"]
    share: int  # of ONE, of a sample itself
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right of what cutmix takes from the partner


def draw_mixing(*, seed: int, step: int, virtual_rank: int, mixup: float, cutmix: float, size: tuple[int, int]) -> Mixing:
    """`mixup` and `cutmix` are the alphas of their Beta distributions. If neither is 0, each gets half of the batches."""
    height, width = size
    first = bits(seed=seed, epoch=step, ids=np.array([virtual_rank]), purpose=Purpose.MIX)
    is_cutmix = cutmix > 0 and (mixup == 0 or bool(first[0] >> np.uint64(63)))
    unit = _Units(seed=seed, step=step, virtual_rank=virtual_rank)
    share = symmetric_beta(cutmix if is_cutmix else mixup, unit)
    if not is_cutmix:
        return Mixing(kind="mixup", share=round(share * ONE))
    # As torchvision: a box of (1 - share) of the area about any pixel, cut off at the edges; the share is what is left of the image.
    ratio = 0.5 * math.sqrt(1 - share)
    y, x = int(unit.next() * height), int(unit.next() * width)
    down, across = int(ratio * height), int(ratio * width)
    top, bottom, left, right = max(0, y - down), min(height, y + down), max(0, x - across), min(width, x + across)
    left_over = height * width - (bottom - top) * (right - left)
    return Mixing(kind="cutmix", share=round(left_over * ONE / (height * width)), box=(top, bottom, left, right))


class _Units:
    """A batch's numbers in (0, 1), one after the other."""

    def __init__(self, *, seed: int, step: int, virtual_rank: int) -> None:
        self._seed, self._step, self._virtual_rank, self._used = seed, step, virtual_rank, 0

    def next(self) -> float:
        word = bits(seed=self._seed, epoch=self._step, ids=np.array([(self._virtual_rank << 32) + self._used]), purpose=Purpose.MIX + 1)
        self._used += 1
        return (int(word[0] >> np.uint64(11)) + 0.5) * 2.0**-53


def symmetric_beta(alpha: float, unit: _Units) -> float:
    """A number with the distribution Beta(alpha, alpha): Ulrich's formula (1984) above one half, Jöhnk's rejection (1964) up to there,
    which takes 1.3 pairs of numbers at most."""
    if alpha > 0.5:
        radius = math.sqrt(1 - unit.next() ** (2 / (2 * alpha - 1)))
        return 0.5 + 0.5 * radius * math.cos(2 * math.pi * unit.next())
    while True:
        a, b = math.log(unit.next()) / alpha, math.log(unit.next()) / alpha  # logarithms, as powers of a small alpha underflow
        if max(a, b) + math.log1p(math.exp(-abs(a - b))) <= 0:
            return 1 / (1 + math.exp(b - a)) if b - a < 700 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """The mixing that a run's settings ask for."""

    seed: int
    mixup: float
    cutmix: float

    def drawn(self, samples: Tensor, *, step: int, virtual_rank: int) -> Mixing:
        """For a batch of (n, 3, H, W)."""
        height, width = samples.shape[-2:]
        return draw_mixing(seed=self.seed, step=step, virtual_rank=virtual_rank, mixup=self.mixup, cutmix=self.cutmix, size=(height, width))


def make_mix(*, seed: int, mixup: float, cutmix: float) -> Mix | None:
    """None if nothing is mixed."""
    return Mix(seed=seed, mixup=mixup, cutmix=cutmix) if mixup or cutmix else None


def mixed(samples: Tensor, drawn: Mixing) -> Tensor:
    """Each sample with the one before it, (n, 3, H, W) uint8. In whole numbers: the same bits on every device."""
    partners = samples.roll(1, 0)
    if drawn.kind == "mixup":
        done = torch.empty_like(samples)
        # On a CPU in pieces that stay in its cache: at 224 pixels an image takes 600 us instead of 1,300.
        piece = len(samples) if samples.is_cuda else max(1, CHUNK_BYTES // samples[0].numel())
        for first in range(0, len(samples), piece):
            part = slice(first, first + piece)
            both = samples[part].int().mul_(drawn.share).add_(partners[part], alpha=ONE - drawn.share)
            done[part].copy_(both.add_(ONE // 2).bitwise_right_shift_(_HALF))
        return done
    top, bottom, left, right = drawn.box
    pasted = samples.clone()
    pasted[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return pasted


def with_partners(targets: Targets, drawn: Mixing) -> Targets:
    """Prepared targets, (n, ...) each, with those of the partners and the share."""
    some = next(iter(targets.values()))
    share = torch.full((len(some),), drawn.share / ONE, device=some.device)
    return {**targets, **{PARTNERS + name: values.roll(1, 0) for name, values in targets.items()}, SHARE: share}


def mixed_loss(loss_sum: SummedLoss) -> SummedLoss:
    """`loss_sum` for batches that are mixed, and as it is for others."""

    def summed(outputs: Tensor, targets: Targets) -> Tensor:
        if SHARE not in targets:
            return loss_sum(outputs, targets)
        own = {name: values for name, values in targets.items() if name != SHARE and not name.startswith(PARTNERS)}
        theirs = {name: targets[PARTNERS + name] for name in own}
        share = targets[SHARE][0]
        return share * loss_sum(outputs, own) + (1 - share) * loss_sum(outputs, theirs)

    return summed
