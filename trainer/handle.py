"""Runs from Python, in a script or a notebook: `from trainer import finetune, open_run`. The same engine as the command line: `finetune`
starts `python -m trainer.run` with the words that the settings make, and the handle follows it and reads the run's folder.

    run = finetune("photos/", name="pets", settings={"train.epochs": 3})
    run.wait()                          # shows what the run says; returns its metrics
    run.metrics["test_accuracy"], run.history, run.report
    run.predict("cat.jpg", "album/")

The call goes on where an earlier one was stopped or killed, as the command does, and returns at once what has finished. The run does not
outlive this process: it is sent SIGTERM when that ends, saves, and goes on when it is asked again.
"""

import contextlib
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

from cluster.journal import read_journal
from cluster.storage import join_uri, open_storage
from cluster.text import printable
from trainer.report.page import table, tag
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.model_files import model_of
from trainer.runs.progress import summary_rows
from trainer.settings.cli import parse
from trainer.settings.fields import settings as settings_of
from trainer.settings.tree import RunConfig
from trainer.settings.words import did_you_mean

Status = Literal["running", "finished", "failed", "stopped", "unfinished"]
_LAST_LINES = 40
_STORAGE = RunConfig().storage
_NAMED = re.compile(r"run (\S+) (?:in \S|has finished already)")
"""The driver's words that say what a run is called (trainer.drive.start)."""
_MINE = {"run": "name", "storage": "storage"}
_NO_WORDS = ("profile", "dry_run", "print_config", "config")


class RunFailed(Exception):
    """The run ended with an error; the message ends with what it said last. The same call goes on from its newest checkpoint."""


class RunStopped(Exception):
    """A signal, or `Run.stop`, ended the run, which has saved. The same call goes on."""


def finetune(
    data: str | os.PathLike[str] = "",
    *,
    recipe: str | Sequence[str] = (),
    name: str = "",
    storage: str | os.PathLike[str] = "",
    settings: Mapping[str, Any] | None = None,
) -> "Run":
    """Start a run, or go on with one that was stopped, and return at once.

    `data`: a folder with a folder of images for each class, or whatever else `--data.path` takes. `recipe`: shipped recipes or TOML files,
    as `--config` takes them. `name`: of the run; without one, it follows from the settings, so the same call means the same run.
    `settings`: by the names that the command line has, such as {"train.epochs": 3, "data.flip": True}.

    ValueError for settings that the command line would refuse, with its words.
    """
    words = words_of(data, recipe=recipe, name=name, storage=storage, settings=settings or {})
    config = _checked(words)
    return Run(storage=config.storage, name=config.run, process=_Process(words))


def open_run(run: str | os.PathLike[str], *, storage: str | os.PathLike[str] = _STORAGE) -> "Run":
    """A run that was started somewhere else: its folder (path or URI), or its name under `storage`. ValueError if there is none."""
    folder = find_run(os.fspath(run), os.fspath(storage))
    return Run(storage=folder.storage.uri, name=folder.name, process=None)


class Run:
    """A run: follows it while it is under way, and reads what it leaves. Made by `finetune` and `open_run`."""

    def __init__(self, *, storage: str, name: str, process: "_Process | None") -> None:
        self._storage, self._given_name, self._process = storage, name, process
        self._predictor: Any = None

    @property
    def name(self) -> str:
        """The run's name. Of one that was started without a name it waits until it has one, some seconds. RunFailed if it came to none."""
        if self._given_name or self._process is None:
            return self._given_name
        return self._process.named()

    @property
    def folder(self) -> str:
        """The location of the run's folder: a path or URI."""
        return join_uri(open_storage(self._storage).uri, self.name)

    @property
    def status(self) -> Status:
        """running; finished, failed or stopped as it ended; of a run that is not this process's, finished or unfinished."""
        if self._process is not None and (ended := self._process.ended()) != "finished":
            return ended
        return "finished" if self._summary().get("status") == "finished" else "unfinished"

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was measured: the content of summary.json once there is one, before that the newest evaluation ({} before the first)."""
        summary = self._summary()
        if summary and (self._process is None or self._process.ended() != "running"):
            return summary
        return next(reversed(self.history), {})

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """All evaluations so far, in order, as the journal has them: step, epoch, losses, measures."""
        events = read_journal(open_storage(self._storage), self.name)
        return [{key: value for key, value in event.items() if key != "event"} for event in events if event["event"] == "evaluation"]

    @property
    def report(self) -> str | None:
        """The location of the run's page; None before it is written."""
        folder = self._run_folder()
        there = any(entry.name == "report.html" for entry in folder.storage.list(folder.name))
        return join_uri(folder.location, "report.html") if there else None

    def wait(self, timeout_seconds: float | None = None, *, show: TextIO | Literal["stdout"] | None = "stdout") -> Mapping[str, Any]:
        """Wait for the end and return `metrics`. What the run says is written to `show` meanwhile, from where the last call ended.

        RunFailed if it fails, RunStopped if something ends it, TimeoutError if it is still running after `timeout_seconds`; it goes on
        then. Ctrl-C (the interrupt of a notebook) is passed on: the run saves and ends, then KeyboardInterrupt is raised."""
        if self._process is not None:
            self._process.wait(timeout_seconds, sys.stdout if show == "stdout" else show)
        elif self.status != "finished":
            raise ValueError(f"{self._given_name} is not a run of this process, which cannot wait for it; finetune(...) goes on with it")
        return self.metrics

    def stop(self) -> None:
        """Have the run save and end, and wait for that. The same call of `finetune` goes on. Nothing happens if it has ended."""
        if self._process is not None:
            self._process.stop()

    def predict(self, *images: str | os.PathLike[str], top: int = 3) -> list[Mapping[str, Any]]:
        """The model's answers for image files, or folders of them, in order: {"image": path, ...} as `finetune predict --json` prints it.
        An image that cannot be read has an `error`. ValueError if the run has not finished, or if a folder holds no image."""
        from trainer.inference.predictor import Predictor
        from trainer.predict import image_paths

        paths = list(image_paths([os.fspath(image) for image in images]))
        if self._predictor is None:
            self._predictor = Predictor(model_of(self._run_folder()))
        return [found.to_json() for found in self._predictor.predict(paths, top=top)]

    def _run_folder(self) -> RunFolder:
        return RunFolder(storage=open_storage(self._storage), name=self.name)

    def _summary(self) -> Mapping[str, Any]:
        text = self._run_folder().read("summary.json")
        return dict(json.loads(text)) if text is not None else {}

    def __repr__(self) -> str:
        """Does not wait for a name."""
        name = self._given_name or (self._process.name if self._process is not None else "")
        return f"<Run {printable(name) or 'that has no name yet'}: {self.status if name else 'starting'}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        if not (self._given_name or (self._process is not None and self._process.name)):
            return tag("p", repr(self))
        rows = [("run", self.name), ("status", self.status), *summary_rows(self._summary()), ("folder", self.folder)]
        return table((), list(dict(rows).items()))


def words_of(
    data: str | os.PathLike[str],
    *,
    recipe: str | Sequence[str],
    name: str,
    storage: str | os.PathLike[str],
    settings: Mapping[str, Any],
) -> list[str]:
    """The command line's words. ValueError for a setting that it does not have."""
    known = settings_of(RunConfig())
    words = [os.fspath(data)] if os.fspath(data) else []
    for each in [recipe] if isinstance(recipe, str) else recipe:
        words += ["--config", each] if each else []
    for flag, given in (("--run", name), ("--storage", os.fspath(storage))):
        words += [flag, given] if given else []
    for key, value in settings.items():
        if key in _MINE:
            raise ValueError(f"settings have {key!r}; give it as the argument {_MINE[key]}=")
        if key not in known:
            hint = " recipes are the argument recipe=" if key in _NO_WORDS else did_you_mean(key, tuple(known))
            raise ValueError(f"{key!r} is no setting;{hint or ' names are those of the command line, such as train.epochs'}")
        words += [f"--{key.replace('_', '-')}", *_as_words(key, value)]
    return words


def _as_words(key: str, value: Any) -> list[str]:
    match value:
        case bool():
            return ["true" if value else "false"]
        case int() | float():
            return [repr(value)]
        case str() | os.PathLike():
            return [os.fspath(value)]
        case list() | tuple() if all(not isinstance(each, list | tuple | dict) for each in value):
            return [word for each in value for word in _as_words(key, each)]
    raise ValueError(
        f"settings[{key!r}] is a {type(value).__name__}; give text, a number, True, False, or a list of these, or put it into a TOML file "
        "and name that as recipe="
    )


def _checked(words: Sequence[str]) -> RunConfig:
    """The settings that the words make. ValueError with what the command line says of words that it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(words).config
    except SystemExit:
        text = re.sub(r"\s+", " ", "".join(" " if ord(each) in range(0x2500, 0x2580) else each for each in said.getvalue()))
        raise ValueError(text.strip().removeprefix("error: ")) from None


class _Process:
    """The run's process. A thread starts it and reads what it says: the kernel tells the child of the death of the *thread* that started
    it (trainer.series.child), and a notebook's cells may come from any."""

    def __init__(self, words: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "trainer.series.child", str(os.getpid()), "-m", "trainer.run", *words]
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._error: BaseException | None = None
        self._is_named, self._has_started, self._has_ended = threading.Event(), threading.Event(), threading.Event()
        self.name = ""
        threading.Thread(target=self._follow, name="finetune run", daemon=True).start()
        self._has_started.wait()
        if self._error is not None:
            raise self._error

    def _follow(self) -> None:
        try:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
            )
        except BaseException as error:
            self._error = error
            return
        finally:
            self._has_started.set()
        assert process.stdout is not None
        for line in process.stdout:
            if not self.name and (found := _NAMED.match(line)):
                self.name = found[1]
                self._is_named.set()
            self._last.append(line)
            self._said.put(line)
        process.wait()
        self._has_ended.set()
        self._is_named.set()

    def named(self) -> str:
        self._is_named.wait()
        if not self.name:
            raise RunFailed(f"the run came to no name. It said:\n{self._last_words()}")
        return self.name

    def ended(self) -> Literal["running", "finished", "failed", "stopped"]:
        if not self._has_ended.is_set():
            return "running"
        status = self._status()
        return "finished" if status == 0 else "stopped" if status < 0 or status > 128 else "failed"

    def wait(self, timeout_seconds: float | None, show: TextIO | None) -> None:
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        interrupted = False
        while not self._has_ended.is_set():
            try:
                self._tell(show)
                left = 0.1 if until is None else min(0.1, until - time.monotonic())
                if left <= 0 and not interrupted:
                    raise TimeoutError(f"the run is still under way after {timeout_seconds:g} s; it goes on: wait again, or stop() it")
                self._has_ended.wait(max(left, 0.01))
            except KeyboardInterrupt:  # the first lets it save, a second one ends it at once
                interrupted = True
                self._signal(signal.SIGINT)
        self._tell(show)
        if interrupted:
            raise KeyboardInterrupt
        match self.ended():
            case "failed":
                raise RunFailed(f"the run ended with status {self._status()}; the same call goes on. It said:\n{self._last_words()}")
            case "stopped":
                raise RunStopped(f"the run was stopped; the same call goes on. It said:\n{self._last_words()}")

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        self._has_ended.wait()

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None and not self._has_ended.is_set():
            process.send_signal(number)

    def _status(self) -> int:
        assert self._process is not None
        status = self._process.returncode
        assert status is not None
        return status

    def _tell(self, show: TextIO | None) -> None:
        """Write what was said since the last call; without anybody to show it to, it is kept for the next one."""
        while show is not None:
            try:
                show.write(self._said.get_nowait())
            except queue.Empty:
                show.flush()
                return

    def _last_words(self) -> str:
        return "".join(self._last).strip()
