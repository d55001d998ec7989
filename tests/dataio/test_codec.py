"""The images' codec is what a Codec promises: decoded rows, batches that follow from (seed, epoch, id), and samples as they are."""

import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from corpus import HEIGHT, MAX_PIXELS, WIDTH, bad, good
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.codecs.codec import Checker, Codec, Refusal, Row
from dataio.codecs.image import augment
from dataio.codecs.image.backends import NAMES
from dataio.codecs.image.decode import DECODER_VERSIONS, SMALL_SIDE, Decoder
from dataio.codecs.make import make_checker, make_codec
from dataio.config import DataConfig

CPU = torch.device("cpu")
ROW = Row(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8)


def codec_of(backend: str = "auto", **settings: object) -> Codec:
    config = DataConfig(backend=backend, max_image_pixels=MAX_PIXELS, **settings)  # type: ignore[arg-type]
    return make_codec(ROW, config, device=CPU, cache="host", threads=1, batch_size=8, table_bytes=0)


def test_decoding_fills_every_place_and_names_the_bad_ones() -> None:
    encoded = [case.data for case in (*good(), *bad())]
    out = np.full((len(encoded), *ROW.shape), 7, np.uint8)
    decoder = Decoder(height=HEIGHT, width=WIDTH, fit="refuse", background="white", max_pixels=MAX_PIXELS)
    with closing(codec_of()) as codec, decoder:
        found = codec.decode(encoded, out)
        expected = decoder.decode(encoded)
    assert found == expected.bad
    assert [index for index, _ in found] == list(range(len(good()), len(encoded)))
    assert np.array_equal(out, expected.images)
    assert not out[len(good()) :].any()


@pytest.mark.parametrize("backend", NAMES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
    rows=st.lists(st.integers(0, 4), max_size=9),
    pad=st.integers(0, 3),
    flip=st.booleans(),
)
def test_a_batch_is_drawn_by_seed_epoch_and_id_and_without_an_epoch_is_what_is_stored(
    backend: str, seed: int, epoch: int, rows: list[int], pad: int, flip: bool
) -> None:
    store = np.random.default_rng(0).integers(0, 256, (5, *ROW.shape), dtype=np.uint8)
    picked = np.array(rows, np.int64)
    ids = picked * 1000 + 3
    codec = codec_of(backend, pad=pad, flip=flip)
    assert codec.name == backend
    drawn = augment.draw(seed=seed, epoch=epoch, ids=ids, pad=pad, flip=flip)
    augmented = codec.batch(store, picked, ids, seed=seed, epoch=epoch)
    plain = codec.batch(store, picked, ids, seed=seed, epoch=None)
    assert augmented.shape == plain.shape == (len(rows), 3, HEIGHT, WIDTH)
    assert np.array_equal(augmented.permute(0, 2, 3, 1).numpy(), augment.reference(store[picked], drawn, pad))
    assert np.array_equal(plain.permute(0, 2, 3, 1).numpy(), store[picked])


def test_a_codec_says_its_row_and_the_version_of_its_decoder() -> None:
    codec = codec_of()
    assert (codec.row, codec.row.nbytes, codec.version) == (ROW, HEIGHT * WIDTH * 3, DECODER_VERSIONS["cpu"])


@pytest.mark.parametrize(("side", "decoder"), [(SMALL_SIDE, "cpu"), (SMALL_SIDE + 1, "cuda")])
def test_a_codec_on_a_gpu_has_the_decoder_that_its_images_are_to_have(side: int, decoder: str) -> None:
    row = Row(shape=(side, side, 3), dtype=np.uint8)
    codec = make_codec(row, DataConfig(), device=torch.device("cuda", 0), cache="host", threads=1, batch_size=8, table_bytes=0)
    assert codec.version == DECODER_VERSIONS[decoder]
    assert codec._decoder._native._device_id == (None if decoder == "cpu" else 0)  # type: ignore[attr-defined]


def test_a_checker_gives_sizes_and_refusals() -> None:
    checker: Checker = make_checker(max_image_pixels=MAX_PIXELS, threads=1)
    with closing(checker):
        first, second = checker.check([good()[0].data, b""])
    assert not isinstance(first, Refusal)
    assert first.size == f"{HEIGHT}x{WIDTH}"
    assert second == Refusal(reason="empty: no bytes")


def test_settings_that_do_not_go_together_are_refused_when_the_codec_is_made() -> None:
    with pytest.raises(ValueError, match=r"data\.backend=numpy works on the host"):
        make_codec(ROW, DataConfig(backend="numpy"), device=torch.device("cuda", 0), cache="device", threads=1, batch_size=8, table_bytes=0)


def test_what_converts_and_describes_data_imports_no_torch() -> None:
    program = "import sys, dataio.convert, dataio.codecs.make, dataio.parquet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
