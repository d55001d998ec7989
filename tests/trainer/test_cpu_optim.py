"""The optimisers in blocks: PyTorch's own to the bit, whatever the shapes, the memory orders and the number of threads."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.learn import cpu_optim as blocked
from trainer.learn.cpu_optim import CpuAdamW, CpuSGD
from trainer.learn.state import TrainState


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensor_like(shape: tuple[int, ...], layout: torch.memory_format, generator: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=generator)
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 5000)),
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=4,
)
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shapes=SHAPES,
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
    block=st.sampled_from([64, 1 << 12, 1 << 17]),
    decay=st.sampled_from([0.0, 0.05]),
    kind=st.sampled_from(["sgd", "momentum", "nesterov", "adamw"]),
)
def test_weights_and_state_are_pytorchs_to_the_bit(
    data: st.DataObject, shapes: list[tuple[int, ...]], seed: int, threads: int, block: int, decay: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layouts = [(data.draw(LAYOUTS), data.draw(LAYOUTS)) for _ in shapes]
    start = [tensor_like(shape, own, generator) for shape, (own, _) in zip(shapes, layouts, strict=True)]
    mine, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    ours: torch.optim.Optimizer
    reference: torch.optim.Optimizer
    if kind == "adamw":
        ours = CpuAdamW([{"params": mine, "weight_decay": decay}], lr=0.01, betas=(0.8, 0.999))
        reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.999), weight_decay=decay)
    else:
        more: dict[str, Any] = {"momentum": 0.0 if kind == "sgd" else 0.9, "nesterov": kind == "nesterov"}
        ours = CpuSGD([{"params": mine, "weight_decay": decay}], lr=0.1, **more)
        reference = torch.optim.SGD(theirs, lr=0.1, weight_decay=decay, **more)
    before = blocked.BLOCK_ELEMENTS
    blocked.BLOCK_ELEMENTS = block
    try:
        torch.set_num_threads(threads)
        for step in range(3):
            for a, b, shape, (_, layout) in zip(mine, theirs, shapes, layouts, strict=True):
                gradient = tensor_like(shape, layout, generator)
                skipped = step == 0 and seed % 3 == 0  # a parameter that thaws later
                a.grad, b.grad = (None, None) if skipped else (gradient.clone(), gradient.clone())
            ours.step()
            reference.step()
    finally:
        blocked.BLOCK_ELEMENTS = before
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert list(ours.state[a]) == [slot for slot, value in reference.state[b].items() if value is not None]
        for slot, value in ours.state[a].items():
            assert torch.equal(value, reference.state[b][slot]), slot
            assert value.shape != a.shape or value.stride() == a.stride(), slot  # PyTorch's first momentum lies as the gradient does


@settings(max_examples=30, deadline=None)
@given(bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), place=st.integers(0, 399_999), adamw=st.booleans())
def test_the_sum_of_gradients_is_finite_exactly_if_every_gradient_is(bad: float, place: int, adamw: bool) -> None:
    parameter = nn.Parameter(torch.zeros(400_000))  # some blocks, the last one not full
    optimizer = CpuAdamW([parameter], lr=0.1, betas=(0.9, 0.999)) if adamw else CpuSGD([parameter], lr=0.1, momentum=0.9, nesterov=False)
    parameter.grad = torch.ones(400_000)
    optimizer.step()
    assert optimizer.gradient_sum is None  # nobody asked
    optimizer.add_up_gradients()
    optimizer.step()
    assert optimizer.gradient_sum is not None
    assert optimizer.gradient_sum.item() == pytest.approx(400_000)
    parameter.grad[place] = bad
    optimizer.step()
    assert math.isfinite(optimizer.gradient_sum.item()) == math.isfinite(bad)


def test_state_that_was_loaded_is_used_though_its_tensors_are_new() -> None:
    """The cuts of the step before must not be written to: they are of the tensors that were replaced."""

    def made() -> tuple[nn.Module, CpuSGD]:
        model = nn.Linear(700, 700)
        return model, CpuSGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=False)

    def step(model: nn.Module, optimizer: CpuSGD, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    model, optimizer = made()
    state = TrainState(model, optimizer)
    step(model, optimizer, 0)
    snapshot = state.snapshot({})
    files = {name: b"".join(map(bytes, parts)) for name, parts in snapshot.files().items()}
    snapshot.release()
    step(model, optimizer, 1)
    wanted = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, 2)
    state.load(files.__getitem__)
    step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(wanted, model.parameters(), strict=True))


def test_state_of_pytorchs_own_optimiser_is_taken_up_and_given_back() -> None:
    model = nn.Linear(3, 2)
    theirs = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    ours = TrainState(model, CpuSGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=False))
    for writer, reader in ((theirs, ours), (ours, theirs)):
        snapshot = writer.snapshot({})
        files = {name: b"".join(map(bytes, parts)) for name, parts in snapshot.files().items()}
        snapshot.release()
        reader.load(files.__getitem__)
