"""Ends a coordinator that lives but answers nobody: stopped by a signal or a debugger, or stuck. Ray starts it again only if it dies.

The driver makes one Overseer and calls `look` again and again while a call of its own stays unanswered (trainer/drive/session.py). The
coordinator runs on the driver's node, so its process is looked at, and killed, from here. launch.py says which process it is. hang.py does
the same for ranks."""

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.hang import LONGEST_LOOK_SECONDS, STOPPED_SECONDS
from cluster.process import process_stat

SILENT_SECONDS = 60.0
"""How long a coordinator that runs may leave a question unanswered that needs nothing but its lock. A log on a slow disk may hold that."""
FORGOTTEN_SECONDS = 10.0
"""After this time without a look a suspicion is forgotten. A look may take some seconds: it asks Ray."""
_NAME = "ray::Coordinato"
"""What Ray names its process, as far as the kernel keeps it. Another name: the process id is of another machine or container."""


class Answer(Protocol):
    """A question to the coordinator on its way."""

    def is_there(self) -> bool:
        """Whether it was answered, or failed; then the coordinator is alive or Ray is already starting it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """What Ray knows of the coordinator's process."""

    pid: int
    is_ready: bool
    """It has begun, and may be asked. Until then it may have to wait for the storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hung:
    """A coordinator that was killed because it answered nobody."""

    kind: Literal["stopped", "silent"]
    pid: int
    seconds: float

    def describe(self) -> str:
        what = "was stopped (state T: SIGSTOP or a debugger)" if self.kind == "stopped" else "answered nobody"
        return f"the coordinator {what} for {self.seconds:.0f} s and was killed; Ray starts it again, and the ranks train on"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Since:
    """A suspicion against one process, in seconds during which the driver really watched."""

    pid: int
    kind: Literal["stopped", "silent"]
    watched: float


class Overseer:
    """Watches one run's coordinator. Only the driver's main thread uses it."""

    def __init__(self, find: Callable[[], Actor | None], ask: Callable[[], Answer], *, name: str = _NAME) -> None:
        """`find()` gives the coordinator's process, None if nobody knows; `ask()` puts a question that a free coordinator answers at
        once. `name`: the process has this name, or is left alone."""
        self._find, self._ask, self._name = find, ask, name
        self._looked_at, self._watched = 0.0, 0.0
        self._since: _Since | None = None
        self._answer: Answer | None = None

    def look(self, now: float) -> Hung | None:
        """Look at the coordinator, and kill it if it has hung for too long. `now` in seconds, from any steady clock. Time in which the
        driver itself did not run does not count."""
        gone = max(now - self._looked_at, 0.0)
        if gone > FORGOTTEN_SECONDS:  # calls were answered meanwhile, or nothing ran
            self._since = self._answer = None
        self._watched += min(gone, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        actor = self._find()
        state = self._state(actor)
        if actor is None or not state:
            self._since = self._answer = None
            return None
        is_stopped = state in ("T", "t")
        if not is_stopped and not (actor.is_ready and self._is_asked_in_vain()):
            self._since = None
            return None
        kind: Literal["stopped", "silent"] = "stopped" if is_stopped else "silent"
        if self._since is None or (self._since.pid, self._since.kind) != (actor.pid, kind):
            self._since = _Since(pid=actor.pid, kind=kind, watched=self._watched)
        seconds = self._watched - self._since.watched
        if seconds < (STOPPED_SECONDS if is_stopped else SILENT_SECONDS):
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(actor.pid, signal.SIGKILL)
        self._since = self._answer = None
        return Hung(kind=kind, pid=actor.pid, seconds=seconds)

    def _state(self, actor: Actor | None) -> str:
        """The state letter in /proc; "" if it is no process of this machine that is alive."""
        stat = process_stat(actor.pid) if actor is not None and actor.pid else None
        return stat.state if stat is not None and stat.is_alive and stat.name == self._name else ""

    def _is_asked_in_vain(self) -> bool:
        if self._answer is None or self._answer.is_there():
            self._answer = self._ask()
            return False
        return True
