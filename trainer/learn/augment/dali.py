"""The augmentation of views.py as DALI pipelines, on a CPU or a GPU. Called by views, which draws: what was drawn goes into a pipeline as
inputs, a value for each image, and the pipeline has no random numbers of its own. So an image follows from (seed, epoch, sample id) here
too, and there is no state.

All colours but the hue are computed in whole numbers, by the formulas of colour.py, and have the same bits. DALI has no histogram for each
image, so colour.py equalises, between two pipelines. What interpolates, and the hue, differs from PyTorch's result by a level at most: sums
are rounded otherwise. The graph is one and the same on a CPU and on a GPU but for `device`.

DALI divides whole numbers towards zero, where colour.py's shifts round down. Where a dividend may be negative, either the quotient is cut
off at 0 anyhow, or the dividend is lifted above 0 before.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from torch import Tensor

from dataio.codecs.device import copied_from_dali, upload
from trainer.learn.augment import colour
from trainer.learn.augment.draws import ONE, Drawn, Floats, Ints, Round
from trainer.learn.augment.geometry import affine_matrices
from trainer.learn.augment.tables import Op

PIECE_BYTES = 2**26
"""Images go through a pipeline in pieces of about this size, which bounds the memory of what it computes on the way."""
PIECE_IMAGES = 512
MOVES = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
_MOVE = 100
"""Stands for each of MOVES: in a pipeline they differ in their matrices only."""
_LIFT = 1 << 26
"""More than any level's offset, in 65536ths."""

Inputs = dict[str, npt.NDArray[Any]]
"""By name; each has a row for each image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What one pipeline does with images of `stored` (H, W), in this order. What is None or False is left out."""

    stored: tuple[int, int]
    crops_to: tuple[int, int] | None = None
    """(H, W) of what a random resized crop makes."""
    turns: bool = False
    has_round: bool = False
    """One operation of a policy."""
    jitters: tuple[bool, ...] = (False, False, False, False)
    """Which of brightness, contrast, saturation and hue it changes."""
    erases: bool = False
    erased_level: tuple[int, ...] = (0, 0, 0)

    @property
    def made(self) -> tuple[int, int]:
        return self.crops_to or self.stored

    @property
    def reach(self) -> int:
        """How many pixels around a box the weights of a resize may want."""
        return 1 + max(math.ceil(given / wanted) for given, wanted in zip(self.stored, self.made, strict=True))


class DaliAugmentation:
    """Does with images what was drawn for them. A pipeline is built when it is first used, in the process that uses it, as it does not
    survive a fork. Not thread-safe."""

    def __init__(self, *, erased_level: Sequence[int], jitters: Sequence[bool]) -> None:
        """`erased_level`: red, green and blue of what is erased. `jitters`: which of the four jitters are not off."""
        self._erased_level, self._jitters = tuple(erased_level), tuple(jitters)
        self._pipelines: dict[tuple[Segment, torch.device], Any] = {}

    def __call__(self, images: Tensor, drawn: Drawn, size: tuple[int, int]) -> Tensor:
        """(n, 3, H, W) uint8 -> (n, 3, *size) uint8, both channels_last by their strides."""
        height, width = images.shape[-2:]
        pixels = images.permute(0, 2, 3, 1).contiguous()  # (n, H, W, 3)
        for segment, each in self._segments(drawn, (height, width), size):
            pixels = self._run(segment, pixels, _inputs(segment, drawn, each))
            if each is not None and len(few := np.flatnonzero(each.ops == Op.EQUALISE)):
                where = upload(few, pixels.device)
                chosen = pixels.index_select(0, where).permute(0, 3, 1, 2)
                equal = colour.levels_changed(chosen, colour.equalise_tables(chosen))
                pixels.index_copy_(0, where, equal.permute(0, 2, 3, 1))
        return pixels.permute(0, 3, 1, 2)

    def _segments(self, drawn: Drawn, stored: tuple[int, int], size: tuple[int, int]) -> Iterator[tuple[Segment, Round | None]]:
        """The pipelines that the images go through one after the other, each with its round: images are equalised after a round."""
        first: dict[str, Any] = {"crops_to": size if drawn.boxes is not None else None, "turns": drawn.angles is not None}
        last: dict[str, Any] = {"jitters": self._jitters} if drawn.jitter is not None else {}
        if drawn.erased is not None:
            last |= {"erases": True, "erased_level": self._erased_level}
        if not drawn.rounds:
            yield Segment(stored=stored, **first, **last), None
            return
        yield Segment(stored=stored, has_round=True, **first), drawn.rounds[0]
        for each in drawn.rounds[1:]:
            yield Segment(stored=size, has_round=True), each
        if last:
            yield Segment(stored=size, **last), None

    def _run(self, segment: Segment, pixels: Tensor, inputs: Inputs) -> Tensor:
        """(n, H, W, 3) -> (n, *segment.made, 3), in memory of torch's own."""
        most = max(1, min(PIECE_IMAGES, PIECE_BYTES // (3 * max(segment.stored[0] * segment.stored[1], segment.made[0] * segment.made[1]))))
        device = pixels.device
        if (segment, device) not in self._pipelines:
            self._pipelines[segment, device] = build(segment, batch_size=most, device_id=device.index if device.type == "cuda" else None)
        pipeline = self._pipelines[segment, device]
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        done = []
        for at in range(0, len(pixels), most):
            piece = pixels[at : at + most]
            pipeline.feed_input("images", piece if stream is not None else piece.numpy(), cuda_stream=stream)
            for name, each in inputs.items():
                pipeline.feed_input(name, each[at : at + most])
            (out,) = pipeline.run(stream)
            made = out.as_tensor()  # (n, H, W, 3)
            done.append(torch.utils.dlpack.from_dlpack(made) if stream is None else copied_from_dali(made, device, stream))
        return done[0] if len(done) == 1 else torch.cat(done)


def _inputs(segment: Segment, drawn: Drawn, each: Round | None) -> Inputs:
    """What the segment's pipeline gets beside the images."""
    inputs: Inputs = {}
    if segment.crops_to is not None and (boxes := drawn.boxes) is not None:
        inputs |= {"start": _pairs(boxes.top, boxes.left), "shape": _pairs(boxes.height, boxes.width)}
    if segment.turns and drawn.angles is not None:
        inputs["turn"] = _matrices(np.full(len(drawn.angles), Op.ROTATE), drawn.angles, segment.made)
    if each is not None:
        moves = np.isin(each.ops, MOVES)
        bounds = np.zeros(len(each.ops), np.int64)
        few, light = each.ops == Op.POSTERISE, each.ops == Op.SOLARISE
        bounds[few] = 0xFF00 >> each.magnitudes[few].astype(np.int64) & 0xFF
        bounds[light] = colour.thresholds_of(each.magnitudes[light])
        matrices = np.tile(np.eye(2, 3, dtype=np.float32), (len(each.ops), 1, 1))
        matrices[moves] = _matrices(each.ops[moves], each.magnitudes[moves], segment.made)
        inputs |= {"op": _numbers(np.where(moves, _MOVE, each.ops)), "move": matrices, "bound": _numbers(bounds)}
        inputs["factor"] = _numbers(colour.factors_of(np.where(moves, 0.0, each.magnitudes)))
    if any(segment.jitters) and (jitter := drawn.jitter) is not None:
        inputs |= {f"which_{place}": _numbers(jitter.order[:, place]) for place in range(4)}
        inputs |= {f"factor_{which}": _numbers(jitter.factors[:, which]) for which in range(3) if segment.jitters[which]}
        inputs |= {"hue": jitter.hue.astype(np.float32)} if segment.jitters[3] else {}
    if segment.erases and (gone := drawn.erased) is not None:
        inputs |= {"corner": _pairs(gone.top, gone.left).astype(np.float32), "sides": _pairs(gone.height, gone.width).astype(np.float32)}
    return inputs


def _numbers(values: Ints) -> npt.NDArray[np.int32]:
    return values.astype(np.int32)


def _pairs(one: Ints, other: Ints) -> npt.NDArray[np.int32]:
    """(n, 2)"""
    return np.stack([one, other], axis=1).astype(np.int32)


def _matrices(ops: Ints, magnitudes: Floats, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """(n, 2, 3): as geometry's, but in pixels from the upper left corner, in the order x, y."""
    matrices = affine_matrices(ops, magnitudes, size).astype(np.float64)
    centre = np.array([size[1] / 2, size[0] / 2])  # x, y
    matrices[:, :, 2] += centre - matrices[:, :, :2] @ centre
    return matrices.astype(np.float32)


# --- the graph --------------------------------------------------------------------------------------------------------------------------


def build(segment: Segment, *, batch_size: int, device_id: int | None) -> Any:
    """The pipeline of a segment, for up to `batch_size` images; on a CPU if there is no `device_id`."""
    pipeline = graph(segment, batch_size=batch_size, device_id=device_id)
    pipeline.build()
    return pipeline


def graph(segment: Segment, *, batch_size: int, device_id: int | None) -> Any:
    """The same, not built yet."""
    from nvidia.dali import pipeline_def  # here, like all of DALI: it takes 0.2 s, and most runs do not need it

    # Conditionals: each operation gets the images that drew it. exec_dynamic: a batch passed on by DLPack is not overwritten later. Depth
    # 1: nothing is to be read ahead.
    settings = {"enable_conditionals": True, "exec_dynamic": True, "prefetch_queue_depth": 1, "seed": 0}
    threads = torch.get_num_threads() if device_id is None else 1
    define = pipeline_def(_augmented, batch_size=batch_size, num_threads=threads, device_id=device_id, **settings)
    try:
        return define(segment, device_id is not None)
    finally:
        _remove_sources()


def _remove_sources() -> None:
    """DALI writes a file for each function with a condition into the folder for temporary files, and removes it when Python exits. A rank
    ends otherwise."""
    written = [module for name, module in sys.modules.items() if name.startswith("__autograph_generated_file")]
    for module in written:
        for path in (module.__file__, getattr(module, "__cached__", None)):
            if path is not None:
                Path(path).unlink(missing_ok=True)


def _augmented(segment: Segment, on_gpu: bool) -> Any:
    from nvidia.dali import fn, types

    def number(name: str, kind: Any = types.INT32, ndim: int = 0) -> Any:
        return fn.external_source(name=name, dtype=kind, ndim=ndim)

    images = fn.external_source(name="images", device="gpu" if on_gpu else "cpu", layout="HWC", dtype=types.UINT8, ndim=3)
    if segment.crops_to is not None:
        images = _cropped(images, segment, segment.crops_to, number("start", ndim=1), number("shape", ndim=1))
    if segment.turns:
        images = _moved(images, number("turn", types.FLOAT, 2))
    if segment.has_round:
        move = number("move", types.FLOAT, 2)
        images = _after_op(images, segment.made, number("op"), move, number("factor"), number("bound"))
    if any(segment.jitters):
        # DALI drops an input that nothing uses, and then refuses to be given it.
        factors = [number(f"factor_{which}") if segment.jitters[which] else None for which in range(3)]
        hue = number("hue", types.FLOAT) if segment.jitters[3] else None
        for place in range(4):
            images = _after_jitter(images, segment, number(f"which_{place}"), factors, hue)
    if segment.erases:
        corner, sides = number("corner", types.FLOAT, 1), number("sides", types.FLOAT, 1)
        images = fn.erase(images, anchor=corner, shape=sides, axes=[0, 1], fill_value=[float(level) for level in segment.erased_level])
    return images


def _after_op(images: Any, size: tuple[int, int], op: Any, move: Any, factor: Any, bound: Any) -> Any:
    """Each image after its operation of a policy. Not equalised yet."""
    if op == _MOVE:
        images = _moved(images, move)
    elif op == int(Op.BRIGHTNESS):
        images = _brightness_changed(images, factor)
    elif op == int(Op.COLOUR):
        images = _saturated(images, factor)
    elif op == int(Op.CONTRAST):
        images = _contrast_changed(images, size, factor)
    elif op == int(Op.SHARPNESS):
        images = _sharpened(images, size, factor)
    elif op == int(Op.POSTERISE):
        images = _levels(images & bound)
    elif op == int(Op.SOLARISE):
        images = _levels(images + (images >= bound) * (255 - 2 * images))
    elif op == int(Op.AUTOCONTRAST):
        images = _stretched(images)
    return images


def _after_jitter(images: Any, segment: Segment, which: Any, factors: Sequence[Any], hue: Any) -> Any:
    """Each image after one of the four jitters; one that is off leaves it as it is."""
    is_on = segment.jitters
    if which == 0:
        images = _brightness_changed(images, factors[0]) if is_on[0] else images
    elif which == 1:
        images = _contrast_changed(images, segment.made, factors[1]) if is_on[1] else images
    elif which == 2:
        images = _saturated(images, factors[2]) if is_on[2] else images
    else:
        images = _hue_turned(images, hue) if is_on[3] else images
    return images


def _cropped(images: Any, segment: Segment, size: tuple[int, int], start: Any, shape: Any) -> Any:
    """Each image's box, resized. DALI repeats the pixels at the edge of what it resizes; PyTorch cuts its weights off there, and scales the
    others up. So black comes around the box, and a fourth channel, white inside of it, says what the weights inside sum up to."""
    from nvidia.dali import fn, types

    (height, width), reach = segment.stored, segment.reach
    white = types.Constant(np.full((height, width, 1), 255, dtype=np.uint8), device=images.device)
    boxes = fn.slice(fn.cat(images, white, axis=2), start=start, shape=shape, axes=[0, 1])
    framed = fn.slice(boxes, start=[-reach] * 2, shape=shape + 2 * reach, axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0])
    first = fn.cast(0 * shape + reach, dtype=types.FLOAT)
    how: dict[str, Any] = {"interp_type": types.INTERP_LINEAR, "antialias": True, "dtype": types.FLOAT}
    resized: Any = fn.resize(framed, size=list(size), roi_start=first, roi_end=first + shape, **how)
    return _levels(resized[:, :, :3] * 255.0 / resized[:, :, 3:])


def _moved(images: Any, matrix: Any) -> Any:
    from nvidia.dali import fn, types

    return fn.warp_affine(images, matrix=matrix, interp_type=types.INTERP_LINEAR, fill_value=0.0, inverse_map=True)


def _levels(values: Any) -> Any:
    """Whole numbers as levels, cut off at 0 and 255."""
    from nvidia.dali import fn, types

    return fn.reshape(fn.cast(values, dtype=types.UINT8), layout="HWC")  # a cast cuts off


def _grey(images: Any) -> Any:
    """(H, W, 1) int32."""
    from nvidia.dali import fn, types

    parts = types.Constant(np.array([[[colour.RED, colour.GREEN, colour.BLUE]]], dtype=np.int32), device=images.device)
    return fn.reductions.sum(images * parts, axes=[2], keep_dims=True, dtype=types.INT32) // (1 << colour.GREY_BITS)


def _brightness_changed(images: Any, factor: Any) -> Any:
    return _levels(images * factor // ONE)


def _contrast_changed(images: Any, size: tuple[int, int], factor: Any) -> Any:
    from nvidia.dali import fn, types

    sums = fn.reductions.sum(_grey(images), axes=[0, 1, 2], keep_dims=True, dtype=types.INT64)  # (1, 1, 1)
    factor = fn.cast(factor, dtype=types.INT64)
    lift = (0 * sums + _LIFT) * ONE  # in 64 bits, which a constant of DALI's does not have
    offset = (sums * ONE // (size[0] * size[1]) * (ONE - factor) + lift) // ONE - _LIFT
    return _levels((images * factor + offset) // ONE)


def _saturated(images: Any, factor: Any) -> Any:
    return _levels((images * factor + _grey(images) * (ONE - factor)) // ONE)


def _stretched(images: Any) -> Any:
    """Each channel's darkest level becomes 0, its brightest 255."""
    from nvidia.dali import fn
    from nvidia.dali import math as maths

    low, high = (reduce(images, axes=[0, 1], keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))  # (1, 1, 3)
    span = high + 0 * images - low
    return _levels((span > 0) * ((images - low) * 255 // maths.max(span, 1)) + (span == 0) * images)


def _sharpened(images: Any, size: tuple[int, int], factor: Any) -> Any:
    from nvidia.dali import fn, types

    height, width = size
    if min(size) <= 2:
        return images
    pixels = fn.cast(images, dtype=types.INT32)
    lines = pixels[:-2] + pixels[1:-1] + pixels[2:]
    inner = pixels[1:-1, 1:-1]
    sums = lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:] + 4 * inner  # of 13 pixels
    means = (2 * sums + 13) * colour.TWENTY_SIXTH // (1 << 20)
    changed = _levels((inner * factor + means * (ONE - factor)) // ONE)
    room = fn.slice(changed, start=[-1, -1], shape=[height, width], axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0])
    edge = np.ones((height, width, 1), dtype=np.uint8)
    edge[1:-1, 1:-1] = 0
    return _levels(room + images * types.Constant(edge, device=images.device))


def _hue_turned(images: Any, shift: Any) -> Any:
    """As colour.hue_turned."""
    from nvidia.dali import fn
    from nvidia.dali import math as maths

    pixels = images / 255.0
    red, green, blue = (pixels[:, :, channel : channel + 1] for channel in range(3))  # (H, W, 1) float each
    most, least = (reduce(pixels, axes=[2], keep_dims=True) for reduce in (fn.reductions.max, fn.reductions.min))
    span = most - least
    safe = span + (span == 0.0)
    is_red, is_green = most == red, most == green
    hue = is_red * ((green - blue) / safe) + (is_red ^ 1) * (
        is_green * (2.0 + (blue - red) / safe) + (is_green ^ 1) * (4.0 + (red - green) / safe)
    )
    turned = hue + shift * 6.0
    channels = []
    for offset in (5.0, 3.0, 1.0):  # of red, green and blue on the circle of 6
        on_circle = turned + offset
        k = on_circle - 6.0 * maths.floor(on_circle / 6.0)
        channels.append(most - span * maths.clamp(maths.min(k, 4.0 - k), 0.0, 1.0))
    return _levels(maths.floor(fn.cat(*channels, axis=2) * (256 - 1e-3)))
