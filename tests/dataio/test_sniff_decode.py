"""Claims about sniff and decode: what is accepted equals Pillow's pixels, what is bad is named, what is resized follows from its bytes
alone, and nothing else suffers."""

import io
import struct
import threading
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpus import HEIGHT, MAX_PIXELS, WIDTH, Bad, Good, _orientation, bad, chunk, encode, good, picture, pillow, raw_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.codecs.codec import Refusal
from dataio.codecs.image.decode import COLOURS, DECODER_VERSIONS, SMALL_SIDE, Checker, Decoder, decoder_device, window_of
from dataio.codecs.image.sniff import KINDS, Header, simple_webp, sniff
from dataio.config import Colour, Fit

UNSNIFFABLE = ("undecodable", "wrong size")


def view(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(height=HEIGHT, width=WIDTH, fit="refuse", max_pixels=MAX_PIXELS, batch_size=32) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return {case.name: pillow(case.data) for case in good()}


@pytest.mark.parametrize("case", good(), ids=lambda case: case.name)
def test_accepted_images_equal_pillows_pixels(case: Good, decoder: Decoder, expected: dict[str, np.ndarray]):
    header = sniff(view(case.data), max_pixels=MAX_PIXELS)
    assert isinstance(header, Header), header
    assert (header.height, header.width) == (HEIGHT, WIDTH)
    decoded = decoder.decode([view(case.data)])
    assert decoded.bad == ()
    assert decoded.images.shape == (1, HEIGHT, WIDTH, 3)
    difference = np.abs(decoded.images[0].astype(int) - expected[case.name]).max()
    assert difference <= case.tolerance


@pytest.mark.parametrize("case", bad(), ids=lambda case: case.name)
def test_bad_images_are_refused_with_their_kind_of_reason(case: Bad, decoder: Decoder):
    verdict = sniff(view(case.data), max_pixels=MAX_PIXELS)
    assert isinstance(verdict, Header if case.kind in UNSNIFFABLE else Refusal), verdict
    ((index, reason),) = decoder.decode([view(case.data)]).bad
    assert (index, reason.split(":")[0]) == (0, case.kind), reason
    assert case.kind in KINDS
    assert len(reason) > len(case.kind) + 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*good(), *bad()]), min_size=1, max_size=70))
def test_in_any_mixture_good_images_are_exact_and_bad_ones_named_in_their_places(mixture: list[Good | Bad]):
    decoded = _shared().decode([view(case.data) for case in mixture])
    assert [(index, reason.split(":")[0]) for index, reason in decoded.bad] == [
        (index, case.kind) for index, case in enumerate(mixture) if isinstance(case, Bad)
    ]
    for case, image in zip(mixture, decoded.images, strict=True):
        if isinstance(case, Bad):
            assert not image.any()
        else:
            assert np.abs(image.astype(int) - _expected(case)).max() <= case.tolerance


_CACHE: dict[str, object] = {}


def _shared() -> Decoder:
    """One decoder for all examples: each must leave it fit for the next."""
    made = _CACHE.setdefault("decoder", Decoder(height=HEIGHT, width=WIDTH, fit="refuse", max_pixels=MAX_PIXELS, batch_size=16))
    assert isinstance(made, Decoder)
    return made


def _expected(case: Good) -> np.ndarray:
    pixels = _CACHE.setdefault(case.name, pillow(case.data))
    assert isinstance(pixels, np.ndarray)
    return pixels


def test_the_pipeline_survives_a_failed_batch_and_later_batches_stay_aligned():
    from dataio.codecs.image.decode import _Encoded, _Pipeline

    pipeline = _Pipeline(batch_size=8, threads=1, device_id=None)
    undecodable = next(case.data for case in bad() if case.kind == "undecodable")
    built = None
    for step in range(6):
        images = [_Encoded(index=index, data=view(encode(picture(100 * step + index))), height=HEIGHT, width=WIDTH) for index in range(8)]
        found = pipeline._run(images)
        built = built or pipeline._pipeline
        for index, image in enumerate(found):
            assert np.array_equal(image, picture(100 * step + index))
        with pytest.raises(RuntimeError):
            pipeline._run([*images[:3], _Encoded(index=8, data=view(undecodable), height=HEIGHT, width=WIDTH), *images[3:7]])
        assert pipeline._pipeline is built


def test_any_number_of_images_decodes_whatever_the_batch_size(decoder: Decoder):
    for count in (0, 1, 31, 32, 33, 100):
        decoded = decoder.decode([view(encode(picture(index))) for index in range(count)])
        assert decoded.bad == ()
        assert decoded.images.shape == (count, HEIGHT, WIDTH, 3)
        assert all(np.array_equal(decoded.images[index], picture(index)) for index in range(count))


def test_results_are_not_overwritten_by_later_batches(decoder: Decoder):
    first = decoder.decode([view(encode(picture(1)))]).images
    kept = first.copy()
    for seed in range(2, 8):
        decoder.decode([view(encode(picture(seed)))])
    assert np.array_equal(first, kept)


def test_a_closed_decoder_builds_itself_anew():
    decoder = Decoder(height=HEIGHT, width=WIDTH, fit="refuse", max_pixels=MAX_PIXELS)
    before = decoder.decode([view(encode(picture(1)))]).images
    decoder.close()
    assert np.array_equal(decoder.decode([view(encode(picture(1)))]).images, before)
    decoder.close()


@pytest.mark.parametrize("size", [None, (HEIGHT, WIDTH)])
@pytest.mark.parametrize("device_id", [None, 0])
def test_no_image_on_a_gpu_goes_to_its_jpeg_engine_whose_pixels_are_others(
    monkeypatch: pytest.MonkeyPatch, device_id: int | None, size: tuple[int, int] | None
):
    from nvidia.dali import fn

    from dataio.codecs.image.decode import _build

    made, told = fn.decoders.image, []

    def image(*inputs: object, **options: object) -> object:
        told.append(options)
        return made(*inputs, **options)

    monkeypatch.setattr(fn.decoders, "image", image)
    with suppress(RuntimeError) if device_id is not None else nullcontext():  # the pipeline needs a GPU once it is defined
        _build(4, 1, device_id, size, "crop")
    (options,) = told
    if device_id is None:
        assert options["device"] == "cpu"
    else:
        assert (options["device"], options["hw_decoder_load"]) == ("mixed", 0.0)


@given(height=st.integers(1, 300), width=st.integers(1, 300), fit=st.sampled_from(["refuse", "stretch", "crop"]))
def test_small_images_are_decoded_on_the_cpu_for_a_gpu_too_where_no_other_size_is_taken(height: int, width: int, fit: Fit):
    assert decoder_device(height, width, fit=fit, device="cpu") == "cpu"
    is_small = height <= SMALL_SIDE and width <= SMALL_SIDE and fit == "refuse"
    assert decoder_device(height, width, fit=fit, device="cuda") == ("cpu" if is_small else "cuda")


def test_a_version_of_the_decoder_names_its_device():
    assert len(set(DECODER_VERSIONS.values())) == len(DECODER_VERSIONS)


def test_a_broken_pipeline_is_not_blamed_on_the_images(monkeypatch: pytest.MonkeyPatch):
    from dataio.codecs.image.decode import _Encoded, _Pipeline

    def broken(self: _Pipeline, batch: list[_Encoded]) -> list[np.ndarray]:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(_Pipeline, "_run", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        Decoder(height=HEIGHT, width=WIDTH, fit="refuse", max_pixels=MAX_PIXELS).decode([view(encode(picture(1)))])


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_fit_leaves_images_of_the_right_size_bit_exact_and_resizes_the_others(fit):
    with Decoder(height=HEIGHT, width=WIDTH, fit=fit, max_pixels=MAX_PIXELS) as decoder:
        sizes = [(HEIGHT, WIDTH), (50, 80), (HEIGHT, WIDTH), (12, 10), (100, 30)]
        decoded = decoder.decode([view(encode(picture(index, *size))) for index, size in enumerate(sizes)])
    assert decoded.bad == ()
    assert np.array_equal(decoded.images[0], picture(0))
    assert np.array_equal(decoded.images[2], picture(2))
    assert all(image.any() for image in decoded.images)


def test_stretch_takes_the_whole_image_and_crop_its_centre():
    # four stripes; 48 x 160 is twice as high and four times as wide, so crop keeps the two in the middle
    wide = np.zeros((48, 160, 3), np.uint8)
    wide[:, :40], wide[:, 40:80], wide[:, 80:120], wide[:, 120:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    colors = {}
    for fit in ("stretch", "crop"):
        with Decoder(height=HEIGHT, width=WIDTH, fit=fit, max_pixels=MAX_PIXELS) as decoder:
            image = decoder.decode([view(encode(wide))]).images[0]
        colors[fit] = [tuple(int(value) for value in image[HEIGHT // 2, column]) for column in (3, 13, 26, 36)]
    assert colors["stretch"] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    assert colors["crop"] == [(0, 255, 0), (0, 255, 0), (0, 0, 255), (0, 0, 255)]


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 15, 16, 17, WIDTH, 1000]))
TARGETS = [(HEIGHT, WIDTH), (40, 24), (7, 7), (30, 1), (1, 30)]  # height, width


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_a_window_is_the_largest_of_its_shape_and_in_the_middle(height: int, width: int, target_height: int, target_width: int) -> None:
    top, left, high, wide = window_of(height, width, target_height, target_width)
    assert 1 <= high <= height
    assert 1 <= wide <= width
    assert (height - high) // 2 == top
    assert (width - wide) // 2 == left
    assert high == height or wide == width
    scale = min(height / target_height, width / target_width)  # pixels of the source to one of the target
    assert abs(high - max(1, scale * target_height)) <= 0.5
    assert abs(wide - max(1, scale * target_width)) <= 0.5


@cache
def _resizing(target: tuple[int, int], fit: Fit, threads: int = 1, batch_size: int = 64) -> Decoder:
    """For all examples, like `_shared`."""
    return Decoder(height=target[0], width=target[1], fit=fit, threads=threads, max_pixels=MAX_PIXELS, batch_size=batch_size)


@settings(max_examples=250, deadline=None)
@given(
    target=st.sampled_from(TARGETS),
    fit=st.sampled_from(["stretch", "crop"]),
    height=SIDES,
    width=SIDES,
    how=st.sampled_from([("PNG", {}), ("JPEG", {"subsampling": 2}), ("JPEG", {"subsampling": 1}), ("JPEG", {"progressive": True})]),
    orientation=st.sampled_from([1, 1, 3, 6, 7]),
)
def test_a_resized_image_is_its_window_resized_by_torch_and_close_to_pillow(
    target: tuple[int, int], fit: Fit, height: int, width: int, how: tuple[str, dict[str, object]], orientation: int
) -> None:
    noisy = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(noisy, how[0], exif=exif, **how[1])
    whole = pillow(data)
    top, left, high, wide = window_of(*whole.shape[:2], *target) if fit == "crop" else (0, 0, *whole.shape[:2])
    window = whole[top : top + high, left : left + wide].copy()
    decoded = _resizing(target, fit).decode([view(data)])
    assert decoded.bad == ()
    source = torch.from_numpy(window[None]).permute(0, 3, 1, 2)  # (1, 3, h, w)
    wanted = F.interpolate(source, size=target, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(decoded.images[0], wanted)
    by_pillow = np.asarray(Image.fromarray(window).resize(target[::-1], Image.Resampling.BILINEAR))
    assert np.abs(wanted.astype(int) - by_pillow).max() <= 2  # both round twice, torch with weights of 16 bits
    if (high, wide) == target:
        assert np.array_equal(wanted, window)


def _mixed(seeds: list[int]) -> list[bytes]:
    """Pictures of many sizes, some of them the right one, as PNG or JPEG; equal seeds are equal bytes."""
    sizes = [(HEIGHT, WIDTH), (50, 80), (12, 10), (100, 30), (31, 200), (WIDTH, HEIGHT), (1, 9)]
    return [encode(picture(seed, *sizes[seed % len(sizes)]), "JPEG" if seed % 2 else "PNG") for seed in seeds]


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    fit=st.sampled_from(["stretch", "crop"]),
    threads=st.integers(1, 3),
    batch_size=st.sampled_from([1, 5, 64]),
    dirt=st.integers(0, 255),
)
def test_what_an_image_becomes_depends_on_its_bytes_alone(seeds: list[int], fit: Fit, threads: int, batch_size: int, dirt: int) -> None:
    encoded = [view(data) for data in _mixed(seeds)]
    alone = [_resizing((HEIGHT, WIDTH), fit).decode([data]).images[0] for data in encoded]
    decoder = _resizing((HEIGHT, WIDTH), fit, threads, batch_size)
    buffer = np.full((len(seeds) + 1, HEIGHT, WIDTH, 3), dirt, np.uint8)
    for out in (None, buffer, buffer):  # memory of its own, of the caller, and the caller's again
        assert np.array_equal(decoder.decode(encoded, out).images, alone)
    assert (buffer[-1] == dirt).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 30), st.sampled_from(bad())), min_size=1, max_size=30), st.sampled_from(["stretch", "crop"]))
def test_bad_images_among_resized_ones_are_named_and_black_and_hurt_no_other(mixture: list[int | Bad], fit: Fit) -> None:
    mixture = [case for case in mixture if isinstance(case, int) or case.kind != "wrong size"] or [0]
    encoded = [view(case.data if isinstance(case, Bad) else _mixed([case])[0]) for case in mixture]
    buffer = np.full((len(mixture), HEIGHT, WIDTH, 3), 77, np.uint8)
    decoded = _resizing((HEIGHT, WIDTH), fit).decode(encoded, buffer)
    assert [(index, reason.split(":")[0]) for index, reason in decoded.bad] == [
        (index, case.kind) for index, case in enumerate(mixture) if isinstance(case, Bad)
    ]
    for case, data, image in zip(mixture, encoded, decoded.images, strict=True):
        wanted = 0 if isinstance(case, Bad) else _resizing((HEIGHT, WIDTH), fit).decode([data]).images[0]
        assert (image == wanted).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_resize_at_a_time_than_the_decoder_was_given(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataio.codecs.image import decode

    resize, lock, at_work, most, names = decode._resize, threading.Lock(), 0, 0, set()

    def watched(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            names.add(threading.current_thread().name)
        resize(pairs)
        with lock:
            at_work -= 1

    monkeypatch.setattr(decode, "_resize", watched)
    before = set(threading.enumerate())
    encoded = [view(encode(picture(index, 200, 300))) for index in range(40)]
    with Decoder(height=HEIGHT, width=WIDTH, fit="crop", threads=threads, max_pixels=MAX_PIXELS, batch_size=8) as decoder:
        assert decoder.decode(encoded).bad == ()
    assert 1 <= most <= threads
    assert len(names) <= threads
    assert set(threading.enumerate()) == before


def test_an_image_just_below_the_pixel_limit_passes_and_one_above_is_too_large():
    data = encode(picture(1, 20, 50))
    assert isinstance(sniff(data, max_pixels=1000), Header)
    refusal = sniff(data, max_pixels=999)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "too large: 20x50 pixels, more than data.max_image_pixels=999"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(good()), st.data())
def test_sniffing_damaged_bytes_gives_a_header_or_a_reason_and_never_an_exception(case: Good, data: st.DataObject):
    raw = bytearray(case.data[: data.draw(st.integers(0, len(case.data)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5)):
        if raw:
            raw[place % len(raw)] = value
    verdict = sniff(bytes(raw), max_pixels=MAX_PIXELS)
    if isinstance(verdict, Refusal):
        assert verdict.reason.split(":")[0] in KINDS
    else:
        assert 1 <= verdict.height * verdict.width <= MAX_PIXELS


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_of_a_png_is_found_or_harmless(place: int, bit: int):
    data = bytearray(encode(picture(3)))
    data[place % len(data)] ^= 1 << bit
    decoded = _shared().decode([view(bytes(data))])
    assert decoded.bad or np.array_equal(decoded.images[0], picture(3))


def test_the_size_of_an_extended_webp_is_that_of_its_image_not_of_its_canvas():
    extended = bytearray(encode(picture(1), "WEBP", lossless=True, exif=Image.Exif()))
    if extended[12:16] != b"VP8X":
        body = bytes(extended[12:])
        extended = bytearray(b"RIFF" + struct.pack("<I", 4 + 18 + len(body)) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(10) + body)
    header = sniff(bytes(extended), max_pixels=MAX_PIXELS)
    assert isinstance(header, Header)
    assert (header.height, header.width) == (HEIGHT, WIDTH)
    assert simple_webp(bytes(extended))[12:16] == b"VP8L"


def test_the_checker_judges_images_of_any_size_like_the_decoder():
    checker = Checker(max_pixels=MAX_PIXELS, batch_size=8, batch_pixels=5000)
    cases = [case for case in (*good(), *bad()) if not (isinstance(case, Bad) and case.kind == "wrong size")]
    sizes = [encode(picture(1, height, width)) for height, width in ((1, 1), (7, 300), (300, 7))]
    verdicts = checker.check([view(case.data) for case in cases] + [view(data) for data in sizes])
    checker.close()
    for case, verdict in zip(cases, verdicts, strict=False):
        if isinstance(case, Good):
            assert isinstance(verdict, Header), (case.name, verdict)
        else:
            assert isinstance(verdict, Refusal), case.name
            assert verdict.reason.startswith(case.kind + ":"), (case.name, verdict)
    assert [(verdict.height, verdict.width) for verdict in verdicts[-3:] if isinstance(verdict, Header)] == [(1, 1), (7, 300), (300, 7)]


def test_an_image_that_cannot_be_made_is_a_clear_error():
    with pytest.raises(ValueError, match=r"0x32.*data\.image_size"):
        Decoder(height=0, width=32, fit="refuse", max_pixels=MAX_PIXELS)
    assert raw_png(rows=picture(0).reshape(HEIGHT, -1))[:4] == b"\x89PNG"


def shape_on_nothing(kind: str) -> Image.Image:
    """A black shape on black that is transparent: without its alpha, all is black."""
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[4:20, 10:30, 3] = np.linspace(20, 255, 20).astype(np.uint8)[None, :]
    image = Image.fromarray(pixels)
    return image if kind == "rgba" else image.convert("LA")


@pytest.mark.parametrize("background", ["black", "gray", "white"])
def test_transparent_images_are_put_in_front_of_the_background(background: Colour):
    cases = {
        "png": encode(shape_on_nothing("rgba")),
        "png gray": encode(shape_on_nothing("la")),
        "webp": encode(shape_on_nothing("rgba"), "WEBP", lossless=True, exact=True),
        "tiff": encode(shape_on_nothing("rgba"), "TIFF"),
        "png of a transparent colour": raw_png(
            color=0, rows=(np.arange(24 * 40).reshape(24, 40) % 251).astype(np.uint8), extra=chunk(b"tRNS", b"\0\7")
        ),
        "gif": encode(shape_on_nothing("rgba"), "GIF"),
    }
    with Decoder(height=HEIGHT, width=WIDTH, fit="refuse", background=background, max_pixels=MAX_PIXELS) as decoder:
        decoded = decoder.decode([view(data) for data in cases.values()])
    assert (decoded.bad, decoded.transparent) == ((), len(cases))
    for image, data in zip(decoded.images, cases.values(), strict=True):
        rgba = Image.open(io.BytesIO(data)).convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", rgba.size, (*COLOURS[background], 255)), rgba).convert("RGB")
        assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1  # Pillow rounds twice


def test_a_background_changes_nothing_of_opaque_images_and_of_the_others_only_where_they_are_transparent(expected: dict[str, np.ndarray]):
    opaque = [case for case in good() if not sniff(view(case.data), max_pixels=MAX_PIXELS).has_alpha]  # type: ignore[union-attr]
    assert len(opaque) > 40
    with Decoder(height=HEIGHT, width=WIDTH, fit="refuse", background="white", max_pixels=MAX_PIXELS) as decoder:
        for case in opaque:
            difference = np.abs(decoder.decode([view(case.data)]).images[0].astype(int) - expected[case.name]).max()
            assert difference <= case.tolerance
        turned = Image.fromarray(np.concatenate([picture(2, WIDTH, HEIGHT), np.full((WIDTH, HEIGHT, 1), 255, np.uint8)], -1))
        data = encode(turned, exif=_orientation(6))
        assert np.array_equal(decoder.decode([view(data)]).images[0], pillow(data))
