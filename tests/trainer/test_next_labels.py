"""The samples to label next are those of which the model is unsure, and differ from each other; the same ones each time."""

import numpy as np
import pytest

from trainer.curve.next_labels import Pool, Seen, ToLabel, chosen, margins_of, to_label


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


def seen(start: int, end: int) -> list[Seen]:
    return [Seen(name=f"{number}.png", guess="cat" if number % 2 else "dog") for number in range(start, end)]


def test_a_pool_keeps_the_least_sure_however_the_samples_come() -> None:
    random = np.random.default_rng(0)
    margins, features = random.random(500).astype(np.float32), random.random((500, 4)).astype(np.float32)
    margins[100:110] = margins[7]  # ties, which fall to the first
    expected = np.lexsort((np.arange(500), margins))[:20]
    for batch in (1, 64, 500):
        pool = Pool(20)
        for start in range(0, 500, batch):
            end = min(start + batch, 500)
            pool.add(seen(start, end), margins[start:end], features[start:end])
        found, kept, points = pool.taken()
        assert [each.name for each in found] == [f"{number}.png" for number in expected]
        assert np.array_equal(kept, margins[expected])
        assert np.array_equal(points, features[expected])


def test_an_empty_pool_is_empty() -> None:
    found, margins, features = Pool(5).taken()
    assert (len(found), len(margins), len(features)) == (0, 0, 0)
    assert to_label(Pool(5), 3) == []


def test_the_list_names_the_samples_in_the_order_in_which_to_label_them() -> None:
    pool = Pool(10)
    texts = [Seen(name="a:1", guess="pos", text="so so"), Seen(name="a:2", guess="neg", text="not bad")]
    pool.add(texts, np.array([0.5, 0.25], dtype=np.float32), np.array([[0, 1], [1, 0]], dtype=np.float32))
    assert to_label(pool, 5) == [
        ToLabel(rank=1, name="a:2", guess="neg", margin="0.2500", text="not bad"),
        ToLabel(rank=2, name="a:1", guess="pos", margin="0.5000", text="so so"),
    ]
