"""The weights of the best evaluation: rank 0 holds them, checkpoints carry them. worker.py makes it, saving.py and final.py use it.

Which evaluation is the best is a pure function of the history (trainer.runs.choice). An evaluation is always followed by a checkpoint of
the same step, and that one holds the weights anyway: its own model, or the average of the weights. Every later checkpoint carries them in
`best.safetensors`, until a better evaluation. So a checkpoint stands for itself: whichever one a run goes on from has the weights of the
choice that its history makes, and no other checkpoint has to be kept for them, or to be intact.

The step path pays nothing for it: the bytes are kept, and written again, in the checkpoint's thread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from trainer.learn.state import EMA_FILE, MODEL_FILE, StateError
from trainer.runs.choice import Entry, Rule, choose

BEST_FILE = "best.safetensors"


class BestWeights:
    """See the module. `rule` keeps the best; `is_averaged`: the run evaluates and exports the average of its weights."""

    def __init__(self, rule: Rule, *, is_averaged: bool) -> None:
        self._rule, self._own = rule, EMA_FILE if is_averaged else MODEL_FILE
        self._step: int | None = None
        self._data = b""

    @property
    def step(self) -> int | None:
        """After how many steps the weights were as they are here; None before the first evaluation."""
        return self._step

    def files(self, step: int, evaluations: Sequence[Entry], contents: Mapping[str, Sequence[memoryview]]) -> dict[str, Sequence[Any]]:
        """What a checkpoint after `step` steps holds besides the `contents` of its state, if its history has these evaluations. Called in
        the checkpoint's thread."""
        best = choose(self._rule, evaluations).step
        if best is None:
            return {}
        if best == step:
            self._step, self._data = step, b"".join(contents[self._own])
            return {}
        assert self._step == best, f"the best evaluation is of step {best}, the weights here are of {self._step}"
        return {BEST_FILE: [self._data]}

    def mark(self, evaluations: Sequence[Entry]) -> dict[str, Any]:
        """What a checkpoint's meta says of it: the step of the best evaluation, which may be its own."""
        best = choose(self._rule, evaluations).step
        return {} if best is None else {"best_step": best}

    def restore(self, step: int, evaluations: Sequence[Entry], read: Callable[[str], bytes]) -> None:
        """Take the weights from the checkpoint of `step`, whose history has these evaluations."""
        best = choose(self._rule, evaluations).step
        if best is not None:
            self._step, self._data = best, read(self._own if best == step else BEST_FILE)

    def load_into(self, model: nn.Module) -> None:
        """Give the model these weights."""
        saved = safetensors.torch.load(self._data)
        own = model.state_dict()
        if lacking := sorted(own.keys() - saved.keys()):
            raise StateError(f"the best weights, of step {self._step}, have no {lacking[0]}; start a new run (--run NEW_NAME)")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0's model. A collective."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            plain = tensor.detach().contiguous()  # channels_last would travel in another order
            dist.broadcast(plain, src=0)
            tensor.copy_(plain)
