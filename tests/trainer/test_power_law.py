"""A law is found through errors by size, its interval holds what it is to hold, and what nobody can tell is not told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.curve.power_law import LEVEL, CannotTell, Fit, Law, Point, fitted
from trainer.runs.certainty import wilson

SIZES = (250, 500, 1000, 2000)


def exact(law: Law, sizes: tuple[int, ...] = SIZES, repeats: int = 3) -> list[Point]:
    return [Point(samples=size, errors=(law.at(size),) * repeats) for size in sizes]


def told(points: list[Point], tested: int | None = 10_000) -> Fit:
    found = fitted(points, tested=tested)
    assert isinstance(found, Fit), found
    return found


def reason(points: list[Point], tested: int | None = 10_000) -> str:
    found = fitted(points, tested=tested)
    assert isinstance(found, CannotTell), found
    return found.reason


def drawn(random: np.random.Generator, *, repeats: int = 3, tested: int = 1000) -> tuple[list[Point], float]:
    """A curve of real-looking numbers, and a run's error at twice its last size."""
    last = int(2 ** random.uniform(8, 14))
    error, exponent = random.uniform(0.03, 0.5), float(np.clip(random.lognormal(np.log(0.35), 0.6), 0.05, 1.5))
    floor = error * random.uniform(0, 0.95)
    scatter = random.uniform(0.3, 2)

    def run(size: float) -> float:
        true = float(np.clip(floor + (error - floor) * (size / last) ** -exponent, 1e-3, 0.95) * (1 + 0.02 * random.standard_normal()))
        return float(np.clip(true + np.sqrt(scatter * true * (1 - true) / tested) * random.standard_normal(), 0, 1))

    sizes = [last // 8, last // 4, last // 2, last]
    return [Point(samples=size, errors=tuple(run(size) for _ in range(repeats))) for size in sizes], run(2 * last)


# --- what is told -----------------------------------------------------------------------------------------------------------------------


@given(
    a=st.floats(0, 0.2), gain=st.floats(0.05, 0.5), c=st.floats(0.2, 1.0), repeats=st.integers(1, 5), tested=st.sampled_from([2000, 50_000])
)
@settings(max_examples=15, deadline=None)
def test_a_curve_without_noise_is_continued_within_the_interval(a: float, gain: float, c: float, repeats: int, tested: int) -> None:
    law = Law(a=a, b=gain * SIZES[0] ** c, c=c)
    found = fitted(exact(law, repeats=repeats), tested=tested)
    if isinstance(found, Fit):
        assert found.twice.low <= law.at(2 * SIZES[-1]) <= found.twice.high
        assert found.twice.low <= found.twice.error <= found.twice.high
        assert found.law.at(SIZES[-1]) == pytest.approx(law.at(SIZES[-1]), rel=0.1)


def test_the_interval_holds_nine_of_ten_runs_of_synthetic_curves() -> None:
    random = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        points, truth = drawn(random)
        if isinstance(found := fitted(points, tested=1000), Fit):
            inside.append(found.twice.low <= truth <= found.twice.high)
    share = sum(inside) / len(inside)
    assert len(inside) > 45
    assert wilson(share, len(inside))[1] >= LEVEL, f"{share:.0%} of {len(inside)} inside"


def test_repeats_and_test_images_make_the_interval_narrower() -> None:
    law = Law(a=0.05, b=2.0, c=0.4)
    random = np.random.default_rng(1)

    def noisy(repeats: int, tested: int) -> Fit:
        def run(size: int) -> float:
            true = law.at(size)
            return float(true + np.sqrt(true * (1 - true) / tested) * random.standard_normal())

        return told([Point(samples=size, errors=tuple(run(size) for _ in range(repeats))) for size in SIZES], tested)

    few, many = noisy(2, 500), noisy(10, 20_000)
    assert many.twice.high - many.twice.low < few.twice.high - few.twice.low
    assert many.noise < few.noise


def test_one_run_that_failed_does_not_bend_the_curve() -> None:
    law = Law(a=0.05, b=2.0, c=0.4)
    points = exact(law)
    broken = [*points[:3], Point(samples=SIZES[-1], errors=(law.at(SIZES[-1]), law.at(SIZES[-1]) + 0.002, 0.9))]
    assert told(broken).law.at(4000) == pytest.approx(told(points).law.at(4000), rel=0.1)


def test_the_order_of_sizes_and_the_call_change_no_bit() -> None:
    points, _ = drawn(np.random.default_rng(4))
    assert fitted(points, tested=1000) == fitted(points[::-1], tested=1000) == fitted(tuple(points), tested=1000)


@given(scale=st.sampled_from([1e-3, 1e-2, 1.0]), tested=st.sampled_from([20, 1000, None]), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_whatever_the_errors_what_is_told_lies_within_bounds(scale: float, tested: int | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [Point(samples=size, errors=tuple((scale * random.random(2)).tolist())) for size in (10, 20, 40, 100_000)]
    found = fitted(points, tested=tested)
    if isinstance(found, Fit):
        for each in (found.now, found.twice):
            assert 0 <= each.low <= each.error <= each.high <= 1
        assert found.gain.low <= found.gain.error <= found.gain.high
        assert min(found.law.a, found.law.b, found.law.c) >= 0
        assert found.law.at(10) >= found.law.at(100_000)


# --- what is not told -------------------------------------------------------------------------------------------------------------------


def test_two_sizes_cannot_tell_a_curve_from_a_line() -> None:
    assert reason(exact(Law(a=0, b=2, c=0.4), SIZES[:2])).startswith("2 sizes cannot tell a curve from a line")
    assert reason([Point(samples=10, errors=(0.5,))]).startswith("1 size cannot tell")


def test_a_flat_curve_is_not_continued() -> None:
    flat = [Point(samples=size, errors=(0.1, 0.101, 0.099)) for size in SIZES]
    assert "differ by no more than noise" in reason(flat)
    assert "differ by no more than noise" in reason([Point(samples=size, errors=(0.0, 0.0)) for size in SIZES])


def test_a_rising_curve_is_told_as_one() -> None:
    rising = [Point(samples=size, errors=(0.1 + size / 10_000,) * 2) for size in SIZES]
    assert reason(rising).startswith("the error rises with the images, beyond noise")


def test_a_fall_within_the_noise_of_few_test_images_is_none() -> None:
    points = exact(Law(a=0.09, b=0.1, c=0.3), repeats=1)
    assert "more test images" in reason(points, tested=50)
    assert fitted(points, tested=1_000_000) != fitted(points, tested=50)


def test_a_measure_that_is_no_share_needs_repeats() -> None:
    law = Law(a=0.05, b=2.0, c=0.4)
    assert reason(exact(law, repeats=1), None) == "one run of each size does not say how much runs differ; give --repeats 3"
    points = [Point(samples=size, errors=(law.at(size), 1.02 * law.at(size))) for size in SIZES]
    assert told(points, None).twice.low < law.at(4000) < told(points, None).twice.high
