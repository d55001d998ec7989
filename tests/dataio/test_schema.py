"""Claims about targets: a value is what its kind allows or is refused with the rule, and what a data set may have is bounded."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.schema import MAX_CLASSES, MAX_TARGETS, Target, fault_of_targets, is_known, is_single_label, single_label, value_of

LABEL = Target(name="species", kind="label", classes=("ant", "bee", "cat"))
LABELS = Target(name="tags", kind="labels", classes=("wet", "old", "red", "big"))
NUMBER = Target(name="age", kind="number")


@given(st.integers(-1, 2))
def test_a_label_is_kept_and_minus_one_is_unknown(value: int) -> None:
    stored = value_of(LABEL, value)
    assert (stored.dtype, stored.shape, int(stored)) == (np.int64, (), value)
    assert is_known(LABEL, stored) == (value >= 0)


@given(st.lists(st.sampled_from([0, 1, 255]), min_size=4, max_size=4))
def test_labels_are_kept_and_unknown_only_where_all_are(values: list[int]) -> None:
    stored = value_of(LABELS, np.array(values, np.uint8))
    assert stored.tolist() == values
    assert is_known(LABELS, stored) == (values != [255] * 4)


@given(st.floats(width=32, allow_infinity=False))
def test_a_number_of_32_bits_is_kept_exactly_and_nan_is_unknown(value: float) -> None:
    stored = value_of(NUMBER, value)
    assert (stored.dtype, stored.shape) == (np.float32, ())
    assert float(stored) == value or math.isnan(value)
    assert is_known(NUMBER, stored) == (not math.isnan(value))


def test_every_nan_is_stored_as_the_same_bits() -> None:
    odd = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert {value_of(NUMBER, value).tobytes() for value in (*odd, float("nan"), -math.nan)} == {np.float32("nan").tobytes()}


@pytest.mark.parametrize(
    ("target", "value", "rule"),
    [
        (LABEL, 3, r"3 is not in 0\.\.2"),
        (LABEL, -2, r"-2 is not in 0\.\.2"),
        (LABEL, 1.0, r"1\.0 is not in 0\.\.2"),
        (LABEL, True, r"True is not in 0\.\.2"),
        (LABEL, None, r"None is not in 0\.\.2"),
        (LABEL, 10**30, r"is not in 0\.\.2"),
        (LABELS, [0, 1, 0, 1], "is not 4 uint8, one a class"),
        (LABELS, np.zeros(3, np.uint8), "is not 4 uint8"),
        (LABELS, np.zeros(4, np.int64), "is not 4 uint8"),
        (LABELS, np.full(4, 2, np.uint8), "holds other values than 0, 1 and 255"),
        (NUMBER, "1.5", "1.5 is no number"),
        (NUMBER, True, "True is no number"),
        (NUMBER, None, "None is no number"),
        (NUMBER, math.inf, "is no finite number of 32 bits"),
        (NUMBER, 1e39, "is no finite number of 32 bits"),
        (NUMBER, 10**400, "is no finite number of 32 bits"),
    ],
)
def test_what_is_no_value_of_its_kind_is_refused(target: Target, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        value_of(target, value)


@pytest.mark.parametrize("target", [LABEL, LABELS, NUMBER])
def test_blank_is_what_is_unknown(target: Target) -> None:
    blank = target.blank(3)
    assert blank.shape == (3, *target.shape)
    assert not any(is_known(target, row) for row in blank)


def test_one_label_a_sample_is_a_matter_of_name_and_kind() -> None:
    assert is_single_label(single_label("ab"))
    assert not is_single_label((LABEL,))
    assert not is_single_label((*single_label("ab"), NUMBER))
    assert not is_single_label((replace(LABELS, name="label"),))
    assert fault_of_targets((LABEL, LABELS, NUMBER)) is None


@pytest.mark.parametrize(
    ("targets", "fault"),
    [
        ((), "0 targets"),
        (tuple(replace(NUMBER, name=str(n)) for n in range(MAX_TARGETS + 1)), "65 targets, not 1 to 64"),
        ((NUMBER, replace(LABEL, name="age")), "two targets named 'age'"),
        ((replace(NUMBER, name=""),), "needs a name"),
        ((replace(NUMBER, name=" a"),), "needs a name"),
        ((replace(NUMBER, name="a\nb"),), "needs a name"),
        ((replace(NUMBER, name="a" * 101),), "needs a name"),
        ((replace(NUMBER, classes=("a",)),), "is a number and has classes"),
        ((replace(NUMBER, std=0.0),), "mean 0.0 and std 0.0"),
        ((replace(NUMBER, mean=math.nan),), "mean nan"),
        ((replace(LABEL, mean=1.0),), "has a mean or a std"),
        ((replace(LABEL, classes=()),), "has 0 classes"),
        ((replace(LABELS, classes=tuple(map(str, range(MAX_CLASSES["labels"] + 1)))),), "16385 classes"),
        ((replace(LABEL, classes=("a", "a")),), "the same class twice"),
        ((replace(LABEL, kind="text"),), "is of kind 'text'"),  # type: ignore[arg-type]
    ],
)
def test_targets_that_a_data_set_may_not_have(targets: tuple[Target, ...], fault: str) -> None:
    found = fault_of_targets(targets)
    assert found is not None
    assert fault in found
