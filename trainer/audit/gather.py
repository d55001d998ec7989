"""Reads all images of a data set once, and keeps of each what the audit compares: a small copy, a blurred thumbnail, hashes of its bytes
and of its pixels, and how it looks. __main__.py calls it; copies.py and looks.py judge.

Images are decoded by the project's own decoder, a row group at a time. What is kept of them lies in files of the work folder, mapped into
memory, so that memory is bounded by a row group however many images there are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataio.codecs.codec import Refusal
from dataio.codecs.image.decode import Decoder
from dataio.codecs.make import looked_at
from dataio.config import DataConfig
from dataio.manifest import Manifest
from dataio.parquet import Dataset
from dataio.schema import is_single_label
from trainer.audit.kept import Hashes, Ints, Kept, hashes_of, starts_of

NATIVE_SIDE = 64
"""Images that share a size of at most this many pixels a side are compared as they are. Others are stretched to squares."""
LOOK_SIDE = 128
"""Side in pixels at which the looks of larger images are measured; they are compared at NATIVE_SIDE."""
THUMB_SIDE = 16
BLUR = 0.8
"""Standard deviation, in pixels of the small copy, by which it is blurred before copies are looked for: resizing and compressing an image
change its finest detail most. Of 500 copies so changed, 498 were found with it and 433 without."""
MEASURES = ("brightness", "contrast", "sharpness", "colour_range")

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gathered(Kept):
    """What is kept of all n images. Of one that could not be decoded it is zeros."""

    details: Bytes
    """(n, h, w, 3): small copies."""
    thumbs: Floats
    """(n, THUMB_SIDE * THUMB_SIDE): brightness, blurred."""
    pixels_of: Hashes
    """(n,): a hash of an image's size and of the pixels that it was decoded to."""
    sizes: Ints
    """(n, 2): height and width in pixels."""
    measures: Mapping[str, Floats]
    """MEASURES -> (n,)"""
    is_native: bool
    """Whether images were decoded at their own size, so that equal hashes of pixels mean equal images."""


def decoded_size(manifest: Manifest) -> tuple[int, int]:
    """(height, width) that images are decoded to: the size that all share if it is small, else LOOK_SIDE. Small images of several sizes
    get the size that most have."""
    sizes = [tuple(map(int, size.split("x"))) for size in manifest.image_sizes]
    if max(max(size) for size in sizes) <= NATIVE_SIDE:
        height, width = max(manifest.image_sizes.items(), key=lambda item: (item[1], item[0]))[0].split("x")
        return int(height), int(width)
    return LOOK_SIDE, LOOK_SIDE


def gather(
    dataset: Dataset, config: DataConfig, work: Path, *, threads: int, on_part: Callable[[int, int], None] = lambda done, total: None
) -> Gathered:
    """Read all splits. `work` is a folder for the files. `on_part` is told how many images were read, of how many."""
    manifest = dataset.manifest
    splits = tuple(manifest.splits)
    starts = starts_of(manifest)
    height, width = decoded_size(manifest)
    halved = 2 if (height, width) == (LOOK_SIDE, LOOK_SIDE) else 1
    h, w, n = height // halved, width // halved, int(starts[-1])
    details = np.lib.format.open_memmap(work / "details.npy", mode="w+", dtype=np.uint8, shape=(n, h, w, 3))
    thumbs = np.lib.format.open_memmap(work / "thumbs.npy", mode="w+", dtype=np.float32, shape=(n, THUMB_SIDE**2))
    found = Gathered(
        splits=splits,
        starts=starts,
        details=details,
        thumbs=thumbs,
        bytes_of=np.zeros(n, "V16"),
        pixels_of=np.zeros(n, "V16"),
        sizes=np.zeros((n, 2), np.int64),
        measures={name: np.zeros(n, np.float32) for name in MEASURES},
        labels=np.full(n, -1, np.int64),
        is_bad=np.zeros(n, bool),
        is_native=set(manifest.image_sizes) == {f"{height}x{width}"},
    )
    decoder = Decoder(
        height=height, width=width, fit="stretch", background=config.behind, threads=threads, max_pixels=config.max_image_pixels
    )
    with decoder:
        at = 0
        for name in splits:
            split = dataset.split(name)
            hashes = split.hashes()
            for number in range(split.groups):
                group = split.read_group(number)
                rows = slice(at, at + len(group.keys))
                _keep(found, rows, group.encoded, decoder, config, halved)
                found.bytes_of[rows] = hashes_of([next(hashes)[:16] for _ in group.keys])
                if is_single_label(manifest.targets):
                    found.labels[rows] = group.labels
                at = rows.stop
                on_part(at, n)
    return found


def _keep(found: Gathered, rows: slice, encoded: Sequence[Bytes], decoder: Decoder, config: DataConfig, halved: int) -> None:
    """Decode a row group, and keep what is compared."""
    decoded = decoder.decode(encoded)
    images = decoded.images  # (b, H, W, 3) uint8
    for number, data in enumerate(encoded):
        facts = looked_at(data, max_image_pixels=config.max_image_pixels)
        if not isinstance(facts, Refusal):
            found.sizes[rows.start + number] = [int(side) for side in facts.size.split("x")]
    for number, _ in decoded.bad:
        found.is_bad[rows.start + number] = True
    sizes = found.sizes[rows]
    hashed = [hashlib.blake2b(size.tobytes() + image.tobytes(), digest_size=16).digest() for size, image in zip(sizes, images, strict=True)]
    found.pixels_of[rows] = hashes_of(hashed)
    details = halved_images(images) if halved == 2 else images
    found.details[rows] = details
    found.thumbs[rows] = thumbs_of(details)
    for name, values in looks_of(images).items():
        found.measures[name][rows] = values


def halved_images(images: Bytes) -> Bytes:
    """(b, H / 2, W / 2, 3): the mean of each square of four pixels, rounded."""
    b, height, width, _ = images.shape
    sums = images.reshape(b, height // 2, 2, width // 2, 2, 3).sum((2, 4), dtype=np.uint16)
    means: Bytes = ((sums + 2) // 4).astype(np.uint8)
    return means


def thumbs_of(details: Bytes) -> Floats:
    """(b, THUMB_SIDE ** 2) float32: brightness, blurred and averaged over equal areas."""
    _, height, width, _ = details.shape
    rows, columns = (area_weights(THUMB_SIDE, side) @ blur_weights(side) for side in (height, width))
    thumbs: Floats = (rows @ brightness_of(details) @ columns.T).reshape(len(details), THUMB_SIDE**2)
    return thumbs


def blurred(details: Bytes) -> Floats:
    """(b, h * w * 3) float32: small copies blurred, for distances."""
    b, height, width, _ = details.shape
    planes = details.transpose(0, 3, 1, 2).astype(np.float32)  # (b, 3, h, w)
    found: Floats = (blur_weights(height) @ planes @ blur_weights(width).T).reshape(b, -1).astype(np.float32, copy=False)
    return found


def brightness_of(images: Bytes) -> Floats:
    """(b, h, w) float32: luma of ITU-R BT.601."""
    found: Floats = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return found


def blur_weights(side: int) -> Floats:
    """(side, side): a Gaussian of BLUR pixels along a line; what is beyond its ends does not count."""
    place = np.arange(side)
    return _summing_to_one(np.exp(-((place[:, None] - place) ** 2) / (2 * BLUR**2)))


def area_weights(to: int, side: int) -> Floats:
    """(to, side): the mean over `to` equal parts of a line of `side` pixels."""
    edges = np.arange(to + 1) * (side / to)
    pixels = np.arange(side)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return _summing_to_one(np.maximum(shared, 0.0))


def _summing_to_one(weights: npt.NDArray[np.float64]) -> Floats:
    """Each row divided by its sum."""
    found: Floats = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return found


def looks_of(images: Bytes) -> dict[str, Floats]:
    """MEASURES -> (b,): the mean brightness (0 to 255), its standard deviation, the mean of its second differences over that (so that
    blurred images have little of it, dark and flat ones not), and the largest range of a channel."""
    light = brightness_of(images)
    contrast = light.std((1, 2))
    second = np.zeros_like(contrast)
    if min(light.shape[1:]) > 2:
        around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
        second = np.abs(around - 4 * light[:, 1:-1, 1:-1]).mean((1, 2))
    ranges = (images.max((1, 2)).astype(np.int16) - images.min((1, 2))).max(1)
    return {
        "brightness": light.mean((1, 2)),
        "contrast": contrast,
        "sharpness": second / np.maximum(contrast, 1.0),
        "colour_range": ranges.astype(np.float32),
    }
