"""Trackers have what the run has, each point once, whatever is killed or away in between; the run's folder is the only source."""

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboardX.proto import event_pb2

from cluster.storage import open_storage
from trainer.runs.folder import RunFolder
from trainer.track import follow as follow_module
from trainer.track.__main__ import main
from trainer.track.follow import Follower
from trainer.track.mlflow import MLflow, as_json, named
from trainer.track.place import Away
from trainer.track.recorded import End, Point, Run, curve_points, evaluation_points, shown
from trainer.track.tensorboard import TensorBoard

STARTED = 1_795_000_000.0
SETTINGS = """
run = "pets"

[train]
epochs = 2
lr_steps = [3, 4]

[data]
path = "s3://AKIAIOSFODNN7EXAMPLE:secret@bucket/pets"
"""


def put_journal(folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
    with (folder / "journal.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def put_curves(folder: Path, steps: int) -> None:
    rows = range(1, steps + 1)
    table = pa.table(
        {
            "step": list(rows),
            "epoch": [step / 10 for step in rows],
            "attempt": [1] * steps,
            "time": [STARTED + step for step in rows],
            "train_loss": [1 / step for step in rows],
            "learning_rate": [0.1] * steps,
            "images_per_second": [100.0] * steps,
            "data_wait_seconds": [0.0] * steps,
            "step_seconds": [0.2] * steps,
        }
    )
    pq.write_table(table, folder / "curves.parquet")


def evaluation(step: int, accuracy: float, attempt: int = 1) -> dict[str, Any]:
    return {
        "time": STARTED + step,
        "event": "evaluation",
        "attempt": attempt,
        "step": step,
        "epoch": step / 10,
        "train_loss": 0.5,
        "mean_train_loss": 0.6,
        "test_loss": 0.4,
        "test_accuracy": accuracy,
        "validation_macro_f1": 0.3,
    }


def put_run(folder: Path) -> Path:
    """A run that is under way: 10 steps, one evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(SETTINGS)
    put_journal(
        folder,
        [
            {"time": STARTED, "event": "run_started", "generation": 1, "command": "finetune run pets", "task": {"name": "classification"}},
            {"time": STARTED + 1, "event": "attempt_started", "attempt": 1, "workers": 1, "start_step": 0, "generation": 1},
            evaluation(10, 0.8),
        ],
    )
    put_curves(folder, 10)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return put_run(tmp_path / "runs" / "pets")


def finish(folder: Path, steps: int = 20) -> None:
    put_curves(folder, steps)
    put_journal(
        folder, [evaluation(10, 0.8, attempt=2), evaluation(20, 0.9), {"time": STARTED + 30, "event": "run_finished", "generation": 1}]
    )
    summary = {"run": "pets", "status": "finished", "steps": steps, "test_accuracy": 0.9, "goodput": 0.97, "device": "cpu", "profile": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")


def opened(folder: Path) -> RunFolder:
    return RunFolder(storage=open_storage(folder.parent), name=folder.name)


class Remembers:
    """A tracker that keeps what it is told, and fails when asked to."""

    def __init__(self) -> None:
        self.runs: list[Mapping[str, Any]] = []
        self.points: list[tuple[int, str, float]] = []
        self.ends: list[tuple[End, Mapping[str, bytes]]] = []
        self.fails: list[Exception] = []

    def _maybe(self) -> None:
        if self.fails:
            raise self.fails.pop(0)

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        self._maybe()
        self.run = run
        self.runs.append(known)
        return {"id": "7"}

    def log(self, points: Sequence[Point]) -> None:
        self._maybe()
        self.points += [(point.step, name, value) for point in points for name, value in point.values.items()]

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        self._maybe()
        self.ends.append((end, files))

    def where(self) -> str:
        return "here"

    def close(self) -> None:
        pass


def follower(folder: Path, place: Any, **options: Any) -> Follower:
    options.setdefault("say", lambda line: None)
    options.setdefault("sleep", lambda seconds: None)
    return Follower(opened(folder), "remembers", place, **options)


ALL = sorted(
    [(step, name) for step in range(1, 21) for name in ("epoch", "train/loss", "train/learning_rate", "speed/images_per_second")]
    + [(step, name) for step in range(1, 21) for name in ("speed/data_wait_seconds", "speed/step_seconds")]
    + [
        (step, name)
        for step in (10, 20)
        for name in ("train/loss_at_evaluation", "train/mean_loss", "test/loss", "test/accuracy", "validation/macro_f1")
    ]
)


# --- what is read ---------------------------------------------------------------------------------------------------------------------


def test_settings_are_flat_and_without_secrets(run: Path) -> None:
    place = Remembers()
    follower(run, place).follow(once=True)
    assert place.run.settings == {
        "run": "pets",
        "train.epochs": 2,
        "train.lr_steps": "[3, 4]",
        "data.path": place.run.settings["data.path"],
    }
    assert "secret" not in str(place.run)
    assert (place.run.name, place.run.started, place.run.command, place.run.task) == (
        "pets",
        STARTED,
        "finetune run pets",
        "classification",
    )


def test_points_are_those_behind_a_step(run: Path) -> None:
    assert [point.step for point in curve_points(opened(run), 7)] == [8, 9, 10]
    events = [evaluation(10, 0.8), evaluation(20, 0.9), evaluation(10, 0.8)]
    assert [point.step for point in evaluation_points(events, -1)] == [10, 20]
    assert [point.step for point in evaluation_points(events, 10)] == [20]
    (point,) = evaluation_points([evaluation(10, 0.8)], 0)
    assert point.values["test/accuracy"] == 0.8
    assert [shown(key) for key in ("test_f1", "loss", "mean_train_loss")] == ["test/f1", "evaluation/loss", "train/mean_loss"]


def test_curves_that_cannot_be_read_are_named(run: Path) -> None:
    (run / "curves.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"curves\.parquet cannot be read"):
        curve_points(opened(run), 0)


# --- following ------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_told_once_and_then_its_end(run: Path) -> None:
    place = Remembers()
    said: list[str] = []
    assert follower(run, place, say=said.append).follow(once=True) != "finished"
    assert said == ["pets -> here"]
    finish(run)
    assert follower(run, place, with_model=True).follow() == "finished"
    assert sorted((step, name) for step, name, _ in place.points) == ALL
    assert place.runs == [{}, {"id": "7"}]
    ((end, files),) = place.ends
    assert (end.status, end.results["test_accuracy"], end.time) == ("finished", 0.9, STARTED + 30)
    assert files["report.html"] == b"<p>report</p>"
    assert files["model/model.safetensors"] == b"weights"
    assert follower(run, place).follow() == "finished"
    assert len(place.ends) == 1, "a second command has nothing to add"


def test_it_follows_until_the_end(run: Path) -> None:
    place, looks = Remembers(), 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            finish(run)

    assert follower(run, place, sleep=sleep).follow() == "finished"
    assert looks == 3
    assert sorted((step, name) for step, name, _ in place.points) == ALL
    assert "model/model.safetensors" not in place.ends[0][1]


def test_a_run_that_ended_and_went_on_has_its_newest_end(run: Path) -> None:
    place = Remembers()
    put_journal(run, [{"time": STARTED + 12, "event": "run_stopped", "signal": "SIGTERM", "generation": 1}])
    assert follower(run, place).follow() == "stopped"
    put_journal(run, [{"time": STARTED + 14, "event": "run_started", "generation": 2, "command": "finetune run pets"}])
    finish(run)
    assert follower(run, place).follow() == "finished"
    assert [end.status for end, _ in place.ends] == ["stopped", "finished"]
    assert sorted((step, name) for step, name, _ in place.points) == ALL


@pytest.mark.parametrize("killed_at", range(8))
def test_a_command_that_was_killed_anywhere_goes_on(killed_at: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told just before may be told again, with the same values; nothing is left out."""
    monkeypatch.setattr(follow_module, "POINTS_AT_ONCE", 7)
    finish(run)
    place, calls = Remembers(), 0

    class Killed(BaseException):
        """The process."""

    def counted(original: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            done = original(*args)
            if calls == killed_at + 1:
                raise Killed  # after the tracker has it, before that is written down
            return done

        return call

    for name in ("open", "log", "end"):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    try:
        follower(run, place).follow()
    except Killed:
        assert follower(run, place).follow() == "finished"
    assert sorted({(step, name) for step, name, _ in place.points}) == ALL
    assert len(set(place.points)) == len(ALL)
    assert len(place.points) <= len(ALL) + 7 * 6
    assert {end.status for end, _ in place.ends} == {"finished"}


def test_a_tracker_that_is_away_is_waited_for_and_said_once(run: Path) -> None:
    finish(run)
    place = Remembers()
    place.fails = [Away("it does not answer"), Away("still not")]
    said: list[str] = []
    assert follower(run, place, say=said.append).follow() == "finished"
    assert said[0] == "it does not answer; trying again, the run goes on without"
    assert said[1].startswith("the tracker answers again, after")
    assert sorted((step, name) for step, name, _ in place.points) == ALL


def test_patience_ends_after_the_run_has(run: Path) -> None:
    place, now = Remembers(), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 1000 and not (run / "summary.json").exists():
            finish(run)

    place.fails = [Away("away")] * 1000
    with pytest.raises(Away):
        follower(run, place, patience_seconds=100, clock=lambda: now, sleep=sleep).follow()
    assert 1100 <= now < 1000 + 100 + 2 * follow_module.LONGEST_PAUSE_SECONDS


def test_notes_that_are_damaged_are_begun_again(run: Path) -> None:
    finish(run)
    (run / "trackers").mkdir()
    (run / "trackers" / "remembers.json").write_text('{"strange": 1}')
    said: list[str] = []
    assert follower(run, Remembers(), say=said.append).follow() == "finished"
    assert "cannot be read; the tracker is told all again" in said[0]


# --- TensorBoard ----------------------------------------------------------------------------------------------------------------------


def records(folder: Path) -> Iterator[Any]:
    """The events of all event files: length, its checksum, the event, its checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            if at + 16 + length > len(data):
                break  # cut short: readers stop here
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def test_tensorboard_has_each_point_once_with_its_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--to", "tensorboard", "--once"]) == 0
    finish(run)
    assert main([str(run), "--to", "tensorboard"]) == 0
    assert main([str(run), "--to", "tensorboard"]) == 0
    out = capsys.readouterr()
    assert f"pets -> tensorboard --logdir {run}/tensorboard" in out.err
    assert out.out.splitlines()[-1] == "pets: finished; tensorboard has all of it"
    scalars = [
        (event.step, value.tag, value.simple_value, event.wall_time)
        for event in records(run / "tensorboard")
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    told = sorted((step, tag) for step, tag, _, _ in scalars if not tag.startswith("result/"))
    assert told == ALL
    assert (20, "test/accuracy", pytest.approx(0.9), STARTED + 20) in scalars
    assert [value for _, tag, value, _ in scalars if tag == "result/goodput"] == [pytest.approx(0.97)]
    texts = {
        value.tag: value.tensor.string_val[0].decode()
        for event in records(run / "tensorboard")
        for value in event.summary.value
        if value.tensor.string_val
    }
    assert "epochs = 2" in texts["settings/text_summary"]
    assert "| status | finished |" in texts["result/text_summary"]
    assert "secret" not in str(texts)


def points_in(folder: Path) -> list[tuple[int, str]]:
    """Of all event files, each up to where readers stop."""
    found = [(event.step, value.tag) for event in records(folder) for value in event.summary.value if value.HasField("simple_value")]
    return sorted((step, tag) for step, tag in found if not tag.startswith("result/"))


def test_what_tensorboard_was_told_is_on_the_disk_before_that_is_noted(run: Path) -> None:
    """A kill in the next moment loses nothing."""
    place = TensorBoard(run / "tensorboard")
    follower(run, place).follow(once=True)
    assert points_in(run / "tensorboard") == [point for point in ALL if point[0] <= 10]
    finish(run)
    follower(run, TensorBoard(run / "tensorboard")).follow()
    assert points_in(run / "tensorboard") == ALL


def test_a_command_with_nothing_to_add_leaves_no_file_and_what_was_deleted_is_written_again(run: Path) -> None:
    finish(run)
    for _ in range(3):
        assert main([str(run), "--to", "tensorboard"]) == 0
    (file,) = (run / "tensorboard").iterdir()
    file.unlink()
    assert main([str(run), "--to", "tensorboard"]) == 0
    assert points_in(run / "tensorboard") == ALL


@pytest.mark.parametrize("failing", range(5))
def test_a_disk_that_is_full_for_a_moment_is_waited_for(failing: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was cut short is left as it is; nothing is left out."""
    from tensorboardX.record_writer import RecordWriter

    finish(run)
    write, writes = RecordWriter.write, 0

    def may_fail(self: Any, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes in (1 + 20 * failing, 2 + 20 * failing):
            self._writer.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", may_fail)
    said: list[str] = []
    assert follower(run, TensorBoard(run / "tensorboard"), say=said.append).follow() == "finished"
    assert any("takes nothing now (No space left on device); trying again" in line for line in said)
    assert sorted(set(points_in(run / "tensorboard"))) == ALL
    assert not any(path.stat().st_size < 10 for path in (run / "tensorboard").iterdir()), "none is left that was only begun"


def test_tensorboard_needs_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        TensorBoard(tmp_path / "file" / "x")
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--to", "tensorboard", "--at", str(tmp_path / "file" / "x")])
    assert stop.value.code == 2
    assert "name another folder" in capsys.readouterr().err


# --- MLflow ---------------------------------------------------------------------------------------------------------------------------


class Server:
    """What a tracking server answers (MLflow's REST API), as far as it is used here."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.headers: list[Mapping[str, str]] = []
        self.broken = self.made = 0

    def answer(self, method: str, path: str, query: Mapping[str, list[str]], body: bytes) -> tuple[int, Any]:
        if self.broken:
            self.broken -= 1
            return 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}
        if path.startswith("/api/2.0/mlflow-artifacts/artifacts/"):
            self.artifacts[path.removeprefix("/api/2.0/mlflow-artifacts/artifacts/")] = body
            return 200, {}
        told = json.loads(body or b"{}")
        absent = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"})
        match path.removeprefix("/api/2.0/mlflow/"):
            case "experiments/get-by-name":
                found = self.experiments.get(query["experiment_name"][0])
                return (200, {"experiment": {"experiment_id": found}}) if found else absent
            case "experiments/create":
                self.experiments[told["name"]] = str(len(self.experiments) + 1)
                return 200, {"experiment_id": self.experiments[told["name"]]}
            case "runs/create":
                ident = f"r{self.made}"
                info = {
                    "run_id": ident,
                    "status": "RUNNING",
                    "experiment_id": told["experiment_id"],
                    "artifact_uri": f"mlflow-artifacts:/1/{ident}/artifacts",
                }
                self.runs[ident] = {"info": info, "asked": told, "metrics": set(), "params": {}, "tags": {}, "status": "RUNNING"}
                return 200, {"run": self.runs[ident] | {"metrics": []}}
            case "runs/get":
                found_run = self.runs.get(query["run_id"][0])
                if found_run is None:
                    return absent
                params = [{"key": key, "value": value} for key, value in found_run["params"].items()]
                return 200, {"run": {"info": found_run["info"] | {"status": found_run["status"]}, "data": {"params": params}}}
            case "runs/update":
                self.runs[told["run_id"]]["status"] = told["status"]
                return 200, {}
            case "runs/log-batch":
                kept = self.runs[told["run_id"]]
                assert len(told.get("metrics", ())) <= 1000
                assert len(told.get("params", ())) <= 100
                kept["metrics"] |= {(each["key"], each["step"], each["timestamp"], each["value"]) for each in told.get("metrics", ())}
                for each in told.get("params", ()):
                    if kept["params"].setdefault(each["key"], each["value"]) != each["value"]:
                        return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Changing param values is not allowed"}
                kept["tags"] |= {each["key"]: each["value"] for each in told.get("tags", ())}
                return 200, {}
        return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": f"{method} {path}"}


@contextmanager
def serving(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.headers.append(dict(self.headers))
            status, told = server.answer(self.command, parts.path, parse_qs(parts.query), body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def test_mlflow_has_one_run_with_all_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server()
    with serving(server) as url:
        assert main([str(run), "--to", "mlflow", "--at", url, "--once", "--project", "zoo"]) == 0
        finish(run)
        server.broken = 1
        assert main([str(run), "--to", "mlflow", "--at", url, "--project", "zoo", "--model"]) == 0
    assert server.experiments == {"zoo": "1"}
    (found,) = server.runs.values()
    assert found["status"] == "FINISHED"
    assert (found["params"]["train.epochs"], found["asked"]["run_name"]) == ("2", "pets")
    assert sorted((step, key) for key, step, _, _ in found["metrics"] if not key.startswith("result/")) == ALL
    assert ("test/accuracy", 20, round(1000 * (STARTED + 20)), 0.9) in found["metrics"]
    assert found["tags"]["finetune.status"] == "finished"
    assert server.artifacts["1/r0/artifacts/report.html"] == b"<p>report</p>"
    assert server.artifacts["1/r0/artifacts/model/model.safetensors"] == b"weights"
    assert "answers 503" in capsys.readouterr().err


def test_a_run_that_has_ended_there_stays_so_until_it_goes_on(run: Path) -> None:
    server = Server()
    put_journal(run, [{"time": STARTED + 12, "event": "run_stopped", "signal": "SIGTERM", "generation": 1}])
    with serving(server) as url:
        for _ in range(2):
            assert main([str(run), "--to", "mlflow", "--at", url]) == 0
            assert [each["status"] for each in server.runs.values()] == ["KILLED"]
        put_journal(run, [{"time": STARTED + 14, "event": "run_started", "generation": 2, "command": "finetune run pets"}])
        put_curves(run, 15)
        (run / "config.toml").write_text(SETTINGS.replace("epochs = 2", "epochs = 3\nmix = 0.5"))
        assert main([str(run), "--to", "mlflow", "--at", url, "--once"]) == 0
        assert [each["status"] for each in server.runs.values()] == ["RUNNING"]
        finish(run)
        assert main([str(run), "--to", "mlflow", "--at", url]) == 0
    (found,) = server.runs.values()
    assert found["status"] == "FINISHED"
    assert (found["params"]["train.epochs"], found["params"]["train.mix"]) == ("2", "0.5"), "MLflow does not let a parameter change"
    assert found["tags"]["finetune.changed.train.epochs"] == "3"


def test_a_run_that_somebody_deleted_there_is_made_again(run: Path) -> None:
    server = Server()
    with serving(server) as url:
        main([str(run), "--to", "mlflow", "--at", url, "--once"])
        server.runs.clear()
        server.made = 7
        finish(run)
        main([str(run), "--to", "mlflow", "--at", url])
    (found,) = server.runs.values()
    assert sorted((step, key) for key, step, _, _ in found["metrics"] if not key.startswith("result/")) == ALL


def test_artifacts_that_lie_elsewhere_are_written_there(run: Path, tmp_path: Path) -> None:
    place = MLflow("http://127.0.0.1:1", "x")
    place._artifacts = str(tmp_path / "artifacts")
    place._put("model/config.json", b"{}")
    assert (tmp_path / "artifacts" / "model" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pw"}, "Basic bWU6cHc="),
    ],
)
def test_credentials_are_mlflows_own(environment: dict[str, str], expected: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = Server()
    with serving(server) as url:
        main([str(run), "--to", "mlflow", "--at", url, "--once"])
    assert {headers["Authorization"] for headers in server.headers} == {expected}


def test_a_server_that_refuses_or_is_none_is_told_by_its_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server()
    with serving(server) as url, pytest.raises(SystemExit) as stop:
        main([str(run), "--to", "mlflow", "--at", f"{url}/elsewhere", "--once"])
    assert stop.value.code == 2
    assert "refuses (400 INVALID_PARAMETER_VALUE)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--to", "mlflow", "--at", "sqlite:///mlruns.db"])
    assert "mlflow server --backend-store-uri sqlite:///mlruns.db" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--to", "mlflow"])
    assert "no MLflow server is given; say --at" in capsys.readouterr().err


def test_a_server_that_is_away_ends_the_command_with_1_and_leaves_the_run_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([str(run), "--to", "mlflow", "--at", "http://127.0.0.1:1", "--patience", "0"]) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_names_and_numbers_are_what_mlflow_takes() -> None:
    assert named("test/f1 (mean)=0.5") == "test/f1 _mean__0.5"
    assert [as_json(value) for value in (1.5, float("nan"), float("inf"), float("-inf"))] == [1.5, "NaN", "Infinity", "-Infinity"]


# --- Weights & Biases -----------------------------------------------------------------------------------------------------------------


def offline_records(folder: Path) -> list[list[Any]]:
    """What each offline run's file holds, in order of time."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[Record.FromString(data) for data in leveldb_log(path.read_bytes())] for path in files]


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's log: blocks of 32 KiB, each piece with checksum, length and kind."""
    block, header = 32768, 7
    at, whole = header, b""  # the file's own header comes first
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole = data[at + header : at + header + length] if kind in (1, 2) else whole + data[at + header : at + header + length]
        if kind in (1, 4):
            yield whole
        at += header + length


def test_wandb_offline_has_each_point_once_in_the_same_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    out.mkdir()
    assert main([str(run), "--to", "wandb", "--at", str(out), "--once"]) == 0
    finish(run)
    assert main([str(run), "--to", "wandb", "--at", str(out), "--project", "finetune"]) == 0
    both = offline_records(out)
    assert len(both) == 2
    assert len({record.run.run_id for records in both for record in records if record.HasField("run")}) == 1
    told = []
    for record in (record for records in both for record in records if record.HasField("history")):
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        told += [(row["step"], name) for name in row if name not in ("step", "time") and not name.startswith("_")]
    assert sorted(told) == ALL
    settings = {
        item.key or ".".join(item.nested_key): item.value_json
        for records in both
        for record in records
        if record.HasField("run")
        for item in record.run.config.update
    }
    assert settings["train.epochs"] == "2"
    assert "secret" not in str(settings)
    summary = {
        item.key or ".".join(item.nested_key): item.value_json
        for record in both[1]
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert (summary["result/test_accuracy"], summary["status"]) == ("0.9", '"finished"')


def test_wandb_that_is_not_installed_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--to", "wandb"])
    assert stop.value.code == 2
    assert "pip install 'ray-finetune[wandb]'" in capsys.readouterr().err


# --- the command line -----------------------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_noted_in_or_read_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: RunFolder, path: str, data: bytes) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{run}/{path}")

    monkeypatch.setattr(RunFolder, "write", refused)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--to", "tensorboard", "--at", str(tmp_path / "out")])
    assert stop.value.code == 2
    said = f"{run}/trackers/tensorboard.json cannot be written (Read-only file system), where it is noted what a tracker has; track a copy"
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    (run / "curves.parquet").unlink()
    os.mkfifo(run / "curves.parquet")
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--to", "tensorboard", "--once"])
    assert stop.value.code == 2
    assert f"{run}/curves.parquet cannot be read: not a regular file" in capsys.readouterr().err


def test_wrong_words_end_with_their_rule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([str(run), "--to", "mlflow", "--at", "localhost:5000"], "localhost:5000 lacks its scheme; say --at http://localhost:5000"),
        ([str(run), "--to", "mlflow", "--at", "http://bad host:99"], "http://bad host:99 is no URL; say --at http://HOST:PORT"),
        ([str(run), "--to", "mlflow", "--at", "http://host:port"], "http://host:port is no URL"),
        ([str(run), "--to", "mlflow", "--at", "http://"], "is no URL"),
        ([str(run.parent / "nobody"), "--to", "tensorboard"], "nobody"),
        ([str(run), "--to", "tensorboard", "--patience", "-1"], "--patience -1 is not a number of seconds"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
