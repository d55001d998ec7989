"""The step and the loop, on small networks and real batches of the shipped sample: what a step computes, by plain PyTorch or by hand."""

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.reduce import TreeReducer, tree_sum
from dataio.batch import Batch, Targets
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import open_dataset
from dataio.schema import LABEL, Target
from trainer.learn.augment.mix import Mix, mixed_loss
from trainer.learn.augment.views import make_views
from trainer.learn.balance import balanced_loss
from trainer.learn.build import Learner
from trainer.learn.ema import Ema
from trainer.learn.gradients import (
    DdpGradients,
    Gradients,
    PassConfig,
    Passes,
    PlainGradients,
    StepObserver,
    TreeGradients,
    _DdpWaits,
    _LastGradient,
    evaluating,
    step_seed,
)
from trainer.learn.objectives import autocast_for, supervised
from trainer.learn.optim import build_optimizer, set_learning_rate, set_trainable
from trainer.learn.own import SummedLoss
from trainer.learn.state import TrainState, weights_sha256
from trainer.learn.step import UNOBSERVED, Stepper, StepStats, Unobserved, train_steps
from trainer.learn.update import Update
from trainer.models.rounded import round_layers
from trainer.models.vision import Preprocess
from trainer.rank.evaluation import evaluate
from trainer.rank.step_plan import StepPlan
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig
from trainer.tasks.classification import Classification
from trainer.tasks.make import make_task
from trainer.tasks.task import Task

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"  # 2,000 images of 28x28 to train with
CLASSES = 10
SEED = 7
CPU = torch.device("cpu")
PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=0, interpolation="bilinear")
OPTIM = OptimConfig(lr=0.05, momentum=0.9, schedule="constant", head_lr_factor=2.0)
# (virtual ranks, batch) of which the last step of an epoch is small, and uneven where 2,000 is no multiple: 4 x 2; 1 1 1 1 1 0 0; 1 1 0.
FOUR, SEVEN, THREE = (4, 332), (7, 133), (3, 333)
UNEVEN = (3, 300)  # 67 67 66


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, and a head by the name of `head`."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.2, seed: int = 0, momentum: float | None = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3, stride=2),
                nn.BatchNorm2d(6, momentum=momentum) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Conv2d(6, 8, 3, stride=2),
                nn.BatchNorm2d(8, momentum=momentum) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
            )
            self.head = nn.Linear(32, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class Residual(nn.Module):
    """A small ResNet: a stem, two blocks, the second with a projection; and a parameter that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.blocks = nn.ModuleList([self.block(8, 8, 1), self.block(8, 12, 2)])
            self.project = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
            self.unused = nn.Linear(5, 3)
            self.dropout = nn.Dropout(0.2)
            self.head = nn.Linear(12, CLASSES)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        maps = F.relu(maps + self.blocks[0](maps))
        maps = F.relu(self.project(maps) + self.blocks[1](maps))
        logits: Tensor = self.head(self.dropout(maps.mean((2, 3))))
        return logits


def make_loader(virtual_ranks: int, batch_size: int) -> tuple[Loader, Order]:
    dataset = open_dataset(SAMPLE)
    order = Order(seed=SEED, fingerprint=dataset.manifest.fingerprint, count=2000, batch_size=batch_size, virtual_ranks=virtual_ranks)
    loader = Loader(
        dataset,
        DataConfig(cache="host", backend="numpy", pad=2),
        order=order,
        virtual_ranks=range(virtual_ranks),
        device=CPU,
        seed=SEED,
        on_bad=lambda bad: pytest.fail(str(bad)),
    )
    return loader, order


_loaders: dict[tuple[int, int], tuple[Loader, Order]] = {}


def order_of(shape: tuple[int, int]) -> Order:
    return loader_of(shape)[1]


def loader_of(shape: tuple[int, int]) -> tuple[Loader, Order]:
    """Images are decoded once a process and shape."""
    if shape not in _loaders:
        _loaders[shape] = make_loader(*shape)
    return _loaders[shape]


def batches_of(shape: tuple[int, int], start: int, stop: int, carried: range | None = None) -> list[tuple[Batch, ...]]:
    """Real batches of all virtual ranks, or of those that a rank carries."""
    carried = carried or range(shape[0])
    with closing(loader_of(shape)[0].train(start, stop)) as steps:
        return [step[carried.start : carried.stop] for step in steps]


def count_of(batches: Sequence[Batch]) -> int:
    return sum(len(batch.ids) for batch in batches)


TASK = make_task(TaskConfig(), (Target(name=LABEL, kind="label", classes=tuple(f"class {number}" for number in range(CLASSES))),))


def make(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    virtual_ranks: int = 1,
    reducer: TreeReducer | None = None,
    distributed: bool = False,
    world_size: int = 1,
    clip: Any = None,
    ema: Ema | None = None,
    precision: str = "fp32",
    task: Task = TASK,
    observer: StepObserver = UNOBSERVED,
    loss: SummedLoss | None = None,
    **passes: Any,
) -> Stepper:
    """A step by its parts, in one process unless told otherwise; through the tree where there are several virtual ranks."""
    if reducer is None and virtual_ranks > 1:
        reducer = TreeReducer([range(virtual_ranks)], 0)
    update = Update(model, optimizer, clip=clip, ema=ema)
    if passes.get("mix"):
        loss = mixed_loss(loss or task.loss_sum)
    objective, config = supervised(task, PREPROCESS, autocast_for(CPU, precision), loss), PassConfig(seed=SEED, **passes)
    gradients: Gradients
    if reducer is not None:
        gradients = TreeGradients(model, task, objective, config, reducer, looks_at_gradients=not update.adds_up)
    elif distributed:
        gradients = DdpGradients(model, task, objective, config, world_size=world_size)
    else:
        gradients = PlainGradients(model, task, objective, config)
    return Stepper(gradients, update, observer)


def learner_of(config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None) -> Learner:
    return Learner(config=config, task=TASK, model=model, preprocess=PREPROCESS, optimizer=optimizer, head_name="head", ema=ema)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def loop(
    stepper: Stepper,
    steps: Iterator[tuple[Batch, ...]],
    order: Order,
    start: int,
    stop: int,
    *,
    ranks_summed: bool = False,
    rate: Callable[[int], float] = lambda step: 0.05,
) -> Iterator[StepStats]:
    return train_steps(
        stepper,
        steps,
        start_step=start,
        stop_step=stop,
        steps_per_epoch=order.steps_per_epoch,
        batch_count=order.batch_count,
        set_learning_rate=rate,
        device=CPU,
        sum_over_ranks=ranks_summed,
    )


def phases(config: RunConfig, start: int, stop: int, steps_per_epoch: int) -> Iterator[tuple[int, int]]:
    """Of a run of `stop` steps."""
    return replace(StepPlan.of(config, steps_per_epoch, start_step=start), total_steps=stop).phases()


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return weights_sha256(one) == weights_sha256(other)


# --- what a step computes -------------------------------------------------------------------------------------------------------------


def test_one_virtual_rank_is_the_plain_pytorch_loop_bit_for_bit() -> None:
    shape = (1, 300)  # 7 steps an epoch, the last of 200
    model, plain = Net(), Net()
    ema, plain_ema = Ema(model, 0.9), Ema(plain, 0.9)
    stepper, optimizer = make(model, sgd(model), ema=ema), sgd(plain)
    order = order_of(shape)
    seen = list(loop(stepper, iter(batches_of(shape, 0, 9)), order, 0, 9))
    losses = []
    for step, (batch,) in enumerate(batches_of(shape, 0, 9)):
        torch.manual_seed(step_seed(SEED, step, 0))
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(PREPROCESS(batch.samples)), batch.targets["label"])
        loss.backward()
        optimizer.step()
        plain_ema.update()
        losses.append((step, loss.item()))
    assert same_bits(model, plain)
    assert weights_sha256(ema.weights()) == weights_sha256(plain_ema.weights()) != weights_sha256(model)
    assert [pair for stats in seen for pair in stats.losses] == losses
    assert [stats.samples for stats in seen] == [300] * 6 + [200] + [300] * 2
    assert [stats.epoch for stats in seen] == [0] * 7 + [1] * 2


def by_hand(model: nn.Module, batches: Sequence[Batch], step: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(gradients, BatchNorm statistics, loss): each virtual rank on a copy of its own, summed in the tree's order."""
    total = count_of(batches)
    parts: list[list[Tensor]] = []
    for batch in batches:
        own = copy.deepcopy(model)
        share = len(batch.ids) / total
        if len(batch.ids) == 1:  # a single image is normalised by the running statistics
            for norm in own.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
        loss = torch.zeros(())
        if share:
            torch.manual_seed(step_seed(SEED, step, batch.virtual_rank))
            loss = F.cross_entropy(own(PREPROCESS(batch.samples)), batch.targets["label"], reduction="sum") / total
        gradients = torch.autograd.grad(loss, list(own.parameters())) if share else [torch.zeros_like(p) for p in own.parameters()]
        statistics = [buffer * share for buffer in own.buffers() if buffer.is_floating_point()]
        parts.append([*gradients, *statistics, loss.detach()])
    sums = [tree_sum([part[index] for part in parts], lambda a, b: a + b) for index in range(len(parts[0]))]
    wanted = len(list(model.parameters()))
    return sums[:wanted], sums[wanted:-1], sums[-1]


@pytest.mark.parametrize(
    ("momentum", "is_rounded"), [(0.1, False), (None, False), (0.1, True)], ids=["moving-average", "cumulative-average", "int8"]
)
@pytest.mark.parametrize("shape", [FOUR, SEVEN, UNEVEN], ids=str)
def test_gradients_and_statistics_are_the_tree_sum_over_virtual_ranks(
    shape: tuple[int, int], momentum: float | None, is_rounded: bool
) -> None:
    model = Net(momentum=momentum)
    if is_rounded:
        round_layers(model)
    stepper = make(model, sgd(model), virtual_ranks=shape[0])
    first = order_of(shape).steps_per_epoch - 2  # over the epoch's last step, the small one
    for step, batches in enumerate(batches_of(shape, first, first + 4), start=first):
        gradients, statistics, loss = by_hand(model, batches, step)
        assert stepper.step(batches, global_count=count_of(batches), step=step).item() == loss.item()
        for parameter, wanted in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            assert torch.equal(parameter.grad, wanted)
        floating = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        assert all(torch.equal(buffer, wanted) for buffer, wanted in zip(floating, statistics, strict=True))
        counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        assert [int(counter) for counter in counters] == [step - first + 1] * 2  # steps, not forwards


@pytest.mark.parametrize("shape", [FOUR, SEVEN, THREE, UNEVEN], ids=str)
def test_the_last_uneven_batch_weighs_every_sample_the_same(shape: tuple[int, int]) -> None:
    order = order_of(shape)
    last = order.steps_per_epoch - 1
    (batches,) = batches_of(shape, last, last + 1)
    sizes = [len(batch.ids) for batch in batches]
    assert sizes == {FOUR: [2, 2, 2, 2], SEVEN: [1, 1, 1, 1, 1, 0, 0], THREE: [1, 1, 0], UNEVEN: [67, 67, 66]}[shape]
    model = Net(norm=False, dropout=0.0)
    reference = copy.deepcopy(model)
    loss = make(model, sgd(model), virtual_ranks=shape[0]).step(batches, global_count=order.batch_count(last), step=last)
    images, labels = torch.cat([batch.samples for batch in batches]), torch.cat([batch.targets["label"] for batch in batches])
    wanted = F.cross_entropy(reference(PREPROCESS(images)), labels)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("virtual_ranks", [1, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_quarantined_sample_has_no_weight(virtual_ranks: int, label_smoothing: float) -> None:
    (batches,) = batches_of((virtual_ranks, 40), 0, 1)
    bad = torch.arange(len(batches[0].ids)) % 3 == 0
    images, labels = batches[0].samples.clone(), batches[0].targets["label"].clone()
    images[bad], labels[bad] = 0, -1
    spoilt = [replace(batches[0], samples=images, targets={"label": labels}), *batches[1:]]
    without = [replace(batches[0], samples=images[~bad], targets={"label": labels[~bad]}, ids=batches[0].ids[~bad.numpy()]), *batches[1:]]
    gradients = []
    for given_batches in (spoilt, without):
        model = Net(norm=False, dropout=0.0)
        task = make_task(TaskConfig(), TASK.targets, label_smoothing=label_smoothing)
        stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, task=task)
        loss = stepper.step(given_batches, global_count=40, step=0)
        gradients.append([loss, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("virtual_ranks", [1, 3])
def test_a_single_image_left_over_is_no_error_where_maps_have_one_pixel(virtual_ranks: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 28, 28))
    (batches,) = batches_of((virtual_ranks, 30), 0, 1)
    single = [
        replace(b, samples=b.samples[:n], targets={"label": b.targets["label"][:n]}, ids=b.ids[:n])
        for b, n in zip(batches, [1, 1, 0][:virtual_ranks], strict=True)
    ]
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    before, weight = norm.running_mean.clone(), model[0].weight.detach().clone()
    make(model, sgd(model), virtual_ranks=virtual_ranks).step(single, global_count=count_of(single), step=0)
    assert norm.training
    torch.testing.assert_close(norm.running_mean, before)
    assert not torch.equal(model[0].weight, weight)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]), clip=st.booleans())
def test_a_loss_is_a_number_exactly_if_every_summed_gradient_is(data: st.DataObject, bad: float, clip: bool) -> None:
    (batches,) = batches_of((3, 30), 0, 1)
    clip_norm = partial(nn.utils.clip_grad_norm_, max_norm=1.0) if clip else None
    want = make(model := Net(), sgd(model), virtual_ranks=3, clip=clip_norm).step(batches, global_count=30, step=0)
    model = Net()
    stepper = make(model, sgd(model), virtual_ranks=3, clip=clip_norm)
    parameters = list(model.parameters())
    poisoned = parameters[data.draw(st.integers(0, len(parameters) - 1))]
    victim, place, calls = data.draw(st.integers(0, 2)), data.draw(st.integers(0, poisoned.numel() - 1)), iter(range(3))

    def poison(gradient: Tensor) -> Tensor:
        """In one virtual rank's gradient, of which the loss knows nothing, one element."""
        spoilt = gradient.clone().contiguous()
        if next(calls) == victim:
            spoilt.view(-1)[place] = bad
        return spoilt

    poisoned.register_hook(poison)  # type: ignore[no-untyped-call]
    loss = stepper.step(batches, global_count=30, step=0)
    assert loss.isfinite() == (bad == 1e30)
    if bad == 1e30:
        assert torch.equal(loss, want)


def test_a_stepper_that_is_gone_leaves_no_hook_and_no_buffers() -> None:
    model = Net()
    optimizer = sgd(model)
    (batches,) = batches_of((2, 40), 0, 1)
    first = make(model, optimizer, virtual_ranks=2)
    assert isinstance(first._gradients, TreeGradients)
    reducer = weakref.ref(first._gradients._reducer)
    first.step(batches, global_count=40, step=0)
    second = make(model, optimizer, virtual_ranks=2)  # the first is still there, as it is where the backbone thaws
    reference = copy.deepcopy(model)
    wanted, _, _ = by_hand(reference, batches, 1)
    second.step(batches, global_count=40, step=1)
    assert all(torch.equal(p.grad, want) for p, want in zip(model.parameters(), wanted, strict=True) if p.grad is not None)
    del first, second
    gc.collect()
    assert reducer() is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize(("buckets", "pieces"), [((25 * 2**20, 2**20), 1), ((1500, 1000), 3)])
def test_a_compiled_model_hands_over_its_gradients_in_pieces(
    monkeypatch: pytest.MonkeyPatch, buckets: tuple[int, int], pieces: int
) -> None:
    """The head, of 1,320 bytes; the second convolution and its norm, of 1,824; the first ones."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("trainer.learn.gradients.COMPILER", compiler)
    model, eager = Net(dropout=0.0), Net(dropout=0.0)
    (batches,) = batches_of((2, 40), 0, 1)
    reducer = TreeReducer([range(2)], 0, bucket_bytes=buckets[0], small_bucket_bytes=buckets[1])
    make(model, sgd(model), reducer=reducer, compile_model=True).step(batches, global_count=40, step=0)
    make(eager, sgd(eager), virtual_ranks=2).step(batches, global_count=40, step=0)
    assert len(graphs) == pieces
    assert same_bits(model, eager)


def test_someone_elses_backward_pass_keeps_its_gradients() -> None:
    model = Net()
    stepper = make(model, sgd(model), virtual_ranks=2)
    model.zero_grad()
    model(torch.zeros(2, 3, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    (batches,) = batches_of((2, 40), 0, 1)
    wanted, _, _ = by_hand(model_as_it_is(model), batches, 0)
    stepper.step(batches, global_count=40, step=0)
    assert all(torch.equal(p.grad, want) for p, want in zip(model.parameters(), wanted, strict=True) if p.grad is not None)


def model_as_it_is(model: nn.Module) -> nn.Module:
    """A copy without gradients and hooks."""
    same = Net()
    same.load_state_dict(model.state_dict())
    return same


def test_wait_seconds_are_the_reducers_and_none_where_nobody_is_waited_for() -> None:
    reducer = TreeReducer([range(2)], 0)
    model = Net()
    stepper = make(model, sgd(model), reducer=reducer)
    (batches,) = batches_of((2, 40), 0, 1)
    stepper.step(batches, global_count=40, step=0)
    assert stepper.wait_seconds == 0.0
    reducer.wait_seconds = 1.5
    assert stepper.wait_seconds == 1.5
    assert make(model, sgd(model)).wait_seconds == 0.0


def test_ddp_waits_from_the_last_gradient_to_the_end_of_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    now = iter(range(100))
    waits = _DdpWaits(list(model.parameters()), clock=lambda: float(next(now)))
    for seconds in (1.0, 2.0):
        model(torch.ones(1, 2)).sum().backward()  # four gradients, at four moments
        waits.backward_returned()  # the moment after the last
        assert waits.seconds == seconds


def test_the_last_gradient_of_a_backward_pass_is_marked_from_the_second_step_on() -> None:
    """The parameters' gradients come from the last layer to the first; within a layer the order is autograd's own."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    parameters, seen = list(model.parameters()), [""]

    class Marks(Unobserved):
        def part(self, part: str, /) -> None:
            assert all(parameter.grad is not None for parameter in parameters)
            seen.append(part)

    last = _LastGradient(parameters)
    for step in range(3):
        model.zero_grad()
        last.begin(Marks())
        model(torch.ones(1, 2)).sum().backward()
        seen.append(f"step {step}")
    assert seen == ["", "step 0", "gradients", "step 1", "gradients", "step 2"]
    del last
    gc.collect()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)  # type: ignore[attr-defined]


def test_step_seeds_differ_between_steps_virtual_ranks_and_runs() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_evaluating_puts_each_module_back_into_the_mode_it_was_in() -> None:
    model = Net()
    model.body[1].eval()
    modes = [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


# --- counters -------------------------------------------------------------------------------------------------------------------------


class Uncommon(nn.Module):
    """Norms that a pass uses once, twice, only for an odd number of images, and never; and one that weighs by its counter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.stem = nn.Conv2d(3, 4, 3, stride=4)
            self.once, self.twice, self.odd, self.never = (nn.BatchNorm2d(4) for _ in range(4))
            self.weighs = nn.BatchNorm2d(4, momentum=None)
            self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.weighs(self.once(self.stem(images)))
        maps = self.twice(F.relu(self.twice(maps)))
        if len(images) % 2:
            maps = self.odd(maps)
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def counters_of(model: nn.Module) -> dict[str, int]:
    return {name.split(".")[-2]: int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}


COUNTED: dict[str, tuple[int, int, list[int]]] = {  # (virtual ranks, micro-batches, of once, twice, odd, never and weighs)
    "plain": (1, 1, [5, 10, 4, 0, 5]),
    "micro-batches": (1, 3, [12, 24, 12, 0, 12]),  # the two of the short batch are of one image each, with norms at rest
    "tree": (3, 1, [5, 5, 5, 5, 5]),  # steps
    "tree, micro-batches": (3, 2, [5, 5, 5, 5, 5]),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", COUNTED)
def test_counters_that_stand_aside_during_passes_end_where_those_that_do_not_end(
    monkeypatch: pytest.MonkeyPatch, case: str, compiled: bool
) -> None:
    """Over a short batch of two images. An evaluation in between counts for nothing."""
    monkeypatch.setattr("trainer.learn.gradients.COMPILER", "eager")  # graphs as they are
    virtual_ranks, accumulate, wanted = COUNTED[case]
    models = []
    for stand_aside in (True, False):
        torch._dynamo.reset()
        model = Uncommon()
        with monkeypatch.context() as patch:
            if not stand_aside:
                patch.setattr("trainer.learn.gradients._only_counts", lambda norm: False)
            full = (333 // virtual_ranks // accumulate,)
            stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, accumulate=accumulate, compile_model=compiled, full_batches=full)
        assert (stepper.compile_ahead((3, 28, 28)) > 0) == compiled
        for step, batches in enumerate(batches_of((virtual_ranks, 333), 4, 9), start=4):  # step 6 is the short one
            stepper.step(batches, global_count=count_of(batches), step=step)
            with evaluating(model), torch.no_grad():
                model(torch.zeros(3, 3, 28, 28))
        models.append(model)
    assert list(counters_of(models[0]).values()) == wanted
    assert same_bits(*models)
    assert list(models[0].state_dict()) == list(models[1].state_dict())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("virtual_ranks", "distributed"), [(1, False), (4, False), (1, True)])
def test_a_compiled_step_has_no_counter_in_it_and_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, virtual_ranks: int, distributed: bool
) -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        graphs.append([tensor for tensor in inputs if tensor.dim() == 0 and not tensor.is_floating_point()])
        return graph.forward

    monkeypatch.setattr("trainer.learn.gradients.COMPILER", compiler)
    torch._dynamo.reset()
    model = Net()
    stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, distributed=distributed, compile_model=True)
    for step, batches in enumerate(batches_of((virtual_ranks, 40), 0, 4)):
        stepper.step(batches, global_count=40, step=step)
    assert graphs == [[]]
    assert list(counters_of(model).values()) == [4, 4]


def test_counters_are_back_after_a_pass_that_failed() -> None:
    model = Net()
    stepper = make(model, sgd(model))
    (batches,) = batches_of((1, 40), 0, 1)
    names = list(model.state_dict())
    handle = model.head.register_forward_hook(lambda *_: pytest.fail("in the middle of a pass"))
    with pytest.raises(pytest.fail.Exception):
        stepper.step(batches, global_count=40, step=0)
    handle.remove()
    assert list(model.state_dict()) == names
    assert list(counters_of(model).values()) == [0, 0]
    stepper.step(batches, global_count=40, step=0)
    assert list(counters_of(model).values()) == [1, 1]


class Unusual(nn.BatchNorm2d):
    """Divides by its counter in a forward pass of its own."""

    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        assert self.num_batches_tracked is not None
        return out / float(self.num_batches_tracked)


def test_a_norm_of_somebody_elses_keeps_its_counter_during_passes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 28), Unusual(4), nn.Flatten(), nn.Linear(4, CLASSES))
    stepper = make(model, sgd(model))
    for step, batches in enumerate(batches_of((1, 40), 0, 2)):
        stepper.step(batches, global_count=40, step=step)
    assert list(counters_of(model).values()) == [2]


# --- resuming -------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    cut=st.integers(0, 8),
    name=st.sampled_from(["sgd", "adamw"]),
    ema=st.booleans(),
    virtual_ranks=st.sampled_from([1, 4]),
    by_depth=st.booleans(),
)
def test_going_on_from_a_snapshot_at_any_step_ends_in_the_same_bits(
    cut: int, name: str, ema: bool, virtual_ranks: int, by_depth: bool
) -> None:
    """`by_depth`: a group for each layer, and a rate and a momentum that change each step."""
    shape, stop = (virtual_ranks, 332), 8  # step 6 is an epoch's last, with 8 images
    config: OptimConfig = replace(OPTIM, name=name, lr=0.01)
    if by_depth:
        config = replace(config, layer_decay=0.5, schedule="one-cycle")
    order = order_of(shape)

    def fresh(seed: int) -> tuple[nn.Module, TrainState, Callable[[int, int], None], Ema | None]:
        """The last but one trains from a step to another."""
        model = Net(seed=seed)
        optimizer = build_optimizer(model, config, "head", depths_by_place(model) if by_depth else None)
        average = Ema(model, 0.9) if ema else None
        stepper = make(model, optimizer, virtual_ranks=virtual_ranks, ema=average)

        def train(start: int, stop: int) -> None:
            def rate(step: int) -> float:
                return set_learning_rate(optimizer, config, step, 8) if by_depth else 0.05

            for _ in loop(stepper, iter(batches_of(shape, start, stop)), order, start, stop, rate=rate):
                pass

        return model, TrainState(model, optimizer, average), train, average

    model, state, train, average = fresh(0)
    train(0, cut)
    snapshot = state.snapshot()
    train(cut, stop)  # goes on over the snapshot

    again, again_state, train_again, again_average = fresh(1)
    assert not same_bits(model, again)
    files = snapshot.files()
    again_state.load(lambda file: b"".join(files[file]))
    train_again(cut, stop)
    assert same_bits(model, again)
    if average is not None and again_average is not None:
        assert weights_sha256(average.weights()) == weights_sha256(again_average.weights())


# --- freezing -------------------------------------------------------------------------------------------------------------------------


def backbone(model: nn.Module) -> str:
    return weights_sha256({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")})


@pytest.mark.parametrize("virtual_ranks", [1, 4])
@pytest.mark.parametrize("freeze", ["backbone", "lp-ft"])
def test_a_frozen_backbone_keeps_its_bits_and_statistics_until_it_thaws(freeze: Any, virtual_ranks: int) -> None:
    shape = (virtual_ranks, 1000)  # 2 steps an epoch
    config = RunConfig(
        model=ModelConfig(freeze=freeze, lp_epochs=2),
        optim=OPTIM,
        train=TrainConfig(seed=SEED, precision="fp32", virtual_ranks=virtual_ranks),
    )
    order = order_of(shape)
    model = Net()
    optimizer, ema = build_optimizer(model, OPTIM, "head"), Ema(model, 0.9)
    start, head = backbone(model), model.head.weight.detach().clone()
    cut = list(phases(config, 0, 6, order.steps_per_epoch))
    assert cut == ([(0, 4), (4, 6)] if freeze == "lp-ft" else [(0, 6)])
    for first, last in cut:
        frozen = set_trainable(model, freeze, first // order.steps_per_epoch, lp_epochs=2, head_name="head")
        assert frozen == (first == 0)
        stepper = learner_of(config, model, optimizer, ema).stepper()
        for stats in loop(stepper, iter(batches_of(shape, first, last)), order, first, last):
            if stats.steps_done == 2:  # an evaluation in between
                with evaluating(model), torch.inference_mode():
                    model(torch.zeros(2, 3, 28, 28))
            if frozen:
                assert backbone(model) == start
                assert backbone_of_average(ema) == start
    assert not torch.equal(model.head.weight, head)
    assert (backbone(model) == start) == (freeze == "backbone")
    counters = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters == ([2, 2] if freeze == "lp-ft" else [0, 0])


def backbone_of_average(ema: Ema) -> str:
    return weights_sha256({name: tensor for name, tensor in ema.weights().items() if not name.startswith("head.")})


@pytest.mark.parametrize("start", range(7))
def test_phases_cut_what_is_left_where_the_backbone_thaws(start: int) -> None:
    config = RunConfig(model=ModelConfig(freeze="lp-ft", lp_epochs=2))
    steps = [step for first, last in phases(config, start, 6, 2) for step in range(first, last)]
    assert steps == list(range(start, 6))
    assert all(last <= 4 or first >= 4 for first, last in phases(config, start, 6, 2))


# --- losses ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 4), steps=st.integers(0, 5))
def test_each_step_yields_once_and_its_loss_arrives_once_in_order(start: int, steps: int) -> None:
    shape = (1, 1000)
    model = Net()
    order = Order(seed=SEED, fingerprint="", count=2000, batch_size=1000, virtual_ranks=1)
    stop = start + steps
    seen = list(loop(make(model, sgd(model)), iter(batches_of(shape, start, stop)), order, start, stop))
    assert [stats.steps_done for stats in seen] == list(range(start + 1, stop + 1))
    assert [step for stats in seen for step, _ in stats.losses] == list(range(start, stop))


def test_step_and_wait_seconds_are_what_the_clock_says() -> None:
    ticks = iter(range(1000))
    model = Net()
    order = Order(seed=SEED, fingerprint="", count=2000, batch_size=1000, virtual_ranks=1)

    def slow() -> Iterator[tuple[Batch, ...]]:
        for batches in batches_of((1, 1000), 0, 2):
            for _ in range(4):
                next(ticks)
            yield batches

    stats = list(
        train_steps(
            make(model, sgd(model)),
            slow(),
            start_step=0,
            stop_step=2,
            steps_per_epoch=2,
            batch_count=order.batch_count,
            set_learning_rate=lambda step: 0.5 * step,
            device=CPU,
            sum_over_ranks=False,
            clock=lambda: float(next(ticks)),
        )
    )
    assert [(s.data_wait_seconds, s.step_seconds, s.learning_rate) for s in stats] == [(5.0, 6.0, 0.0), (5.0, 6.0, 0.5)]


class Waiting:
    """Gradients that are waited for: half a second longer in each step."""

    proves = True
    wait_seconds = 3.0  # in steps before

    def compute(self, batches: Sequence[Batch], *, global_count: int, step: int, observer: StepObserver) -> Tensor:
        self.wait_seconds += 0.5 * (step + 1)
        return torch.tensor(1.0)

    def compile_ahead(self, image: Sequence[int]) -> float:
        return 0.0


def test_exchange_seconds_are_what_each_step_waited_for_other_ranks() -> None:
    model = Net()
    order = Order(seed=SEED, fingerprint="", count=2000, batch_size=1000, virtual_ranks=1)
    stepper = Stepper(Waiting(), Update(model, sgd(model)))
    stats = list(loop(stepper, iter(batches_of((1, 1000), 0, 3)), order, 0, 3))
    assert [each.exchange_seconds for each in stats] == [0.5, 1.0, 1.5]


# --- several real processes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeCase:
    """A training run that any number of workers must do alike."""

    shape: tuple[int, int]  # (virtual ranks, batch)
    steps: tuple[int, int]  # over the end of an epoch, with its small last step
    net: type[nn.Module] = Net
    precision: Any = "fp32"
    freeze: Any = "none"
    compile_model: bool = False
    buckets: tuple[int, int] = (25 * 2**20, 2**20)  # bytes: (most, first and last)
    worlds: tuple[int, ...] = (1, 2, 3, 4)
    accumulate: int = 1
    wire: torch.dtype = torch.float32
    full_batches: tuple[int, ...] = ()
    optim: OptimConfig = OPTIM  # with a layer_decay, there is a group for each depth
    balance: str = "none"
    augments: bool = False
    augment_backend: Any = "torch"

    @property
    def is_plain(self) -> bool:
        """tree_by_hand does it too."""
        plain = self.optim == OPTIM and not self.compile_model and not self.augments
        return plain and self.accumulate == 1 and self.wire == torch.float32


TREE_CASES = {
    "four": TreeCase(shape=FOUR, steps=(3, 9)),
    "four, bf16": TreeCase(shape=FOUR, steps=(3, 9), precision="bf16"),
    # Ranks of 2 2 2 1 and 3 2 2 virtual ranks: several subtrees a rank. The last step's are of 1 1 1 1 1 0 0 images. A bucket a part.
    "seven": TreeCase(shape=SEVEN, steps=(13, 18), net=Residual, buckets=(1, 1)),
    # The backbone thaws at step 7.
    "eight, bf16, lp-ft": TreeCase(shape=(8, 304), steps=(4, 10), net=Residual, precision="bf16", freeze="lp-ft", buckets=(2000, 500)),
    "four, compiled": TreeCase(shape=FOUR, steps=(4, 8), compile_model=True, buckets=(2000, 500), worlds=(1, 2)),
    "four, compiled, short batches not": TreeCase(
        shape=FOUR, steps=(4, 8), compile_model=True, buckets=(2000, 500), worlds=(1, 3), full_batches=(83,)
    ),
    "seven, sums in bf16": TreeCase(shape=SEVEN, steps=(13, 16), net=Residual, buckets=(2000, 500), wire=torch.bfloat16),
    "four, micro-batches": TreeCase(shape=FOUR, steps=(5, 8), accumulate=3),
    # Many groups, rates and momentum that change each step, classes that weigh 0.1 to 10.
    "four, by depth": TreeCase(
        shape=FOUR, steps=(4, 8), optim=replace(OPTIM, layer_decay=0.5, schedule="one-cycle"), balance="weights", worlds=(1, 2, 4)
    ),
    "four, by depth, adamw": TreeCase(
        shape=FOUR,
        steps=(4, 8),
        optim=replace(OPTIM, name="adamw", lr=1e-3, layer_decay=0.5, schedule="one-cycle"),
        balance="logit_adjustment",
        worlds=(1, 2, 4),
    ),
    "four, augmented": TreeCase(shape=FOUR, steps=(5, 8), augments=True),
    "four, augmented by DALI": TreeCase(shape=FOUR, steps=(5, 8), augments=True, augment_backend="dali", worlds=(1, 2)),
    "seven, augmented, micro-batches": TreeCase(shape=SEVEN, steps=(14, 16), augments=True, accumulate=2, worlds=(1, 2, 4)),
}
EVERYTHING = DataConfig(crop="resized", crop_scale=(0.3, 1.0), rotate=20, policy="rand", jitter=(0.4, 0.4, 0.4, 0.1), erase=0.3)
UNEQUAL = (1000, 500, 300, 200, 100, 90, 50, 30, 20, 10)
"""Training images of the classes, as a long tail would have them."""


def depths_by_place(model: nn.Module) -> dict[str, int]:
    """Net's layers by their place in its body."""
    return {name: int(name.split(".")[1]) if name.startswith("body.") else 99 for name, _ in model.named_parameters()}


def tree_config(case: TreeCase) -> RunConfig:
    return RunConfig(
        model=ModelConfig(freeze=case.freeze, lp_epochs=1), optim=OPTIM, train=TrainConfig(seed=SEED, precision=case.precision)
    )


def tree_run(case: TreeCase, world: int, rank: int, group: Any) -> str:
    """Weights, average and losses after training as rank `rank` of `world`."""
    model = case.net()
    depths = depths_by_place(model) if case.optim.layer_decay != 1 else None
    optimizer, ema = build_optimizer(model, case.optim, "head", depths), Ema(model, 0.9)
    loss = balanced_loss(replace(RunConfig(), data=DataConfig(balance=case.balance)), TASK, UNEQUAL, CPU)
    order, virtual_ranks = order_of(case.shape), case.shape[0]
    losses = []
    for first, last in phases(tree_config(case), *case.steps, order.steps_per_epoch):
        set_trainable(model, case.freeze, first // order.steps_per_epoch, lp_epochs=1, head_name="head")
        large, small = case.buckets
        stepper = make(
            model,
            optimizer,
            ema=ema,
            precision=case.precision,
            reducer=TreeReducer(
                [blocks_of_virtual_ranks(virtual_ranks, world, each) for each in range(world)],
                rank,
                group,
                bucket_bytes=large,
                small_bucket_bytes=small,
                wire=case.wire,
            ),
            distributed=world > 1,
            world_size=world,
            compile_model=case.compile_model,
            accumulate=case.accumulate,
            full_batches=case.full_batches,
            loss=loss,
            views=make_views(replace(EVERYTHING, augment_backend=case.augment_backend), seed=SEED, image_size=32)
            if case.augments
            else None,
            mix=Mix(seed=SEED, mixup=0.4, cutmix=1.0) if case.augments else None,
        )
        batches = iter(batches_of(case.shape, first, last, carried=blocks_of_virtual_ranks(virtual_ranks, world, rank)))
        # Only where a schedule moves them: the other cases keep the groups' first rates.
        rate = (lambda step: set_learning_rate(optimizer, case.optim, step, 12)) if case.optim != OPTIM else (lambda step: 0.05)
        losses += [pair for stats in loop(stepper, batches, order, first, last, rate=rate) for pair in stats.losses]
    return f"{weights_sha256(model)} {weights_sha256(ema.weights())} {losses}"


def tree_by_hand(case: TreeCase) -> str:
    """The same, synchronously: every virtual rank on a copy of its own, summed in the tree's order after all backward passes."""
    model = case.net()
    optimizer, ema = build_optimizer(model, OPTIM, "head"), Ema(model, 0.9)
    losses = []
    for step, batches in enumerate(batches_of(case.shape, *case.steps), start=case.steps[0]):
        set_trainable(model, case.freeze, step // order_of(case.shape).steps_per_epoch, lp_epochs=1, head_name="head")
        trained = [p for p in model.parameters() if p.requires_grad]
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        parts = []
        for batch in batches:
            if not len(batch.ids):
                parts.append(
                    [*map(torch.zeros_like, trained), *(torch.zeros_like(b) for m in norms for b in statistics(m)), torch.zeros(())]
                )
                continue
            own = copy.deepcopy(model)
            own_norms = [m for m in own.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
            if len(batch.ids) == 1:
                for norm in own_norms:
                    norm.eval()
            torch.manual_seed(step_seed(SEED, step, batch.virtual_rank))
            with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
                logits = own(PREPROCESS(batch.samples))
            loss = F.cross_entropy(logits.float(), batch.targets["label"], reduction="sum") / count_of(batches)
            own_trained = [p for p in own.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, own_trained, allow_unused=True)
            shares = [b * (len(batch.ids) / count_of(batches)) for m in own_norms for b in statistics(m)]
            known = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
            parts.append([*known, *shares, loss.detach()])
        sums = [tree_sum([part[index] for part in parts], lambda a, b: a + b) for index in range(len(parts[0]))]
        for parameter, gradient in zip(trained, sums, strict=False):
            parameter.grad = gradient
        for buffer, total in zip((b for m in norms for b in statistics(m)), sums[len(trained) : -1], strict=True):
            buffer.copy_(total)
        for norm in norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
        optimizer.step()
        ema.update()
        losses.append((step, sums[-1].item()))
    return f"{weights_sha256(model)} {weights_sha256(ema.weights())} {losses}"


def statistics(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.running_mean, norm.running_var]


# A small rate: what is compared differs in the order of additions, and larger steps through BatchNorm grow that (1.7e-3 of a weight in nine
# steps at 0.05 with torch 2.11).
DDP_OPTIM = replace(OPTIM, lr=0.005)
DDP_STOP = 9  # THREE has 7 steps an epoch; rank 1 of 2 carries virtual rank 2, which is empty in the last


def ddp_run(rank: int, freeze: Any = "none", **changes: Any) -> tuple[dict[str, Tensor], list[tuple[int, float]], list[int]]:
    order = order_of(THREE)
    config = RunConfig(
        model=ModelConfig(freeze=freeze, lp_epochs=1),
        optim=DDP_OPTIM,
        train=TrainConfig(seed=SEED, precision="fp32", virtual_ranks=3, reduction="ddp", **changes),
    )
    model = Net(seed=rank)  # DDP gives every rank the weights of rank 0
    optimizer = build_optimizer(model, DDP_OPTIM, "head")
    set_learning_rate(optimizer, DDP_OPTIM, 0, 1)
    losses: list[tuple[int, float]] = []
    sizes: list[int] = []
    for first, last in phases(config, 0, DDP_STOP, order.steps_per_epoch):
        set_trainable(model, freeze, first // order.steps_per_epoch, lp_epochs=1, head_name="head")
        stepper = learner_of(config, model, optimizer).stepper(world_size=2, rank=rank)
        batches = batches_of(THREE, first, last, carried=blocks_of_virtual_ranks(3, 2, rank))
        sizes += [count_of(step) for step in batches]
        for stats in loop(stepper, iter(batches), order, first, last, ranks_summed=True):
            losses += stats.losses
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses, sizes


def ddp_average(rank: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(loss, accuracy) of the averaged weights after three steps: over both ranks, and by this rank alone with its own statistics."""
    config = RunConfig(optim=OPTIM, train=TrainConfig(seed=SEED, precision="fp32", virtual_ranks=3, reduction="ddp"))
    model = Net()
    ema = Ema(model, 0.5)
    stepper = learner_of(config, model, build_optimizer(model, OPTIM, "head"), ema).stepper(world_size=2, rank=rank)
    for step in loop(
        stepper, iter(batches_of(THREE, 0, 3, carried=blocks_of_virtual_ranks(3, 2, rank))), order_of(THREE), 0, 3, ranks_summed=True
    ):
        assert step.samples == 333
    loader, dataset = loader_of(THREE)[0], open_dataset(SAMPLE)
    alone = evaluate(TASK, model, PREPROCESS, dataset, loader, ema=ema, precision="fp32")
    together = evaluate(TASK, model, PREPROCESS, dataset, loader, rank=rank, world_size=2, ema=ema, precision="fp32")
    return (together.loss, together.measures["accuracy"]), (alone.loss, alone.measures["accuracy"])


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/four", rank=rank, world_size=4)
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3, 4)}
    results: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.learn.gradients.COMPILER", "aot_eager")  # autograd as in a compiled model, without a C++ compiler
        for name, case in TREE_CASES.items():
            for world in case.worlds:
                if rank < world:
                    results[f"{name}, {world}"] = tree_run(case, world, rank, groups[world])
            if rank == 0 and case.is_plain:
                results[f"{name}, by hand"] = tree_by_hand(case)
    dist.barrier()
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
        results |= {"ddp": ddp_run(rank), "ddp again": ddp_run(rank), "ddp lp-ft": ddp_run(rank, "lp-ft")}
        results["ddp average"] = ddp_average(rank)
        results |= {"ddp bf16": ddp_run(rank, reduce_dtype="bf16"), "ddp micro-batches": ddp_run(rank, accumulate=3)}
        dist.barrier()
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four real processes computed, in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(rank_main, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name", TREE_CASES)
def test_the_tree_gives_the_same_weights_average_and_losses_for_any_number_of_workers(ranks: list[dict[str, Any]], name: str) -> None:
    alone = ranks[0][f"{name}, 1"]
    for world in TREE_CASES[name].worlds:
        assert [ranks[rank][f"{name}, {world}"] for rank in range(world)] == [alone] * world


@pytest.mark.parametrize("name", [name for name, case in TREE_CASES.items() if case.is_plain])
def test_what_runs_beside_the_backward_pass_is_what_a_synchronous_tree_gives(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0][f"{name}, 1"] == ranks[0][f"{name}, by hand"]


class Disabling(Net):
    """Computes a part in float32 whose backward pass autocast would touch."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        with torch.autocast("cpu", enabled=False):
            weight = F.linear(self.head.weight, torch.eye(32) * 1.37)
        return F.linear(features, weight, self.head.bias)


@pytest.mark.parametrize("net", [Net, Disabling])
@pytest.mark.parametrize("how", [{"virtual_ranks": 4}, {"accumulate": 3}, {"virtual_ranks": 4, "accumulate": 2}], ids=str)
def test_weights_that_are_cast_once_a_step_end_in_the_bits_of_those_cast_in_every_pass(
    how: dict[str, Any], net: type[Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> str:
        model = net()
        shape = (how.get("virtual_ranks", 1), 332)
        stepper = make(model, sgd(model), precision="bf16", **how)
        losses = [pair for stats in loop(stepper, iter(batches_of(shape, 4, 8)), order_of(shape), 4, 8) for pair in stats.losses]
        return f"{weights_sha256(model)} {losses}"

    once, entered = trained(), []
    monkeypatch.setattr(Passes, "weights_cast_once", lambda passes: entered.append(passes) or contextlib.nullcontext())
    assert trained() == once
    assert entered


def test_precision_shows_in_the_weights(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["four, 1"] != ranks[0]["four, bf16, 1"]


def ddp_reference(rank_blocks: Sequence[range], freeze: str = "none") -> tuple[nn.Module, list[float]]:
    """Gradients of the ranks' shares, each on a copy with its own BatchNorm batch, added up; one optimiser step."""
    model = Net()
    optimizer = build_optimizer(model, DDP_OPTIM, "head")
    set_learning_rate(optimizer, DDP_OPTIM, 0, 1)
    losses = []
    for step, batches in enumerate(batches_of(THREE, 0, DDP_STOP)):
        frozen = set_trainable(model, "lp-ft" if freeze == "lp-ft" else "none", step // 7, lp_epochs=1, head_name="head")
        total, trained = count_of(batches), [p for p in model.parameters() if p.requires_grad]
        sums, loss_total = [torch.zeros_like(p) for p in trained], 0.0
        for blocks in rank_blocks:
            own = [batches[v] for v in blocks if len(batches[v].ids)]
            if not own:
                continue
            torch.manual_seed(step_seed(SEED, step, blocks.start))
            images, labels = torch.cat([b.samples for b in own]), torch.cat([b.targets["label"] for b in own])
            replica = copy.deepcopy(model)
            loss = F.cross_entropy(replica(PREPROCESS(images)), labels, reduction="sum") / total
            for into, gradient in zip(sums, torch.autograd.grad(loss, [p for p in replica.parameters() if p.requires_grad]), strict=True):
                into += gradient
            loss_total += loss.item()
            if blocks.start == 0:  # rank 0's statistics are the run's
                for mine, theirs in zip(model.buffers(), replica.buffers(), strict=True):
                    mine.copy_(theirs)
        assert frozen == (freeze == "lp-ft" and step < 7)
        for parameter, gradient in zip(trained, sums, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss_total)
    return model, losses


@pytest.mark.parametrize(("case", "freeze"), [("ddp", "none"), ("ddp lp-ft", "lp-ft")])
def test_ddp_is_the_sum_of_the_ranks_gradients_also_where_a_rank_has_no_sample(ranks: list[dict[str, Any]], case: str, freeze: str) -> None:
    reference, losses = ddp_reference([range(2), range(2, 3)], freeze)
    assert ranks[0][case][2] == [222] * 6 + [2] + [222] * 2
    assert ranks[1][case][2] == [111] * 6 + [0] + [111] * 2
    for rank in (0, 1):
        state, seen, _ = ranks[rank][case]
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-3, atol=2e-5)
            assert torch.equal(state[name], ranks[0][case][0][name])
        assert [step for step, _ in seen] == list(range(DDP_STOP))
        assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-4)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(ranks[0][case][0][name], buffer, rtol=1e-3, atol=2e-5)


def test_ddp_gives_the_same_bits_again_for_the_same_number_of_workers(ranks: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        (first, first_losses, _), (second, second_losses, _) = ranks[rank]["ddp"], ranks[rank]["ddp again"]
        assert weights_sha256(first) == weights_sha256(second)
        assert first_losses == second_losses


def test_ddp_evaluates_the_average_that_rank_0_saves_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    (together, saved), (other, others) = ranks[0]["ddp average"], ranks[1]["ddp average"]
    assert together == other
    assert together == pytest.approx(saved, rel=1e-6)
    assert saved[0] != pytest.approx(others[0], rel=1e-6)  # the ranks' BatchNorm statistics differ


def test_sums_in_bf16_are_other_sums_but_for_the_loss_and_the_statistics_of_the_first_step() -> None:
    """The tree's own rounding is cluster.reduce's; here: what travels as it is."""
    (batches,) = batches_of(SEVEN, 0, 1)
    found = []
    for wire in (torch.float32, torch.bfloat16):
        model = Net(dropout=0.0)
        loss = make(model, sgd(model), reducer=TreeReducer([range(7)], 0, wire=wire)).step(batches, global_count=count_of(batches), step=0)
        found.append((loss, [b.clone() for b in model.buffers()], [p.grad for p in model.parameters()]))
    (loss, buffers, gradients), (other_loss, other_buffers, rounded) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(one, other) for one, other in zip(buffers, other_buffers, strict=True))
    for gradient, other in zip(gradients, rounded, strict=True):
        assert gradient is not None
        assert other is not None
        assert torch.equal(other, other.bfloat16().float())
        # Four roundings at most, each by 2**-9 of a partial sum.
        torch.testing.assert_close(other, gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max()))
    assert not all(torch.equal(one, other) for one, other in zip(gradients, rounded, strict=True))


@pytest.mark.parametrize("name", ["ddp bf16", "ddp micro-batches"])
def test_ddp_in_bf16_or_micro_batches_is_the_same_training_but_for_rounding(ranks: list[dict[str, Any]], name: str) -> None:
    weights, losses, _ = ranks[0][name]
    other, _, _ = ranks[1][name]
    plain, plain_losses, _ = ranks[0]["ddp"]
    trained = [key for key in weights if "running" not in key and "tracked" not in key]
    assert all(torch.equal(weights[key], other[key]) for key in trained)  # the ranks hold the same
    assert not all(torch.equal(weights[key], plain[key]) for key in trained)
    assert [step for step, _ in losses] == [step for step, _ in plain_losses]
    for (_, loss), (_, wanted) in zip(losses, plain_losses, strict=True):
        assert loss == pytest.approx(wanted, rel=0.1)


# --- micro-batches --------------------------------------------------------------------------------------------------------------------


def by_hand_in_parts(model: nn.Module, batch: Batch, total: int, step: int, parts: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(gradients, BatchNorm statistics, loss) of one virtual rank: its micro-batches one after the other through the same copy."""
    own = copy.deepcopy(model)
    torch.manual_seed(step_seed(SEED, step, batch.virtual_rank))
    losses = []
    for images, labels in zip(batch.samples.tensor_split(parts), batch.targets["label"].tensor_split(parts), strict=True):
        loss = F.cross_entropy(own(PREPROCESS(images)), labels, reduction="sum") / total
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in own.parameters()]
    return gradients, [b for b in own.buffers() if b.is_floating_point()], sum(losses[1:], losses[0])


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("virtual_ranks", [1, 3])
def test_micro_batches_add_up_inside_each_virtual_rank_before_the_tree(virtual_ranks: int, parts: int) -> None:
    model = Net()
    stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, accumulate=parts)
    for step, batches in enumerate(batches_of((virtual_ranks, 90), 0, 3)):
        shares = [by_hand_in_parts(model, batch, 90, step, parts) for batch in batches]
        loss = stepper.step(batches, global_count=90, step=step)
        for parameter, wanted in zip(model.parameters(), zip(*(gradients for gradients, _, _ in shares), strict=True), strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, tree_sum(wanted, lambda a, b: a + b))
        assert loss.item() == tree_sum([loss for _, _, loss in shares], lambda a, b: a + b).item()
        floating = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        statistics = zip(*(buffers for _, buffers, _ in shares), strict=True)
        weights = [len(batch.ids) / 90 for batch in batches]
        for buffer, own in zip(floating, statistics, strict=True):
            weighted = [b * weight if virtual_ranks > 1 else b for b, weight in zip(own, weights, strict=True)]
            assert torch.equal(buffer, tree_sum(weighted, lambda a, b: a + b))


class TwoHeads(Classification):
    """Prepares a second target, and notes what comes to its parts."""

    def __init__(self) -> None:
        super().__init__(TaskConfig(), TASK.targets)
        self.prepared: list[int] = []
        self.met: list[int] = []

    def prepare(self, samples: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        self.prepared.append(len(samples))
        return samples, {**targets, "twice": torch.stack([targets[LABEL], 2 * targets[LABEL]], 1)}

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        assert targets["twice"].tolist() == [[label, 2 * label] for label in targets[LABEL].tolist()]
        self.met.append(len(outputs))
        return super().loss_sum(outputs, targets)


@pytest.mark.parametrize(("virtual_ranks", "tree", "met"), [(1, False, [30, 30, 30]), (3, False, [30, 30, 30]), (3, True, [10] * 9)])
def test_each_virtual_rank_is_prepared_whole_and_all_its_targets_are_cut_alike(virtual_ranks: int, tree: bool, met: list[int]) -> None:
    task, model, plain = TwoHeads(), Net(), Net()
    reducer = TreeReducer([range(virtual_ranks)], 0) if tree else None
    (batches,) = batches_of((virtual_ranks, 90), 0, 1)
    stepper = make(model, sgd(model), reducer=reducer, task=task, accumulate=3)
    loss = stepper.step(batches, global_count=90, step=0)
    assert task.prepared == [90 // virtual_ranks] * virtual_ranks
    assert task.met == met
    wanted = make(plain, sgd(plain), reducer=TreeReducer([range(virtual_ranks)], 0) if tree else None, accumulate=3)
    assert torch.equal(loss, wanted.step(batches, global_count=90, step=0))
    assert same_bits(model, plain)


@pytest.mark.parametrize("virtual_ranks", [1, 4])
def test_without_statistics_micro_batches_are_the_same_step_but_for_rounding(virtual_ranks: int) -> None:
    gradients = []
    for parts in (1, 5):
        model = Net(norm=False, dropout=0.0)
        (batches,) = batches_of((virtual_ranks, 40), 0, 1)
        loss = make(model, sgd(model), virtual_ranks=virtual_ranks, accumulate=parts).step(batches, global_count=40, step=0)
        gradients.append([loss, *(p.grad for p in model.parameters())])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def test_a_short_batch_has_fewer_micro_batches_than_asked_for_and_counts_in_full() -> None:
    order, (batches,) = order_of(SEVEN), batches_of(SEVEN, order_of(SEVEN).steps_per_epoch - 1, order_of(SEVEN).steps_per_epoch)
    grads = []
    for parts in (1, 4):
        model = Net(norm=False, dropout=0.0)
        make(model, sgd(model), virtual_ranks=7, accumulate=parts).step(batches, global_count=count_of(batches), step=0)
        grads.append([p.grad for p in model.parameters()])
    assert count_of(batches) == order.batch_count(order.steps_per_epoch - 1) == 5
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def test_a_parameter_that_only_an_early_micro_batch_uses_is_not_forgotten() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.always = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)
            self.calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            colours = images.mean((2, 3))
            logits: Tensor = self.always(colours)
            return logits + self.first(colours) if self.calls % 2 else logits

    torch.manual_seed(0)
    model = Moody()
    (batches,) = batches_of((2, 40), 0, 1)
    make(model, sgd(model), virtual_ranks=2, accumulate=2).step(batches, global_count=40, step=0)
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.abs().max() > 0


# --- compiled -------------------------------------------------------------------------------------------------------------------------


def as_it_is(seen: list[int]) -> Any:
    """A compiler that leaves the graph as it is and notes the number of images of each that it is given."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        seen.append(next(len(tensor) for tensor in inputs if isinstance(tensor, Tensor) and tensor.shape[-1:] == (28,)))
        return graph.forward

    return compiler


@pytest.mark.parametrize("virtual_ranks", [1, 4])
@pytest.mark.parametrize("full_only", [True, False])
def test_full_batches_are_compiled_once_and_short_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, virtual_ranks: int, full_only: bool
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("trainer.learn.gradients.COMPILER", as_it_is(seen))
    torch._dynamo.reset()
    shape = (virtual_ranks, 332)  # step 6 of 7 is short
    full = 332 // virtual_ranks
    model, eager = Net(dropout=0.0), Net(dropout=0.0)
    stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, compile_model=True, full_batches=(full,) if full_only else ())
    order = order_of(shape)
    assert (stepper.compile_ahead((3, 28, 28)) > 0) == full_only
    assert seen == ([full] if full_only else [])
    for each, other in zip(
        loop(stepper, iter(batches_of(shape, 4, 9)), order, 4, 9),
        loop(make(eager, sgd(eager), virtual_ranks=virtual_ranks), iter(batches_of(shape, 4, 9)), order, 4, 9),
        strict=True,
    ):
        assert each.losses == other.losses
    assert same_bits(model, eager)
    assert seen == ([full] if full_only else [full, 8 // virtual_ranks])  # dynamic=False: a graph each, none for "any size"


@pytest.mark.parametrize(
    ("virtual_ranks", "accumulate", "sizes"),
    [(1, 1, [16, 17]), (4, 1, [4, 5]), (1, 3, [5, 6]), (4, 4, [2])],  # 50 images in 3 steps, of up to 24
)
def test_both_sizes_of_a_spread_remainder_are_compiled_ahead_and_no_other(
    monkeypatch: pytest.MonkeyPatch, virtual_ranks: int, accumulate: int, sizes: list[int]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("trainer.learn.gradients.COMPILER", as_it_is(seen))
    torch._dynamo.reset()
    order = Order(seed=SEED, fingerprint="", count=50, batch_size=24, virtual_ranks=virtual_ranks, spread=True)
    train = TrainConfig(virtual_ranks=virtual_ranks, accumulate=accumulate, compile=True, precision="fp32")
    model = Net(dropout=0.0)
    stepper = learner_of(RunConfig(data=DataConfig(batch_size=24), optim=OPTIM, train=train), model, sgd(model)).stepper(order=order)
    assert stepper.compile_ahead((3, 28, 28)) > 0
    assert seen == sizes
    every = range(virtual_ranks)
    parts = [range(rank, rank + 1) for rank in every] if virtual_ranks > 1 else [every]
    taken = {size for part in parts for size in order.batch_sizes(part)}
    assert {len(few) for size in taken for few in torch.zeros(size).tensor_split(accumulate)} - {1} == set(sizes)


@pytest.mark.parametrize("virtual_ranks", [1, 4])
def test_augmented_batches_meet_the_graph_that_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch, virtual_ranks: int) -> None:
    """Crops of another size than the images', a share and partners' targets: the same shapes in every step."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("trainer.learn.gradients.COMPILER", compiler)
    torch._dynamo.reset()
    model, eager = Net(dropout=0.0), Net(dropout=0.0)
    on: dict[str, Any] = {"views": make_views(EVERYTHING, seed=SEED, image_size=24), "mix": Mix(seed=SEED, mixup=0.4, cutmix=1.0)}
    shape = (virtual_ranks, 40)
    compiled = make(model, sgd(model), virtual_ranks=virtual_ranks, compile_model=True, full_batches=(40 // virtual_ranks,), **on)
    assert compiled.compile_ahead((3, 28, 28)) > 0
    ahead = len(graphs)
    plain = make(eager, sgd(eager), virtual_ranks=virtual_ranks, **on)
    for step, batches in enumerate(batches_of(shape, 0, 3)):
        losses = [stepper.step(batches, global_count=40, step=step) for stepper in (compiled, plain)]
        assert torch.equal(*losses)
    assert len(graphs) == ahead > 0
    assert same_bits(model, eager)


@pytest.mark.parametrize("virtual_ranks", [1, 4])
def test_compiling_ahead_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, virtual_ranks: int) -> None:
    monkeypatch.setattr("trainer.learn.gradients.COMPILER", as_it_is([]))
    torch._dynamo.reset()
    shape = (virtual_ranks, 40)
    model, other = Net(), Net()
    optimizer = sgd(model)
    stepper = make(model, optimizer, virtual_ranks=virtual_ranks, compile_model=True, full_batches=(40 // virtual_ranks,))
    state = torch.get_rng_state()
    before = weights_sha256(model)
    assert stepper.compile_ahead((3, 28, 28)) > 0
    assert weights_sha256(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state
    late = make(other, sgd(other), virtual_ranks=virtual_ranks, compile_model=True, full_batches=(40 // virtual_ranks,))
    for one in (stepper, late):
        for _ in loop(one, iter(batches_of(shape, 0, 2)), order_of(shape), 0, 2):
            pass
    assert same_bits(model, other)


def test_nothing_is_compiled_ahead_where_nothing_is_compiled() -> None:
    model = Net()
    assert make(model, sgd(model), full_batches=(40,)).compile_ahead((3, 28, 28)) == 0.0


class Perceptron(nn.Module):
    """Two products and what lies between them: quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("way", "parts"),
    [("plain", {"virtual_ranks": 1}), ("tree", {"virtual_ranks": 2}), ("ddp", {"virtual_ranks": 1, "distributed": True})],
)
def test_inductor_chooses_nothing_by_timing_on_any_way_to_a_compiled_step(
    monkeypatch: pytest.MonkeyPatch, way: str, parts: dict[str, Any]
) -> None:
    """The real compiler, up to where it would generate code; forward and backward."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx, config

    seen: list[tuple[bool, bool]] = []

    def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Any], region: str | None = None, **how: Any) -> Any:
        seen.append((how["is_backward"], config.deterministic))
        return make_boxed_func(graph.forward)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", compiled)
    torch._dynamo.reset()
    model = Perceptron()
    (batches,) = batches_of((parts["virtual_ranks"], 40), 0, 1)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        make(model, sgd(model), compile_model=True, **parts).step(batches, global_count=40, step=0)
    assert set(seen) == {(False, True), (True, True)}
    assert not config.deterministic  # only inside


def test_replaying_kernels_is_another_option_than_the_same_bits() -> None:
    assert PassConfig(seed=0, compile_model=True).compiler_options == {"deterministic": True}
    graphs = PassConfig(seed=0, compile_model=True, cuda_graphs=True)
    assert graphs.compiler_options == {"deterministic": True, "triton.cudagraphs": True}


COMPILED_RUN = """
    import json, torch
    from torch._dynamo.utils import counters
    from tests.trainer.test_step import batches_of, loop, make, order_of, sgd
    from trainer.learn.state import weights_sha256

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape, model = (1, 40), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 28 * 28, 10))
    stepper = make(model, sgd(model), compile_model=True, full_batches=(40,))
    seconds = stepper.compile_ahead((3, 28, 28))
    for _ in loop(stepper, iter(batches_of(shape, 0, 3)), order_of(shape), 0, 3):
        pass
    found = {"sha": weights_sha256(model), "seconds": seconds}
    found["from_disk"] = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps(found))
"""


def test_a_second_process_takes_its_compiled_step_from_disk_and_gets_the_same_bits(tmp_path: Path) -> None:
    """The real compiler."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    runs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COMPILED_RUN)],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    cold, warm = runs
    assert cold["from_disk"] == 0 < warm["from_disk"]
    assert cold["sha"] == warm["sha"]
