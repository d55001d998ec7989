"""Computes a step's gradients: a rank's virtual ranks' batches go through the model, and the ranks' sums are added up.

`trainer.learn.build` makes one of three classes, and `trainer.learn.step` calls it: PlainGradients in a single process; DdpGradients, where
DistributedDataParallel sums over the ranks; TreeGradients, whose sums have the same bits whichever rank carries which virtual rank. The
objective (trainer.learn.objectives) defines the loss; `trainer.learn.update` uses the gradients.
"""

import hashlib
import itertools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dataio.batch import Batch, Targets
from trainer.learn.augment.batches import augmented
from trainer.learn.augment.mix import Mix, with_partners
from trainer.learn.augment.views import Views
from trainer.learn.capture import Captures
from trainer.learn.objectives import Forward, Objective
from trainer.learn.own import Augment
from trainer.learn.semi import SUMS, Semi, assembled, together
from trainer.learn.teacher import Teacher, with_answers
from trainer.learn.update import sum_of_norms
from trainer.tasks.task import Task

COMPILER: str | Callable[..., Any] = "inductor"
"""torch.compile's backend."""
SAME_BITS: Mapping[str, Any] = {"deterministic": True}
"""Inductor's option that keeps timings out of the bits. Without it Inductor times the configurations of a GPU's reductions, and the padding
of products, in each process, and takes the fastest: a restart, or another rank, may add up in another order (pytorch#189121)."""
CUDA_GRAPHS: Mapping[str, Any] = {"triton.cudagraphs": True}

SummedLoss = Callable[[Tensor, Targets], Tensor]
MicroBatch = tuple[Tensor, Targets]


class StepObserver(Protocol):
    """Follows a step's progress while the host queues it. None of its methods may wait for the device."""

    def phase(self, phase: str, /) -> None:
        """ "exchange" when the host begins to wait for the other ranks, "step" when it goes on."""
        ...

    def part(self, part: str, /) -> None:
        """Called when the host has queued a part of the step: other (what lies between two steps), data, forward, gradients (where DDP
        on a GPU exchanges them inside the backward pass: the last one is there, and the wait for the other ranks begins), backward,
        reduction, optimizer."""
        ...

    def takes_norm(self) -> bool:
        """Whether this step should compute its gradient's norm. Called once per step."""
        ...


class Gradients(Protocol):
    """Fills the parameters' `.grad` with the gradients of a global step's mean loss."""

    @property
    def proves(self) -> bool:
        """Whether the returned loss is not finite if a gradient is not."""
        ...

    @property
    def wait_seconds(self) -> float:
        """Total time that the host has waited in steps for other ranks' gradients. On a GPU the device waits, and this stays about 0."""
        ...

    def compute(self, batches: Sequence[Batch], *, global_count: int, step: int, observer: StepObserver) -> Tensor:
        """Compute the gradients of `batches`, one batch per virtual rank that this rank carries. Returns the summed loss divided by
        `global_count`: () float32 on the device, without a graph. In tree mode the sum is over all ranks, in ddp mode over this rank."""
        ...

    def compile_ahead(self, image: Sequence[int]) -> float:
        """Compile for full batches of `image` (3, H, W) uint8. Returns the seconds it took, 0 if nothing is compiled. In ddp mode this is a
        collective."""
        ...


class Reducer(Protocol):
    """Sums tensors over all virtual ranks in an order that does not depend on which rank carries them (cluster.reduce.TreeReducer)."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class PassConfig:
    """How batches go through the model."""

    seed: int
    accumulate: int = 1
    """Number of micro-batches that each batch is cut into. Their gradients are added up before they are handed over, so the same batch
    needs less memory. BatchNorm normalises each micro-batch by itself and updates its running statistics after each one, in order."""
    full_batches: tuple[int, ...] = ()
    """Samples that the model sees at once in a full step: one number, or two where an epoch's remainder is spread. If the model is
    compiled, only batches of these sizes use the compiled step: a short last step's own graph would cost more than it saves. Empty: every
    size is compiled, each by itself. A size's result never depends on the sizes before it, so that a run that goes on from a checkpoint
    gets the same bits."""
    compile_model: bool = False
    cuda_graphs: bool = False
    """Record the kernels of a full batch's pass when it first comes, and replay them from then on with one launch: by Inductor if the model
    is compiled, else by trainer.learn.capture."""
    augment: Augment | None = None
    """The user's own augmentation, of a virtual rank's whole batch."""
    views: Views | None = None
    """The built-in augmentation, before it."""
    mix: Mix | None = None
    """Mixes the samples, after it. The objective's loss is to be `mixed_loss`."""
    teacher: Teacher | None = None
    """Answers the samples as the model gets them. The objective's loss is to be `taught_loss`."""
    semi: Semi | None = None
    """Learns from the batches' unlabelled images as well. The objective's loss is to be its `loss`."""
    full_unlabelled: tuple[int, ...] = ()
    """As `full_batches`: unlabelled images that go through the model beside those, each in two views."""

    def __post_init__(self) -> None:
        assert not self.cuda_graphs or (self.accumulate == 1 and self.semi is None), "trainer.settings.rules has refused this"

    @property
    def full_passes(self) -> frozenset[int]:
        """The sizes of what goes through the model at once in a full step."""
        return frozenset(size + 2 * more for size in self.full_batches for more in self.full_unlabelled or (0,))

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {**SAME_BITS, **(CUDA_GRAPHS if self.cuda_graphs else {})}


def step_seed(seed: int, step: int, virtual_rank: int) -> int:
    """63-bit seed of all random draws in one (step, virtual rank), such as dropout and stochastic depth."""
    digest = hashlib.blake2b(f"{seed}/{step}/{virtual_rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _StandIn:
    """Stands for a norm's `num_batches_tracked` during a pass: notes on the host what is added. torch.compile does so outside of its
    graph."""

    def __init__(self, number: int, noted: list[int]) -> None:
        self.number, self.noted = number, noted

    def add_(self, one: int) -> None:
        self.noted.append(self.number)


class _Counters:
    """The counters of BatchNorm that nothing reads during a pass. On a GPU each of their additions is a kernel of its own, in eager steps
    and in compiled ones (20 a pass for ResNet-18). Here one kernel does them all after the passes, with the same result."""

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = [norm for norm in norms if _only_counts(norm)]
        self._noted: list[int] = []
        self._stand_ins: list[Any] = [_StandIn(number, self._noted) for number in range(len(self._norms))]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the context the norms' counters stand still, and what would be added to them is noted."""
        self._noted.clear()  # so that it is empty whenever a compiled step begins: it would be compiled again for another length
        counters = [norm.num_batches_tracked for norm in self._norms]
        for norm, stand_in in zip(self._norms, self._stand_ins, strict=True):
            norm._buffers["num_batches_tracked"] = None  # torch.compile wants nothing but tensors there; the place among the others stays
            vars(norm)["num_batches_tracked"] = stand_in
        try:
            yield
        finally:
            for norm, counter in zip(self._norms, counters, strict=True):
                del vars(norm)["num_batches_tracked"]
                norm._buffers["num_batches_tracked"] = counter

    def noted(self) -> Counter[int]:
        """How often the newest pass added one, by the norm's number."""
        return Counter(self._noted)

    def add(self, times: Counter[int]) -> None:
        """Make up for passes' additions."""
        for count in set(times.values()):  # as a rule all norms have counted alike
            counters = [self._norms[number].num_batches_tracked for number, own in times.items() if own == count]
            torch._foreach_add_(counters, count)  # type: ignore[arg-type]


def _only_counts(norm: _BatchNorm) -> bool:
    """Whether the norm's forward pass is known to use its counter for counting alone. With momentum=None it weighs by it."""
    is_known = type(norm).forward.__module__ in ("torch.nn.modules.batchnorm", "timm.layers.norm_act") and "forward" not in vars(norm)
    return is_known and norm.momentum is not None and norm.num_batches_tracked is not None


class Passes:
    """Runs micro-batches through the model. It uses the compiled step for batches of its size, and the eager one for others."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: PassConfig,
        *,
        eager: SummedLoss,
        compiled: SummedLoss | None,
        proves_replays: bool = False,
    ) -> None:
        """`proves_replays`: a replayed pass also shows in its loss whether its gradients are finite, without a launch of its own."""
        self._model, self._task, self._config, self._proves_replays = model, task, config, proves_replays
        self._eager, self._compiled = eager, compiled
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        self.counters = _Counters(self.norms)
        self.device = self.parameters[0].device
        self.semi = config.semi
        self._full_passes = config.full_passes
        self._captures = Captures(model, self.parameters, self.device) if config.cuda_graphs and not config.compile_model else None

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def seed(self, step: int, virtual_rank: int) -> None:
        torch.manual_seed(step_seed(self._config.seed, step, virtual_rank))

    def cut(self, batch: Batch, common: Targets | None = None) -> list[MicroBatch]:
        """A virtual rank's non-empty micro-batches, in order. A short batch is cut as evenly as possible. `common`: from Semi.begin."""
        samples, targets = self._prepared(batch, batch.virtual_rank)
        if common is not None and self.semi is not None and batch.unlabelled is not None:
            return assembled(samples, targets, self.semi.views(batch.unlabelled), common, self._config.accumulate)
        return self._cut(samples, targets)

    def joined(self, batches: Sequence[Batch], common: Targets | None = None) -> list[MicroBatch]:
        """The micro-batches of several virtual ranks that go through the model together; empty if no batch holds a sample. `common`: as for
        `cut`."""
        full = [self._prepared(batch, batches[0].virtual_rank) for batch in batches if len(batch.ids)]
        views = [self.semi.views(batch.unlabelled) for batch in batches if batch.unlabelled is not None] if self.semi is not None else []
        if common is not None and views:
            full = full or [self._prepared(batches[0], batches[0].virtual_rank)]
        if not full:
            return []
        samples, targets = full[0]
        if len(full) > 1:
            samples = torch.cat([each for each, _ in full])  # (n, 3, H, W), n over all virtual ranks
            targets = {name: torch.cat([their[name] for _, their in full]) for name in targets}
        if common is not None and views:
            return assembled(samples, targets, together(views), common, self._config.accumulate)
        return self._cut(samples, targets)

    def begin(self, step: int, global_count: int) -> Targets | None:
        """What the unlabelled images of the next batch need; None if the run has none."""
        return self.semi.begin(step, global_count) if self.semi is not None else None

    def share(self, batch: Batch, step: int, global_count: int) -> float:
        """The part of the step's samples that a virtual rank's batch holds, unlabelled ones included."""
        n = len(batch.ids)
        if self.semi is None or batch.unlabelled is None:
            return n / global_count
        return (n + 2 * len(batch.unlabelled.ids)) / (global_count + 2 * self.semi.count(step))

    def _prepared(self, batch: Batch, share_of: int) -> MicroBatch:
        config = self._config
        samples, mixing = augmented(batch, views=config.views, own=config.augment, mix=config.mix, share_of=share_of)
        answers = config.teacher.of(batch, samples) if config.teacher is not None else None
        samples, targets = self._task.prepare(samples, batch.targets)
        targets = targets if mixing is None else with_partners(targets, mixing)
        return samples, targets if answers is None else with_answers(targets, answers)

    def _cut(self, samples: Tensor, targets: Targets) -> list[MicroBatch]:
        parts = self._config.accumulate
        if parts == 1:
            return [(samples, targets)]
        split = {name: values.tensor_split(parts) for name, values in targets.items()}
        return [
            (few, {name: values[number] for name, values in split.items()})
            for number, few in enumerate(samples.tensor_split(parts))
            if len(few)
        ]

    def loss(self, samples: Tensor, targets: Targets, divisor: float) -> Tensor:
        """The summed loss of n samples divided by `divisor`: () float32, with its graph."""
        n = len(samples)
        if self._compiled is not None and n in (self._full_passes or (n,)):
            if self._config.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the last replay's outputs are used up
            return self._compiled(samples, targets) / divisor
        # The rest of an epoch may be a single image. It has no batch statistics: BatchNorm refuses it if its maps have one pixel.
        with _norms_at_rest(self.norms if n == 1 else ()):
            return self._eager(samples, targets) / divisor

    def weights_cast_once(self) -> AbstractContextManager[Any]:
        """Inside the context, which is for the passes of one step, autocast casts each weight once instead of once a pass, to the same
        bits: it drops its casts when the outermost of its contexts ends, which is this one. Outside of the passes' own contexts nothing is
        cast. Unlabelled images are guessed at without gradients, and such casts may not be passed on to passes with gradients; a compiled
        or recorded pass holds its casts itself."""
        holds_its_own = self._compiled is not None or self._captures is not None or self.semi is not None
        return nullcontext() if holds_its_own else torch.autocast(self.device.type, enabled=False)

    def is_replayed(self, samples: Tensor) -> bool:
        """Whether `replay` does the pass. Short batches are not worth a recording, and their graphs would hold memory."""
        n = len(samples)
        return self._captures is not None and n > 1 and n in (self._full_passes or (n,))

    def replay(self, samples: Tensor, targets: Targets, divisor: float, observer: StepObserver) -> tuple[Tensor, Counter[int]]:
        """A whole pass by one launch: leaves its gradients in the parameters, and returns its loss, () float32, and what the norms'
        counters would have counted. No hook of a parameter is called."""
        assert self._captures is not None

        def compute(samples: Tensor, targets: Targets) -> Tensor:
            with self.counters.aside():
                loss = self.loss(samples, targets, divisor)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach() + 0.0 * sum_of_norms(self.parameters) if self._proves_replays else loss.detach()

        observer.part("forward")
        loss, counted = self._captures.run(samples, targets, divisor, compute, self.counters.noted)
        observer.part("backward")
        return loss, counted

    def backward(
        self,
        parts: Sequence[MicroBatch],
        divisor: float,
        observer: StepObserver,
        *,
        before_the_last: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """Accumulate the gradients of all `parts` in the parameters. Returns their loss, () float32. All parts but the last run inside
        `before_the_last`."""
        total: Tensor | None = None
        counted: Counter[int] = Counter()
        with self.weights_cast_once() if len(parts) > 1 else nullcontext():
            for number, (samples, targets) in enumerate(parts, start=1):
                if self.is_replayed(samples):
                    loss, noted = self.replay(samples, targets, divisor, observer)
                else:
                    with before_the_last() if number < len(parts) else nullcontext(), self.counters.aside():
                        loss = self.loss(samples, targets, divisor)
                        observer.part("forward")
                        loss.backward()  # type: ignore[no-untyped-call]
                        observer.part("backward")
                    noted = self.counters.noted()
                counted += noted
                total = loss.detach() if total is None else total + loss.detach()
        self.counters.add(counted)
        assert total is not None
        return total

    def backward_of_nothing(self, row: Sequence[int], dtype: torch.dtype, observer: StepObserver) -> Tensor:
        """Run a blank sample that does not count: loss and gradients are 0."""
        blank = torch.zeros((1, *row), dtype=dtype, device=self.device)  # (1, 3, H, W)
        with evaluating(self._model):
            loss = self._eager(*self._task.prepare(blank, self._task.blank(1, self.device))) * 0.0
        loss.backward()  # type: ignore[no-untyped-call]
        observer.part("backward")
        return loss.detach()

    def _blank(self, size: int, image: Sequence[int]) -> Batch:
        """A batch of black images, (size, *image), as the loader makes them."""
        images = torch.zeros((size, *image), dtype=torch.uint8, device=self.device).contiguous(memory_format=torch.channels_last)
        ids = np.zeros(size, dtype=np.int64)
        return Batch(samples=images, targets=self._task.blank(size, self.device), ids=ids, epoch=0, step=0, virtual_rank=0)

    def _blank_pass(self, size: int, unlabelled: int, image: Sequence[int]) -> MicroBatch:
        """`size` labelled images and so many unlabelled ones, all black."""
        samples, targets = self._prepared(self._blank(size, image), 0)
        if self.semi is None:
            return samples, targets
        views = self.semi.views(self.semi.like(self._blank(unlabelled, image)))
        (only,) = assembled(samples, targets, views, self.semi.begin(0, size), 1)
        return only

    def compile_ahead(self, image: Sequence[int]) -> float:
        """Compile now, outside of any step, for full batches of (3, H, W) uint8. Returns the seconds it took, 0 if nothing is compiled.

        Forward and backward run once on a blank batch of each size. Buffers, gradients and the random state are restored afterwards."""
        if self._compiled is None or not self._config.full_batches:
            return 0.0
        begin = time.perf_counter()
        buffers = list(self._model.buffers())
        before = [buffer.clone() for buffer in buffers]
        for size, more in itertools.product(self._config.full_batches, self._config.full_unlabelled or (0,)):
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.counters.aside():
                loss = self.loss(*self._blank_pass(size, more, image), 1.0)
                loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())  # wait until the device has finished; this is not in a step
            self.clear_gradients()
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return time.perf_counter() - begin


def _bound(objective: Objective, forward: Forward) -> SummedLoss:
    """`objective` applied to `forward`. The closure holds neither Passes nor gradients, because the compiler keeps it alive."""

    def loss(samples: Tensor, targets: Targets) -> Tensor:
        return objective(forward, samples, targets)

    return loss


class PlainGradients:
    """Gradients in a single process: all batches of a step go through the model together."""

    proves = False
    """Of the newest step: a replayed one proves its gradients."""
    wait_seconds = 0.0

    def __init__(self, model: nn.Module, task: Task, objective: Objective, config: PassConfig) -> None:
        eager = _bound(objective, model)
        compiled: SummedLoss | None = None
        if config.compile_model:  # one graph from the image bytes to the loss
            # One graph per size. By default PyTorch compiles the second size it meets into a graph for all further sizes, and which size
            # comes second depends on the step that a run went on from.
            compiled = torch.compile(eager, backend=COMPILER, dynamic=False, options=config.compiler_options)
        self._passes = Passes(model, task, config, eager=eager, compiled=compiled, proves_replays=True)

    def compute(self, batches: Sequence[Batch], *, global_count: int, step: int, observer: StepObserver) -> Tensor:
        passes = self._passes
        passes.clear_gradients()
        common = passes.begin(step, global_count)
        parts = passes.joined(batches, common)
        self.proves = bool(parts) and passes.is_replayed(parts[0][0])
        passes.seed(step, batches[0].virtual_rank)
        loss = passes.backward(parts, global_count, observer)
        if passes.semi is not None and common is not None:
            passes.semi.end(common[SUMS])
        return loss

    def compile_ahead(self, image: Sequence[int]) -> float:
        return self._passes.compile_ahead(image)


class DdpGradients:
    """Gradients of one of several ranks. DistributedDataParallel adds them up while the backward pass runs. All batches of a step go
    through the model together. `compress` sends the gradients in bf16."""

    proves = False

    def __init__(
        self, model: nn.Module, task: Task, objective: Objective, config: PassConfig, *, world_size: int, compress: bool = False
    ) -> None:
        self._world_size = world_size
        self._forward = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if compress:
            self._forward.register_comm_hook(None, bf16_compress_hook)
        compiled: SummedLoss | None = None
        if config.compile_model:
            # Without CUDA graphs: in DDP's pieces nobody has tried them.
            forward = torch.compile(self._forward, backend=COMPILER, dynamic=False, options=dict(SAME_BITS))
            compiled = _bound(objective, forward)
        config = replace(config, cuda_graphs=False)
        self._passes = Passes(model, task, config, eager=_bound(objective, self._forward), compiled=compiled)
        on_cpu = self._passes.device.type == "cpu"
        self._waits = _DdpWaits(self._passes.parameters) if on_cpu else None
        self._last = None if on_cpu else _LastGradient(self._passes.parameters)

    @property
    def wait_seconds(self) -> float:
        return self._waits.seconds if self._waits is not None else 0.0

    def compute(self, batches: Sequence[Batch], *, global_count: int, step: int, observer: StepObserver) -> Tensor:
        passes = self._passes
        passes.clear_gradients()
        if self._last is not None:
            self._last.begin(observer)
        common = passes.begin(step, global_count)
        parts = passes.joined(batches, common)
        if parts:
            passes.seed(step, batches[0].virtual_rank)
            # DDP averages over ranks, but the sum is wanted. It exchanges the last part's gradients, which include the other parts'.
            divisor = global_count / self._world_size
            loss = passes.backward(parts, divisor, observer, before_the_last=self._forward.no_sync) / self._world_size
        else:  # in the last step of an epoch: the rank still has to take part in DDP's all-reduce
            samples = batches[0].samples
            loss = passes.backward_of_nothing(samples.shape[1:], samples.dtype, observer)
        if self._waits is not None:
            self._waits.backward_returned()
        if passes.semi is not None and common is not None:
            dist.all_reduce(common[SUMS])
            passes.semi.end(common[SUMS])
        return loss

    def compile_ahead(self, image: Sequence[int]) -> float:
        return self._passes.compile_ahead(image)


class TreeGradients:
    """Gradients of a rank whose virtual ranks go through the model one after the other. Each virtual rank hands three things to a reducer:
    its loss, its BatchNorm statistics weighted by its share of the batch, and its gradients, these from inside the backward pass.

    Hooks on the parameters hand over the gradients. DistributedDataParallel with a communication hook would not do: it adds up a rank's
    virtual ranks one after the other in its buckets, which brackets the sum differently from the tree, and it gives a rank one sum to send
    where uneven blocks need several. A hook takes each gradient by itself, and works the same for frozen and unused parameters, autocast
    and compiled models.
    """

    proves = True

    def __init__(
        self, model: nn.Module, task: Task, objective: Objective, config: PassConfig, reducer: Reducer, *, looks_at_gradients: bool = True
    ) -> None:
        """`looks_at_gradients`: the loss shows whether all summed gradients are finite. Turn it off if the update checks them anyway
        (Update.adds_up); the loss then shows it for the statistics only."""
        self._reducer, self._looks_at_gradients = reducer, looks_at_gradients
        compiled: SummedLoss | None = None
        if config.compile_model:
            compiled = _bound(objective, _compiled_in_pieces(model, reducer, config))
        self._passes = Passes(model, task, config, eager=_bound(objective, model), compiled=compiled)
        norms = self._passes.norms
        self._statistics = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self._counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self._weighing = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None and not _only_counts(m)]
        self._statistics_before = [torch.empty_like(b) for b in self._statistics]
        self._weighing_before = [torch.empty_like(c) for c in self._weighing]
        self._hands_over = _Gate()
        # Order of readiness: loss and statistics come before the backward pass, which goes from the last parameter to the first.
        semi = self._passes.semi
        guesses = [torch.zeros(semi.rule.sums, device=self._passes.device)] if semi is not None else []
        parameters, statistics = self._passes.parameters, 1 + len(guesses)
        self._first = first = statistics + len(self._statistics)
        loss = torch.zeros((), device=self._passes.device)
        sums = reducer.lay_out([loss, *guesses, *self._statistics, *reversed(parameters)], exact=first)
        self._loss_sums, self._guess_sums, self._statistic_sums = sums[0], sums[1:statistics], sums[statistics:first]
        self._gradient_sums = sums[first:][::-1]
        for part, parameter in enumerate(reversed(parameters), start=first):
            hook = _hand_over(weakref.ref(reducer), part, self._hands_over)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    @property
    def wait_seconds(self) -> float:
        return self._reducer.wait_seconds

    def compute(self, batches: Sequence[Batch], *, global_count: int, step: int, observer: StepObserver) -> Tensor:
        reducer, passes = self._reducer, self._passes
        passes.clear_gradients()  # then autograd hands over its gradient as it is, without adding it to an old one
        _copy(self._statistics, self._statistics_before)
        _copy(self._weighing, self._weighing_before)
        with passes.weights_cast_once() if len(batches) > 1 else nullcontext():
            for batch in batches:
                reducer.begin(batch.virtual_rank)
                common = passes.begin(step, global_count)
                if len(batch.ids) or (batch.unlabelled is not None and len(batch.unlabelled.ids)):
                    passes.seed(step, batch.virtual_rank)
                    parts = passes.cut(batch, common)
                    share = passes.share(batch, step, global_count)
                    if passes.is_replayed(parts[0][0]):
                        self._put_in_replayed(*parts[0], global_count, observer, share=share)
                    else:
                        self._put_in(parts, global_count, observer, share=share, common=common)
                reducer.end()
                # Each virtual rank starts from the same statistics and counters: BatchNorm may weigh by its counter.
                _copy(self._statistics_before, self._statistics)
                _copy(self._weighing_before, self._weighing)
        observer.phase("exchange")
        sums = reducer.finish(lambda: observer.phase("step"))  # after the callback, a hang here is not a wait for other ranks
        observer.phase("step")
        observer.part("reduction")
        for parameter, gradient in zip(passes.parameters, self._gradient_sums, strict=True):
            parameter.grad = gradient
        _copy(self._statistic_sums, self._statistics)
        if self._counters:
            torch._foreach_add_(self._counters, 1)  # counts steps instead of forward passes
        if passes.semi is not None:
            passes.semi.end(self._guess_sums[0])
        # Make the loss NaN if any sum is not finite.
        if self._looks_at_gradients:
            return self._loss_sums + 0.0 * sums.sum()
        return self._loss_sums + 0.0 * torch.stack([total.sum() for total in (self._loss_sums, *self._statistic_sums)]).sum()

    def _put_in(
        self, parts: Sequence[MicroBatch], global_count: int, observer: StepObserver, *, share: float, common: Targets | None
    ) -> None:
        """Hand the loss, the statistics and the gradients of one virtual rank to the reducer, and the sums over its guesses (`common`)."""
        reducer, passes = self._reducer, self._passes
        total: Tensor | None = None
        for number, (samples, targets) in enumerate(parts, start=1):
            self._hands_over.is_open = number == len(parts)
            with passes.counters.aside():  # they count steps
                loss = passes.loss(samples, targets, global_count)
                total = loss.detach() if total is None else total + loss.detach()
                if self._hands_over.is_open:
                    reducer.put(0, total)
                    if common is not None:
                        reducer.put(1, common[SUMS])
                    self._put_statistics(share)
                observer.part("forward")
                loss.backward()  # type: ignore[no-untyped-call]
                observer.part("backward")
        if len(parts) > 1:  # parameters that the last micro-batch did not use, but an earlier one did
            self._put_gradients()

    def _put_in_replayed(self, samples: Tensor, targets: Targets, global_count: int, observer: StepObserver, *, share: float) -> None:
        """The same for a pass that is replayed: it hands over everything at its end. The exchange with other ranks then has nothing to run
        beside, but that is only so for a rank's last virtual rank."""
        self._hands_over.is_open = False  # for the recording
        loss, _ = self._passes.replay(samples, targets, global_count, observer)  # counters count steps
        self._reducer.put(0, loss)
        self._put_statistics(share)
        self._put_gradients()

    def _put_statistics(self, share: float) -> None:
        shares = torch._foreach_mul(self._statistics, share) if self._statistics else ()
        for part, statistic in enumerate(shares, start=self._first - len(self._statistics)):
            self._reducer.put(part, statistic)

    def _put_gradients(self) -> None:
        for part, parameter in enumerate(reversed(self._passes.parameters), start=self._first):
            if parameter.grad is not None:
                self._reducer.put(part, parameter.grad)
                parameter.grad = None

    def compile_ahead(self, image: Sequence[int]) -> float:
        return self._passes.compile_ahead(image)


def _compiled_in_pieces(model: nn.Module, reducer: Reducer, config: PassConfig) -> Forward:
    """`model`, compiled in pieces that hold about a bucket's parameters each.

    One compiled graph would hand over all gradients at its end, when no computation is left to overlap with the exchange. PyTorch itself
    makes such pieces for DistributedDataParallel. bf16 rounds at the cuts, which are the same for any number of ranks."""
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend

    compiler: Any = lookup_backend(COMPILER)
    compiler = partial(compiler, config_patches=config.compiler_options)  # as torch.compile passes its options
    small = min(reducer.small_bucket_bytes, reducer.bucket_bytes)
    backend = DDPOptimizer(reducer.bucket_bytes, compiler, first_bucket_cap=small).compile_fn
    compiled: Forward = torch.compile(model, backend=backend, dynamic=False)
    return compiled


class _Gate:
    """Open while hooks should hand over gradients: only those of a virtual rank's last micro-batch are complete."""

    is_open = True


class _DdpWaits:
    """Adds up the time from a rank's last gradient to the return of the backward pass. On a CPU this is DDP's wait for other ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = 0.0, clock
        self._last_gradient = [0.0]
        for parameter in parameters:
            hook = _note_time(self._last_gradient, clock)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    def backward_returned(self) -> None:
        self.seconds += self._clock() - self._last_gradient[0]


class _LastGradient:
    """Marks the part "gradients" of a step when the last gradient of a backward pass is there, in the order of the device's work. What the
    device does from there to the end of the backward pass is DDP's wait for other ranks.

    The last gradient is that of the parameter that had it last in the pass before, so the first step has no such mark."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._newest = [-1]
        self._mark: list[tuple[int, StepObserver]] = []
        for number, parameter in enumerate(parameters):
            hook = _note_last(number, self._newest, self._mark)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    def begin(self, observer: StepObserver) -> None:
        """A step begins, which reports to `observer`."""
        self._mark[:] = [(self._newest[0], observer)]


def _note_last(number: int, newest: list[int], mark: list[tuple[int, StepObserver]]) -> Callable[[Tensor], None]:
    def accumulated(parameter: Tensor) -> None:
        newest[0] = number
        for expected, observer in mark:
            if expected == number:
                observer.part("gradients")

    return accumulated


def _note_time(into: list[float], clock: Callable[[], float]) -> Callable[[Tensor], None]:
    def accumulated(parameter: Tensor) -> None:
        into[0] = clock()

    return accumulated


def _hand_over(reducer: "weakref.ref[Reducer]", part: int, gate: _Gate) -> Callable[[Tensor], None]:
    """A hook that gives a parameter's gradient to the reducer while the reducer is open. It does not keep the reducer alive."""

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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the context `model` is in eval mode. Afterwards each module has its old mode (a frozen backbone stays in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _norms_at_rest(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the context `norms` normalise by their running statistics and do not update them."""
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
