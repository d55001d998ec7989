"""What the user sees while a run goes on: the progress line and the lines that stay. Called by drive.py and attempt.py.

This file computes the content from a status and a position; trainer.runs.progress draws it."""

import math
import time
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from cluster.beat import BEFORE_STEPS, in_words
from cluster.coordinator import Status
from cluster.store import Commit
from trainer.drive.session import Session
from trainer.runs.measures import headline_title
from trainer.runs.progress import ProgressLine, RunState
from trainer.settings.selection import watched_split

CHECKPOINT_WARNING_SECONDS = 60.0  # a full disk stays full for a while: warn once, not for each checkpoint
TRAINING = "training"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A run's position between two attempts."""

    attempt: int = 0
    """Number of the newest attempt, counted over all drivers of the run."""
    start: Commit | None = None
    """The commit to go on from; None is the run's beginning."""
    skip: frozenset[int] = field(default_factory=frozenset)
    """Steps whose batches are skipped."""
    restarts: int = 0
    """Number of this driver's failed attempts."""

    @property
    def start_step(self) -> int:
        return self.start.step if self.start is not None else 0


def phase_of(status: Status, position: Position, *, workers: int, is_stopping: bool, waiting: str) -> str:
    """What the run is doing, in words. `waiting`: what it waits for before it can begin."""
    if is_stopping:
        return "stopping"
    if waiting:
        return waiting
    if reached(status, position) > position.start_step:
        return in_words(rank.phase for rank in status.ranks.values() if rank.phase not in BEFORE_STEPS) or TRAINING
    if len(status.ranks) < workers:
        return "restarting workers" if position.attempt > 1 and position.restarts else "starting workers"
    return in_words(rank.phase for rank in status.ranks.values()) or "loading data and model"


def reached(status: Status, position: Position) -> int:
    """Number of steps that the fastest rank has done."""
    return max((rank.steps_done for rank in status.ranks.values()), default=position.start_step)


class Screen:
    """Context manager that shows a progress line."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._line = ProgressLine(session.console)
        self._phase, self._phase_began = "", time.monotonic()
        self._failed_checkpoints, self._failure_told_at = 0, -math.inf
        self._state: RunState | None = None

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._line.__exit__(kind, error, trace)

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self._line.message(text)

    def show(self, status: Status, position: Position, *, workers: int, is_stopping: bool, waiting: str = "") -> None:
        self._begin_phase(phase_of(status, position, workers=workers, is_stopping=is_stopping, waiting=waiting))
        self._warn_of_checkpoints(status)
        self._state = self._state_of(status, position)
        self._line.update(self._state)

    def show_waiting(self, what: str, *, is_stopping: bool) -> None:
        """Show that the driver waits; "" if that is not worth showing yet. The rest stays as it was when it was last shown."""
        if not what:
            return
        self._begin_phase("stopping" if is_stopping else what)
        seconds = time.monotonic() - self._phase_began
        last = self._state or RunState(run=self._session.config.run, phase="")
        self._line.update(replace(last, phase=self._phase, phase_seconds=seconds))

    def _begin_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase, self._phase_began = phase, time.monotonic()

    def _warn_of_checkpoints(self, status: Status) -> None:
        if status.checkpoints.failures <= self._failed_checkpoints:
            return
        self._failed_checkpoints = status.checkpoints.failures
        if time.monotonic() - self._failure_told_at > CHECKPOINT_WARNING_SECONDS:
            self._failure_told_at = time.monotonic()
            self.message(f"warning: a checkpoint was not saved, training goes on: {status.checkpoints.problem}")

    def _state_of(self, status: Status, position: Position) -> RunState:
        session, task = self._session, self._session.decided.task
        steps = reached(status, position)
        stats = status.ranks[0].stats if 0 in status.ranks else {}
        last = status.checkpoints.last
        rate = stats.get("images_per_second") or 0.0

        def known(name: str) -> float | None:
            value = stats.get(name)
            return None if value is None or value != value else value

        return RunState(
            run=session.config.run,
            phase=self._phase,
            phase_seconds=None if self._phase == TRAINING else time.monotonic() - self._phase_began,
            step=steps,
            total_steps=session.total_steps,
            epoch=steps / session.steps_per_epoch,
            epochs=session.config.train.epochs,
            loss=known("loss"),
            learning_rate=known("learning_rate"),
            images_per_second=known("images_per_second"),
            data_wait_ratio=known("data_wait_ratio"),
            headline=known("test_headline"),
            headline_title=headline_title(task, watched_split(session.decided.dataset.manifest)),
            headline_unit=task.headline.unit,
            unit=task.unit,
            checkpoint_step=last.step if last else None,
            checkpoint_age_seconds=time.time() - last.time if last and last.time else None,
            remaining_seconds=(session.total_steps - steps) * session.samples_per_step / rate if rate else None,
            restarts=position.restarts,
        )
