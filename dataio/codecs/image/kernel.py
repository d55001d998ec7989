"""Gather, crop and flip of a batch as one CUDA kernel, in Triton. Called by the torch backend on a GPU (`crop_and_flip`).

Each byte of the result computes the place that it comes from and loads it, or is zero outside the image: one pass over the result, one
launch, where torch's own operations make 22. The kernel computes in whole numbers, so the bytes are `augment.reference`'s.

The module imports Triton, which comes with torch's build for CUDA only, and is imported itself where there is a GPU. Triton compiles the
kernel when it is first launched, for which it needs a C compiler.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Bytes that one program writes: 8 for each thread of 4 warps."""


def crop_and_flip(images: torch.Tensor, where: torch.Tensor, pad: int) -> torch.Tensor:
    """Images (N, H, W, 3) uint8, and for each of n samples its row, dy, dx and flip, (n, 4) int64, both contiguous and on one device ->
    (n, H, W, 3) uint8. augment.Draw says what dy, dx and flip mean."""
    (n, four), (_, height, width, three) = where.shape, images.shape
    assert (four, three) == (4, 3), (where.shape, images.shape)
    assert images.is_contiguous(), images.stride()
    assert where.is_contiguous(), where.stride()
    out = torch.empty((n, height, width, 3), dtype=torch.uint8, device=images.device)
    if n:
        blocks = triton.cdiv(height * width * 3, BLOCK)
        with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            # There is nothing to fuse; left open, the option makes Triton warn of its default.
            _crop_and_flip[(n, blocks)](images, where, out, height=height, width=width, pad=pad, block=BLOCK, enable_fp_fusion=False)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _crop_and_flip(images, where, out, height: tl.constexpr, width: tl.constexpr, pad: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (i, b) writes the block b of the bytes of sample i."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(where + 4 * sample)
    dy = tl.load(where + 4 * sample + 1).to(tl.int32)
    dx = tl.load(where + 4 * sample + 2).to(tl.int32)
    flip = tl.load(where + 4 * sample + 3)
    size: tl.constexpr = height * width * 3
    at = tl.program_id(1) * block + tl.arange(0, block)  # (block,) of the sample's bytes, in the order y, x, channel
    pixel = at // 3
    y = pixel // width
    x = pixel % width
    x = tl.where(flip > 0, width - 1 - x, x)
    y = y + dy - pad
    x = x + dx - pad
    is_there = at < size
    is_inside = is_there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    byte = tl.load(images + row * size + ((y * width + x) * 3 + at % 3), mask=is_inside, other=0)
    tl.store(out + sample * size + at, byte, mask=is_there)
