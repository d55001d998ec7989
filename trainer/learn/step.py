"""The step (gradients, then the update) and the loop over steps, which is a generator. trainer.rank.worker calls `train_steps`.

Nothing here logs, saves, evaluates or waits for the device: a loss comes back with a later step's stats, once it has arrived on the host by
itself. Only the last step's stats wait for all losses. `trainer.learn.gradients` computes gradients, `trainer.learn.update` uses them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dataio.batch import Batch
from trainer.learn.gradients import Gradients, StepObserver
from trainer.learn.update import Update


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slot:
    """Where a number of a GPU arrives."""

    host: Tensor  # () pinned
    sent: torch.cuda.Event
    """Recorded behind the copy into it."""


class Slots:
    """Places in pinned memory, with an event each, for numbers on their way from a GPU. They are used again once a number has been read, so
    that a step takes no pinned memory and makes no event. Any thread may use them."""

    def __init__(self) -> None:
        self._free: dict[torch.dtype, deque[Slot]] = {}

    def take(self, dtype: torch.dtype) -> Slot:
        free = self._free.setdefault(dtype, deque())
        try:
            return free.popleft()  # the one that was free longest
        except IndexError:
            places = pinned(SLOTS_AT_ONCE, dtype).unbind()
        slots = [Slot(host=host, sent=torch.cuda.Event()) for host in places]  # type: ignore[no-untyped-call]
        free.extend(slots[1:])
        return slots[0]

    def give_back(self, slot: Slot) -> None:
        """Nobody will read it any more, and its copy is done."""
        self._free[slot.host.dtype].append(slot)


SLOTS_AT_ONCE = 64
"""As many as are on their way as a rule: a checkpoint's proof waits for the losses of a few dozen steps at most."""


def pinned(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) of host memory that a GPU can write into while the host goes on."""
    return torch.empty(count, dtype=dtype, pin_memory=True)


class Arriving:
    """A step's mean loss, or its gradient's norm, on its way from the device to the host. Any thread may call `wait`; the other methods are
    for the loop."""

    def __init__(
        self,
        step: int,
        loss: Tensor,
        work: dist.Work | None = None,
        aside: torch.cuda.Stream | None = None,
        slots: Slots | None = None,
    ) -> None:
        """`loss`: () on the device. `work`: the all-reduce that still adds up the ranks' shares of it. `aside`: on a GPU, a stream other
        than the steps' stream. `slots`: where numbers of a GPU arrive; without, this one gets a place of its own."""
        self.step = step
        self._loss, self._work, self._aside, self._slots = loss, work, aside, slots
        self._host: Tensor | None = None
        """A CPU's."""
        self._slot: Slot | None = None
        """A GPU's."""
        self._value: float | None = None
        """What has been read out of a slot."""
        self._reading = threading.Lock()
        if work is None:
            self._send()

    def reduced(self) -> None:
        """Call it a step later, when the all-reduce has long finished."""
        if self._work is not None and self._host is None and self._slot is None:
            self._work.wait()
            self._send()

    def is_here(self) -> bool:
        if self._slot is not None:
            # Should another thread just have read it, the place may be another number's, and this says once more that it is not here.
            return self._value is not None or bool(self._slot.sent.query())  # type: ignore[no-untyped-call]
        return self._host is not None

    def wait(self) -> float:
        """Wait for the loss and return it. Only this thread waits."""
        if self._slot is not None:
            return self._read(self._slot)
        if self._host is not None:
            return float(self._host)
        assert self._work is not None
        if not self._loss.is_cuda:
            self._work.wait()
            return float(self._loss)
        with torch.cuda.stream(self._aside):
            self._work.wait()  # makes this stream wait for the all-reduce, while the steps' stream goes on
            return float(self._loss)

    def _send(self) -> None:
        """Queue the copy to the host behind the steps."""
        if not self._loss.is_cuda:
            self._host = self._loss
            return
        self._slots = self._slots or Slots()
        slot = self._slots.take(self._loss.dtype)
        slot.host.copy_(self._loss, non_blocking=True)
        slot.sent.record()
        self._slot = slot  # last, because another thread may be in wait()

    def _read(self, slot: Slot) -> float:
        with self._reading:
            if self._value is None:
                slot.sent.synchronize()
                self._value = float(slot.host)
                assert self._slots is not None
                self._slots.give_back(slot)
            return self._value


class DeviceWaits:
    """How long a GPU waited for batches, by events around each hand-over. A host that is steps ahead of its device takes a batch at once,
    also one whose making is only queued, and no clock of the host shows how long the device then waits for it. Nothing here waits."""

    def __init__(self) -> None:
        self._begin: torch.cuda.Event | None = None
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # hand-overs that the device may not have passed
        self._free: list[torch.cuda.Event] = []

    def asked(self) -> None:
        """The host is about to take a batch: the device comes here once it has done the step before."""
        self._begin = self._recorded()

    def taken(self) -> None:
        """The stream of the steps waits for the batch: the device comes here once it is made."""
        assert self._begin is not None, "asked() comes first"
        self._queued.append((self._begin, self._recorded()))

    def arrived_seconds(self) -> float:
        """Sum over the hand-overs that the device has passed since the last call."""
        seconds = 0.0
        while self._queued and self._queued[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._queued.popleft()
            seconds += begin.elapsed_time(end) / 1e3
            self._free += begin, end
        return seconds

    def _recorded(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One step, seen from the host. `losses`: the (step, mean loss) that have arrived since the last stats."""

    steps_done: int
    epoch: int
    samples: int  # over all virtual ranks
    learning_rate: float
    step_seconds: float
    data_wait_seconds: float
    """On a GPU those waits of the device that have ended since the last stats: of a few steps before, as a rule (DeviceWaits)."""
    losses: tuple[tuple[int, float], ...]
    late: tuple[Arriving, ...] = ()
    """Losses of this and earlier steps that have not arrived yet, in order."""
    skipped: bool = False
    """The batch was loaded but not used: no update, no loss."""
    gradient_norms: tuple[float, ...] = ()
    """Norms that have arrived since the last stats, in order, of the steps that computed theirs (StepObserver.takes_norm)."""
    exchange_seconds: float = 0.0
    """Time in this step that the host waited for the other ranks' gradients."""


class Unobserved:
    """A StepObserver that does nothing."""

    def phase(self, phase: str, /) -> None: ...

    def part(self, part: str, /) -> None: ...

    def takes_norm(self) -> bool:
        return False


UNOBSERVED = Unobserved()


class Stepper:
    """One optimisation step over the virtual ranks that this rank carries. Make a new one when other parameters are trained."""

    def __init__(self, gradients: Gradients, update: Update, observer: StepObserver = UNOBSERVED) -> None:
        self._gradients, self._update = gradients, update
        self.observer = observer

    @property
    def wait_seconds(self) -> float:
        """Total time that the host has waited in steps for other ranks' gradients. On a GPU the device waits, and this stays about 0."""
        return self._gradients.wait_seconds

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the newest step's gradient if its observer asked for it: () on the device, before any clipping, over the whole batch."""
        return self._update.gradient_norm

    def step(self, batches: Sequence[Batch], *, global_count: int, step: int) -> Tensor:
        """Do global step `step`. Returns the mean loss over the whole batch (in ddp mode this rank's share of it): () float32 on the
        device, not finite if a gradient is not."""
        observer, gradients = self.observer, self._gradients
        loss = gradients.compute(batches, global_count=global_count, step=step, observer=observer)
        loss = self._update.apply(loss, is_proven=gradients.proves, takes_norm=observer.takes_norm())
        observer.part("optimizer")
        return loss

    def compile_ahead(self, image: Sequence[int]) -> float:
        """Compile now, outside of any step, for full batches of (3, H, W) uint8. Returns the seconds it took, 0 if nothing is compiled. In
        ddp mode this is a collective."""
        return self._gradients.compile_ahead(image)


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

    `batches` yields one tuple per step, in order. `batch_count(step_in_epoch)` is the global batch's size; `set_learning_rate(step)` sets
    and returns the learning rate. `sum_over_ranks` adds the ranks' loss shares (ddp mode) in an asynchronous all-reduce. The batches of the
    steps in `skip` are loaded but not used: no forward, no update, while learning rate and step count go on. All ranks skip the same steps.
    """
    losses: deque[Arriving] = deque()
    norms: deque[Arriving] = deque()
    waited = stepper.wait_seconds
    waits = DeviceWaits() if device.type == "cuda" else None
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    slots = Slots()
    for step in range(start_step, stop_step):
        begin = clock()
        stepper.observer.part("other")
        if waits is not None:
            waits.asked()
        batch = next(batches)
        if waits is not None:
            waits.taken()
        loaded = clock()
        stepper.observer.part("data")
        count = batch_count(step % steps_per_epoch)
        rate = set_learning_rate(step)
        skipped, last = step in skip, step + 1 == stop_step
        loss = None if skipped else stepper.step(batch, global_count=count, step=step)
        if losses:
            losses[-1].reduced()  # the previous step's all-reduce has long finished
        if loss is not None:
            losses.append(Arriving(step, loss, dist.all_reduce(loss, async_op=True) if sum_over_ranks else None, aside, slots))
            if stepper.gradient_norm is not None:
                norms.append(Arriving(step, stepper.gradient_norm, slots=slots))
        arrived = []
        while losses and (last or losses[0].is_here()):
            arrived.append((losses[0].step, losses[0].wait()))
            losses.popleft()
        known = []
        while norms and norms[0].is_here():
            known.append(norms.popleft().wait())
        before, waited = waited, stepper.wait_seconds
        yield StepStats(
            steps_done=step + 1,
            epoch=step // steps_per_epoch,
            samples=count,
            learning_rate=rate,
            step_seconds=clock() - begin,
            data_wait_seconds=loaded - begin if waits is None else waits.arrived_seconds(),
            losses=tuple(arrived),
            late=tuple(losses),
            skipped=skipped,
            gradient_norms=tuple(known),
            exchange_seconds=waited - before,
        )
