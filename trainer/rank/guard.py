"""Checks each step's loss: NaN, infinity and spikes end the attempt. The driver then rolls back and skips the batch.

worker.py shows every step to `Guard.stepped`, in order, with the losses that have arrived on the host. All ranks see the same losses and so
decide alike. A checkpoint may be acknowledged only after every loss up to it has passed. On a GPU losses arrive some steps late, so
saving.py takes a `proof`, in which the checkpoint's own thread waits for those on their way. cluster.failures.decide decides what happens
to the run.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from cluster.failures import BadNumbers
from trainer.learn.step import Arriving, StepStats

WINDOW = 100
"""Number of losses that a spike is measured against."""
ENOUGH = 50
"""Number of losses from which on their scatter is known."""
FLOOR_NATS = 1.0
HARD_NATS = 12.0
"""Loss of a single hard or wrongly labelled sample in healthy training."""
EARLY_TIMES = 5.0
"""Before the scatter is known, a loss may rise this many times as far above the largest one so far as that is above the task's floor."""
SIGMA_OF_MAD = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""


class Guard:
    """Raises BadNumbers for a loss that is not finite, or that is a spike:

        loss > median + max(spike_factor * sigma, median - loss_floor, FLOOR_NATS)       sigma = 1.4826 * median(|losses - median|)

    over the last 100 losses that passed, once there are 50. A few outliers do not move the median and the MAD. The margin `median -
    loss_floor` (a doubled loss if the task's floor is 0) prevents alarms when the losses hardly scatter. FLOOR_NATS, in nats of
    cross-entropy, prevents them when the losses are almost at the floor and one hard sample is many times their median. A task whose loss
    has no floor (None) has only FLOOR_NATS. With `spike_factor` 0 only NaN and infinity count.

    The loss of n samples, fewer than half of the usual `batch_size`, scatters more: its margin is sqrt(batch_size / n) times as wide, and
    at least HARD_NATS / n, since one hard sample is a large part of the mean. It does not become one of the losses that others are
    measured against.

    Before there are 50, the scatter is not known: then a loss is a spike if it is above the largest one so far by more than EARLY_TIMES
    that loss's height above the floor (without a floor, its magnitude), and by more than HARD_NATS / n. Of 36 small networks
    (tests/trainer/loss_curves.py: batches of 4, 8 and 32; SGD from lr 0.01 to 0.3 and AdamW to 0.01, with and without BatchNorm) all that
    learned stayed below 4.3 times the largest loss before; the six that rose more than 6-fold ended where they had begun, or worse.

    Tested on 94 runs of a small network on Fashion-MNIST (134,770 steps; batches of 4 to 333; SGD up to lr 0.3 and AdamW up to 0.01, with
    and without BatchNorm, label noise and smoothing, four schedules). A factor of 10 gave 9 alarms, at most 2 per run, each a loss of 4.6
    to 35 from a learning rate too high for the network. A factor of 8 gave 18 alarms, 16 gave 7.

    `samples_of(step)` is a batch's size. The window starts anew at the steps `fresh_at` (where a backbone thaws). A run begun before short
    batches and first losses were judged goes on without that (`load`).
    """

    def __init__(
        self,
        *,
        spike_factor: float,
        batch_size: int,
        samples_of: Callable[[int], int],
        fresh_at: Sequence[int] = (),
        loss_floor: float | None = 0.0,
        judges_early: bool = True,
        heaviest: float = 1.0,
    ) -> None:
        """`heaviest`: how many times the loss of one sample may count (class weights); one hard sample then shows as many times as much.

        `judges_early`: the first losses too. Squared errors may rise a hundredfold before they fall, so only cross-entropy, on which the
        rule was measured, is judged like that."""
        self._factor, self._batch_size, self._samples_of, self._fresh_at = spike_factor, batch_size, samples_of, tuple(fresh_at)
        self._loss_floor, self._judges_early, self._heaviest = loss_floor, judges_early, heaviest
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._last_step = -1
        self._judges_all = True
        self.newest_loss: float | None = None
        """Loss of the newest step that passed; None before the first one, or right after `load`."""

    def stepped(self, stats: StepStats) -> None:
        """Check the losses that have arrived."""
        for step, loss in stats.losses:
            self.check(step, loss)

    def check(self, step: int, loss: float) -> None:
        """Check the mean loss of `step`; BadNumbers if it is bad. Steps come in order, without those whose batch was skipped."""
        assert step > self._last_step, f"the loss of step {step} came after that of step {self._last_step}"
        if not math.isfinite(loss):
            raise BadNumbers(step, loss, f"the loss is {loss}: the loss or a gradient is not finite")
        if any(self._last_step < fresh <= step for fresh in self._fresh_at):
            self._losses.clear()
        samples = self._samples_of(step)
        is_short = 2 * samples < self._batch_size
        if self._factor and self._losses and (self._judges_all or not is_short):
            self._check_spike(step, loss, samples if is_short else 0)
        if not is_short:
            self._losses.append(loss)
        self._last_step, self.newest_loss = step, loss

    def _check_spike(self, step: int, loss: float, few: int) -> None:
        """`few`: the number of samples of a short batch, else 0."""
        if len(self._losses) < ENOUGH:
            if self._judges_all and self._judges_early:
                self._check_early(step, loss, few)
            return
        median = statistics.median(self._losses)
        least = FLOOR_NATS * self._heaviest
        if self._loss_floor is not None:
            least = max(median - self._loss_floor, least)
        if loss <= median + least:  # nearly always true, and saves computing the MAD
            return
        sigma = SIGMA_OF_MAD * statistics.median(abs(each - median) for each in self._losses)
        margin = max(self._factor * sigma, least)
        if few:
            margin = max(margin * math.sqrt(self._batch_size / few), HARD_NATS * self._heaviest / few)
        if loss > median + margin:
            have = f"the {len(self._losses)} losses before it have the median {median:.6g}"
            raise self._spike(step, loss, have, limit=median + margin, few=few)

    def _check_early(self, step: int, loss: float, few: int) -> None:
        top, floor = max(self._losses), self._loss_floor
        height = max(top - min(self._losses), abs(top)) if floor is None else top - floor
        margin = max(EARLY_TIMES * max(height, FLOOR_NATS * self._heaviest), HARD_NATS * self._heaviest / (few or self._batch_size))
        if loss > top + margin:
            have = f"the largest of the run's first {len(self._losses)} losses is {top:.6g}"
            raise self._spike(step, loss, have, limit=top + margin, few=few)

    def _spike(self, step: int, loss: float, have: str, *, limit: float, few: int) -> BadNumbers:
        of = f" of {few} samples" if few else ""
        off = f"train.spike_factor={self._factor:g}, 0 turns this off"
        return BadNumbers(step, loss, f"the loss{of} is {loss:.6g}, a spike: {have}, the limit is {limit:.6g} ({off})")

    def state(self) -> dict[str, Any]:
        """The guard's whole state, as JSON for `load`. History saves it in checkpoints."""
        return {"last_step": self._last_step, "losses": list(self._losses), "judges_all": self._judges_all}

    def load(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave `state`. An empty one starts anew, or is from a checkpoint older than guards. One of a guard that
        judged neither short batches nor the first losses goes on like that: the run keeps its rule."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self._last_step = state.get("last_step", -1)
        self._judges_all = bool(state.get("judges_all", not state))

    def copy(self) -> "Guard":
        twin = Guard(
            spike_factor=self._factor,
            batch_size=self._batch_size,
            samples_of=self._samples_of,
            fresh_at=self._fresh_at,
            loss_floor=self._loss_floor,
            judges_early=self._judges_early,
            heaviest=self._heaviest,
        )
        twin.load(self.state())
        twin.newest_loss = self.newest_loss
        return twin

    def proof(self, late: Sequence[Arriving]) -> Callable[[], "Guard"]:
        """A function for another thread to call. It waits for the losses `late` (StepStats.late), which this guard has not seen, and
        returns a copy of this guard that has seen them too. It raises BadNumbers if one is bad. This guard may go on meanwhile."""
        twin = self.copy()

        def wait() -> Guard:
            for loss in late:
                twin.check(loss.step, loss.wait())
            return twin

        return wait
