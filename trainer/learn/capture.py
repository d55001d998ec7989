"""A pass (forward and backward of one batch) recorded as a CUDA graph, and replayed with one launch. Called by trainer.learn.gradients for
steps that are not compiled; Inductor records its own.

An eager pass of ResNet-18 is some 250 launches, which take the host longer than they take a GPU where images are few: a rank that carries
eight virtual ranks of 64 small images waits for its host most of the time. A graph repeats the same kernels on the same memory, so a replay
has the bits of the pass that was recorded, under three conditions, which `Captures` sees to:

- what differs from step to step lies in memory that the graph reads (weights, samples, targets), or belongs to the graph's key (what the
  loss is divided by). Weights that moved are recorded anew. Random draws read the generator's seed, which the caller sets before;
- what the recording itself changes is put back (BatchNorm's statistics, the random state);
- what the pass does on the host, besides launching, happens once, in the recording. So nobody may rely on hooks, and what the pass counted
  is handed back with each replay.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dataio.batch import Targets

WARM_UPS = 2
"""Passes before the recording, in which libraries choose their kernels and take their workspaces."""

Pass = Callable[[Tensor, Targets], Tensor]
"""(samples, targets) -> loss, () float32 without a graph; leaves the gradients in the parameters."""


class Graph(Protocol):
    """Repeats work of the device."""

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        """Do the work as usual, where it is going to be recorded."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record the work; returns what it returned. Whether it is done as well is left open."""
        ...

    def replay(self) -> None:
        """Do the recorded work, on the memory of the recording."""
        ...


class CudaGraph:
    """CUDA's. Graphs of one `pool` share memory, as only one of them runs at a time."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        aside, steps = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(steps)
        with torch.cuda.stream(aside):
            work()
        steps.wait_stream(aside)

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        # thread_local: meanwhile the loader's thread takes memory, which is no part of the recording.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """A pass, and the memory on which it is repeated."""

    graph: Graph
    samples: Tensor
    targets: Targets
    loss: Tensor
    gradients: list[Tensor | None]
    """Of each parameter; None if the pass does not use it."""
    counted: Counter[int]
    addresses: tuple[int, ...]
    """Of the model's parameters and buffers."""


class Captures:
    """The recorded passes of a model, one for each shape of a batch."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device, new_graph: Callable[[], Graph] | None = None
    ) -> None:
        """`parameters`: those that get gradients. `new_graph`: in place of CUDA's."""
        self._model, self._parameters, self._device = model, parameters, device
        self._new_graph = new_graph or cuda_graphs(device)
        self._recorded: dict[Any, Recorded] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(
        self, samples: Tensor, targets: Targets, divisor: float, compute: Pass, counted: Callable[[], Counter[int]]
    ) -> tuple[Tensor, Counter[int]]:
        """Replay the pass `compute`, recorded first where there is none for such a batch and `divisor`. Returns the loss and what `counted`
        says after a pass. The parameters' gradients are the graph's memory: the next replay overwrites them."""
        key = (divisor, _like(samples), *((name, _like(value)) for name, value in sorted(targets.items())))
        found = self._recorded.get(key)
        if found is None or found.addresses != self._addresses():  # what was moved would be read where it lay
            self._recorded.pop(key, None)
            found = self._recorded[key] = self._record(samples, targets, compute, counted)
        found.samples.copy_(samples)
        for name, value in targets.items():
            found.targets[name].copy_(value)
        found.graph.replay()
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.loss.clone(), found.counted

    def _record(self, samples: Tensor, targets: Targets, compute: Pass, counted: Callable[[], Counter[int]]) -> Recorded:
        own, own_targets = samples.clone(), {name: value.clone() for name, value in targets.items()}
        buffers = list(self._model.buffers())
        before = [buffer.clone() for buffer in buffers]
        graph = self._new_graph()

        def work() -> Tensor:
            for parameter in self._parameters:
                parameter.grad = None  # so that the pass writes its gradients, and does not add to old ones
            return compute(own, own_targets)

        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            for _ in range(WARM_UPS):
                graph.warm_up(work)
            try:
                loss = graph.capture(work)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(
                    "train.cuda_graphs=on cannot record this step: something in the model or the loss waits for the GPU, or works on the "
                    f"host ({str(error).splitlines()[0][:200]}); use --train.no-cuda-graphs"
                ) from error
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return Recorded(
            graph=graph,
            samples=own,
            targets=own_targets,
            loss=loss,
            gradients=[parameter.grad for parameter in self._parameters],
            counted=counted(),
            addresses=self._addresses(),
        )

    def _addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in itertools.chain(self._model.parameters(), self._model.buffers()))


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
