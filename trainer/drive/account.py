"""Tells Prometheus, while a run goes on, where its seconds went so far. Called by attempt.py."""

import time

from cluster.coordinator import Status
from trainer.drive.session import Session
from trainer.runs.summary import ACCOUNTED, accounting

ACCOUNT_SECONDS = 10.0
REMOTE_ACCOUNT_SECONDS = 60.0  # there each event is an object to fetch


class Account:
    """Counted again every few seconds."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._every_seconds = ACCOUNT_SECONDS if session.storage.is_local else REMOTE_ACCOUNT_SECONDS
        self._told_at = 0.0

    def tell(self, status: Status) -> None:
        """Unless it was told a moment ago, or rank 0 has said nothing yet."""
        if time.monotonic() - self._told_at < self._every_seconds or 0 not in status.ranks:
            return
        self._told_at = time.monotonic()
        totals = status.ranks[0].totals
        events = [*self._session.events(), {"time": time.time(), "event": "now"}]
        self._session.ask("account", accounting(events, {name: totals.get(name, 0.0) for name in ACCOUNTED}))
