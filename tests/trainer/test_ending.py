"""The end of a run is written in an order in which nothing is lost, whatever happens between two writes. Real storage, journal and report;
no Ray."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.controller import RunFailed
from cluster.failures import Failure
from cluster.journal import Journal, read_journal
from cluster.storage import open_storage
from dataio.parquet import open_dataset
from tests.trainer.report_runs import SAMPLE, STEPS, story, write_pictured
from trainer.drive.ending import Ending, complete
from trainer.drive.identity import find
from trainer.drive.signals import Phase, Signals
from trainer.runs.folder import RunFolder
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION

DATASET = open_dataset(SAMPLE)


class Killed(BaseException):
    """Nothing after it happens, as after SIGKILL."""


class Run:
    """A run whose ranks have ended well, and whose end is still to be written."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = write_pictured(tmp_path / "pets", events=story()[:-1])
        for name in ("summary.json", "predictions.parquet", "curves.parquet"):  # without images and curves the report is quick
            (self.folder / name).unlink()
        self.storage = open_storage(str(tmp_path))
        self.signals = Signals()
        self.signals.enter(Phase.TRAINING)
        self.journal = Journal.open(self.storage, "pets", writer="driver")
        self.orders: list[tuple[object, ...]] = []
        self.quiet = Console(file=open(os.devnull, "w"), width=200, record=True)  # noqa: SIM115

    def ending(self) -> Ending:
        session: Any = SimpleNamespace(
            config=RunConfig(run="pets", storage=self.storage.uri),
            storage=self.storage,
            journal=self.journal,
            last_events=lambda: read_journal(self.storage, "pets"),
            quarantined=lambda: 2,
            total_steps=STEPS,
            steps_per_epoch=40,
            resources=SimpleNamespace(threads_per_worker=1),
            decided=SimpleNamespace(dataset=DATASET, command="python -m trainer.run", task=CLASSIFICATION),
            console=self.quiet,
            patiently=lambda what, operation: operation(),
            saved_step=lambda: 100,
            order=self.order,
            generation=1,
            store=SimpleNamespace(newest_generation=lambda: 2, claim=lambda generation: SimpleNamespace(host="elsewhere", pid=7)),
        )
        self.signals.enter(Phase.ENDING)
        return Ending(session=session, result={"stopped": False, "steps_done": STEPS}, workers=2, signals=self.signals)

    def order(self, method: str, *asked: object) -> float | None:
        """Of the coordinator. No Prometheus reads it."""
        self.orders.append((method, *asked))
        return 0.0 if method == "ended" else None

    def again(self) -> str | None:
        """What the same command does when it finds the run finished. Returns the report's address."""
        summary = find(self.storage, "pets").summary
        assert summary is not None
        return complete(RunFolder(storage=self.storage, name="pets"), summary, DATASET, self.quiet)

    def events(self, *names: str) -> list[Any]:
        return [event for event in read_journal(self.storage, "pets") if event["event"] in names]

    def assert_complete(self) -> None:
        assert json.loads((self.folder / "summary.json").read_text())["status"] == "finished"
        assert len(self.events("run_finished")) == 1
        assert "Reproduce" in (self.folder / "report.html").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_a_run_that_is_finished_has_a_summary_then_an_end_then_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write, tell = type(run.storage).write_atomic, Journal.write

    def written(storage: Any, name: str, *rest: Any) -> None:
        order.append(name)
        write(storage, name, *rest)

    def told(journal: Journal, event: str, **fields: Any) -> None:
        order.append(event)
        tell(journal, event, **fields)

    monkeypatch.setattr(type(run.storage), "write_atomic", written)
    monkeypatch.setattr(Journal, "write", told)
    assert run.ending().finished() == 0
    assert [name for name in order if name != "account"] == ["pets/summary.json", "run_finished", "pets/report.html"]
    run.assert_complete()
    assert run.signals.phase is Phase.OVER


@pytest.mark.parametrize("point", ["Journal.write", "make_report", "rendered", "RunFolder.write"])
def test_a_run_killed_between_two_writes_of_its_end_is_completed_by_the_next_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    where = {"Journal.write": "cluster.journal", "RunFolder.write": "trainer.runs.folder"}.get(point, "trainer.report.sections")
    with monkeypatch.context() as patch:
        patch.setattr(f"{where}.{point}", fails(Killed()))
        with pytest.raises(Killed):
            run.ending().finished()
    assert find(run.storage, "pets").has_finished  # the next command starts no Ray
    assert not (run.folder / "report.html").exists()
    last = max(event["time"] for event in read_journal(run.storage, "pets"))
    assert run.again() == f"{run.folder}/report.html"
    run.assert_complete()
    assert run.events("run_finished")[0]["time"] == pytest.approx(last)  # a run does not last until somebody looks
    before = (run.folder / "report.html").stat()
    assert run.again() == f"{run.folder}/report.html"
    assert (run.folder / "report.html").stat() == before
    assert len(run.events("run_finished")) == 1


def test_a_run_killed_before_its_summary_is_not_taken_for_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(run.storage), "write_atomic", fails(Killed()))
        with pytest.raises(Killed):
            run.ending().finished()
    assert not find(run.storage, "pets").has_finished
    assert run.events("run_finished") == []


@pytest.mark.parametrize("error", [SyntaxError("invalid syntax"), TypeError("not a tag"), MemoryError(), OSError(28, "No space left")])
def test_a_report_that_fails_costs_only_itself_and_is_written_when_it_can_be(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.sections.rendered", fails(error))
        assert run.ending().finished() == 0
        [failed] = run.events("report_failed")
        assert failed["message"].startswith(f"{type(error).__name__}: ")
        assert "warning: report.html could not be written" in capsys.readouterr().err
        assert run.again() is None
    assert run.again() == f"{run.folder}/report.html"
    run.assert_complete()


def test_a_checkout_that_breaks_during_the_run_costs_only_the_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trainer.report.sections", None)
    assert run.ending().finished() == 0
    assert find(run.storage, "pets").has_finished
    assert len(run.events("report_failed")) == 1


def test_a_part_of_the_report_that_fails_is_said_there_and_in_the_journal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.report.sections.timeline_section", fails(ZeroDivisionError("by zero")))
    assert run.ending().finished() == 0
    assert run.events("report_incomplete")[0]["problems"] == ["Timeline: ZeroDivisionError: by zero"]
    assert "This could not be shown (Timeline: ZeroDivisionError: by zero)." in (run.folder / "report.html").read_text()
    run.assert_complete()


@pytest.mark.parametrize(("number", "point"), [(signal.SIGINT, "rendered"), (signal.SIGTERM, "read_files"), (signal.SIGHUP, "rendered")])
def test_a_signal_while_the_report_is_written_leaves_a_finished_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals, point: str
) -> None:
    with monkeypatch.context() as patch, run.signals.heard():
        patch.setattr(f"trainer.report.sections.{point}", lambda *_: signal.raise_signal(number))
        assert run.ending().finished() == 128 + number
    assert f"{number.name}: stopped before report.html was written; the same command" in capfd.readouterr().err
    assert run.again() == f"{run.folder}/report.html"
    run.assert_complete()


def test_a_signal_while_the_end_is_written_completes_it_and_leaves_out_the_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = type(run.storage).write_atomic

    def slow(storage: Any, name: str, *rest: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        write(storage, name, *rest)

    with monkeypatch.context() as patch, run.signals.heard():
        patch.setattr(type(run.storage), "write_atomic", slow)
        assert run.ending().finished() == 128 + signal.SIGTERM
    assert find(run.storage, "pets").has_finished
    assert len(run.events("run_finished")) == 1
    assert not (run.folder / "report.html").exists()


def test_a_signal_that_came_in_training_does_not_keep_the_report_from_being_written(run: Run) -> None:
    with run.signals.heard():
        signal.raise_signal(signal.SIGHUP)
    assert run.ending().stopped() == 128 + signal.SIGHUP
    assert run.events("run_stopped")[-1]["signal"] == "SIGHUP"
    assert "step 100 of 160 is saved" in run.quiet.export_text()
    assert (run.folder / "report.html").exists()


def test_a_command_whose_run_was_taken_over_tells_prometheus_and_touches_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last state was `running`, for ever."""
    assert run.ending().taken_over() == 1
    assert run.orders == [("ended", "taken_over")]
    assert "error: run pets was taken over by process 7 on elsewhere" in capsys.readouterr().err
    assert not (run.folder / "summary.json").exists()
    assert not (run.folder / "report.html").exists()


def test_a_failed_run_has_its_reason_in_all_three_though_the_report_breaks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(kind="infrastructure", rank=1, message="killed (SIGKILL)")
    monkeypatch.setattr("trainer.report.sections.rendered", fails(RuntimeError("broken")))
    assert run.ending().failed(RunFailed(failure, reason="too many", attempts=4)) == 1
    assert json.loads((run.folder / "summary.json").read_text())["status"] == "failed"
    assert [event["event"] for event in run.events("run_failed", "report_failed")] == ["run_failed", "report_failed"]


@pytest.mark.parametrize(("step", "says"), [(104, "would diverge from there again"), (None, "the same command goes on from there")])
def test_a_run_that_diverged_is_not_told_that_the_same_command_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str], step: int | None, says: str
) -> None:
    """`decide` has said what to try in a new run. A step is to blame for a divergence; none is for a rank whose memory is faulty."""
    failure = Failure(kind="numbers", rank=0, message="the loss is nan", step=step, is_explained=True)
    assert run.ending().failed(RunFailed(failure, reason="the run diverges, whatever the batch", attempts=4)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step 100 is saved")
    assert last.endswith(says)
