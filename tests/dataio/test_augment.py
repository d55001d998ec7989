"""Draws are pure, fair and independent; the reference does what it says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.codecs.image.augment import bits, centre, draw, reference


def chi2(observed: np.ndarray) -> float:
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2 / expected).sum())


def chi2_limit(cells: int) -> float:
    return cells - 1 + 5 * math.sqrt(2 * (cells - 1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 10**6),
    ids=st.lists(st.integers(0, 2**62), max_size=40),
    pad=st.integers(0, 40),
    flip=st.booleans(),
)
def test_a_draw_depends_on_seed_epoch_and_sample_only_not_on_the_batch(seed: int, epoch: int, ids: list[int], pad: int, flip: bool) -> None:
    together = draw(seed=seed, epoch=epoch, ids=np.array(ids, np.int64), pad=pad, flip=flip)
    for place, sample in enumerate(ids):
        alone = draw(seed=seed, epoch=epoch, ids=np.array([sample]), pad=pad, flip=flip)
        assert (alone.dy[0], alone.dx[0], alone.flip[0]) == (together.dy[place], together.dx[place], together.flip[place])
    for shift in (together.dy, together.dx):
        assert shift.dtype == np.int32
        assert all(0 <= value <= 2 * pad for value in shift.tolist())
    assert together.flip.dtype == np.bool_
    assert flip or not together.flip.any()


@pytest.mark.parametrize("pad", [1, 4, 28])
def test_every_crop_and_flip_is_equally_likely(pad: int) -> None:
    drawn = draw(seed=0, epoch=0, ids=np.arange(200_000), pad=pad, flip=True)
    side = 2 * pad + 1
    cells = (drawn.dy * side + drawn.dx) * 2 + drawn.flip  # jointly: also independent of each other
    assert chi2(np.bincount(cells, minlength=2 * side * side)) < chi2_limit(2 * side * side)


@pytest.mark.parametrize("changes", [{"epoch": 1}, {"seed": 1}, {"ids": np.arange(1, 100_001)}, {"epoch": 1, "seed": -1}])
def test_draws_of_another_epoch_seed_or_neighbour_are_independent(changes: dict[str, object]) -> None:
    base: dict[str, object] = {"seed": 0, "epoch": 0, "ids": np.arange(100_000)}
    one = draw(**base, pad=4, flip=True)  # type: ignore[arg-type]
    other = draw(**(base | changes), pad=4, flip=True)  # type: ignore[arg-type]
    assert chi2(np.bincount(one.dx * 9 + other.dx, minlength=81)) < chi2_limit(81)
    assert chi2(np.bincount(one.flip * 2 + other.flip, minlength=4)) < chi2_limit(4)


def test_seed_epoch_and_purpose_do_not_stand_for_one_another() -> None:
    keys = [(seed, epoch, purpose) for seed in range(4) for epoch in range(4) for purpose in range(4)]
    first = {int(bits(seed=seed, epoch=epoch, ids=np.array([0]), purpose=purpose)[0]) for seed, epoch, purpose in keys}
    assert len(first) == len(keys)


def test_every_bit_is_fair_and_a_neighbouring_sample_changes_half_of_them() -> None:
    words = bits(seed=3, epoch=5, ids=np.arange(50_000), purpose=9)
    unpacked = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1)  # (n, 64)
    assert np.abs(unpacked.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(50_000)
    changed = (unpacked[1:] != unpacked[:-1]).mean(axis=0)
    assert np.abs(changed - 0.5).max() < 5 * 0.5 / math.sqrt(50_000)


def test_the_draws_are_those_that_earlier_versions_made() -> None:
    drawn = draw(seed=7, epoch=3, ids=np.array([0, 1, 2, 10**12]), pad=4, flip=True)
    assert (drawn.dy.tolist(), drawn.dx.tolist(), drawn.flip.tolist()) == PINNED


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), pad=st.integers(0, 10), n=st.integers(0, 5), seed=st.integers(0, 1000),
    flip=st.booleans(),
)  # fmt: skip
def test_reference_is_pad_then_crop_then_mirror(height: int, width: int, pad: int, n: int, seed: int, flip: bool) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    drawn = draw(seed=seed, epoch=0, ids=np.arange(n), pad=pad, flip=flip)
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for i, out in enumerate(reference(images, drawn, pad)):
        crop = padded[i, drawn.dy[i] : drawn.dy[i] + height, drawn.dx[i] : drawn.dx[i] + width]
        assert np.array_equal(out, crop[:, ::-1] if drawn.flip[i] else crop)


def test_the_centre_draw_changes_nothing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    assert np.array_equal(reference(images, centre(3, 4), 4), images)


PINNED = ([1, 0, 7, 7], [3, 3, 3, 2], [False, False, False, False])
