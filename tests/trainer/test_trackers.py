"""`track`: the run's driver has `finetune track` beside it, and whatever becomes of that costs the run nothing. Real processes; a whole run
is in tests/e2e/test_tracked.py."""

import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests.trainer.test_track import finish, opened, put_run
from trainer.drive import trackers as trackers_module
from trainer.drive.signals import Signals
from trainer.drive.trackers import tracked
from trainer.settings.rules import validate
from trainer.settings.trackers import TRACKERS, lacking_for_trackers, trackers_of
from trainer.settings.tree import RunConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return put_run(tmp_path / "runs" / "pets")


class Told:
    """What a run's console was told, from any thread."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()

    def wait_for(self, part: str) -> None:
        with self._more:
            assert self._more.wait_for(lambda: any(part in line for line in self.lines), timeout=120), self.lines


def config_of(track: str) -> RunConfig:
    return replace(RunConfig(), track=track)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_places_are_read_and_what_is_wrong_is_told() -> None:
    assert trackers_of("") == {}
    assert trackers_of("tensorboard, mlflow=http://x:5000/a=b") == {"tensorboard": "", "mlflow": "http://x:5000/a=b"}
    for text, problem in (
        ("mlfow", "'mlfow' is no tracker; did you mean mlflow? use tensorboard, mlflow, wandb"),
        ("mlflow=", "'mlflow=' names no place; write mlflow=WHERE"),
        ("wandb,wandb=x", "names wandb twice"),
        ("tensorboard,", "'' is no tracker"),
    ):
        with pytest.raises(ValueError, match="track") as refused:
            trackers_of(text)
        assert problem in str(refused.value)
        with pytest.raises(ValueError, match="track") as refused:
            validate(config_of(text))
        assert problem in str(refused.value)


def test_a_library_that_is_missing_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [each.partition(":")[0] for each in lacking_for_trackers(",".join(TRACKERS))] == ["track=wandb needs the library wandb"]
    assert list(lacking_for_trackers("tensorboard,mlflow")) == []


def test_a_tracker_has_all_of_the_run_when_the_run_is_over(run: Path) -> None:
    told = Told()
    with tracked(config_of("tensorboard"), opened(run), Signals(), told):
        told.wait_for("tensorboard: pets -> ")
        finish(run)
    assert told.lines[-1] == "tensorboard: pets: finished; tensorboard has all of it"
    assert list((run / "tensorboard").iterdir())
    with tracked(config_of("tensorboard"), opened(run), Signals(), told):  # the same command again
        pass
    assert told.lines[-1] == "tensorboard: pets: finished; tensorboard has all of it"


def test_a_tracker_that_is_away_is_told_and_left(run: Path, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "LAST_WORD_SECONDS", 0.0)
    told = Told()
    with tracked(config_of(f"mlflow={nobody}"), opened(run), Signals(), told):
        told.wait_for("trying again, the run goes on without")
        finish(run)
    assert told.lines[-1].startswith("mlflow has not all of the run yet; this tells it the rest: ")
    assert told.lines[-1].endswith(f"track {run} --to mlflow --at {nobody}")


class Interrupted:
    """A signal comes while the trackers have their last word."""

    cuts_short = False

    def __init__(self) -> None:
        self._times = 0

    @property
    def number(self) -> int:
        self._times += 1
        return 0 if self._times == 1 else 2


def test_a_signal_ends_the_wait(run: Path, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "LAST_WORD_SECONDS", 1e6)
    told = Told()
    with tracked(config_of(f"mlflow={nobody}"), opened(run), cast(Signals, Interrupted()), told):
        told.wait_for("trying again")
    assert "mlflow has not all of the run yet" in told.lines[-1]


def test_an_error_of_the_run_is_the_runs_own(run: Path) -> None:
    told = Told()
    finish(run)
    with pytest.raises(RuntimeError, match="the run's"), tracked(config_of("tensorboard"), opened(run), Signals(), told):
        raise RuntimeError("the run's")
    assert told.lines[-1] == "tensorboard: pets: finished; tensorboard has all of it"


def test_a_process_that_cannot_be_started_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    told = Told()
    with tracked(config_of("tensorboard"), opened(run), Signals(), told):
        pass
    [line] = told.lines
    assert "cannot be started (No such file or directory); the run goes on without" in line


def test_what_a_tracker_refuses_is_told_and_nothing_else(run: Path) -> None:
    told = Told()
    with tracked(config_of("mlflow=ftp://x"), opened(run), Signals(), told):
        told.wait_for("ftp://x")
    assert "error" in told.lines[0]


def test_off_there_is_no_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "subprocess", None)
    with tracked(RunConfig(), opened(run), Signals(), Told()):
        pass
