"""A rank's side of the coordinator: tell where this rank is, off the step path, and stop all ranks after the same number of steps.

The worker's loop calls progress() and should_stop() after each step; neither waits, except at a stop that is not yet agreed. The other
side is coordinator.StopVote. A proposal to stop after P steps binds a rank only if the rank takes it in before it has begun step P: a
rank that has is already inside a collective that the others must join. So ranks report the steps they have *begun*, not only those they
have done."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

AGAIN_SECONDS = 0.02  # between two beats while a stop is being agreed on


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """The coordinator's answer to a beat."""

    stop_at: int | None
    """Steps after which to stop, None to go on."""
    confirmed: bool
    """Every rank has promised to stop there."""
    again_seconds: float | None = None
    """A stop is being agreed on: when to beat again, whatever the interval. What a rank says late is no use for that."""


class CoordinatorLost(RuntimeError):
    """A rank waits for a stop to be confirmed and the coordinator does not answer."""


class Gate:
    """What a rank has begun and promised; no thread, no clock. After `n` steps arrive(n) says whether step n may begin."""

    def __init__(self, start_step: int) -> None:
        self.steps_done = start_step
        self.steps_begun = start_step + 1  # no gate before the first step
        self.stop_at: int | None = None
        self.confirmed = False

    def take(self, orders: Orders) -> None:
        """Take in a proposal, unless the step it would forbid has begun."""
        if orders.stop_at is None or orders.stop_at < max(self.steps_begun, self.stop_at or 0):
            return
        self.stop_at, self.confirmed = orders.stop_at, orders.confirmed

    def arrive(self, steps_done: int) -> bool | None:
        """True: stop here. False: the next step has begun. None: wait for confirmation, or for another proposal."""
        self.steps_done = steps_done
        if self.stop_at is None or steps_done < self.stop_at:
            self.steps_begun = max(self.steps_begun, steps_done + 1)
            return False
        assert steps_done == self.stop_at, f"{steps_done} steps done, but promised to stop after {self.stop_at}"
        return True if self.confirmed else None


class Heartbeat:
    """Beats every `interval` seconds from a thread of its own.

    `call(attempt, rank, steps_done, seen_stop, stats, steps_begun, pulse)` is Coordinator.beat, by whatever way leads there. `start_step`:
    steps done when this attempt began. The pulse says what the rank is at (`phase`), that it gets on with it (`ticks`), and whether it
    waits for the answer, a stop is being agreed on, or this is its last beat (`urgent`, 1 or 0). A coordinator that does not answer is no
    reason to stop training; a rank that must wait for it gives up after `patience_seconds` (CoordinatorLost)."""

    def __init__(
        self,
        call: Callable[..., Orders],
        rank: int,
        attempt: int,
        interval: float,
        *,
        start_step: int,
        patience_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call, self._rank, self._attempt, self._interval = call, rank, attempt, interval
        self._patience_seconds, self._clock = patience_seconds, clock
        self._gate = Gate(start_step)
        self._stats: dict[str, float] = {}
        self._phase, self._ticks = "starting", 0
        self._changed = threading.Condition()
        self._again_seconds: float | None = None
        self._waits = False
        self._closed = False
        self._answered_at = clock()
        self.last_error: Exception | None = None
        """What the newest failed call raised; None after a good one."""
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{rank}", daemon=True)
        self._thread.start()

    def progress(self, steps_done: int, stats: Mapping[str, float] | None = None) -> None:
        """Remember where this rank is for the next beat; no call, no wait."""
        with self._changed:
            self._gate.steps_done = steps_done
            self._ticks += 1
            if stats is not None:
                self._stats = dict(stats)

    def tick(self, phase: str | None = None) -> None:
        """Something got done, or something else begins: "starting", "step", "exchange" (waiting for other ranks), "evaluation",
        "checkpoint". No call, no wait."""
        self._ticks += 1
        if phase is not None:
            self._phase = phase

    def should_stop(self, steps_done: int) -> bool:
        """Call after `steps_done` steps are done, before the next begins; True on all ranks after the same number of steps.

        Blocks only at an unconfirmed stop."""
        waiting_since: float | None = None
        with self._changed:
            while (stop := self._gate.arrive(steps_done)) is None:
                now = self._clock()
                waiting_since = now if waiting_since is None else waiting_since
                if now - max(self._answered_at, waiting_since) > self._patience_seconds:
                    raise CoordinatorLost(
                        f"rank {self._rank} waits after {steps_done} steps for a stop to be confirmed; no answer from the coordinator for "
                        f"{self._patience_seconds:g} s; last error: {self.last_error!r}"
                    )
                if not self._waits:
                    self._waits = True
                    self._changed.notify_all()
                self._changed.wait(min(self._interval, 1.0))
            self._waits = False
            return stop

    def close(self) -> None:
        """A last beat, then the thread ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                last = self._closed
            self._beat()
            if last:
                return
            beaten = time.monotonic()
            with self._changed:
                while not self._closed and (left := beaten + self._pause_seconds() - time.monotonic()) > 0:
                    self._changed.wait(left)

    def _pause_seconds(self) -> float:
        if self._again_seconds is not None:
            return self._again_seconds
        return min(self._interval, AGAIN_SECONDS) if self._waits else self._interval

    def _beat(self) -> None:
        with self._changed:
            gate = self._gate
            urgent = self._closed or self._waits or self._again_seconds is not None
            pulse: dict[str, int | str] = {"phase": self._phase, "ticks": self._ticks, "urgent": int(urgent)}
            said = (self._attempt, self._rank, gate.steps_done, gate.stop_at, dict(self._stats), gate.steps_begun, pulse)
        try:
            orders = self._call(*said)
        except Exception as error:  # whatever the way to the coordinator raises: training does not depend on it
            self.last_error, self._again_seconds = error, None
            return
        with self._changed:
            self.last_error = None
            self._answered_at = self._clock()
            self._again_seconds = orders.again_seconds
            gate.take(orders)
            self._changed.notify_all()
