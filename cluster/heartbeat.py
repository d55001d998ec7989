"""A rank's side of the coordinator: reports this rank's position off the step path, and stops all ranks after the same number of steps.

trainer/rank/worker.py calls progress() and should_stop() after each step. Neither blocks, except at a stop that is not yet agreed on.
stop.py defines how ranks agree, beat.py what a beat holds."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cluster.beat import EXCHANGE, STARTING, Beat, BeatReply
from cluster.stop import AGAIN_SECONDS, Gate


class CoordinatorLost(RuntimeError):
    """A rank waits for a stop to be confirmed, but the coordinator does not answer."""

    failure_kind = "infrastructure"


class Heartbeat:
    """Beats every `interval` seconds from its own thread.

    `call(beat)` reaches Coordinator.beat by any route. `start_step`: steps done when this attempt began. Training continues when the
    coordinator does not answer; a rank that must wait for it gives up after `patience_seconds` (CoordinatorLost)."""

    def __init__(
        self,
        call: Callable[[Beat], BeatReply],
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
        self._totals: dict[str, float] = {}
        self._own_seconds: float | None = None
        self._phase, self._ticks = STARTING, 0
        self._changed = threading.Condition()
        self._again_seconds: float | None = None
        self._waits = False
        self._closed = False
        self._answered_at = clock()
        self.last_error: Exception | None = None
        """The exception of the newest call if it failed, else None."""
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{rank}", daemon=True)
        self._thread.start()

    def progress(
        self,
        steps_done: int,
        stats: Mapping[str, float] | None = None,
        *,
        totals: Mapping[str, float] | None = None,
        own_seconds: float | None = None,
    ) -> None:
        """Store this rank's position for the next beat; makes no call, does not block. An argument of None keeps the old value. The
        rest: see Beat."""
        with self._changed:
            self._gate.done(steps_done)
            self._ticks += 1
            if stats is not None:
                self._stats = dict(stats)
            if totals is not None:
                self._totals = dict(totals)
            if own_seconds is not None:
                self._own_seconds = own_seconds

    @property
    def phase(self) -> str:
        """What this rank says it is doing (beat)."""
        return self._phase

    def tick(self, phase: str | None = None) -> None:
        """Progress was made, or a phase begins (see beat). Makes no call, does not block.

        A tick stands for work done, or for one look at something outside of this process that is waited for with a limit. Never tick from
        a timer: a rank that is stuck would look busy."""
        self._ticks += 1
        if phase is not None:
            self._phase = phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase from here to the end of the block, then again the one before."""
        before = self._phase
        self.tick(phase)
        try:
            yield
        finally:
            self.tick(before)

    def should_stop(self, steps_done: int) -> bool:
        """Call after `steps_done` steps are done, before the next one begins. Returns True on all ranks after the same number of steps.

        Blocks only at an unconfirmed stop."""
        with self._changed:
            stop = self._gate.arrive(steps_done)
            if stop is None:
                with self.during(EXCHANGE):
                    stop = self._wait_for_stop(steps_done)
            self._waits = False
            return stop

    def _wait_for_stop(self, steps_done: int) -> bool:
        """Whether to stop, once the others have promised too or the stop is off. The caller holds the lock."""
        waiting_since = self._clock()
        while (stop := self._gate.arrive(steps_done)) is None:
            if self._clock() - max(self._answered_at, waiting_since) > self._patience_seconds:
                raise CoordinatorLost(
                    f"rank {self._rank} waits after {steps_done} steps for a stop to be confirmed; no answer from the coordinator for "
                    f"{self._patience_seconds:g} s; last error: {self.last_error!r}"
                )
            if not self._waits:
                self._waits = True
                self._changed.notify_all()
            self._changed.wait(min(self._interval, 1.0))
        return stop

    def close(self) -> None:
        """Send a last beat, then end the thread."""
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
            beat = Beat(
                attempt=self._attempt,
                rank=self._rank,
                steps_done=gate.steps_done,
                steps_begun=gate.steps_begun,
                promised_stop=gate.stop_at,
                stats=self._stats,  # replaced as a whole, never changed in place
                totals=self._totals,
                own_seconds=self._own_seconds,
                phase=self._phase,
                ticks=self._ticks,
                urgent=self._closed or self._waits or self._again_seconds is not None,
            )
        try:
            reply = self._call(beat)
        except Exception as error:  # any error on the way to the coordinator: training does not depend on it
            self.last_error, self._again_seconds = error, None
            return
        with self._changed:
            self.last_error = None
            self._answered_at = self._clock()
            self._again_seconds = reply.again_seconds
            gate.take(reply)
            self._changed.notify_all()
