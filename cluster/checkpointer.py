"""A rank's half of a checkpoint, off the step path: snapshot (on the step path, a copy) -> stage -> ack (in a thread).

Called by the trainer's worker. At most one checkpoint is in flight: a second `save` waits for the first, and that wait is counted as stall.
The commit itself is the coordinator's.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from cluster.store import Receipt

Buffers = Iterable[bytes | bytearray | memoryview]
Files = Callable[[], Iterable[tuple[str, Buffers]]]


class Checkpointer:
    """Stages what `snapshot()` returns and acknowledges it.

    `stage(step, name, buffers) -> Receipt` writes one file; `ack(step, receipts, meta)` tells the coordinator.
    """

    def __init__(
        self,
        *,
        stage: Callable[[int, str, Buffers], Receipt],
        ack: Callable[[int, list[Receipt], dict[str, Any]], None],
        on_staged: Callable[[int, float, int], None] = lambda step, seconds, size_bytes: None,
        on_failed: Callable[[int, OSError], None] = lambda step, error: None,
    ) -> None:
        self._stage, self._ack, self._on_staged, self._on_failed = stage, ack, on_staged, on_failed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.stall_seconds = 0.0

    def save(self, step: int, snapshot: Callable[[], Files], meta: dict[str, Any]) -> float:
        """Take `snapshot()` now and stage its files in the background; the seconds this call held up the steps.

        `snapshot` copies the state into private buffers and returns a function that yields (name, contents) of each file; that
        function runs in the background thread. An error of an earlier background write is raised here.
        """
        begin = time.perf_counter()
        self.wait()
        files = snapshot()
        self._thread = threading.Thread(target=self._write, args=(step, files, meta), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        stall = time.perf_counter() - begin
        self.stall_seconds += stall
        return stall

    def wait(self) -> None:
        """Wait until nothing is in flight; raise what went wrong there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, files: Files, meta: dict[str, Any]) -> None:
        begin = time.perf_counter()
        try:
            receipts = [self._stage(step, name, buffers) for name, buffers in files()]
            self._ack(step, receipts, meta)
        except OSError as error:  # a full disk or a lost mount: the older checkpoints stay, training goes on, the journal says so
            self._on_failed(step, error)
        except BaseException as error:  # handed to the next save() or wait(), in the thread that can act on it
            self._error = error
        else:
            self._on_staged(step, time.perf_counter() - begin, sum(receipt.size_bytes for receipt in receipts))
