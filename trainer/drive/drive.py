"""The driver's loop over attempts, after start.py has decided and checked everything. Called by start.py.

A fleet is a set of agents that Ray Train placed (fleets.py). An attempt is one life of the ranks below them (attempt.py). A dead rank costs
an attempt; the next one starts on the same fleet within seconds. A dead agent or node costs the fleet, and so does a change in the number
of workers. cluster.controller decides what is tried again. ending.py ends the run.
"""

import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.controller import RunFailed, run_attempts
from cluster.failures import Failure, FailureCounts, classify, counts_of, described
from cluster.heartbeat import CoordinatorLost
from cluster.journal import last_attempt
from cluster.names import FILE_SD
from cluster.storage import is_outage
from cluster.store import Commit
from trainer.drive.account import Account
from trainer.drive.attempt import Attempt, Outcome
from trainer.drive.ending import Ending
from trainer.drive.fleets import Fleets, Pause, Room
from trainer.drive.screen import Position, Screen, reached
from trainer.drive.session import Session
from trainer.drive.signals import Phase, Signals

DRAIN_SECONDS = 30.0
DRAIN_POLL_SECONDS = 5.0


class Drive:
    """Runs attempt after attempt until the run ends."""

    def __init__(self, session: Session, start: Commit | None, signals: Signals) -> None:
        """`start` is the commit to go on from; None starts at step 0."""
        resources, cluster = session.resources, session.config.cluster
        self._session = session
        self._signals, self._screen, self._account = signals, Screen(session), Account(session)
        self._room = Room(
            resources,
            may_ask=not session.decided.hardware.local and resources.fewest < resources.most,
            placement_seconds=cluster.placement_seconds,
            grow_after_seconds=cluster.grow_after_seconds,
            notice=cluster.preemption_notice,
            tell=session.tell,
            say=self._screen.message,
        )
        self._fleets = Fleets(session, self._room, self._signals)
        self._position = Position(start=start)
        self._result: Mapping[str, Any] | None = None

    def go(self) -> int:
        """Drive the whole run. Returns the exit status."""
        with self._session.patience.watched(show=self._show_storage, is_stopping=self._is_stopping):
            try:
                if self._session.resources.fewest == self._session.resources.most:
                    self._fleets.start(0, show=self._show_waiting)  # Ray Train places the agents while the coordinator starts
                return self._attempts()
            finally:
                self._fleets.end()

    def _take_up(self) -> FailureCounts:
        """Find the run's position and the failures under its earlier drivers."""
        session, start = self._session, self._position.start
        if session.committed_step() > self._position.start_step:  # the previous driver committed it while this one took over
            start = session.find_start()
        events = session.events()
        counts = counts_of(events)
        # An outage may have cost the journal its last lines; the commit has the skipped steps too.
        skip = counts.skipped | frozenset(start.meta.get("skipped", ()) if start is not None else ())
        self._position = Position(attempt=last_attempt(events), start=start, skip=skip)
        tell_beginning(session, start)
        return replace(counts, skipped=skip, rollbacks=max(counts.rollbacks, len(skip)))

    def _attempts(self) -> int:
        session = self._session
        failed: RunFailed | None = None
        try:
            self._signals.enter(Phase.TRAINING)
            with self._screen, session.patience.watched(show=self._show_storage, is_stopping=self._is_stopping):
                counts = self._take_up()
                if not self._is_stopping():
                    self._run_attempts(counts)
        except RunFailed as error:
            failed = error
        except CoordinatorLost as error:
            if not self._is_stopping():
                failed = given_up(error, "Ray has given it up; the same command starts another one and goes on")
        except OSError as error:
            if not (self._is_stopping() and is_outage(error)):
                failed = given_up(error, "the run cannot go on without it; once it is mended the same command goes on")
        except ValueError:
            raise
        except Exception:
            traceback.print_exc()  # print it now: from here on Ray's calls in other threads fail and end the process without it
            raise
        finally:
            self._signals.enter(Phase.ENDING)
            self._fleets.end()  # before Ray shuts down: a thread still inside Ray would take the process down
        if failed is not None:
            # Another driver may be why attempts fail; it takes away neither coordinator nor storage.
            is_taken_over = failed.attempts > 0 and session.is_taken_over()
            return self._ending().taken_over() if is_taken_over else self._ending().failed(failed)
        is_over = self._result is not None and not self._result["stopped"]
        if not is_over and session.is_taken_over():
            return self._ending().taken_over()
        return self._ending().finished() if is_over else self._ending().stopped()

    def _run_attempts(self, counts: FailureCounts) -> None:
        run_attempts(
            self._attempt,
            first_attempt=self._position.attempt + 1,
            committed_step=self._session.committed_step,
            policy=self._session.config.cluster.faults,
            on_failure=self._on_failure,
            on_skip=self._on_skip,
            counts=counts,
            stopping=self._is_stopping,
            sleep=self._signals.sleep,
        )

    def _is_stopping(self) -> bool:
        return self._signals.number != 0

    def _ending(self) -> Ending:
        return Ending(session=self._session, result=self._result, workers=self._fleets.workers, signals=self._signals)

    def _attempt(self, number: int) -> Failure | None:
        """Run attempts until one fails or the run is over. Changing the number of workers between two of them is not a failure."""
        while True:
            self._position = replace(self._position, attempt=self._position.attempt + 1)
            self._result = None
            outcome = self._one_attempt()
            self._result = outcome.result
            if outcome.failure is not None:
                self._tell_failure(outcome.failure)
            if outcome.pause is None:
                return outcome.failure
            self._change_workers(outcome.pause)

    def _one_attempt(self) -> Outcome:
        if self._fleets.present is None:
            failure = self._fleets.start(self._position.attempt, show=self._show_waiting)
            if failure is not None or self._fleets.present is None:
                return Outcome(failure=failure)
        return Attempt(
            self._session,
            position=self._position,
            fleet=self._fleets.present,
            fleets=self._fleets,
            room=self._room,
            signals=self._signals,
            screen=self._screen,
            account=self._account,
        ).run()

    def _change_workers(self, pause: Pause) -> None:
        step = self._session.committed_step()
        self._session.tell("attempt_paused", attempt=self._position.attempt, kind=pause.kind, reason=pause.reason, step=step)
        self._fleets.end()
        self._go_back()

    def _tell_failure(self, failure: Failure) -> None:
        """At once, and so without a question to the storage: a wait for it would count as training."""
        status = self._session.status()
        last_step, commit = reached(status, Position()), status.checkpoints.last
        self._session.tell(
            "attempt_failed",
            attempt=self._position.attempt,
            kind=failure.kind,
            rank=failure.rank,
            message=failure.message,
            last_step=last_step,
            lost_steps=max(0, last_step - (commit.step if commit is not None else 0)),
        )

    def _on_failure(self, number: int, failure: Failure, counts: FailureCounts) -> None:
        self._position = replace(self._position, restarts=self._position.restarts + 1)
        last_step = reached(self._session.status(), Position())
        self._go_back()
        assert failure.step is None or self._position.start_step <= failure.step, "a commit was acknowledged after a bad step"
        if failure.kind not in ("user", "data"):  # these end the run, which then prints the whole message
            self._screen.message(told_failure(failure, self._position, last_step))

    def _on_skip(self, step: int, failure: Failure) -> None:
        self._position = replace(self._position, skip=self._position.skip | {step})
        self._session.tell("batch_skipped", attempt=self._position.attempt, step=step, reason=failure.message)
        self._screen.message(f"the batch of step {step:,} is left out from now on")

    def _go_back(self) -> None:
        """Go back to the newest commit."""
        self._drain()
        start = self._session.find_start()
        self._position = replace(self._position, start=start)
        if start is not None:
            self._session.journal.write("resumed", step=start.step, path=start.path)

    def _drain(self) -> None:
        """Wait for the checkpoints that all ranks have staged: they still count. In an outage they are committed after it."""
        until = time.monotonic() + DRAIN_SECONDS
        while not self._session.ask("drain", DRAIN_POLL_SECONDS):
            if time.monotonic() < until:
                continue
            if self._session.storage_answers():
                return
            if self._is_stopping():
                return  # the next driver goes on from what is committed by then
            until = time.monotonic() + DRAIN_SECONDS

    def _show_waiting(self, what: str) -> None:
        status = self._session.status()
        self._screen.show(status, self._position, workers=self._fleets.workers, is_stopping=self._is_stopping(), waiting=what)

    def _show_storage(self, waiting: str) -> None:
        """Called while the driver waits for the storage. It asks nobody: the coordinator may wait for the storage too."""
        self._screen.show_waiting(waiting, is_stopping=self._is_stopping())


def given_up(error: CoordinatorLost | OSError, reason: str) -> RunFailed:
    """A failure that no attempt can mend, and whose message says it all."""
    return RunFailed(replace(classify(described(error)), traceback=""), reason=reason, attempts=0)


def tell_beginning(session: Session, start: Commit | None) -> None:
    """Tell the user where Prometheus finds the ranks and which step the run goes on from."""
    discovery = session.ask("discovery_address")
    file_sd = f", file_sd {session.storage.at(session.config.run)}/{FILE_SD}" if session.storage.is_local else ""
    session.console.print(f"Prometheus: http_sd http://{discovery}/sd{file_sd}", soft_wrap=True)
    if start is None:
        return
    session.journal.write("resumed", step=start.step, path=start.path)
    session.console.print(f"going on from step {start.step:,} of {session.total_steps:,}")


def told_failure(failure: Failure, position: Position, last_step: int) -> str:
    """Describe an attempt's failure in one line. `position` is where the run goes back to."""
    where = f" on rank {failure.rank}" if failure.rank is not None and failure.kind != "numbers" else ""
    lost = last_step - position.start_step
    cost = f"{lost} step{'' if lost == 1 else 's'} to do again, " if lost > 0 else ""
    back = f"going on from step {position.start.step:,}" if position.start else "starting from the beginning"
    first_line = failure.message.splitlines()[0][:200]
    return f"attempt {position.attempt} failed{where} at step {last_step:,} ({failure.kind}: {first_line}); {cost}{back}"
