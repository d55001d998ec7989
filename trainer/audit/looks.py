"""Finds images that look unlike the others of their data set: dark, bright, blurred, flat, of one colour, of an odd size or shape; and
pairs of classes that overlap. Pure; __main__.py calls it with what gather.py and labels.py know.

An image is odd if a measure of it is far from the median of all images, in robust standard deviations (Iglewicz and Hoaglin 1993). So
nothing is odd in a data set of which all images are dark, and the limits need no tuning for a kind of pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.audit.gather import Gathered
from trainer.audit.kept import Ints

FAR = 3.5
"""Robust standard deviations, as they advise. A black photograph among usual ones is four away, and not five."""
ONE_COLOUR = 2.0
"""Levels of 255 between the darkest and the brightest pixel of an image that counts as one of a single colour: as much as compression makes
of one."""
FEWEST_SWAPS = 2
"""A pair of classes that was confused less often does not overlap, it has a mistake."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Odd:
    """A way in which an image, or a text, is unlike the others."""

    sample: int
    what: str
    """`dark`, `blurred`, ...: one of the words below, or of text_looks.py."""
    value: float
    median: float
    far: float
    """Robust standard deviations from the median; infinite for what is so or not, as an image of one colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Two classes that a model which has not seen the samples takes for each other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int
    samples: int
    """Of both classes."""

    @property
    def share(self) -> float:
        return (self.first_as_second + self.second_as_first) / self.samples


def odd_images(found: Gathered) -> list[Odd]:
    """The farthest first. An image that is odd in several ways is there several times. Images that could not be decoded do not count."""
    usable = np.flatnonzero(~found.is_bad)
    height, width = (found.sizes[usable, side].astype(np.float64) for side in (0, 1))
    is_flat = found.measures["colour_range"][usable] <= ONE_COLOUR
    odd = [
        Odd(sample=int(image), what="of one colour", value=float(found.measures["colour_range"][image]), median=ONE_COLOUR, far=np.inf)
        for image in usable[is_flat]
    ]
    rest = usable[~is_flat]
    of_rest = {name: found.measures[name][rest].astype(np.float64) for name in ("brightness", "contrast", "sharpness")}
    odd += far_from_median("dark", "bright", of_rest["brightness"], rest)
    odd += far_from_median("flat", "", of_rest["contrast"], rest)
    odd += far_from_median("blurred", "", of_rest["sharpness"], rest)
    odd += far_from_median("small", "large", np.sqrt(np.maximum(height * width, 1)), usable, is_ratio=True)
    odd += far_from_median("tall", "wide", np.maximum(width, 1) / np.maximum(height, 1), usable, is_ratio=True)
    return sorted(odd, key=lambda each: (-each.far, each.sample, each.what))


def far_from_median(low: str, high: str, values: Values, samples: Ints, *, is_ratio: bool = False) -> list[Odd]:
    """Those that are far below the median (`low`) or above it (`high`); "" for a side that is not odd. `is_ratio`: factors count."""
    if not len(values):
        return []
    far = robust_scores(np.log(values) if is_ratio else values)
    median = float(np.median(values))
    return [
        Odd(sample=int(samples[row]), what=what, value=float(values[row]), median=median, far=abs(float(far[row])))
        for row in np.flatnonzero(np.abs(far) > FAR).tolist()
        if (what := low if far[row] < 0 else high)
    ]


def robust_scores(values: Values) -> Values:
    """(n,): how many robust standard deviations each of (n,) values is above the median. Where half of the values or more are equal, the
    mean deviation takes the place of the median deviation; where all are, none is far."""
    apart = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(apart)) or 1.2533 * np.abs(apart).mean()
    return apart / spread if spread > 0 else np.zeros_like(apart)


def overlaps(given: Ints, answers: Ints, classes: int) -> list[Overlap]:
    """Pairs of classes that were taken for each other, those with the largest share first. `given`, `answers` (n,): the label and the
    answer of a model that has not seen the sample."""
    matrix = np.bincount(given * classes + answers, minlength=classes**2).reshape(classes, classes)  # [label][answer]
    counts = matrix.sum(1)
    swaps = np.triu(matrix + matrix.T, 1)
    found = [
        Overlap(
            first=first,
            second=second,
            first_as_second=int(matrix[first, second]),
            second_as_first=int(matrix[second, first]),
            samples=int(counts[first] + counts[second]),
        )
        for first, second in np.argwhere(swaps >= FEWEST_SWAPS).tolist()
    ]
    return sorted(found, key=lambda pair: (-pair.share, pair.first, pair.second))


def words_of(odd: Sequence[Odd]) -> Mapping[int, str]:
    """Sample -> the ways in which it is odd: `dark, blurred`."""
    found: dict[int, list[str]] = {}
    for each in odd:
        found.setdefault(each.sample, []).append(each.what)
    return {sample: ", ".join(dict.fromkeys(ways)) for sample, ways in found.items()}
