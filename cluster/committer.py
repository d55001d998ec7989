"""Commits staged checkpoints, one after the other, in a thread of its own. Called by the coordinator, which is told how each one ended.

What is a commit is store.py's business; which checkpoints are complete is commits.py's."""

import queue
import threading
import time
from collections.abc import Callable

from cluster.commits import Staged
from cluster.journal import Journal
from cluster.metrics import Metrics
from cluster.storage import StorageOutage
from cluster.store import Commit, Fenced, StorageFull, Store

COMMIT_PAUSE_SECONDS = 1.0
"""Between two tries to commit in an outage, each of which has its own waits (storage.RetryPolicy)."""
COMMITS_WAITING = 2
"""Checkpoints that may wait behind the one that is tried; with more of them it is given up."""
FENCED = "fenced"


class Committer:
    """See the module. `keep`: how many checkpoints stay when a newer one is committed.

    Told from its thread, for each checkpoint: on_committed(staged, unix time), or on_failed(staged, kind, message), where kind FENCED says
    that a newer driver has claimed the run; then on_settled()."""

    def __init__(
        self,
        store: Store,
        generation: int,
        keep: int,
        *,
        on_committed: Callable[[Staged, float], None],
        on_failed: Callable[[Staged, str, str], None],
        on_settled: Callable[[], None],
        journal: Journal,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._generation, self._keep = store, generation, keep
        self._on_committed, self._on_failed, self._on_settled = on_committed, on_failed, on_settled
        self._journal, self._metrics, self._clock, self._now = journal, metrics, clock, now
        self._closed = threading.Event()
        self._waiting: queue.Queue[Staged | None] = queue.Queue()
        threading.Thread(target=self._commit_all, name="committer", daemon=True).start()

    def put(self, staged: Staged) -> None:
        self._waiting.put(staged)

    def close(self) -> bool:
        """The thread ends after what it has in hand, in an outage at once. False if it was closed before."""
        if self._closed.is_set():
            return False
        self._closed.set()
        self._waiting.put(None)
        return True

    def _commit_all(self) -> None:
        while (staged := self._waiting.get()) is not None:
            try:
                self._commit(staged)
            except Fenced as error:
                self._on_failed(staged, FENCED, str(error))
            except Exception as error:  # the thread must outlive any storage: the old checkpoint is unharmed and training goes on
                kind = "storage_full" if isinstance(error, StorageFull) else type(error).__name__
                self._on_failed(staged, kind, str(error))
            finally:
                self._on_settled()

    def _commit(self, staged: Staged) -> None:
        began = self._clock()
        commit = self._commit_through_outages(staged)
        seconds, now = self._clock() - began, self._now()
        self._metrics.set("checkpoint_commit_step", staged.step)
        self._metrics.set("checkpoint_commit_time_seconds", now)
        self._metrics.set("checkpoint_bytes", commit.size_bytes)
        self._metrics.observe("checkpoint_commit_seconds", seconds)
        self._journal.write(
            "checkpoint_committed",
            attempt=staged.attempt,
            step=staged.step,
            seconds=seconds,
            size_bytes=commit.size_bytes,
            path=commit.path,
        )
        self._on_committed(staged, now)
        try:
            self._store.prune(self._keep, self._generation, staged_below=staged.step)
        except (OSError, Fenced) as error:
            self._journal.write("prune_failed", attempt=staged.attempt, step=staged.step, message=str(error))

    def _commit_through_outages(self, staged: Staged) -> Commit:
        """In the order of steps: the checkpoints behind this one wait with it. Given up when the committer is closed, or when so many wait
        that they would fill the storage, where ranks reach it and this process does not."""
        began: float | None = None
        while True:
            try:
                commit = self._store.commit(staged.step, self._generation, staged.receipts, staged.meta)
            except StorageOutage as error:
                if began is None:
                    began = self._clock()
                    self._journal.write("storage_outage", attempt=staged.attempt, step=staged.step, message=str(error))
                if self._waiting.qsize() > COMMITS_WAITING or self._closed.wait(COMMIT_PAUSE_SECONDS):
                    raise
            else:
                if began is not None:
                    self._journal.write("storage_recovered", attempt=staged.attempt, step=staged.step, seconds=self._clock() - began)
                return commit
