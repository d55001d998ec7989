"""Texts in batches of similar length: each once an epoch, the same for any workers, little padded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.length_order import LengthOrder
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.texts import longest_padded_within, padded


def make(lengths: np.ndarray, **changes: object) -> LengthOrder:
    values = {"seed": 1, "fingerprint": "f" * 64, "batch_size": 12, "virtual_ranks": 4, "sort_steps": 8, **changes}
    return LengthOrder(count=len(lengths), lengths=lengths, **values)  # type: ignore[arg-type]


def plain(order: LengthOrder) -> Order:
    """The order that it deals out anew."""
    return Order(**{name: getattr(order, name) for name in Order.__dataclass_fields__})


def fresh(order: LengthOrder) -> LengthOrder:
    return make(order.lengths, **{name: getattr(order, name) for name in (*Order.__dataclass_fields__, "sort_steps") if name != "count"})


@st.composite
def orders(draw: st.DrawFn) -> LengthOrder:
    count, virtual_ranks = draw(st.integers(1, 400) | st.sampled_from([511, 512, 513, 1025])), draw(st.integers(1, 7))
    lengths = np.random.default_rng(draw(st.integers(0, 1000))).integers(1, draw(st.sampled_from([2, 40, 500])), count).astype(np.int32)
    return make(
        lengths,
        seed=draw(st.integers(0, 2**40)),
        virtual_ranks=virtual_ranks,
        batch_size=virtual_ranks * draw(st.integers(1, 30)),
        window=draw(st.sampled_from([0, 0, 64])),
        group=draw(st.sampled_from([16, 512])),
        spread=draw(st.booleans()),
        sort_steps=draw(st.integers(1, 40)),
    )


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 1000))
def test_every_text_of_an_epoch_is_seen_exactly_once(order: LengthOrder, epoch: int) -> None:
    parts = [order.samples(epoch, step, rank) for step in range(order.steps_per_epoch) for rank in range(order.virtual_ranks)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(order.count))


@settings(max_examples=100, deadline=None)
@given(orders(), st.data())
def test_after_an_interruption_another_number_of_workers_sees_exactly_the_rest(order: LengthOrder, data: st.DataObject) -> None:
    stopped = data.draw(st.integers(0, order.steps_per_epoch))
    seen: list[np.ndarray] = [np.empty(0, np.int64)]
    for steps in (range(stopped), range(stopped, order.steps_per_epoch)):
        workers = data.draw(st.integers(1, min(4, order.virtual_ranks)))
        for rank in range(workers):
            own = fresh(order)  # no rank has what another one remembers
            carried = blocks_of_virtual_ranks(order.virtual_ranks, workers, rank)
            seen += [own.samples(3, step, virtual_rank) for step in steps for virtual_rank in carried]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.count))


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 50))
def test_steps_and_virtual_ranks_have_as_many_texts_as_without_sorting(order: LengthOrder, epoch: int) -> None:
    before = plain(order)
    for step in range(order.steps_per_epoch):
        for rank in range(order.virtual_ranks):
            assert len(order.samples(epoch, step, rank)) == len(before.samples(epoch, step, rank))


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 50), st.data())
def test_a_step_is_the_same_whatever_was_asked_before(order: LengthOrder, epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    rank = data.draw(st.integers(0, order.virtual_ranks - 1))
    untouched = fresh(order)
    for other in data.draw(st.lists(st.integers(0, order.steps_per_epoch - 1), max_size=5)):
        order.samples(data.draw(st.integers(0, 3)), other, rank)
    assert np.array_equal(order.samples(epoch, step, rank), untouched.samples(epoch, step, rank))
    assert order.width(epoch * order.steps_per_epoch + step) == untouched.width(epoch * order.steps_per_epoch + step)


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 50))
def test_the_width_of_a_step_is_what_its_longest_text_needs(order: LengthOrder, epoch: int) -> None:
    for step in range(order.steps_per_epoch):
        ids = np.concatenate([order.samples(epoch, step, rank) for rank in range(order.virtual_ranks)])
        assert order.width(epoch * order.steps_per_epoch + step) == padded(int(order.lengths[ids].max(initial=1)))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 50))
def test_the_texts_of_a_window_are_those_that_its_steps_would_have_had(order: LengthOrder, epoch: int) -> None:
    for first in range(0, order.steps_per_epoch, order.sort_steps):
        steps = range(first, min(first + order.sort_steps, order.steps_per_epoch))
        ours, theirs = (
            np.sort(np.concatenate([each.samples(epoch, step, rank) for step in steps for rank in range(order.virtual_ranks)]))
            for each in (order, plain(order))
        )
        assert np.array_equal(ours, theirs)


def test_one_step_a_window_is_the_order_without_sorting() -> None:
    order = make(np.arange(100, dtype=np.int32), sort_steps=1)
    for step in range(order.steps_per_epoch):
        assert np.array_equal(order.samples(2, step, 3), plain(order).samples(2, step, 3))


def test_sorting_pads_less_than_half_of_what_is_padded_without_it() -> None:
    lengths = np.random.default_rng(0).integers(3, 250, 5000).astype(np.int32)

    def wasted(order: LengthOrder) -> int:
        return sum(order.batch_count(step) * order.width(step) for step in range(order.steps_per_epoch)) - int(lengths.sum())

    assert wasted(make(lengths, sort_steps=32)) < wasted(make(lengths, sort_steps=1)) / 2


def test_short_texts_do_not_come_first_and_no_virtual_rank_gets_the_long_ones() -> None:
    lengths = np.random.default_rng(0).integers(3, 250, 4800).astype(np.int32)
    order = make(lengths, sort_steps=50)
    means = [np.mean([lengths[order.samples(0, step, rank)].mean() for rank in range(4)]) for step in range(order.steps_per_epoch)]
    by_rank = [np.mean([lengths[order.samples(0, step, rank)].mean() for step in range(order.steps_per_epoch)]) for rank in range(4)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    assert max(by_rank) - min(by_rank) < 3


def test_another_epoch_has_other_batches() -> None:
    order = make(np.random.default_rng(0).integers(3, 250, 500).astype(np.int32))
    assert not any(set(order.samples(0, step, 0)) == set(order.samples(1, step, 0)) for step in range(order.steps_per_epoch))


@given(st.integers(0, 5000))
def test_the_longest_texts_that_are_padded_to_no_more_than_so_many_tokens(most: int) -> None:
    fits = longest_padded_within(most)
    assert fits == 0 or padded(fits) <= most
    assert padded(fits + 1) > most


@given(st.integers(1, 5000))
def test_a_padded_length_holds_the_text_and_is_one_of_few(tokens: int) -> None:
    assert tokens <= padded(tokens) < tokens + max(8, tokens)
    assert padded(padded(tokens)) == padded(tokens)
    assert len({padded(each) for each in range(1, 513)}) == 24


def test_a_window_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.sort_steps=0 is not positive; use 1"):
        make(np.ones(5, np.int32), sort_steps=0)
