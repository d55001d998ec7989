"""Reports to Prometheus, while a run goes on, where its seconds went so far. drive.py makes the Account, attempt.py calls it.

trainer.runs.summary does the accounting. It reads the journal, so it works in a thread: training does not wait for the storage, and neither
does the driver's loop."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import ray

from cluster.coordinator import Status
from trainer.drive.session import Session
from trainer.runs.summary import ACCOUNTED, accounting

ACCOUNT_SECONDS = 10.0
REMOTE_ACCOUNT_SECONDS = 60.0  # on remote storage each event is an object to fetch


class Account:
    """Recomputes the accounting every few seconds and gives it to the coordinator."""

    def __init__(self, session: Session, clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._clock = session, clock
        self._every_seconds = ACCOUNT_SECONDS if session.storage.is_local else REMOTE_ACCOUNT_SECONDS
        self._told_at = 0.0
        self._thread: threading.Thread | None = None

    def tell(self, status: Status) -> None:
        """Report the seconds, unless the last report is recent or under way, or rank 0 has not reported yet."""
        is_telling = self._thread is not None and self._thread.is_alive()
        if is_telling or self._clock() - self._told_at < self._every_seconds or 0 not in status.ranks:
            return
        self._told_at = self._clock()
        self._thread = threading.Thread(target=self._tell, args=(status.ranks[0].totals,), name="account", daemon=True)
        self._thread.start()

    def _tell(self, totals: Mapping[str, float]) -> None:
        events = [*self._session.newest_events(), {"time": time.time(), "event": "now"}]
        with suppress(ray.exceptions.RayError):  # the next account tells the same, and more
            self._session.call("account", accounting(events, {name: totals.get(name, 0.0) for name in ACCOUNTED}))
