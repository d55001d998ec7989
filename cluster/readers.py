"""Who reads a server's pages: a run's Prometheus servers, known by the headers that they send. Called by targets.py, which lets a run's end
wait until they have read it.

A wait is as long as a reader's own interval, and there is none where nobody reads, or where a reader has given up. A person with curl is
no reader."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SCRAPE_HEADER = "x-prometheus-scrape-timeout-seconds"
REFRESH_HEADER = "x-prometheus-refresh-interval-seconds"
"""What Prometheus sends with a scrape and with a question to http_sd. The first one is at most the interval, the second one is it."""
UNKNOWN_SECONDS = 15.0
"""Taken for the interval of a reader that came once."""
MOST_SECONDS = 65.0
"""The longest wait for one read: a little more than Prometheus's default interval."""
LATE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A Prometheus that has read a page."""

    last: float
    """When its newest request came."""
    interval_seconds: float


def read_again(before: Reader | None, began: float, *, refresh_seconds: float | None, timeout_seconds: float | None) -> Reader:
    """The reader after a request that came at `began`, and said this of itself. Two jobs of one Prometheus look like one that reads more
    often, which the time-out corrects."""
    if refresh_seconds is not None:
        return Reader(last=began, interval_seconds=refresh_seconds)
    if before is None:
        return Reader(last=began, interval_seconds=UNKNOWN_SECONDS)
    return Reader(last=began, interval_seconds=max(began - before.last, timeout_seconds or 0.0))


def due_seconds(reader: Reader, since: float, now: float) -> float:
    """How long at most to wait until `reader` has read what is there since `since`; 0 if it has, or if it is long overdue and so comes no
    more."""
    if reader.last >= since:
        return 0.0
    latest = reader.last + 1.5 * reader.interval_seconds + LATE_SECONDS
    return min(max(0.0, latest - now), MOST_SECONDS)


class Readers:
    """The readers of one or more servers' pages. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._readers: dict[tuple[str, str], Reader] = {}  # by path and client

    def heard(self, path: str, client: str, began: float, headers: Mapping[str, str]) -> None:
        """Take in a request (exporter.Heard)."""
        refresh, timeout = headers.get(REFRESH_HEADER), headers.get(SCRAPE_HEADER)
        if refresh is None and timeout is None:
            return
        with self._changed:
            before = self._readers.get((path, client))
            again = read_again(before, began, refresh_seconds=_seconds(refresh), timeout_seconds=_seconds(timeout))
            self._readers[path, client] = again
            self._changed.notify_all()

    def due_seconds(self, path: str, since: float) -> float:
        """How long at most to wait until all who read `path` have read what is there since `since`; 0 where nobody does."""
        with self._changed:
            return self._due(path, since)

    def wait(self, path: str, since: float) -> None:
        """Wait for them."""
        with self._changed:
            while (left := self._due(path, since)) > 0:
                self._changed.wait(left)

    def _due(self, path: str, since: float) -> float:
        now = self._clock()
        return max((due_seconds(reader, since, now) for (read, _), reader in self._readers.items() if read == path), default=0.0)


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
