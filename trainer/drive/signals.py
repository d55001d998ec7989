"""SIGINT and SIGTERM while a run is under way, and the alarm that wakes the driver from its sleep. drive.py makes it; attempt.py and
fleets.py use it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType

from trainer.settings.say import complain

SAME_SIGNAL_SECONDS = 0.3


class Signals:
    """The first signal asks for a checkpoint and a stop. The second one ends the program at once."""

    def __init__(self) -> None:
        self._number, self._at = 0, 0.0
        self._alarm: SimpleQueue[None] = SimpleQueue()  # not a threading.Event: a signal handler may find its lock taken

    @property
    def number(self) -> int:
        """Number of the signal that came; 0: none."""
        return self._number

    @property
    def name(self) -> str:
        """`SIGINT` or `SIGTERM`; "" if none came."""
        return signal.Signals(self._number).name if self._number else ""

    def new_alarm(self) -> "SimpleQueue[None]":
        """A new queue that signals and `wake` put an item into from now on. Make it before checking what may have happened already."""
        self._alarm = SimpleQueue()
        return self._alarm

    def wake(self) -> None:
        """Wake whoever waits on the newest alarm. Any thread may call it."""
        self._alarm.put(None)

    def sleep(self, seconds: float) -> None:
        """Sleep that long; a signal ends it."""
        alarm = self.new_alarm()
        if not self._number:
            with suppress(Empty):
                alarm.get(timeout=seconds)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle both signals here inside the context."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and now - self._at < SAME_SIGNAL_SECONDS:
            return  # `timeout` and some schedulers send the same signal to the process and to its group
        if self._number:
            complain("stopped at once; the same command goes on from the newest saved checkpoint")
            raise SystemExit(128 + number)
        self._number, self._at = number, now
        self.wake()
