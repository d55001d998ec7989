"""Waits for things outside of a rank's process, so that the rank is seen to wait and the wait has an end.

Used by trainer/rank wherever the main thread needs the storage or the coordinator; checkpointer.py waits in its own way. hang.py reads what
the rank says."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from cluster.beat import STORAGE
from cluster.storage import StorageOutage

T = TypeVar("T")

OUTAGE_PATIENCE_SECONDS = 3600.0
"""How long a rank waits for a storage that does not answer."""
REFUSAL_PATIENCE_SECONDS = 600.0
"""How long a rank that has nothing else left to do waits for a storage that refuses: somebody may free a disk or renew credentials."""
LOOK_SECONDS = 1.0
"""How often a waiting rank looks, and ticks."""


class Ticking(Protocol):
    """The part of heartbeat.Heartbeat that a wait needs."""

    def tick(self, phase: str | None = None) -> None: ...

    def during(self, phase: str) -> AbstractContextManager[None]: ...


class Waits:
    """Calls the storage, or the coordinator, for a rank's main thread. `phase` says for whom it waits, `error` is raised after the
    patience."""

    def __init__(
        self,
        heartbeat: Ticking,
        *,
        phase: str = STORAGE,
        error: Callable[[str], Exception] = StorageOutage,
        patience_seconds: float = OUTAGE_PATIENCE_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeat, self._phase, self._error = heartbeat, phase, error
        self._patience_seconds, self._look_seconds, self._clock = patience_seconds, look_seconds, clock

    def call(self, work: Callable[[], T], what: str) -> T:
        """The result of `work()`, which may do nothing but wait for the other side. After the patience an error that names `what`.

        It runs in a thread of its own: a call that hangs in a mount cannot be interrupted. The main thread looks every second and ticks.
        Another thread of the rank just calls: the phase is the main thread's."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        began = self._clock()
        threading.Thread(target=run, name=f"{self._phase}-call", daemon=True).start()
        wait([outcome], self._look_seconds)
        if not outcome.done():
            with self._heartbeat.during(self._phase):
                while not outcome.done():
                    if self._clock() - began > self._patience_seconds:
                        raise self._error(
                            f"{what}: the {self._phase} has not answered for {self._clock() - began:.0f} s; see that it is up"
                        )
                    self._heartbeat.tick()
                    wait([outcome], self._look_seconds)
        return outcome.result()
