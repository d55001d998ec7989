"""Wording that this package's error messages share. Called by rules.py, values.py and toml.py."""

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """` did you mean X?` with the option closest to a mistyped word; empty if none is close."""
    close = difflib.get_close_matches(word, options, n=1)
    return f" did you mean {close[0]}?" if close else ""
