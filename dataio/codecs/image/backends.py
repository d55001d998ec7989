"""Crop and flip of a batch by numpy (host), torch (host or device) or DALI (host or device), all with the same bits.

Called by the image codec, from the one thread that prepares batches: a backend reuses its buffers and is not shared between threads.
`augment.py` draws the crop and the flip; the trainer normalises on the device, the same way for all three.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack

from dataio.codecs.codec import Ids, Store
from dataio.codecs.device import copied_from_dali, exact_device, gather, upload
from dataio.codecs.image.augment import Draw

NAMES = ("dali", "torch", "numpy")
LARGE_PIXELS = 96 * 96  # CPU us an image, batched and one by one: 2 and 5 at 48 px, 4 and 6 at 64, 8 and 7 at 96, 65 and 17 at 224
_SERIAL = 32767
"""Elements that torch processes in the calling thread, whatever its number of threads."""
_log = logging.getLogger(__name__)
_PIXEL = np.dtype("V3")  # moves three channels as one element: mirroring costs 1 us an image instead of 3


class Backend(Protocol):
    """Makes augmented batches from decoded images."""

    name: str

    def batch(self, images: Store, rows: Ids, drawn: Draw) -> torch.Tensor:
        """Gathers `rows` (n,) of `images` and applies their draw: (n, H, W, 3) uint8, contiguous, on the device; n may be 0."""
        ...


def choose_backend(name: str, device: torch.device, cache: str, *, decoder: str = "cpu") -> str:
    """Resolves `data.backend` for a device, a resolved cache (device, host, none) and the type of device that decodes.

    auto: torch where the images are already on the device (no host cost per sample): those that stay there, and those that a GPU decodes
    for each step. Else numpy: 3 us an image on a CPU core against 7 for torch and 12 for DALI (batches of 100, 28x28 pixels; "backend
    alone" in `benchmarks/loader.py`).
    """
    on_device = cache == "device" and device.type != "cpu"
    if name == "auto":
        return "torch" if on_device or (cache == "none" and decoder == "cuda") else "numpy"
    if name == "numpy" and on_device:
        raise ValueError("data.backend=numpy works on the host, data.cache=device is not there; use data.cache=host or data.backend=torch")
    if name not in NAMES:
        raise ValueError(f"data.backend={name} is unknown; use one of auto, {', '.join(NAMES)}")
    return name


def make_backend(
    name: str, *, height: int, width: int, pad: int, batch_size: int, device: torch.device, threads: int = 1, table_bytes: int = 0
) -> Backend:
    """`batch_size` is the usual size of a batch, not a limit; `threads` are DALI's. `table_bytes` is the memory that numpy may use next to
    a store whose address and content stay the same from batch to batch; 0 where stores change."""
    device = exact_device(device)
    match name:
        case "numpy":
            return _Numpy(height, width, pad, batch_size, device, table_bytes)
        case "torch":
            return _Torch(height, width, pad, device)
        case "dali":
            return _Dali(height, width, pad, batch_size, device, threads)
        case _:
            raise ValueError(f"data.backend={name} is unknown; use one of {', '.join(NAMES)}")


class _Numpy:
    """Pads the gathered batch in a reused buffer, takes all crops at once through a window view, then mirrors. Images of LARGE_PIXELS and
    more are copied one by one, each once: at that size the copies through memory cost more than the calls. Where a store stays and there is
    room, the backend keeps its images padded, both plain and mirrored; then a batch is a single gather."""

    name = "numpy"

    def __init__(self, height: int, width: int, pad: int, batch_size: int, device: torch.device, table_bytes: int = 0) -> None:
        self._table_bytes = table_bytes
        self._stores: dict[int, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}  # address -> (the store, its windows)
        self._height, self._width, self._pad, self._device = height, width, pad, device
        self._is_large = height * width >= LARGE_PIXELS and pad < min(height, width)
        self._padded = self._room(0 if self._is_large else batch_size)

    def batch(self, images: Store, rows: Ids, drawn: Draw) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            images = images.numpy()
        if self._is_large:
            return upload(self._one_by_one(images, rows, drawn), self._device)
        if (windows := self._windows_of(images)) is not None:
            x = np.where(drawn.flip, 2 * self._pad - drawn.dx, drawn.dx)  # in the mirrored image, whose padding is mirrored too
            lines = windows[rows, drawn.flip.astype(np.int64), drawn.dy, x]  # (n, H, W * 3)
            return upload(lines.reshape(len(rows), self._height, self._width, 3), self._device)
        n, pad, height, width = len(rows), self._pad, self._height, self._width
        if n > len(self._padded):
            self._padded = self._room(n)
        padded = self._padded[:n]
        padded[:, pad : pad + height, pad : pad + width] = images[rows]
        # (n, 2*pad+1, 2*pad+1, H, W, 3): a view that holds every possible crop at its own index.
        windows = np.lib.stride_tricks.as_strided(
            padded, (n, 2 * pad + 1, 2 * pad + 1, height, width, 3), padded.strides[:3] + padded.strides[1:]
        )
        crops = windows[np.arange(n), drawn.dy, drawn.dx]
        pixels = crops.reshape(n, height, width * 3).view(_PIXEL)  # (n, H, W) of three bytes
        mirrored = np.flatnonzero(drawn.flip)
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        return upload(crops, self._device)

    def _windows_of(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
        """(N, 2, 2*pad+1, 2*pad+1, H, W*3): every crop of every image, plain and mirrored; each line is one run of bytes. None where stores
        change, or where there is no room."""
        count, pad, height, width = len(images), self._pad, self._height, self._width
        shape = (count, 2, height + 2 * pad, width + 2 * pad, 3)
        if int(np.prod(shape, dtype=np.int64)) > self._table_bytes:
            return None
        address = images.__array_interface__["data"][0]
        if address not in self._stores:
            table = np.zeros(shape, np.uint8)
            inner = table[:, :, pad : pad + height, pad : pad + width]
            inner[:, 0] = images
            inner[:, 1] = images[:, :, ::-1]
            a, b, line, pixel, _ = table.strides
            windows = np.lib.stride_tricks.as_strided(
                table, (count, 2, 2 * pad + 1, 2 * pad + 1, height, width * 3), (a, b, line, pixel, line, 1), writeable=False
            )
            self._stores = {address: (images, windows)}  # only one, that of training
        return self._stores[address][1]

    def _one_by_one(self, images: npt.NDArray[np.uint8], rows: Ids, drawn: Draw) -> npt.NDArray[np.uint8]:
        pad, height, width = self._pad, self._height, self._width
        out = np.empty((len(rows), height, width, 3), np.uint8)
        for target, row, dy, dx, flip in zip(out, rows.tolist(), drawn.dy.tolist(), drawn.dx.tolist(), drawn.flip.tolist(), strict=True):
            image = images[row]
            if flip:
                image, dx = _mirrored(image), 2 * pad - dx
            down, right = dy - pad, dx - pad  # where the crop begins in the image; negative in the padding
            top, bottom = max(0, -down), min(height, height - down)
            left, end = max(0, -right), min(width, width - right)
            target[top:bottom, left:end] = image[top + down : bottom + down, left + right : end + right]
            target[:top] = target[bottom:] = 0
            target[:, :left] = target[:, end:] = 0
        return out

    def _room(self, batch_size: int) -> npt.NDArray[np.uint8]:
        return np.zeros((batch_size, self._height + 2 * self._pad, self._width + 2 * self._pad, 3), dtype=np.uint8)


def _mirrored(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W, 3) with left and right exchanged, by torch's vectorised kernel: 9 us at 224 px; moving pixel by pixel takes 125.

    Where torch has more than one thread, the kernel gets a few rows at a time and takes 22 us. Otherwise this thread would start helper
    threads of its own in addition to those of training, and with one core too few it waits 4 ms for them.
    """
    height, width, _ = image.shape
    rows = height if torch.get_num_threads() == 1 else max(1, _SERIAL // (3 * width))
    parts = []
    for top in range(0, height, rows):
        pixels = torch.from_numpy(image[top : top + rows]).permute(2, 0, 1).unsqueeze(0)  # (1, 3, rows, W) uint8 channels_last
        parts.append(pixels.flip(3)[0].permute(1, 2, 0).numpy())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Torch:
    """Computes the source of each pixel and gathers once, on the device; pixels from outside the image become zero. On a GPU one kernel
    does all of it, where Triton can compile it (kernel.py); otherwise torch's operations do it in 22 launches."""

    name = "torch"

    def __init__(self, height: int, width: int, pad: int, device: torch.device) -> None:
        self._pad, self._device = pad, device
        self._kernel = _kernel(height, width, pad, device)
        self._y = torch.arange(height, device=device)
        self._x = torch.arange(width, device=device)

    def batch(self, images: Store, rows: Ids, drawn: Draw) -> torch.Tensor:
        n, height, width = len(rows), len(self._y), len(self._x)
        if isinstance(images, torch.Tensor) and images.device == self._device:
            source, picked = images, rows
        elif self._device.type == "cpu" and isinstance(images, np.ndarray):
            source, picked = torch.from_numpy(images), rows
        else:
            source, picked = gather(images, rows, self._device), np.arange(n)
        if self._kernel is not None:
            wanted = np.stack([picked, drawn.dy, drawn.dx, drawn.flip], axis=1).astype(np.int64, copy=False)  # (n, 4)
            return self._kernel(source.contiguous(), upload(wanted, self._device), self._pad)
        where = upload(np.stack([picked, drawn.dy, drawn.dx, drawn.flip]).astype(np.int64, copy=False), self._device)  # (4, n): one copy
        row, dy, dx, flip = where.unsqueeze(-1).unbind(0)  # (n, 1) each
        y = self._y + dy - self._pad  # (n, H)
        x = torch.where(flip > 0, width - 1 - self._x, self._x) + dx - self._pad  # (n, W)
        inside = ((y >= 0) & (y < height)).unsqueeze(2) & ((x >= 0) & (x < width)).unsqueeze(1)  # (n, H, W)
        line = row * height + y.clamp(0, height - 1)  # (n, H) of N * H
        pixel = line.unsqueeze(2) * width + x.clamp(0, width - 1).unsqueeze(1)  # (n, H, W) of N * H * W
        taken = source.reshape(-1, 3).index_select(0, pixel.reshape(-1)).view(n, height, width, 3)
        return taken.mul_(inside.unsqueeze(3))


_Kernel = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""kernel.crop_and_flip."""


def _kernel(height: int, width: int, pad: int, device: torch.device) -> _Kernel | None:
    """The kernel for images of this size, compiled; None on a CPU, without Triton, and, with a warning, where Triton cannot compile it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from dataio.codecs.image.kernel import crop_and_flip

        image, where = torch.zeros((1, height, width, 3), dtype=torch.uint8, device=device), torch.zeros((1, 4), dtype=torch.int64)
        crop_and_flip(image, where.to(device), pad)
    except Exception as error:  # of the C compiler that Triton calls, of its cache's folder, of Triton itself: another way is there
        _log.warning(
            "Triton cannot compile the kernel that crops and flips, so torch's operations do it, with the same bytes and more launches. It "
            "needs a C compiler, Python's headers and a folder it can write (TRITON_CACHE_DIR). It says: %s",
            str(error)[:300] or type(error).__name__,
        )
        return None
    return crop_and_flip


class _Dali:
    """A DALI pipeline: external source -> crop -> flip. On a GPU it slices with zero padding, then flips; on a CPU the batch is padded
    first and one crop_mirror_normalize does both: 6 us an image of 32 px instead of 11.

    The pipeline is built at the first batch, inside the process that uses it, because it does not survive a fork. On a GPU it runs on
    torch's current stream and the host does not wait. There the result is copied into memory of torch's own; on a CPU it is passed by
    DLPack.
    """

    name = "dali"

    def __init__(self, height: int, width: int, pad: int, batch_size: int, device: torch.device, threads: int) -> None:
        self._height, self._width, self._pad, self._device = height, width, pad, device
        self._most, self._threads = max(batch_size, 1), threads
        self._pipeline: Any = None
        self._padded = np.zeros((0, height + 2 * pad, width + 2 * pad, 3), np.uint8)

    def batch(self, images: Store, rows: Ids, drawn: Draw) -> torch.Tensor:
        on_gpu = self._device.type == "cuda"
        given: Any = gather(images, rows, self._device) if on_gpu else self._pad_all(images, rows)
        if on_gpu:
            where: dict[str, npt.NDArray[Any]] = {
                "start": np.stack([drawn.dy, drawn.dx], axis=1) - np.int32(self._pad)
            }  # (n, 2) int32, negative in the padding
        else:  # (n,) float32 each, as a fraction of the room for the crop
            where = {name: (place / max(2 * self._pad, 1)).astype(np.float32) for name, place in (("y", drawn.dy), ("x", drawn.dx))}
        where["flip"] = drawn.flip.astype(np.int32)
        pieces = [slice(at, at + self._most) for at in range(0, len(rows), self._most)]
        done = [self._run(given[piece], {name: each[piece] for name, each in where.items()}) for piece in pieces]
        match done:
            case []:
                return torch.empty((0, self._height, self._width, 3), dtype=torch.uint8, device=self._device)
            case [one]:
                return one
            case _:
                return torch.cat(done)

    def _pad_all(self, images: Store, rows: Ids) -> npt.NDArray[np.uint8]:
        """(n, H+2*pad, W+2*pad, 3), valid until the next batch."""
        n, pad = len(rows), self._pad
        if n > len(self._padded):
            self._padded = np.zeros((n, *self._padded.shape[1:]), np.uint8)
        stored = images.numpy() if isinstance(images, torch.Tensor) else images
        self._padded[:n, pad : pad + self._height, pad : pad + self._width] = stored[rows]
        return self._padded[:n]

    def _run(self, images: Any, where: dict[str, npt.NDArray[Any]]) -> torch.Tensor:
        if self._pipeline is None:
            self._pipeline = self._build()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._pipeline.feed_input("images", images, cuda_stream=stream)
        for name, each in where.items():
            self._pipeline.feed_input(name, each)
        (out,) = self._pipeline.run(stream)
        made = out.as_tensor()  # (n, H, W, 3)
        return torch.utils.dlpack.from_dlpack(made) if stream is None else copied_from_dali(made, self._device, stream)

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        device_id = self._device.index if on_gpu else None
        # exec_dynamic: without it, DALI overwrites a batch passed by DLPack two runs later. Depth 1: the loader is the queue.
        pipeline = Pipeline(
            batch_size=self._most, num_threads=self._threads, device_id=device_id, seed=0, prefetch_queue_depth=1, exec_dynamic=True
        )
        with pipeline:
            images = fn.external_source(name="images", device="gpu" if on_gpu else "cpu", layout="HWC", dtype=types.UINT8, ndim=3)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            shape = [self._height, self._width]
            if on_gpu:
                start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
                crops = fn.slice(images, start=start, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0])
                done = fn.flip(crops, horizontal=flip)
            else:
                y, x = (fn.external_source(name=name, dtype=types.FLOAT, ndim=0) for name in ("y", "x"))
                done = fn.crop_mirror_normalize(
                    images,
                    crop=shape,
                    crop_pos_y=y,
                    crop_pos_x=x,
                    mirror=flip,
                    mean=[0.0] * 3,
                    std=[1.0] * 3,
                    dtype=types.UINT8,
                    output_layout="HWC",
                )
            pipeline.set_outputs(done)
        pipeline.build()
        return pipeline
