"""What the driver shows during a run, and the final table. Called by trainer.drive, by `watch` and by the report, with plain facts; knows
no Ray.

On a terminal one line is redrawn in place; elsewhere (a job's log) a plain line is printed now and then. There is no thread: a line changes
only in `update`.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.text import MASK, redact
from cluster.text import shown as on_one_line
from trainer.runs.certainty import class_warnings, interval_words
from trainer.runs.chosen import early_words, kept_in_brief, kept_words
from trainer.runs.events import STRANGE
from trainer.runs.measures import capital, heading, known_info, measured, one_of, rate_unit, shown
from trainer.settings.programs import program
from trainer.settings.say import Terminal
from trainer.settings.units import duration, loss, number, percent, size

# The causes of `accounting` in words; a cause that is missing here explains itself.
CAUSES = {
    "steps": "computing the steps that count",
    "data wait": "steps that waited for data",
    "exchange wait": "steps that waited for other ranks: slower ones, and the network",
    "checkpoint stall": "steps that waited for a checkpoint's copy",
    "evaluation": "testing",
    "start up": "everything before the first step: imports, Ray, workers, data, model",
    "compile": "compiling the step (train.compile)",
    "recovery": "from a failure to the next step",
    "resize": "from the end of some workers to the first step of others",
    "hang": "ranks that lived and got nowhere",
    "lost work": "steps that a failure undid",
    "other": "the last checkpoint, the export, ending",
}
PLAIN_EVERY_SECONDS = 10.0
REDRAW_EVERY_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The current state of a run. None means not known yet."""

    run: str
    phase: str
    """What the run is doing: starting workers, training, stopping, ..."""
    phase_seconds: float | None = None
    """How long it has been doing that; shown while nothing else changes."""
    step: int = 0
    """Steps done over the whole run."""
    total_steps: int = 0
    epoch: float = 0.0
    """Epochs done."""
    epochs: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    data_wait_ratio: float | None = None
    """Fraction of the time that steps waited for data."""
    headline: float | None = None
    """The task's headline measure, from the newest evaluation."""
    headline_title: str = "test"
    """From trainer.runs.measures.headline_title."""
    headline_unit: str = "ratio"
    """Measure.unit."""
    unit: str = "images"
    """The word for samples (TaskInfo.unit)."""
    checkpoint_step: int | None = None
    """Step of the newest committed checkpoint."""
    checkpoint_age_seconds: float | None = None
    remaining_seconds: float | None = None
    restarts: int = 0


def describe(state: RunState) -> str:
    """One line of text."""
    waited = f" ({duration(int(state.phase_seconds))})" if state.phase_seconds is not None and state.phase_seconds >= 1 else ""
    parts = [f"{state.run}: {state.phase}{waited}"]
    if state.total_steps:
        # The current epoch, counted from 1; after the last step it stays the last epoch.
        epoch = min(int(state.epoch) + 1, state.epochs) if state.epochs else int(state.epoch) + 1
        parts.append(f"epoch {epoch}/{state.epochs}" if state.epochs else f"epoch {epoch}")
        parts.append(f"step {state.step:,}/{state.total_steps:,}")
    if state.remaining_seconds is not None:  # early in the line, because a narrow terminal cuts the end
        parts.append(f"{duration(state.remaining_seconds)} left")
    if state.loss is not None:
        parts.append(f"loss {loss(state.loss)}")
    if state.headline is not None:
        parts.append(f"{state.headline_title} {shown(state.headline_unit, state.headline)}")
    if state.learning_rate is not None:
        parts.append(f"lr {state.learning_rate:.3g}")
    if state.images_per_second is not None:
        parts.append(f"{state.images_per_second:,.0f} {rate_unit(state.unit)}")
    if state.data_wait_ratio is not None:
        parts.append(f"data wait {percent(state.data_wait_ratio)}")
    if state.checkpoint_step is not None:
        age = "" if state.checkpoint_age_seconds is None else f" ({duration(state.checkpoint_age_seconds)} ago)"
        parts.append(f"saved at {state.checkpoint_step:,}{age}")
    if state.restarts:
        parts.append("1 restart" if state.restarts == 1 else f"{state.restarts} restarts")
    return "  ".join(parts)


class ProgressLine:
    """The progress line, as a context manager: leaving it in any way restores the terminal."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_seconds: float = PLAIN_EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Terminal()
        self._every_seconds = every_seconds
        self._clock = clock
        self._last_shown_at: float | None = None
        self._last_state: RunState | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, state: RunState) -> None:
        """Shows `state`, unless the line was shown a moment ago; a new phase and the last step are always shown."""
        now = self._clock()
        last = self._last_state
        wait = REDRAW_EVERY_SECONDS if self._live else self._every_seconds
        is_news = last is None or state.phase != last.phase or state.restarts != last.restarts
        is_last_step = state.total_steps > 0 and state.step >= state.total_steps and (last is None or last.step < state.step)
        is_due = self._last_shown_at is None or now - self._last_shown_at >= wait
        if not (is_news or is_last_step or is_due) or (not self._live and last is not None and describe(state) == describe(last)):
            return
        self._last_shown_at, self._last_state = now, state
        if self._live:
            self._live.update(_bar_and_text(state), refresh=True)
        else:
            self._console.print(Text(describe(state)), soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a permanent line above the progress line: a restart, a corrupt checkpoint, an evaluation."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Removes the line from the terminal; may be called twice."""
        if self._live:
            self._live.stop()
            self._live = None


def _bar_and_text(state: RunState) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_column(width=20)
    line.add_column(no_wrap=True, overflow="ellipsis")
    total = state.total_steps or None
    line.add_row(ProgressBar(total=total, completed=state.step, width=20, pulse=total is None), Text(describe(state)))
    return line


def final_table(
    summary: Mapping[str, Any], *, report: str | None = None, predict: str | None = None, go_on: str | None = None
) -> RenderableType:
    """The result of a run, from its `summary.json`; missing values are left out.

    `report` is the report's path; `predict` and `go_on` are commands to use the model and to continue a run that was stopped.
    """
    title = on_one_line(f"{summary.get('run', 'run')}: {summary.get('status', 'ended')}")
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(summary):
        table.add_row(name, Text(on_one_line(value)))
    parts: list[RenderableType] = [table]
    split = time_split(summary)
    if split:
        times = Table(title=Text("Where the time went"), title_justify="left", show_header=False)
        times.add_column(style="bold", no_wrap=True)
        times.add_column(justify="right", no_wrap=True)
        times.add_column(justify="right", no_wrap=True)
        times.add_column(style="dim", overflow="fold")
        for cause, seconds, share in split:
            times.add_row(Text(on_one_line(cause)), duration(seconds), percent(share), CAUSES.get(cause, ""))
        parts.append(times)
    parts += [Text(on_one_line(f"warning: {words}")) for words in class_warnings(summary, known_info(summary)[0].unit)]
    # Outside the tables: without a frame, a path or a command can be copied. soft_wrap keeps each in one piece.
    for what, line in (("Report", report), ("Predict", predict), ("Go on", go_on)):
        if line:
            parts.append(Text(redact(f"{what + ':':<9}{line}")))
    return Group(*parts)


def summary_rows(summary: Mapping[str, Any], *, with_intervals: bool = True) -> list[tuple[str, str]]:
    """(name, value) of the key numbers in `summary`. Also used by the report. `with_intervals`: a share of samples has its 95 % interval
    behind it."""
    rows: list[tuple[str, str]] = []
    info, _ = known_info(summary)
    samples = capital(info.unit)

    def add(name: str, key: str, show: Callable[[Any], str]) -> None:
        if summary.get(key) is None:
            return
        try:
            rows.append((name, show(summary[key])))
        except STRANGE:
            rows.append((name, "?"))

    for measure, value in measured(info, summary):
        interval = interval_words(summary, measure) if with_intervals else ""
        rows.append((heading(measure), shown(measure.unit, value, 2) + (f" (95 % interval: {interval})" if interval else "")))
    add("Test loss", "test_loss", loss)
    kept, early = kept_words(summary) if with_intervals else kept_in_brief(summary), early_words(summary)
    rows += [(name, words) for name, words in (("Weights kept", kept), ("Ended early", early)) if words]
    # The last batch's loss says little; older releases know no other.
    add("Training loss", "train_loss" if summary.get("mean_train_loss") is None else "mean_train_loss", loss)
    add("Steps", "steps", number)
    add("Epochs", "epochs", number)
    add(f"{samples} seen", "samples_seen", number)
    add(capital(rate_unit(info.unit)), "images_per_second", lambda value: f"{value:,.0f}")
    add("Workers", "workers", number)
    if summary.get("virtual_ranks") != summary.get("workers"):
        add("Virtual ranks", "virtual_ranks", number)
    add("Time", "seconds", duration)
    if summary.get("compile_seconds"):
        add("Compiling", "compile_seconds", duration)
    add("Profile", "profile", lambda value: str(value["verdict"]))
    add("Goodput", "goodput", lambda value: f"{percent(value)} (of all the time went into steps that count)")
    add("Data wait", "data_wait_ratio", percent)
    add("Restarts", "restarts", number)
    if summary.get("restarts"):
        add("Recovery", "recovery_seconds", duration)
    for name, key in (("Preemptions", "preemptions"), ("Resized", "resized"), ("Hangs", "hangs"), ("Batches left out", "batches_skipped")):
        if summary.get(key):
            add(name, key, number)
    add("Checkpoints", "checkpoints", number)
    add("Checkpoint size", "checkpoint_bytes", size)
    add("Checkpoint stall", "checkpoint_stall_seconds", duration)
    add(f"Quarantined {info.unit}", "quarantined", number)
    return rows


def time_split(summary: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(cause, seconds, share) of a summary's `accounting`, the largest first, zeros left out."""
    said = summary.get("accounting")
    known = said.items() if isinstance(said, Mapping) else ()
    accounting = {str(cause): float(seconds) for cause, seconds in known if isinstance(seconds, int | float) and 0 < seconds < 1e12}
    total = sum(accounting.values())
    return [(cause.replace("_", " "), seconds, seconds / total) for cause, seconds in sorted(accounting.items(), key=lambda item: -item[1])]


def predict_command(folder: str, unit: str = "images") -> str:
    """The command that uses the model of a run's folder on what the run learned from, to be pasted into a shell."""
    return pasteable(f"{program('predict')} {shlex.quote(folder)} {one_of(unit).upper()}...")


def pasteable(command: str) -> str:
    """A command as it may be shown: where its secrets had to be masked, it says so."""
    masked = redact(command)
    return masked if masked == command else f"{masked}   # in place of {MASK} give the credentials again"
