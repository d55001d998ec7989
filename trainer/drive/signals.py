"""Signals that stop a command, at any moment of it. trainer/run.py makes a `Signals` for the whole command; start.py, drive.py and
ending.py say which phase the command is in, and the phase decides what a signal does and what the user is told.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) mean the same: keep what there is, then end. In most phases they raise
KeyboardInterrupt in the main thread. While the ranks train they only ask for a checkpoint, which the driver sees by `number` and its alarm.
A second signal ends the command at once. `nohup` works: a SIGHUP that was ignored at the start stays ignored.

Python drops a KeyboardInterrupt that is raised in a destructor or in the callback of a weak reference, and prints a traceback: a signal may
come just there. It is raised again a moment later, where it is not dropped, and nothing is printed.
"""

import _thread
import ctypes
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from types import FrameType

from trainer.settings.programs import program

SAME_SIGNAL_SECONDS = 0.3
AGAIN_SECONDS = 0.01
"""After a KeyboardInterrupt was dropped."""


class Phase(Enum):
    """What a command is doing, as far as a signal makes a difference."""

    BEGINNING = auto()
    """A moment only, in which the command arms itself against being killed. A signal waits for the next phase."""
    DRY_RUN = auto()
    SETTING_UP = auto()
    PREPARING_DATA = auto()
    RESUMING = auto()
    """As SETTING_UP, of a run that an earlier command began."""
    TRAINING = auto()
    ENDING = auto()
    """The ranks have ended; the summary and the end are being written down."""
    REPORTING = auto()
    """The end is written down, the report is not."""
    OVER = auto()
    """All is written; what this process started is being ended."""


INTERRUPTIBLE = frozenset({Phase.DRY_RUN, Phase.SETTING_UP, Phase.PREPARING_DATA, Phase.RESUMING, Phase.REPORTING})
"""Phases in which the first signal raises KeyboardInterrupt. In the others what is under way is completed."""


def farewell(phase: Phase, name: str, *, at_once: bool = False) -> str:
    """What the user is told of a command that signal `name` ended in this phase. `at_once`: by a second signal."""
    how = f"{name}: stopped at once" if at_once else f"{name}: stopped"
    match phase:
        case Phase.DRY_RUN:
            return f"{how}; a dry run changes nothing"
        case Phase.BEGINNING | Phase.SETTING_UP:
            return f"{how} before training began; the same command starts again"
        case Phase.PREPARING_DATA:
            return f"{how} while the data were opened or converted; the same command goes on after the last complete shard"
        case Phase.RESUMING:
            return f"{how} before training went on; the same command goes on from the newest saved checkpoint"
        case Phase.TRAINING:
            return f"{how}; the same command goes on from the newest saved checkpoint"
        case Phase.ENDING:
            return f"{how} while the end of the run was written down; the same command completes it"
        case Phase.REPORTING:
            return f"{how} before report.html was written; the same command, or {program('report')}, writes it"
        case Phase.OVER:
            return f"{how}; all of the run is written"


def _leave(status: int) -> None:
    raise SystemExit(status)


class Signals:
    """Hears the signals of one command."""

    def __init__(self) -> None:
        self._number, self._at = 0, 0.0
        self._phase, self._came_in = Phase.BEGINNING, Phase.BEGINNING
        self._leave: Callable[[int], None] = _leave
        self._raising = threading.Lock()  # of what is raised again; no signal handler takes it
        self._was_dropped = False
        self._alarm: SimpleQueue[None] = SimpleQueue()  # not a threading.Event: a signal handler may find its lock taken

    @property
    def number(self) -> int:
        """Number of the first signal that came; 0: none."""
        return self._number

    @property
    def name(self) -> str:
        """`SIGINT`, `SIGTERM` or `SIGHUP`; "" if none came."""
        return signal.Signals(self._number).name if self._number else ""

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def cuts_short(self) -> bool:
        """Whether a signal came that ends the command before all is done; one that came in training asks for less."""
        return bool(self._number) and self._came_in in INTERRUPTIBLE | {Phase.BEGINNING, Phase.ENDING}

    def enter(self, phase: Phase) -> None:
        """The command is in this phase from now on. KeyboardInterrupt if a signal waits: it came at the beginning, or while the end was
        written down and what follows can be left out, or it raised one before that something swallowed."""
        self._phase = phase
        with self._raising:
            self._was_dropped = False
        if self.cuts_short and phase is not Phase.OVER:
            raise KeyboardInterrupt

    @property
    def seconds(self) -> float:
        """Time since the signal; infinite if none came."""
        return time.monotonic() - self._at if self._number else math.inf

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
        """Handle the signals here inside the context. Only in the main thread."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        shown = sys.unraisablehook
        sys.unraisablehook = partial(self._dropped, shown)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
            with self._raising:
                self._was_dropped = False
            sys.unraisablehook = shown

    @contextmanager
    def leaving_by(self, leave: Callable[[int], None]) -> Iterator[None]:
        """Inside the context a second signal calls `leave(status)`; outside it raises SystemExit."""
        before, self._leave = self._leave, leave
        try:
            yield
        finally:
            self._leave = before

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number and now - self._at < SAME_SIGNAL_SECONDS:
            return  # `timeout` and some schedulers send the same signal to the process and to its group
        if self._number:
            tell(farewell(self._phase, signal.Signals(number).name, at_once=True))
            self._leave(128 + number)
            return
        self._number, self._at, self._came_in = number, now, self._phase
        self.wake()
        if self._phase in INTERRUPTIBLE:
            raise KeyboardInterrupt

    def _dropped(self, show: Callable[["sys.UnraisableHookArgs"], object], what: "sys.UnraisableHookArgs") -> None:
        """Python's hook for an exception that it drops: of a destructor, for instance."""
        if what.exc_type is not KeyboardInterrupt or not self._number:
            show(what)
        elif self._phase in INTERRUPTIBLE:
            self._was_dropped = True
            _thread.start_new_thread(self._raise_again, ())  # a threading.Thread takes locks, which the interrupted code may hold

    def _raise_again(self) -> None:
        select.select([], [], [], AGAIN_SECONDS)
        with self._raising:
            if self._was_dropped:  # and the main thread is still where it may be interrupted
                self._was_dropped = False
                main = ctypes.c_ulong(threading.main_thread().ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def tell(sentence: str) -> None:
    """Write a line to standard error from a signal handler or from a thread when the process is about to end: past Python's buffers, which
    the interrupted code may hold, and with the cursor, which a progress line hides."""
    with suppress(OSError):
        cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{cursor}{sentence}\n".encode(errors="replace"))
