"""What moves the weights: loss, parameter groups, optimiser, schedule, freezing, clipping, moving average. Called by `trainer.rank.worker`.

Everything here is a pure function of its arguments or works on the device without waiting for it. The step itself is
`trainer.learn.step`'s.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.learn.cpu_optim import BlockedAdamW, BlockedSGD
from trainer.settings.tree import Freeze, OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The backbone's learning rate at a step: linear warm-up to `config.lr`, then the schedule.

    The rate at step s < w = `warmup_steps` is lr (s + 1) / w, so that step w - 1 has the peak (step 0 where w = 0). From there to step
    `total_steps` - 1 it falls to lr * `final_lr_fraction`, by a half cosine (`cosine`) or a straight line (`triangular`), or stays.
    """
    warmup, last = config.warmup_steps, total_steps - 1
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
    """Give every group its rate for `step`; the backbone's is returned."""
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    return rate


def parameter_groups(model: nn.Module, config: OptimConfig, head_name: str) -> list[dict[str, Any]]:
    """Up to four groups: backbone and head, each with and without weight decay. All parameters are in, frozen ones too.

    Vectors and scalars (biases, normalisation, layer scales) do not decay unless `decay_all`.
    """
    parts: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_head = name.startswith(f"{head_name}.")
        decays = config.decay_all or parameter.ndim > 1
        parts.setdefault((in_head, decays), []).append(parameter)
    return [
        {
            "params": parts[in_head, decays],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.lr,
            "lr_factor": config.head_lr_factor if in_head else 1.0,
        }
        for in_head, decays in sorted(parts, key=lambda key: (key[0], not key[1]))
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, head_name: str) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters, fused on a GPU, in blocks on a CPU (trainer.learn.cpu_optim). Build it after the model is on its
    device.

    A frozen parameter has no gradient and is not stepped; it keeps its place, so that the layout does not change when it thaws.
    """
    assert not config.nesterov or (config.name == "sgd" and config.momentum > 0), "trainer.settings.rules has refused this"
    groups = parameter_groups(model, config, head_name)
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    betas = (config.momentum, 0.999)
    match config.name:
        case "sgd" if on_gpu:
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        case "sgd":
            return BlockedSGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        case "adamw" if on_gpu:
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        case "adamw":
            return BlockedAdamW(groups, lr=config.lr, betas=betas)


def set_trainable(model: nn.Module, freeze: Freeze, epoch: int, *, lp_epochs: int, head_name: str) -> bool:
    """Put the model into the training mode that `epoch` calls for; whether the backbone is frozen in it.

    A frozen backbone takes no gradient and runs in eval mode, so that BatchNorm keeps the pretrained statistics; only the head trains.
    `lp-ft` (Kumar et al. 2022) freezes it for the first `lp_epochs` epochs. Call it at each epoch's start and after evaluating.
    """
    frozen = freeze == "backbone" or (freeze == "lp-ft" and epoch < lp_epochs)
    model.train(not frozen)
    model.get_submodule(head_name).train()
    for name, parameter in model.named_parameters():
        trains = not frozen or name.startswith(f"{head_name}.")
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    return frozen


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their joint L2 norm is at most `max_norm`; the norm before, () on the device, not waited for."""
    return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)


class Ema:
    """An exponential moving average of a model's parameters and BatchNorm statistics; integer buffers are copied.

    The decay of update t = 0, 1, ... is min(`decay`, (1 + t) / (10 + t)): the random head of the start is soon forgotten, however short the
    run. Build it after the model is on its device; `state()` is what a checkpoint holds.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"train.ema={decay} must be above 0 and below 1; 0 has no average")
        self._decay = decay
        self._updates = torch.zeros((), dtype=torch.int64)  # on the host: the decay is a host number
        self._live = _state_tensors(model)
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._floating = ([self._average[name] for name in floating], [self._live[name] for name in floating])
        others = [name for name in self._live if name not in set(floating)]
        self._others = ([self._average[name] for name in others], [self._live[name] for name in others])

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is now."""
        count = int(self._updates)
        decay = min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(*self._floating, 1 - decay)
        if self._others[0]:
            torch._foreach_copy_(*self._others)
        self._updates += 1

    def weights(self) -> Mapping[str, Tensor]:
        """The averaged state_dict; its tensors change with the next update."""
        return self._average

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold: the average and the number of updates, by reference."""
        return {**self._average, "ema_updates": self._updates}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside, and its own weights again afterwards."""
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in self._live.items()}
            _copy(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(self._live, own)


def _state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict's tensors themselves: training changes them in place."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _copy(into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(source[name])
