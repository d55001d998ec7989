"""Each sample exactly once an epoch, whoever asks and whenever; shuffled well, and locally where a window is set."""

import dataclasses
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.order import Order, blocks_of_virtual_ranks, spreads


def make(count: int = 1000, **changes: object) -> Order:
    values: dict[str, object] = {"seed": 1, "fingerprint": "f" * 64, "count": count, "batch_size": 12, "virtual_ranks": 4, **changes}
    return Order(**values)  # type: ignore[arg-type]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    virtual_ranks = draw(st.integers(1, 9))
    return make(
        count=draw(st.integers(1, 700) | st.sampled_from([511, 512, 513, 1023, 1024, 1025, 2049])),
        seed=draw(st.integers(0, 2**40)),
        virtual_ranks=virtual_ranks,
        batch_size=virtual_ranks * draw(st.integers(1, 60)),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 200, 512, 5000])),
        group=draw(st.sampled_from([1, 5, 16, 64, 512])),
        spread=draw(st.booleans()),
    )


def epoch_of(order: Order, epoch: int, steps: range | None = None) -> np.ndarray:
    steps = range(order.steps_per_epoch) if steps is None else steps
    parts = [order.samples(epoch, step, rank) for step in steps for rank in range(order.virtual_ranks)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 1000))
def test_every_sample_of_an_epoch_is_seen_exactly_once(order: Order, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(order.count))


@settings(max_examples=100, deadline=None)
@given(orders(), st.data())
def test_after_an_interruption_another_number_of_workers_sees_exactly_the_rest(order: Order, data: st.DataObject) -> None:
    stopped = data.draw(st.integers(0, order.steps_per_epoch))
    seen: list[np.ndarray] = []
    for steps in (range(stopped), range(stopped, order.steps_per_epoch)):
        workers = data.draw(st.integers(1, min(4, order.virtual_ranks)))
        for rank in range(workers):  # rank after rank: none needs to know what the others do
            carried = blocks_of_virtual_ranks(order.virtual_ranks, workers, rank)
            seen += [order.samples(3, step, virtual_rank) for step in steps for virtual_rank in carried]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.count))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("virtual_ranks", [4, 5, 7, 12])
def test_workers_carry_each_virtual_rank_once_in_contiguous_blocks_of_equal_size(workers: int, virtual_ranks: int) -> None:
    blocks = [blocks_of_virtual_ranks(virtual_ranks, workers, rank) for rank in range(workers)]
    assert [v for block in blocks for v in block] == list(range(virtual_ranks))
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


def test_more_workers_than_virtual_ranks_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"5 workers cannot share train\.virtual_ranks=4; use at most 4 workers"):
        blocks_of_virtual_ranks(4, 5, 0)


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 3), data=st.data())
def test_a_lane_is_its_steps_one_after_the_other(order: Order, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.steps_per_epoch - 1))
    steps = range(start, data.draw(st.integers(start + 1, order.steps_per_epoch)))
    for virtual_rank in range(order.virtual_ranks):
        lane = order.lane(epoch, steps, virtual_rank)
        assert [ids.tolist() for ids in lane] == [order.samples(epoch, step, virtual_rank).tolist() for step in steps]


@settings(max_examples=80, deadline=None)
@given(orders(), st.data())
def test_a_position_has_the_same_sample_however_it_is_asked_for(order: Order, data: st.DataObject) -> None:
    whole = order.at(5, np.arange(order.count))
    asked = data.draw(st.lists(st.integers(0, order.count - 1), max_size=20))
    assert order.at(5, np.array(asked, dtype=np.int64)).tolist() == whole[asked].tolist()


@settings(max_examples=80, deadline=None)
@given(orders())
def test_batch_count_is_the_number_of_samples_of_all_virtual_ranks(order: Order) -> None:
    for step in range(order.steps_per_epoch):
        sizes = [len(order.samples(0, step, rank)) for rank in range(order.virtual_ranks)]
        assert order.batch_count(step) == sum(sizes) > 0
        if step < order.steps_per_epoch - 1 and not order.spread:
            assert sizes == [order.batch_per_virtual_rank] * order.virtual_ranks
    assert order.steps_per_epoch == math.ceil(order.count / order.batch_size)


def sizes_of(order: Order) -> np.ndarray:
    """(steps of an epoch, virtual ranks): samples of each."""
    steps, ranks = range(order.steps_per_epoch), range(order.virtual_ranks)
    return np.array([[len(order.samples(0, step, rank)) for rank in ranks] for step in steps])


@settings(max_examples=60, deadline=None)
@given(orders(), st.data())
def test_a_remainder_that_is_spread_makes_batches_that_differ_by_one_sample_at_most(order: Order, data: st.DataObject) -> None:
    sizes = sizes_of(dataclasses.replace(order, spread=True))
    assert np.ptp(sizes) <= 1  # of all virtual ranks in all steps
    assert sizes.max() <= order.batch_per_virtual_rank
    assert np.ptp(sizes.sum(axis=1)) <= 1  # of the steps
    assert np.ptp(sizes.sum(axis=0)) <= 1  # of the lanes
    assert len(sizes) == order.steps_per_epoch  # as many steps: a schedule does not move
    if len(sizes) > 1 and order.batch_per_virtual_rank > 3:
        assert 2 * sizes.min() >= order.batch_per_virtual_rank - 1  # never a tiny batch
    first = data.draw(st.integers(0, order.virtual_ranks - 1))
    carried = range(first, data.draw(st.integers(first, order.virtual_ranks - 1)) + 1)
    spread = dataclasses.replace(order, spread=True)
    assert spread.batch_sizes(carried) == set(sizes[:, carried.start : carried.stop].sum(axis=1).tolist())
    assert order.batch_sizes(carried) >= set(sizes_of(order)[:-1, carried.start : carried.stop].sum(axis=1).tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 12), st.sampled_from([0, 64]))
def test_where_whole_batches_leave_nothing_spreading_changes_nothing(virtual_ranks: int, each: int, steps: int, window: int) -> None:
    count = virtual_ranks * each * steps
    order = make(count=count, batch_size=virtual_ranks * each, virtual_ranks=virtual_ranks, window=window, group=16)
    spread = dataclasses.replace(order, spread=True)
    for rank in range(virtual_ranks):
        pairs = zip(order.lane(4, range(steps), rank), spread.lane(4, range(steps), rank), strict=True)
        assert all(before.tolist() == now.tolist() for before, now in pairs)


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 700))
def test_a_remainder_is_to_be_spread_just_where_some_last_batch_would_be_under_half(virtual_ranks: int, each: int, count: int) -> None:
    order = make(count=count, batch_size=virtual_ranks * each, virtual_ranks=virtual_ranks)
    last = [len(order.samples(0, order.steps_per_epoch - 1, rank)) for rank in range(virtual_ranks)]
    wanted = order.steps_per_epoch > 1 and 2 * min(last) < each
    assert spreads(count=count, batch_size=order.batch_size, virtual_ranks=virtual_ranks) == wanted


@pytest.mark.parametrize("window", [0, 128])
def test_another_epoch_seed_or_data_set_is_another_order(window: int) -> None:
    first = epoch_of(make(window=window, group=32), 0)
    others = [
        epoch_of(make(window=window, group=32), 1),
        epoch_of(make(window=window, group=32, seed=2), 0),
        epoch_of(make(window=window, group=32, fingerprint="e" * 64), 0),
    ]
    for other in others:
        assert np.mean(first == other) < 0.02  # 1/1000 or, in windows, 1/128 where by chance equal


def test_the_order_is_the_one_that_earlier_versions_had() -> None:
    """A change here breaks the promise that a run resumes in the same order after an upgrade."""
    assert make(count=1000).samples(2, 3, 1).tolist() == PINNED["large"]
    assert make(count=100).samples(2, 3, 1).tolist() == PINNED["small"]
    assert make(count=1000, window=100, group=32).samples(2, 3, 1).tolist() == PINNED["window"]
    assert make(count=97, batch_size=32, virtual_ranks=1, spread=True).samples(2, 3, 0).tolist() == PINNED["spread"]


@pytest.mark.parametrize("window", [0, 16384])
def test_a_billion_samples_take_constant_memory(window: int) -> None:
    order = make(count=1_000_000_007, batch_size=2048, virtual_ranks=4, window=window, group=512, spread=True)
    order.samples(0, 0, 0)
    tracemalloc.start()
    ids = [order.samples(epoch, step, 3) for epoch in (0, 7) for step in (0, 1000, order.steps_per_epoch - 2)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 512 * 1024
    for batch in ids:
        assert len(np.unique(batch)) in (511, 512)
        assert 0 <= batch.min() <= batch.max() < order.count


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 3000), window=st.integers(1, 600), group=st.sampled_from([8, 32, 64]), virtual_ranks=st.integers(1, 4),
    batch=st.integers(1, 40),
)  # fmt: skip
def test_a_lane_reads_a_row_group_within_the_steps_of_one_window(
    count: int, window: int, group: int, virtual_ranks: int, batch: int
) -> None:
    order = make(count=count, window=window, group=group, virtual_ranks=virtual_ranks, batch_size=batch * virtual_ranks)
    window_samples = math.ceil(window / group) * group
    for rank in range(virtual_ranks):
        first: dict[int, int] = {}
        for step in range(order.steps_per_epoch):
            ids = order.samples(0, step, rank)
            for row_group in np.unique(ids // group).tolist():
                assert step - first.setdefault(row_group, step) <= window_samples / batch + 1
            # A batch reaches into windows before and after the ones it covers; the last, and the one with the short group, may be tiny.
            windows = batch / window_samples + 2 + 2
            assert len(np.unique(ids // group)) <= windows * math.ceil(window / group)


def test_a_window_is_shuffled_and_windows_come_in_another_order_each_epoch() -> None:
    order = make(count=4096, window=256, group=64, virtual_ranks=1, batch_size=256)
    starts = []
    for epoch in (0, 1):
        first = order.samples(epoch, 0, 0)
        groups = np.unique(first // 64)
        assert len(groups) == 4
        assert np.ptp(groups) > 4  # not neighbours in the files
        assert not np.array_equal(np.sort(first), first)
        starts.append(set(groups.tolist()))
    assert starts[0] != starts[1]


def chi2(observed: np.ndarray, expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_all_permutations_of_five_are_equally_likely() -> None:
    seen = Counter(tuple(make(count=5, seed=seed, batch_size=5, virtual_ranks=1).samples(0, 0, 0).tolist()) for seed in range(6000))
    assert len(seen) == 120
    assert chi2(np.array(list(seen.values())), 50) < 119 + 5 * math.sqrt(2 * 119)


@pytest.mark.parametrize("window", [0, 1000])
def test_large_permutations_look_random(window: int) -> None:
    count, seeds, bins = 6000, 3000, 50
    positions = np.array([0, 1, count - 1])
    at = np.array([make(count=count, seed=seed, window=window, group=40).at(0, positions) for seed in range(seeds)])  # (seeds, 3)
    limit = bins - 1 + 5 * math.sqrt(2 * (bins - 1))
    for column in range(3):
        assert chi2(np.bincount(at[:, column] * bins // count, minlength=bins), seeds / bins) < limit
    if window == 0:
        for a, b in ((0, 1), (0, 2)):
            assert chi2(np.bincount((at[:, a] - at[:, b]) % count * bins // count, minlength=bins), seeds / bins) < limit
        order = make(count=60_000).at(0, np.arange(60_000))
        for lag in (1, 2, 256):
            assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 5 / math.sqrt(60_000)
        assert (order == np.arange(60_000)).sum() < 8  # fixed points: one on average


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100, "virtual_ranks": 8}, r"data\.batch_size=100 is not a multiple of train\.virtual_ranks=8; use 96 or 104"),
        ({"batch_size": 3, "virtual_ranks": 8}, r"data\.batch_size=3 is not a multiple of train\.virtual_ranks=8; use 8"),
        ({"batch_size": 0, "virtual_ranks": 8}, r"data\.batch_size=0 .* use 8"),
        ({"virtual_ranks": 0}, r"train\.virtual_ranks=0 is not positive"),
        ({"window": -1}, r"data\.shuffle_window=-1 is negative"),
        ({"count": 0}, r"at least one training sample"),
    ],
)
def test_errors_name_the_value_and_the_fix(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)  # type: ignore[arg-type]


PINNED: dict[str, list[int]] = {
    "small": [23, 47, 64],
    "window": [313, 569, 318],
    "large": [34, 941, 378],
    "spread": [14, 62, 86, 59, 60, 75, 18, 42, 10, 38, 78, 96, 5, 68, 49, 21, 45, 89, 76, 6, 73, 44, 53, 25],
}
