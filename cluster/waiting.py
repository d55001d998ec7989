"""Waits for things outside of a rank's process, so that the rank is seen to wait and the wait has an end.

Used by trainer/rank wherever the main thread needs the storage; checkpointer.py waits in its own way. hang.py reads what the rank says."""

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


class StorageWaits:
    """Calls a storage for a rank's main thread."""

    def __init__(
        self,
        heartbeat: Ticking,
        *,
        patience_seconds: float = OUTAGE_PATIENCE_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeat, self._patience_seconds, self._look_seconds, self._clock = heartbeat, patience_seconds, look_seconds, clock

    def call(self, work: Callable[[], T], what: str) -> T:
        """The result of `work()`, which may do nothing but wait for a storage. StorageOutage, which names `what`, after the patience.

        It runs in a thread of its own: a call that hangs in a mount cannot be interrupted. The main thread looks every second and ticks."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        began = self._clock()
        threading.Thread(target=run, name="storage-call", daemon=True).start()
        wait([outcome], self._look_seconds)
        if not outcome.done():
            with self._heartbeat.during(STORAGE):
                while not outcome.done():
                    if self._clock() - began > self._patience_seconds:
                        raise StorageOutage(f"{what}: the storage has not answered for {self._clock() - began:.0f} s; see that it is up")
                    self._heartbeat.tick()
                    wait([outcome], self._look_seconds)
        return outcome.result()
