"""The one-cycle schedule is PyTorch's, rates and momentum, and the optimisers of the CPU follow it."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.learn.one_cycle import one_cycle_momentum
from trainer.learn.optim import build_optimizer, learning_rate, set_learning_rate
from trainer.settings.rules import validate
from trainer.settings.tree import OptimConfig, RunConfig


def torchs(config: OptimConfig, total: int, share: float) -> list[tuple[float, float]]:
    """(rate, momentum) of each step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    final = config.final_lr_fraction
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=total, pct_start=share, div_factor=25,
        final_div_factor=1 / (25 * final) if final else float("inf"), base_momentum=0.85, max_momentum=0.95,
    )  # fmt: skip
    found = []
    for _ in range(total):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step() if len(found) < total else None
    return found


@given(total=st.integers(20, 300), share=st.sampled_from([0.1, 0.3, 0.5]), final=st.sampled_from([0.0, 1e-4, 0.1]), by=st.booleans())
@settings(max_examples=20, deadline=None)
def test_rates_and_momentum_are_those_of_torchs_onecyclelr(total: int, share: float, final: float, by: bool) -> None:
    share = 0.3 if by else round(share * total) / total  # warm-up counts whole steps; without one the default's 0.3 need not be whole
    config = OptimConfig(lr=0.4, momentum=0.95, schedule="one-cycle", final_lr_fraction=final, warmup_fraction=0.0 if by else share)
    ours = [(learning_rate(config, step, total), one_cycle_momentum(config, step, total)) for step in range(total)]
    assert ours == [pytest.approx(pair, rel=1e-9, abs=1e-12) for pair in torchs(config, total, share)]


@given(total=st.integers(1, 9), warmup=st.integers(0, 12))
def test_a_run_of_a_few_steps_has_rates_between_nothing_and_the_peak(total: int, warmup: int) -> None:
    config = OptimConfig(lr=0.4, schedule="one-cycle", warmup_steps=warmup)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert all(0 <= rate <= 0.4 for rate in rates)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_and_state_are_those_of_torchs_optimiser_under_torchs_schedule(name: Any) -> None:
    """The optimisers in blocks, with a momentum that changes at every step."""
    total, config = 12, OptimConfig(name=name, lr=0.1, momentum=0.95, weight_decay=0.0, schedule="one-cycle")
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    model = nn.Module()
    model.register_parameter("head", ours)
    mine = build_optimizer(model, config, "head")
    reference: torch.optim.Optimizer = (
        torch.optim.SGD([theirs], lr=0.1, momentum=0.95) if name == "sgd" else torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    )
    for step, (rate, momentum) in enumerate(torchs(config, total, 0.3)):
        set_learning_rate(mine, config, step, total)
        group = reference.param_groups[0]
        group["lr"] = rate
        group.update({"momentum": momentum} if name == "sgd" else {"betas": (momentum, 0.999)})
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours, torch.linspace(-1, 1, 50))


def test_without_momentum_there_is_none_to_move() -> None:
    config = OptimConfig(momentum=0.0, schedule="one-cycle")
    optimizer = build_optimizer(nn.Linear(2, 2), config, "head")
    set_learning_rate(optimizer, config, 5, 10)
    assert optimizer.param_groups[0]["momentum"] == 0


def test_it_is_a_choice_like_the_others_and_rises_once_and_falls_once() -> None:
    config = OptimConfig(schedule="one-cycle", lr=1.0)
    validate(RunConfig(optim=config))
    rates = [learning_rate(config, step, 100) for step in range(100)]
    turns = [b > a for a, b in itertools.pairwise(rates)]
    assert sorted(turns, reverse=True) == turns
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0)
