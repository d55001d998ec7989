"""A moving average of the weights (`train.ema`). `trainer.learn.build` makes it, `trainer.learn.update` updates it in each step, and the
rank evaluates, saves and exports it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a model's parameters and BatchNorm statistics. Integer buffers are copied.

    Update t = 0, 1, ... has the decay min(`decay`, (1 + t) / (10 + t)), so that even a short run soon forgets the random head that it began
    with. Build it after the model is on its device. A checkpoint holds `state()`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"train.ema={decay} must be above 0 and below 1; 0 has no average")
        self._decay = decay
        self._updates = torch.zeros((), dtype=torch.int64)  # () on the host, because the decay is computed there
        self._live = _state_tensors(model)
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        self._floating = ([self._average[name] for name in floating], [self._live[name] for name in floating])
        others = [name for name in self._live if name not in set(floating)]
        self._others = ([self._average[name] for name in others], [self._live[name] for name in others])

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the model's present weights."""
        count = int(self._updates)
        decay = min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(*self._floating, 1 - decay)
        if self._others[0]:
            torch._foreach_copy_(*self._others)
        self._updates += 1

    def weights(self) -> Mapping[str, Tensor]:
        """The averaged state_dict. Its tensors change with the next update."""
        return self._average

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the average and the number of updates, by reference."""
        return {**self._average, "ema_updates": self._updates}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the model holds the average, afterwards its own weights again."""
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
