"""Draws curves inside a page. Called by the report's parts, by the comparison of runs and by the pages of other commands, which choose the
curves.

The page sets the colours, so a drawing follows its light and dark scheme.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trainer.report.page import Html, tag

CURVE_POINTS = 600  # more would be closer than a pixel, and each costs bytes
SCATTER_POINTS = 1000
MOST_SIZES = 8  # written below an axis; more would overlap
LOG_FROM = 20.0  # a loss that reaches this many times its median gets a logarithmic axis

Values = npt.NDArray[np.float64]
Line = tuple[str, Values, Values, str]
"""Label, x, y, and Matplotlib's line style."""

# Colours that no drawing uses by chance. Each becomes a CSS variable, so that the page's scheme colours the curves too.
_INK, _SERIES = "#010203", ("#020304", "#030405", "#040506", "#050607", "#060708", "#070809", "#08090a", "#090a0b")
MOST_LINES = len(_SERIES)
_MARKS = _SERIES[2]


def thinned(x: Values, y: Values, points: int = CURVE_POINTS) -> tuple[Values, Values]:
    """At most `points` finite points: means of equal runs of neighbours. Choosing points instead would hide or invent spikes."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    each = -(-len(x) // points) if len(x) else 1
    if each <= 1:
        return x, y
    starts = np.arange(0, len(x), each)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def by_attempt(x: Values, y: Values, attempt: Values) -> tuple[Values, Values]:
    """Thinned, with a gap between attempts, because nothing was computed there."""
    starts = np.flatnonzero(np.diff(attempt) != 0) + 1 if np.isfinite(attempt).all() else np.zeros(0, dtype=np.int64)
    each = max(2, CURVE_POINTS // (len(starts) + 1))
    parts = [thinned(xs, ys, each) for xs, ys in zip(np.split(x, starts), np.split(y, starts), strict=True)]
    gap = (np.array([np.nan]), np.array([np.nan]))
    joined = [part for known in parts if len(known[0]) for part in (known, gap)][:-1] or [gap]
    return np.concatenate([xs for xs, _ in joined]), np.concatenate([ys for _, ys in joined])


def spans_magnitudes(values: Values) -> bool:
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() > LOG_FROM * np.median(known))


def plot(lines: Sequence[Line], *, marks: Sequence[float], x: str, log: bool, ident: str) -> Html:
    """At most MOST_LINES lines, each in a colour of its own."""
    with _styled(ident) as (figure, axes):
        for (label, xs, ys, style), colour in zip(lines, _SERIES[: len(lines)], strict=True):
            axes.plot(xs, ys, style, color=colour, label=label, linewidth=1.4, markersize=3.5)
        for mark in marks:
            axes.axvline(mark, color=_MARKS, linestyle="--", linewidth=0.8)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # not 10^1 in mathematical notation
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x, color=_INK)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        return svg(figure, ident)


def curve_over_rates(rates: Values, curves: Sequence[tuple[str, Values, str]], *, marks: Sequence[float], ident: str) -> Html:
    """Losses over learning rates, which are on a logarithmic axis. `curves`: label, a value for each rate, Matplotlib's line style."""
    with _styled(ident) as (figure, axes):
        for (label, values, style), colour in zip(curves, _SERIES[: len(curves)], strict=True):
            axes.plot(rates, values, style, color=colour, label=label, linewidth=1.4)
        for mark in marks:
            axes.axvline(mark, color=_MARKS, linestyle="--", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        known = np.concatenate([values for _, values, _ in curves]) if len(rates) else np.zeros(0)
        if spans_magnitudes(known):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("learning rate", color=_INK)
        axes.legend(frameon=False, labelcolor=_INK)
        return svg(figure, ident)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CurveOverSizes:
    """Percentages by a number of samples."""

    label: str
    seen: tuple[Values, Values]
    """x, y of what was measured."""
    line: tuple[Values, Values] | None = None
    """x, y of the curve through it."""
    foretold: tuple[float, float, float, float] | None = None
    """x, y, and the interval of y, beyond what was measured."""


def curves_over_sizes(curves: Sequence[CurveOverSizes], *, x: str, ident: str) -> Html:
    """At most MOST_LINES of them, over a logarithmic axis."""
    with _styled(ident) as (figure, axes):
        for each, colour in zip(curves, _SERIES[: len(curves)], strict=True):
            axes.plot(*each.seen, "o", color=colour, label=each.label, markersize=3.5)
            if each.line is not None:
                axes.plot(*each.line, "-", color=colour, linewidth=1.2)
            if each.foretold is not None:
                at, middle, low, high = each.foretold
                axes.plot([at, at], [low, high], "-", color=colour, linewidth=2.4, alpha=0.5)
                axes.plot([at], [middle], "D", color=colour, markersize=4.5)
        axes.set_xscale("log")
        sizes = sorted({float(size) for each in curves for size in (*each.seen[0], *([each.foretold[0]] if each.foretold else []))})
        axes.set_xticks(sizes[-MOST_SIZES:], [f"{size:,.0f}" for size in sizes[-MOST_SIZES:]])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel(x, color=_INK)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        return svg(figure, ident)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """A line of a picture in parallel coordinates."""

    places: tuple[float, ...]
    """On each axis, from 0 to 1; NaN for none."""
    score: float
    is_marked: bool = False
    is_whole: bool = True
    """Drawn through; if not, dashed."""


def parallel(
    axes_of: Sequence[tuple[str, Sequence[tuple[float, str]]]], lines: Sequence[Parallel], *, score: str, is_ratio: bool, ident: str
) -> Html:
    """Lines over parallel axes, each (name, marks as (place, text)), the last one being the score."""
    low, high = min(line.score for line in lines), max(line.score for line in lines)
    wide = high - low or 1.0

    def score_words(value: float) -> str:
        return f"{100 * value:.1f} %" if is_ratio else f"{value:.4g}"

    with _styled(ident) as (figure, axes):
        figure.set_size_inches(5.2 if len(axes_of) < 5 else min(12.0, 1.1 * len(axes_of)), 2.9)
        for line in sorted(lines, key=lambda line: line.is_marked):
            ys = [*line.places, (line.score - low) / wide]
            style = "-" if line.is_whole else "--"
            colour, width, alpha = (_SERIES[1], 2.0, 1.0) if line.is_marked else (_SERIES[0], 1.0, 0.55)
            axes.plot(range(len(ys)), ys, style, color=colour, linewidth=width, alpha=alpha)
        for x, (_, marks) in enumerate([*axes_of, (score, [(0.0, score_words(low)), (1.0, score_words(high))])]):
            axes.axvline(x, color=_INK, linewidth=0.8)
            for place, text in marks:
                axes.annotate(text, (x, place), xytext=(4, 0), textcoords="offset points", color=_INK, fontsize=7.5, va="center")
        names = [name.replace(".", ".\n").replace("_", "_\n") for name, _ in axes_of]
        axes.set_xticks(range(len(axes_of) + 1), [*names, score.replace(" ", "\n")], fontsize=7.5)
        axes.set_xlim(-0.15, len(axes_of) + 0.6)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        return svg(figure, ident)


def heat(share: Values) -> Html:
    """A large confusion matrix as a picture: rows are true classes, columns predictions, darker is more."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heat", "font.size": 9.0}):
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted class", color=_INK)
        axes.set_ylabel("true class", color=_INK)
        axes.tick_params(colors=_INK)
        return tag("figure", svg(figure, "heat"))


def scatter(xs: Values, ys: Values, *, x: str, y: str, ident: str) -> Html:
    """Points, at most SCATTER_POINTS of them at equal steps in the given order, and the line where the two values are equal."""
    each = -(-len(xs) // SCATTER_POINTS)
    xs, ys = xs[::each], ys[::each]
    ends = [min(xs.min(), ys.min()), max(xs.max(), ys.max())]
    with _styled(ident) as (figure, axes):
        axes.plot(xs, ys, "o", color=_SERIES[0], markersize=2.5, alpha=0.5, markeredgewidth=0)
        axes.plot(ends, ends, "--", color=_INK, linewidth=0.8)
        axes.set_ylabel(y, color=_INK)
        axes.set_xlabel(x, color=_INK)
        return svg(figure, ident)


def diagonal(lines: Sequence[Line], *, x: str, ident: str) -> Html:
    """At most MOST_LINES lines of percentages, and the line where they are what they should be."""
    with _styled(ident) as (figure, axes):
        axes.plot([0, 100], [0, 100], "--", color=_INK, linewidth=0.8)
        for (label, xs, ys, style), colour in zip(lines, _SERIES[: len(lines)], strict=True):
            axes.plot(xs, ys, style, color=colour, label=label, linewidth=1.4, markersize=3.5)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel(x, color=_INK)
        if lines:
            axes.legend(frameon=False, labelcolor=_INK)
        return svg(figure, ident)


def histogram(values: Values, *, x: str, ident: str) -> Html:
    with _styled(ident) as (figure, axes):
        axes.hist(values, bins=min(60, max(10, round(len(values) ** 0.5))), color=_SERIES[0])
        axes.axvline(0.0, color=_INK, linestyle="--", linewidth=0.8)
        axes.set_xlabel(x, color=_INK)
        return svg(figure, ident)


@contextmanager
def _styled(ident: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure of the page's size and colours, with empty axes."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident, "font.size": 9.0, "axes.edgecolor": _INK}):
        figure = Figure(figsize=(5.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(colors=_INK, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.6)
        yield figure, axes


def svg(figure: Figure, ident: str) -> Html:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML header and the document type, which HTML does not use
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must be unique in the page, not only in their own drawing.
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{ident}-", text)
    for index, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--s{index})")
    return Html(text.replace(_INK, "var(--ink)"))
