"""The step: forward, backward, ordered reduction, update. And the loop over steps, which is a generator.

worker.py reads `for stats in train_steps(...)`. Nothing here logs, saves, evaluates or waits for the device: a loss comes back with a
later step's stats, once it has arrived on the host by itself.
"""

import hashlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dataio.batch import Batch
from trainer.learn.cpu_optim import InBlocks

COMPILER: str | Callable[..., Any] = "inductor"
"""torch.compile's backend."""


class Reducer(Protocol):
    """Sums tensors over all virtual ranks in an order that does not depend on who carries them (cluster.reduce.TreeReducer)."""

    wait_seconds: float
    bucket_bytes: int
    small_bucket_bytes: int

    @property
    def is_open(self) -> bool: ...

    def lay_out(self, like: Sequence[Tensor], *, exact: int = 0) -> list[Tensor]: ...

    def begin(self, virtual_rank: int) -> None: ...

    def put(self, part: int, value: Tensor) -> None: ...

    def end(self) -> None: ...

    def finish(self, on_exchanged: Callable[[], None] = ...) -> Tensor: ...


class Average(Protocol):
    """A moving average of the weights (trainer.learn.optim.Ema)."""

    def update(self) -> None: ...


class Arriving:
    """A step's mean loss, or its gradient's norm, on its way from the device to the host. `wait` may be called from any thread, the rest is
    the loop's."""

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
    gradient_norms: tuple[float, ...] = ()
    """Of steps that Stepper.take_norm asked for, in order, that have arrived since the last stats."""


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

    `accumulate` cuts each virtual rank's images into that many micro-batches, whose gradients are added up before they are handed over:
    the same batch in less memory. BatchNorm normalises each micro-batch by itself and updates its running statistics after each, from the
    first to the last. `full_batch` is how many images the model sees at once in a full step. Where the model is compiled, only batches of
    that size are: the last step of an epoch is short, and a graph of its own for it would cost more than it saves. 0 compiles any size,
    each by itself: what a size computes does not depend on the sizes that came before it, so that a run that went on from a checkpoint
    gets the same bits. `compress` has DDP send its gradients in bf16 (the tree's own way is cluster.reduce's). With `cuda_graphs` what is
    compiled is recorded in its first calls and replayed from then on: the same kernels, launched at once.
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
        accumulate: int = 1,
        full_batch: int = 0,
        compress: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        assert precision in ("fp32", "bf16"), f"precision {precision} is to be decided before (trainer.drive.capability)"
        self._model, self._preprocess, self._optimizer, self._ema = model, preprocess, optimizer, ema
        self._clip, self._seed = clip, seed
        self._sums = optimizer if clip is None and isinstance(optimizer, InBlocks) else None
        if self._sums is not None:
            self._sums.adds_up = True
        self._reducer, self._world_size = reducer, world_size
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)
        self._accumulate, self._full_batch = accumulate, full_batch
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        self._ddp = distributed and reducer is None
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Told "exchange" when the host begins to wait for the other ranks, and "step" when it goes on."""
        self.mark: Callable[[str], None] = lambda part: None
        """Told the name of each part of a step when the host has queued it (trainer.rank.profile, trainer.rank.meter)."""
        self.take_norm = False
        """Have the next step leave its gradient's L2 norm in `gradient_norm`. It reads all gradients once more, so not in every step."""
        self.gradient_norm: Tensor | None = None
        """() on the device, of the newest step if that was asked for it: before any clipping, over the whole batch."""
        self._forward: nn.Module = model
        if self._ddp:
            self._forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if compress:
                self._forward.register_comm_hook(None, bf16_compress_hook)
        self._hands_over = _Gate()
        self._loss_of = partial(_summed_loss, preprocess=preprocess, loss_sum=loss_sum, autocast=self._autocast)
        self._eager = self._loss_of(self._forward)
        self._compiled: Callable[[Tensor, Tensor], Tensor] | None = None
        assert not cuda_graphs or (compile_model and accumulate == 1), "trainer.settings.cli has refused this"
        self._compiler_options: dict[str, Any] | None = {"triton.cudagraphs": True} if cuda_graphs else None
        if compile_model:
            self._compiled = self._compile(reducer)
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
        sums = reducer.lay_out([loss, *self._statistics, *reversed(self._parameters)], exact=first)
        self._loss_sums, self._statistic_sums, self._gradient_sums = sums[0], sums[1:first], sums[first:][::-1]
        for part, parameter in enumerate(reversed(self._parameters), start=first):
            hook = _hand_over(weakref.ref(reducer), part, self._hands_over)
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
        self.gradient_norm = None
        if self.take_norm:
            self.take_norm, self.gradient_norm = False, _norm_of_gradients(self._parameters) if norm is None else norm
        proof: Tensor | None = None  # not finite where a gradient is not
        if self._sums is None and self._reducer is None:  # the tree's sums have shown it already
            proof = _sum_of_norms(self._parameters) if norm is None else norm
        self._optimizer.step()
        if self._sums is not None:
            proof = self._sums.gradient_sum
        if proof is not None:
            # NaN shows in the loss: what it does to the weights would else be seen a step late, in a checkpoint perhaps.
            loss = loss + 0.0 * proof
        if self._ema is not None:
            self._ema.update()
        self.mark("optimizer")
        return loss

    def compile_ahead(self, image: Sequence[int]) -> float:
        """Compile now, outside of any step, for full batches of (3, H, W) uint8; the seconds that it took, 0 where nothing is compiled.

        Forward and backward run once on a blank batch. What they leave behind is undone: buffers, gradients, the random state. In ddp
        mode a collective."""
        if self._compiled is None or not self._full_batch:
            return 0.0
        begin = time.perf_counter()
        buffers = list(self._model.buffers())
        before = [buffer.clone() for buffer in buffers]
        images = torch.zeros((self._full_batch, *image), dtype=torch.uint8, device=self._device)
        images = images.contiguous(memory_format=torch.channels_last)  # as the loader's are
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            loss = self._loss(images, torch.zeros(len(images), dtype=torch.int64, device=self._device), 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # the device has done it too; no step waits here
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return time.perf_counter() - begin

    def _loss(self, images: Tensor, labels: Tensor, divisor: float) -> Tensor:
        """() float32, with its graph."""
        n = len(images)
        if self._compiled is not None and n == (self._full_batch or n):
            if self._compiler_options is not None:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # what the replay before left behind is used up
            return self._compiled(images, labels) / divisor
        # The rest of an epoch may be a single image. It has no statistics of its own: where its maps have one pixel, BatchNorm refuses it.
        with _norms_at_rest(self._norms if n == 1 else ()):
            return self._eager(images, labels) / divisor

    def _compile(self, reducer: Reducer | None) -> Callable[[Tensor, Tensor], Tensor]:
        """(images, labels) -> summed loss: in one graph from the bytes to the loss; for a reducer, the model in pieces of about a bucket's
        parameters each.

        A compiled graph hands over its gradients all at once, at its end, when nothing is left for the exchange to run beside. Pieces are
        what PyTorch makes by itself for a DistributedDataParallel. The cuts, where bf16 rounds, are the same for any number of ranks.

        `dynamic=False`: a graph for each size. PyTorch would make the second size it meets a graph for all further ones, and which size
        is the second depends on the step that a run went on from."""
        if reducer is None and not self._ddp:
            return torch.compile(self._eager, backend=COMPILER, dynamic=False, options=self._compiler_options)
        if reducer is None:
            return self._loss_of(torch.compile(self._forward, backend=COMPILER, dynamic=False, options=self._compiler_options))
        from torch._dynamo.backends.distributed import DDPOptimizer
        from torch._dynamo.backends.registry import lookup_backend

        compiler: Any = lookup_backend(COMPILER)
        if self._compiler_options is not None:
            compiler = partial(compiler, config_patches=self._compiler_options)  # what torch.compile makes of its options
        small = min(reducer.small_bucket_bytes, reducer.bucket_bytes)
        backend = DDPOptimizer(reducer.bucket_bytes, compiler, first_bucket_cap=small).compile_fn
        return self._loss_of(torch.compile(self._forward, backend=backend, dynamic=False))

    def _cut(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches that hold an image, in order; a short batch is cut as evenly as it goes."""
        if self._accumulate == 1:
            return [(images, labels)]
        parts = zip(images.tensor_split(self._accumulate), labels.tensor_split(self._accumulate), strict=True)
        return [(few, their) for few, their in parts if len(few)]

    def _plain_gradients(self, batches: Sequence[Batch], global_count: int, step: int) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        full = [batch for batch in batches if len(batch.ids)]
        seed = step_seed(self._seed, step, batches[0].virtual_rank)
        if full:
            images = full[0].samples if len(full) == 1 else torch.cat([batch.samples for batch in full])
            labels = full[0].targets["label"] if len(full) == 1 else torch.cat([batch.targets["label"] for batch in full])
            # DDP averages over ranks; the sum is wanted.
            ranks = self._world_size if self._ddp else 1
            torch.manual_seed(seed)
            loss = self._accumulated(self._cut(images, labels), global_count / ranks)
        else:
            # A rank without samples in the last step still has to answer DDP's all-reduce: one blank image that counts for nothing.
            ranks = 1
            blank = torch.zeros((1, *batches[0].samples.shape[1:]), dtype=torch.uint8, device=self._device)
            with evaluating(self._model), self._autocast:
                loss = self._forward(self._preprocess(blank)).float().sum() * 0.0
            loss.backward()
            self.mark("backward")
        if self._ddp_waits is not None:
            self._ddp_waits.backward_returned()
        return loss.detach() / ranks

    def _accumulated(self, parts: Sequence[tuple[Tensor, Tensor]], divisor: float) -> Tensor:
        """The loss, and its gradients in the parameters; DDP exchanges those of the last part, which hold the others'."""
        total: Tensor | None = None
        for number, (images, labels) in enumerate(parts, start=1):
            is_last = number == len(parts)
            alone: AbstractContextManager[None] = nullcontext()
            if not is_last and isinstance(self._forward, DistributedDataParallel):
                alone = self._forward.no_sync()
            with alone:
                loss = self._loss(images, labels, divisor)
                self.mark("forward")
                loss.backward()  # type: ignore[no-untyped-call]
                self.mark("backward")
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _put_in(self, reducer: Reducer, parts: Sequence[tuple[Tensor, Tensor]], global_count: int, *, share: float) -> None:
        """Hand the loss, the statistics and the gradients of one virtual rank to the reducer."""
        total: Tensor | None = None
        for number, (images, labels) in enumerate(parts, start=1):
            self._hands_over.is_open = number == len(parts)
            loss = self._loss(images, labels, global_count)
            total = loss.detach() if total is None else total + loss.detach()
            if self._hands_over.is_open:
                reducer.put(0, total)
                shares = torch._foreach_mul(self._statistics, share) if self._statistics else ()
                for part, statistic in enumerate(shares, start=1):
                    reducer.put(part, statistic)
            self.mark("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.mark("backward")
        if len(parts) > 1:  # a parameter that the last micro-batch did not use, and one before it did
            first = 1 + len(self._statistics)
            for part, parameter in enumerate(reversed(self._parameters), start=first):
                if parameter.grad is not None:
                    reducer.put(part, parameter.grad)
                    parameter.grad = None

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
                torch.manual_seed(step_seed(self._seed, step, batch.virtual_rank))
                self._put_in(reducer, self._cut(batch.samples, batch.targets["label"]), global_count, share=n / global_count)
            reducer.end()
            # Each virtual rank starts from the same statistics, and counters: BatchNorm may weigh by them.
            _copy(self._statistics_before, self._statistics)
            _copy(self._counters_before, self._counters)
        self.on_phase("exchange")
        sums = reducer.finish(lambda: self.on_phase("step"))  # a rank that hangs here after that is not waiting for the others
        self.on_phase("step")
        self.mark("reduction")
        for parameter, gradient in zip(self._parameters, self._gradient_sums, strict=True):
            parameter.grad = gradient
        _copy(self._statistic_sums, self._statistics)
        if self._counters:
            torch._foreach_add_(self._counters, 1)  # steps, not forwards
        # NaN or infinite wherever a sum is; an optimiser that adds up the gradients anyway leaves the statistics to be looked at.
        if self._sums is None:
            return self._loss_sums + 0.0 * sums.sum()
        return self._loss_sums + 0.0 * torch.stack([total.sum() for total in (self._loss_sums, *self._statistic_sums)]).sum()


def _summed_loss(
    forward: Callable[[Tensor], Tensor], *, preprocess: nn.Module, loss_sum: Callable[[Tensor, Tensor], Tensor], autocast: torch.autocast
) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, labels) -> the loss summed over the images, () float32. Holds no Stepper: the compiler keeps what it compiled."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with autocast:
            logits = forward(preprocess(images))  # (n, classes)
        return loss_sum(logits.float(), labels)

    return loss


class _Gate:
    """Whether gradients are handed over as they come: only those of a virtual rank's last micro-batch are complete."""

    is_open = True


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


def _hand_over(reducer: "weakref.ref[Reducer]", part: int, gate: _Gate) -> Callable[[Tensor], None]:
    """A hook that gives a parameter's gradient to the reducer, inside the reducer's own steps. It does not keep the reducer alive."""

    def accumulated(parameter: Tensor) -> None:
        into = reducer()
        if into is not None and into.is_open and gate.is_open:
            assert parameter.grad is not None
            into.put(part, parameter.grad)
            parameter.grad = None

    return accumulated


def _copy(source: list[Tensor], into: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(into, source)


def _sum_of_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """() on the device, not finite where a gradient is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Any sum that NaN and infinity get through. On a CPU plain ones read ResNet-18's gradients in 1.5 ms, norms in 2.6.
    sums = torch._foreach_norm(gradients) if gradients[0].is_cuda else [gradient.sum() for gradient in gradients]
    return torch.stack(sums).sum()


def _norm_of_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """() on the device, not waited for; what clip_grad_norm_ would find."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


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
    norms: deque[Arriving] = deque()
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for step in range(start_step, stop_step):
        begin = clock()
        batch = next(batches)
        loaded = clock()
        stepper.mark("data")
        count = batch_count(step % steps_per_epoch)
        rate = set_learning_rate(step)
        skipped, last = step in skip, step + 1 == stop_step
        loss = None if skipped else stepper.step(batch, global_count=count, step=step)
        if losses:
            losses[-1].reduced()  # of the step before: over long ago
        if loss is not None:
            losses.append(Arriving(step, loss, dist.all_reduce(loss, async_op=True) if sum_over_ranks else None, aside))
            if stepper.gradient_norm is not None:
                norms.append(Arriving(step, stepper.gradient_norm))
        arrived = []
        while losses and (last or losses[0].is_here()):
            arrived.append((losses[0].step, losses[0].wait()))
            losses.popleft()
        known = []
        while norms and norms[0].is_here():
            known.append(norms.popleft().wait())
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
            gradient_norms=tuple(known),
        )
