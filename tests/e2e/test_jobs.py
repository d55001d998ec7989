"""A run as a job of a real Ray cluster with token authentication: docs/cluster.md, step by step."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import PROJECT, SMALL, kill_session, once_agents_answer
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class RayCluster:
    """`ray start --head` with two CPUs, and its job API. Its home folder is its own: token and default storage are in there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.temp = Path(tempfile.mkdtemp(prefix="rj-"))  # short: Ray makes Unix sockets in it
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
        }
        self.token = self.cli("get-auth-token", "--generate").strip()
        port, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.log = home / "ray-start.log"
        command = [
            *("ray", "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"),
            *("--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent), "--temp-dir", str(self.temp)),
        ]
        with self.log.open("w") as log:
            self.head = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_until_up(self, timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                self.get("/api/jobs/")
                return
            except (OSError, urllib.error.URLError):
                assert self.head.poll() is None, self.log.read_text()
                time.sleep(0.2)
        raise AssertionError(f"no cluster in {timeout} s:\n{self.log.read_text()}")

    def cli(self, *args: str, check: bool = True, **environment: str) -> str:
        done = once_agents_answer(
            lambda: subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", *args],
                cwd=PROJECT,
                env=self.environment | environment,
                text=True,
                capture_output=True,
                timeout=120,
                check=False,
            )
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout if check else done.stdout + done.stderr

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def stop(self, job: str) -> None:
        """As `ray job stop` does; the command takes seconds to start, in which a short run ends by itself."""
        headers = {"Authorization": f"Bearer {self.token}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.address}/api/jobs/{job}/stop", method="POST", headers=headers), timeout=10
        ) as answer:
            assert json.load(answer)["stopped"]

    def submit(self, job: str, *args: str) -> None:
        self.cli(
            *("job", "submit", "--address", self.address, "--no-wait", "--submission-id", job, "--working-dir", "."),
            *("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "80"}}'),
            *("--", "python", "-m", "trainer.run", *args),
        )

    def job(self, job: str) -> dict[str, Any]:
        return dict(self.get(f"/api/jobs/{job}"))

    def output(self, job: str) -> str:
        return str(self.get(f"/api/jobs/{job}/logs")["logs"])

    def end_of(self, job: str, timeout: float = 150) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if (info := self.job(job))["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
                return info
            time.sleep(0.2)
        raise AssertionError(f"job {job} did not end in {timeout} s:\n{self.output(job)}")

    def close(self) -> None:
        kill_session(self.head.pid)
        self.head.wait()
        shutil.rmtree(self.temp, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path_factory.mktemp("home"))
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.close()


def events(folder: Path) -> list[dict[str, Any]]:
    journal = folder / "journal.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")] if journal.exists() else []


def test_a_job_succeeds_stops_with_a_checkpoint_and_goes_on_from_it(cluster: RayCluster, images: Path) -> None:
    runs = cluster.home / "finetune-runs"  # the default storage
    common = [*SMALL, "--data.path", str(images), "--data.max-bad-fraction", "0.01", "--workers", "2"]
    stopped_run = [*common, "--run", "stopped", "--train.epochs", "12", "--train.checkpoint-every", "5"]

    cluster.submit("whole", *common, "--run", "whole", "--train.epochs", "2", "--train.checkpoint-every", "5")
    info = cluster.end_of("whole")
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0), cluster.output("whole")
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["workers"], summary["restarts"]) == ("finished", 24, 2, 0)
    log = cluster.output("whole")
    assert f"run whole in {runs}: 2 workers on 2 CPUs" in log
    assert "\r" not in log  # plain lines, no progress bar that is drawn over
    assert "\x1b" not in log

    # What was uploaded: the code, without history, environment and tests.
    [uploaded] = cluster.temp.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (uploaded / "trainer" / "run.py").exists()
    assert not [name for name in (".git", ".venv", "tests") if (uploaded / name).exists()]
    assert sum(file.stat().st_size for file in uploaded.rglob("*") if file.is_file()) < 10e6

    # Stopped in mid-run, it commits where it is.
    cluster.submit("first", *stopped_run)
    end = time.monotonic() + 120
    while not any(event["event"] == "checkpoint_committed" and event["step"] >= 20 for event in events(runs / "stopped")):
        assert time.monotonic() < end, cluster.output("first")
        assert cluster.job("first")["status"] in ("PENDING", "RUNNING"), cluster.output("first")
        time.sleep(0.1)
    cluster.stop("first")
    assert cluster.end_of("first")["status"] == "STOPPED"
    ends = [event for event in events(runs / "stopped") if event["event"] == "run_stopped"]
    assert len(ends) == 1, f"{events(runs / 'stopped')[-8:]}\n{cluster.job('first')}\n{cluster.output('first')}"
    (stopped,) = ends
    assert f"stopped: step {stopped['step']} of 144 is saved" in cluster.output("first")
    assert json.loads((runs / "stopped" / "summary.json").read_text())["status"] == "stopped"
    assert stopped["step"] < 144
    assert list((runs / "stopped" / "checkpoints").glob(f"step-{stopped['step']:08d}.*/COMMIT"))

    cluster.submit("second", *stopped_run)
    info = cluster.end_of("second")
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0), cluster.output("second")
    assert f"going on from step {stopped['step']} of 144" in cluster.output("second")
    summary = json.loads((runs / "stopped" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 144)


def test_a_relative_storage_is_refused_in_a_job(cluster: RayCluster, images: Path) -> None:
    cluster.submit("relative", *SMALL, "--data.path", str(images), "--storage", "runs")
    info = cluster.end_of("relative")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2)
    assert "give an absolute path that every node mounts" in cluster.output("relative")


def test_without_the_token_nobody_submits(cluster: RayCluster) -> None:
    said = cluster.cli("job", "list", "--address", cluster.address, check=False, RAY_AUTH_MODE="disabled")
    assert "RAY_AUTH_MODE" in said
