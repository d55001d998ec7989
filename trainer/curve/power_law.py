"""A learning curve as a power law, error(n) = a + b n^-c, and how far it may be trusted beyond the sizes that were measured. Pure; numpy
only. results.py makes the points, page.py shows what comes out.

The three numbers are written as the error at the largest size, the part of it that no label takes away (a), and the exponent c: so what
twice the labels bring is a + (error - a) 2^-c, and every bound is a box. The fit is a sum over a grid of that box (a posterior), not one
best curve: with four sizes many curves fit, and their spread is the interval. A grid has no start to choose, no step that fails, and gives
the same bits everywhere.

What the points may be off by has two parts. Runs of one size differ by the samples drawn, the seed, and the test samples that they get
wrong by chance: noise, from the repeats of near sizes together, in units of the binomial variance of the test set (which is also where it
stays without repeats). And no real curve is a power law: MISFIT, a share of the error that each size may be off by, and growing with the
way beyond the last size. Nine of ten errors at twice the labels are to lie in the interval; benchmarks/curve.py counts them on real curves,
by which MISFIT was chosen: with linear heads half of it would do, but runs of whole networks are less regular than those.

Sources: Cortes et al. 1994 (the law for learning curves), Hestness et al. 2017 and Rosenfeld et al. 2020 (exponents of deep networks, most
between 0.07 and 0.7), Viering and Loog 2023 (curves that are no power laws).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.9
"""The share of cases in which the interval is to hold the truth."""
FEWEST_SIZES = 3
MISFIT = 0.015
"""Of the error: how far a size lies off the law, one standard deviation. At twice the last size it is twice that."""
LEAST_EXPONENT, MOST_EXPONENT = 0.02, 2.0
USUAL_EXPONENT, EXPONENT_SPREAD = 0.35, 0.8
"""The prior of c: log-normal, this median and this standard deviation of its logarithm."""
FREEDOM = 4.0
"""Degrees of freedom of the distribution of a size's deviation (Student's t): one size that went wrong does not bend the curve."""
PRIOR_REPEATS = 2.0
"""What the binomial noise counts beside the repeats' own, in degrees of freedom."""
LEAST_NOISE, MOST_NOISE = 0.25, 25.0
OUTLIER = 3.0
"""A repeat further than so many standard deviations from its size's median counts as if it were there."""
GRID = 35
BINS = 512
"""Of means, in which curves are put together before a quantile is taken."""
SURE = 0.05
"""Chance of a slope as steep as that of the points, between sizes that are equally good, up to which the curve is taken to fall."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The errors of the runs of one size."""

    samples: int
    errors: tuple[float, ...]
    """Each in [0, 1]; one a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A curve: error(n) = a + b n^-c."""

    a: float
    b: float
    c: float

    def at(self, samples: float) -> float:
        return float(self.a + self.b * samples**-self.c)


@dataclass(frozen=True, kw_only=True, slots=True)
class Foretold:
    """The error at a number of samples: the median, and the interval that is to hold a run's error in LEVEL of cases."""

    samples: int
    error: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What the points say."""

    law: Law
    now: Foretold
    """At the largest size that was measured."""
    twice: Foretold
    gain: Foretold
    """By how much the error falls from now to twice the samples, a run's noise left out; in `error`, `low` and `high`."""
    noise: float
    """Standard deviation of a run's error at the largest size."""
    sizes: int
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CannotTell:
    """Why the points say nothing of more samples, as a sentence, and what would help."""

    reason: str


def fitted(points: Sequence[Point], *, tested: int | None, unit: str = "images") -> Fit | CannotTell:
    """The curve through `points`. `tested`: test samples of which an error is a share; None if it is no such share, and then only
    repeats tell its noise. `unit`: what the samples are, for what is said of them."""
    points = sorted(points, key=lambda point: point.samples)
    if len(points) < FEWEST_SIZES:
        return CannotTell(
            reason=f"{len(points)} size{'' if len(points) == 1 else 's'} cannot tell a curve from a line; "
            f"at least {FEWEST_SIZES} are needed: give more --parts"
        )
    if tested is None and max(len(point.errors) for point in points) < 2:
        return CannotTell(reason="one run of each size does not say how much runs differ; give --repeats 3")
    samples = np.array([point.samples for point in points], dtype=np.float64)  # (sizes,)
    level = np.array([_centre(point.errors) for point in points])  # (sizes,)
    of_run = _variances(points, level, tested)
    variance = of_run / np.array([len(point.errors) for point in points])  # (sizes,) of each size's mean
    if (reason := _not_falling(samples, level, variance, unit)) is not None:
        return CannotTell(reason=reason)
    grid = _grid(samples, level, variance)
    new_variance = float(of_run[-1])
    last = int(samples[-1])
    return Fit(
        law=grid.middle(),
        now=grid.foretold(last, new_variance),
        twice=grid.foretold(2 * last, new_variance),
        gain=grid.gain(2 * last),
        noise=new_variance**0.5,
        sizes=len(points),
        runs=sum(len(point.errors) for point in points),
    )


# --- noise ------------------------------------------------------------------------------------------------------------------------------


def _centre(errors: Sequence[float]) -> float:
    """The mean without what lies far off: of three runs or more, those beyond OUTLIER times the median distance from the median count as if
    they were that far."""
    values = np.array(errors, dtype=np.float64)
    if len(values) < 3:
        return float(values.mean())
    middle = float(np.median(values))
    far = OUTLIER * 1.4826 * float(np.median(np.abs(values - middle)))
    return float(np.clip(values, middle - far, middle + far).mean()) if far else middle


def _variances(points: Sequence[Point], level: Values, tested: int | None) -> Values:
    """(sizes,): the variance of one run's error at each size: a factor times the binomial variance of the test set, or for an error that is
    no share of samples times the square of the error, which is about how far runs scatter. The factor comes from the repeats of all sizes,
    those a doubling away counting half: few samples scatter more than the test set's chance, many less. One repeat that went wrong counts
    as if it were OUTLIER typical ones away."""
    if tested is not None:
        share = (level * tested + 1) / (tested + 2)  # never 0, also where all are right
        unit = share * (1 - share) / tested
    else:
        unit = np.maximum(level, 1e-3) ** 2
    freedom = np.array([len(point.errors) - 1 for point in points], dtype=np.float64)  # (sizes,)
    squares = np.array([np.square(np.array(point.errors) - np.mean(point.errors)).sum() for point in points]) / unit  # (sizes,)
    repeated = freedom > 0
    if repeated.any():
        typical = float(np.median(squares[repeated] / freedom[repeated]))
        squares = np.minimum(squares, OUTLIER**2 * max(typical, LEAST_NOISE) * freedom)
    doublings = np.log2([point.samples for point in points])
    near = 0.5 ** np.abs(doublings[:, None] - doublings[None, :])  # (sizes, sizes)
    prior = PRIOR_REPEATS if tested is not None else 0.0
    factor = (near @ squares + prior) / (near @ freedom + prior)
    found: Values = unit * np.clip(factor, LEAST_NOISE if tested is not None else 1e-6, MOST_NOISE)
    return found


def _not_falling(samples: Values, level: Values, variance: Values, unit: str) -> str | None:
    """Why the errors do not fall with the samples beyond what noise does; None if they do. The test is that of a weighted line through the
    logarithms of the sizes."""
    x = np.log(samples)
    weights = 1 / variance
    centre = float((weights * x).sum() / weights.sum())
    spread = float((weights * (x - centre) ** 2).sum())
    slope = float((weights * (x - centre) * level).sum() / spread)
    steps = slope * spread**0.5  # standard deviations
    if steps > -_normal_quantile(SURE):
        return (
            f"the error rises with the {unit}, beyond noise: something else differs between the sizes (steps, rate, a run that failed to "
            "learn); look at the runs before labelling more"
        )
    if steps > _normal_quantile(SURE):
        return (
            "the errors of the sizes differ by no more than noise does: the curve is flat, or too few runs and test "
            f"{unit} show its fall; give more --repeats, smaller --parts, or more test {unit}"
        )
    return None


# --- the grid ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Grid:
    """Curves, and how likely each of them is."""

    last: float
    """The largest size."""
    floor: Values  # (m,) a
    exponent: Values  # (m,) c
    error: Values  # (m,) at the largest size
    weight: Values  # (m,), adding up to 1

    def at(self, samples: float) -> Values:
        """(m,) error of each curve."""
        fall: Values = (samples / self.last) ** -self.exponent
        at: Values = self.floor + (self.error - self.floor) * fall
        return at

    def middle(self) -> Law:
        """The curve with the mean floor of all of them, and their mean errors at the largest size and at twice that: what is drawn agrees
        with what is foretold, as the likeliest curve of a grid need not."""
        a, now, twice = (float((self.weight * each).sum()) for each in (self.floor, self.error, self.at(2 * self.last)))
        c = float(np.log2((now - a) / (twice - a)))  # a < twice < now, as in each of them
        return Law(a=a, b=(now - a) * self.last**c, c=c)

    def foretold(self, samples: int, variance: float) -> Foretold:
        curve = self.at(samples)
        doublings = np.log2(samples / self.last) if samples > self.last else 0.0
        of_run = variance * curve / np.maximum(self.error, 1e-6)  # chance falls with the error
        spread = np.sqrt(of_run + (MISFIT * (1 + doublings) * curve) ** 2)
        low, middle, high = (_mixture_quantile(curve, spread, self.weight, share) for share in _SHARES)
        return Foretold(samples=samples, error=middle, low=max(0.0, low), high=min(1.0, high))

    def gain(self, samples: int) -> Foretold:
        """The fall of the law itself from the largest size on."""
        fall = self.error - self.at(samples)
        spread = np.maximum(MISFIT * np.log2(samples / self.last) * self.error, 1e-9)
        low, middle, high = (_mixture_quantile(fall, spread, self.weight, share) for share in _SHARES)
        return Foretold(samples=samples, error=middle, low=low, high=high)


_SHARES = ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2)


def _grid(samples: Values, level: Values, variance: Values) -> _Grid:
    last = float(samples[-1])
    scale = np.sqrt(variance + (MISFIT * level) ** 2)
    reach = 5 * float(scale[-1]) + 0.1 * float(level[-1])  # the law may pass the last size at some distance
    errors = np.linspace(max(1e-6, float(level[-1]) - reach), min(1.0, float(level[-1]) + reach), GRID)
    shares = (np.arange(GRID) + 0.5) / GRID  # of the error, what no label takes away
    exponents = np.geomspace(LEAST_EXPONENT, MOST_EXPONENT, GRID)
    error, share, exponent = (each.ravel() for each in np.meshgrid(errors, shares, exponents, indexing="ij"))  # (m,)
    floor = share * error
    prior = -0.5 * (np.log(exponent / USUAL_EXPONENT) / EXPONENT_SPREAD) ** 2
    score = prior.copy()
    for size, seen, var in zip(samples, level, variance, strict=True):
        curve = floor + (error - floor) * (size / last) ** -exponent
        square = (seen - curve) ** 2 / (var + (MISFIT * curve) ** 2)
        score -= (FREEDOM + 1) / 2 * np.log1p(square / FREEDOM) + 0.5 * np.log(var + (MISFIT * curve) ** 2)
    weight = np.exp(score - score.max())
    kept = weight > 1e-6
    weight = weight[kept] / weight[kept].sum()
    return _Grid(last=last, floor=floor[kept], exponent=exponent[kept], error=error[kept], weight=weight)


# --- distributions ----------------------------------------------------------------------------------------------------------------------


def _mixture_quantile(means: Values, spreads: Values, weights: Values, share: float) -> float:
    """The quantile of a mixture of normal distributions, by bisection. Many are put together first, those with like means."""
    if len(means) > BINS:
        edges = np.linspace(means.min(), means.max(), BINS + 1)
        place = np.clip(np.searchsorted(edges, means, side="right") - 1, 0, BINS - 1)
        together = np.bincount(place, weights, BINS).astype(np.float64)
        kept = together > 0
        means, spreads = (np.bincount(place, weights * each, BINS)[kept] / together[kept] for each in (means, spreads))
        weights = together[kept]
    low, high = float((means - 8 * spreads).min()), float((means + 8 * spreads).max())
    for _ in range(40):
        middle = (low + high) / 2
        if float((weights * _normal((middle - means) / spreads)).sum()) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _normal(z: Values) -> Values:
    """The normal distribution's function, to 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    x = np.abs(z) / np.sqrt(2.0)
    t = 1 / (1 + 0.3275911 * x)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * np.exp(-x * x)
    found: Values = np.where(z > 0, 1 - tail / 2, tail / 2)
    return found


def _normal_quantile(share: float) -> float:
    """Below 0 for a share below one half."""
    one = np.ones(1)
    return _mixture_quantile(0 * one, one, one, share)
