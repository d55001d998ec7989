"""The step: forward, backward, ordered reduction, update. And the loop over steps, which is a generator.

worker.py reads `for stats in train_steps(...)`. Nothing here logs, saves, evaluates or waits for the device: a loss comes back with a
later step's stats, once it has arrived on the host by itself.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dataio.loader import Batch


class Reducer(Protocol):
    """Sums flat vectors over all virtual ranks in an order that does not depend on who carries them (cluster.reduce.TreeReducer)."""

    def add(self, virtual_rank: int, flat: Tensor) -> None: ...

    def finish(self) -> Tensor: ...


class Average(Protocol):
    """A moving average of the weights (trainer.optim.Ema)."""

    def update(self) -> None: ...


class Arriving:
    """A step's mean loss on its way from the device to the host. `wait` may be called from any thread, the rest is the loop's."""

    def __init__(self, step: int, loss: Tensor, work: dist.Work | None = None, aside: torch.cuda.Stream | None = None) -> None:
        """`loss`: () on the device; `work`: the all-reduce that is still adding up the ranks' shares of it; `aside`: on a GPU a stream that
        is not the steps'."""
        self.step = step
        self._loss, self._work, self._aside = loss, work, aside
        self._host: Tensor | None = None
        self._sent: torch.cuda.Event | None = None
        if work is None:
            self._send()

    def reduced(self) -> None:
        """Call a step later, when the all-reduce is over long ago."""
        if self._work is not None and self._host is None:
            self._work.wait()
            self._send()

    def is_here(self) -> bool:
        return self._host is not None and (self._sent is None or bool(self._sent.query()))  # type: ignore[no-untyped-call]

    def wait(self) -> float:
        """The loss, once it has arrived; nothing but this thread waits."""
        if self._host is not None:
            if self._sent is not None:
                self._sent.synchronize()
            return float(self._host)
        assert self._work is not None
        if not self._loss.is_cuda:
            self._work.wait()
            return float(self._loss)
        with torch.cuda.stream(self._aside):
            self._work.wait()  # makes this stream wait for the all-reduce's, while the steps' goes on
            return float(self._loss)

    def _send(self) -> None:
        """Queue the copy to the host behind the steps."""
        if not self._loss.is_cuda:
            self._host = self._loss
            return
        host = torch.empty((), dtype=self._loss.dtype, pin_memory=True)
        host.copy_(self._loss, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()
        self._sent, self._host = sent, host  # in this order: another thread may be in wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One step, seen from the host. `losses` are the (step, mean loss) that have arrived since the last stats."""

    steps_done: int
    epoch: int
    samples: int  # over all virtual ranks
    learning_rate: float
    step_seconds: float
    data_wait_seconds: float
    losses: tuple[tuple[int, float], ...]
    late: tuple[Arriving, ...] = ()
    """Losses of this step and those before it that have not arrived, in order."""
    skipped: bool = False
    """The batch was taken and left out: no update, no loss."""


def step_seed(seed: int, step: int, virtual_rank: int) -> int:
    """The seed of every random draw inside (step, virtual rank): dropout, stochastic depth. 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{step}/{virtual_rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Stepper:
    """One optimisation step over the virtual ranks this rank carries.

    `reducer` (tree mode) receives one flat vector a virtual rank: gradients, BatchNorm statistics weighted by the virtual rank's share of
    the batch, and the loss. Without one, `distributed` decides between DDP's own all-reduce and a single process.
    `loss_sum(logits, labels)` is the summed loss of a batch; it is divided by the global batch's count, so that a last, smaller batch
    and uneven shares weigh every sample the same.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        preprocess: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Average | None,
        loss_sum: Callable[[Tensor, Tensor], Tensor],
        clip: Callable[[Sequence[nn.Parameter]], Tensor] | None,
        seed: int,
        precision: str,
        compile_model: bool,
        reducer: Reducer | None,
        distributed: bool,
        world_size: int,
    ) -> None:
        self._model, self._preprocess, self._optimizer, self._ema = model, preprocess, optimizer, ema
        self._loss_sum, self._clip, self._seed = loss_sum, clip, seed
        self._reducer, self._world_size = reducer, world_size
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        self._ddp = distributed and reducer is None
        forward: nn.Module = model
        if self._ddp:
            forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(forward) if compile_model else forward
        self._flat: Tensor | None = None
        self._statistics: list[Tensor] = []
        self._counters: list[Tensor] = []
        if reducer is not None:
            self._lay_out()

    def _lay_out(self) -> None:
        """Make every gradient a view of one flat vector, followed by room for the BatchNorm statistics and the loss."""
        self._statistics = [b for m in self._norms for b in (m.running_mean, m.running_var) if b is not None]
        self._counters = [m.num_batches_tracked for m in self._norms if m.num_batches_tracked is not None]
        sizes = [p.numel() for p in self._parameters]
        self._gradient_size = sum(sizes)
        total = self._gradient_size + sum(b.numel() for b in self._statistics) + 1
        flat = torch.zeros(total, dtype=torch.float32, device=self._device)  # (gradients | statistics | loss,)
        offset = 0
        for parameter, size in zip(self._parameters, sizes, strict=True):
            # The parameter's own strides (channels_last), so that the optimiser's fused kernels meet equal layouts.
            parameter.grad = flat[offset : offset + size].as_strided(parameter.shape, parameter.stride())
            offset += size
        self._flat = flat

    def step(self, batches: Sequence[Batch], *, global_count: int, step: int) -> Tensor:
        """Do global step `step`; its mean loss over the whole batch, () float32 on the device (over this rank's share in ddp mode)."""
        if self._reducer is not None:
            loss = self._reduced_gradients(batches, global_count, step)
        else:
            loss = self._plain_gradients(batches, global_count, step)
        norm = self._clip(self._parameters) if self._clip is not None else None
        if self._reducer is None:
            loss = _nan_unless_finite(loss, self._parameters, norm)  # the tree's sums show it by themselves
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update()
        return loss

    def _forward_backward(self, images: Tensor, labels: Tensor, divisor: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        # The rest of an epoch may be a single image. It has no statistics of its own: where its maps have one pixel, BatchNorm refuses it.
        with _norms_at_rest(self._norms if len(images) == 1 else ()), self._autocast:
            logits = self._forward(self._preprocess(images))  # (n, classes)
        loss = self._loss_sum(logits.float(), labels) / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _plain_gradients(self, batches: Sequence[Batch], global_count: int, step: int) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        full = [batch for batch in batches if len(batch.ids)]
        seed = step_seed(self._seed, step, batches[0].virtual_rank)
        if full:
            images = full[0].images if len(full) == 1 else torch.cat([batch.images for batch in full])
            labels = full[0].labels if len(full) == 1 else torch.cat([batch.labels for batch in full])
            if not self._ddp:
                return self._forward_backward(images, labels, global_count, seed)
            # DDP averages over ranks; the sum is wanted.
            return self._forward_backward(images, labels, global_count / self._world_size, seed) / self._world_size
        # A rank without samples in the last step still has to answer DDP's all-reduce: one blank image that counts for nothing.
        size = batches[0].images.shape[1:]
        blank = torch.zeros((1, *size), dtype=torch.uint8, device=self._device)
        with evaluating(self._model), self._autocast:
            nothing = self._forward(self._preprocess(blank)).float().sum() * 0.0
        nothing.backward()  # type: ignore[no-untyped-call]
        return nothing.detach()

    def _reduced_gradients(self, batches: Sequence[Batch], global_count: int, step: int) -> Tensor:
        assert self._flat is not None
        assert self._reducer is not None
        before = [b.clone() for b in self._statistics]
        counted = [c.clone() for c in self._counters]
        for batch in batches:
            self._flat.zero_()
            n = len(batch.ids)
            if n:
                loss = self._forward_backward(batch.images, batch.labels, global_count, step_seed(self._seed, step, batch.virtual_rank))
                offset = self._gradient_size
                for statistic in self._statistics:
                    torch.mul(statistic.view(-1), n / global_count, out=self._flat[offset : offset + statistic.numel()])
                    offset += statistic.numel()
                self._flat[-1] = loss
                # Each virtual rank starts from the same statistics, and counters: BatchNorm may weigh by them.
                for tensors, old in ((self._statistics, before), (self._counters, counted)):
                    if tensors:
                        torch._foreach_copy_(tensors, old)
            self._reducer.add(batch.virtual_rank, self._flat)
        self._flat.copy_(self._reducer.finish())
        offset = self._gradient_size
        for statistic in self._statistics:
            statistic.view(-1).copy_(self._flat[offset : offset + statistic.numel()])
            offset += statistic.numel()
        if self._counters:
            torch._foreach_add_(self._counters, 1)  # steps, not forwards
        return self._flat[-1].clone()


def _nan_unless_finite(loss: Tensor, parameters: Sequence[nn.Parameter], norm: Tensor | None) -> Tensor:
    """`loss`, or NaN where a gradient is not finite: what it does to the weights would else be seen a step late, in a checkpoint perhaps.
    `norm`: of all gradients, where it is known."""
    if norm is None:
        norm = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])).sum()
    return loss + 0.0 * norm


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode inside; afterwards each module in the mode it was in (a frozen backbone stays in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _norms_at_rest(norms: Sequence[nn.Module]) -> Iterator[None]:
    """`norms` normalise by their running statistics inside, and do not change them."""
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def train_steps(
    stepper: Stepper,
    batches: Iterator[tuple[Batch, ...]],
    *,
    start_step: int,
    stop_step: int,
    steps_per_epoch: int,
    batch_count: Callable[[int], int],
    set_learning_rate: Callable[[int], float],
    device: torch.device,
    sum_over_ranks: bool,
    skip: Container[int] = frozenset(),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[StepStats]:
    """Do steps `start_step` .. `stop_step` - 1, yielding after each.

    `batches` yields one tuple a step, in order. `batch_count(step_in_epoch)` is the global batch's size; `set_learning_rate(step)` sets and
    returns the learning rate. `sum_over_ranks` adds the ranks' loss shares (ddp mode) in an all-reduce that nobody waits for. The batches
    of the steps in `skip` are taken and left out: no forward, no update; learning rate and step count go on. All ranks skip the same ones.
    """
    losses: deque[Arriving] = deque()
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for step in range(start_step, stop_step):
        begin = clock()
        batch = next(batches)
        loaded = clock()
        count = batch_count(step % steps_per_epoch)
        rate = set_learning_rate(step)
        skipped, last = step in skip, step + 1 == stop_step
        loss = None if skipped else stepper.step(batch, global_count=count, step=step)
        if losses:
            losses[-1].reduced()  # of the step before: over long ago
        if loss is not None:
            losses.append(Arriving(step, loss, dist.all_reduce(loss, async_op=True) if sum_over_ranks else None, aside))
        arrived = []
        while losses and (last or losses[0].is_here()):
            arrived.append((losses[0].step, losses[0].wait()))
            losses.popleft()
        yield StepStats(
            steps_done=step + 1,
            epoch=step // steps_per_epoch,
            samples=count,
            learning_rate=rate,
            step_seconds=clock() - begin,
            data_wait_seconds=loaded - begin,
            losses=tuple(arrived),
            late=tuple(losses),
            skipped=skipped,
        )
