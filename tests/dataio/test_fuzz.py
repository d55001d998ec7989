"""Some hundred damaged and hostile files of every foreign format, read under limits of memory and time: see tests/fuzz.py."""

import pytest

from tests.fuzz import READERS, fuzz

CASES = 15
"""Of each reader. `python -m tests.fuzz --seconds 600` reads tens of thousands."""


def test_every_reader_ends_with_a_value_or_an_error_of_its_own() -> None:
    count, problem = fuzz(list(READERS), count=CASES)
    if problem:
        pytest.fail(problem)
    assert count == CASES * len(READERS)
