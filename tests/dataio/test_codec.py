"""The images' codec is what a Codec promises: decoded rows, batches that follow from (seed, epoch, id), and samples as they are."""

import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from corpus import HEIGHT, MAX_PIXELS, WIDTH, Bad, Good, bad, encode, good, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.codecs.codec import Checker, Codec, Refusal, Row
from dataio.codecs.image import augment
from dataio.codecs.image.backends import NAMES
from dataio.codecs.image.decode import DECODER_VERSIONS, SMALL_SIDE, Decoder, _Pipeline
from dataio.codecs.image.sniff import sniff
from dataio.codecs.make import make_checker, make_codec
from dataio.config import DataConfig, Fit

CPU = torch.device("cpu")
ROW = Row(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8)
_SHARED: dict[str, Codec] = {}


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


@settings(max_examples=15, deadline=None)
@given(mixture=st.lists(st.sampled_from([*good(), *bad()]), max_size=80))
def test_images_that_stay_where_they_are_decoded_are_those_decoded_to_the_host(mixture: list[Good | Bad]) -> None:
    """A tensor's path is a GPU's; DALI's and torch's CPU operators take it here."""
    encoded = [case.data for case in mixture]
    host, there = np.full((len(encoded), *ROW.shape), 7, np.uint8), torch.full((len(encoded), *ROW.shape), 9, dtype=torch.uint8)
    codec = _SHARED.setdefault("codec", codec_of(background="white"))
    assert codec.decode(encoded, there) == codec.decode(encoded, host)
    assert np.array_equal(there.numpy(), host)


def test_an_image_that_is_not_of_its_headers_size_is_bad_and_harms_no_other_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    liar = encode(picture(1, HEIGHT + 1, WIDTH))
    header = sniff(encode(picture(1)), max_pixels=MAX_PIXELS)
    monkeypatch.setattr(
        "dataio.codecs.image.decode.sniff", lambda data, max_pixels: header if data == liar else sniff(data, max_pixels=max_pixels)
    )
    encoded = [encode(picture(0)), liar, encode(picture(2))]
    host, there = np.full((3, *ROW.shape), 7, np.uint8), torch.full((3, *ROW.shape), 9, dtype=torch.uint8)
    with closing(codec_of()) as codec:
        ((index, reason),) = found = codec.decode(encoded, there)
        assert codec.decode(encoded, host) == found
    assert (index, reason.split(":")[0]) == (1, "undecodable")
    assert np.array_equal(there.numpy(), host)
    assert np.array_equal(host[2], picture(2))


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_images_that_dali_resizes_stay_there_too_and_are_those_of_the_host(fit: Fit) -> None:
    encoded = [
        encode(picture(number, *size)) for number, size in enumerate([(HEIGHT, WIDTH), (50, 80), (12, 10), (HEIGHT, WIDTH), (100, 30)])
    ]
    encoded.insert(2, bad()[0].data)
    decoder = Decoder(height=HEIGHT, width=WIDTH, fit=fit, max_pixels=MAX_PIXELS, batch_size=2)
    decoder._resized = _Pipeline(batch_size=2, threads=1, device_id=None, size=(HEIGHT, WIDTH), fit=fit)  # as on a GPU
    there = np.zeros((len(encoded), *ROW.shape), np.uint8)

    def put(indices: list[int], made: object) -> None:
        there[indices] = np.asarray(made)

    with decoder:
        on_host = decoder.decode(encoded)
        assert decoder.decode_there(encoded, put) == on_host.bad
    assert np.array_equal(there, on_host.images)
    assert len(on_host.bad) == 1


@pytest.mark.parametrize(
    ("backend", "side", "device"),
    [("auto", SMALL_SIDE + 1, "cuda"), ("dali", 224, "cuda"), ("numpy", 224, "cpu"), ("auto", SMALL_SIDE, "cpu")],
)
def test_room_is_where_images_are_decoded_unless_the_backend_works_on_the_host(
    monkeypatch: pytest.MonkeyPatch, backend: str, side: int, device: str
) -> None:
    made: list[tuple[tuple[int, ...], object]] = []
    monkeypatch.setattr("torch.empty", lambda shape, *, dtype, device: made.append((shape, device)))
    config = DataConfig(backend=backend)  # type: ignore[arg-type]
    row, gpu = Row(shape=(side, side, 3), dtype=np.uint8), torch.device("cuda", 0)
    room = make_codec(row, config, device=gpu, cache="none", threads=1, batch_size=8, table_bytes=0).room(5)
    if device == "cuda":
        assert made == [((5, side, side, 3), gpu)]
    else:
        assert isinstance(room, np.ndarray)
        assert (room.shape, room.dtype) == ((5, side, side, 3), np.uint8)


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
