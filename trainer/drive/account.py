"""Reports to Prometheus, while a run goes on, where its seconds went so far. drive.py makes the Account, attempt.py calls it.

trainer.runs.summary does the accounting."""

import time

from cluster.coordinator import Status
from trainer.drive.session import Session
from trainer.runs.summary import ACCOUNTED, accounting

ACCOUNT_SECONDS = 10.0
REMOTE_ACCOUNT_SECONDS = 60.0  # on remote storage each event is an object to fetch


class Account:
    """Recomputes the accounting every few seconds and gives it to the coordinator."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._every_seconds = ACCOUNT_SECONDS if session.storage.is_local else REMOTE_ACCOUNT_SECONDS
        self._told_at = 0.0

    def tell(self, status: Status) -> None:
        """Report the seconds, unless the last report is recent or rank 0 has not reported yet."""
        if time.monotonic() - self._told_at < self._every_seconds or 0 not in status.ranks:
            return
        self._told_at = time.monotonic()
        totals = status.ranks[0].totals
        events = [*self._session.events(), {"time": time.time(), "event": "now"}]
        self._session.ask("account", accounting(events, {name: totals.get(name, 0.0) for name in ACCOUNTED}))
