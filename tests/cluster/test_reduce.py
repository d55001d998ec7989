"""The tree reduction: the same bits for any number of ranks, by real gloo processes and by the shape of the tree for every size."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from cluster.reduce import TreeReducer, block, fold, subtrees, tree_sum

SIZES = (1, 2, 7, 1000)
STEPS = 3
CASES = [(v, w) for v in (1, 2, 3, 4, 8) for w in (1, 2, 3, 4) if w <= v]


def vectors(virtual_ranks: int, size: int, step: int) -> np.ndarray:
    """(V, n) float32 with exponents so far apart that any other order of sums shows; after step 0 one virtual rank is empty."""
    generator = np.random.default_rng([virtual_ranks, size, step])
    values = generator.standard_normal((virtual_ranks, size)) * 2.0 ** generator.integers(-30, 30, (virtual_ranks, size))
    if step:
        values[step % virtual_ranks] = 0.0
    return values.astype(np.float32)


def reference(rows: np.ndarray) -> np.ndarray:
    """The definition: split at the largest power of two below the size."""
    if len(rows) == 1:
        return rows[0]
    middle = 1
    while middle * 2 < len(rows):
        middle *= 2
    total: np.ndarray = reference(rows[:middle]) + reference(rows[middle:])
    return total


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3, 4)}
    for virtual_ranks, world in CASES:
        if rank < world:
            reducer = TreeReducer(virtual_ranks, world, rank, groups[world])
            results = []
            for size in SIZES:
                for step in range(STEPS):
                    rows = torch.from_numpy(vectors(virtual_ranks, size, step))
                    for v in block(virtual_ranks, world, rank):
                        if v == step % virtual_ranks and step:
                            reducer.skip(v, rows[v])
                        else:
                            reducer.add(v, rows[v])
                    results.append(reducer.finish().clone().numpy())
            np.savez(f"{folder}/{virtual_ranks}-{world}-{rank}.npz", *results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four real processes computed, in every case."""
    path = tmp_path_factory.mktemp("reduce")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(rank_main, (str(path),), nprocs=4)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return path


@pytest.mark.parametrize(("virtual_ranks", "world"), CASES)
def test_the_sum_has_the_same_bits_for_any_number_of_ranks(folder: Path, virtual_ranks: int, world: int) -> None:
    wanted = [reference(vectors(virtual_ranks, size, step)) for size in SIZES for step in range(STEPS)]
    for rank in range(world):
        got = np.load(folder / f"{virtual_ranks}-{world}-{rank}.npz")
        assert len(got.files) == len(wanted)
        for name, want in zip(got.files, wanted, strict=True):
            assert got[name].tobytes() == want.tobytes()


def test_the_data_would_show_another_order() -> None:
    rows = vectors(8, 1000, 0)
    assert reference(rows).tobytes() != rows.sum(axis=0, dtype=np.float32).tobytes()
    assert reference(rows[:3]).tobytes() != (rows[0] + (rows[1] + rows[2])).tobytes()


def brackets(low: int, high: int) -> str:
    """The tree as text, from its definition."""
    if high - low == 1:
        return str(low)
    middle = 1
    while middle * 2 < high - low:
        middle *= 2
    return f"({brackets(low, low + middle)}+{brackets(low + middle, high)})"


def join(left: str, right: str) -> str:
    return f"({left}+{right})"


@given(data=st.data(), virtual_ranks=st.integers(1, 64))
def test_any_split_among_ranks_brackets_the_sum_alike(data: st.DataObject, virtual_ranks: int) -> None:
    world = data.draw(st.integers(1, virtual_ranks))
    carry: list[tuple[tuple[int, int], str]] = []
    for rank in range(world):
        carried = block(virtual_ranks, world, rank)
        local: list[tuple[tuple[int, int], str]] = []
        for v in carried:
            local.append(((v, v + 1), str(v)))
            fold(virtual_ranks, local, join)
        assert [node for node, _ in local] == subtrees(virtual_ranks, carried)
        assert len(local) <= max(1, 2 * virtual_ranks.bit_length())
        for part in local:
            carry.append(part)
            fold(virtual_ranks, carry, join)
    assert carry == [((0, virtual_ranks), brackets(0, virtual_ranks))]
    assert tree_sum([str(v) for v in range(virtual_ranks)], join) == brackets(0, virtual_ranks)


@given(virtual_ranks=st.integers(1, 100), data=st.data())
def test_blocks_cover_all_virtual_ranks_evenly(virtual_ranks: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, virtual_ranks))
    blocks = [block(virtual_ranks, world, rank) for rank in range(world)]
    assert [v for each in blocks for v in each] == list(range(virtual_ranks))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_more_workers_than_virtual_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"workers=5 .* train.virtual_ranks=4.* use at most 4 workers"):
        TreeReducer(4, 5, 0)


def test_one_virtual_rank_alone_is_handed_back_untouched() -> None:
    reducer, flat = TreeReducer(1, 1, 0), torch.randn(10)
    reducer.add(0, flat)
    assert reducer.finish() is flat


def test_added_vectors_are_not_changed_and_buffers_are_used_again() -> None:
    reducer = TreeReducer(8, 1, 0)
    rows = torch.from_numpy(vectors(8, 1000, 0))
    before, places = rows.clone(), []
    for _ in range(4):
        for v in range(8):
            reducer.add(v, rows[v])
        total = reducer.finish()
        places.append(total.data_ptr())
        assert total.numpy().tobytes() == reference(rows.numpy()).tobytes()
    assert torch.equal(rows, before)
    assert len(set(places)) <= 3
    assert len(reducer._free) == 3  # log2(8) buffers, for ever


def test_a_skipped_virtual_rank_is_a_vector_of_zeros_to_the_bit() -> None:
    rows = -torch.zeros(4, 5)  # -0.0 + 0.0 is 0.0, -0.0 + -0.0 is not
    for skipped in range(4):
        added, skipping = TreeReducer(4, 1, 0), TreeReducer(4, 1, 0)
        for v in range(4):
            added.add(v, torch.zeros(5) if v == skipped else rows[v])
            if v == skipped:
                skipping.skip(v, rows[v])
            else:
                skipping.add(v, rows[v])
        assert added.finish().numpy().tobytes() == skipping.finish().numpy().tobytes()


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([(1, torch.zeros(3))], "virtual rank 1 came when 0"),
        ([(0, torch.zeros(3, dtype=torch.float64))], "float32"),
        ([(0, torch.zeros(3, 1))], "flat"),
        ([(0, torch.zeros(3)), (1, torch.zeros(4))], "3 and of 4"),
    ],
)
def test_misuse_is_found_at_once(calls: list[tuple[int, Any]], said: str) -> None:
    reducer = TreeReducer(2, 1, 0)
    *good, (v, bad) = calls
    for each in good:
        reducer.add(*each)
    with pytest.raises(AssertionError, match=said):
        reducer.add(v, bad)


def test_a_forgotten_virtual_rank_is_found() -> None:
    reducer = TreeReducer(4, 1, 0)
    reducer.add(0, torch.zeros(2))
    with pytest.raises(AssertionError, match=r"1..3 were not added"):
        reducer.finish()
