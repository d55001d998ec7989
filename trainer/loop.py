"""The step: forward, backward, ordered reduction, update. And the loop over steps, which is a generator.

worker.py reads `for stats in train_steps(...)`. Nothing here logs, saves, evaluates or waits for the device: a loss comes back with a
later step's stats, once it has arrived on the host by itself.
"""

import hashlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dataio.loader import Batch

COMPILER: str | Callable[..., Any] = "inductor"
"""torch.compile's backend."""


class Reducer(Protocol):
    """Sums tensors over all virtual ranks in an order that does not depend on who carries them (cluster.reduce.TreeReducer)."""

    wait_seconds: float
    bucket_bytes: int
    small_bucket_bytes: int

    @property
    def is_open(self) -> bool: ...

    def lay_out(self, like: Sequence[Tensor]) -> list[Tensor]: ...

    def begin(self, virtual_rank: int) -> None: ...

    def put(self, part: int, value: Tensor) -> None: ...

    def end(self) -> None: ...

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

    `reducer` (tree mode) receives each virtual rank's loss, BatchNorm statistics weighted by the virtual rank's share of the batch, and
    gradients, these from inside the backward pass. Without one, `distributed` decides between DDP's own all-reduce and a single process.
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
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Told "exchange" when the host begins to wait for the other ranks, and "step" when it goes on."""
        forward: nn.Module = model
        if self._ddp:
            forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._forward: Callable[[Tensor], Tensor] = _compiled(forward, reducer) if compile_model else forward
        self._ddp_waits: _DdpWaits | None = None
        if self._ddp and self._device.type == "cpu":
            self._ddp_waits = _DdpWaits(self._parameters)
        if reducer is not None:
            self._lay_out(reducer)

    def _lay_out(self, reducer: Reducer) -> None:
        """Tell the reducer what will come, in the order in which it will; have autograd hand over each gradient as soon as it is there.

        Hooks on the parameters, not DistributedDataParallel with a communication hook: that adds up a rank's virtual ranks one after the
        other in its buckets, which are other brackets than the tree's, and gives a rank one sum to send where uneven blocks need several.
        A hook takes each gradient by itself, and is the same for frozen and unused parameters, autocast and compiled models.
        """
        self._statistics = [b for m in self._norms for b in (m.running_mean, m.running_var) if b is not None]
        self._counters = [m.num_batches_tracked for m in self._norms if m.num_batches_tracked is not None]
        self._statistics_before = [torch.empty_like(b) for b in self._statistics]
        self._counters_before = [torch.empty_like(c) for c in self._counters]
        # The loss and the statistics are there before the backward pass begins; it goes through the parameters from the last to the first.
        loss = torch.zeros((), device=self._device)
        first = 1 + len(self._statistics)
        sums = reducer.lay_out([loss, *self._statistics, *reversed(self._parameters)])
        self._loss_sums, self._statistic_sums, self._gradient_sums = sums[0], sums[1:first], sums[first:][::-1]
        for part, parameter in enumerate(reversed(self._parameters), start=first):
            hook = _hand_over(weakref.ref(reducer), part)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    @property
    def wait_seconds(self) -> float:
        """How long the host has waited in steps for the other ranks' gradients so far. On a GPU the device waits and this stays about 0."""
        if self._reducer is not None:
            return self._reducer.wait_seconds
        return self._ddp_waits.seconds if self._ddp_waits is not None else 0.0

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

    def _loss(self, images: Tensor, labels: Tensor, divisor: float, seed: int) -> Tensor:
        """() float32, with its graph."""
        torch.manual_seed(seed)
        # The rest of an epoch may be a single image. It has no statistics of its own: where its maps have one pixel, BatchNorm refuses it.
        with _norms_at_rest(self._norms if len(images) == 1 else ()), self._autocast:
            logits = self._forward(self._preprocess(images))  # (n, classes)
        return self._loss_sum(logits.float(), labels) / divisor

    def _plain_gradients(self, batches: Sequence[Batch], global_count: int, step: int) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        full = [batch for batch in batches if len(batch.ids)]
        seed = step_seed(self._seed, step, batches[0].virtual_rank)
        if full:
            images = full[0].images if len(full) == 1 else torch.cat([batch.images for batch in full])
            labels = full[0].labels if len(full) == 1 else torch.cat([batch.labels for batch in full])
            # DDP averages over ranks; the sum is wanted.
            ranks = self._world_size if self._ddp else 1
            loss = self._loss(images, labels, global_count / ranks, seed)
        else:
            # A rank without samples in the last step still has to answer DDP's all-reduce: one blank image that counts for nothing.
            ranks = 1
            blank = torch.zeros((1, *batches[0].images.shape[1:]), dtype=torch.uint8, device=self._device)
            with evaluating(self._model), self._autocast:
                loss = self._forward(self._preprocess(blank)).float().sum() * 0.0
        loss.backward()  # type: ignore[no-untyped-call]
        if self._ddp_waits is not None:
            self._ddp_waits.backward_returned()
        return loss.detach() / ranks

    def _reduced_gradients(self, batches: Sequence[Batch], global_count: int, step: int) -> Tensor:
        reducer = self._reducer
        assert reducer is not None
        for parameter in self._parameters:
            parameter.grad = None  # autograd hands over the gradient that it made, and adds it to nothing
        _copy(self._statistics, self._statistics_before)
        _copy(self._counters, self._counters_before)
        for batch in batches:
            reducer.begin(batch.virtual_rank)
            n = len(batch.ids)
            if n:
                loss = self._loss(batch.images, batch.labels, global_count, step_seed(self._seed, step, batch.virtual_rank))
                reducer.put(0, loss.detach())
                shares = torch._foreach_mul(self._statistics, n / global_count) if self._statistics else ()
                for part, share in enumerate(shares, start=1):
                    reducer.put(part, share)
                loss.backward()  # type: ignore[no-untyped-call]
            reducer.end()
            # Each virtual rank starts from the same statistics, and counters: BatchNorm may weigh by them.
            _copy(self._statistics_before, self._statistics)
            _copy(self._counters_before, self._counters)
        self.on_phase("exchange")
        sums = reducer.finish()
        self.on_phase("step")
        for parameter, gradient in zip(self._parameters, self._gradient_sums, strict=True):
            parameter.grad = gradient
        _copy(self._statistic_sums, self._statistics)
        if self._counters:
            torch._foreach_add_(self._counters, 1)  # steps, not forwards
        # NaN or infinite wherever a sum is: what that does to the weights would else be seen a step late, in a checkpoint perhaps.
        return self._loss_sums + 0.0 * sums.sum()


def _compiled(model: nn.Module, reducer: Reducer | None) -> Callable[[Tensor], Tensor]:
    """`model` compiled; for a reducer in pieces of about a bucket's parameters each.

    A compiled graph hands over its gradients all at once, at its end, when nothing is left for the exchange to run beside. This is what
    PyTorch does by itself for a DistributedDataParallel. The cuts, where bf16 rounds, are the same for any number of ranks.
    """
    if reducer is None:
        return torch.compile(model, backend=COMPILER)
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend

    small = min(reducer.small_bucket_bytes, reducer.bucket_bytes)
    pieces = DDPOptimizer(reducer.bucket_bytes, lookup_backend(COMPILER), first_bucket_cap=small)
    return torch.compile(model, backend=pieces.compile_fn)


class _DdpWaits:
    """How long backward passes took from this rank's last gradient to their return: DDP's wait for the other ranks, on a CPU."""

    def __init__(self, parameters: Sequence[nn.Parameter], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = 0.0, clock
        self._last_gradient = [0.0]
        for parameter in parameters:
            hook = _note_time(self._last_gradient, clock)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    def backward_returned(self) -> None:
        self.seconds += self._clock() - self._last_gradient[0]


def _note_time(into: list[float], clock: Callable[[], float]) -> Callable[[Tensor], None]:
    def accumulated(parameter: Tensor) -> None:
        into[0] = clock()

    return accumulated


def _hand_over(reducer: "weakref.ref[Reducer]", part: int) -> Callable[[Tensor], None]:
    """A hook that gives a parameter's gradient to the reducer, inside the reducer's own steps. It does not keep the reducer alive."""

    def accumulated(parameter: Tensor) -> None:
        into = reducer()
        if into is not None and into.is_open:
            assert parameter.grad is not None
            into.put(part, parameter.grad)
            parameter.grad = None

    return accumulated


def _copy(source: list[Tensor], into: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(into, source)


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
