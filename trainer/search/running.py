"""Trains the trials that the ladder asks for, each as a process `python -m trainer.run`, and waits for their scores. __main__.py calls it.

A trial that has come to its rung and is not asked for again is sent SIGTERM: it saves and ends, and the same words let it go on later to
the same bits, whichever rungs it was stopped at, as its schedule is that of the whole run. One that is asked for again at once just goes
on. What is known already is not trained again: so a search that was killed goes on when it is run through from its beginning.

A trial's run survives what any run survives. If its own driver is killed, it is started again, RESTARTS times without an evaluation
between."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.journal import JournalReader
from cluster.patience import Patience
from cluster.storage import Storage, StorageOutage
from trainer.runs.choice import Rule
from trainer.search.ladder import Job, Ladder, Score
from trainer.search.trials import Seen, Trial, last_failure, seen_in
from trainer.series.child import hearing, start_child
from trainer.series.train import RunFailed, RunStopped, finished, folder_beside, words_of
from trainer.settings.say import complain
from trainer.settings.toml import to_toml

RESTARTS = 3
POLL_SECONDS, REMOTE_POLL_SECONDS = 0.1, 2.0
_LAST_BYTES = 4000


@dataclass(slots=True)
class _Running:
    process: "subprocess.Popen[bytes]"
    log: Path
    output: IO[bytes]
    is_asked_to_stop: bool = False


class Running:
    """The trials' processes, and what is known of each trial. Enter `open`."""

    def __init__(self, storage: Storage, trials: Sequence[Trial], rule: Rule, folder: Path) -> None:
        self._storage, self._trials, self._rule, self._folder = storage, trials, rule, folder
        self._processes: dict[int, _Running] = {}
        self._seen: dict[int, Seen] = {}
        self._readers: dict[int, JournalReader] = {}
        self._patience = Patience(say=complain, record=lambda event, **fields: None)
        self._restarts: dict[int, tuple[int, int]] = {}
        self._heard: list[int] = []
        self._poll_seconds = POLL_SECONDS if storage.is_local else REMOTE_POLL_SECONDS

    @classmethod
    @contextmanager
    def open(cls, storage: Storage, trials: Sequence[Trial], rule: Rule) -> "Iterator[Running]":
        """No process is left when it is closed: those that run save and end. Meanwhile a signal to this process raises RunStopped in
        `wait`, and a second one is passed on to the trials, which end at once. Only in the main thread."""
        with folder_beside(storage) as folder:
            running = cls(storage, trials, rule, folder)
            with hearing(running._hear), running._patience.watched(show=_nothing, is_stopping=lambda: bool(running._heard)):
                try:
                    yield running
                finally:
                    running.keep(())

    def seen(self, trial: int) -> Seen:
        """What the trial has come to, as last looked at."""
        if trial not in self._seen:
            self._look(trial)
        return self._seen[trial]

    def score(self, job: Job, rungs: Sequence[int]) -> tuple[Score, bool]:
        """(score, whether it is known by now)."""
        return self.seen(job.trial).score(self._rule, rungs[job.rung], rungs[-1])

    def keep(self, wanted: Sequence[int]) -> None:
        """Stop the trials that are not `wanted`: they save and end. Returns when they have, and those that had finished have ended."""
        others = [trial for trial in self._processes if trial not in wanted]
        for trial in others:
            if self._heard or not self._is_done(trial):
                self._ask_to_stop(trial)
        for trial in others:
            self._processes[trial].process.wait()
            self._end_of(trial)

    def begin(self, trial: int) -> None:
        """Start the trial's run, or go on with it; nothing if it is running and was not asked to stop."""
        if trial in self._processes:
            if not self._processes[trial].is_asked_to_stop:
                return
            self._processes[trial].process.wait()
            self._end_of(trial)
        self._start(trial)

    def wait(self, job: Job, under_way: Sequence[Job], rungs: Sequence[int]) -> Score:
        """Wait for the score of `job`. Of those `under_way`, one that has come to its rung is stopped there meanwhile. RunFailed,
        RunStopped."""
        while True:
            score, is_known = self.score(job, rungs)
            if is_known:
                return score
            if self._heard:
                raise RunStopped(self._heard[0])
            time.sleep(self._poll_seconds)
            for other in under_way:
                if other.trial in self._processes:
                    self._look(other.trial)
                    if other != job and self.score(other, rungs)[1]:
                        self._ask_to_stop(other.trial)
            self._reap({other.trial for other in under_way if not self.score(other, rungs)[1]})

    # --- processes ---

    def _start(self, trial: int) -> None:
        if self._heard:
            raise RunStopped(self._heard[0])
        run = self._trials[trial]
        settings, log = self._folder / f"{run.name}.toml", self._folder / f"{run.name}.log"
        settings.touch(mode=0o600)  # a URI among the settings may hold credentials
        settings.write_text(to_toml(run.config), encoding="utf-8")
        output = log.open("wb")
        words = words_of(run.member, self._storage, settings)
        self._processes[trial] = _Running(process=start_child(words, output=output), log=log, output=output)

    def _ask_to_stop(self, trial: int) -> None:
        running = self._processes[trial]
        if not running.is_asked_to_stop:
            running.is_asked_to_stop = True
            running.process.send_signal(signal.SIGTERM)

    def _reap(self, unfinished: set[int]) -> None:
        """Take note of the processes that have ended. One of a trial that is `unfinished` is started again."""
        for trial in [trial for trial, running in self._processes.items() if running.process.poll() is not None]:
            self._look(trial)
            status, said = self._end_of(trial)
            if trial in unfinished and not self._is_done(trial):
                self._again(trial, status, said)

    def _is_done(self, trial: int) -> bool:
        found = self.seen(trial)
        return found.summary is not None or bool(found.diverged)

    def _again(self, trial: int, status: int, said: str) -> None:
        name = self._trials[trial].name
        kind = last_failure(self._readers[trial].known)
        evaluations = len(self.seen(trial).evaluations)
        before, times = self._restarts.get(trial, (evaluations, 0))
        times = times + 1 if before == evaluations else 1
        self._restarts[trial] = (evaluations, times)
        if self._heard:
            raise RunStopped(self._heard[0])
        if status == 2 or kind == "user" or times > RESTARTS:
            raise RunFailed(f"{name} ended with status {status}; the same command goes on with it. It said:\n{said}")
        self._start(trial)

    def _end_of(self, trial: int) -> tuple[int, str]:
        running = self._processes.pop(trial)
        running.output.close()
        said = running.log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").strip()
        return running.process.returncode, said

    def _look(self, trial: int) -> None:
        """Read what is new. An outage of the storage is waited out."""
        run = self._trials[trial]
        reader = self._readers.setdefault(trial, JournalReader(self._storage, run.name))
        before = len(reader.known)
        try:
            events = self._patience.call(f"the journal of {run.name}", reader.read)
            if trial in self._seen and len(events) == before:
                return
            summary = self._patience.call(f"the summary of {run.name}", lambda: finished(self._storage, run.member))
        except StorageOutage:
            if self._heard:
                raise RunStopped(self._heard[0]) from None
            raise
        self._seen[trial] = seen_in(events, summary, self._rule)

    def _hear(self, number: int) -> None:
        self._heard.append(number)
        if len(self._heard) > 1:
            for running in self._processes.values():
                running.process.send_signal(number)


def _nothing(waiting: str) -> None:
    """Patience says by itself that it waits."""


def searched(
    ladder: Ladder, running: Running, *, on_score: Callable[[Job, Score], None], is_over: Callable[[], bool] = lambda: False
) -> None:
    """Run the ladder to its end. `on_score`: told each result, as it counts. `is_over`: asked before new trials begin; from True on none
    does. RunFailed, RunStopped, OSError: the same call goes on."""
    under_way: list[Job] = []
    while True:
        if is_over():
            ladder.close()
        under_way += ladder.asked()
        due = ladder.due()
        if due is None:
            return
        unknown = [job for job in under_way if not running.score(job, ladder.rungs)[1]]
        running.keep([job.trial for job in unknown])
        for job in unknown:
            running.begin(job.trial)
        score = running.wait(due, under_way, ladder.rungs)
        under_way.remove(due)
        ladder.tell(due, score)
        on_score(due, score)
