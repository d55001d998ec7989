"""The coordinator's memory: its State, and the log that its successor reads. coordinator.py holds one, behind its lock.

Every message goes through `do`, which applies it and logs it. The log begins with a snapshot of the state; it is begun anew with each
attempt, and when it has grown long. A disk that refuses the log stops nothing: the memory goes on without one, says so in the journal, and
begins another one when it can. An incomplete log is removed, because a successor would take it for the whole."""

import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.state import State
from cluster.wal import Log, read_log

LOG_BYTES = 16 << 20
"""Bytes of messages after which the log is begun anew."""
LOG_PAUSE_SECONDS = 10.0
"""Time between two tries to begin a log on a disk that refuses it."""
LOG_LOST = "coordinator_log_lost"
_BEGINS_ANEW = ("begin", "restarted")


class Memory:
    """See the module. No lock of its own. `log`: the file; None keeps none."""

    def __init__(self, log: Path | None, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time) -> None:
        self._path, self._log = log, None if log is None else Log(log)
        self._clock, self._now = clock, now
        self._snapshot_bytes, self._is_whole = 0, False
        self._failed_at: float | None = None
        self._state: State | None = None

    @property
    def state(self) -> State:
        assert self._state is not None, "take_up() or begin() comes first"
        return self._state

    def take_up(self) -> tuple[bool, str]:
        """Take up what a coordinator that died has left. Returns whether there was anything, and what is wrong with it if it is useless."""
        try:
            self._state = None if self._path is None else replayed(read_log(self._path))
        except Exception as error:  # whatever is wrong with the file: most of what it held can be found elsewhere
            return False, f"{type(error).__name__}: {error}"
        return self._state is not None, "it is gone"

    def begin(self, state: State) -> None:
        """Begin with this state, because there is no log."""
        self._state = state

    def do(self, message: str, *arguments: Any) -> Any:
        """Apply a message and log it; returns its result. When this returns, the message survives the process."""
        time = self._now()
        result = self.state.apply(time, message, arguments)
        if self._log is not None:
            grown = self._log.size_bytes - self._snapshot_bytes
            try:
                if message in _BEGINS_ANEW or not self._is_whole or grown > LOG_BYTES:
                    self._begin_log(self._log)
                else:
                    self._log.append(pickle.dumps((time, message, arguments)))
            except OSError as error:
                self._lose_log(self._log, error)
        return result

    def close(self) -> None:
        """Log nothing more; the file stays."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _begin_log(self, log: Log) -> None:
        if self._failed_at is not None and self._clock() - self._failed_at < LOG_PAUSE_SECONDS:
            return
        log.begin([self.state.dumped()])
        self._snapshot_bytes, self._is_whole, self._failed_at = log.size_bytes, True, None

    def _lose_log(self, log: Log, error: OSError) -> None:
        is_news = self._is_whole or self._failed_at is None
        self._is_whole, self._failed_at = False, self._clock()
        try:
            log.discard()
        except OSError as worse:
            error = worse
        if is_news:
            self.state.apply(self._now(), "say", (LOG_LOST, {"message": f"the coordinator goes on without: {error}"}))


def replayed(records: Sequence[bytes] | None) -> State | None:
    """The state that a log leads to; None if there is no log."""
    if not records:
        return None
    state = State.from_dump(records[0])
    for record in records[1:]:
        time, message, arguments = pickle.loads(record)
        state.apply(time, message, arguments)
    return state
