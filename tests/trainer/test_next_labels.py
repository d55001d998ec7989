"""The images to label next are those of which the model is unsure, and differ from each other; the same ones each time."""

import numpy as np
import pytest

from trainer.curve.next_labels import Pool, chosen, margins_of, rows_of


def test_a_margin_is_the_highest_probability_minus_the_second() -> None:
    found = margins_of(np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]]))
    assert found.tolist() == pytest.approx([0.2, 0.0, 1.0])
    assert margins_of(np.ones((3, 1))).tolist() == [1, 1, 1]


def test_a_copy_of_what_is_taken_comes_after_all_that_differ() -> None:
    features = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    order = chosen(np.array([0.1, 0.11, 0.12, 0.5, 0.6], dtype=np.float32), features, 5)
    assert order[0] == 0, "the least sure one"
    assert set(order[1:3]) == {3, 4}
    assert order[3:] == [1, 2]


def test_of_equally_far_ones_the_less_sure_is_taken_and_of_equal_ones_the_first() -> None:
    features = np.array([[0, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    assert chosen(np.array([0.0, 0.4, 0.2, 0.2], dtype=np.float32), features, 2) == [0, 2]


def test_no_more_are_chosen_than_there_are() -> None:
    features = np.zeros((3, 2), dtype=np.float32)
    assert chosen(np.zeros(3, dtype=np.float32), features, 10) == [0, 1, 2]
    assert chosen(np.zeros(0, dtype=np.float32), np.zeros((0, 2), dtype=np.float32), 10) == []


def test_a_pool_keeps_the_least_sure_however_the_images_come() -> None:
    random = np.random.default_rng(0)
    margins, features = random.random(500).astype(np.float32), random.random((500, 4)).astype(np.float32)
    margins[100:110] = margins[7]  # ties, which fall to the first
    expected = np.lexsort((np.arange(500), margins))[:20]
    for batch in (1, 64, 500):
        pool = Pool(20)
        for start in range(0, 500, batch):
            pool.add(margins[start : start + batch], features[start : start + batch])
        places, kept, seen = pool.taken()
        assert places.tolist() == expected.tolist()
        assert np.array_equal(kept, margins[expected])
        assert np.array_equal(seen, features[expected])


def test_an_empty_pool_is_empty() -> None:
    places, margins, features = Pool(5).taken()
    assert (len(places), len(margins), len(features)) == (0, 0, 0)


def test_rows_name_the_images_in_the_order_in_which_to_label_them() -> None:
    rows = rows_of(["a.png", "b.png"], ["cat", "dog"], np.array([0.25, 0.5], dtype=np.float32), [1, 0])
    assert rows == [(1, "b.png", "dog", "0.5000"), (2, "a.png", "cat", "0.2500")]
