"""The driver's patience with its storage: an outage is waited out and said, and never ends a run.

The driver makes one Patience for a command. `call` is for an answer that it cannot do without: it asks until the storage answers, and
meanwhile the terminal shows that, and signals are heard. `once` is for what it can do without, `Lately` for what it asks while ranks train.
storage.py decides what an outage is, and retries each operation by itself before it calls it one. A refusal (StorageRefused) is none: it is
raised, or told where the driver can do without the answer."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from cluster.storage import StorageOutage, is_outage

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often the caller of `call` looks at signals and draws the screen while it waits."""
SLOW_SECONDS = 2.0
"""An answer that takes longer is shown as a wait for the storage."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
STOP_SECONDS = 30.0
"""How long a run that is to stop waits for an answer that is under way, if there is no outage."""
MEASURE_SECONDS = 5.0

WAITING = "waiting for the storage"


class Patience:
    """See the module. Any thread may use it; only the main thread draws and hears signals while it waits."""

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        record: Callable[..., None],
        measure: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`say(line)` tells the user; `record(event, **fields)` writes into the journal, which keeps it until the storage takes it;
        `measure(seconds)` is told how long the storage has been away, and 0 once it is back."""
        self._say, self._record, self._measure = say, record, measure
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._failed_at = 0.0
        self._missed: dict[str, None] = {}  # what was asked for in vain since then
        self._refused: set[str] = set()
        self._measured_at = -math.inf
        self._show: Callable[[str], None] = lambda waiting: None
        self._is_stopping: Callable[[], bool] = lambda: False

    @property
    def seconds_away(self) -> float:
        """For how long the storage has not answered; 0 if it did when it was last asked."""
        since = self._away_since
        return 0.0 if since is None else self._clock() - since

    @contextmanager
    def watched(self, *, show: Callable[[str], None], is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Inside the context, a wait of the main thread calls `show` several times a second with what it waits for, and gives up once
        `is_stopping()`."""
        before = self._show, self._is_stopping
        self._show, self._is_stopping = show, is_stopping
        try:
            yield
        finally:
            self._show, self._is_stopping = before

    def call(self, what: str, operation: Callable[[], T], *, seconds: float = math.inf) -> T:
        """What `operation()` returns, as soon as the storage answers. `what` names it for people: "the run's journal".

        `operation` must be one that may be repeated, also while an abandoned try of it still runs. StorageOutage after `seconds` (0: after
        one try), or once the run is to stop. Any other OSError is raised as it is."""
        began, pause = self._clock(), FIRST_PAUSE_SECONDS
        while True:
            asked = self._clock()
            try:
                answer = self._ask(what, operation)
            except OSError as error:
                if not is_outage(error):
                    raise
                left = began + seconds - self._clock()
                self._fail(what, error, waits=left > 0)
                if left <= 0 or self.is_stopping():
                    raise StorageOutage(f"{what}: {error}") from error
            else:
                self._answered(what, asked)
                return answer
            self._rest(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def once(self, what: str, operation: Callable[[], T], otherwise: T) -> T:
        """What `operation()` returns, or `otherwise` if the storage does not answer or refuses: the user is told, and the run goes on."""
        try:
            return self.call(what, operation, seconds=0.0)
        except OSError as error:
            if not is_outage(error):
                self._refuse(what, error)
            return otherwise

    def is_stopping(self) -> bool:
        """Whether the run is to stop, as far as the caller's thread is concerned."""
        return threading.current_thread() is threading.main_thread() and self._is_stopping()

    def look(self, waiting: str) -> None:
        """Show what the main thread waits for; "" is not worth showing yet."""
        if threading.current_thread() is threading.main_thread():
            self._show(waiting)
        self._measure_away()

    # Inside

    def _ask(self, what: str, operation: Callable[[], T]) -> T:
        """Try once. The main thread has another one do it: a signal would otherwise wait for a storage that is silent."""
        if threading.current_thread() is not threading.main_thread():
            return operation()
        answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((operation(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=ask, name="storage", daemon=True).start()
        began, stopping_since = self._clock(), math.inf
        while True:
            try:
                answer, error = answers.get(timeout=POLL_SECONDS)
            except Empty:
                now = self._clock()
                self.look(WAITING if now - began > SLOW_SECONDS or self._away_since is not None else "")
                stopping_since = min(stopping_since, now) if self._is_stopping() else math.inf
                if now - stopping_since > (0 if self._away_since is not None else STOP_SECONDS):
                    raise StorageOutage("given up, because the run is to stop") from None
                continue
            if error is not None:
                raise error
            return answer  # type: ignore[return-value]  # a T, as there is no error

    def _rest(self, seconds: float) -> None:
        end = self._clock() + seconds
        while (left := end - self._clock()) > 0 and not self.is_stopping():
            self.look(WAITING)
            self._sleep(min(left, POLL_SECONDS))

    def _measure_away(self) -> None:
        now = self._clock()
        if self._away_since is not None and now - self._measured_at >= MEASURE_SECONDS:
            self._measured_at = now
            self._measure(now - self._away_since)

    def _fail(self, what: str, error: OSError, *, waits: bool) -> None:
        with self._lock:
            self._failed_at = self._clock()
            is_new, self._missed[what] = self._away_since is None, None
            if is_new:
                self._away_since = self._failed_at
        if is_new:
            self._say(f"the storage does not answer; {'waiting for it' if waits else 'the run goes on without'} ({what}: {error})")
            self._record("storage_outage", what=what, message=str(error))
        self._measure_away()

    def _answered(self, what: str, asked_at: float) -> None:
        with self._lock:
            self._refused.discard(what)
            if self._away_since is None or asked_at < self._failed_at:
                return  # the question was put before the newest failure, and says nothing about now
            seconds, missed = self._clock() - self._away_since, list(self._missed)
            self._away_since, self._missed, self._measured_at = None, {}, -math.inf
        self._measure(0.0)
        self._record("storage_recovered", seconds=seconds, what=missed)
        self._say(f"the storage answers again, after {seconds:.0f} s")

    def _refuse(self, what: str, error: OSError) -> None:
        with self._lock:
            is_new = what not in self._refused
            self._refused.add(what)
        if is_new:
            self._say(f"warning: {what}: {error}; the run goes on without")


class Lately(Generic[T]):
    """A slow question that a thread asks now and then. A call returns its newest answer at once."""

    def __init__(self, every_seconds: float, question: Callable[[], T], first: T, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`first` is the answer until the question has been answered; it is asked `every_seconds` from now for the first time."""
        self._every_seconds, self._question, self._answer, self._clock = every_seconds, question, first, clock
        self._asked_at = clock()
        self._thread: threading.Thread | None = None

    def __call__(self) -> T:
        is_asking = self._thread is not None and self._thread.is_alive()
        if not is_asking and self._clock() - self._asked_at > self._every_seconds:
            self._asked_at = self._clock()
            self._thread = threading.Thread(target=self._ask, name="lately", daemon=True)
            self._thread.start()
        return self._answer

    def _ask(self) -> None:
        self._answer = self._question()
