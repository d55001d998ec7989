"""`python -m trainer.runs watch RUN`: follows one run, from any machine that sees its folder. It only reads.

It polls the journal for events; if the ranks' metrics can be reached, they give current figures. It ends when the run does.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.config import FaultPolicy
from cluster.storage import open_storage
from cluster.text import shown
from trainer.runs import live
from trainer.runs.events import STRANGE, is_followed, plainly, words_of
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.journal_tail import Event, JournalTail
from trainer.runs.measures import headline_of, headline_title, known_info
from trainer.runs.pace import JournalPace, planned_steps, steps_per_second
from trainer.runs.progress import ProgressLine, RunState, describe, final_table
from trainer.runs.status import (
    TAIL_BYTES,
    TAIL_SEGMENTS,
    RunStatus,
    current_summary,
    look,
    moment,
    run_folders,
    status_of,
    statuses,
    why_ended,
)
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import Terminal, complain
from trainer.settings.tree import RunConfig
from trainer.settings.units import percent
from trainer.tasks.info import CLASSIFICATION

RETRY_SECONDS = 5.0
LOCAL_EVERY_SECONDS, REMOTE_EVERY_SECONDS = 1.0, 5.0
LOOK_EVERY_SECONDS, REMOTE_LOOK_EVERY_SECONDS = 30.0, 120.0  # checks whether the run still exists; some 50 requests on an object store
SUMMARY_SECONDS = 5.0  # from the journal's last event to the summary
RANKS_EVERY_SECONDS = 60.0  # between lines about the ranks, without a terminal
SHOWN_BEFORE = 10  # earlier events to show
SHOWN_RANKS = 8
LONGEST_LINE = 2000  # characters of an event

EXITS: Mapping[str, int] = {"finished": 0, "failed": 1, "stopped": 3, "killed": 4}
"""2 is a wrong command line, 130 Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Follow a run until it ends; Ctrl-C leaves it alone. Exit status: 0 the run finished, 1 it failed, 3 it was stopped, 4 its driver is
    gone without a word, 130 Ctrl-C."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The run's folder (path or URI), or its name under --storage. None is the newest that is running."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    every: float = 0.0
    """Seconds between looks at the journal; 0 takes 1, and 5 on an object store, where each look costs a request."""
    live: bool = True
    """Ask the ranks for their figures over HTTP (/metrics), where they can be reached."""


def main(argv: Sequence[str]) -> int:
    """Follows a run; returns one of EXITS, by how the run ended."""
    arguments = tyro.cli(Arguments, prog=program("watch"), args=argv)
    try:
        if not 0 <= arguments.every < 86400:
            raise ValueError(f"--every {arguments.every:g} is not a number of seconds up to a day; use 0 for the default")
        folder = find_run(arguments.run, arguments.storage) if arguments.run else _newest(arguments.storage)
        folder = RunFolder(storage=open_storage(folder.storage.uri, RETRY_SECONDS), name=folder.name)
        watch = Watch(folder, console=Terminal(highlight=False), is_live=arguments.live, every_seconds=arguments.every)
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        return watch.follow()
    except KeyboardInterrupt:
        complain(f"no longer watching {shown(folder.name)}, which is left as it is")
        raise


def _newest(storage: str) -> RunFolder:
    opened = open_storage(storage, RETRY_SECONDS)
    running = [status for status in statuses(run_folders(opened)) if status.status == "running"]
    if not running:
        raise ValueError(f"no run in {opened.address} is running; name one, or say with --storage where it is")
    return RunFolder(storage=opened, name=max(running, key=lambda status: status.started or 0.0).run)


class Watch:
    """Shows one run on one terminal."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        console: Console,
        is_live: bool = True,
        every_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`every_seconds` is the time between polls; 0 chooses one that suits the storage."""
        self._folder, self._console, self._is_live, self._clock, self._sleep = folder, console, is_live, clock, sleep
        self._every_seconds = every_seconds or (LOCAL_EVERY_SECONDS if folder.storage.is_local else REMOTE_EVERY_SECONDS)
        self._tracker = RunTracker(folder.name)
        self._look_seconds = LOOK_EVERY_SECONDS if folder.storage.is_local else REMOTE_LOOK_EVERY_SECONDS
        self._places: list[live.Place] = []
        self._figures: Mapping[int | None, live.Figures] = {}
        self._before: dict[int, live.Figures] = {}
        self._ranks: list[RankSpeed] = []
        self._trouble = ""

    def follow(self) -> int:
        """Follows the run until it ends; returns the exit status."""
        tail = JournalTail(self._folder.storage, self._folder.name)
        try:
            events = tail.excerpt(tail_bytes=TAIL_BYTES, tail_segments=TAIL_SEGMENTS).events
        except FileNotFoundError:
            events = []
        status = self._look()
        with _Screen(self._console) as screen:
            said = [line for event in events if (line := self._tracker.take(event))]
            if len(said) > SHOWN_BEFORE:
                screen.message(f"... {len(said) - SHOWN_BEFORE:,} earlier events are in its journal")
            for line in said[-SHOWN_BEFORE:]:
                screen.message(line)
            looked_at = ranks_at = self._clock()
            while True:
                if self._tracker.end or status.status in EXITS:
                    # The driver may have written its end after the journal was read and before its process was looked up.
                    for event in self._new(tail, screen):
                        screen.message(self._tracker.take(event))
                    break
                self._ask(status)
                now = self._clock()
                screen.show(self._tracker.state(now, status, self._figures), self._ranks)
                if self._ranks and not screen.is_terminal and now - ranks_at >= RANKS_EVERY_SECONDS:
                    ranks_at = now
                    screen.message("; ".join(rank_lines(self._ranks)))
                self._sleep(self._every_seconds)
                new = self._new(tail, screen)
                for event in new:
                    screen.message(self._tracker.take(event))
                is_of_interest = bool(new) and status.status != "running"
                is_learned = status.plan.total_steps is None and (bool(new) or bool(self._figures))
                if is_of_interest or is_learned or self._clock() - looked_at >= self._look_seconds:
                    looked_at, before = self._clock(), status.status
                    status = self._look(is_live=is_learned)
                    if status.status == "silent" and before != "silent":
                        screen.message(status.note)
        return self._tell_end(status)

    def _new(self, tail: JournalTail, screen: "_Screen") -> list[Event]:
        """Reads the new events; an outage of the storage is reported once, and waited out."""
        try:
            events = tail.follow()
        except OSError as error:
            if not self._trouble:
                self._trouble = shown(error)
                screen.message(f"the storage does not answer: {self._trouble}; trying again")
            return []
        if self._trouble:
            self._trouble = ""
            screen.message("the storage answers again")
        return events

    def _look(self, *, is_live: bool = False) -> RunStatus:
        """Reads whether the run exists and what its settings say; its ranks can add the steps in an epoch. `_ask` gets the rest."""
        status = look(self._folder, is_live=is_live and self._is_live, clock=self._clock)
        return status or RunStatus(run=self._folder.name, status="unknown")

    def _ask(self, status: RunStatus) -> None:
        """Gets current figures from the coordinator and from up to 64 ranks; a larger run's ranks are asked in turns."""
        self._figures = {}
        if not self._is_live or status.status not in ("running", "silent"):
            return
        places = self._tracker.places
        if len(places) > live.ASKED_RANKS:  # rank 0 every time, because it knows the losses
            if not self._places:
                self._places = places[1:]
            now, self._places = self._places[: live.ASKED_RANKS - 1], self._places[live.ASKED_RANKS - 1 :]
            places = [places[0], *now]
        coordinator = live.coordinator_place(self._folder)
        self._figures = live.ask_all([*places, *([coordinator] if coordinator else [])], self._folder.name)
        ranks = {rank: figures for rank, figures in self._figures.items() if rank is not None}
        fresh = [speed for rank in ranks if (speed := rank_speed(rank, self._before.get(rank, {}), ranks[rank])) is not None]
        self._before |= ranks
        told = {speed.rank for speed in fresh}
        alive = {place.rank for place in self._tracker.places}
        self._ranks = sorted(
            [*fresh, *(old for old in self._ranks if old.rank not in told and old.rank in alive)], key=lambda speed: speed.rank
        )

    def _tell_end(self, status: RunStatus) -> int:
        """Prints the driver's own final table, if the run has one."""
        end = self._tracker.end
        ended = status_of(end) if end else status.status
        summary: Mapping[str, Any] = {}
        if end:
            began = self._clock()
            while not (summary := current_summary(self._folder, end)) and self._clock() - began < SUMMARY_SECONDS:
                self._sleep(LOCAL_EVERY_SECONDS)
            if summary:
                self._console.print(final_table(summary), soft_wrap=True)
        why = why_ended(end) if end else status.note
        if why or not summary:
            self._console.print(Text(shown(f"{self._folder.name}: {ended}{': ' if why else ''}{why}", LONGEST_LINE)), soft_wrap=True)
        return EXITS[ended]


# --- what happened --------------------------------------------------------------------------------------------------------------------


class RunTracker:
    """Follows a run's state through the journal's events. Uses no clock and no storage."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._info = CLASSIFICATION
        self._phase, self._since = "starting", 0.0
        self._workers, self._registered = 0, 0
        self._step, self._start_step = 0, 0
        self._attempts, self._pauses = 0, 0  # of the newest driver
        self._restarts = 0  # of earlier drivers
        self._evaluation: Event = {}
        self._commit: tuple[int, float] | None = None
        self._pace = JournalPace()
        self._newest: list[Event] = []  # events of the newest attempt that say where its ranks are
        self.end: Event = {}
        """The newest driver's last event, once it has ended."""

    @property
    def restarts(self) -> int:
        """Counted like summary.restarts."""
        return self._restarts + max(0, self._attempts - 1 - self._pauses)

    @property
    def places(self) -> list[live.Place]:
        """Where the ranks serve their metrics."""
        return live.rank_places(self._newest)

    def take(self, event: Event) -> str:
        """Returns the line to show for an event; "" if the progress line says enough. An event of an unknown kind is shown as it is."""
        with suppress(*STRANGE):
            self._learn(event)
        line = (words_of(event, self._info) or f"{event['event']}: {plainly(event)}") if is_followed(event) else ""
        return f"{time.strftime('%m-%d %H:%M:%S', time.localtime(event['time']))}  {shown(line, LONGEST_LINE)}" if line else ""

    def _learn(self, event: Event) -> None:
        now = float(event["time"])
        self._pace.take(event)
        match event:
            case {"event": "run_started"}:
                self._restarts = self.restarts
                self._info, _ = known_info(event)
                self.end, self._attempts, self._pauses = {}, 0, 0
                self._turn("starting", now)
            case {"event": "attempt_started", "workers": int(workers), "start_step": int(step)}:
                self._attempts += 1
                self._workers, self._registered, self._step, self._start_step, self._newest = workers, 0, step, step, [event]
                self._turn("starting workers", now)
            case {"event": "worker_registered"}:
                self._newest.append(event)
                self._registered += 1
                if self._registered == self._workers:
                    self._turn("loading data and model", now)
            case {"event": "training_started"}:
                self._turn("training", now)
            case {"event": "evaluation", "step": int(step)}:
                self._evaluation = event
                self._step = max(self._step, step)
            case {"event": "first_step", "step": int(step)}:
                self._step = max(self._step, step)
            case {"event": "checkpoint_committed", "step": int(step)}:
                self._step, self._commit = max(self._step, step), (step, now)
            case {"event": "attempt_failed"}:
                self._turn("restarting", now)
            case {"event": "attempt_paused"}:
                self._pauses += 1
                self._turn("changing the workers", now)
            case {"event": "hang"}:
                self._turn("hanging", now)
            case {"event": "stop_requested"}:
                self._turn("stopping", now)
            case {"event": "run_finished" | "run_stopped" | "run_failed"}:
                self.end = event

    def _turn(self, phase: str, now: float) -> None:
        self._phase, self._since = phase, now

    def state(self, now: float, status: RunStatus, figures: Mapping[int | None, live.Figures]) -> RunState:
        """The state for the progress line; `figures` are the current ones of the ranks and, under None, of the coordinator."""
        rank_0 = figures.get(0, {})
        ranks = [figures[rank] for rank in figures if rank is not None]
        speeds = [said["images_per_second"] for said in ranks if "images_per_second" in said]
        rate = sum(speeds) / len(speeds) * self._workers if speeds else None
        step = max([self._step, *(int(said["step"]) for said in ranks if "step" in said)])
        total = planned_steps(ranks) or status.plan.total_steps or 0
        loss = rank_0.get("loss", self._evaluation.get("train_loss"))
        headline, split = headline_of(self._evaluation, self._info)
        # Counters since the attempt began; the driver's own line uses those of the last steps.
        waited, computed = rank_0.get("data_wait_seconds_total"), rank_0.get("step_seconds_sum")
        pace = steps_per_second(ranks)
        # A silent run would repeat the same line, which a log does not need.
        is_silent = status.status == "silent"
        age = max(0.0, now - self._commit[1]) if self._commit and not is_silent else None
        return RunState(
            run=shown(self._run),
            phase=f"no sign of life since {moment(status.last_sign or self._since)}" if is_silent else self._phase,
            phase_seconds=None if is_silent or self._phase == "training" or not self._since else max(0.0, now - self._since),
            step=step,
            total_steps=total,
            epoch=rank_0.get("epoch", step / status.plan.steps_per_epoch if status.plan.steps_per_epoch else 0.0),
            epochs=status.plan.epochs or 0,
            loss=loss,
            learning_rate=rank_0.get("learning_rate"),
            images_per_second=rate or status.images_per_second,
            data_wait_ratio=waited / computed if waited is not None and computed else None,
            headline=headline,
            headline_title=headline_title(self._info, split),
            headline_unit=self._info.headline.unit,
            unit=self._info.unit,
            checkpoint_step=self._commit[0] if self._commit else None,
            checkpoint_age_seconds=age,
            remaining_seconds=self._remaining_seconds(pace, max(0, total - step), total, now) if total and not is_silent else None,
            restarts=self.restarts,
        )

    def _remaining_seconds(self, pace: float | None, steps_left: int, total: int, now: float) -> float | None:
        if pace:
            return steps_left / pace
        return self._pace.remaining_seconds(total, now) if self._phase == "training" and not self.end else None


# --- the ranks ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpeed:
    """A rank's steps between two polls."""

    rank: int
    own_seconds: float
    """Its own work in a step: everything but waiting for other ranks."""
    data_wait_ratio: float
    """Fraction of the steps' time."""
    others_wait_ratio: float


def rank_speed(rank: int, before: live.Figures, now: live.Figures) -> RankSpeed | None:
    """None if it did no step in between, or was another process before."""

    def done(name: str) -> float:
        return now.get(name, 0.0) - before.get(name, 0.0)

    steps, seconds = done("steps_total"), done("step_seconds_sum")
    if not before or steps <= 0 or seconds <= 0 or now.get("start_time_seconds") != before.get("start_time_seconds"):
        return None
    waited = done("reduce_seconds_total")
    return RankSpeed(
        rank=rank,
        own_seconds=max(0.0, seconds - waited) / steps,
        data_wait_ratio=done("data_wait_seconds_total") / seconds,
        others_wait_ratio=waited / seconds,
    )


def rank_lines(ranks: Sequence[RankSpeed], ratio: float = FaultPolicy().straggler_ratio) -> list[str]:
    """A line for each rank; with more than 8, only the slowest. A rank `ratio` times slower than the others is called slow."""
    middle = statistics.median(rank.own_seconds for rank in ranks)
    shown = sorted(sorted(ranks, key=lambda rank: -rank.own_seconds)[:SHOWN_RANKS], key=lambda rank: rank.rank)
    lines = []
    for rank in shown:
        others = [other.own_seconds for other in ranks if other is not rank]
        is_slow = bool(others) and rank.own_seconds > ratio * statistics.median(others)
        waits = f"waits {percent(rank.data_wait_ratio, 0)} for data, {percent(rank.others_wait_ratio, 0)} for others"
        lines.append(f"rank {rank.rank}: {1000 * rank.own_seconds:.1f} ms of its own a step, {waits}{'  SLOW' if is_slow else ''}")
    if len(ranks) > len(shown):
        lines.append(f"the slowest of {len(ranks):,} ranks that answer; the median is {1000 * middle:.1f} ms")
    return lines


# --- the screen -----------------------------------------------------------------------------------------------------------------------


class _Screen:
    """On a terminal, redraws the line and the ranks below it in place; elsewhere trainer.runs.progress prints a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.is_terminal = console.is_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._line = ProgressLine(console)

    def __enter__(self) -> "_Screen":
        if self.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_terminal:
            self._live.stop()

    def message(self, text: str) -> None:
        """Prints a permanent line; "" prints nothing."""
        if text:
            self._console.print(Text(text), soft_wrap=True)

    def show(self, state: RunState, ranks: Sequence[RankSpeed]) -> None:
        if not self.is_terminal:
            self._line.update(state)
            return
        line = Table.grid(padding=(0, 1))
        line.add_column(width=20)
        line.add_column(no_wrap=True, overflow="ellipsis")
        total = state.total_steps or None
        line.add_row(ProgressBar(total=total, completed=state.step, width=20, pulse=total is None), Text(describe(state)))
        below = [Text(text, no_wrap=True, overflow="ellipsis", style="dim") for text in (rank_lines(ranks) if len(ranks) > 1 else [])]
        self._live.update(Group(line, *below), refresh=True)
