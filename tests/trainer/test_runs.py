"""The list of runs, and watch. Journals are written by the real writer, metrics are served by the real exporter."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.exporter import serve_metrics, write_file_sd
from cluster.journal import Journal, read_journal
from cluster.metrics import Metrics
from cluster.names import FILE_SD
from cluster.storage import Storage, open_storage
from cluster.store import Store
from trainer.runs import __main__ as runs
from trainer.runs import live, summary
from trainer.runs import status as run_list
from trainer.runs.__main__ import main, table
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.journal_tail import JournalTail
from trainer.runs.progress import describe
from trainer.runs.status import Driver, Plan, RunStatus, alive_or_not, first_members, look, run_folders, statuses
from trainer.runs.watch import RunTracker, Watch, rank_lines, rank_speed
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig, TrainConfig
from trainer.settings.units import percent
from trainer.tasks.info import Measure, TaskInfo

NOW = 1_700_000_000.0  # before the files' own times
PROJECT = Path(__file__).parents[2]


class Maker:
    """A run's folder, event by event, a second apart unless told."""

    def __init__(self, storage: Storage, run: str, *, began: float = NOW - 1000.0) -> None:
        self.storage, self.run, self.now = storage, run, began
        self.journal = Journal.open(storage, run, "driver-1", lambda: self.now)
        config = RunConfig(run=run, train=TrainConfig(epochs=4))
        storage.write_atomic(f"{run}/config.toml", to_toml(config).encode())
        self.folder = RunFolder(storage=storage, name=run)

    def write(self, event: str, *, after: float = 1.0, **fields: Any) -> "Maker":
        self.now += after
        self.journal.write(event, **fields)
        return self

    def start(self, *, workers: int = 2, pid: int = 1, generation: bool = False) -> "Maker":
        self.write("run_started", after=0.0, pid=pid, process_started=self.now - 2, command="python -m trainer.run")
        self.write("attempt_started", attempt=1, workers=workers, start_step=0)
        return self.write("training_started", attempt=1, step=0).write("first_step", attempt=1, step=1)

    def epoch(self, number: int, accuracy: float) -> "Maker":
        self.write("evaluation", step=40 * number, epoch=float(number), test_accuracy=accuracy, test_loss=1.0, train_loss=0.5)
        return self.commit(40 * number)

    def commit(self, step: int) -> "Maker":
        path = f"{self.run}/checkpoints/step-{step:08d}.g0001"
        self.storage.write_atomic(f"{path}/model.safetensors", b"m" * 1000)
        self.storage.write_atomic(f"{path}/COMMIT", b"")
        return self.write("checkpoint_committed", step=step, size_bytes=1000, path=path)

    def end(self, status: str, **fields: Any) -> "Maker":
        return self.write(f"run_{status}", **fields)

    def summarise(self, status: str, **fields: Any) -> "Maker":
        known = {"run": self.run, "status": status, "steps": 160, "epochs": 4.0, "workers": 2, "restarts": 3, "seconds": 90.0}
        known |= {"test_accuracy": 0.884, "images_per_second": 91.5, "goodput": 0.748, **fields}
        self.storage.write_atomic(f"{self.run}/summary.json", json.dumps(known, indent=1).encode())
        return self

    def look(self, *, now: float = NOW, is_live: bool = False) -> RunStatus:
        found = look(self.folder, clock=lambda: now, is_live=is_live)
        assert found is not None
        return found


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "runs")


# --- what a run is at -----------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_what_its_summary_says(storage: Storage) -> None:
    maker = Maker(storage, "pets").start().epoch(1, 0.5).epoch(4, 0.7).end("finished", steps=160).summarise("finished")
    assert maker.look() == RunStatus(
        run="pets",
        status="finished",
        step=160,
        headline=0.884,
        images_per_second=91.5,
        goodput=0.748,
        restarts=3,
        workers=2,
        started=NOW - 1002,
        last_sign=maker.now,
        seconds=90.0,
        checkpoint_step=160,
        checkpoint_bytes=1000,
        plan=Plan(epochs=4, steps_per_epoch=40, batch_size=RunConfig().data.batch_size, total_steps=160),
    )


def test_a_run_that_is_at_work_is_told_by_its_journal(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=NOW - 30).start().epoch(1, 0.5)
    maker.write("attempt_failed", attempt=1, kind="infrastructure", rank=1, message="gone", last_step=41)
    maker.write("attempt_started", attempt=2, workers=3, start_step=40).write("first_step", attempt=2, step=41).commit(60)
    found = maker.look()
    assert (found.status, found.step, found.plan.total_steps, found.headline) == ("running", 60, 160, 0.5)
    assert (found.restarts, found.restarts_are_more, found.workers, found.goodput) == (1, False, 3, None)
    assert found.restarts == summary.restarts(read_journal(storage, "pets"))
    assert found.images_per_second == pytest.approx((60 - 41) * RunConfig().data.batch_size / 1.0)
    assert (found.checkpoint_step, found.checkpoint_bytes) == (60, 1000)
    assert found.seconds == pytest.approx(32.0)  # from its process's start to now


@pytest.mark.parametrize(
    ("event", "fields", "status", "note"),
    [
        ("run_stopped", {"step": 40, "signal": "SIGTERM"}, "stopped", "by SIGTERM"),
        ("run_failed", {"kind": "user", "rank": 1, "message": "ValueError: no\nmore"}, "failed", "user on rank 1: ValueError: no"),
    ],
)
def test_other_ends_are_told_with_their_reason(storage: Storage, event: str, fields: dict[str, Any], status: str, note: str) -> None:
    maker = Maker(storage, "pets").start().epoch(1, 0.5).write(event, **fields).summarise(status, steps=40, epochs=1.0)
    found = maker.look()
    assert (found.status, found.note, found.step, found.plan.total_steps) == (status, note, 40, 160)


def test_a_summary_of_an_earlier_driver_does_not_speak_for_the_one_at_work(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=NOW - 60).start().epoch(1, 0.5).end("stopped", step=40, signal="SIGINT").summarise("stopped")
    assert maker.look().status == "stopped"
    maker.write("run_started", pid=2).write("attempt_started", attempt=2, workers=1, start_step=40)
    found = maker.look()
    assert (found.status, found.workers, found.headline, found.goodput) == ("running", 1, 0.5, None)
    # The same end again, of which no summary could be written: the old one is older than it by far.
    maker.end("stopped", after=1e9, step=80)
    found = maker.look(now=maker.now + 61)
    assert (found.status, found.problems) == ("stopped", ("it has ended and has no summary.json of that",))


def test_an_older_driver_that_was_taken_over_is_no_end(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=NOW - 20).start()
    maker.write("run_started", pid=2).write("attempt_started", attempt=2, workers=1, start_step=0)
    assert maker.write("run_taken_over", by="process 2", generation=1).look().status == "running"


def test_a_run_in_silence_is_not_called_running(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=NOW).start().epoch(1, 0.5)
    assert maker.look(now=maker.now + 599).status == "running"
    found = maker.look(now=maker.now + 601)
    assert found.status == "silent"
    assert found.note.startswith("no sign of life since 2023-11-1")
    # One whose events have always been far apart is given longer.
    maker.write("evaluation", after=500.0, step=80, epoch=2.0, test_accuracy=0.6)
    assert maker.look(now=maker.now + 1490).status == "running"
    assert maker.look(now=maker.now + 1510).status == "silent"


def test_the_time_between_two_drivers_is_no_pause_of_the_run() -> None:
    events = [{"event": "run_started", "time": 0.0}, {"event": "evaluation", "time": 10.0}, {"event": "run_started", "time": 1e6}]
    assert alive_or_not(events, driver=None, is_answering=False, now=1e6 + 700)[0] == "silent"


@pytest.mark.parametrize(
    ("is_alive", "is_answering", "status"),
    [(True, False, "running"), (False, False, "killed"), (None, False, "silent"), (False, True, "running"), (None, True, "running")],
)
def test_a_driver_that_is_seen_decides(is_alive: bool | None, is_answering: bool, status: str) -> None:
    driver = Driver(host="here", pid=7, is_alive=is_alive)
    events = [{"event": "run_started", "time": 0.0}]
    assert alive_or_not(events, driver=driver, is_answering=is_answering, now=1e6)[0] == status


DRIVER = """
import os, sys, time
from cluster.journal import Journal
from cluster.storage import open_storage
from cluster.store import Store
started = time.time()
storage = open_storage(sys.argv[1])
Journal.open(storage, "pets", "driver").write("run_started", pid=os.getpid(), process_started=started)
Store.open(storage, "pets").claim_generation()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_driver_that_was_killed_is_missed_at_once(storage: Storage) -> None:
    process = subprocess.Popen([sys.executable, "-c", DRIVER, storage.uri], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        folder = RunFolder(storage=storage, name="pets")
        in_an_hour = time.time() + 3600
        found = look(folder, clock=lambda: in_an_hour)
        assert found is not None
        assert found.status == "running"  # silent as it is, its process is there
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
        found = look(folder)
        assert found is not None
        assert found.status == "killed"
        assert str(process.pid) in found.note
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    # Another process that has its number, hours later, is not it.
    started = {"time": NOW, "event": "run_started", "pid": os.getpid(), "process_started": time.time() - 9e6}
    Store.open(storage, "pets").claim_generation()
    driver = run_list.find_driver(folder, [started])
    assert driver is not None
    assert driver.is_alive is False


# --- bounded reads --------------------------------------------------------------------------------------------------------------------

_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


@given(whole=st.dictionaries(st.text(max_size=5), _values, min_size=1, max_size=5), indent=st.sampled_from([None, 1]), data=st.data())
def test_the_beginning_of_an_object_gives_its_first_members_and_no_others(whole: Any, indent: int | None, data: st.DataObject) -> None:
    text = json.dumps(whole, indent=indent)
    cut = text[: data.draw(st.integers(0, len(text)))]
    try:
        found = first_members(cut)
    except ValueError:
        found = {}
    assert list(found.items()) == list(whole.items())[: len(found)]
    assert cut != text or found == whole


def test_of_a_huge_summary_only_the_beginning_is_read(storage: Storage) -> None:
    maker = Maker(storage, "pets").start().end("finished").summarise("finished", confusion=[[1] * 300 for _ in range(300)])
    path = Path(storage.at("pets/summary.json"))
    assert path.stat().st_size > 2 * run_list.SUMMARY_BYTES
    path.write_bytes(path.read_bytes()[: 2 * run_list.SUMMARY_BYTES] + b"\xff not JSON")
    assert maker.look().headline == 0.884


def test_of_a_huge_journal_only_the_ends_are_read(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=NOW - 100).start(workers=1).epoch(1, 0.5)
    os.truncate(storage.at("pets/journal.jsonl"), 1 << 40)  # a hole of a terabyte
    maker.write("attempt_started", attempt=7, workers=2, start_step=40).epoch(2, 0.6)
    found = maker.look()
    assert (found.status, found.started, found.workers, found.step, found.headline) == ("running", NOW - 102, 2, 80, 0.6)
    assert (found.restarts, found.restarts_are_more, found.seconds) == (1, True, None)


def test_a_tail_that_is_followed_misses_nothing_and_repeats_nothing(storage: Storage) -> None:
    maker = Maker(storage, "pets").start()
    tail = JournalTail(storage, "pets")
    seen = tail.excerpt(tail_bytes=1 << 20, tail_segments=9).events
    assert tail.follow() == []
    path = storage.at("pets/journal.jsonl")
    for number in range(1, 4):
        maker.commit(number)
        with open(path, "rb+") as file:  # another writer is in the middle of a line
            line = file.read().splitlines(keepends=True)[-1]
            os.truncate(path, file.tell() - len(line) // 2)
        seen += tail.follow()
        with open(path, "ab") as file:
            file.write(line[-(len(line) // 2) :])
        seen += tail.follow()
    assert seen == read_journal(storage, "pets")
    assert len(seen) == 7


# --- what is damaged ------------------------------------------------------------------------------------------------------------------


def _spoil(name: str, data: bytes) -> Callable[[Maker], None]:
    return lambda maker: maker.storage.write_atomic(f"{maker.run}/{name}", data)


def _journal_is_a_folder(maker: Maker) -> None:
    os.unlink(maker.storage.at("pets/journal.jsonl"))
    os.mkdir(maker.storage.at("pets/journal.jsonl"))


@pytest.mark.parametrize(
    ("damage", "status", "problem"),
    [
        (_spoil("summary.json", b'{"status": "fini'), "finished", "summary.json cannot be read: "),
        (_spoil("summary.json", b"[]"), "finished", "summary.json cannot be read: it is not a JSON object"),
        (_spoil("config.toml", b"epochs = = 3"), "finished", "config.toml cannot be read: "),
        (
            _spoil("journal.jsonl", b'\x00\xff{"time": 1}\n[]\n{"event": "x", "time": NaN}'),
            "finished",
            "its journal does not hold the start",
        ),
        (
            _spoil("journal.jsonl", b'{"event": "run_started", "time": 1, "process_started": "x"}'),
            "unknown",
            "it cannot be made sense of: ",
        ),
        (lambda maker: maker.storage.delete_file("pets/journal.jsonl"), "finished", "it has no journal"),
        (_journal_is_a_folder, "finished", "its journal cannot be read: Is a directory"),
        (lambda maker: maker.storage.delete_dir("pets/checkpoints"), "finished", "its checkpoints are gone, or set aside as damaged"),
        (lambda maker: maker.storage.delete_file("pets/summary.json"), "finished", "it has ended and has no summary.json of that"),
    ],
)
def test_a_damaged_run_is_listed_with_what_is_wrong(
    storage: Storage, damage: Callable[[Maker], None], status: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Maker(storage, "pets").start().epoch(4, 0.7).end("finished", steps=160).summarise("finished")
    Maker(storage, "sound").start().end("finished").summarise("finished")
    damage(maker)
    found = maker.look()
    assert found.status == status
    assert any(said.startswith(problem) for said in found.problems), found.problems
    assert main(["--storage", storage.uri]) == 0
    said = capsys.readouterr().out
    assert f"  {problem}" in said
    assert "sound" in said


def test_folders_that_are_no_runs_are_not_listed(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    Maker(storage, "pets").start()
    storage.write_atomic("data/images.parquet", b"")
    storage.write_atomic(".hidden/journal.jsonl", b"")
    storage.write_atomic("notes.txt", b"")
    assert main(["--storage", storage.uri, "--json"]) == 0
    assert [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()] == ["pets"]


# --- the command ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(storage: Storage) -> Storage:
    Maker(storage, "pets-a", began=NOW).start().end("finished").summarise("finished", test_accuracy=0.7, restarts=0)
    Maker(storage, "pets-b", began=NOW + 9).start().end("failed", kind="data", message="too many").summarise("failed", goodput=0.9)
    Maker(storage, "cars", began=NOW + 5).start().end("finished").summarise("finished", test_accuracy=0.8, restarts=12)
    return storage


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["pets-b", "cars", "pets-a"]),
        (["--sort", "name"], ["cars", "pets-a", "pets-b"]),
        (["--sort", "accuracy"], ["pets-b", "cars", "pets-a"]),
        (["--sort", "goodput"], ["pets-b", "cars", "pets-a"]),
        (["--sort", "restarts"], ["cars", "pets-b", "pets-a"]),
        (["--sort", "status"], ["pets-b", "cars", "pets-a"]),
        (["pets"], ["pets-b", "pets-a"]),
        (["*s-?"], ["pets-b", "pets-a"]),
        (["c*"], ["cars"]),
        (["s"], ["pets-b", "cars", "pets-a"]),
    ],
)
def test_the_list_is_sorted_and_chosen_as_asked(
    three: Storage, capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    assert main(["--storage", three.uri, "--json", *arguments]) == 0
    assert [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()] == names
    assert main(["--storage", three.uri, *arguments]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["run", "status"]
    assert [line.split()[0] for line in lines if not line.startswith("  ")] == names


def test_an_unknown_sort_key_and_an_unknown_scheme_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--sort", "loss"], "goodput"), (["--storage", "ftp://me:secret@host/runs"], "unknown scheme 'ftp'")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        assert said in errors
        assert "secret" not in errors


def test_where_there_is_nothing_to_list_it_says_so(three: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "empty", tmp_path / "not" / "there"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["--storage", str(folder)]) == 0
        assert capsys.readouterr().out.startswith(f"no runs in {folder}; `python -m trainer.run` starts one")
        assert main(["--storage", str(folder), "--json"]) == 0
        assert capsys.readouterr().out == ""
    assert main(["--storage", three.uri, "dogs"]) == 0
    assert capsys.readouterr().out == f"no run in {three.uri} has a name like 'dogs'\n"


RUNS = [
    RunStatus(
        run="a" * 30, status="finished", step=123456, plan=Plan(total_steps=123456), headline=0.9, images_per_second=12345.0, goodput=0.9
    ),
    RunStatus(run="b", status="silent", note="no sign of life since long ago, " * 5, restarts=2, restarts_are_more=True, started=NOW - 90),
    RunStatus(run="evil\x1b[2J\tname", status="unknown", problems=("it has\nno journal",)),
]


def test_runs_of_other_tasks_go_by_their_own_measures(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    error = TaskInfo(
        name="age", unit="texts", measures=(Measure(name="mae", title="MAE", unit="number", higher_is_better=False),), panels=()
    )
    Maker(storage, "plain").start().end("finished").summarise("finished")
    for name, value in (("good", 1.5), ("bad", 30.0)):
        Maker(storage, name).start().end("finished").summarise("finished", test_accuracy=None, test_mae=value, task=error.to_json())
    going = Maker(storage, "going", began=time.time() - 60)
    going.write("run_started", task=error.to_json()).write("evaluation", step=40, epoch=1.0, test_mae=7.25)
    assert main(["--storage", storage.uri, "--json", "--sort", "accuracy"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(run["run"], run["task"], run["headline_name"], run["headline"], run["test_accuracy"]) for run in said]
    assert found == [
        ("plain", "classification", "accuracy", 0.884, 0.884),
        ("good", "age", "mae", 1.5, None),
        ("going", "age", "mae", 7.25, None),
        ("bad", "age", "mae", 30.0, None),
    ]
    assert main(["--storage", storage.uri]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[3:5] == ["test", "samples/s"]
    assert {line.split()[0]: " ".join(line.split()[3:6]) for line in lines if line.split()[1] == "finished"} == {
        "plain": "88.4 % Accuracy",
        "good": "1.5 MAE 92",
        "bad": "30 MAE 92",
    }


def test_a_task_that_cannot_be_read_is_a_problem_of_its_run(storage: Storage) -> None:
    found = Maker(storage, "odd").start().end("finished").summarise("finished", task={"name": "odd"}).look()
    assert (found.status, found.headline) == ("finished", 0.884)
    assert [problem.startswith("its task cannot be read: ") for problem in found.problems] == [True]


@given(width=st.integers(30, 200))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = [line.plain for line in table(RUNS, width=width, now=NOW)]
    assert max(map(len, lines)) <= width
    for line in lines[1:]:
        assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_eighty_columns_hold_what_matters_most_and_a_file_everything() -> None:
    narrow = [line.plain for line in table(RUNS, width=80, now=NOW)]
    assert narrow[0].split() == ["run", "status", "step", "accuracy", "images/s", "goodput", "restarts"]
    wide = [line.plain for line in table(RUNS, width=None, now=NOW)]
    assert wide[0].split() == [*narrow[0].split(), "workers", "started", "age", "took", "saved", "at", "step"]
    assert RUNS[1].note in wide[3]
    heading, first, second = wide[0], wide[1], wide[2]
    assert first.split()[:4] == ["a" * 30, "finished", "123,456/123,456", "90.0"]
    ends = [heading.index(f" {name}") + len(name) + 1 for name in ("goodput", "restarts", "age")]
    assert [first[:end].split()[-1] for end in ends[:1]] == ["%"]
    assert second[: ends[1]].endswith(" 2+")
    assert second[: ends[2]].endswith(" 1 min")


def test_colours_are_for_terminals_that_want_them(three: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(**options: Any) -> str:
        out = io.StringIO()
        console = Console(file=out, width=80, highlight=False, **options)
        for line in table([RUNS[0]], width=80, now=NOW):
            console.print(line, soft_wrap=True)
        return out.getvalue()

    assert "\x1b[34mfinished" in shown(force_terminal=True, color_system="standard")
    assert "\x1b" not in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[34m" not in shown(force_terminal=True, color_system="standard")


def test_a_reader_that_has_seen_enough_is_no_error(three: Storage) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trainer.runs", "--storage", three.uri, "--json"]
    done = subprocess.run(command, cwd=PROJECT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "ray", "matplotlib", "torchvision"}
    code = f"import sys, trainer.runs.__main__, trainer.runs.watch; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_other_commands_find_runs_through_it_as_before(three: Storage) -> None:
    assert runs.find_run is find_run
    assert find_run("cars", three.uri) == RunFolder(storage=three, name="cars")
    assert [folder.name for folder in run_folders(three, "pets")] == ["pets-a", "pets-b"]


# --- live figures ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(storage: Storage) -> Iterator[tuple[Maker, list[Metrics]]]:
    """A run with two ranks and a coordinator that serve their metrics."""
    maker = Maker(storage, "pets", began=time.time() - 5).start().epoch(1, 0.5)
    metrics = [Metrics("pets", rank, 1) for rank in (0, 1)]
    coordinator = Metrics("pets", "coordinator", 0, owner="coordinator")
    servers = [serve_metrics(each.registry) for each in (*metrics, coordinator)]
    try:
        host = os.uname().nodename
        for rank in (0, 1):
            address = servers[rank].address
            maker.write("worker_registered", attempt=1, rank=rank, host=host, metrics_address=address)
        target = {"targets": [servers[2].address], "labels": {"run": "pets", "rank": "coordinator", "attempt": "0"}}
        write_file_sd(storage.at(f"pets/{FILE_SD}"), [target])
        coordinator.set("goodput_ratio", 0.75)
        for rank, each in enumerate(metrics):
            each.set("start_time_seconds", 1.0)
            each.set("step", 47)
            each.set("epoch", 47 / 40)
            each.set("loss", 1.5)
            each.set("images_per_second", 100.0 + rank)
        yield maker, metrics
    finally:
        for server in servers:
            server.close()


def test_a_run_that_answers_gives_its_figures_of_now(served: tuple[Maker, list[Metrics]]) -> None:
    maker, _ = served
    in_a_day = maker.now + 86400
    found = maker.look(now=in_a_day, is_live=True)
    assert (found.status, found.note, found.step, found.plan.total_steps, found.goodput) == ("running", "", 47, 160, 0.75)
    assert (found.images_per_second, found.last_sign) == (201.0, in_a_day)
    assert maker.look(now=in_a_day, is_live=False).status == "silent"


def test_who_answers_for_another_run_is_not_believed(served: tuple[Maker, list[Metrics]]) -> None:
    maker, _ = served
    address = live.rank_places(read_journal(maker.storage, "pets"))[0].address
    assert live.ask(address, "pets") is not None
    assert live.ask(address, "cars") is None
    assert live.ask("127.0.0.1:1", "pets") is None
    assert live.ask("nonsense", "pets") is None


def test_another_machines_loopback_is_not_asked() -> None:
    registered = {"time": 1.0, "event": "worker_registered", "attempt": 1, "rank": 0, "host": "elsewhere"}
    events = [{"time": 0.0, "event": "attempt_started", "attempt": 1}]
    assert live.rank_places([*events, registered | {"metrics_address": "127.0.0.1:99"}]) == []
    assert live.rank_places([*events, registered | {"metrics_address": "10.0.0.7:99"}]) == [live.Place(rank=0, address="10.0.0.7:99")]
    assert live.rank_places([*events, registered | {"metrics_address": "10.0.0.7:99"}, {**events[0], "attempt": 2}]) == []


def test_a_ranks_own_time_leaves_out_its_waiting_for_others() -> None:
    before = {"start_time_seconds": 1.0, "steps_total": 10.0, "step_seconds_sum": 2.0, "reduce_seconds_total": 1.0}
    now = {
        "start_time_seconds": 1.0,
        "steps_total": 14.0,
        "step_seconds_sum": 3.0,
        "reduce_seconds_total": 1.5,
        "data_wait_seconds_total": 0.2,
    }
    speed = rank_speed(3, before, now)
    assert speed is not None
    assert (speed.rank, speed.own_seconds, speed.data_wait_ratio, speed.others_wait_ratio) == (3, 0.125, 0.2, 0.5)
    assert rank_speed(3, {}, now) is None
    assert rank_speed(3, {}, {"steps_total": 1.0, "step_seconds_sum": 1.0}) is None
    assert rank_speed(3, now, now) is None
    assert rank_speed(3, before | {"start_time_seconds": 0.5}, now) is None


def test_of_many_ranks_the_slowest_are_shown_and_called_slow() -> None:
    before = {"start_time_seconds": 1.0}
    ranks = []
    for rank in range(100):
        now = before | {"steps_total": 10.0, "step_seconds_sum": 5.0 if rank == 57 else 1.0 + rank / 1000}
        ranks.append(speed := rank_speed(rank, before, now))
        assert speed is not None
    lines = rank_lines([rank for rank in ranks if rank])
    assert len(lines) == 9
    assert [line.split()[1] for line in lines[:8]] == ["57:", "93:", "94:", "95:", "96:", "97:", "98:", "99:"]
    assert [line.split()[1] for line in lines if line.endswith("SLOW")] == ["57:"]
    assert lines[0].startswith("rank 57: 500.0 ms of its own a step, ")
    assert lines[8].startswith("the slowest of 100 ranks")


# --- watch ----------------------------------------------------------------------------------------------------------------------------


class Script:
    """Stands for the passing of time: at each pause the next thing happens to the run."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self._acts = list(acts)

    def sleep(self, seconds: float) -> None:
        assert self._acts, "it goes on watching after the last act"
        self._acts.pop(0)()


def watched(folder: RunFolder, *acts: Callable[[], object], is_live: bool = False, **console: Any) -> tuple[int, str]:
    out = io.StringIO()
    watch = Watch(folder, console=Console(file=out, width=200, highlight=False, **console), is_live=is_live, sleep=Script(*acts).sleep)
    return watch.follow(), out.getvalue()


def test_watch_tells_what_happens_as_it_happens_and_ends_with_the_run(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=time.time() - 60).start()

    def fail() -> None:
        maker.write("attempt_failed", attempt=1, kind="infrastructure", rank=1, message="killed by signal 9", last_step=44, lost_steps=4)
        maker.write("attempt_started", attempt=2, workers=2, start_step=40).write("training_started", attempt=2, step=40)

    status, said = watched(
        maker.folder,
        lambda: maker.epoch(1, 0.5),
        fail,
        lambda: maker.write("straggler", rank=1, step=50, own_seconds=0.2, others_seconds=0.1),
        lambda: maker.epoch(4, 0.75),
        lambda: maker.summarise("finished").end("finished", steps=160).summarise("finished"),
    )
    assert status == 0
    lines = [line.split("  ", 1)[1] for line in said.splitlines() if line[:2].isdigit()]
    assert lines == [
        "started: python -m trainer.run",
        "attempt 1: 2 workers, from step 0",
        "training from step 0",
        "step 40: test accuracy 50.0 %, loss 1.0000",
        "step 40: checkpoint saved (1 kB)",
        "attempt 1 failed on rank 1 at step 44 (infrastructure): killed by signal 9; 4 steps lost",
        "attempt 2: 2 workers, from step 40",
        "training from step 40",
        "step 50: rank 1 is slow, 0.2 s a step of its own; the others 0.1 s",
        "step 160: test accuracy 75.0 %, loss 1.0000",
        "step 160: checkpoint saved (1 kB)",
        "finished after 160 steps",
    ]
    assert "pets: training  epoch 2/4  step 40/160  loss 0.5000  test 50.0 %" in said
    assert percent(0.884, 2) in said  # the driver's own table, from the summary


def test_watch_speaks_of_the_runs_own_task(storage: Storage) -> None:
    task = TaskInfo(name="tags", unit="texts", measures=(Measure(name="map", title="mAP"), Measure(name="f1", title="F1")), panels=())
    maker = Maker(storage, "tags", began=NOW - 60).write("run_started", task=task.to_json())
    maker.write("attempt_started", attempt=1, workers=1, start_step=0).write("training_started", attempt=1, step=0)
    maker.write("evaluation", step=40, epoch=1.0, test_map=0.5, test_f1=0.25, test_loss=1.0)
    tracker = RunTracker("tags")
    lines = [tracker.take(event).partition("  ")[2] for event in read_journal(storage, "tags")]
    assert lines[-1] == "step 40: test mAP 50.0 %, test F1 25.0 %, loss 1.0000"
    line = describe(tracker.state(NOW, maker.look(), {0: {"step": 41.0, "images_per_second": 80.0}}))
    assert line.startswith("tags: training  epoch 2/4  step 41/160")
    assert line.endswith("test mAP 50.0 %  80 texts/s")


def test_the_time_left_is_the_runs_own_measure_whatever_batch_its_settings_name(storage: Storage) -> None:
    """65 images in batches of 32, spread: 2 steps of 21.7 images on average. By the batch the run would need half as long again."""
    maker = Maker(storage, "tags", began=NOW - 60).write("run_started")
    maker.write("attempt_started", attempt=1, workers=2, start_step=0).write("training_started", attempt=1, step=0)
    tracker = RunTracker("tags")
    for event in read_journal(storage, "tags"):
        tracker.take(event)
    status = replace(maker.look(), plan=Plan(batch_size=32, steps_per_epoch=3, total_steps=150, epochs=50))
    half = {"step": 60.0, "images_per_second": 65 / 6, "steps_total": 60.0, "samples_total": 60 * 65 / 6}  # a step a second
    assert tracker.state(NOW, status, {0: half, 1: half}).remaining_seconds == pytest.approx(90.0)
    longer = half | {"planned_steps": 160.0}
    assert tracker.state(NOW, status, {0: longer, 1: half}).remaining_seconds == pytest.approx(100.0), "the ranks know the steps best"
    unknown = replace(status, plan=replace(status.plan, batch_size=None))
    assert tracker.state(NOW, unknown, {0: half}).remaining_seconds == pytest.approx(90.0)


def test_where_no_rank_answers_the_time_left_follows_from_the_journal(storage: Storage) -> None:
    tracker = RunTracker("tags")
    status = RunStatus(run="tags", status="running", plan=Plan(batch_size=32, total_steps=100))

    def take(event: str, at: float, **fields: int) -> None:
        tracker.take({"event": event, "time": NOW + at, **fields})

    take("run_started", 0)
    take("attempt_started", 1, attempt=1, workers=2, start_step=0)
    take("training_started", 5, attempt=1)
    take("first_step", 10, step=1)
    assert tracker.state(NOW + 10, status, {}).remaining_seconds is None
    take("checkpoint_committed", 30, step=11)
    assert tracker.state(NOW + 30, status, {}).remaining_seconds == pytest.approx(178.0)
    assert tracker.state(NOW + 48, status, {}).remaining_seconds == pytest.approx(160.0)
    assert tracker.state(NOW + 300, status, {}).remaining_seconds is None, "late by its own pace: nothing can be said"
    take("attempt_failed", 300)
    assert tracker.state(NOW + 301, status, {}).remaining_seconds is None


@pytest.mark.parametrize(("end", "status"), [("failed", 1), ("stopped", 3)])
def test_the_exit_status_is_the_runs(storage: Storage, end: str, status: int) -> None:
    maker = Maker(storage, "pets", began=time.time() - 60).start()
    assert watched(maker.folder, lambda: maker.summarise(end).end(end, kind="user", message="no", step=1))[0] == status
    assert watched(maker.folder)[0] == status  # of a run that is over already, at once


def test_a_run_whose_driver_is_gone_ends_the_watch(storage: Storage) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    maker = Maker(storage, "pets", began=time.time() - 60).start(pid=gone.pid)
    claim = {"token": "", "host": os.uname().nodename, "pid": gone.pid}
    storage.write_atomic("pets/generations/g0001", json.dumps(claim).encode())
    status, said = watched(maker.folder)
    assert status == 4
    assert f"pets: killed: its driver, process {gone.pid} of this machine, is gone" in said
    # The same, but its end was written between the look at the journal and the look at the process.
    assert watched(maker.summarise("finished").end("finished", steps=1).folder)[0] == 0


def test_watch_outlives_an_outage_of_the_storage(storage: Storage) -> None:
    maker = Maker(storage, "pets", began=time.time() - 60).start()
    path = Path(storage.at("pets/journal.jsonl"))

    def outage() -> None:
        path.rename(path.with_suffix(".away"))
        path.mkdir()

    def end_of_outage() -> None:
        path.rmdir()
        path.with_suffix(".away").rename(path)
        maker.summarise("stopped").end("stopped", step=1)

    status, said = watched(maker.folder, outage, lambda: None, end_of_outage)
    assert status == 3
    assert said.count("the storage does not answer") == 1
    assert "the storage answers again" in said


def test_watch_shows_the_ranks_where_they_answer(served: tuple[Maker, list[Metrics]]) -> None:
    maker, metrics = served

    def step() -> None:
        for rank, each in enumerate(metrics):
            each.add("steps_total")
            each.observe("step_seconds", 0.3)
            each.add("reduce_seconds_total", 0.2 * (1 - rank))
            each.set("step", 48)

    end = Maker.end
    status, said = watched(
        maker.folder, step, lambda: maker.summarise("stopped") and end(maker, "stopped", step=48), is_live=True, force_terminal=True
    )
    assert status == 3
    assert "step 47/160" in said
    assert "step 48/160" in said
    assert "loss 1.5000" in said
    assert "201 images/s" in said
    assert "rank 0: 100.0 ms of its own a step, waits 0 % for data, 67 % for others" in said
    assert "rank 1: 300.0 ms of its own a step, waits 0 % for data, 0 % for others  SLOW" in said


def test_restarts_are_counted_as_in_the_summary(storage: Storage) -> None:
    maker = Maker(storage, "pets").start()
    story = RunTracker("pets")
    for attempt, before in enumerate(("attempt_failed", "attempt_paused", "attempt_failed", "run_started", "attempt_failed"), 2):
        if before == "run_started":
            maker.end("stopped")
        maker.write(before, attempt=attempt - 1, kind="x", reason="y", message="z")
        maker.write("attempt_started", attempt=attempt, workers=2, start_step=0)
    events = read_journal(storage, "pets")
    for event in events:
        story.take(event)
    assert story.restarts == summary.restarts(events) == 3


@given(fields=st.dictionaries(st.sampled_from(["step", "seconds", "ranks", "own_seconds", "message", "test_loss"]), _values))
@pytest.mark.parametrize(
    "name", ["evaluation", "straggler", "hang", "attempt_started", "checkpoint_committed", "attempt_failed", "new_kind"]
)
def test_an_event_of_any_shape_is_shown_on_one_line(name: str, fields: dict[str, Any]) -> None:
    line = RunTracker("pets").take({"time": NOW, "event": name, **fields})
    assert line
    assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_ctrl_c_leaves_the_run_alone(storage: Storage) -> None:
    Maker(storage, "pets", began=time.time() - 60).start()
    before = Path(storage.at("pets/journal.jsonl")).read_bytes()
    command = [sys.executable, "-u", "-m", "trainer.runs", "watch", "--storage", storage.uri]  # the only one that runs
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "started: python -m trainer.run" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "no longer watching pets, which is left as it is\n"
    assert Path(storage.at("pets/journal.jsonl")).read_bytes() == before


def test_watch_needs_a_run(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    Maker(storage, "pets").start().end("finished")
    for arguments, said in (
        ([], "is running; name one"),
        (["petz"], "did you mean pets?"),
        (["pets", "--every", "-1"], "--every -1 is not"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["watch", "--storage", storage.uri, *arguments])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


# --- an object store ------------------------------------------------------------------------------------------------------------------


def test_runs_on_an_object_store_are_listed_and_watched(capsys: pytest.CaptureFixture[str]) -> None:
    s3 = pytest.importorskip("tests.s3")
    with s3.serving(s3.Server()) as server:
        server.client().create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        storage = open_storage(server.uri("bucket/runs"))
        Maker(storage, "done").start().epoch(4, 0.7).end("finished", steps=160).summarise("finished")
        maker = Maker(storage, "live", began=time.time() - 60).start().epoch(1, 0.5)
        assert main(["--storage", storage.uri, "--json"]) == 0
        found = {said["run"]: said for said in map(json.loads, capsys.readouterr().out.splitlines())}
        assert (found["done"]["status"], found["done"]["test_accuracy"], found["done"]["restarts"]) == ("finished", 0.884, 3)
        assert (found["live"]["status"], found["live"]["step"], found["live"]["checkpoint_step"]) == ("running", 40, 40)
        assert found["live"]["started"] == pytest.approx(maker.now - 7, abs=3)
        for step in range(41, 100):
            maker.write("note", step=step)
        again = look(maker.folder)
        assert again is not None
        assert (again.restarts, again.restarts_are_more, again.workers) == (0, True, 2)
        status, said = watched(
            maker.folder, lambda: maker.epoch(2, 0.6), lambda: None, lambda: maker.summarise("stopped").end("stopped", step=80)
        )
        assert status == 3
        assert said.count("step 80: test accuracy 60.0 %") == 1
        assert said.count("note: step=99") == 1
        assert [status.run for status in statuses(run_folders(storage, "do"))] == ["done"]
