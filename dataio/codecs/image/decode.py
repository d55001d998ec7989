"""Decodes images to uint8 RGB with DALI, and reports the bad ones by index and reason.

Called by the codec (a Decoder of one size), by convert (a Checker: every image at its own size) and by `trainer.predict`. All images of a
batch are sniffed, and those that pass are decoded together. Only if DALI fails is the batch halved until the bad images are found, because
DALI's error rarely names them. The pipeline survives a failed batch. The caller chooses the samples and handles bad ones.

On a CPU, DALI decodes and torch resizes: torch's kernel for uint8 takes 140 us, DALI's 800 (photographs of 256 to 500 pixels a side to
224). On a GPU, DALI does both. Pixels differ between the two devices, because their JPEG decoders differ; `decoder_device` says which of
them decodes a run's images.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from dataio.codecs.codec import Refusal
from dataio.codecs.image.sniff import Header, simple_webp, sniff
from dataio.config import Colour, Fit
from dataio.raw_lines import kept_off

T = TypeVar("T")
Put = Callable[[list[int], Any], None]
"""Gets the indices of n images and the images, one tensor of DALI's, (n, H, W, 3) uint8 on the decoder's device. It is invalid after the
call."""
DECODER_VERSIONS = {"cpu": 2, "cuda": 3}
"""Device type -> version of resized images. Raised when their pixels change, because the weights of runs then change too. Images of the
right size are never resampled and are the same in all versions. No two decoders bear the same number, so that it names one of them."""
SMALL_SIDE = 64
"""Images of up to this many pixels a side are decoded by the CPU on a GPU's machine too: of 95 us for a JPEG of 64 px, about 60 are calls,
which decoding on a GPU does not save, and this way a run has the same pixels on both."""
COLOURS: dict[Colour, tuple[int, int, int]] = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
"""Of `data.background`."""
FIRST_VERSIONS = {"cpu": 1, "cuda": 1}
"""Versions for runs whose checkpoints name none: at that time DALI resized on a CPU too."""

# A 1x1 PNG. A pipeline that fails on it is itself broken (no memory, a lost device); no image caused that.
_PROBE_BYTES = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c636064620600000e0007d76fe4780000000049454e44ae426082"
)


def decoder_device(height: int, width: int, *, fit: Fit, device: str) -> str:
    """Type of device (cpu, cuda) that decodes to height x width for ranks that compute on `device`. The CPU also decodes for a GPU where
    all images are small, which is known where other sizes are refused."""
    is_small = fit == "refuse" and max(height, width) <= SMALL_SIDE
    return "cpu" if is_small else device


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Decoded images; the row of a bad one holds zeros."""

    images: np.ndarray
    """(n, H, W, 3) uint8"""
    bad: tuple[tuple[int, str], ...]
    """(index, reason), ordered by index"""
    transparent: int = 0
    """Good images with an alpha channel."""


class Decoder:
    """Decodes to height x width. It builds pipelines at the first call, in the process that uses them; not thread-safe.

    fit="refuse" makes an image of another size bad; "stretch" resizes it to height x width whatever its shape; "crop" takes the largest
    part of the right shape from its middle (`window_of`; on a GPU, DALI's "not_smaller" and crop) and resizes that. Resizing is bilinear
    with antialiasing (a triangular filter as wide as the scale). An image of the right size is never resampled. A `background` is put
    behind transparent images, whose alpha is dropped otherwise. With a `device_id`, that GPU decodes JPEG. At most `threads` threads work
    at a time. The result for an image depends neither on the threads nor on the other images of the batch.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        fit: Fit,
        background: Colour = "",
        threads: int = 1,
        device_id: int | None = None,
        max_pixels: int,
        batch_size: int = 64,
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"images of {height}x{width} pixels cannot be made; data.image_size must be positive")
        self.height, self.width, self._fit, self._max_pixels = height, width, fit, max_pixels
        self._batch_size, self._threads, self._background = batch_size, threads, background
        self._native = _Pipeline(batch_size=batch_size, threads=threads, device_id=device_id)
        self._resized: _Pipeline | None = None
        if device_id is not None and fit != "refuse":
            self._resized = _Pipeline(batch_size=batch_size, threads=threads, device_id=device_id, size=(height, width), fit=fit)
        self._pool: ThreadPoolExecutor | None = None

    def decode(self, encoded: Sequence[np.ndarray | bytes], out: np.ndarray | None = None) -> Decoded:
        """Decodes any number of images, each (bytes,) uint8, into `out`, (n or more, H, W, 3) uint8, if given: a reused buffer need not
        be cleared, and its pages are already mapped. An exception means that the decoder is broken, not an image."""
        shape = (len(encoded), self.height, self.width, 3)
        images = np.zeros(shape, np.uint8) if out is None else out[: len(encoded)]  # (n, H, W, 3)
        assert images.shape == shape, (images.shape, shape)
        sorted_out = self._sorted_out(encoded)
        bad = sorted_out.bad

        def place(batch: Sequence[_Encoded], decoded: Sequence[np.ndarray]) -> None:
            other = []
            for each, image in zip(batch, decoded, strict=True):
                if image.shape != (each.height, each.width, 3):
                    bad[each.index] = f"undecodable: decodes to {image.shape}, its header says {each.height}x{each.width}"
                elif image.shape == images.shape[1:]:
                    images[each.index] = image
                else:
                    other.append((self._wanted(image), images[each.index]))
            self._resize(other)

        def place_resized(batch: Sequence[_Encoded], decoded: Sequence[np.ndarray]) -> None:
            for each, image in zip(batch, decoded, strict=True):
                images[each.index] = image

        self._native.decode(sorted_out.native, place, bad)
        if self._resized is not None:
            self._resized.decode(sorted_out.resized, place_resized, bad)
        if out is not None:
            images[list(bad)] = 0
        return Decoded(images=images, bad=tuple(sorted(bad.items())), transparent=len(sorted_out.transparent - bad.keys()))

    def decode_there(self, encoded: Sequence[np.ndarray | bytes], put: Put, stream: Any = None) -> tuple[tuple[int, str], ...]:
        """The same for images that stay where they are decoded, on the device: `put` gets them batch by batch, and not the bad ones. They
        are made on the CUDA stream `stream`, and the host does not wait for it. Returns (index, reason) of each bad one, ordered by
        index."""
        assert self._fit == "refuse" or self._resized is not None, "on a CPU, torch resizes what DALI decodes"
        sorted_out = self._sorted_out(encoded)
        bad = sorted_out.bad
        for pipeline, group in ((self._native, sorted_out.native), (self._resized, sorted_out.resized)):
            if pipeline is not None:
                self._decode_there(pipeline, group, put, stream, bad)
        return tuple(sorted(bad.items()))

    def _decode_there(self, pipeline: "_Pipeline", group: Sequence["_Encoded"], put: Put, stream: Any, bad: dict[int, str]) -> None:
        def use(batch: Sequence[_Encoded], made: Any) -> None:
            shapes = [tuple(shape) for shape in made.shape()]
            others = [number for number, shape in enumerate(shapes) if shape != (self.height, self.width, 3)]
            if not others:
                put([each.index for each in batch], made.as_tensor())
            elif len(batch) == 1:
                bad[batch[0].index] = f"undecodable: decodes to {shapes[0]}, its header says {batch[0].height}x{batch[0].width}"
            else:  # one of them is not what its header says, which is rare
                for each in batch:
                    self._decode_there(pipeline, [each], put, stream, bad)

        pipeline.decode_there(group, use, bad, stream)

    def _sorted_out(self, encoded: Sequence[np.ndarray | bytes]) -> "_SortedOut":
        """Which images can be decoded by which pipeline, by their headers."""
        found = _SortedOut()
        for index, data in enumerate(encoded):
            header = sniff(data, max_pixels=self._max_pixels)
            if isinstance(header, Refusal):
                found.bad[index] = header.reason
                continue
            is_exact = (header.height, header.width) == (self.height, self.width)
            if not is_exact and self._fit == "refuse":
                found.bad[index] = f"wrong size: {header.height}x{header.width} instead of {self.height}x{self.width}"
                continue
            if header.has_alpha:
                found.transparent.add(index)
            prepared = _prepared(data, header, self._background)
            if isinstance(prepared, Refusal):
                found.bad[index] = prepared.reason
                continue
            given = _Encoded(index=index, data=prepared, height=header.height, width=header.width)
            (found.native if is_exact or self._resized is None else found.resized).append(given)
        return found

    def _wanted(self, image: np.ndarray) -> np.ndarray:
        """(h, w, 3): the part of an image of another size that is to be resized."""
        if self._fit == "stretch":
            return image
        top, left, height, width = window_of(image.shape[0], image.shape[1], self.height, self.width)
        return image[top : top + height, left : left + width]

    def _resize(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Resizes each first image into the second array of its pair, with the threads that DALI leaves idle meanwhile."""
        if self._threads == 1 or len(pairs) < 2:
            _resize(pairs)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="resize")
        list(self._pool.map(_resize, (pairs[number :: self._threads] for number in range(self._threads))))

    def warm_up(self) -> None:
        """Builds the pipeline that the first decode needs, to use the time until there are bytes to decode."""
        (self._native if self._resized is None else self._resized).warm_up()

    def close(self) -> None:
        """Frees the pipelines' threads and memory; the next decode builds them again."""
        self._native.close()
        if self._resized is not None:
            self._resized.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Window = tuple[int, int, int, int]
"""Part of an image: (top, left, height, width) in pixels."""


def window_of(height: int, width: int, target_height: int, target_width: int) -> Window:
    """The largest part of an image that has the target's shape, from its middle: sides rounded to the nearest pixel, offsets down.

    It is cut out before resizing. So no pixels are resized in vain, and an image of 1 x 10,000 pixels does not become one of
    224 x 2,240,000 on the way. Its middle is right to half a pixel of the source.
    """
    if height * target_width <= width * target_height:
        window = (height, max(1, (2 * height * target_width + target_height) // (2 * target_height)))
    else:
        window = (max(1, (2 * width * target_height + target_width) // (2 * target_width)), width)
    return (height - window[0]) // 2, (width - window[1]) // 2, *window


class Checker:
    """Decodes images at their own size, only to find those that cannot be decoded: convert's full check. Not thread-safe."""

    def __init__(self, *, threads: int = 1, max_pixels: int, batch_size: int = 64, batch_pixels: int = 64 << 20) -> None:
        self._max_pixels, self._batch_size, self._batch_pixels = max_pixels, batch_size, batch_pixels
        self._pipeline = _Pipeline(batch_size=batch_size, threads=threads, device_id=None)

    def check(self, encoded: Sequence[np.ndarray | bytes]) -> list[Header | Refusal]:
        """For each image its header, or the reason to refuse it."""
        found = [sniff(data, max_pixels=self._max_pixels) for data in encoded]
        batch: list[_Encoded] = []
        pixels = 0
        bad: dict[int, str] = {}

        def compare(batch: Sequence[_Encoded], decoded: Sequence[np.ndarray]) -> None:
            for each, image in zip(batch, decoded, strict=True):
                if image.shape != (each.height, each.width, 3):
                    bad[each.index] = f"undecodable: decodes to {image.shape}, its header says {each.height}x{each.width}"

        for index, header in enumerate(found):
            if isinstance(header, Refusal):
                continue
            size = header.height * header.width
            if batch and pixels + size > self._batch_pixels:  # bounds the memory of a batch of large photographs
                self._pipeline.decode(batch, compare, bad)
                batch, pixels = [], 0
            prepared = _prepared(encoded[index], header)
            if isinstance(prepared, Refusal):
                bad[index] = prepared.reason
                continue
            batch.append(_Encoded(index=index, data=prepared, height=header.height, width=header.width))
            pixels += size
        self._pipeline.decode(batch, compare, bad)
        return [Refusal(reason=bad[index]) if index in bad else header for index, header in enumerate(found)]

    def close(self) -> None:
        self._pipeline.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """An image that passed the sniff."""

    index: int
    """Position in the caller's sequence."""
    data: np.ndarray = field(repr=False)
    """(bytes,) uint8"""
    height: int
    width: int
    """From the header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SortedOut:
    """Images by what is to be done with them."""

    native: list[_Encoded] = field(default_factory=list)
    """Decoded at their own size."""
    resized: list[_Encoded] = field(default_factory=list)
    """Resized by the pipeline."""
    bad: dict[int, str] = field(default_factory=dict)
    """Index -> reason; more are added while decoding."""
    transparent: set[int] = field(default_factory=set)
    """Indices of images with an alpha channel."""


_PROBE = _Encoded(index=-1, data=np.frombuffer(_PROBE_BYTES, np.uint8), height=1, width=1)
_Use = Callable[[Sequence[_Encoded], Sequence[np.ndarray]], None]
"""Gets the images that were decoded together, each (h, w, 3) uint8; they belong to DALI and are invalid after the call."""
_UseThere = Callable[[Sequence[_Encoded], Any], None]
"""The same, the images being one of DALI's lists of tensors."""


class _Pipeline:
    """A DALI pipeline from bytes to RGB images, built when first used."""

    def __init__(
        self, *, batch_size: int, threads: int, device_id: int | None, size: tuple[int, int] | None = None, fit: Fit = "refuse"
    ) -> None:
        if batch_size < 1 or threads < 1:
            raise ValueError(f"a decoder needs at least one thread and a batch of one; got threads={threads}, batch_size={batch_size}")
        self._batch_size, self._threads, self._device_id, self._size, self._fit = batch_size, threads, device_id, size, fit
        self._pipeline: Any = None

    def decode(self, encoded: Sequence[_Encoded], use: _Use, bad: dict[int, str]) -> None:
        """Passes the decoded images to `use`, batch by batch; records the others in `bad`."""
        for begin in range(0, len(encoded), self._batch_size):
            self._decode(encoded[begin : begin + self._batch_size], self._run, use, bad)

    def decode_there(self, encoded: Sequence[_Encoded], use: _UseThere, bad: dict[int, str], stream: Any) -> None:
        """The same for images that stay on the device; they are made on the CUDA stream `stream`."""

        def run(batch: Sequence[_Encoded]) -> Any:
            return self._output(batch, stream)

        for begin in range(0, len(encoded), self._batch_size):
            self._decode(encoded[begin : begin + self._batch_size], run, use, bad)

    def warm_up(self) -> None:
        self._run([_PROBE])

    def close(self) -> None:
        self._pipeline = None

    def _decode(
        self,
        batch: Sequence[_Encoded],
        run: Callable[[Sequence[_Encoded]], T],
        use: Callable[[Sequence[_Encoded], T], None],
        bad: dict[int, str],
    ) -> None:
        try:
            images = run(batch)
        except RuntimeError as error:
            if len(batch) > 1:
                half = len(batch) // 2
                self._decode(batch[:half], run, use, bad)
                self._decode(batch[half:], run, use, bad)
                return
            self._run([_PROBE])  # raises, and so ends the work, if the pipeline itself is broken
            bad[batch[0].index] = f"undecodable: {_cause(error)}"
            return
        use(batch, images)

    def _output(self, batch: Sequence[_Encoded], stream: Any = None) -> Any:
        if self._pipeline is None:
            self._pipeline = _build(self._batch_size, self._threads, self._device_id, self._size, self._fit)
        with kept_off():
            (output,) = self._pipeline.run(stream, encoded=[each.data for each in batch])
        return output

    def _run(self, batch: Sequence[_Encoded]) -> list[np.ndarray]:
        output = self._output(batch)
        if self._device_id is not None:
            output = output.as_cpu()
        # output[index] is a view; at() copies, which takes 20 us a photograph.
        return [np.asarray(output[index]) for index in range(len(batch))]


def _build(batch_size: int, threads: int, device_id: int | None, size: tuple[int, int] | None, fit: Fit) -> Any:
    # imported here: DALI takes 0.2 s and must be loaded in the process that runs the pipeline
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        if device_id is None:
            image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        else:
            # Otherwise DALI gives some JPEGs of a batch to the GPU's JPEG engine and the rest to a CUDA decoder with other pixels: an image
            # would depend on its batch (https://github.com/NVIDIA/DALI/issues/6366, /2232).
            image = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, hw_decoder_load=0.0)
        if size is None:
            return image
        mode = "stretch" if fit == "stretch" else "not_smaller"
        image = fn.resize(image, size=list(size), mode=mode, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop(image, crop=size) if fit == "crop" else image

    built = pipeline()
    built.build()
    return built


def _resize(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Resizes each image, (h, w, 3) uint8, into its pair's second array, (H, W, 3) uint8. The kernel has one thread and lets others run."""
    import torch  # here, because the driver converts and checks images without torch
    import torch.nn.functional as F

    for image, place in pairs:
        # (1, 3, h, w) uint8 channels_last. unsqueeze gives the first dimension a stride that torch recognises; image[None] and
        # permute(...)[None] do not, and then the result is not channels_last: 300 us a photograph instead of 137.
        source = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
        resized = F.interpolate(source, size=place.shape[:2], mode="bilinear", antialias=True)  # (1, 3, H, W) uint8
        place[:] = resized[0].permute(1, 2, 0).numpy()


def _prepared(data: np.ndarray | bytes, header: Header, background: Colour = "") -> np.ndarray | Refusal:
    """The bytes in the form that DALI takes: a contiguous (bytes,) uint8 array; or the reason why there is none."""
    if header.format == "gif" or (background and header.has_alpha):
        try:
            data = _read_by_pillow(bytes(data), background if header.has_alpha else "")
        except Exception as error:  # whatever Pillow raises for damaged data: OSError, ValueError, SyntaxError, EOFError, IndexError, ...
            return Refusal(reason=f"undecodable: {str(error)[:200] or type(error).__name__}")
    elif header.format == "webp" and bytes(data[12:16]) == b"VP8X":
        data = simple_webp(bytes(data))
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    assert data.dtype == np.uint8, f"encoded images are (bytes,) uint8, not {data.dtype}"
    return np.ascontiguousarray(data)


def _read_by_pillow(data: bytes, background: Colour) -> bytes:
    """An image as a PNM: a GIF, which DALI cannot decode, or one with transparency, whose alpha DALI drops."""
    from PIL import Image, ImageOps  # here: most data sets do not need it

    with Image.open(io.BytesIO(data), formats=("GIF", "PNG", "WEBP", "TIFF")) as image:
        if not background:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3) uint8
        else:
            upright = ImageOps.exif_transpose(image) if image.format == "PNG" else image  # as for images without transparency
            pixels = flattened(np.asarray(upright.convert("RGBA")), COLOURS[background])
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def flattened(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 3) uint8: an image (H, W, 4) uint8, not premultiplied, in front of a colour; rounded to the nearest."""
    alpha = pixels[..., 3:].astype(np.uint32)
    mixed = pixels[..., :3] * alpha + np.array(colour, np.uint32) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _cause(error: RuntimeError) -> str:
    """The sentence of DALI's report that names the cause."""
    _, _, text = str(error).rpartition("encountered:\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [str(error)]
    if lines[0].startswith("Failed to decode sample #"):  # the number counts within a part of the batch, and the line says nothing else
        return "the compressed data are damaged"
    return lines[0][:200]
