"""Augments a virtual rank's batch on its device: draws for each sample (draws), then calls each operation once for all samples that drew it
(geometry, colour). trainer.learn.build makes it for the step, trainer.preview for its sheet.

The order is that of torchvision's reference recipes, after the codec's crop and flip: random resized crop, rotation, policy, jitter,
erasing. Which samples an operation gets is known on the host, so that nothing waits for the device. An image goes in as uint8 and comes out
as uint8, between any two operations too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataio.batch import Batch
from dataio.codecs.device import upload
from dataio.config import DataConfig
from trainer.learn.augment import colour, draws, geometry
from trainer.learn.augment.dali import MOVES, DaliAugmentation
from trainer.learn.augment.draws import Drawn, Ints, Key
from trainer.learn.augment.tables import Op, Policy

Views = Callable[[Batch], Tensor]
"""A virtual rank's batch -> its samples, (n, 3, *size) uint8 channels_last."""

CHUNK_BYTES = 2**20
"""On a CPU, images go through all operations in pieces of about this size: what one operation writes, the next one finds in the cache."""
BY_LEVEL = (Op.BRIGHTNESS, Op.CONTRAST, Op.POSTERISE, Op.SOLARISE, Op.AUTOCONTRAST, Op.EQUALISE)


def make_views(data: DataConfig, *, seed: int, image_size: int, mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Views | None:
    """The augmentation that the settings ask for; None if it changes nothing. `image_size` is `model.image_size`: a random resized crop is
    of that size, or of the images' own if it is 0. `mean`, of pixel values in [0, 1], is what erased pixels become."""
    is_cropped, is_jittered = data.crop == "resized", any(data.jitter)
    if not (is_cropped or is_jittered or data.rotate or data.policy != "none" or data.erase):
        return None
    erased_level = tuple(round(255 * each) for each in mean)
    dali: DaliAugmentation | None = None
    if data.augment_backend == "dali":
        dali = DaliAugmentation(erased_level=erased_level, jitters=[strength > 0 for strength in data.jitter])
    return Augmentation(data=data, seed=seed, side=image_size, erased_level=erased_level, dali=dali).of


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Holds settings only: every batch's result follows from its ids and its epoch."""

    data: DataConfig
    seed: int
    side: int
    """Of what a random resized crop makes; 0 keeps the images' size."""
    erased_level: tuple[int, ...]
    """Red, green, blue."""
    dali: DaliAugmentation | None = None
    """Does what is drawn in place of PyTorch's operations."""

    def of(self, batch: Batch) -> Tensor:
        images = batch.samples
        n, _, height, width = images.shape
        if not n:
            return images
        size = (self.side, self.side) if self.side and self.data.crop == "resized" else (height, width)
        if self.dali is not None:
            return self.dali(images, self._drawn(Key(seed=self.seed, epoch=batch.epoch, ids=batch.ids), (height, width), size), size)
        step = n if images.is_cuda else max(1, CHUNK_BYTES // (3 * max(height * width, size[0] * size[1])))
        pieces = [
            self._augmented(images[at : at + step], Key(seed=self.seed, epoch=batch.epoch, ids=batch.ids[at : at + step]), size)
            for at in range(0, n, step)
        ]
        done = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return done.contiguous(memory_format=torch.channels_last)

    def _drawn(self, key: Key, stored: tuple[int, int], size: tuple[int, int]) -> Drawn:
        data = self.data
        is_cropped, is_moved = data.crop == "resized", data.policy != "none"
        policy: Policy = "trivial" if data.policy == "none" else data.policy
        rounds = draws.policy_rounds(key, policy, ops=data.policy_ops, magnitude=data.policy_magnitude, size=size) if is_moved else []
        return Drawn(
            boxes=draws.crops(key, size=stored, scale=data.crop_scale, ratio=data.crop_ratio) if is_cropped else None,
            angles=draws.angles(key, data.rotate) if data.rotate else None,
            rounds=tuple(rounds),
            jitter=draws.jitter(key, data.jitter) if any(data.jitter) else None,
            erased=draws.erased(key, size=size, probability=data.erase) if data.erase else None,
        )

    def _augmented(self, images: Tensor, key: Key, size: tuple[int, int]) -> Tensor:
        height, width = images.shape[-2:]
        drawn = self._drawn(key, (height, width), size)
        if drawn.boxes is not None:
            images = geometry.resized_crops(images, drawn.boxes, size)
        if drawn.angles is not None:
            rotations = np.full(len(key.ids), Op.ROTATE, dtype=np.int64)
            images = geometry.moved(images, geometry.affine_matrices(rotations, drawn.angles, size))
        for each in drawn.rounds:
            images = after_round(images, each)
        if drawn.jitter is not None:
            images = jittered(images, drawn.jitter, self.data.jitter)
        if drawn.erased is not None:
            images = erased(images, drawn.erased, self.erased_level)
        return images


def after_round(images: Tensor, each: draws.Round) -> Tensor:
    """Each image after the operation that it drew. No image is in two of these groups."""
    done = images.clone()
    for of, few in _groups(each.ops):
        where = upload(few, images.device)
        _put(done, where, of(_taken(images, where), each.ops[few], each.magnitudes[few]))
    return done


def _taken(images: Tensor, where: Tensor) -> Tensor:
    """Some of the images, channels_last as they are. index_select alone would lay them out anew."""
    return images.permute(0, 2, 3, 1).index_select(0, where).permute(0, 3, 1, 2)


def _put(images: Tensor, where: Tensor, changed: Tensor) -> None:
    lines, new = images.permute(0, 2, 3, 1), changed.permute(0, 2, 3, 1)
    if images.device.type == "cpu":
        lines.numpy()[where.numpy()] = new.numpy()  # 20 us at 224 pixels, where index_copy_ takes 130
    else:
        lines.index_copy_(0, where, new)


Operation = Callable[[Tensor, Ints, draws.Floats], Tensor]
"""(images, their operations, their magnitudes) -> images."""


def _groups(ops: Ints) -> Iterator[tuple[Operation, Ints]]:
    """Each kind of operation, with the samples that drew it. Identity is none."""
    kinds: tuple[tuple[Operation, tuple[Op, ...]], ...] = (
        (_move, MOVES),
        (_by_level, BY_LEVEL),
        (_saturate, (Op.COLOUR,)),
        (_sharpen, (Op.SHARPNESS,)),
    )
    for operation, members in kinds:
        few = np.flatnonzero(np.isin(ops, members))
        if len(few):
            yield operation, few


def _move(images: Tensor, ops: Ints, magnitudes: draws.Floats) -> Tensor:
    height, width = images.shape[-2:]
    return geometry.moved(images, geometry.affine_matrices(ops, magnitudes, (height, width)))


def _saturate(images: Tensor, ops: Ints, magnitudes: draws.Floats) -> Tensor:
    return colour.saturated(images, colour.on_device(colour.factors_of(magnitudes), images.device))


def _sharpen(images: Tensor, ops: Ints, magnitudes: draws.Floats) -> Tensor:
    return colour.sharpened(images, colour.on_device(colour.factors_of(magnitudes), images.device))


def _by_level(images: Tensor, ops: Ints, magnitudes: draws.Floats) -> Tensor:
    """Tables that need no pixel are made on the host, the others on the device."""
    known = np.tile(colour.LEVELS.astype(np.uint8), (len(ops), 1))  # (n, 256)
    bright, few, light = ops == Op.BRIGHTNESS, ops == Op.POSTERISE, ops == Op.SOLARISE
    known[bright] = colour.brightness_tables(colour.factors_of(magnitudes[bright]))
    known[few] = colour.posterise_tables(magnitudes[few].astype(np.int64))
    known[light] = colour.solarise_tables(colour.thresholds_of(magnitudes[light]))
    tables = upload(known, images.device)[:, None].repeat(1, 3, 1)  # (n, 3, 256)
    for op in (Op.CONTRAST, Op.AUTOCONTRAST, Op.EQUALISE):
        chosen = np.flatnonzero(ops == op)
        if not len(chosen):
            continue
        where = upload(chosen, images.device)
        theirs = _taken(images, where)
        match op:
            case Op.CONTRAST:
                factors = colour.on_device(colour.factors_of(magnitudes[chosen]), images.device, torch.int64)
                made = colour.contrast_tables(theirs, factors)
            case Op.AUTOCONTRAST:
                made = colour.autocontrast_tables(theirs)
            case _:
                made = colour.equalise_tables(theirs)
        tables.index_copy_(0, where, made)
    return colour.levels_changed(images, tables)


def jittered(images: Tensor, drawn: draws.Jitter, strengths: tuple[float, float, float, float]) -> Tensor:
    """Each image after the four changes in its own order; those of strength 0 are left out."""
    device = images.device
    for place in range(4):
        done = images.clone()
        for which in range(4):
            few = np.flatnonzero(drawn.order[:, place] == which)
            if not strengths[which] or not len(few):
                continue
            where = upload(few, device)
            samples = _taken(images, where)
            match which:
                case 0:
                    tables = upload(colour.brightness_tables(drawn.factors[few, 0]), device)[:, None].expand(-1, 3, -1)
                    changed = colour.levels_changed(samples, tables)
                case 1:
                    factors = colour.on_device(drawn.factors[few, 1], device, torch.int64)
                    changed = colour.levels_changed(samples, colour.contrast_tables(samples, factors))
                case 2:
                    changed = colour.saturated(samples, colour.on_device(drawn.factors[few, 2], device))
                case _:
                    changed = colour.hue_turned(samples, upload(drawn.hue[few].astype(np.float32), device))
            _put(done, where, changed)
        images = done
    return images


def erased(images: Tensor, boxes: draws.Boxes, level: Sequence[int]) -> Tensor:
    """`level` (red, green, blue) in each image's box; the rest as it is. On a CPU box by box: at 224 pixels comparing all places with all
    boxes takes a millisecond an image."""
    device = images.device
    colour_of = upload(np.array(level, dtype=np.uint8), device).view(1, 3, 1, 1)
    if device.type == "cpu":
        done = images.clone()
        for number in np.flatnonzero(boxes.height).tolist():
            top, left, height, width = (int(each[number]) for each in (boxes.top, boxes.left, boxes.height, boxes.width))
            done[number : number + 1, :, top : top + height, left : left + width] = colour_of
        return done
    rows, columns = images.shape[-2:]
    where = upload(np.stack([boxes.top, boxes.top + boxes.height, boxes.left, boxes.left + boxes.width]), device)  # (4, n)
    top_of, bottom, left_of, right = where[:, :, None].unbind(0)  # (n, 1) each
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    inside = ((y >= top_of) & (y < bottom))[:, None, :, None] & ((x >= left_of) & (x < right))[:, None, None, :]  # (n, 1, H, W)
    return torch.where(inside, colour_of, images)
