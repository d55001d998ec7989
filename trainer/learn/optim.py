"""Parameter groups, optimiser, schedule, freezing and clipping. Called by `trainer.learn.build`.

Everything here is a pure function of its arguments, or works on the device without waiting for it. `trainer.learn.update` defines the order
of operations in a step; `trainer.learn.ema` keeps the moving average.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.learn.cpu_optim import CpuAdamW, CpuSGD
from trainer.learn.one_cycle import one_cycle_momentum, one_cycle_rate
from trainer.models.adapters import resting
from trainer.settings.tree import Freeze, OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The backbone's learning rate at a step: linear warm-up to `config.lr`, then the schedule.

    With w = `warmup_of(total_steps)`, the rate at step s < w is lr (s + 1) / w, so that step w - 1 has the peak (step 0 if w = 0). From
    there to step `total_steps` - 1 it falls to lr * `final_lr_fraction` along a half cosine (`cosine`) or a straight line (`triangular`),
    or stays at the peak (`constant`). trainer.learn.one_cycle has the schedule `one-cycle`.
    """
    if config.schedule == "one-cycle":
        return one_cycle_rate(config, step, total_steps)
    warmup, last = config.warmup_of(total_steps), total_steps - 1
    if step < warmup:
        return config.lr * (step + 1) / warmup
    peak = max(warmup - 1, 0)
    if config.schedule == "constant" or last <= peak:
        return config.lr
    progress = min((step - peak) / (last - peak), 1.0)
    match config.schedule:
        case "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        case "triangular":
            remaining = 1 - progress
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int) -> float:
    """Set every group's rate for `step`, and its momentum if the schedule moves that. Returns the rate of the backbone's last block."""
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    if config.schedule == "one-cycle" and config.momentum:
        set_momentum(optimizer, one_cycle_momentum(config, step, total_steps))
    return rate


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set SGD's momentum, or AdamW's first beta, of every group."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def parameter_groups(
    model: nn.Module, config: OptimConfig, head_name: str, depths: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Up to four groups: backbone and head, each with and without weight decay. They hold all parameters, including frozen ones, but not
    those that rest beside adapters (trainer.models.adapters). With `depths` (trainer.learn.depth) the backbone has up to two for each
    depth, and `config.layer_decay` makes earlier ones learn slower: a block's rate is the next one's times it. The head keeps its own rate.

    Vectors and scalars (biases, normalisation, layer scales) do not decay unless `decay_all`.
    """
    depths = depths or {}
    last = max((depth for name, depth in depths.items() if not name.startswith(f"{head_name}.")), default=0)
    parts: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    rest = resting(model)
    for name, parameter in model.named_parameters():
        if name in rest:
            continue
        in_head = name.startswith(f"{head_name}.")
        decays = config.decay_all or parameter.ndim > 1
        parts.setdefault((in_head, 0 if in_head or not depths else depths[name], not decays), []).append(parameter)
    return [
        {
            "params": parts[in_head, depth, is_spared],
            "weight_decay": 0.0 if is_spared else config.weight_decay,
            "lr": config.lr,
            "lr_factor": config.head_lr_factor if in_head else config.layer_decay ** (last - depth),
        }
        for in_head, depth, is_spared in sorted(parts)
    ]


def build_optimizer(
    model: nn.Module, config: OptimConfig, head_name: str, depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters: fused on a GPU, in blocks on a CPU (trainer.learn.cpu_optim). Build it after the model is on its
    device. `depths`: of all parameters, if `config.layer_decay` is not 1.

    A frozen parameter has no gradient, so it is not stepped. It keeps its place, so that the layout does not change when it thaws.
    """
    assert not config.nesterov or (config.name == "sgd" and config.momentum > 0), "trainer.settings.rules has refused this"
    groups = parameter_groups(model, config, head_name, depths)
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    betas = (config.momentum, 0.999)
    match config.name:
        case "sgd" if on_gpu:
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        case "sgd":
            return CpuSGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        case "adamw" if on_gpu:
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        case "adamw":
            return CpuAdamW(groups, lr=config.lr, betas=betas)


def set_trainable(model: nn.Module, freeze: Freeze, epoch: int, *, lp_epochs: int, head_name: str) -> bool:
    """Put the model into the training mode for `epoch`. Returns whether the backbone is frozen in it.

    A frozen backbone has no gradient and runs in eval mode, so that BatchNorm keeps the pretrained statistics; only the head trains.
    `lp-ft` (Kumar et al. 2022) freezes the backbone for the first `lp_epochs` epochs. Of a backbone with adapters these alone are trained.
    """
    frozen = freeze == "backbone" or (freeze == "lp-ft" and epoch < lp_epochs)
    model.train(not frozen)
    model.get_submodule(head_name).train()
    rest = resting(model)
    for name, parameter in model.named_parameters():
        trains = (not frozen and name not in rest) or name.startswith(f"{head_name}.")
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    return frozen


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their joint L2 norm is at most `max_norm`. Returns the norm before, () on the device, without waiting."""
    return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)
