"""A snapshot is the state to the bit, in files that anybody's safetensors reads; what does not fit is refused untouched."""

import contextlib
import itertools
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.learn.ema import Ema
from trainer.learn.optim import build_optimizer, set_learning_rate, set_trainable
from trainer.learn.state import EMA_FILE, MODEL_FILE, OPTIMIZER_FILE, Snapshot, StateError, TrainState, read_metadata, weights_sha256
from trainer.settings.tree import OptimConfig
from trainer.tasks.losses import cross_entropy_sum

HEAD = "3"


class Run:
    """A small training run: everything of it depends on the step's number and on `state`."""

    def __init__(self, seed: int = 0, *, ema: float = 0.0, freeze: Any = "none", device: str = "cpu", width: int = 4, **optim: Any) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(4 * width, 5))
        self.model = model.to(device, memory_format=torch.channels_last)
        self.device, self.freeze = device, freeze
        self.config = OptimConfig(lr=0.1, **optim)
        self.optimizer = build_optimizer(self.model, self.config, HEAD)
        self.ema = Ema(self.model, ema) if ema else None
        self.state = TrainState(self.model, self.optimizer, self.ema)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            set_trainable(self.model, self.freeze, step // 2, lp_epochs=1, head_name=HEAD)
            set_learning_rate(self.optimizer, self.config, step, 20)
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 3, 4, 4, generator=generator).to(self.device)
            labels = torch.randint(0, 5, (8,), generator=generator).to(self.device)
            self.optimizer.zero_grad()
            cross_entropy_sum(self.model(images), labels).backward()
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()

    def bytes(self) -> dict[str, bytes]:
        snapshot = self.state.snapshot()
        files = joined(snapshot)
        snapshot.release()
        return files


def joined(snapshot: Snapshot) -> dict[str, bytes]:
    return {name: b"".join(buffers) for name, buffers in snapshot.files().items()}


RUNS: list[dict[str, Any]] = [
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "ema": 0.9},
    {"momentum": 0.0},
    {"name": "adamw"},
    {"name": "adamw", "ema": 0.5, "freeze": "lp-ft"},
    {"momentum": 0.9, "freeze": "backbone"},
]


@pytest.mark.parametrize("fields", RUNS, ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 3), (1, 4), (3, 2)])
def test_a_resumed_run_ends_in_the_bits_of_one_that_was_not_interrupted(fields: dict[str, Any], before: int, after: int) -> None:
    straight = Run(**fields)
    straight.train(0, before)
    snapshot = straight.state.snapshot({"step": before})
    straight.train(before, before + after)
    files = joined(snapshot)  # read after the steps: the buffers are the snapshot's own
    resumed = Run(seed=9, **fields)
    if before:
        resumed.train(5, 6)  # into a state that is not fresh
    assert resumed.state.load(files.__getitem__) == {"step": before}
    resumed.train(before, before + after)
    assert resumed.bytes() == straight.bytes()
    assert weights_sha256(resumed.model) == weights_sha256(straight.model)


def test_files_are_safetensors_of_the_states_tensors() -> None:
    run = Run(ema=0.9, name="adamw")
    run.train(0, 2)
    files = run.bytes()
    assert list(files) == [MODEL_FILE, OPTIMIZER_FILE, EMA_FILE]
    model, optimizer, ema = (safetensors.torch.load(files[name]) for name in files)
    assert model.keys() == run.model.state_dict().keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in run.model.state_dict().items())
    assert len(optimizer) == 3 * len(list(run.model.parameters()))
    assert torch.equal(optimizer["0.weight/exp_avg"], run.optimizer.state[run.model[0].weight]["exp_avg"])
    assert float(optimizer["0.weight/step"]) == 2
    assert run.ema is not None
    assert all(torch.equal(ema[name], tensor) for name, tensor in run.ema.weights().items())
    assert int(ema["ema_updates"]) == 2


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


class Bag(nn.Module):
    """Any tensors, as buffers."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"t{index}", tensor)
        self.weight = nn.Parameter(torch.zeros(1))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=8),
    scalars=st.dictionaries(
        st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.none(), st.lists(st.booleans(), max_size=3)), max_size=3
    ),
    seed=st.integers(0, 99),
)
def test_any_tensors_and_scalars_round_trip_through_our_bytes_and_the_librarys_reader(
    shapes: list[tuple[torch.dtype, list[int]]], scalars: dict[str, Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def bag(fill: bool) -> Bag:
        tensors = []
        for dtype, shape in shapes:
            tensor = (torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator) * fill).to(dtype)
            tensors.append(tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor)
        return Bag(tensors)

    model, fresh = bag(True), bag(False)
    files = joined(TrainState(model, torch.optim.SGD(model.parameters())).snapshot(scalars))
    read = safetensors.torch.load(files[MODEL_FILE])
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape, raw(read[name])) == (tensor.dtype, tensor.shape, raw(tensor))
    assert TrainState(fresh, torch.optim.SGD(fresh.parameters())).load(files.__getitem__) == scalars
    assert weights_sha256(fresh) == weights_sha256(model)
    (header,) = struct.unpack_from("<Q", files[MODEL_FILE])
    assert (8 + header) % 64 == 0  # readers may map the tensors where they lie


def test_buffers_are_used_again_only_after_release() -> None:
    run = Run(ema=0.9)
    run.train(0, 1)  # momentum exists from now on, so the layout stays

    def addresses(snapshot: Snapshot) -> list[int]:
        return [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffers in snapshot.files().values() for buffer in buffers]

    first = run.state.snapshot({"step": 1})
    held, where = joined(first), addresses(first)
    run.train(1, 2)
    second = run.state.snapshot({"step": 2})
    assert not set(where) & set(addresses(second))
    assert joined(first) == held
    first.release()
    run.train(2, 3)
    third = run.state.snapshot({"step": 123456789})
    assert addresses(third) == where
    assert read_metadata(joined(third)[MODEL_FILE])["scalars"] == '{"step": 123456789}'
    assert joined(second) != joined(third) != held


def test_a_grown_layout_gets_new_buffers() -> None:
    run = Run(name="adamw", freeze="lp-ft")
    sizes = []
    for step, scalars in ((0, {}), (1, {}), (2, {"long": "x" * 5000})):
        run.train(step, step + 2)
        snapshot = run.state.snapshot(scalars)
        files = joined(snapshot)
        snapshot.release()
        sizes.append(len(files[OPTIMIZER_FILE]))
        again = Run(seed=1, name="adamw", freeze="lp-ft")
        assert again.state.load(files.__getitem__) == scalars
        assert again.bytes()[OPTIMIZER_FILE] == files[OPTIMIZER_FILE]
    assert sizes[0] < sizes[1]


def test_memory_formats_survive_a_resume() -> None:
    run, other = Run(width=8), Run(width=8, seed=1)
    run.train(0, 2)
    other.state.load(run.bytes().__getitem__)
    weight = other.model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


# -- a GPU's way of it, on a CPU ---------------------------------------------------------------------------------------------------------


class Queue:
    """Stands for a stream and for an event of a device that has done all its work: everything comes at once here."""

    def wait_stream(self, other: "Queue") -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Staged:
    """Notes what is copied on the device at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[Tensor], list[Tensor]]] = []
        copy = torch._foreach_copy_

        def noted(into: list[Tensor], source: list[Tensor]) -> None:
            self.calls.append((into, source))
            copy(into, source)

        patch.setattr(torch, "_foreach_copy_", noted)
        patch.setattr(torch.cuda, "Stream", lambda device: Queue())
        patch.setattr(torch.cuda, "Event", Queue)
        patch.setattr(torch.cuda, "current_stream", lambda device: Queue())
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        # Of AdamW's state the numbers of steps stay on the host.
        patch.setattr("trainer.learn.state._is_on_gpu", lambda tensor: not (tensor.dim() == 0 and tensor.is_floating_point()))

    @property
    def is_one_kernel_each(self) -> bool:
        """Whether each call is of one type, and pairs tensors that lie alike: PyTorch's conditions for copying many with one kernel."""
        return all(
            len({tensor.dtype for tensor in (*into, *source)}) == 1
            and [tensor.stride() for tensor in into] == [tensor.stride() for tensor in source]
            for into, source in self.calls
        )


@pytest.mark.parametrize("fields", RUNS, ids=str)
def test_a_snapshot_by_way_of_a_gpu_is_that_of_a_cpu_and_its_tensors_are_copied_together(fields: dict[str, Any]) -> None:
    run = Run(width=8, **fields)
    for step in range(4):  # over a layout that grows, and buffers used again
        run.train(step, step + 1)
        wanted = run.bytes()
        other = TrainState(run.model, run.optimizer, run.ema)
        with pytest.MonkeyPatch.context() as patch:
            staged = Staged(patch)
            for _ in range(2):
                snapshot = other.snapshot()
                assert joined(snapshot) == wanted
                snapshot.release()
        assert staged.is_one_kernel_each
        types = [{tensor.dtype for tensor in safetensors.torch.load(data).values() if tensor.dim()} for data in wanted.values()]
        counters = 1 if run.ema is None else 2  # int64
        assert len(staged.calls) == 2 * (sum(map(len, types)) + counters)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor,
    lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor,
    lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,  # without gaps, in no usual order
    lambda tensor: tensor[..., ::2] if tensor.dim() else tensor,  # with gaps
    lambda tensor: tensor.unsqueeze(0).transpose(0, -1).squeeze(0) if tensor.dim() else tensor,
    lambda tensor: tensor[:1].expand(tensor.shape) if tensor.dim() and len(tensor) else tensor,  # one row, many times
]


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.sampled_from(LAYOUTS), st.booleans()), max_size=8
    ),
    seed=st.integers(0, 99),
)
def test_a_snapshot_by_way_of_a_gpu_has_every_tensors_elements_in_their_places(
    drawn: list[tuple[torch.dtype, list[int], Callable[[Tensor], Tensor], bool]], seed: int
) -> None:
    """Also where a dimension of size 1 has a stride of its own, as convolutions of one pixel have."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for dtype, shape, lay, is_odd in drawn:
        tensor = lay(torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype))
        strides = [7 * stride + 3 if size == 1 and is_odd else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        tensors.append(tensor.as_strided(tensor.shape, strides))
    model = Bag(tensors)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    wanted = joined(state.snapshot())
    with pytest.MonkeyPatch.context() as patch:
        Staged(patch)
        files = joined(TrainState(model, torch.optim.SGD(model.parameters())).snapshot())
    assert files == wanted
    read = safetensors.torch.load(files[MODEL_FILE])
    for number, tensor in enumerate(tensors):
        assert raw(read[f"t{number}"]) == raw(torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor))


# -- what does not fit ----------------------------------------------------------------------------------------------------------------


def edited(data: bytes, edit: Callable[[dict[str, Tensor]], Any]) -> bytes:
    tensors, metadata = safetensors.torch.load(data), read_metadata(data)
    edit(tensors)
    return safetensors.torch.save(tensors, metadata)


def cast(tensors: dict[str, Tensor]) -> None:
    tensors["0.weight"] = tensors["0.weight"].bfloat16()


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (MODEL_FILE, lambda t: t.pop("1.running_mean"), r"model.safetensors does not fit: 1.running_mean is missing"),
        (MODEL_FILE, lambda t: t.update(extra=torch.zeros(1)), r"extra is not ours"),
        (
            MODEL_FILE,
            lambda t: t.update({"3.weight": torch.zeros(7, 16)}),
            r"3.weight is torch.float32 \(7, 16\) there and torch.float32 \(5, 16\) here",
        ),
        (MODEL_FILE, cast, r"0.weight is torch.bfloat16"),
        (
            OPTIMIZER_FILE,
            lambda t: t.pop("0.weight/momentum_buffer"),
            r"optimizer.safetensors does not fit: 0.weight/momentum_buffer is missing",
        ),
        (OPTIMIZER_FILE, lambda t: t.update({"9.weight/momentum_buffer": torch.zeros(1)}), r"9.weight/momentum_buffer is not ours"),
        (EMA_FILE, lambda t: t.pop("ema_updates"), r"ema.safetensors does not fit: ema_updates is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(file: str, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    source, target = Run(ema=0.9), Run(seed=1, ema=0.9)
    source.train(0, 1)
    target.train(0, 1)
    files, before = source.bytes(), target.bytes()
    files[file] = edited(files[file], edit)
    with pytest.raises(StateError, match=message):
        target.state.load(files.__getitem__)
    assert target.bytes() == before


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({}, {"name": "adamw"}, r"optimiser SGD \(momentum_buffer\), not AdamW \(exp_avg, exp_avg_sq, step\)"),
        ({}, {"ema": 0.9}, r"no average of the weights and train.ema sets one"),
        ({"ema": 0.9}, {}, r"an average of the weights and train.ema sets none"),
        ({}, {"width": 5}, r"does not fit"),
        ({"momentum": 0.0}, {"momentum": 0.9}, r"optimiser SGD \(no memory\), not SGD \(momentum_buffer\)"),
    ],
)
def test_a_checkpoint_of_another_configuration_says_what_differs(saved: dict[str, Any], loaded: dict[str, Any], message: str) -> None:
    source, target = Run(**saved), Run(**loaded)
    source.train(0, 1)
    with pytest.raises(StateError, match=message):
        target.state.load(source.bytes().__getitem__)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 20, struct.pack("<Q", 5) + b"{..}}"])
def test_a_file_that_is_not_safetensors_is_refused(content: bytes) -> None:
    run = Run()
    files = run.bytes() | {MODEL_FILE: content}
    with pytest.raises(StateError, match=r"model.safetensors is not a safetensors file"):
        run.state.load(files.__getitem__)


# -- hash -----------------------------------------------------------------------------------------------------------------------------


def test_weights_hash_sees_every_bit_name_type_and_shape_but_not_the_memory_format() -> None:
    base = {"b": torch.arange(24.0).view(1, 2, 3, 4), "a": torch.zeros((), dtype=torch.int64)}
    variants = [
        base,
        base | {"a": torch.ones((), dtype=torch.int64)},
        base | {"a": torch.zeros((), dtype=torch.int32)},
        base | {"a": torch.zeros(1, dtype=torch.int64)},
        base | {"b": base["b"].view(2, 1, 3, 4)},
        {"b": base["b"], "c": base["a"]},
        base | {"b": -base["b"].abs()},  # -0.0 instead of 0.0, among others
    ]
    hashes = [weights_sha256(variant) for variant in variants]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))
    assert weights_sha256(dict(reversed(base.items()))) == hashes[0]
    assert weights_sha256(base | {"b": base["b"].contiguous(memory_format=torch.channels_last)}) == hashes[0]


def test_scalars_are_json() -> None:
    with pytest.raises(TypeError):
        Run().state.snapshot({"step": object()})
    assert json.loads(read_metadata(Run().bytes()[MODEL_FILE])["scalars"]) == {}


# -- on a GPU -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fields", RUNS, ids=str)
def test_a_snapshot_on_a_gpu_is_not_torn_by_the_steps_that_follow_it(fields: dict[str, Any]) -> None:
    run = Run(device="cuda", width=64, **fields)
    run.train(0, 3)
    torch.cuda.synchronize()
    quiet = run.bytes()
    snapshot = run.state.snapshot()
    run.train(3, 6)
    assert joined(snapshot) == quiet
    resumed = Run(seed=1, device="cuda", width=64, **fields)
    resumed.state.load(quiet.__getitem__)
    assert resumed.bytes() == quiet
