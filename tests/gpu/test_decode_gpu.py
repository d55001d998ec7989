"""On a GPU: what `mixed` decodes is what the CPU decodes, a JPEG within a few levels, and what is bad is bad there too."""

import numpy as np
import pytest
import torch

from dataio.codecs.image.decode import Decoder
from tests.dataio.corpus import HEIGHT, MAX_PIXELS, WIDTH, Bad, Good, bad, good, pillow

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


def test_bad_images_are_named_in_their_places_and_harm_no_other() -> None:
    mixture: list[Good | Bad] = [each for pair in zip(bad(), good() * 4, strict=False) for each in pair]
    with decoder_on(0) as decoder:
        decoded = decoder.decode([np.frombuffer(case.data, np.uint8) for case in mixture])
    assert [index for index, _ in decoded.bad] == [index for index, case in enumerate(mixture) if isinstance(case, Bad)]
    assert not any(decoded.images[index].any() for index, _ in decoded.bad)
