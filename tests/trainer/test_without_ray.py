"""A local Ray that dies ends the command with one sentence, and the journal has that end: from the storage alone, within seconds."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.journal import Journal, read_journal
from cluster.storage import Storage, open_storage
from cluster.store import Store
from trainer.drive import without_ray as without_ray_module
from trainer.drive.signals import Phase, Signals
from trainer.drive.stages import Begun
from trainer.drive.without_ray import WithoutRay

SENTENCE = "error: the raylet of this run's Ray died, and its workers with it; the same command goes on from the newest checkpoint\n"


def begun_in(storage: Storage) -> Begun:
    store, journal = Store.open(storage, "run"), Journal.open(storage, "run", "driver-1-1")
    generation = store.claim_generation()
    journal.write("run_started", generation=generation)
    return Begun(journal=journal, store=store, generation=generation, start=None)


def end_of(storage: Storage) -> list[dict[str, Any]]:
    return [event for event in read_journal(storage, "run") if event["event"] != "run_started"]


@pytest.mark.parametrize(
    ("phase", "is_recorded"),
    [(Phase.SETTING_UP, True), (Phase.RESUMING, True), (Phase.TRAINING, True), (Phase.ENDING, False), (Phase.REPORTING, False)],
)
def test_the_journal_has_the_end_unless_another_one_is_being_written(
    phase: Phase, is_recorded: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storage, signals, left = open_storage(tmp_path), Signals(), list[int]()
    without_ray = WithoutRay(signals, left.append)
    without_ray.begun(begun_in(storage))
    signals.enter(phase)
    without_ray.end("raylet")
    assert capfd.readouterr().err == SENTENCE
    assert left == [1]
    events = end_of(storage)
    assert [(event["event"], event["kind"], event["rank"]) for event in events] == [("run_failed", "infrastructure", None)] * is_recorded
    if events:
        assert events[0]["message"] == "the raylet of this run's Ray died, and its workers with it"
        assert "the same command goes on" in events[0]["reason"]


def test_a_run_that_is_not_this_drivers_has_no_such_end(tmp_path: Path) -> None:
    storage, left = open_storage(tmp_path), list[int]()
    WithoutRay(Signals(), left.append).end("raylet")  # before the run was claimed
    assert not (tmp_path / "run").exists()
    signals = Signals()
    without_ray = WithoutRay(signals, left.append)
    without_ray.begun(begun_in(storage))
    begun_in(storage)  # another driver takes it over
    signals.enter(Phase.TRAINING)
    without_ray.end("gcs_server")
    assert left == [1, 1]
    assert end_of(storage) == []


def test_a_silent_storage_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(without_ray_module, "RECORD_SECONDS", 0.1)
    signals, left, is_over = Signals(), list[int](), threading.Event()
    begun = begun_in(open_storage(tmp_path))

    class Silent:
        def newest_generation(self) -> int:
            is_over.wait(60)
            return 1

    silent: Any = Silent()
    without_ray = WithoutRay(signals, left.append)
    without_ray.begun(replace(begun, store=silent))
    signals.enter(Phase.TRAINING)
    began = time.monotonic()
    without_ray.end("raylet")
    is_over.set()
    assert time.monotonic() - began < 30
    assert left == [1]
