"""A run in a real MLflow: `finetune track` against `mlflow server`, which is killed in the middle, and read back by MLflow's own client.

MLflow's requirements do not fit ours, so it has an interpreter of its own, which is made once in pytest's cache folder (some 60 MB from the
package index). Where that cannot be done the tests skip with the reason.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.running import PROJECT, kill_session
from tests.ports import free_ports
from tests.trainer.test_track import STARTED, finish, put_run

CONSTRAINTS = Path(__file__).with_name("mlflow-constraints.txt")
MANY = 4000
"""Steps of a run that takes a server seconds to take in."""
CURVES = ("epoch", "train/loss", "train/learning_rate", "speed/images_per_second", "speed/data_wait_seconds", "speed/step_seconds")
CLIENT = """
import json, sys
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
client = MlflowClient(sys.argv[1])
found = []
for experiment in client.search_experiments(filter_string="name = 'zoo'"):
    for run in client.search_runs([experiment.experiment_id]):
        ident = run.info.run_id
        history = {key: client.get_metric_history(ident, key) for key in run.data.metrics}
        points = {key: [(each.step, each.timestamp, each.value) for each in told] for key, told in history.items()}
        files = {}
        for name in ("report.html", "model/model.safetensors"):
            with open(download_artifacts(run_id=ident, artifact_path=name, tracking_uri=sys.argv[1]), "rb") as file:
                files[name] = file.read().decode()
        found.append({"info": dict(run.info), "params": run.data.params, "tags": run.data.tags, "points": points, "files": files})
print(json.dumps(found, default=str))
"""

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has MLflow."""
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("mlflow") if cache is not None else tmp_path_factory.mktemp("mlflow")
    ready: Path = folder / wanted
    if not ready.exists():
        for older in folder.iterdir():
            shutil.rmtree(older)
        making = folder / f"making-{os.getpid()}"
        venv.create(making, with_pip=True)
        flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "-r", str(CONSTRAINTS)]
        done = subprocess.run([making / "bin" / "python", "-m", "pip", "install", *flags], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(making)
            pytest.skip(f"MLflow cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        making.rename(ready)
    return ready / "bin" / "python"


class Server:
    """One `mlflow server` after another, at the same address and with the same store."""

    def __init__(self, python: Path, folder: Path, flags: list[str], *, keeps_each_once: bool) -> None:
        self.keeps_each_once = keeps_each_once
        (port,) = free_ports(1)
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        self._folder = folder
        self._command = [str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            process = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True, env=environment())
        self._process = process
        until(self._answers, lambda: self.log.read_text(), process)

    def kill(self) -> None:
        """SIGKILL to all its processes, at whatever they are."""
        if self._process is not None:
            kill_session(self._process.pid)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def environment() -> dict[str, str]:
    """MLflow is to ask nobody outside, to start nothing but its server, and to take a folder as its store."""
    told = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**os.environ, **told, "MLFLOW_ALLOW_FILE_STORE": "true"}


def until(
    is_so: Callable[[], bool], told: Callable[[], str], process: "subprocess.Popen[bytes] | None" = None, timeout: float = 300
) -> None:
    end = time.monotonic() + timeout
    while not is_so():
        assert process.poll() is None, told()
        assert time.monotonic() < end, told()
        time.sleep(0.02)


class Track:
    """One `finetune track` process."""

    def __init__(self, run: Path, url: str, *flags: str) -> None:
        self.run, self.log = run, run.parent / f"track-{time.monotonic_ns()}.log"
        words = [str(run), "--to", "mlflow", "--at", url, "--project", "zoo", "--model", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.track", *words], cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
            )

    def told_up_to(self, step: int) -> None:
        """Wait until the tracker has the curves up to there."""

        def is_so() -> bool:
            try:
                return int(json.loads((self.run / "trackers" / "mlflow.json").read_text())["curves"]) >= step
            except FileNotFoundError:
                return False

        until(is_so, self.said, self.process)

    def says(self, words: str) -> None:
        until(lambda: words in self.said(), self.said, self.process)

    def said(self) -> str:
        return self.log.read_text()

    def finish(self) -> int:
        try:
            return self.process.wait(600)
        finally:
            self.kill()

    def kill(self) -> None:
        kill_session(self.process.pid)
        self.process.wait()


@pytest.fixture(params=["sqlite", "folder"])
def server(request: pytest.FixtureRequest, python: Path, tmp_path: Path) -> Iterator[Server]:
    """Artifacts go through the server, or lie in a folder that it names."""
    flags = {
        "sqlite": ["--backend-store-uri", f"sqlite:///{tmp_path}/store.db", "--artifacts-destination", str(tmp_path / "artifacts")],
        "folder": ["--backend-store-uri", str(tmp_path / "store"), "--default-artifact-root", str(tmp_path / "artifacts")],
    }
    extra = ["--no-serve-artifacts"] if request.param == "folder" else []
    made = Server(python, tmp_path, flags[request.param] + extra, keeps_each_once=request.param == "sqlite")
    made.start()
    try:
        yield made
    finally:
        made.kill()


def with_a_loss_that_is_no_number(run: Path, step: int) -> None:
    table = pq.read_table(run / "curves.parquet")
    losses = table.column("train_loss").to_pylist()
    losses[step - 1] = math.nan
    index = table.column_names.index("train_loss")
    pq.write_table(table.set_column(index, "train_loss", pa.array(losses, pa.float64())), run / "curves.parquet")


def read_back(python: Path, server: Server, folder: Path) -> list[dict[str, Any]]:
    """The experiment's runs, as MLflow's own client sees them."""
    asked = [str(python), "-c", CLIENT, server.url]
    done = subprocess.run(asked, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_server_that_is_killed_in_the_middle_has_all_of_it_in_the_end(server: Server, python: Path, tmp_path: Path) -> None:
    run = put_run(tmp_path / "runs" / "pets")
    with (run / "config.toml").open("a") as config:
        config.write(f'labels = "{"x" * 7000}"\n')  # longer than MLflow takes
    track = Track(run, server.url, "--patience", "1")
    try:
        track.told_up_to(10)
        server.kill()
        finish(run, MANY)
        with_a_loss_that_is_no_number(run, 17)
        assert track.finish() == 1, track.said()
        assert "does not answer" in track.said()
        assert "the same command goes on" in track.said()

        server.start()
        track = Track(run, server.url)
        track.told_up_to(11)
        server.kill()
        track.says("trying again")
        server.start()
        assert track.finish() == 0, track.said()
        assert "the tracker answers again" in track.said()

        track = Track(run, server.url)
        assert track.finish() == 0, track.said()
    finally:
        track.kill()

    (found,) = read_back(python, server, tmp_path)
    assert found["info"]["status"] == "FINISHED"
    assert (found["info"]["start_time"], found["info"]["end_time"]) == (1000 * STARTED, 1000 * (STARTED + 30))
    assert (found["params"]["train.epochs"], found["params"]["data.labels"]) == ("2", "x" * 6000)
    assert (found["tags"]["mlflow.runName"], found["tags"]["finetune.status"]) == ("pets", "finished")
    assert "secret" not in json.dumps(found)
    assert found["files"] == {"report.html": "<p>report</p>", "model/model.safetensors": "weights"}
    points = {key: told for key, told in found["points"].items() if not key.startswith("result/")}
    assert {step for step, _, _ in points["test/accuracy"]} == {10, 20}
    assert {key: sorted({step for step, _, _ in points[key]}) for key in CURVES} == {key: list(range(1, MANY + 1)) for key in CURVES}
    losses = {step: value for step, _, value in points["train/loss"]}
    assert math.isnan(losses.pop(17))
    assert losses == {step: 1 / step for step in range(1, MANY + 1) if step != 17}
    assert {stamp - 1000 * (STARTED + step) for step, stamp, _ in points["train/loss"]} == {0.0}
    assert [value for _, _, value in found["points"]["result/test_accuracy"]] == [0.9]
    if server.keeps_each_once:  # the folder also has what was told again just before and after a kill
        assert {key: len(told) for key, told in points.items() if key in CURVES} == dict.fromkeys(CURVES, MANY)


def test_a_run_that_goes_on_with_other_settings_stays_one_run(server: Server, python: Path, tmp_path: Path) -> None:
    run = put_run(tmp_path / "runs" / "pets")
    first = Track(run, server.url, "--once")
    assert first.finish() == 0, first.said()
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("epochs = 2", "epochs = 3\nmix = 0.5"))
    finish(run)
    second = Track(run, server.url)
    assert second.finish() == 0, second.said()
    (found,) = read_back(python, server, tmp_path)
    assert found["info"]["status"] == "FINISHED"
    assert (found["params"]["train.epochs"], found["params"]["train.mix"]) == ("2", "0.5"), "MLflow does not let a parameter change"
    assert found["tags"]["finetune.changed.train.epochs"] == "3"
