"""Wording that this package's error messages share. Called by rules.py, values.py and toml.py, and by whoever else suggests a name."""

import difflib
import re
from collections.abc import Iterable

_CLOSE = 0.6  # difflib's own idea of close


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """` did you mean X?` with the option closest to a mistyped word; empty if none is close."""
    close = closest(word, options, limit=1)
    return f" did you mean {close[0]}?" if close else ""


def closest(word: str, options: Iterable[str], *, limit: int = 3) -> list[str]:
    """The options closest to a mistyped word, the closest first, and before all others those that it is the beginning of. Capitals, hyphens
    and underscores do not count; of options that are equally close, the plain name comes before its variants."""
    asked = _plain(word)
    matcher = difflib.SequenceMatcher(b=asked)
    scored = []
    for option in options:
        plain = _plain(option)
        matcher.set_seq1(plain)
        if matcher.real_quick_ratio() >= _CLOSE and matcher.quick_ratio() >= _CLOSE and (ratio := matcher.ratio()) >= _CLOSE:
            scored.append((not plain.startswith(asked), -round(ratio, 2), len(option), option))
    return [option for *_, option in sorted(scored)[:limit]]


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())
