"""Trains several ordinary runs, one after another, as one job that goes on where it was killed. trainer.curve calls it, and whatever else
needs a handful of runs to answer one question; the caller says which runs, and what they mean together.

Each run is a process `python -m trainer.run` with a name of its own in the series' storage. One that has finished is not started again, one
that was under way goes on as any run does. So the same job, killed anywhere and given again, ends in the same runs to the last bit. A run
ends when this process dies, also by SIGKILL, and signals go on to it: it commits first (child.py).
"""

import json
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cluster.storage import Storage
from trainer.series.child import run_child
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration

_BESIDE = ".series"
_LAST_BYTES = 4000
"""Of a failed run's output, what is shown."""
Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A run of the series."""

    name: str
    """Its folder in the series' storage."""
    config: RunConfig
    """All its settings but `run` and `storage`, which are the series'."""
    steps: int
    """About how many it does, from which its time is foretold."""


class RunFailed(Exception):
    """A run of the series failed; the message says which, and ends with its own last words."""


class RunStopped(Exception):
    """A signal came, and the run under way has committed and ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def train(
    members: Sequence[Member], storage: Storage, on_run: Callable[[Member, int], None] = lambda member, number: None
) -> Iterator[tuple[Member, Summary]]:
    """Yields each run with its summary, in order, once it has finished. `on_run(member, number)`: told before one is started that has not
    finished. RunFailed, or RunStopped; the same call then goes on."""
    for number, member in enumerate(members):
        if (summary := finished(storage, member)) is None:
            on_run(member, number)
            _run(member, storage)
            summary = finished(storage, member)
            if summary is None:
                raise RunFailed(f"run {member.name} ended without an error, and {storage.address} holds no summary of its end")
        yield member, summary


def finished(storage: Storage, member: Member) -> Summary | None:
    """The summary of a run that has finished; None if it has not."""
    try:
        summary: Summary = json.loads(storage.read(f"{member.name}/summary.json"))
    except FileNotFoundError:
        return None
    return summary if summary.get("status") == "finished" else None


# --- what it costs ----------------------------------------------------------------------------------------------------------------------


def seconds_left(done: Sequence[tuple[Member, Summary]], left: Sequence[Member]) -> float | None:
    """How long the runs `left` take, as those `done` did: the median of what each took beside its steps (start, tests, end), and its steps
    at their mean pace. None before the first one, which says both."""
    known = [(summary, _step_seconds(summary)) for _, summary in done]
    steps = sum(int(summary.get("steps") or 0) for summary, seconds in known if seconds is not None)
    if not steps:
        return None
    pace = sum(seconds for _, seconds in known if seconds is not None) / steps
    beside = median(float(summary["seconds"]) - seconds for summary, seconds in known if seconds is not None)
    return sum(max(0.0, beside) + pace * member.steps for member in left)


def left_words(done: Sequence[tuple[Member, Summary]], left: Sequence[Member]) -> str:
    """`about 3:20 min left`; "" if nothing is left, or if nobody can tell."""
    seconds = seconds_left(done, left) if left else None
    return "" if seconds is None else f"about {duration(seconds)} left"


def _step_seconds(summary: Summary) -> float | None:
    """Of all steps; None if the summary does not say."""
    samples, rate, whole = (summary.get(key) for key in ("samples_seen", "images_per_second", "seconds"))
    if isinstance(samples, int | float) and isinstance(rate, int | float) and isinstance(whole, int | float) and rate > 0:
        return samples / rate
    return None


# --- one run as a process ---------------------------------------------------------------------------------------------------------------


def words_of(member: Member, storage: Storage, settings: Path) -> list[str]:
    """The command of a run whose settings are in the file `settings`."""
    return ["-m", "trainer.run", "--config", str(settings), "--run", member.name, "--storage", storage.uri]


def _run(member: Member, storage: Storage) -> None:
    with folder_beside(storage) as folder:
        settings, log = folder / f"{member.name}.toml", folder / f"{member.name}.log"
        settings.touch(mode=0o600)  # a URI among the settings may hold credentials
        settings.write_text(to_toml(member.config), encoding="utf-8")
        status = _process(words_of(member, storage, settings), log)
        said = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").strip()
    if status:
        raise RunFailed(f"run {member.name} ended with status {status}; the same command goes on with it. It said:\n{said}")


@contextmanager
def folder_beside(storage: Storage) -> Iterator[Path]:
    """Where settings and output of the runs lie: beside them, hidden, so that nothing stays elsewhere of a job that was killed; for a
    remote storage on this machine, for as long as the run lasts."""
    if storage.is_local:
        storage.make_dir(_BESIDE)
        yield Path(storage.at(_BESIDE))
        return
    with tempfile.TemporaryDirectory(prefix="finetune-series-") as folder:
        yield Path(folder)


def _process(words: Sequence[str], log: Path) -> int:
    """Runs `python WORDS` to its end and returns its status. RunStopped if a signal came meanwhile."""
    with log.open("wb") as output:
        ended = run_child(words, output=output)
    if ended.signal:
        raise RunStopped(ended.signal)
    return ended.status
