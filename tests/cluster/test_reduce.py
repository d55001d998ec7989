"""The tree reduction: the same bits for any number of ranks, by real gloo processes and by the shape of the tree for every size."""

import itertools
import os
import random
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.reduce import TreeReducer, _cut, fold, subtrees, tree_sum
from dataio.order import blocks_of_virtual_ranks

PROJECT = Path(__file__).resolve().parents[2]
# Parts of a step: a scalar, odd sizes, nothing at all, a matrix, a channels_last kernel, more than a small bucket.
SHAPES = ((), (1,), (7,), (0,), (33, 3), (4, 3, 3, 3), (1000,))
BUCKETS = ((1, 1), (200, 64), (25 * 2**20, 2**20))  # (bucket_bytes, small_bucket_bytes): a bucket each, several, one
STEPS = 4
CASES = [(v, w) for v in (1, 2, 3, 4, 5, 7, 8) for w in (1, 2, 3, 4) if w <= v]


def blocks_of(virtual_ranks: int, world: int) -> list[range]:
    """As the trainer hands them in."""
    return [blocks_of_virtual_ranks(virtual_ranks, world, rank) for rank in range(world)]


def vectors(virtual_ranks: int, size: int, step: int) -> np.ndarray:
    """(V, n) float32 with exponents so far apart that any other order of sums shows; after step 0 one virtual rank is empty."""
    generator = np.random.default_rng([virtual_ranks, size, step])
    values = generator.standard_normal((virtual_ranks, size)) * 2.0 ** generator.integers(-30, 30, (virtual_ranks, size))
    if step:
        values[step % virtual_ranks] = 0.0
    return values.astype(np.float32)


def room(shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape)
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def parts(virtual_ranks: int, step: int) -> list[Tensor]:
    """Of each part (V, *shape), channels_last where the part is."""
    made = []
    for number, shape in enumerate(SHAPES):
        size = int(np.prod(shape))
        rows = torch.from_numpy(vectors(virtual_ranks, size, step + 100 * number)).view(virtual_ranks, *shape)
        if step % 2 == 0 and number == 4:  # a part that no virtual rank has in this step
            rows = torch.zeros_like(rows)
        made.append(rows)
    return made


def reference(rows: np.ndarray) -> np.ndarray:
    """The definition: split at the largest power of two below the size."""
    if len(rows) == 1:
        return rows[0]
    middle = 1
    while middle * 2 < len(rows):
        middle *= 2
    total: np.ndarray = reference(rows[:middle]) + reference(rows[middle:])
    return total


def reduce_steps(reducer: TreeReducer, virtual_ranks: int, random_order: random.Random) -> Iterator[list[Tensor]]:
    """The sums of each step. Parts come in an order of this rank's own; those of zeros do not come at all."""
    sums = reducer.lay_out([room(shape) for shape in SHAPES])
    for step in range(STEPS):
        rows = parts(virtual_ranks, step)
        for v in reducer.carried:
            reducer.begin(v)
            order = [number for number in range(len(SHAPES)) if rows[number][v].any()]
            random_order.shuffle(order)
            for number in order:
                value = rows[number][v].clone()
                reducer.put(number, value.to(memory_format=torch.channels_last) if number == 5 else value)
            reducer.end()
        reducer.finish()
        yield sums


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3, 4)}
    for virtual_ranks, world in CASES:
        for number, (large, small) in enumerate(BUCKETS):
            if rank < world:
                ticks = count()
                reducer = TreeReducer(
                    *(blocks_of(virtual_ranks, world), rank, groups[world]),
                    bucket_bytes=large,
                    small_bucket_bytes=small,
                    clock=lambda ticks=ticks: float(next(ticks)),  # type: ignore[misc]
                )
                shuffle = random.Random(f"{rank}/{virtual_ranks}/{world}/{number}")
                results = [[t.contiguous().numpy().copy() for t in sums] for sums in reduce_steps(reducer, virtual_ranks, shuffle)]
                # One wait a step, in finish(), if there is anyone to wait for: as this clock counts, each lasts 1.
                assert reducer.wait_seconds == (STEPS if world > 1 else 0)
                np.savez(f"{folder}/{virtual_ranks}-{world}-{number}-{rank}.npz", *[part for sums in results for part in sums])
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


@pytest.mark.parametrize("buckets", range(len(BUCKETS)))
@pytest.mark.parametrize(("virtual_ranks", "world"), CASES)
def test_the_sum_has_the_same_bits_for_any_number_of_ranks_and_any_buckets(
    folder: Path, virtual_ranks: int, world: int, buckets: int
) -> None:
    wanted = [reference(rows.numpy()) for step in range(STEPS) for rows in parts(virtual_ranks, step)]
    for rank in range(world):
        got = np.load(folder / f"{virtual_ranks}-{world}-{buckets}-{rank}.npz")
        assert len(got.files) == len(wanted) == STEPS * len(SHAPES)
        for name, want in zip(got.files, wanted, strict=True):
            assert got[name].shape == want.shape
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


@st.composite
def splits(draw: st.DrawFn) -> list[range]:
    """Any way to cut 1 to 64 virtual ranks into blocks, however uneven."""
    virtual_ranks = draw(st.integers(1, 64))
    cuts = sorted({0, virtual_ranks, *draw(st.lists(st.integers(0, virtual_ranks), max_size=20))})
    return [range(low, high) for low, high in itertools.pairwise(cuts)]


@given(blocks=splits())
def test_any_split_among_ranks_brackets_the_sum_alike(blocks: list[range]) -> None:
    virtual_ranks = blocks[-1].stop
    carry: list[tuple[tuple[int, int], str]] = []
    for carried in blocks:
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


@given(blocks=splits(), data=st.data())
def test_a_rank_carries_the_block_that_it_is_handed(blocks: list[range], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(blocks) - 1))
    assert TreeReducer(blocks, rank).carried == blocks[rank]


@pytest.mark.parametrize(
    "blocks", [[range(2), range(3, 4)], [range(2), range(1, 4)], [range(2), range(2, 2), range(2, 4)], [range(2, 4), range(2)]]
)
def test_blocks_that_are_not_all_virtual_ranks_once_in_order_are_our_mistake(blocks: list[range]) -> None:
    with pytest.raises(AssertionError, match="virtual rank"):
        TreeReducer(blocks, 0)


def in_one_process(virtual_ranks: int, **changes: Any) -> TreeReducer:
    return TreeReducer([range(virtual_ranks)], 0, **changes)


@given(virtual_ranks=st.integers(1, 40), seed=st.integers(0, 2**32), data=st.data())
def test_values_are_not_changed_and_the_sums_stay_in_one_place(virtual_ranks: int, seed: int, data: st.DataObject) -> None:
    large, small = data.draw(st.tuples(st.integers(1, 8000), st.integers(1, 8000)))
    reducer = in_one_process(virtual_ranks, bucket_bytes=large, small_bucket_bytes=small)
    rows = parts(virtual_ranks, 1)
    before = [part.clone() for part in rows]
    places = set()
    for sums in reduce_steps(reducer, virtual_ranks, random.Random(seed)):
        places.add(tuple(total.data_ptr() for total in sums))
        assert [total.stride() for total in sums] == [room(shape).stride() for shape in SHAPES]
    assert len(places) == 1
    assert all(torch.equal(part, old) for part, old in zip(rows, before, strict=True))
    assert reducer._layout is not None
    assert (
        len(reducer._layout.flats[torch.float32]) <= 1 + (virtual_ranks - 1).bit_length()
    )  # log2(V) subtrees wait for their siblings at most


@given(blocks=splits(), data=st.data())
def test_a_rank_keeps_as_many_vectors_as_it_has_subtrees_or_waiting_siblings(blocks: list[range], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(blocks) - 1))
    carried, virtual_ranks = blocks[rank], blocks[-1].stop
    reducer = TreeReducer(blocks, rank)
    reducer.lay_out([torch.zeros(3)])
    most, carry = 0, []
    for v in carried:
        carry.append(((v, v + 1), ""))
        is_leaf_of_its_own = len(carry)
        fold(virtual_ranks, carry, join)
        most = max(most, is_leaf_of_its_own if len(carry) == is_leaf_of_its_own else is_leaf_of_its_own - 1)
    assert reducer._layout is not None
    assert len(reducer._layout.flats[torch.float32]) == most
    if virtual_ranks == len(blocks):
        assert most == 1


def test_the_vector_holds_the_sums_and_zeros_between_them() -> None:
    reducer = in_one_process(3)
    for sums in reduce_steps(reducer, 3, random.Random(0)):
        assert reducer._layout is not None
        flat = reducer._layout.flats[torch.float32][0]
        inside = torch.zeros_like(flat, dtype=torch.bool)
        for total in sums:
            assert total.numel() == 0 or total.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            inside[total.storage_offset() : total.storage_offset() + total.numel()] = True
        assert int(inside.sum()) == sum(int(np.prod(shape)) for shape in SHAPES)
        assert not flat[~inside].any()


def test_a_part_that_does_not_come_is_zeros_to_the_bit() -> None:
    negative = torch.full((5,), -0.0)  # -0.0 + 0.0 is 0.0, -0.0 + -0.0 is not
    for missing in range(4):
        totals = []
        for comes in (True, False):
            reducer = in_one_process(4)
            reducer.lay_out([torch.zeros(5), torch.zeros(2)])
            for v in range(4):
                reducer.begin(v)
                if v != missing or comes:
                    reducer.put(0, torch.zeros(5) if v == missing else negative)
                reducer.end()
            totals.append(reducer.finish().numpy().tobytes())
        assert totals[0] == totals[1]


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=40), limit=st.integers(1, 200), small=st.integers(1, 200))
def test_buckets_hold_each_part_once_in_order_and_the_first_and_last_are_small(sizes: list[int], limit: int, small: int) -> None:
    buckets = _cut(sizes, limit, small)
    assert [part for bucket in buckets for part in bucket] == list(range(len(sizes)))
    assert all(len(bucket) for bucket in buckets)
    held = [[sizes[part] for part in bucket] for bucket in buckets]
    assert sum(held[0][:-1]) < small or sum(held[0]) <= small
    assert all(sum(bucket[:-1]) < limit for bucket in held[1:-1])
    if len(buckets) > 1:
        # As small as the first could be and still be worth a message: the last is never more, unless it is one part.
        assert sum(held[-1]) <= small or sum(held[-1][:-1]) < max(limit, small)
        assert sum(held[-1]) <= small or sizes[-1] > small


def opened(*parts: Tensor) -> TreeReducer:
    reducer = in_one_process(2)
    reducer.lay_out(parts)
    reducer.begin(0)
    return reducer


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (lambda: in_one_process(2).begin(0), "lay_out"),
        (lambda: in_one_process(2).lay_out([]), "nothing to add up"),
        (
            lambda: in_one_process(2).lay_out([torch.zeros(3), torch.zeros(3, dtype=torch.float64)]),
            "expected float32 on cpu, got torch.float64",
        ),
        (lambda: opened(torch.zeros(3)).lay_out([torch.zeros(3)]), "laid out before"),
        (lambda: opened(torch.zeros(3)).begin(1), "virtual rank before"),
        (lambda: opened(torch.zeros(3)).finish(), "end"),
        (lambda: opened(torch.zeros(3)).put(0, torch.zeros(4)), r"part 0 is torch.float32 \(4,\)"),
        (lambda: opened(torch.zeros(3)).put(0, torch.zeros(3, dtype=torch.bfloat16)), "part 0 is torch.bfloat16"),
    ],
)
def test_misuse_is_found_at_once(misuse: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        misuse()


@pytest.mark.parametrize("others", [0, 1])  # whether the part's bucket was complete
def test_a_part_that_comes_twice_is_found(others: int) -> None:
    reducer = opened(torch.zeros(3), *[torch.zeros(2)] * others)
    reducer.put(0, torch.ones(3))
    with pytest.raises(AssertionError, match="part 0 came twice"):
        reducer.put(0, torch.ones(3))


def test_a_forgotten_virtual_rank_is_found() -> None:
    reducer = in_one_process(4)
    reducer.lay_out([torch.zeros(2)])
    reducer.begin(0)
    reducer.end()
    with pytest.raises(AssertionError, match="virtual rank 2 came when 1"):
        reducer.begin(2)
    with pytest.raises(AssertionError, match=r"1..3 were not added"):
        reducer.finish()


RANK_THAT_LOSES_ITS_PEER = """
    import sys, torch, torch.distributed as dist
    from cluster.reduce import TreeReducer

    rank, folder, story = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/{story}", rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        if story == "dies":
            sys.exit(0)
        sys.stdin.read()  # lives, and never answers, until the test lets it go
        sys.exit(0)
    reducer = TreeReducer([range(1), range(1, 2)], 0)
    reducer.lay_out([torch.zeros(100), torch.zeros(100)])
    reducer.begin(0)
    reducer.put(0, torch.ones(100))
    reducer.end()
    if story == "never answers":
        raise ValueError("of this rank's own, while the exchange is under way")
    for _ in range(2):
        try:
            reducer.finish()
        except RuntimeError as error:
            print("finish:", type(error).__name__, flush=True)
        reducer.begin(0)
        reducer.end()
"""


def start_rank(rank: int, folder: Path, story: str, script: str = RANK_THAT_LOSES_ITS_PEER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(rank), str(folder), story],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_peer_that_dies_is_an_error_in_finish_and_in_every_later_one(tmp_path: Path) -> None:
    ranks = [start_rank(rank, tmp_path, "dies") for rank in range(2)]
    said, errors = ranks[0].communicate(timeout=120)
    assert said.splitlines() == ["finish: RuntimeError"] * 2, errors
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


RANK_THAT_MAY_BE_LATE = """
    import sys, threading, torch, torch.distributed as dist
    from cluster.reduce import TreeReducer

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=2)
    reducer = TreeReducer([range(1), range(1, 2)], rank)
    reducer.lay_out([torch.zeros(100)])
    reducer.begin(rank)
    if rank == 1:
        sys.stdin.readline()
    reducer.put(0, torch.ones(100))
    reducer.end()
    exchanged = threading.Event()
    def caller():
        reducer.finish(exchanged.set)
    thread = threading.Thread(target=caller)
    thread.start()
    print("waits" if not exchanged.wait(0.3) else "has all", flush=True)
    if rank == 0:
        print("has all" if exchanged.wait(60) else "waits", flush=True)
    thread.join()
    dist.barrier()
"""


def test_a_rank_knows_when_it_waits_for_no_other_any_more(tmp_path: Path) -> None:
    """Else a hang could not be told from the wait for one that hangs."""
    ranks = [start_rank(rank, tmp_path, "", script=RANK_THAT_MAY_BE_LATE) for rank in range(2)]
    assert ranks[0].stdout is not None
    assert ranks[0].stdout.readline() == "waits\n"
    said = [ranks[1].communicate("go\n", timeout=120), ranks[0].communicate(timeout=120)]
    assert [out for out, _ in said] == ["has all\n", "has all\n"], said


def test_a_rank_that_fails_ends_although_its_exchange_waits_for_a_peer_that_never_answers(tmp_path: Path) -> None:
    ranks = [start_rank(rank, tmp_path, "never answers") for rank in range(2)]
    try:
        _, errors = ranks[0].communicate(timeout=120)
        assert ranks[1].poll() is None
        assert "ValueError: of this rank's own" in errors
        assert ranks[0].returncode != 0  # 1, or an abort where torch's own threads find the interpreter gone
    finally:
        ranks[1].communicate(timeout=120)


# --- half the bytes -------------------------------------------------------------------------------------------------------------------


class Mailbox:
    """Carries what ranks of one process send each other, in order, and counts the bytes."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], SimpleQueue[Tensor]] = defaultdict(SimpleQueue)
        self.sent_bytes = 0

    def swap_of(self, rank: int) -> Any:
        def swap(receive: list[tuple[int, Tensor]], send: list[tuple[int, Tensor]]) -> None:
            for peer, tensor in send:
                self.sent_bytes += tensor.numel() * tensor.itemsize
                self.queues[rank, peer].put(tensor.clone())
            for peer, tensor in receive:
                value = self.queues[peer, rank].get(timeout=60)
                assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
                tensor.copy_(value)

        return swap


def reduced_by(world: int, rows: list[Tensor], *, exact: int, wire: torch.dtype, **buckets: int) -> tuple[list[list[Tensor]], int]:
    """(each rank's sums of `rows`, each (V, *shape); the bytes that all ranks sent). Two steps: buffers are used again."""
    virtual_ranks, mailbox = len(rows[0]), Mailbox()
    reducers = [TreeReducer(blocks_of(virtual_ranks, world), rank, wire=wire, **buckets) for rank in range(world)]
    sums = []
    for rank, reducer in enumerate(reducers):
        reducer._swap = mailbox.swap_of(rank)  # type: ignore[method-assign]
        sums.append(reducer.lay_out([torch.empty_like(part[0]) for part in rows], exact=exact))
    for _ in range(2):
        mailbox.sent_bytes = 0
        for reducer in reducers:
            for v in reducer.carried:
                reducer.begin(v)
                for number, part in enumerate(rows):
                    if part[v].any():
                        reducer.put(number, part[v])
                reducer.end()
        for reducer in reducers:
            reducer.finish()
    return sums, mailbox.sent_bytes


def rounded_tree(rows: Tensor) -> Tensor:
    """The definition, (V, *shape) float32: every node of the tree is rounded to bf16."""
    return tree_sum([row.bfloat16().float() for row in rows], lambda left, right: (left + right).bfloat16().float())


@given(
    virtual_ranks=st.integers(1, 9),
    seed=st.integers(0, 1000),
    exact=st.integers(0, len(SHAPES)),
    limits=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    empty=st.booleans(),
)
def test_in_bf16_every_node_is_rounded_whoever_sends_it_so_that_any_number_of_ranks_agrees(
    virtual_ranks: int, seed: int, exact: int, limits: tuple[int, int], empty: bool
) -> None:
    rows = [part.clone() for part in parts(virtual_ranks, seed if empty else 0)]
    wanted = [torch.from_numpy(np.asarray(reference(part.numpy()))) for part in rows[:exact]] + [rounded_tree(p) for p in rows[exact:]]
    for world in range(1, min(4, virtual_ranks) + 1):
        sums, _ = reduced_by(world, rows, exact=exact, wire=torch.bfloat16, bucket_bytes=max(limits), small_bucket_bytes=min(limits))
        for own in sums:
            for got, want in zip(own, wanted, strict=True):
                assert got.dtype == torch.float32
                assert got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes()


@pytest.mark.parametrize(("virtual_ranks", "world"), [(2, 2), (4, 2), (4, 3), (4, 4), (7, 3)])
def test_in_bf16_half_the_bytes_travel(virtual_ranks: int, world: int) -> None:
    rows = [torch.ones(virtual_ranks, 48 * 1024), torch.ones(virtual_ranks, 96 * 1024)]  # no room between parts or chunks: W divides them
    whole = reduced_by(world, rows, exact=0, wire=torch.float32)[1]
    assert reduced_by(world, rows, exact=0, wire=torch.bfloat16)[1] * 2 == whole
    # Of the first part, a third of all, nothing is saved.
    assert reduced_by(world, rows, exact=1, wire=torch.bfloat16)[1] * 3 == whole * 2


def test_in_bf16_real_processes_agree_with_one(tmp_path: Path) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(bf16_rank, (str(tmp_path),), nprocs=2)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    rows = [part.clone() for part in parts(3, 0)]
    wanted = reduced_by(1, rows, exact=2, wire=torch.bfloat16)[0][0]
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def bf16_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = [part.clone() for part in parts(3, 0)]
    reducer = TreeReducer(blocks_of(3, 2), rank, wire=torch.bfloat16, bucket_bytes=200, small_bucket_bytes=64)
    sums = reducer.lay_out([torch.empty_like(part[0]) for part in rows], exact=2)
    for v in reducer.carried:
        reducer.begin(v)
        for number, part in enumerate(rows):
            reducer.put(number, part[v])
        reducer.end()
    reducer.finish()
    torch.save([total.clone() for total in sums], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_no_other_type_travels() -> None:
    with pytest.raises(AssertionError, match=r"float32 or bfloat16, not torch\.float16"):
        in_one_process(2, wire=torch.float16)
