"""Claims about what is held out: by class, by a hash of the key, whatever the order and whatever else there is."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.schema import SPLITS, Target
from dataio.sources.splits import divide, plan_splits, recognised, split_named, strata

FRACTIONS = st.floats(0.01, 0.99)
LABELLED = st.dictionaries(st.text("abc/12", max_size=6), st.integers(-1, 3), max_size=60).map(lambda found: list(found.items()))


def held_out(labelled: list[tuple[str, int]], test: float, validation: float = 0.0) -> dict[str, set[tuple[str, int]]]:
    """Split -> the (key, label) in it."""
    held = plan_splits(("train",), test_fraction=test, validation_fraction=validation).held
    rows = divide([key for key, _ in labelled], np.array([label for _, label in labelled], np.int64), held)
    return {split: {labelled[row] for row in found.tolist()} for split, found in rows.items()}


@settings(deadline=None)
@given(LABELLED, FRACTIONS, st.one_of(st.just(0.0), FRACTIONS), st.randoms())
def test_the_splits_are_disjoint_are_all_and_do_not_depend_on_the_order(labelled, test, validation, random):
    splits = held_out(labelled, test, validation)
    assert Counter(item for found in splits.values() for item in found) == Counter(labelled)
    shuffled = list(labelled)
    random.shuffle(shuffled)
    assert held_out(shuffled, test, validation) == splits


@settings(deadline=None)
@given(LABELLED, FRACTIONS)
def test_each_class_is_held_out_in_proportion_at_least_one_image_and_never_all(labelled, fraction):
    held = Counter(label for _, label in held_out(labelled, fraction)["test"])
    for label, count in Counter(label for _, label in labelled).items():
        assert held[label] == min(count - 1, max(1, round(fraction * count)))


@settings(deadline=None)
@given(LABELLED, LABELLED, FRACTIONS, FRACTIONS)
def test_images_of_other_classes_change_nothing_in_a_class(labelled, more, test, validation):
    others = [(f"more/{key}", label + 10) for key, label in more]
    before, after = held_out(labelled, test, validation), held_out(labelled + others, test, validation)
    for split, found in before.items():
        assert {item for item in after[split] if not item[0].startswith("more/")} == found


@settings(deadline=None)
@given(LABELLED, FRACTIONS, FRACTIONS, FRACTIONS)
def test_validation_changes_nothing_in_test_and_more_held_out_keeps_what_was(labelled, one, other, validation):
    low, high = sorted((one, other))
    plain = held_out(labelled, low)
    assert held_out(labelled, low, validation)["test"] == plain["test"]
    assert held_out(labelled, high)["test"] >= plain["test"]


def test_test_and_validation_are_drawn_by_hashes_that_know_nothing_of_each_other():
    labelled = [(f"{row}", 0) for row in range(20_000)]
    test = held_out(labelled, 0.1)["test"]
    rows = divide([key for key, _ in labelled], np.zeros(20_000, np.int64), {"validation": 0.1})
    both = test & {labelled[row] for row in rows["validation"].tolist()}
    assert 140 < len(both) < 260  # 200 expected, standard deviation 13


def test_equal_keys_stay_together():
    keys = ["a", "b", "c", "d"] * 3
    rows = divide(keys, np.zeros(12, np.int64), {"test": 0.25})
    assert len({keys[row] for row in rows["test"].tolist()}) == 1
    assert [len(rows[split]) for split in ("train", "test")] == [9, 3]


def test_a_sample_of_several_labels_belongs_to_its_rarest():
    target = Target(name="tags", kind="labels", classes=("often", "never", "rare", "rare too"))
    column = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [255, 255, 255, 255]], np.uint8)
    assert strata(target, column).tolist() == [0, 2, 2, 3, -1, -1]
    assert strata(target, column[:0]).tolist() == []


def test_numbers_fall_into_ten_bins_of_equal_size_and_unknown_ones_into_one_more():
    target = Target(name="age", kind="number")
    column = np.random.default_rng(0).permutation(1000).astype(np.float32)
    assert Counter(strata(target, column).tolist()) == dict.fromkeys(range(10), 100)
    assert strata(target, np.append(column, np.nan).astype(np.float32)).tolist() == [*strata(target, column).tolist(), -1]
    assert strata(target, target.blank(3)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("stored", "validation", "splits", "held"),
    [
        (["train", "test"], 0.0, ("train", "test"), {}),
        (["train"], 0.0, ("train", "test"), {"test": 0.2}),
        (["train", "validation"], 0.3, ("train", "validation", "test"), {"test": 0.2}),
        (["train", "unlabelled"], 0.3, SPLITS, {"test": 0.2, "validation": 0.3}),
        (["test", "train"], 0.3, ("train", "validation", "test"), {"validation": 0.3}),
    ],
)
def test_what_a_source_lacks_is_held_out_of_train(stored, validation, splits, held):
    plan = plan_splits(stored, test_fraction=0.2, validation_fraction=validation)
    assert (plan.splits, dict(plan.held)) == (splits, held)
    assert [split for split in SPLITS if plan.is_whole(split)] == [
        split for split in SPLITS if split in stored and (split != "train" or not held)
    ]


def test_splits_go_by_several_names_of_which_the_first_counts():
    assert recognised({"dev", "val", "train", "other"}) == {"train": "train", "validation": "val"}
    assert (split_named("valid"), split_named("unlabeled"), split_named("Train")) == ("validation", "unlabelled", None)
