"""Formats numbers for people: durations, sizes, counts. Called by everything that prints: plan, progress, report, model card."""

import math


def duration(seconds: float | None) -> str:
    """Text such as `0.41 s`, `42 s`, `3:07 min`, `2:05:09 h`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def size(count: float | None) -> str:
    """Bytes in powers of 1000: `512 B`, `44.7 MB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(count: float | None) -> str:
    """Text such as `3.33 GFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(count: float | None, units: tuple[str, ...]) -> str:
    if count is None or not math.isfinite(count):
        return "?"
    value, power = float(count), 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    unit = units[power]
    return f"{value:.0f} {unit}" if value == int(value) or abs(value) >= 100 else f"{value:.3g} {unit}"


def number(value: float | None) -> str:
    """An integer gets thousands separators, anything else four significant digits."""
    if value is None:
        return "?"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def loss(value: float) -> str:
    """A loss with four decimals, or with four significant digits if it has diverged: 0.4321, 7.314e+22."""
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) < 1e6 else f"{value:.4g}"


def percent(ratio: float | None, digits: int = 1) -> str:
    """A ratio as per cent: 0.874 -> `87.4 %`."""
    return "?" if ratio is None or not math.isfinite(ratio) else f"{100 * ratio:.{digits}f} %"
