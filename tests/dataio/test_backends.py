"""dali, torch and numpy make the same uint8 batch, and it is the integer reference's."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.codecs.device import copied_from_dali, gather
from dataio.codecs.image.augment import Draw, centre, draw, reference
from dataio.codecs.image.backends import NAMES, Backend, _Dali, choose_backend, make_backend

CPU = torch.device("cpu")
GEOMETRIES = [(6, 6, 0), (6, 6, 2), (5, 9, 3), (9, 4, 1), (3, 2, 7), (1, 1, 1)]  # height, width, pad; also more padding than image
STORED = 11


@cache
def backend(name: str, geometry: tuple[int, int, int], batch_size: int = 8) -> Backend:
    height, width, pad = geometry
    return make_backend(name, height=height, width=width, pad=pad, batch_size=batch_size, device=CPU)


def store(geometry: tuple[int, int, int], seed: int) -> np.ndarray:
    height, width, _ = geometry
    return np.random.default_rng(seed).integers(0, 256, (STORED, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 300),
    rows=st.lists(st.integers(0, STORED - 1), max_size=20),  # empty, single, repeated, longer than batch_size
    flip=st.booleans(),
    as_tensor=st.booleans(),
)
def test_a_batch_equals_the_integer_reference(
    name: str, geometry: tuple[int, int, int], seed: int, epoch: int, rows: list[int], flip: bool, as_tensor: bool
) -> None:
    images = store(geometry, seed)
    before = images.copy()
    picked = np.array(rows, np.int64)
    drawn = draw(seed=seed, epoch=epoch, ids=picked * 1000 + 7, pad=geometry[2], flip=flip)
    batch = backend(name, geometry).batch(torch.from_numpy(images) if as_tensor else images, picked, drawn)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    assert batch.shape == (len(rows), geometry[0], geometry[1], 3)
    assert np.array_equal(batch.numpy(), reference(images[picked], drawn, geometry[2]))
    assert np.array_equal(images, before)


@settings(max_examples=60, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    seed=st.integers(0, 2**32),
    rows=st.lists(st.integers(0, STORED - 1), max_size=20),
    threads=st.integers(1, 2),
)
def test_large_images_go_one_by_one_to_the_same_bits(geometry: tuple[int, int, int], seed: int, rows: list[int], threads: int) -> None:
    images = store(geometry, seed)
    picked = np.array(rows, np.int64)
    drawn = draw(seed=seed, epoch=1, ids=picked * 1000 + 7, pad=geometry[2], flip=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataio.codecs.image.backends.LARGE_PIXELS", 0)
        patch.setattr("dataio.codecs.image.backends._SERIAL", 40)  # a few rows, where torch has several threads
        patch.setattr("torch.get_num_threads", lambda: threads)
        large = make_backend("numpy", height=geometry[0], width=geometry[1], pad=geometry[2], batch_size=8, device=CPU)
        batch = large.batch(images, picked, drawn)
    assert batch.is_contiguous()
    assert np.array_equal(batch.numpy(), reference(images[picked], drawn, geometry[2]))


@settings(max_examples=60, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    seed=st.integers(0, 2**32),
    batches=st.lists(st.lists(st.integers(0, STORED - 1), max_size=20), min_size=1, max_size=3),
    as_tensor=st.booleans(),
)
def test_a_table_of_a_store_that_stays_gives_the_same_bits(
    geometry: tuple[int, int, int], seed: int, batches: list[list[int]], as_tensor: bool
) -> None:
    height, width, pad = geometry
    made = make_backend("numpy", height=height, width=width, pad=pad, batch_size=8, device=CPU, table_bytes=1 << 30)
    for images in (store(geometry, seed), store(geometry, seed + 1)):  # another store after the first
        given_store = torch.from_numpy(images) if as_tensor else images
        for epoch, rows in enumerate(batches):
            picked = np.array(rows, np.int64)
            drawn = draw(seed=seed, epoch=epoch, ids=picked * 1000 + 7, pad=pad, flip=True)
            batch = made.batch(given_store, picked, drawn)
            assert batch.is_contiguous()
            assert np.array_equal(batch.numpy(), reference(images[picked], drawn, pad))
            batch.fill_(7)  # it is the caller's


@pytest.mark.parametrize("pad", [0, 1, 3, 7, 13, 28, 100])
def test_dali_finds_every_crop_of_any_padding(pad: int) -> None:
    """It is told a part of the room, in float32, and rounds."""
    side = 2 * pad + 1
    drawn = Draw(dy=np.arange(side, dtype=np.int32), dx=np.arange(side, dtype=np.int32)[::-1].copy(), flip=np.arange(side) % 2 == 0)
    images, rows = store((3, 3, pad), 0), np.zeros(side, np.int64)
    made = make_backend("dali", height=3, width=3, pad=pad, batch_size=side, device=CPU)
    assert np.array_equal(made.batch(images, rows, drawn).numpy(), reference(images[rows], drawn, pad))


@pytest.mark.parametrize("name", NAMES)
def test_every_crop_and_flip_of_an_image_is_exact(name: str) -> None:
    geometry = (5, 4, 2)
    side = 2 * geometry[2] + 1
    dy, dx, flip = (axis.ravel() for axis in np.meshgrid(np.arange(side), np.arange(side), [False, True], indexing="ij"))
    drawn = Draw(dy=dy.astype(np.int32), dx=dx.astype(np.int32), flip=flip)
    images = store(geometry, 0)
    rows = np.full(len(dy), 3)
    assert np.array_equal(backend(name, geometry).batch(images, rows, drawn).numpy(), reference(images[rows], drawn, 2))


@pytest.mark.parametrize("name", NAMES)
def test_kept_batches_are_not_overwritten_by_later_ones(name: str) -> None:
    geometry = (6, 6, 2)
    images = store(geometry, 1)
    kept = []
    for step in range(8):
        rows = np.random.default_rng(step).integers(0, STORED, 8)
        drawn = draw(seed=0, epoch=step, ids=rows, pad=2, flip=True)
        kept.append((backend(name, geometry).batch(images, rows, drawn), reference(images[rows], drawn, 2)))
    for batch, expected in kept:
        assert np.array_equal(batch.numpy(), expected)


def dali_batch(images: np.ndarray) -> Any:
    """(n, H, W, 3) as DALI has it."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=len(images), num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(fn.copy(fn.external_source(name="images", layout="HWC")))
    pipeline.feed_input("images", images)
    return pipeline.run()[0].as_tensor()


def test_a_copy_of_dalis_batch_is_torchs_own_and_is_made_on_the_given_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali.plugin import pytorch as plugin

    copy, streams = plugin.feed_ndarray, []

    def on_the_host(made: Any, out: torch.Tensor, *, cuda_stream: object) -> torch.Tensor:
        streams.append(cuda_stream)
        return copy(made, out)

    monkeypatch.setattr(plugin, "feed_ndarray", on_the_host)
    images = store((5, 9, 3), 3)
    made, stream = dali_batch(images), object()
    copied = copied_from_dali(made, CPU, stream)  # type: ignore[arg-type]
    assert streams == [stream]
    assert np.array_equal(copied.numpy(), images)
    copied.fill_(7)
    assert np.array_equal(np.asarray(made), images)


def test_dali_on_a_gpu_hands_out_copies_and_nothing_by_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    side, fed, copies = object(), [], []

    def run(stream: object) -> tuple[Any]:
        fed.append(("run", stream))
        return (SimpleNamespace(as_tensor=lambda: "a batch"),)

    def no_dlpack(_: object) -> torch.Tensor:
        raise AssertionError("DALI frees what it gave by DLPack with a synchronisation of the device")

    def copied(made: object, device: torch.device, stream: object) -> torch.Tensor:
        copies.append((made, device, stream))
        return torch.zeros(1)

    monkeypatch.setattr("torch.cuda.current_stream", lambda device: side)
    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", no_dlpack)
    monkeypatch.setattr("dataio.codecs.image.backends.copied_from_dali", copied)
    device = torch.device("cuda", 0)
    made = _Dali(4, 4, 1, 8, device, 1)
    made._pipeline = SimpleNamespace(feed_input=lambda name, *_, **to: fed.append((name, to.get("cuda_stream"))), run=run)
    made._run("images", {"flip": np.zeros(8, np.int32)})
    assert fed == [("images", side), ("flip", None), ("run", side)]
    assert copies == [("a batch", device, side)]


@pytest.mark.parametrize("name", NAMES)
def test_the_padding_stays_black_after_a_larger_batch(name: str) -> None:
    geometry = (4, 4, 2)
    made = make_backend(name, height=4, width=4, pad=2, batch_size=2, device=CPU)
    white = np.full((STORED, 4, 4, 3), 255, np.uint8)
    corner = Draw(dy=np.zeros(9, np.int32), dx=np.full(9, 4, np.int32), flip=np.zeros(9, np.bool_))
    for n in (1, 9, 2):
        some = Draw(dy=corner.dy[:n], dx=corner.dx[:n], flip=corner.flip[:n])
        rows = np.arange(n)
        assert np.array_equal(made.batch(white, rows, some).numpy(), reference(white[rows], some, geometry[2]))


@pytest.mark.parametrize("name", NAMES)
def test_the_centre_draw_gives_the_images_themselves(name: str) -> None:
    images = store((5, 9, 3), 2)
    rows = np.array([4, 0, 10])
    assert np.array_equal(backend(name, (5, 9, 3)).batch(images, rows, centre(3, 3)).numpy(), images[rows])


def test_gather_takes_rows_in_the_order_asked_for_and_copies() -> None:
    images = store((5, 9, 3), 2)
    rows = np.array([4, 0, 10, 4])
    for held in (images, torch.from_numpy(images)):
        taken = gather(held, rows, CPU)
        assert np.array_equal(taken.numpy(), images[rows])
        taken.zero_()
        assert images.any()
    assert gather(images, np.empty(0, np.int64), CPU).shape == (0, 5, 9, 3)


@pytest.mark.parametrize(
    ("name", "device", "cache_place", "chosen"),
    [
        ("auto", "cpu", "host", "numpy"),
        ("auto", "cpu", "none", "numpy"),
        ("auto", "cuda", "device", "torch"),
        ("auto", "cuda", "host", "numpy"),
        ("dali", "cuda", "device", "dali"),
        ("numpy", "cuda", "host", "numpy"),
        ("torch", "cpu", "none", "torch"),
    ],
)
def test_auto_takes_numpy_on_the_host_and_torch_on_the_device(name: str, device: str, cache_place: str, chosen: str) -> None:
    assert choose_backend(name, torch.device(device), cache_place) == chosen


def test_auto_takes_torch_where_a_gpu_decodes_each_steps_images() -> None:
    assert choose_backend("auto", torch.device("cuda"), "none", decoder="cuda") == "torch"
    assert choose_backend("auto", torch.device("cuda"), "host", decoder="cuda") == "numpy"  # decoded once, kept on the host
    assert choose_backend("auto", torch.device("cuda"), "none", decoder="cpu") == "numpy"
    assert choose_backend("numpy", torch.device("cuda"), "none", decoder="cuda") == "numpy"


def test_impossible_backends_are_errors_that_name_the_fix() -> None:
    with pytest.raises(ValueError, match=r"data\.backend=numpy .*use data\.cache=host or data\.backend=torch"):
        choose_backend("numpy", torch.device("cuda"), "device")
    with pytest.raises(ValueError, match=r"data\.backend=pil is unknown; use one of auto, dali, torch, numpy"):
        choose_backend("pil", CPU, "host")
    with pytest.raises(ValueError, match=r"data\.backend=pil is unknown"):
        make_backend("pil", height=4, width=4, pad=0, batch_size=1, device=CPU)
