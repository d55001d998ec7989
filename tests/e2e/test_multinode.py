"""A job on a cluster of four Ray nodes: one is drained by a spot node's hook, one is lost; the job succeeds, every step done once."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import read_ledger
from tests.e2e import test_elastic
from tests.e2e.conftest import TRAIN_IMAGES
from tests.e2e.running import PROJECT, SMALL, once_agents_answer
from tests.e2e.test_jobs import events
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
EPOCHS, STEPS_PER_EPOCH = 40, 12
JOB = "multinode"


class Cluster(test_elastic.Nodes):
    """Its nodes, three of one CPU beside a head of none, and a job API on the head."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        port, agent = free_ports(2)
        self.api = f"http://127.0.0.1:{port}"
        with_api = (
            f'"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": {port}, "dashboard_agent_listen_port": {agent}'
        )
        assert '"include_dashboard": False' in test_elastic.NODES
        patch.setattr(test_elastic, "NODES", test_elastic.NODES.replace('"include_dashboard": False', with_api))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # a job's `python` is this one
        super().__init__()
        self.tell("add")

    def cli(self, *args: str) -> str:
        command = [sys.executable, "-m", "ray.scripts.scripts", *args]
        done = once_agents_answer(lambda: subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.api + path, timeout=10) as answer:
            return json.load(answer)

    def output(self) -> str:
        return str(self.get(f"/api/jobs/{JOB}/logs")["logs"])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(monkeypatch)
    yield cluster
    cluster.close()


def wait_for(cluster: Cluster, folder: Path, event: str, matches: Callable[[dict[str, Any]], bool] = lambda event: True) -> dict[str, Any]:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for one in events(folder):
            if one["event"] == event and matches(one):
                return one
        assert cluster.get(f"/api/jobs/{JOB}")["status"] in ("PENDING", "RUNNING"), cluster.output()
        time.sleep(0.1)
    raise AssertionError(f"no {event}:\n{cluster.output()}")


def rank_of(folder: Path, attempt: int, rank: int) -> dict[str, Any]:
    """What is known of a rank: its node and its process."""
    return [e for e in events(folder) if e["event"] == "worker_registered" and (e["attempt"], e["rank"]) == (attempt, rank)][-1]


def test_a_job_outlives_a_drained_node_and_a_lost_one(cluster: Cluster, tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "runs" / "multinode"
    cluster.cli(
        *("job", "submit", "--address", cluster.api, "--no-wait", "--submission-id", JOB, "--working-dir", ".", "--"),
        *("python", "-m", "trainer.run", *SMALL, "--data.path", str(images), "--data.root", str(tmp_path / "data")),
        *("--data.max-bad-fraction", "0.01", "--storage", str(tmp_path / "runs"), "--run", folder.name, "--workers", "1:2"),
        *("--cluster.cpus-per-worker", "1", "--cluster.grow-after-seconds", "600", "--cluster.allow-unauthenticated"),
        *("--train.checkpoint-every", "5", "--train.epochs", str(EPOCHS), "--train.eval-every-epochs", "1000"),
    )
    wait_for(cluster, folder, "checkpoint_committed", lambda e: e["step"] >= 10)

    # A spot node's hook: Ray drains the node, the run commits and goes on with the other two. (The hook's file is not the run's: on one
    # host all nodes would see it.)
    leaving = rank_of(folder, 1, 0)["node_id"]
    hook = [sys.executable, "-m", "deploy.preempt", "worker", "--notice", str(tmp_path / "notice"), "--seconds", "0"]
    told = subprocess.run(
        [*hook, "--node-id", leaving, "--address", cluster.address], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (tmp_path / "notice").exists()
    assert "drain" not in told.stderr, told.stderr
    assert wait_for(cluster, folder, "attempt_paused")["kind"] == "preempted"
    wait_for(cluster, folder, "first_step", lambda e: e["attempt"] == 2)
    assert leaving not in {rank_of(folder, 2, rank)["node_id"] for rank in (0, 1)}

    # A node is lost: its raylet and Ray's processes there; the rank ends with its agent.
    cluster.tell(f"remove {rank_of(folder, 2, 1)['node_id']}")
    assert wait_for(cluster, folder, "attempt_failed")["kind"] == "infrastructure"

    end, told_before = time.monotonic() + 120, 0
    while (info := cluster.get(f"/api/jobs/{JOB}"))["status"] in ("PENDING", "RUNNING"):
        if (count := len(events(folder))) > told_before:  # a busy machine takes longer, but gets on
            end, told_before = time.monotonic() + 120, count
        assert time.monotonic() < end, cluster.output()
        time.sleep(0.2)
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0), cluster.output()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", EPOCHS * STEPS_PER_EPOCH)
    assert (summary["preemptions"], summary["restarts"]) == (1, 1)
    assert [event["workers"] for event in events(folder) if event["event"] == "attempt_started"] == [2, 2, 1]
    seen = Counter((record.epoch, sample) for record in read_ledger(folder / "ledger") for sample in record.ids)
    assert seen == Counter((epoch, sample) for epoch in range(EPOCHS) for sample in range(TRAIN_IMAGES))
