"""Checks the Triton kernel in Triton's interpreter, on a CPU: run by test_kernel.py in a process of its own, because Triton reads
TRITON_INTERPRET when it is imported. Prints the number of batches compared."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataio.codecs.image import kernel
from dataio.codecs.image.augment import draw, reference
from dataio.codecs.image.backends import _Torch, make_backend

STORED = 7
BLOCK = 64  # so that a small image has several blocks, the last one not full
GEOMETRIES = [(6, 6, 0), (6, 6, 2), (5, 9, 3), (9, 4, 1), (3, 2, 7), (1, 1, 1)]  # height, width, pad; also more padding than image

compared = 0


@settings(max_examples=15, deadline=None, database=None)
@example(geometry=(5, 9, 3), seed=0, epoch=1, rows=[6, 0, 3, 3, 1], flip=True)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 300),
    rows=st.lists(st.integers(0, STORED - 1), max_size=5),
    flip=st.booleans(),
)
def a_batch_equals_the_integer_reference(geometry: tuple[int, int, int], seed: int, epoch: int, rows: list[int], flip: bool) -> None:
    global compared
    height, width, pad = geometry
    images = np.random.default_rng(seed).integers(0, 256, (STORED, height, width, 3), dtype=np.uint8)
    picked = np.array(rows, np.int64)
    drawn = draw(seed=seed, epoch=epoch, ids=picked * 1000 + 7, pad=pad, flip=flip)
    device = torch.device("cpu")
    made = _Torch(height, width, pad, device)
    made._kernel = kernel.crop_and_flip  # as on a GPU
    batch = made.batch(images, picked, drawn)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    assert np.array_equal(batch.numpy(), reference(images[picked], drawn, pad))
    plain = make_backend("numpy", height=height, width=width, pad=pad, batch_size=8, device=device)
    assert torch.equal(batch, plain.batch(images, picked, drawn))
    compared += 1


if __name__ == "__main__":
    kernel.BLOCK = BLOCK
    assert type(kernel._crop_and_flip).__name__ == "InterpretedFunction", "set TRITON_INTERPRET=1"
    a_batch_equals_the_integer_reference()
    print(f"{compared} batches are equal")
