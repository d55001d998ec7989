"""Words that the errors of this package share."""

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """` did you mean X?` for the option that is closest to a mistyped word; empty where none is close."""
    close = difflib.get_close_matches(word, options, n=1)
    return f" did you mean {close[0]}?" if close else ""
