"""Weights compared across ranks: any flipped bit is found at the next check, by real gloo processes, and the rank is named."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.failures import BadNumbers, WeightsDiffer
from cluster.verify import WeightsCheck, WeightsHash, judge

SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((64, 128, 3, 3), torch.float32),  # large and dense: read where it is
    ((64, 128, 3, 3), torch.float32),  # the same in channels_last
    ((129, 257), torch.float32),  # large, and not a whole number of words
    ((8,), torch.float32),
    ((), torch.int64),
    ((3, 5), torch.bfloat16),
    ((7,), torch.uint8),
    ((300, 200), torch.float32),  # transposed: neither kind of dense
    ((1,), torch.float64),
]


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in SHAPES:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        made.append((tensor * 50).to(dtype) if dtype in (torch.int64, torch.uint8) else tensor.to(dtype))
    made[1] = made[1].to(memory_format=torch.channels_last)
    made[7] = made[7].t()
    return made


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """One bit of the `element`-th element, in place; what is stored stays the same otherwise."""
    index = np.unravel_index(element % tensor.numel(), tuple(tensor.shape)) if tensor.dim() else ()
    value = tensor[tuple(int(i) for i in index)].clone().view(1)
    raw = value.view(torch.uint8)
    bit %= 8 * tensor.element_size()
    raw[bit // 8] ^= 1 << (bit % 8)
    tensor[tuple(int(i) for i in index)] = value[0]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ONCE = tensors()
PRINT = WeightsHash(ONCE)
CLEAN = int(PRINT.hash())


def test_equal_tensors_have_equal_hashes_wherever_they_are() -> None:
    assert int(WeightsHash(tensors()).hash()) == CLEAN
    assert int(WeightsHash(tensors(seed=1)).hash()) != CLEAN


@settings(max_examples=200)
@given(which=st.integers(0, len(SHAPES) - 1), element=st.integers(0, 2**20), bit=st.integers(0, 63))
def test_any_flipped_bit_changes_the_hash_and_flipping_it_back_restores_it(which: int, element: int, bit: int) -> None:
    flip(ONCE[which], element, bit)
    assert int(PRINT.hash()) != CLEAN
    flip(ONCE[which], element, bit)
    assert int(PRINT.hash()) == CLEAN


@given(st.permutations(range(3)), st.integers(1, 63))
def test_the_order_counts_within_a_tensor_and_between_tensors(order: list[int], shift: int) -> None:
    same = [torch.randn(64, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    clean = int(WeightsHash(same).hash())
    assert (int(WeightsHash([same[i] for i in order]).hash()) == clean) == (order == [0, 1, 2])
    rolled = [same[0].roll(shift, 0), *same[1:]]
    assert int(WeightsHash(rolled).hash()) != clean


def test_a_nan_that_is_not_a_number_to_compare_is_still_a_bit_pattern() -> None:
    plain, other = torch.full((5,), float("nan")), torch.full((5,), float("nan"))
    assert int(WeightsHash([plain]).hash()) == int(WeightsHash([other]).hash())
    flip(other, 3, 0)  # another NaN
    assert int(WeightsHash([plain]).hash()) != int(WeightsHash([other]).hash())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 3, 5, 7, 8])
def test_numbers_that_are_not_finite_are_found_anywhere(which: int, value: float) -> None:
    own = tensors()
    assert bool(WeightsHash(own).is_finite())
    own[which][tuple(size - 1 for size in own[which].shape)] = value
    assert not bool(WeightsHash(own).is_finite())


# --- the verdict ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7))
def test_ranks_outside_a_strict_majority_are_named_and_all_where_there_is_none(hashes: list[int]) -> None:
    value, count = Counter(hashes).most_common(1)[0]
    if len(set(hashes)) == 1:
        judge(10, hashes, [True] * len(hashes))
        return
    with pytest.raises(WeightsDiffer) as caught:
        judge(10, hashes, [True] * len(hashes))
    everybody = tuple(range(len(hashes)))
    wanted = tuple(rank for rank in everybody if hashes[rank] != value) if 2 * count > len(hashes) else everybody
    assert (caught.value.steps_done, caught.value.ranks, caught.value.hashes) == (10, wanted, tuple(hashes))


def test_weights_that_are_not_finite_anywhere_blame_the_step_before() -> None:
    with pytest.raises(BadNumbers, match="step 9: after 10 steps the weights or statistics hold NaN or infinity"):
        judge(10, [5, 5], [True, False])


def test_a_rank_alone_still_finds_infinity() -> None:
    own = tensors()
    check = WeightsCheck(own, world_size=1)
    check.start(1).wait()
    check.poll()
    assert check.verified_steps == 1
    own[0].view(-1)[5] = float("inf")
    check.start(2)
    with pytest.raises(BadNumbers, match="step 1: after 2 steps"):
        check.poll(wait=True)
    assert check.verified_steps == 1


# --- several real processes -------------------------------------------------------------------------------------------------------------

FLIPS = 60
WORLDS = (2, 3)


def flips_of(world: int) -> list[tuple[int, int, int, int]]:
    """(rank, tensor, element, bit), the same list in all processes."""
    generator = np.random.default_rng(world)
    return [
        (int(generator.integers(world)), int(generator.integers(len(SHAPES))), int(generator.integers(2**20)), int(generator.integers(64)))
        for _ in range(FLIPS)
    ]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    results: dict[str, Any] = {}
    for world in WORLDS:
        if rank >= world:
            continue
        own, loss = tensors(), torch.zeros(1)
        check = WeightsCheck(own, world_size=world, group=groups[world])
        found = []
        for number, (who, which, element, bit) in enumerate(flips_of(world)):
            clean = check.start(2 * number)
            assert check.start(2 * number) is clean
            dist.all_reduce(loss, group=groups[world])  # a step's own collective, while the check is on its way
            if (rank + number) % 2:  # one rank has its verdict by now and another does not: they start no different number of checks
                clean.wait()
                check.poll()
            assert check.start(2 * number) is clean
            clean.wait()
            check.poll(wait=True)
            assert check.verified_steps == 2 * number
            assert check.start(2 * number) is clean
            if rank == who:
                flip(own[which], element, bit)
            verdict = check.start(2 * number + 1)
            dist.all_reduce(loss, group=groups[world])
            if rank == who:
                flip(own[which], element, bit)  # changed after the check began: it must not matter
            try:
                check.poll(wait=True)
            except WeightsDiffer as error:
                found.append((error.steps_done, error.ranks))
            try:
                verdict.wait()  # the checkpoint's thread asks too
            except WeightsDiffer as error:
                found.append((error.steps_done, error.ranks))
        results[f"found {world}"] = found
        if rank == 1:
            own[0].view(-1)[7] = float("nan")
        check.start(1000)
        try:
            check.poll(wait=True)
        except (WeightsDiffer, BadNumbers) as error:
            results[f"nan on one {world}"] = str(error)
        own[0].view(-1)[7] = float("nan")
        check.start(1001)
        try:
            check.poll(wait=True)
        except (WeightsDiffer, BadNumbers) as error:
            results[f"nan on all {world}"] = str(error)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three real processes found."""
    folder: Path = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(rank_main, (str(folder),), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("world", WORLDS)
def test_any_bit_flipped_on_one_rank_is_found_at_the_next_check_by_all_ranks(ranks: list[dict[str, Any]], world: int) -> None:
    wanted = []
    for number, (who, *_) in enumerate(flips_of(world)):
        wanted += [(2 * number + 1, (who,) if world > 2 else (0, 1))] * 2
    for rank in range(world):
        assert ranks[rank][f"found {world}"] == wanted


@pytest.mark.parametrize("world", WORLDS)
def test_infinity_on_one_rank_is_a_rank_that_differs_and_on_all_a_bad_step(ranks: list[dict[str, Any]], world: int) -> None:
    for rank in range(world):
        assert ranks[rank][f"nan on one {world}"].startswith("after 1000 steps the weights of rank")
        assert ranks[rank][f"nan on all {world}"].startswith("step 1000: after 1001 steps")
