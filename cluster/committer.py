"""Commits staged checkpoints one after the other, in its own thread. The coordinator calls it and is told each result.

store.py defines what a commit is; commits.py decides which checkpoints are complete."""

import errno
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.commits import Staged
from cluster.metrics import Metrics
from cluster.state import FENCED
from cluster.storage import StorageRefused, is_outage
from cluster.store import Commit, Fenced, StorageFull, Store
from cluster.waiting import REFUSAL_PATIENCE_SECONDS

COMMIT_PAUSE_SECONDS = 1.0
"""Time between two tries to commit in an outage; each try also waits by itself (storage.RetryPolicy)."""
COMMITS_WAITING = 2
"""Number of checkpoints that may wait behind the one being committed; if more wait, that one is given up."""


def may_pass(error: OSError) -> bool:
    """Whether the same commit may succeed later. A full disk fails it at once: the checkpoints before are there, and the next one is as
    large."""
    return isinstance(error, StorageRefused) or is_outage(error) or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


class Committer:
    """See the module. `keep`: how many checkpoints remain after a newer one is committed.

    For each checkpoint its thread calls on_committed(staged, unix time, fields of the journal's event) or on_failed(staged, kind,
    error), then on_settled(staged). The kind FENCED means that a newer driver has claimed the run. `on_waiting(message)`: a checkpoint
    waits for the storage. `tell(event, **fields)` writes other events. A checkpoint that a committer which died had in hand may be put
    again, whatever that one had done of it."""

    def __init__(
        self,
        store: Store,
        generation: int,
        keep: int,
        *,
        on_committed: Callable[[Staged, float, dict[str, Any]], None],
        on_failed: Callable[[Staged, str, Exception], None],
        on_settled: Callable[[Staged], None],
        on_waiting: Callable[[str], None],
        tell: Callable[..., None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._generation, self._keep = store, generation, keep
        self._on_committed, self._on_failed, self._on_settled = on_committed, on_failed, on_settled
        self._on_waiting, self._tell = on_waiting, tell
        self._metrics, self._clock, self._now = metrics, clock, now
        self._refused_since: float | None = None  # the storage refuses every commit since
        self._closed = threading.Event()
        self._waiting: queue.Queue[Staged | None] = queue.Queue()
        threading.Thread(target=self._commit_all, name="committer", daemon=True).start()

    def put(self, staged: Staged) -> None:
        self._waiting.put(staged)

    def close(self) -> bool:
        """Let the thread finish its queue and end; in an outage it ends at once. Returns False if it was already closed."""
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
                self._on_failed(staged, FENCED, error)
            except Exception as error:  # the thread must survive any storage error: the old checkpoint is intact and training continues
                kind = "storage_full" if isinstance(error, StorageFull) else type(error).__name__
                self._on_failed(staged, kind, error)
            self._on_settled(staged)  # not if this process is dying: its successor then commits it

    def _commit(self, staged: Staged) -> None:
        began = self._clock()
        commit = self._commit_through_outages(staged)
        seconds, now = self._clock() - began, self._now()
        self._metrics.set("checkpoint_commit_step", staged.step)
        self._metrics.set("checkpoint_commit_time_seconds", now)
        self._metrics.set("checkpoint_bytes", commit.size_bytes)
        self._metrics.observe("checkpoint_commit_seconds", seconds)
        self._on_committed(staged, now, {"seconds": seconds, "size_bytes": commit.size_bytes, "path": commit.path})
        try:
            self._store.prune(self._keep, self._generation, attempt=staged.attempt, staged_below=staged.step)
        except (OSError, Fenced) as error:
            self._tell("prune_failed", attempt=staged.attempt, step=staged.step, message=str(error))

    def _commit_through_outages(self, staged: Staged) -> Commit:
        """Commit in step order: the checkpoints behind this one wait for it. A refusal is waited out like an outage, because credentials
        can be renewed while a run goes on, but only for REFUSAL_PATIENCE_SECONDS: counted from its own first refusal if it is the newest,
        from the first refusal of all if a newer one waits behind it, which will hold all that it holds. Gives up when the committer is
        closed. It also gives up when too many wait: if the ranks reach the storage and this process does not, they would fill it."""
        began: float | None = None
        refused_since: float | None = None
        while True:
            try:
                commit = self._store.commit(staged.step, self._generation, staged.receipts, staged.meta, attempt=staged.attempt)
            except OSError as error:
                if not may_pass(error):
                    raise
                now = self._clock()
                if began is None:
                    began = now
                    self._tell("storage_outage", attempt=staged.attempt, step=staged.step, message=str(error))
                self._on_waiting(str(error))
                behind = self._waiting.qsize()
                if is_outage(error):
                    refused_since = self._refused_since = None
                else:
                    refused_since = now if refused_since is None else refused_since
                    self._refused_since = now if self._refused_since is None else self._refused_since
                since = self._refused_since if behind else refused_since
                is_refused_too_long = since is not None and now - since > REFUSAL_PATIENCE_SECONDS
                if behind > COMMITS_WAITING or is_refused_too_long or self._closed.wait(COMMIT_PAUSE_SECONDS):
                    raise
            else:
                self._refused_since = None
                if began is not None:
                    self._tell("storage_recovered", attempt=staged.attempt, step=staged.step, seconds=self._clock() - began)
                return commit
