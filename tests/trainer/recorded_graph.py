"""A CUDA graph's behaviour on a CPU: the operations of a recording, done again on the recording's own memory and with its own numbers.

So what a replay would miss on a GPU it misses here: a number that changed on the host, a tensor that lies elsewhere, a call of a hook. And
what a recording refuses there, it refuses here: to wait for a value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operation with its arguments and results, and keeps them all alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)}
        # What is a view of an argument, or an argument itself, needs no copy.
        made = [each for each in tree_flatten(out)[0] if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given]
        self.noted.append((func, args, kwargs or {}, made))
        return out


class RecordedGraph:
    """Implements trainer.learn.capture.Graph."""

    recordings = 0
    replays = 0

    def __init__(self) -> None:
        self._operations = Operations()

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        work()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        RecordedGraph.recordings += 1
        with self._operations:
            return work()

    @property
    def length(self) -> int:
        return len(self._operations.noted)

    @torch.no_grad()
    def replay(self) -> None:
        RecordedGraph.replays += 1
        for func, args, kwargs, made in self._operations.noted:
            again = func(*args, **kwargs)
            given = {each.untyped_storage().data_ptr() for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)}
            new = [each for each in tree_flatten(again)[0] if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given]
            for place, value in zip(made, new, strict=True):
                place.copy_(value)
