"""Encoded images to uint8 RGB by DALI, with the bad ones set apart by index and reason.

Called by the loader (a Decoder of one size) and by convert (a Checker: every image at its own size). A batch is sniffed, what passes is
decoded together, and only if DALI fails is the batch halved until the bad images are found: DALI's error rarely names them. The pipeline
survives a failed batch. Which samples to decode, and what becomes of bad ones, is the caller's.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataio.config import Fit
from dataio.parquet import Split
from dataio.quarantine import BadSample
from dataio.sniff import Header, Refusal, simple_webp, sniff
from dataio.stream import in_order

# A 1x1 PNG. A pipeline that fails on it is broken (no memory, a lost device): that is no image's fault.
_PROBE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c636064620600000e0007d76fe4780000000049454e44ae426082"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Decoded images; the place of a bad one holds zeros."""

    images: np.ndarray
    """(n, H, W, 3) uint8"""
    bad: tuple[tuple[int, str], ...]
    """(index, reason), by index"""


class Decoder:
    """Decodes to height x width. Pipelines are built at the first call, in the process that uses them; not thread-safe.

    An image of another size is bad under fit="refuse"; "stretch" resizes it to height x width whatever its shape; "crop" resizes it,
    keeping its shape, to the smallest size that covers height x width, and takes the centre. Resizing is linear with antialiasing (a
    triangular filter as wide as the scale). An image of the right size is never resampled. With a `device_id`, JPEG is decoded on that
    GPU.
    """

    def __init__(
        self, *, height: int, width: int, fit: Fit, threads: int = 1, device_id: int | None = None, max_pixels: int, batch_size: int = 64
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"images of {height}x{width} pixels cannot be made; data.image_size must be positive")
        self.height, self.width, self._fit, self._max_pixels = height, width, fit, max_pixels
        self._batch_size = batch_size
        self._native = _Pipeline(batch_size=batch_size, threads=threads, device_id=device_id)
        self._resized = _Pipeline(batch_size=batch_size, threads=threads, device_id=device_id, size=(height, width), fit=fit)

    def decode(self, encoded: Sequence[np.ndarray | bytes], out: np.ndarray | None = None) -> Decoded:
        """Any number of images, each (bytes,) uint8. They are written into `out`, (n or more, H, W, 3) uint8, if given: a buffer used again
        need not be cleared and has its pages. An exception means that the decoder is broken, not an image."""
        shape = (len(encoded), self.height, self.width, 3)
        images = np.zeros(shape, np.uint8) if out is None else out[: len(encoded)]  # (n, H, W, 3)
        assert images.shape == shape, (images.shape, shape)
        bad: dict[int, str] = {}
        exact: list[tuple[int, np.ndarray]] = []
        other: list[tuple[int, np.ndarray]] = []
        for index, data in enumerate(encoded):
            header = sniff(data, max_pixels=self._max_pixels)
            if isinstance(header, Refusal):
                bad[index] = header.reason
            elif (header.height, header.width) == (self.height, self.width):
                exact.append((index, _prepared(data, header)))
            elif self._fit == "refuse":
                bad[index] = f"wrong size: {header.height}x{header.width} instead of {self.height}x{self.width}"
            else:
                other.append((index, _prepared(data, header)))

        def place(index: int, image: np.ndarray) -> None:
            if image.shape == images.shape[1:]:
                images[index] = image
            else:
                bad[index] = f"undecodable: decodes to {image.shape}, its header says {self.height}x{self.width}"

        self._native.decode(exact, place, bad)
        self._resized.decode(other, place, bad)
        if out is not None:
            images[list(bad)] = 0
        return Decoded(images=images, bad=tuple(sorted(bad.items())))

    def warm_up(self) -> None:
        """Builds the pipeline that the first decode will need: a good use of the time until there are bytes to decode."""
        (self._native if self._fit == "refuse" else self._resized).warm_up()

    def close(self) -> None:
        """Frees the pipelines' threads and memory; the next decode builds them anew."""
        self._native.close()
        self._resized.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checker:
    """Decodes images at their own size, only to learn which ones can be: convert's full check. Not thread-safe."""

    def __init__(self, *, threads: int = 1, max_pixels: int, batch_size: int = 64, batch_pixels: int = 64 << 20) -> None:
        self._max_pixels, self._batch_size, self._batch_pixels = max_pixels, batch_size, batch_pixels
        self._pipeline = _Pipeline(batch_size=batch_size, threads=threads, device_id=None)

    def check(self, encoded: Sequence[np.ndarray | bytes]) -> list[Header | Refusal]:
        """For each image its header, or why it cannot be used."""
        found = [sniff(data, max_pixels=self._max_pixels) for data in encoded]
        batch: list[tuple[int, np.ndarray]] = []
        pixels = 0
        bad: dict[int, str] = {}

        def compare(index: int, image: np.ndarray) -> None:
            header = found[index]
            assert isinstance(header, Header)
            if image.shape != (header.height, header.width, 3):
                bad[index] = f"undecodable: decodes to {image.shape}, its header says {header.height}x{header.width}"

        for index, header in enumerate(found):
            if isinstance(header, Refusal):
                continue
            size = header.height * header.width
            if batch and pixels + size > self._batch_pixels:  # keeps the memory of a batch of large photographs bounded
                self._pipeline.decode(batch, compare, bad)
                batch, pixels = [], 0
            batch.append((index, _prepared(encoded[index], header)))
            pixels += size
        self._pipeline.decode(batch, compare, bad)
        return [Refusal(reason=bad[index]) if index in bad else header for index, header in enumerate(found)]

    def close(self) -> None:
        self._pipeline.close()


def decode_split(
    split: Split,
    decoder: Decoder,
    *,
    on_bad: Callable[[BadSample], None],
    out: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    groups: Iterable[int] | None = None,
) -> np.ndarray:
    """Decodes a whole split, or some of its row groups, into `out` ((count, H, W, 3) uint8; made, of zeros, if None), and returns it.

    Images stand at their sample ids. Their labels go into `labels`, (count,) int64, if given. Each bad sample is passed to `on_bad`, after
    its label was placed; the place of its image is zeroed. The next row groups are read meanwhile.
    """
    if out is None:
        out = np.zeros((split.count, decoder.height, decoder.width, 3), np.uint8)
    with closing(in_order(split, range(split.groups) if groups is None else groups)) as reading:
        for rows in reading:
            decoded = decoder.decode(rows.encoded)
            begin = int(rows.ids[0])
            place = slice(begin, begin + len(rows.ids))
            out[place] = decoded.images
            if labels is not None:
                labels[place] = rows.labels
            for index, reason in decoded.bad:
                on_bad(BadSample(key=rows.keys[index], reason=reason, split=split.name, sample_id=begin + index))
    return out


class _Pipeline:
    """A DALI pipeline from bytes to RGB images, built when first used."""

    def __init__(
        self, *, batch_size: int, threads: int, device_id: int | None, size: tuple[int, int] | None = None, fit: Fit = "refuse"
    ) -> None:
        if batch_size < 1 or threads < 1:
            raise ValueError(f"a decoder needs at least one thread and a batch of one; got threads={threads}, batch_size={batch_size}")
        self._batch_size, self._threads, self._device_id, self._size, self._fit = batch_size, threads, device_id, size, fit
        self._pipeline: Any = None

    def decode(self, encoded: Sequence[tuple[int, np.ndarray]], place: Callable[[int, np.ndarray], None], bad: dict[int, str]) -> None:
        """Calls place(index, image) for each (index, bytes) that decodes; notes the others in `bad`."""
        for begin in range(0, len(encoded), self._batch_size):
            self._decode(encoded[begin : begin + self._batch_size], place, bad)

    def warm_up(self) -> None:
        self._run([np.frombuffer(_PROBE, np.uint8)])

    def close(self) -> None:
        self._pipeline = None

    def _decode(self, batch: Sequence[tuple[int, np.ndarray]], place: Callable[[int, np.ndarray], None], bad: dict[int, str]) -> None:
        try:
            images = self._run([data for _, data in batch])
        except RuntimeError as error:
            if len(batch) > 1:
                half = len(batch) // 2
                self._decode(batch[:half], place, bad)
                self._decode(batch[half:], place, bad)
                return
            self._run([np.frombuffer(_PROBE, np.uint8)])  # raises, and so ends the work, if the pipeline itself is broken
            bad[batch[0][0]] = f"undecodable: {_cause(error)}"
            return
        for (index, _), image in zip(batch, images, strict=True):
            place(index, image)

    def _run(self, encoded: list[np.ndarray]) -> list[np.ndarray]:
        if self._pipeline is None:
            self._pipeline = _build(self._batch_size, self._threads, self._device_id, self._size, self._fit)
        (output,) = self._pipeline.run(encoded=encoded)
        if self._device_id is not None:
            output = output.as_cpu()
        return [np.asarray(output.at(index)) for index in range(len(encoded))]


def _build(batch_size: int, threads: int, device_id: int | None, size: tuple[int, int] | None, fit: Fit) -> Any:
    # imported here: DALI takes 0.2 s and must be loaded in the process that runs the pipeline
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB)
        if size is None:
            return image
        mode = "stretch" if fit == "stretch" else "not_smaller"
        image = fn.resize(image, size=list(size), mode=mode, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop(image, crop=size) if fit == "crop" else image

    built = pipeline()
    built.build()
    return built


def _prepared(data: np.ndarray | bytes, header: Header) -> np.ndarray:
    """The bytes as DALI takes them: a contiguous (bytes,) uint8 array."""
    if header.format == "webp" and bytes(data[12:16]) == b"VP8X":
        data = simple_webp(bytes(data))
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    assert data.dtype == np.uint8, f"encoded images are (bytes,) uint8, not {data.dtype}"
    return np.ascontiguousarray(data)


def _cause(error: RuntimeError) -> str:
    """The sentence of DALI's report that says what failed."""
    _, _, text = str(error).rpartition("encountered:\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [str(error)]
    if lines[0].startswith("Failed to decode sample #"):  # numbered within a part of the batch, and nothing more
        return "the compressed data are damaged"
    return lines[0][:200]
