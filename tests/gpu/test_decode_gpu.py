"""On a GPU: what `mixed` decodes is what the CPU decodes, a JPEG within a few levels, and what is bad is bad there too."""

from contextlib import closing

import numpy as np
import pytest
import torch

from dataio.codecs.codec import Row
from dataio.codecs.image.decode import Decoder
from dataio.codecs.make import make_codec
from dataio.config import DataConfig, Fit
from tests.dataio.corpus import HEIGHT, MAX_PIXELS, WIDTH, Bad, Good, bad, encode, good, picture, pillow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]

JPEG_LEVELS = 4
"""nvJPEG's inverse transform and its upsampling of colours round differently; DALI's documentation gives no bound."""


def decoder_on(device_id: int | None) -> Decoder:
    return Decoder(height=HEIGHT, width=WIDTH, fit="refuse", max_pixels=MAX_PIXELS, batch_size=32, device_id=device_id)


def test_good_images_decode_to_the_pixels_of_the_cpu() -> None:
    cases = good()
    encoded = [np.frombuffer(case.data, np.uint8) for case in cases]
    with decoder_on(0) as on_gpu, decoder_on(None) as on_cpu:
        found, wanted = on_gpu.decode(encoded), on_cpu.decode(encoded)
    assert found.bad == wanted.bad == ()
    for case, image, reference in zip(cases, found.images, wanted.images, strict=True):
        levels = max(case.tolerance, JPEG_LEVELS) if case.data[:2] == b"\xff\xd8" else 0
        assert np.abs(image.astype(int) - reference.astype(int)).max() <= levels, case.name
        assert np.abs(image.astype(int) - pillow(case.data).astype(int)).max() <= levels + case.tolerance, case.name


def jpegs() -> list[np.ndarray]:
    """Photographs' sizes, above and below that of the decoder."""
    sizes = [(96, 96), (120, 90), (60, 200), (96, 96), (97, 96), (300, 400), (96, 96)]
    return [np.frombuffer(encode(picture(number, *size), "JPEG", quality=90), np.uint8) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_a_jpeg_decodes_to_the_same_pixels_alone_and_among_others(fit: Fit) -> None:
    encoded = jpegs() * 9  # more than a batch
    with Decoder(height=96, width=96, fit=fit, max_pixels=MAX_PIXELS, batch_size=32, device_id=0) as decoder:
        together = decoder.decode(encoded)
        alone = [decoder.decode([each]).images[0] for each in encoded[:7]]
    assert together.bad == ()
    for number, image in enumerate(together.images):
        assert np.array_equal(image, alone[number % 7])


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_what_stays_on_the_gpu_is_what_goes_to_the_host(fit: Fit) -> None:
    encoded: list[np.ndarray | bytes] = [*jpegs(), *(case.data for case in bad() if case.kind != "wrong size"), *jpegs() * 12]
    device = torch.device("cuda", torch.cuda.current_device())
    config = DataConfig(fit=fit, max_image_pixels=MAX_PIXELS)
    row = Row(shape=(96, 96, 3), dtype=np.uint8)
    codec = make_codec(row, config, device=device, cache="none", threads=2, batch_size=8, table_bytes=0)
    assert codec.name == "torch"
    host = np.full((len(encoded), 96, 96, 3), 7, np.uint8)
    side = torch.cuda.Stream()
    with closing(codec):
        found = codec.decode(encoded, host)
        for _ in range(5):
            with torch.cuda.stream(side):
                torch.cuda._sleep(2_000_000)  # what follows on this stream is late
                there = codec.room(len(encoded))
                assert isinstance(there, torch.Tensor)
                assert there.device == device
                there.fill_(9)
                assert codec.decode(encoded, there) == found
                on_host = there.cpu()
            assert np.array_equal(on_host.numpy(), host)
    assert found


def test_bad_images_are_named_in_their_places_and_harm_no_other() -> None:
    mixture: list[Good | Bad] = [each for pair in zip(bad(), good() * 4, strict=False) for each in pair]
    with decoder_on(0) as decoder:
        decoded = decoder.decode([np.frombuffer(case.data, np.uint8) for case in mixture])
    assert [index for index, _ in decoded.bad] == [index for index, case in enumerate(mixture) if isinstance(case, Bad)]
    assert not any(decoded.images[index].any() for index, _ in decoded.bad)
