"""The journal: nothing that was written is lost, by many writers, after a kill in mid-line, through an outage."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from benchmarks.faults.storage import Weather
from cluster import journal as journal_module
from cluster.journal import Event, Journal, JournalReader, in_order, last_attempt, read_journal
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


def test_an_event_holds_up_nobody_for_longer_than_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is silent fails no call for long seconds. Nor does it hold up a driver's loop."""
    monkeypatch.setattr(journal_module, "PROMPT_SECONDS", 0.05)
    answers = threading.Event()
    append = Journal._append
    monkeypatch.setattr(Journal, "_append", lambda journal, line: answers.wait(30) and append(journal, line))
    journal = Journal.open(open_storage(tmp_path), "run", "driver")
    began = time.monotonic()
    for number in range(20):
        journal.write("during", number=number)
    assert time.monotonic() - began < 5
    assert not journal.flush(0.0)
    answers.set()
    assert journal.flush(20)
    assert [event["number"] for event in read_journal(open_storage(tmp_path), "run")] == list(range(20))


def test_a_journal_of_a_storage_that_is_away_opens_and_has_its_events_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "FIRST_PAUSE_SECONDS", 0.01)
    weather = Weather(pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()))
    storage = Storage(fs=weather, root="runs", is_local=False, uri="mock://bucket/runs")
    Journal.open(storage, "run", "driver").write("before")
    weather.is_down = True
    journal = Journal.open(storage, "run", "driver")
    journal.write("during")
    weather.is_down = False
    assert journal.flush(20)
    assert names(storage) == ["before", "during"]


# Reading again and again


class Requests(Weather):
    """Counts the calls that are requests to an object store."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name not in ("get_file_info", "open_input_stream"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return found(*args, **kwargs)

        return call

    def taken(self) -> tuple[int, int]:
        """Listings and reads since the last call."""
        calls, self.calls = self.calls, []
        return calls.count("get_file_info"), calls.count("open_input_stream")


def test_a_remote_journal_is_read_with_one_listing_and_one_read_for_each_new_event() -> None:
    requests = Requests(pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()))
    storage = Storage(fs=requests, root="runs", is_local=False, uri="mock://bucket/runs")
    journal, reader = Journal.open(storage, "run", "driver"), JournalReader(storage, "run")
    for number in range(50):
        journal.write("tick", number=number)
    requests.taken()
    assert len(reader.read()) == 50
    assert requests.taken() == (1, 51)  # and once the file of a run that began on a disk
    assert len(reader.read()) == 50
    assert requests.taken() == (1, 0)
    for number in range(50, 53):
        journal.write("tick", number=number)
    requests.taken()
    assert [event["number"] for event in reader.read()] == list(range(53))
    assert requests.taken() == (1, 3)
    assert reader.known == read_journal(storage, "run")


def test_an_outage_in_the_middle_of_reading_loses_nothing_that_was_read() -> None:
    requests = Requests(pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()))
    storage = Storage(fs=requests, root="runs", is_local=False, uri="mock://bucket/runs")
    journal, reader = Journal.open(storage, "run", "driver"), JournalReader(storage, "run")
    for number in range(60):
        journal.write("tick", number=number)
    read, count = storage.fs.open_input_stream, itertools.count()

    def breaks(*args: Any, **kwargs: Any) -> Any:
        requests.is_down = next(count) > 30
        return read(*args, **kwargs)

    requests.__dict__["open_input_stream"] = breaks
    with pytest.raises(OSError, match="did not answer"):
        reader.read()
    assert reader.known == []
    del requests.__dict__["open_input_stream"]
    requests.is_down = False
    requests.taken()
    assert len(reader.read()) == 60
    assert requests.taken()[1] < 40


@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_a_growing_file_is_read_as_it_is_wherever_it_is_looked_at(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    storage = open_storage(tmp_path_factory.mktemp("journal"))
    whole = b"".join(json.dumps({"time": n, "event": "größe", "n": n}, ensure_ascii=False).encode() + b"\n" for n in range(8))
    path = Path(storage.at("run")) / "journal.jsonl"
    path.parent.mkdir()
    reader = JournalReader(storage, "run")
    assert reader.read() == []
    for cut in sorted(cuts):
        with path.open("ab") as file:
            file.write(whole[file.tell() : cut])
        assert reader.read() == read_journal(storage, "run")
    path.write_bytes(whole)
    assert [event["n"] for event in reader.read()] == list(range(8))


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    journal = Journal.open(storage, "run", "driver")
    reader = JournalReader(storage, "run")
    for name in ("one", "two", "three"):
        journal.write(name)
    assert [event["event"] for event in reader.read()] == ["one", "two", "three"]
    path = tmp_path / "run" / "journal.jsonl"
    first = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(first)
    assert [event["event"] for event in reader.read()] == ["one"]
    (tmp_path / "other").write_bytes(first * 5)
    os.replace(tmp_path / "other", path)
    assert [event["event"] for event in reader.read()] == ["one"] * 5
    path.unlink()
    assert reader.read() == []


def test_a_run_that_was_copied_to_another_kind_of_storage_keeps_its_history_in_order(tmp_path: Path) -> None:
    local, remote = open_storage(tmp_path), Storage(fs=pafs._MockFileSystem(), root="runs", is_local=False, uri="mock://runs")
    Journal.open(local, "run", "driver-1", lambda: 900.0).write("attempt_started", attempt=1, generation=1)
    remote.write_atomic("run/journal.jsonl", local.read("run/journal.jsonl"))
    Journal.open(remote, "run", "driver-2", lambda: 100.0).write("attempt_started", attempt=2, generation=2)
    assert [event["attempt"] for event in read_journal(remote, "run")] == [1, 2]
    for entry in remote.list("run/journal"):
        local.write_atomic(f"run/journal/{entry.name}", remote.read(f"run/journal/{entry.name}"))
    Path(local.at("run/journal.jsonl")).unlink()
    Journal.open(local, "run", "driver-3", lambda: 50.0).write("attempt_started", attempt=3, generation=3)
    assert [event["attempt"] for event in read_journal(local, "run")] == [2, 3]


# The order of events, whatever the clocks say


def test_a_clock_that_was_set_back_between_two_attempts_does_not_turn_them_round(storage: Storage) -> None:
    times = iter([1000.0, 1001.0, 1002.0, 400.0, 401.0, 402.0])
    driver = Journal.open(storage, "run", "driver-7-1000", lambda: next(times))
    coordinator = Journal.open(storage, "run", "coordinator-g0001", lambda: next(times))
    driver.write("run_started")
    coordinator.write("attempt_started", attempt=1, generation=1)
    coordinator.write("attempt_failed", attempt=1)
    coordinator.write("attempt_started", attempt=2, generation=1)
    coordinator.write("checkpoint_committed", attempt=2)
    driver.write("run_finished")
    told = names(storage)
    assert told == ["run_started", "attempt_started", "attempt_failed", "attempt_started", "checkpoint_committed", "run_finished"]
    assert [event["attempt"] for event in read_journal(storage, "run") if "attempt" in event] == [1, 1, 2, 2]


def test_a_run_that_ended_under_the_right_clock_has_ended_though_it_was_begun_three_hours_ahead(storage: Storage) -> None:
    for generation, now in ((1, 20_000.0), (2, 9_500.0)):
        times = itertools.count(now)
        clock: Callable[[], float] = lambda times=times: float(next(times))  # type: ignore[misc]  # noqa: E731
        driver = Journal.open(storage, "run", f"driver-{generation}-{now:.0f}", clock)
        driver.write("run_started")
        Journal.open(storage, "run", f"coordinator-g{generation:04d}", clock).write(
            "attempt_started", attempt=generation, generation=generation
        )
        if generation == 2:
            driver.write("run_finished")
    assert names(storage) == ["run_started", "attempt_started", "run_started", "attempt_started", "run_finished"]


WHO = st.lists(st.tuples(st.sampled_from(["driver", "coordinator"]), st.floats(0, 1e9)), min_size=1, max_size=12)


def told_by(drivers: list[list[tuple[str, float]]], up: bool) -> tuple[list[tuple[str, Event]], list[int]]:
    """A journal's objects, of one driver after the other with its coordinator, under wall clocks that say anything; and the true order."""
    objects, true, counts = [], itertools.count(), itertools.count(1)
    for generation, events in enumerate(drivers, 1):
        numbers = {"driver": itertools.count(1), "coordinator": itertools.count(1)}
        for index, (who, clock) in enumerate(events):
            name = f"driver-{generation}-{generation}" if who == "driver" else f"coordinator-g{generation:04d}"
            event: Event = {"time": clock, "event": "e", "true": next(true), "generation": generation}
            event |= {"attempt": next(counts)} if who == "coordinator" else {}
            event |= {"up": 1000.0 / generation + index} if up else {}  # each on a host of its own
            objects.append((f"{name}-{next(numbers[who]):06d}.json", event))
    return objects, list(range(next(true)))


@given(drivers=st.lists(WHO, max_size=4), data=st.data())
def test_events_are_in_the_order_in_which_they_happened_whatever_the_wall_clocks_said(
    drivers: list[list[tuple[str, float]]], data: st.DataObject
) -> None:
    objects, true = told_by(drivers, up=True)
    ordered = in_order(data.draw(st.permutations(objects)))
    assert [event["true"] for event in ordered] == true
    assert all("up" not in event for event in ordered)


@given(drivers=st.lists(WHO, max_size=4), data=st.data())
def test_journals_of_older_releases_keep_the_order_of_attempts_and_of_each_writer(
    drivers: list[list[tuple[str, float]]], data: st.DataObject
) -> None:
    objects, true = told_by(drivers, up=False)
    ordered = in_order(data.draw(st.permutations(objects)))
    assert sorted(event["true"] for event in ordered) == true
    attempts = [event["attempt"] for event in ordered if "attempt" in event]
    assert attempts == sorted(attempts)
    assert [event["generation"] for event in ordered] == sorted(event["generation"] for event in ordered)
    for writer in {name[:-12] for name, _ in objects}:
        own = [event["true"] for name, event in objects if name[:-12] == writer]
        assert [event["true"] for event in ordered if event["true"] in own] == own


@given(times=st.lists(st.floats(0, 1e9), unique=True, min_size=4, max_size=12).map(sorted))
def test_journals_of_older_releases_under_a_right_clock_are_in_the_order_of_time(times: list[float]) -> None:
    half = len(times) // 2
    objects = []
    for generation, own in ((1, times[:half]), (2, times[half:])):
        for number, now in enumerate(own):
            writer = f"driver-{generation}-1" if number % 2 == 0 else f"coordinator-g{generation:04d}"
            objects.append((f"{writer}-{number // 2 + 1:06d}.json", {"time": now, "event": "e"}))
    assert [event["time"] for event in in_order(reversed(objects))] == times
