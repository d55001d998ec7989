"""Finds the state of a storage's runs from bounded reads of their folders: seconds for hundreds of runs. Called by the list of runs
(__main__.py) and by watch. trainer.report gives the full account of one run.

Nothing on disk says that a run is alive. So these checks are done in order: a journal whose newest driver wrote its end is over. Otherwise
the driver's process is looked up, if it ran on this machine. Then its metrics are asked for. A run that neither can tell about counts as
running as long as its silence is not unusual for it.
"""

import fnmatch
import itertools
import json
import os
import re
import socket
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.process import process_stat
from cluster.storage import Storage, open_regular
from cluster.store import COMMIT, CORRUPT, MANIFEST, Store
from dataio.foreign import json_of
from trainer.runs import live, summary
from trainer.runs.chosen import early_words
from trainer.runs.events import STRANGE
from trainer.runs.folder import RUN_MARKS, RunFolder
from trainer.runs.journal_tail import Event, Excerpt, JournalTail
from trainer.runs.measures import headline_of, known_info
from trainer.settings.tree import RunConfig
from trainer.settings.units import duration
from trainer.tasks.info import CLASSIFICATION, TaskInfo

Status = Literal["running", "finished", "stopped", "failed", "killed", "silent", "unknown"]
"""killed: its driver is gone without a final event. silent: nothing is known of its driver, and it has written nothing for a long time."""

FIRST_TAIL_BYTES, FIRST_TAIL_SEGMENTS = 64 << 10, 3  # enough for a run that has ended and has a summary
TAIL_BYTES, TAIL_SEGMENTS = 256 << 10, 40  # for other runs: about 1,200 events, 40 on an object store
SUMMARY_BYTES = 64 << 10  # of summary.json; a confusion matrix of 1,000 classes is megabytes, but comes after the wanted members
REMOTE_AT_ONCE = 16  # runs of an object store read in parallel
SILENT_AFTER_SECONDS = 600.0  # or three times the longest pause of the run so far, if that is longer
SUMMARY_LATE_SECONDS = 60.0  # between a run's last event and its summary

SAME_PROCESS_SECONDS = 60.0  # a clock that was set meanwhile moves a process's start by as much as this

_NUMBERS = ("step", "headline", "images_per_second", "goodput", "restarts", "workers", "started", "last_sign", "seconds")
_TIMES = ("started", "last_sign", "seconds")
MOST, MOST_TIME = 1e18, 1e11

_ENDS: dict[str, Status] = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}
_STATUSES: dict[str, Status] = {status: status for status in _ENDS.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run is to do, from its settings and data; None means unknown."""

    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    total_steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One run, as far as its folder tells; None means unknown."""

    run: str
    status: Status
    note: str = ""
    """Why it failed, since when it has been silent, ..."""
    task: TaskInfo = CLASSIFICATION
    plan: Plan = field(default=Plan())
    step: int | None = None
    headline: float | None = None
    """The task's headline measure, from the newest evaluation."""
    headline_split: str = "test"
    """The split that it is of: while a run trains on data with a validation split, that one."""
    images_per_second: float | None = None
    goodput: float | None = None
    restarts: int | None = None
    restarts_are_more: bool = False
    """Whether the unread part of the journal may hold more of them."""
    workers: int | None = None
    started: float | None = None
    """Unix time at which the run's first driver began."""
    last_sign: float | None = None
    """Unix time of the newest known sign of the run."""
    seconds: float | None = None
    """Total lifetime of its drivers."""
    checkpoint_step: int | None = None
    checkpoint_bytes: int | None = None
    problems: tuple[str, ...] = field(default=())
    """What is wrong with its folder."""

    def to_json(self) -> dict[str, Any]:
        """One flat object, for `--json`."""
        headline = self.task.headline
        left_out = ("task", "plan")
        return {
            **{name: getattr(self, name) for name in self.__slots__ if name not in left_out},
            **asdict(self.plan),
            "test_accuracy": self.headline if headline.name == "accuracy" and self.headline_split == "test" else None,
            "task": self.task.name,
            "headline_name": headline.name,
        }


def run_folders(storage: Storage, pattern: str = "") -> list[RunFolder]:
    """The folders in `storage` that may be runs and whose names match: a shell pattern, or a part of the name."""
    if pattern and not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return [
        RunFolder(storage=storage, name=entry.name)
        for entry in storage.list("")
        if entry.is_dir and not entry.name.startswith(".") and fnmatch.fnmatchcase(entry.name, pattern or "*")
    ]


def statuses(folders: Sequence[RunFolder], *, is_live: bool = True, clock: Callable[[], float] = time.time) -> Iterator[RunStatus]:
    """The status of those folders that are runs, in order. `is_live`: ask runs that may be alive for their figures."""

    def one(folder: RunFolder) -> RunStatus | None:
        return look(folder, is_live=is_live, clock=clock)

    if all(folder.storage.is_local for folder in folders):
        found: Iterator[RunStatus | None] = map(one, folders)
        yield from (status for status in found if status is not None)
        return
    with ThreadPoolExecutor(REMOTE_AT_ONCE) as pool:
        yield from (status for status in pool.map(one, folders) if status is not None)


def look(folder: RunFolder, *, is_live: bool = True, clock: Callable[[], float] = time.time) -> RunStatus | None:
    """The status of one run; None if the folder is not a run's. Damage is reported in `problems`, never raised."""
    problems: list[str] = []
    try:
        entries = {entry.name: entry for entry in folder.storage.list(folder.name)}
    except OSError as error:
        return RunStatus(run=folder.name, status="unknown", problems=(f"the folder cannot be read: {_reason(error)}",))
    if not entries.keys() & set(RUN_MARKS):
        return None
    said: Mapping[str, Any] = {}
    written = 0.0
    if "summary.json" in entries:
        written = entries["summary.json"].modified
        try:
            said = read_summary(folder)
        except (OSError, *STRANGE) as error:
            problems.append(f"summary.json cannot be read: {_reason(error)}")
    excerpt, known = Excerpt(events=[], is_whole=False), said
    try:
        tail = JournalTail(folder.storage, folder.name)
        excerpt = tail.excerpt(tail_bytes=FIRST_TAIL_BYTES, tail_segments=FIRST_TAIL_SEGMENTS)
        known = _if_current(said, written, excerpt.events)
        if not known and not excerpt.is_whole:
            excerpt = tail.excerpt(tail_bytes=TAIL_BYTES, tail_segments=TAIL_SEGMENTS)
            known = _if_current(said, written, excerpt.events)
        if not any(event["event"] == "run_started" for event in excerpt.events):
            problems.append("its journal does not hold the start of a run")
    except FileNotFoundError:
        problems.append("it has no journal")
    except OSError as error:
        problems.append(f"its journal cannot be read: {_reason(error)}")
    try:
        return _checked(_status(folder, excerpt, known, problems, is_live=is_live, now=clock()))
    except (*STRANGE, OSError) as error:
        return RunStatus(run=folder.name, status="unknown", problems=(*problems, f"it cannot be made sense of: {_reason(error)}"))


def _status(folder: RunFolder, excerpt: Excerpt, known: Mapping[str, Any], problems: list[str], *, is_live: bool, now: float) -> RunStatus:
    """`known` is the summary if it belongs to the run's present state."""
    events, end = excerpt.events, end_of(excerpt.events)
    attempts = [event for event in events if event["event"] == "attempt_started"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    settings = _settings(folder, problems)
    ranks: list[live.Figures] = []
    coordinator: live.Figures = {}
    status: Status
    if end is not None:
        early = early_words(known)
        status, note = _ENDS[end["event"]], why_ended(end) or (f"ended early {early}" if early else "")
        if not known and now - end["time"] > SUMMARY_LATE_SECONDS:
            problems.append("it has ended and has no summary.json of that")
    elif not events:
        status, note = _STATUSES.get(known.get("status", ""), "unknown"), ""
    else:
        if is_live:
            places = [*filter(None, [live.coordinator_place(folder)]), *live.rank_places(events)[: live.ASKED_RANKS]]
            answers = live.ask_all(places, folder.name)
            coordinator = answers.pop(None, {})
            ranks = list(answers.values())
        is_answering = bool(ranks or coordinator)
        status, note = alive_or_not(events, driver=find_driver(folder, events), is_answering=is_answering, now=now)
    checkpoint = _checkpoint(folder, events, problems)
    step = max((int(figures["step"]) for figures in ranks if "step" in figures), default=None)
    if step is None:
        step = known.get("steps") if known else newest_step(events)
    steps_per_epoch = _steps_per_epoch(known, evaluations, ranks) or checkpoint.steps_per_epoch()
    workers = known.get("workers") if known else attempts[-1].get("workers") if attempts else None
    seconds = known.get("seconds")
    if seconds is None and excerpt.is_whole and events:
        seconds = summary.wall_seconds(events) + (now - events[-1]["time"] if status == "running" else 0.0)
    speed = known.get("images_per_second") if known else speed_of(ranks, workers) or speed_by_journal(events, settings)
    drivers = [event for event in events if event["event"] == "run_started"]
    task, problem = known_info(known, *reversed(drivers))
    if problem:
        problems.append(problem)
    headline, headline_split = headline_of(known or (evaluations[-1] if evaluations else {}), task)
    return RunStatus(
        run=folder.name,
        status=status,
        note=note,
        step=step,
        task=task,
        plan=Plan(
            epochs=settings.epochs if settings else None,
            steps_per_epoch=round(steps_per_epoch) if steps_per_epoch else None,
            batch_size=settings.batch_size if settings else None,
            total_steps=step if status == "finished" else _total_steps(settings, steps_per_epoch),
        ),
        headline=headline,
        headline_split=headline_split,
        images_per_second=speed,
        goodput=known.get("goodput") if known else coordinator.get("goodput_ratio"),
        restarts=known.get("restarts") if known else summary.restarts(events) if events else None,
        restarts_are_more=not known and bool(events) and not excerpt.is_whole,
        workers=workers,
        started=next((event.get("process_started", event["time"]) for event in drivers), None),
        last_sign=now if ranks or coordinator else events[-1]["time"] if events else None,
        seconds=seconds,
        checkpoint_step=checkpoint.step,
        checkpoint_bytes=checkpoint.size_bytes,
        problems=tuple(problems),
    )


def _checked(status: RunStatus) -> RunStatus:
    """ValueError if what should be a number is none, or is none that can be shown."""
    numbers: dict[str, Any] = {**asdict(status.plan), **{name: getattr(status, name) for name in _NUMBERS}}
    for name, value in numbers.items():
        is_number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST)
        if value is not None and not (is_number and (name not in _TIMES or 0 <= value < MOST_TIME)):
            raise ValueError(f"{name} is {value!r:.40}")
    return status


# --- alive or not ---------------------------------------------------------------------------------------------------------------------


def end_of(events: Sequence[Event]) -> Event | None:
    """The event with which the newest driver ended; None if it has not. A driver whose run was taken over is not the newest."""
    for event in reversed(events):
        if event["event"] == "run_started":
            return None
        if event["event"] in _ENDS:
            return event
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The newest driver's process."""

    host: str
    pid: int
    is_alive: bool | None
    """None if it cannot be looked up: on another machine."""


def find_driver(folder: RunFolder, events: Sequence[Event]) -> Driver | None:
    """From the newest claim of the run, if that belongs to the newest driver; None if there is none."""
    started = next((event for event in reversed(events) if event["event"] == "run_started"), None)
    generation = Store(folder.storage, folder.name).newest_generation()
    if started is None or not generation:
        return None
    try:
        claim = json.loads(folder.storage.read(f"{folder.name}/generations/g{generation:04d}"))
        host, pid = str(claim["host"]), int(claim["pid"])
    except (OSError, *STRANGE):  # cut off by a power failure: it says nothing
        return None
    if pid != started.get("pid"):
        return None
    is_here = host == socket.gethostname() and os.path.isdir("/proc/self")
    return Driver(host=host, pid=pid, is_alive=_is_process(pid, started.get("process_started")) if is_here else None)


def _is_process(pid: int, started: object) -> bool:
    """Whether process `pid` of this machine is alive and began at unix time `started`; if not, another process may have its number."""
    stat = process_stat(pid)
    if stat is None:
        return False
    is_same = not isinstance(started, int | float) or abs(stat.started() - started) < SAME_PROCESS_SECONDS
    return stat.is_alive and is_same


def alive_or_not(events: Sequence[Event], *, driver: Driver | None, is_answering: bool, now: float) -> tuple[Status, str]:
    """The status of a run whose newest driver wrote no end, and a remark on it. Pure."""
    newest = events[-1]["time"]
    if is_answering or (driver is not None and driver.is_alive):
        return "running", ""
    if driver is not None and driver.is_alive is False:
        return "killed", f"its driver, process {driver.pid} of this machine, is gone; the last sign of life is of {moment(newest)}"
    times: list[float] = []
    for event in events[-TAIL_SEGMENTS:]:  # earlier ones may be incomplete, since not all of the journal is read
        times = [event["time"]] if event["event"] == "run_started" else [*times, event["time"]]
    longest = max((after - before for before, after in itertools.pairwise(times)), default=0.0)
    silence = now - newest
    where = f"; its driver ran on {driver.host}" if driver is not None else ""
    if silence > max(SILENT_AFTER_SECONDS, 3 * longest):
        return "silent", f"no sign of life since {moment(newest)}, for {duration(silence)}{where}"
    return "running", f"by its last sign of life, {duration(silence)} ago{where}"


def _if_current(said: Mapping[str, Any], written: float, events: Sequence[Event]) -> Mapping[str, Any]:
    """The summary `said`, written at unix time `written`, if it belongs to the journal's end; otherwise nothing, because it is from an
    earlier driver, after which the run continued."""
    if not events:  # a lost journal contradicts nothing
        return said
    end = end_of(events)
    is_current = end is not None and said.get("status") == _ENDS[end["event"]] and written > end["time"] - SUMMARY_LATE_SECONDS
    return said if is_current else {}


def current_summary(folder: RunFolder, end: Event) -> Mapping[str, Any]:
    """The summary of a run that ended with `end`; empty if it is not there yet, or cannot be read."""
    try:
        written = next((entry.modified for entry in folder.storage.list(folder.name) if entry.name == "summary.json"), None)
        return _if_current(read_summary(folder), written, [end]) if written is not None else {}
    except (OSError, ValueError):
        return {}


def status_of(end: Event) -> Status:
    """The status of a run after its last event."""
    return _ENDS[end["event"]]


def why_ended(end: Event) -> str:
    """A remark on the end, on one line."""
    match end:
        case {"event": "run_failed"}:
            where = f" on rank {end['rank']}" if end.get("rank") is not None else ""
            return f"{end.get('kind', 'failure')}{where}: {str(end.get('message', '')).strip().partition(chr(10))[0]}"
        case {"event": "run_stopped"} if end.get("signal"):
            return f"by {end['signal']}"
    return ""


def moment(when: float) -> str:
    """Unix time -> local `2026-11-23 14:45`."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


# --- the run's files ------------------------------------------------------------------------------------------------------------------


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """The first members of summary.json, those before its long ones. ValueError if it is not a JSON object."""
    path = f"{folder.name}/summary.json"
    if folder.storage.is_local:
        with open_regular(folder.storage.at(path)) as file:
            data = file.read(SUMMARY_BYTES)
    else:
        data = next(folder.storage.read_chunks(path, SUMMARY_BYTES), b"")
    text = data.decode(errors="replace")
    if len(data) < SUMMARY_BYTES:
        whole = json_of(text)
        if not isinstance(whole, dict):
            raise ValueError("it is not a JSON object")
        return whole
    return first_members(text)


def first_members(text: str) -> dict[str, Any]:
    """The complete members of the JSON object at the start of `text`. ValueError if there is none."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip(index: int, mark: str) -> int:
        index = blank.match(text, index).end()  # type: ignore[union-attr]  # the pattern also matches the empty text
        if text[index : index + 1] not in mark or index >= len(text):
            raise ValueError(f"no {mark!r} at character {index}")
        return blank.match(text, index + 1).end()  # type: ignore[union-attr]

    members: dict[str, Any] = {}
    index = skip(0, "{")
    try:
        while True:
            name, index = decoder.raw_decode(text, index)
            value, index = decoder.raw_decode(text, skip(index, ":"))
            index = skip(index, ",}")  # without it a number may be cut off
            members[name] = value
    except ValueError:
        if not members:
            raise
    return members


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The part of config.toml that the list needs."""

    epochs: int
    max_steps: int
    batch_size: int


def _settings(folder: RunFolder, problems: list[str]) -> Settings | None:
    # Not through trainer.settings.cli: a run with settings of an older or newer program must still be listed.
    try:
        data = folder.read("config.toml")
        if data is None:
            return None
        table = tomllib.loads(data.decode())
        default = RunConfig()
        return Settings(
            epochs=int(table.get("train", {}).get("epochs", default.train.epochs)),
            max_steps=int(table.get("train", {}).get("max_steps", default.train.max_steps)),
            batch_size=int(table.get("data", {}).get("batch_size", default.data.batch_size)),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"config.toml cannot be read: {_reason(error)}")
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The newest committed checkpoint."""

    folder: RunFolder
    path: str = ""
    step: int | None = None
    size_bytes: int | None = None

    def steps_per_epoch(self) -> int | None:
        """Steps in an epoch, from its manifest's description of the run."""
        if not self.path:
            return None
        try:
            return int(json.loads(self.folder.read(f"{self.path}/{MANIFEST}") or b"")["meta"]["steps_per_epoch"])
        except (OSError, *STRANGE):  # damaged: whoever reads it for its weights reports that
            return None


def _checkpoint(folder: RunFolder, events: Sequence[Event], problems: list[str]) -> Checkpoint:
    """The journal's newest checkpoint if it exists; otherwise the newest that does. Nothing is verified."""
    told = next((event for event in reversed(events) if event["event"] == "checkpoint_committed"), None)
    try:
        if told is not None:
            path = f"checkpoints/{str(told.get('path', '')).rpartition('/')[2]}"
            names = {entry.name for entry in folder.storage.list(f"{folder.name}/{path}")}
            if COMMIT in names and CORRUPT not in names:
                return Checkpoint(folder=folder, path=path, step=told.get("step"), size_bytes=told.get("size_bytes"))
        commits = Store(folder.storage, folder.name).commits()
        if not commits:
            if told is not None:
                problems.append("its checkpoints are gone, or set aside as damaged")
            return Checkpoint(folder=folder)
        path = commits[0].path.removeprefix(f"{folder.name}/")
        size_bytes = sum(entry.size_bytes for entry in folder.storage.list(commits[0].path))
        return Checkpoint(folder=folder, path=path, step=commits[0].step, size_bytes=size_bytes)
    except OSError as error:
        problems.append(f"its checkpoints cannot be read: {_reason(error)}")
        return Checkpoint(folder=folder)


# --- figures --------------------------------------------------------------------------------------------------------------------------


def newest_step(events: Sequence[Event]) -> int | None:
    """The furthest step that the newest attempt is known to have reached; None before the first attempt."""
    step = None
    for event in events:
        match event:
            case {"event": "attempt_started", "start_step": int(start)}:
                step = start
            case {"event": "first_step" | "evaluation" | "checkpoint_committed", "step": int(done)}:
                step = done if step is None else max(step, done)
    return step


def speed_of(ranks: Sequence[live.Figures], workers: int | None) -> float | None:
    """Images a second of the whole run, estimated from the ranks that answered."""
    said = [figures["images_per_second"] for figures in ranks if "images_per_second" in figures]
    return sum(said) / len(said) * (workers or len(said)) if said else None


def speed_by_journal(events: Sequence[Event], settings: Settings | None) -> float | None:
    """Images a second of the newest attempt, from its first step to the newest known one, testing and saving included."""
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    for event in events:
        match event:
            case {"event": "attempt_started"}:
                first = last = None
            case {"event": "first_step" | "evaluation" | "checkpoint_committed", "step": int(step)}:
                first, last = first or (event["time"], step), (event["time"], step)
    if settings is None or first is None or last is None or last[0] <= first[0] or last[1] <= first[1]:
        return None
    return (last[1] - first[1]) * settings.batch_size / (last[0] - first[0])


def _steps_per_epoch(known: Mapping[str, Any], evaluations: Sequence[Event], ranks: Sequence[live.Figures]) -> float | None:
    said = [(known.get("steps"), known.get("epochs"))]
    said += [(figures.get("step"), figures.get("epoch")) for figures in ranks]
    said += [(event.get("step"), event.get("epoch")) for event in reversed(evaluations)]
    return next((step / epoch for step, epoch in said if step and epoch), None)


def _total_steps(settings: Settings | None, steps_per_epoch: float | None) -> int | None:
    """Total steps of the run: see trainer.settings.spec."""
    if settings is None or steps_per_epoch is None:
        return None
    everything = settings.epochs * round(steps_per_epoch)
    return min(everything, settings.max_steps) if settings.max_steps else everything


def _reason(error: Exception) -> str:
    """The error's message on one line."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().partition("\n")[0]
    return f"no {text}" if isinstance(error, KeyError) else text
