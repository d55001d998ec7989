"""The journal: nothing that was written is lost, by many writers, after a kill in mid-line, through an outage."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from benchmarks.faults.storage import Weather
from cluster import journal as journal_module
from cluster.journal import Journal, last_attempt, read_journal
from cluster.storage import RetryPolicy, Storage, open_storage


@pytest.fixture(params=["local", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path)
    return Storage(fs=pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()), root="runs", is_local=False, uri="mock://bucket/runs")


def names(storage: Storage) -> list[str]:
    return [event["event"] for event in read_journal(storage, "run")]


def test_events_come_back_in_order_with_their_times_and_fields(storage: Storage) -> None:
    ticks = iter([1.5, 2.5, 3.5])
    driver = Journal.open(storage, "run", "driver", lambda: next(ticks))
    coordinator = Journal.open(storage, "run", "coordinator", lambda: next(ticks))
    driver.write("run_started", workers=2)
    coordinator.write("checkpoint_committed", step=5, seconds=0.25)
    driver.write("run_finished")
    assert read_journal(storage, "run") == [
        {"time": 1.5, "event": "run_started", "workers": 2},
        {"time": 2.5, "event": "checkpoint_committed", "step": 5, "seconds": 0.25},
        {"time": 3.5, "event": "run_finished"},
    ]


def test_no_journal_is_no_events(storage: Storage) -> None:
    assert read_journal(storage, "run") == []


def test_a_reopened_journal_goes_on(storage: Storage) -> None:
    Journal.open(storage, "run", "driver").write("one")
    Journal.open(storage, "run", "driver").write("two")
    assert names(storage) == ["one", "two"]


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    script = (
        "import sys; from cluster.journal import Journal; from cluster.storage import open_storage\n"
        "journal = Journal.open(open_storage(sys.argv[1]), 'run', sys.argv[2])\n"
        "for i in range(200): journal.write('tick', writer=sys.argv[2], i=i, padding='x' * 3000)"
    )
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
        for name in ("a", "b", "c")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    events = read_journal(open_storage(tmp_path), "run")
    assert {(event["writer"], event["i"]) for event in events} == {(name, i) for name in "abc" for i in range(200)}
    assert len(events) == 600


def test_a_line_cut_anywhere_by_a_kill_costs_that_line_only(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    journal = Journal.open(storage, "run", "driver")
    journal.write("first")
    journal.write("second", message="half of this is lost")
    path = tmp_path / "run" / "journal.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        assert names(storage) == (["first"] if length < len(whole) - 1 else ["first", "second"])
        Journal.open(storage, "run", "driver").write("third")
        assert names(storage)[0] == "first"
        assert names(storage)[-1] == "third"


def test_a_line_that_another_writer_left_half_written_costs_that_line_only(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    driver = Journal.open(storage, "run", "driver")
    driver.write("first")
    with (tmp_path / "run" / "journal.jsonl").open("a") as file:
        file.write('{"time":2.0,"event":"cut sho')  # the coordinator's, on a disk that was full for a moment
    driver.write("second")
    driver.write("third")
    assert names(storage) == ["first", "second", "third"]


def test_events_of_an_outage_are_written_after_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(storage, "run", "driver")
    journal.write("before")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", fail)
        patch.setattr(Storage, "write_atomic", fail)
        journal.write("during")
        assert names(storage) == ["before"]
    journal.write("after")
    assert journal.flush(10)
    assert names(storage) == ["before", "during", "after"]


def test_a_remote_journal_holds_up_nobody_in_an_outage_and_keeps_the_newest_events(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather(pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()))
    storage = Storage(fs=weather, root="runs", is_local=False, uri="mock://bucket/runs", retry=RetryPolicy(seconds=3600.0))
    monkeypatch.setattr(journal_module, "BACKLOG_EVENTS", 10)
    monkeypatch.setattr(journal_module, "FIRST_PAUSE_SECONDS", 0.01)
    journal = Journal.open(storage, "run", "driver")
    journal.write("before")
    weather.is_down = True
    for number in range(25):
        journal.write("during", number=number)  # would take hours if it retried
    assert not journal.flush(0.05)
    weather.is_down = False
    assert journal.flush(20)
    journal.write("after")
    events = sorted(read_journal(storage, "run"), key=lambda event: event.get("number", -1))
    assert [event["number"] for event in events if event["event"] == "during"] == list(range(15, 25))
    assert [event["count"] for event in events if event["event"] == "events_lost"] == [15]
    assert names(storage)[0] == "before"
    assert names(storage)[-1] == "after"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(fields=st.dictionaries(st.sampled_from(["step", "message", "path", "kind"]), json_values))
def test_any_field_survives(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    storage = open_storage(tmp_path_factory.mktemp("journal"))
    Journal.open(storage, "run", "driver", lambda: 1.0).write("event", **fields)
    assert read_journal(storage, "run") == [{"time": 1.0, "event": "event", **fields}]


def test_nan_becomes_null_so_that_any_reader_can_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    Journal.open(storage, "run", "driver").write("evaluation", test_loss=float("nan"), test_accuracy=0.5)
    (event,) = read_journal(storage, "run")
    assert (event["test_loss"], event["test_accuracy"]) == (None, 0.5)


def test_attempts_count_on_over_drivers(storage: Storage) -> None:
    journal = Journal.open(storage, "run", "driver")
    assert last_attempt(read_journal(storage, "run")) == 0
    for attempt in (1, 3, 2):
        journal.write("attempt_started", attempt=attempt)
    assert last_attempt(read_journal(storage, "run")) == 3
