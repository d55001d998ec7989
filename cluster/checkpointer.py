"""A rank's part of a checkpoint: snapshot (a copy, on the step path) -> stage -> ack (in a background thread).

Called by trainer/rank/saving.py. At most one checkpoint is in flight. A second `save` waits for the first; that wait counts as stall, and
separately as back-pressure. While it waits it says so every second (`on_wait`), for at most waiting.OUTAGE_PATIENCE_SECONDS. The
coordinator writes the commit.

With another disk on the node (spill.py), a storage that does not answer, refuses, is full or stalls blocks nobody. The checkpoint goes to
that disk, and a second thread uploads it when the storage takes it. If a `save` finds that the previous checkpoint still waits for the
storage, it spills that one at once. The rules:
  - While any checkpoint is spilled, every later one is spilled behind it. They are uploaded and acknowledged one after the other.
  - Two are kept. A third one drops the oldest that is not being uploaded, and reports it: a newer complete checkpoint replaces it.
So no checkpoint is acknowledged before an older one that will still be acknowledged, and the newest is never dropped.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from cluster.beat import EXCHANGE, STORAGE
from cluster.spill import Spill, SpillDamaged, Spilled
from cluster.storage import StorageOutage, StorageRefused
from cluster.store import Receipt
from cluster.waiting import LOOK_SECONDS, OUTAGE_PATIENCE_SECONDS, REFUSAL_PATIENCE_SECONDS

Buffers = Iterable[bytes | bytearray | memoryview]
Files = Callable[[], Iterable[tuple[str, Buffers]]]

SPILLED_KEPT = 2
UPLOAD_PAUSE_SECONDS = 1.0
"""Time between two tries to upload; each try also waits by itself (storage.RetryPolicy)."""
REFUSED_PAUSE_SECONDS = 5.0
"""The same where the storage answered with a refusal."""
STALL_SECONDS = 20.0
"""After this time a local disk that is to take one file counts as stalled, if the next checkpoint waits for it."""
_CLOSE_SECONDS = 5.0


class _SpillQueue:
    """Spilled checkpoints that wait for their upload, oldest first. It has no lock: the checkpointer holds its own around every call."""

    def __init__(self) -> None:
        self._waiting: list[Spilled] = []
        self._on_its_way: Spilled | None = None
        self._has_uploader = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def steps(self) -> list[int]:
        return [spilled.step for spilled in self._waiting]

    def add(self, spilled: Spilled) -> list[Spilled]:
        """Add a checkpoint; return those that no longer have room: the oldest that are not being uploaded."""
        self._waiting.append(spilled)
        dropped = []
        while len(self._waiting) > SPILLED_KEPT:
            victim = next(other for other in self._waiting if other is not self._on_its_way)
            self._waiting.remove(victim)
            dropped.append(victim)
        return dropped

    def needs_uploader(self) -> bool:
        """True if the caller must start a thread that calls next(). Then False until next() has returned None."""
        needed, self._has_uploader = not self._has_uploader, True
        return needed

    def next(self, *, is_closed: bool) -> Spilled | None:
        """The checkpoint to upload now; None ends the uploader."""
        self._has_uploader = bool(self._waiting) and not is_closed
        self._on_its_way = self._waiting[0] if self._has_uploader else None
        return self._on_its_way

    def put_back(self) -> None:
        """The checkpoint being uploaded waits again, and may now be dropped."""
        self._on_its_way = None

    def remove(self, spilled: Spilled) -> None:
        self._waiting.remove(spilled)
        self._on_its_way = None


class _Outage:
    """An outage of the storage, from the first failure to the next success. It has no lock: the checkpointer holds its own around every
    call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None
        self.problem = ""
        """The storage's latest error."""
        self._is_silent = True  # it gives no answer; else it refuses

    @property
    def patience_seconds(self) -> float:
        """How long to wait for its end with nothing else left to do."""
        return OUTAGE_PATIENCE_SECONDS if self._is_silent else REFUSAL_PATIENCE_SECONDS

    def given_up(self, message: str) -> OSError:
        """The error of a run that has waited long enough: of the kind that the storage gave."""
        return StorageOutage(message) if self._is_silent else StorageRefused(message)

    def goes_on(self, error: OSError) -> None:
        # The text alone: an error holds the frames that it passed, and these the mapped files of a checkpoint.
        self.problem, self._is_silent = str(error), isinstance(error, StorageOutage)

    def begins(self, error: OSError) -> bool:
        """Returns False if the outage had already begun."""
        self.goes_on(error)
        begins = self._since is None
        if begins:
            self._since = self._clock()
        return begins

    def ends(self) -> float | None:
        """How many seconds it lasted; None if there was no outage."""
        if self._since is None:
            return None
        seconds, self._since = self._clock() - self._since, None
        return seconds


class _Staging:
    """The way of one checkpoint's files to the storage, where `stage` may hang in a mount."""

    def __init__(
        self,
        stage: Callable[[int, str, Buffers], Receipt],
        *,
        is_hurried: Callable[[], bool] | None,
        clock: Callable[[], float],
        look_seconds: float,
    ) -> None:
        """`is_hurried()`: the next checkpoint waits for this one. None: there is no other place to put it, so `stage` may take its time."""
        self._stage, self._is_hurried, self._clock, self._look_seconds = stage, is_hurried, clock, look_seconds
        self._stalled: threading.Thread | None = None
        self.is_at_work = False
        """The checkpoint's thread waits for the storage, and not for the proof of its numbers."""

    def begin(self) -> None:
        self.is_at_work = True

    def end(self) -> None:
        self.is_at_work = False

    def stage(self, step: int, name: str, buffers: Buffers) -> Receipt:
        """Write a file. StorageOutage once that has taken STALL_SECONDS and the next checkpoint waits: then the thread that hangs in it is
        left behind."""
        if self._is_hurried is None:
            return self._stage(step, name, buffers)
        outcome: Future[Receipt] = Future()

        def run() -> None:
            try:
                outcome.set_result(self._stage(step, name, buffers))
            except BaseException as error:
                outcome.set_exception(error)

        began = self._clock()
        thread = threading.Thread(target=run, name=f"stage-{step}-{name}", daemon=True)
        thread.start()
        while not outcome.done():
            thread.join(self._look_seconds)
            seconds = self._clock() - began
            if not outcome.done() and seconds > STALL_SECONDS and self._is_hurried():
                self._stalled = thread
                raise StorageOutage(f"{name} of step {step} is not written after {seconds:.0f} s: the disk or mount stalls")
        return outcome.result()

    def stage_again(self, step: int, name: str, buffers: Buffers) -> Receipt:
        """Write a file that was kept elsewhere meanwhile. StorageOutage while a thread that was left behind may still write it."""
        if self._stalled is not None and self._stalled.is_alive():
            raise StorageOutage(f"{self._stalled.name} is still not written: the disk or mount stalls")
        self._stalled = None
        return self._stage(step, name, buffers)


class Checkpointer:
    """Stages what `snapshot()` returns and acknowledges it.

    `stage(step, name, buffers) -> Receipt` writes one file. `ack(step, receipts, meta)` tells the coordinator. `on_event(event, fields)`
    reports an outage: storage_outage, checkpoint_spilled, storage_recovered. Without `spill` a checkpoint that cannot be staged fails.

    `on_wait(phase)` is called in the caller's thread about every `look_seconds` while `save` or `wait` wait: with beat.STORAGE for the
    storage, with beat.EXCHANGE for proof that the numbers are good, which other ranks or the device still owe. `may_stall`: `stage` may
    hang in a mount, where no error ever comes; it then runs in threads that can be left behind.
    """

    def __init__(
        self,
        *,
        stage: Callable[[int, str, Buffers], Receipt],
        ack: Callable[[int, list[Receipt], dict[str, Any]], None],
        on_staged: Callable[[int, float, int], None] = lambda step, seconds, size_bytes: None,
        on_failed: Callable[[int, OSError], None] = lambda step, error: None,
        on_event: Callable[[str, dict[str, Any]], None] = lambda event, fields: None,
        on_wait: Callable[[str], None] = lambda phase: None,
        spill: Spill | None = None,
        may_stall: bool = False,
        clock: Callable[[], float] = time.monotonic,
        look_seconds: float = LOOK_SECONDS,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._ack, self._on_staged, self._on_failed, self._on_event = ack, on_staged, on_failed, on_event
        self._on_wait, self._clock, self._look_seconds = on_wait, clock, look_seconds
        self._spill = spill
        self._staging = _Staging(
            stage, is_hurried=self.hurried if may_stall and spill is not None else None, clock=clock, look_seconds=look_seconds
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._hurry = threading.Event()
        self._changed = threading.Condition()
        self._spilled, self._outage = _SpillQueue(), _Outage(clock)
        self._uploader: threading.Thread | None = None
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self.stall_seconds = 0.0
        """Time for which save() blocked the steps."""
        self.backpressure_seconds = 0.0
        """The part of it spent waiting for the previous checkpoint; the rest is the copy."""

    def save(self, step: int, snapshot: Callable[[], Files], meta: dict[str, Any]) -> float:
        """Take `snapshot()` now and stage its files in the background; returns the seconds for which this call blocked the steps.

        `snapshot` copies the state into private buffers and returns a function that yields (name, contents) of each file; that function
        runs in the background thread. An error of an earlier background write is raised here.
        """
        begin = time.perf_counter()
        self._hurry.set()
        self._join()
        self._hurry.clear()
        waited = time.perf_counter() - begin
        files = snapshot()
        self._thread = threading.Thread(target=self._write, args=(step, files, meta), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        stall = time.perf_counter() - begin
        self.stall_seconds += stall
        self.backpressure_seconds += waited
        return stall

    def hurried(self) -> bool:
        """For `stage`: True when the next checkpoint waits for this one. With a second disk, waiting for a failing storage is not worth
        it."""
        return self._spill is not None and (self._hurry.is_set() or self._closed.is_set())

    def wait(self, patience_seconds: float | None = None) -> None:
        """Wait until nothing is in flight or spilled; raise any error that occurred. StorageOutage or StorageRefused after
        `patience_seconds`, by default an hour for a storage that does not answer and ten minutes for one that refuses."""
        self._join()
        began = self._clock()
        while True:
            with self._changed:
                done = self._changed.wait_for(lambda: not self._spilled or self._error is not None, self._look_seconds)
                steps, outage = ", ".join(map(str, self._spilled.steps())), self._outage
            self._raise()
            if done:
                return
            assert self._spill is not None
            self._on_wait(STORAGE)
            if self._clock() - began > (outage.patience_seconds if patience_seconds is None else patience_seconds):
                raise outage.given_up(
                    f"checkpoint(s) of step {steps} wait in {self._spill.folder} for a storage that does not take them "
                    f"({outage.problem}); see that it does, then run the same command again"
                )

    def close(self) -> None:
        """Give up what is not yet acknowledged, and leave nothing on the node's disk."""
        self._closed.set()
        for thread in (self._thread, self._uploader):
            if thread is not None:
                thread.join(_CLOSE_SECONDS)  # a thread that hangs in a request has nothing left to lose
        if self._spill is not None:
            self._spill.close()

    def _join(self) -> None:
        if self._thread is not None:
            began = self._clock()
            self._thread.join(self._look_seconds)
            while self._thread.is_alive():
                is_storing = self._staging.is_at_work
                self._on_wait(STORAGE if is_storing else EXCHANGE)
                if is_storing and self._clock() - began > OUTAGE_PATIENCE_SECONDS:
                    raise StorageOutage(
                        f"the storage has not taken {self._thread.name} for {OUTAGE_PATIENCE_SECONDS:.0f} s; see that it is up"
                    )
                self._thread.join(self._look_seconds)
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # The thread of one checkpoint

    def _write(self, step: int, files: Files, meta: dict[str, Any]) -> None:
        try:
            begin = time.perf_counter()
            spilled: Spilled | None = None
            receipts: list[Receipt] = []
            try:
                for name, buffers in files():
                    parts = list(buffers)
                    self._staging.begin()
                    if spilled is None:
                        receipt = self._stage_unless_out(step, name, parts)
                        if receipt is not None:
                            receipts.append(receipt)
                            continue
                        assert self._spill is not None
                        spilled = self._spill.begin(step, receipts, meta)
                    spilled.add(name, parts)
                if spilled is None:
                    self._ack(step, receipts, meta)
            except OSError as error:  # a full disk or a lost mount: older checkpoints stay, training continues, the journal records it
                if spilled is not None:
                    spilled.remove()
                return self._on_failed(step, error)
            finally:
                self._staging.end()
            if spilled is not None:
                self._on_event("checkpoint_spilled", {"step": step, "size_bytes": spilled.size_bytes})
                return self._queue(spilled)
            self._note_recovery(step)
            self._on_staged(step, time.perf_counter() - begin, sum(receipt.size_bytes for receipt in receipts))
        except BaseException as error:  # handed to the next save() or wait(), in the thread that can act on it
            self._fail(error)

    def _stage_unless_out(self, step: int, name: str, buffers: Buffers) -> Receipt | None:
        with self._changed:
            if self._spilled:
                return None
        try:
            return self._staging.stage(step, name, buffers)
        except OSError as error:
            if self._spill is None:
                raise
            self._note_outage(step, error)
            return None

    def _queue(self, spilled: Spilled) -> None:
        with self._changed:
            dropped = self._spilled.add(spilled)
            if self._spilled.needs_uploader():
                self._uploader = threading.Thread(target=self._upload_all, name="checkpoint-upload", daemon=True)
                self._uploader.start()
        for victim in dropped:
            victim.remove()
            why = f"dropped in an outage of the storage, as the one of step {spilled.step} is whole ({self._outage.problem})"
            self._on_failed(victim.step, StorageOutage(why))

    def _note_outage(self, step: int, error: OSError) -> None:
        with self._changed:
            begins = self._outage.begins(error)
        if begins:
            self._on_event("storage_outage", {"step": step, "message": str(error)})

    def _note_recovery(self, step: int) -> None:
        with self._changed:
            seconds = None if self._spilled else self._outage.ends()
        if seconds is not None:
            self._on_event("storage_recovered", {"step": step, "seconds": seconds})

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    # The thread that uploads spilled checkpoints; it lives while there are any

    def _upload_all(self) -> None:
        try:
            while (spilled := self._next()) is not None:
                begin = time.perf_counter()
                try:
                    self._upload(spilled)
                except SpillDamaged as error:
                    self._remove(spilled)
                    self._on_failed(spilled.step, error)
                except OSError as error:
                    with self._changed:
                        self._outage.goes_on(error)
                        self._spilled.put_back()
                    self._pause(UPLOAD_PAUSE_SECONDS if isinstance(error, StorageOutage) else REFUSED_PAUSE_SECONDS)
                else:
                    self._acknowledge(spilled)
                    self._remove(spilled)
                    self._note_recovery(spilled.step)
                    self._on_staged(spilled.step, time.perf_counter() - begin, sum(receipt.size_bytes for receipt in spilled.staged))
        except BaseException as error:
            self._fail(error)

    def _upload(self, spilled: Spilled) -> None:
        for receipt in spilled.waiting:
            if self._staging.stage_again(spilled.step, receipt.name, [spilled.read(receipt)]) != receipt:
                raise SpillDamaged(f"{receipt.name} of step {spilled.step} changed on its way from the node's disk")
            spilled.uploaded(receipt)

    def _acknowledge(self, spilled: Spilled) -> None:
        try:
            self._ack(spilled.step, spilled.staged, spilled.meta)
        except OSError as error:  # the coordinator's refusal
            self._on_failed(spilled.step, error)

    def _next(self) -> Spilled | None:
        with self._changed:
            return self._spilled.next(is_closed=self._closed.is_set())

    def _remove(self, spilled: Spilled) -> None:
        spilled.remove()
        with self._changed:
            self._spilled.remove(spilled)
            self._changed.notify_all()
