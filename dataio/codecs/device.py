"""Copies host arrays, and what DALI made, to tensors on the device without waiting. Called by codecs and by the loader, for samples and
targets alike."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataio.codecs.codec import Ids, Store


def exact_device(device: torch.device) -> torch.device:
    """`cuda` with its index, so that it equals the device of the tensors on it."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def gather(store: Store, rows: Ids, device: torch.device) -> torch.Tensor:
    """Rows (n,) of a store, unchanged: (n, *row) on `device`. A copy from host to device is pinned and asynchronous."""
    if isinstance(store, torch.Tensor):
        if store.device == device:
            return store.index_select(0, upload(rows, device))
        assert store.device.type == "cpu", f"samples on {store.device} are wanted on {device}"
        store = store.numpy()
    dtype = torch.from_numpy(store[:0]).dtype
    out = torch.empty((len(rows), *store.shape[1:]), dtype=dtype, pin_memory=device.type == "cuda")
    # mode="clip" writes straight into `out`, the other modes use a buffer; rows come from the order and are always in range.
    np.take(store, rows, axis=0, out=out.numpy(), mode="clip")
    return out.to(device, non_blocking=True)


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copies an array to the device; the host does not wait (torch frees a pinned buffer only after its copy is done)."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copied_from_dali(made: Any, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """A batch of DALI's, (n, H, W, 3) uint8, in memory of torch's own on `device`; copied on `stream`, and the host does not wait.

    Were it handed over by DLPack, DALI would free it once torch is done with it, in a thread that calls cudaDeviceSynchronize. That
    breaks any capture of a CUDA graph that is under way on this GPU. A buffer that stays DALI's is reused in the order of its stream, which
    waits for the copy.
    """
    from nvidia.dali.plugin.pytorch import feed_ndarray  # here, like all of DALI

    out = torch.empty(tuple(made.shape()), dtype=torch.uint8, device=device)
    feed_ndarray(made, out, cuda_stream=stream)  # given a stream, it does not wait for the copy
    return out
