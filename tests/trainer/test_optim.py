"""Schedules, groups, freezing, clipping and averaging do what their formulas say."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.learn.ema import Ema
from trainer.learn.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    set_trainable,
)
from trainer.settings.tree import OptimConfig
from trainer.tasks.losses import cross_entropy_sum

HEAD = "3"


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, ema: Ema | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy_sum(model(torch.randn(8, 3, 4, 4)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()
        if ema is not None:
            ema.update()


# -- loss -----------------------------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 8), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_loss_is_a_sum_over_labelled_samples_so_that_parts_add_up(n: int, smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(n, 5, generator=generator), torch.randint(-1, 5, (n,), generator=generator)
    parts = [cross_entropy_sum(logits[i : i + 1], labels[i : i + 1], smoothing) for i in range(n)]
    assert cross_entropy_sum(logits, labels, smoothing).item() == pytest.approx(sum(float(part) for part in parts), abs=1e-5)
    assert all(float(part) == 0 for part, label in zip(parts, labels, strict=True) if label == -1)


def test_a_batch_without_samples_has_zero_loss_and_finite_gradients() -> None:
    for logits, labels in (
        (torch.zeros(0, 5, requires_grad=True), torch.zeros(0).long()),
        (torch.zeros(2, 5, requires_grad=True), torch.tensor([-1, -1])),
    ):
        loss = cross_entropy_sum(logits, labels, 0.1)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()


# -- schedule -------------------------------------------------------------------------------------------------------------------------

SCHEDULES = st.builds(
    OptimConfig,
    lr=st.floats(1e-5, 10),
    schedule=st.sampled_from(["constant", "cosine", "triangular"]),
    warmup_steps=st.integers(0, 50),
    final_lr_fraction=st.floats(0, 1),
)


@given(config=SCHEDULES, total=st.integers(1, 200))
def test_schedules_rise_to_the_peak_and_fall_to_the_final_rate(config: OptimConfig, total: int) -> None:
    rates = [learning_rate(config, step, total) for step in range(total)]
    peak = max(config.warmup_steps - 1, 0)
    slack = 1 + 1e-9
    assert all(0 <= rate <= config.lr * slack for rate in rates)
    assert all(a <= b * slack for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a * slack >= b for a, b in itertools.pairwise(rates[peak:]))
    if peak < total:
        assert rates[peak] == pytest.approx(config.lr)
    if config.warmup_steps:
        assert rates[0] == pytest.approx(config.lr / config.warmup_steps)
    if peak < total - 1:
        final = config.lr if config.schedule == "constant" else config.lr * config.final_lr_fraction
        assert rates[-1] == pytest.approx(final, abs=1e-12)


def test_schedules_have_their_shapes() -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert [learning_rate(cosine, step, 5) for step in range(5)] == pytest.approx(
        [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0]
    )
    triangular = OptimConfig(lr=1.0, schedule="triangular", warmup_steps=3, final_lr_fraction=0.1)
    assert [learning_rate(triangular, step, 6) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.7, 0.4, 0.1])
    constant = OptimConfig(lr=1.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(constant, step, 4) for step in range(4)] == [0.5, 1, 1, 1]


def test_the_head_learns_faster_by_its_factor_at_every_step() -> None:
    config = OptimConfig(lr=0.1, head_lr_factor=5)
    optimizer = build_optimizer(small_model(), config, HEAD)
    for step in (0, 3, 9):
        rate = set_learning_rate(optimizer, config, step, 10)
        assert rate == learning_rate(config, step, 10)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate, 5 * rate, 5 * rate]


# -- groups and optimisers ------------------------------------------------------------------------------------------------------------


def names_by_group(model: nn.Module, config: OptimConfig) -> list[tuple[set[str], float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in parameter_groups(model, config, HEAD)]


def test_weight_decay_spares_biases_and_norms_unless_told_otherwise() -> None:
    model, config = small_model(), OptimConfig(weight_decay=0.1)
    assert names_by_group(model, config) == [
        ({"0.weight"}, 0.1),
        ({"0.bias", "1.weight", "1.bias"}, 0.0),
        ({"3.weight"}, 0.1),
        ({"3.bias"}, 0.0),
    ]
    assert names_by_group(model, replace(config, decay_all=True)) == [
        ({"0.weight", "0.bias", "1.weight", "1.bias"}, 0.1),
        ({"3.weight", "3.bias"}, 0.1),
    ]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            OptimConfig(name="sgd", lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01, decay_all=True),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        ),
        (
            OptimConfig(name="adamw", lr=0.01, momentum=0.8, weight_decay=0.05, decay_all=True),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.999), weight_decay=0.05),
        ),
    ],
)
def test_optimisers_are_torchs_to_the_bit(config: OptimConfig, reference: Any) -> None:
    ours, theirs = small_model(), small_model()
    for model, optimizer in ((ours, build_optimizer(ours, config, HEAD)), (theirs, reference(theirs.parameters()))):
        torch.manual_seed(1)
        train(model, optimizer, 5)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# -- freezing -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "epoch", "frozen"), [("none", 0, False), ("backbone", 7, True), ("lp-ft", 1, True), ("lp-ft", 2, False)]
)
def test_a_frozen_backbone_keeps_every_bit_and_a_free_one_does_not(freeze: Any, epoch: int, frozen: bool) -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1), HEAD)
    train(model, optimizer, 1)  # leaves gradients and momentum behind
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set_trainable(model, freeze, epoch, lp_epochs=2, head_name=HEAD) is frozen
    train(model, optimizer, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (frozen and not name.startswith(HEAD)), name
    assert model[3].training
    assert model[1].training is not frozen


def test_lp_ft_thaws_with_the_layout_it_began_with() -> None:
    model = small_model()
    set_trainable(model, "lp-ft", 0, lp_epochs=1, head_name=HEAD)
    optimizer = build_optimizer(model, OptimConfig(), HEAD)
    train(model, optimizer, 1)
    assert not set_trainable(model, "lp-ft", 1, lp_epochs=1, head_name=HEAD)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


# -- clipping -------------------------------------------------------------------------------------------------------------------------


@given(scale=st.floats(1e-3, 1e3), limit=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_clipping_bounds_the_joint_norm_and_keeps_the_direction(scale: float, limit: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    gradients = [torch.tensor([1.0, -2.0, 3.0]) * scale, torch.ones(2, 2) * scale]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = math.sqrt(18) * scale
    assert clip_gradients(parameters, limit).item() == pytest.approx(norm, rel=1e-5)
    factor = min(1.0, limit / norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient * factor, rtol=1e-4)


# -- average --------------------------------------------------------------------------------------------------------------------------


def test_ema_equals_the_slow_recursion_for_weights_and_statistics() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1), HEAD)
    ema, decay = Ema(model, 0.3), 0.3
    slow = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(6):
        train(model, optimizer, 1, ema)
        now = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            slow[name] = now * slow[name] + (1 - now) * tensor.double() if tensor.is_floating_point() else tensor.clone()
    assert int(ema.weights()["1.num_batches_tracked"]) == 6
    for name, tensor in ema.weights().items():
        assert torch.allclose(tensor.double(), slow[name].double(), atol=1e-6), name
        assert tensor.dtype == model.state_dict()[name].dtype


def test_applied_shows_the_average_and_gives_the_weights_back_even_after_an_error() -> None:
    model = small_model()
    ema = Ema(model, 0.5)
    train(model, build_optimizer(model, OptimConfig(lr=0.1), HEAD), 3, ema)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def inside() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with ema.applied():
        shown = inside()
    assert all(torch.equal(shown[name], tensor) for name, tensor in ema.weights().items())
    assert not torch.equal(shown["0.weight"], own["0.weight"])
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in inside().items())


@pytest.mark.parametrize("decay", [-0.1, 0.0, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"train\.ema={decay}"):
        Ema(small_model(), decay)
