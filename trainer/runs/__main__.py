"""`python -m trainer.runs`: lists the runs of a storage with their state; `watch RUN` follows one of them (trainer/runs/watch.py).

status.py reads the runs' folders; this file is the command line and the table. It also exports find_run, with which the small commands
find a run's folder.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro
from rich.text import Text

from cluster.storage import open_storage
from cluster.text import shown as on_one_line
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.measures import shown
from trainer.runs.status import RunStatus, moment, run_folders, statuses
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import Terminal, say, say_json
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration, number, percent, size

__all__ = ["Arguments", "RunFolder", "find_run", "main", "table"]

RETRY_SECONDS = 5.0  # for each file of a remote storage; the user of a list can run it again
INTERRUPTED = 130  # 128 + SIGINT
NAME_WIDTH = 13  # minimum width of a run's name before columns are left out
GAP = "  "
LONGEST_REMARK = 2000

Sort = Literal["started", "name", "status", "step", "accuracy", "speed", "goodput", "restarts", "duration"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """List runs, the newest first. `watch RUN` instead follows one: see `watch --help`. Goodput is the share of a run's time that went into
    steps that count."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME-PATTERN")] = ""
    """Only runs whose names contain this, or match it as a shell pattern (`pets-*`)."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    sort: Sort = "started"
    """Numbers the largest first, times the newest first; `accuracy` is the measure that a run's task goes by, the best first."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """One JSON object a line for each run: numbers without units, null for what is not known."""
    live: bool = True
    """Ask runs that are at work for their figures over HTTP (/metrics), where they can be reached."""


def main(argv: Sequence[str]) -> int:
    """0; 2 (SystemExit) for a wrong command line or a storage that cannot be read; watch's own status for watch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # otherwise ignored in a shell script's background
    try:
        if argv[:1] == ["watch"]:
            from trainer.runs.watch import main as watch

            return watch(argv[1:])
        return _list(tyro.cli(Arguments, prog=program("runs"), args=argv))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(arguments: Arguments) -> int:
    try:
        storage = open_storage(arguments.storage, RETRY_SECONDS)
        everything = run_folders(storage)
        found = list(statuses(run_folders(storage, arguments.pattern), is_live=arguments.live))
    except (ValueError, OSError) as error:
        fail(str(error))
    key, is_descending = _SORTS[arguments.sort]
    found.sort(key=lambda run: run.run)
    known = [run for run in found if key(run) is not None]
    known.sort(key=key, reverse=is_descending)
    ordered = known + [run for run in found if key(run) is None]
    if arguments.json:
        for run in ordered:
            say_json(run.to_json())
        return 0
    if ordered:
        console = Terminal(highlight=False)
        # A file or a program gets every column, in full.
        for line in table(ordered, width=console.width if console.is_terminal else None, now=time.time()):
            console.print(line, soft_wrap=True)
    elif arguments.pattern and any(folder.is_run() for folder in everything):
        say(f"no run in {storage.address} has a name like {arguments.pattern!r}")
    else:
        say(f"no runs in {storage.address}; `{program('run')}` starts one, --storage says where others are")
    return 0


def _quality(run: RunStatus) -> float | None:
    """The task's headline measure, with its sign chosen so that more is better."""
    return run.headline if run.headline is None or run.task.headline.higher_is_better else -run.headline


_SORTS: Mapping[Sort, tuple[Callable[[RunStatus], Any], bool]] = {
    "started": (lambda run: run.started, True),
    "name": (lambda run: run.run, False),
    "status": (lambda run: run.status, False),
    "step": (lambda run: run.step, True),
    "accuracy": (_quality, True),
    "speed": (lambda run: run.images_per_second, True),
    "goodput": (lambda run: run.goodput, True),
    "restarts": (lambda run: run.restarts, True),
    "duration": (lambda run: run.seconds, True),
}

# --- the table ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    heading: str
    show: Callable[[RunStatus, float], str]
    """Gets the run and the current unix time."""
    rank: int
    """Where the width is too small, the column with the highest rank is dropped first; 0 stays."""
    is_text: bool = False


def _or_dash(value: object, show: Callable[[Any], str]) -> str:
    return "-" if value is None else show(value)


def _steps(run: RunStatus, now: float) -> str:
    if run.step is None:
        return "-"
    return f"{run.step:,}/{_or_dash(run.plan.total_steps, number).replace('-', '?')}"


def _restarts(run: RunStatus, now: float) -> str:
    return _or_dash(run.restarts, number) + "+" * (run.restarts_are_more and run.restarts is not None)


def _headline(run: RunStatus, now: float) -> str:
    measure = run.task.headline
    return _or_dash(run.headline, lambda value: f"{shown(measure.unit, value)} {measure.title}") + _of_split(run)


def _accuracy(run: RunStatus, now: float) -> str:
    return _or_dash(run.headline, percent) + _of_split(run)


def _of_split(run: RunStatus) -> str:
    """Says of a number that it is not the test split's."""
    return "" if run.headline is None or run.headline_split == "test" else " val"


def _saved(run: RunStatus, now: float) -> str:
    if run.checkpoint_step is None:
        return "-"
    return f"{run.checkpoint_step:,} ({size(run.checkpoint_bytes)})"


def age(seconds: float) -> str:
    """`12 s`, `3 min`, `7 h`, `12 d`."""
    for unit, length, until in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{max(0, int(seconds / length))} {unit}"
    return f"{int(seconds / 86400)} d"


_COLUMNS = (
    _Column(heading="run", show=lambda run, now: on_one_line(run.run), rank=0, is_text=True),
    _Column(heading="status", show=lambda run, now: run.status, rank=0, is_text=True),
    _Column(heading="step", show=_steps, rank=0),
    _Column(heading="accuracy", show=_accuracy, rank=1),
    _Column(heading="images/s", show=lambda run, now: _or_dash(run.images_per_second, lambda value: f"{value:,.0f}"), rank=2),
    _Column(heading="goodput", show=lambda run, now: _or_dash(run.goodput, percent), rank=3),
    _Column(heading="restarts", show=_restarts, rank=4),
    _Column(heading="workers", show=lambda run, now: _or_dash(run.workers, number), rank=7),
    _Column(heading="started", show=lambda run, now: _or_dash(run.started, moment), rank=9, is_text=True),
    _Column(heading="age", show=lambda run, now: _or_dash(run.started, lambda started: age(now - started)), rank=5),
    _Column(heading="took", show=lambda run, now: _or_dash(run.seconds, duration), rank=6),
    _Column(heading="saved at step", show=_saved, rank=8),
)
_HEADLINE = _Column(heading="test", show=_headline, rank=1)
"""Replaces the accuracy column if the runs have different tasks."""
_STYLES = {"running": "green", "finished": "blue", "failed": "red", "killed": "red", "silent": "yellow", "unknown": "yellow"}


def table(runs: Sequence[RunStatus], *, width: int | None, now: float) -> list[Text]:
    """Aligned lines: a heading, and for each run a line with its problems below. If `width` is too small for all columns, the least
    important ones are left out, and names and remarks are cut; None has room for everything."""
    columns = _columns(runs)
    while True:
        cells = [[column.heading for column in columns], *([column.show(run, now) for column in columns] for run in runs)]
        widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
        if width is None:
            break
        room = width - sum(widths[1:]) - len(GAP) * (len(columns) - 1)
        if room >= min(widths[0], NAME_WIDTH) or not any(column.rank for column in columns):
            widths[0] = min(widths[0], max(room, 1))
            break
        columns.remove(max(columns, key=lambda column: column.rank))
    lines = [_line(columns, widths, cells[0], "bold", "bold")]
    for run, row in zip(runs, cells[1:], strict=True):
        lines.append(_line(columns, widths, row, _STYLES.get(run.status, ""), ""))
        remarks = [f"{GAP}{on_one_line(remark, LONGEST_REMARK)}" for remark in (*filter(None, [run.note]), *run.problems)]
        lines += [Text(cut(remark, width), style="dim") for remark in remarks]
    return lines


def _columns(runs: Sequence[RunStatus]) -> list[_Column]:
    """Accuracy and images if these fit all runs; otherwise each run names its own measure and unit."""
    known = [run.task for run in runs if run.headline is not None]
    columns = list(_COLUMNS)
    if any(task.headline.name != "accuracy" for task in known):
        columns[_named(columns, "accuracy")] = _HEADLINE
    if any(run.task.unit != "images" for run in runs):
        speed = columns[index := _named(columns, "images/s")]
        columns[index] = replace(speed, heading="samples/s")
    return columns


def _named(columns: Sequence[_Column], heading: str) -> int:
    return next(index for index, column in enumerate(columns) if column.heading == heading)


def _line(columns: Sequence[_Column], widths: Sequence[int], row: Sequence[str], status_style: str, style: str) -> Text:
    line = Text(style=style)
    for index, (column, column_width, cell) in enumerate(zip(columns, widths, row, strict=True)):
        shown = cut(cell, column_width)
        is_last = index == len(columns) - 1
        padded = (shown if is_last else f"{shown:<{column_width}}") if column.is_text else f"{shown:>{column_width}}"
        line.append(padded + GAP * (not is_last), style=status_style if column.heading == "status" else "")
    return line


def cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: max(0, width - 1)] + "…"[: max(0, width)]


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
