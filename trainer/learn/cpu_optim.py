"""Optimisers for the CPU that go through memory once: PyTorch's arithmetic, bit for bit, one block of elements at a time.

`trainer.learn.optim` builds them. `trainer.learn.update` does the rest of an update.

PyTorch's own loop applies one operation after the other to a whole parameter. If the parameter is larger than a core's cache, each
operation fetches it from memory again, and weight decay writes a second gradient there. These optimisers do all operations of a step on one
block that fits the cache before they go to the next block. Each operation is elementwise, so no result depends on where a block begins.
(PyTorch's fused step also makes one pass. But on a CPU it takes parameter and gradient in storage order: if one is channels_last and the
other is not, it silently updates the wrong elements.)

Summing a gradient's block while it is in the cache costs next to nothing, so `gradient_sum` tells whether all gradients are finite.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""A thread's share of a block: parameter, gradient and moments in float32 take 2 MiB, a core's cache. A multiple of any vector's length."""

Update = Callable[..., None]
"""(parameter, gradient, temporary, *state), all of one shape: changes the parameter and its state in place."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A parameter and its state in blocks: views of their memory, in memory order. `layout` is None if they do not share one."""

    addresses: tuple[int, ...]
    layout: torch.memory_format | None
    blocks: tuple[tuple[Tensor, ...], ...]
    """The blocks of the parameter, of the temporary, and of each state tensor; each block (elements,) float32."""


class Blocks:
    """Cuts tensors into blocks, and caches the cuts for the next steps."""

    def __init__(self) -> None:
        self._temporary = torch.empty(0)
        self._cuts: dict[int, _Cut] = {}

    def of(self, parameter: Tensor, gradient: Tensor, state: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """Yield (parameter, gradient, temporary, *state) for each block. Together the blocks cover every element once."""
        size = BLOCK_ELEMENTS * torch.get_num_threads()
        if len(self._temporary) != size:
            self._temporary = torch.empty(size)  # (elements of a block,) float32
            self._cuts.clear()
        lasting = (parameter, *state)
        addresses = tuple([tensor.data_ptr() for tensor in lasting])
        cut = self._cuts.get(id(parameter))
        if cut is None or cut.addresses != addresses:
            cut = self._cuts[id(parameter)] = self._cut(lasting, addresses)
        if cut.layout is None or gradient.dtype != torch.float32 or not gradient.is_contiguous(memory_format=cut.layout):
            yield (parameter, gradient, torch.empty_like(parameter), *state)  # PyTorch pairs elements of tensors with unlike layouts
            return
        first, *rest = cut.blocks
        yield from zip(first, torch.split(_flat(gradient), size), *rest, strict=True)

    def _cut(self, lasting: tuple[Tensor, ...], addresses: tuple[int, ...]) -> _Cut:
        layouts = (torch.contiguous_format, torch.channels_last) if lasting[0].ndim == 4 else (torch.contiguous_format,)
        for layout in layouts:
            if all(tensor.is_contiguous(memory_format=layout) and tensor.dtype == torch.float32 for tensor in lasting):
                first, *rest = [torch.split(_flat(tensor), len(self._temporary)) for tensor in lasting]
                return _Cut(addresses, layout, (first, tuple(self._temporary[: len(block)] for block in first), *rest))
        return _Cut(addresses, None, ())


class CpuOptimizer(torch.optim.Optimizer):
    """Mixin that replaces the step of a PyTorch optimiser. Name it before that class in the list of bases."""

    gradient_sum: Tensor | None = None
    """() float32, sum of all gradients of the newest step. It is not finite if a gradient is not, or if finite ones overflow float32. None
    if nobody asked for it or no parameter had a gradient."""

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._blocks = Blocks()
        self._adds_up = False

    def add_up_gradients(self) -> None:
        """Leave the sum of all gradients in `gradient_sum` from the next step on."""
        self._adds_up = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do a step. Parameters without a gradient do not change."""
        assert closure is None, "nothing here calls the model"
        sums = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, update = self._prepare(parameter, group)
                for block in self._blocks.of(parameter, parameter.grad, state):
                    if self._adds_up:
                        sums.append(block[1].sum())
                    update(*block)
        self.gradient_sum = torch.stack(sums).sum() if sums else None

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Update]:
        """The parameter's state (made if it has none), and the update to apply to each block in this step."""
        raise NotImplementedError


class CpuSGD(CpuOptimizer, torch.optim.SGD):
    """torch.optim.SGD for float32 parameters on a CPU: the same weights, the same state."""

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Update]:
        lr, momentum, decay, nesterov = group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
        is_first = False
        state: tuple[Tensor, ...] = ()
        if momentum:
            slots = self.state[parameter]
            is_first = slots.get("momentum_buffer") is None
            if is_first:
                slots["momentum_buffer"] = torch.empty_like(parameter)
            state = (slots["momentum_buffer"],)

        def update(parameter: Tensor, gradient: Tensor, temporary: Tensor, buffer: Tensor | None = None) -> None:
            if decay:
                gradient = torch.add(gradient, parameter, alpha=decay, out=temporary)
            if buffer is not None:
                if is_first:
                    buffer.copy_(gradient)
                else:
                    buffer.mul_(momentum).add_(gradient)
                gradient = torch.add(gradient, buffer, alpha=momentum, out=temporary) if nesterov else buffer
            parameter.add_(gradient, alpha=-lr)

        return state, update


class CpuAdamW(CpuOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW for float32 parameters on a CPU: the same weights, the same state."""

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Update]:
        lr, (beta1, beta2), decay, epsilon = group["lr"], group["betas"], group["weight_decay"], group["eps"]
        slots = self.state[parameter]
        if not slots:
            slots["step"] = torch.tensor(0.0)
            slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        slots["step"] += 1
        step = slots["step"].item()
        step_size = lr / (1 - beta1**step)
        root = (1 - beta2**step) ** 0.5

        def update(parameter: Tensor, gradient: Tensor, temporary: Tensor, mean: Tensor, square: Tensor) -> None:
            if decay:
                parameter.mul_(1 - lr * decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            torch.sqrt(square, out=temporary).div_(root).add_(epsilon)
            parameter.addcdiv_(mean, temporary, value=-step_size)

        return (slots["exp_avg"], slots["exp_avg_sq"]), update


def _flat(tensor: Tensor) -> Tensor:
    """View of a dense tensor's elements in memory order, (elements,)."""
    return tensor.as_strided((tensor.numel(),), (1,))
