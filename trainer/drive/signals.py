"""SIGINT and SIGTERM while a run is under way, and the driver's sleep, which they and others end."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

SAME_SIGNAL_SECONDS = 0.3


class Signals:
    """The first one asks for a checkpoint and the end; the second one ends the program at once."""

    def __init__(self) -> None:
        self._number, self._at = 0, 0.0
        self._alarm: SimpleQueue[None] = SimpleQueue()  # not a threading.Event: a signal's handler may find its lock taken

    @property
    def number(self) -> int:
        """Of the signal that came; 0: none did."""
        return self._number

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM; "" if none came."""
        return signal.Signals(self._number).name if self._number else ""

    def new_alarm(self) -> "SimpleQueue[None]":
        """What something is put into from now on by a signal and by `wake`. Set it before looking at what may have come already."""
        self._alarm = SimpleQueue()
        return self._alarm

    def wake(self) -> None:
        """End the sleep of who waits for the newest alarm. From any thread."""
        self._alarm.put(None)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, both signals are heard here."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and now - self._at < SAME_SIGNAL_SECONDS:
            return  # `timeout` and some schedulers send theirs to the process and to its group
        if self._number:
            print("stopped at once; the same command goes on from the newest saved checkpoint", file=sys.stderr)
            raise SystemExit(128 + number)
        self._number, self._at = number, now
        self.wake()
