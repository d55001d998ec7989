"""While a run goes on, the shipped Prometheus configuration scrapes every rank of it, and the exposition is clean."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import PROJECT, Run

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
CONFIG = PROJECT / "deploy" / "prometheus" / "prometheus.yml"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason="prometheus is not installed (Debian package prometheus)"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        body: bytes = response.read()
        return body.decode()


class Prometheus:
    """The real one, with the shipped configuration: only the discovery port and the intervals are set for the test."""

    def __init__(self, folder: Path, discovery_port: int) -> None:
        config = CONFIG.read_text().replace("127.0.0.1:9410", f"127.0.0.1:{discovery_port}")
        (folder / "prometheus.yml").write_text(config.replace("scrape_interval: 5s", "scrape_interval: 1s").replace("5s", "1s"))
        self.address = f"127.0.0.1:{free_port()}"
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    str(PROMETHEUS),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def query(self, expression: str) -> list[dict[str, Any]]:
        try:
            answer = json.loads(get(self.address, "/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
        except OSError:  # not up yet
            return []
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[Prometheus, int]]:
    port = free_port()
    server = Prometheus(tmp_path, port)
    yield server, port
    server.stop()


def test_the_shipped_configuration_is_valid() -> None:
    checked = subprocess.run([str(PROMTOOL), "check", "config", str(CONFIG)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_scrapes_every_rank_of_a_live_run(tmp_path: Path, images: Path, prometheus: tuple[Prometheus, int]) -> None:
    server, port = prometheus
    run = Run(
        *("--workers", "2", "--train.epochs", "60", "--data.max-bad-fraction", "0.01", "--cluster.discovery-port", str(port)),
        storage=tmp_path / "runs",
        name="watched",
        data=images,
    )
    try:
        run.wait_for("checkpoint_committed")
        want = {("watched", "0"), ("watched", "1"), ("watched", "coordinator")}
        end = time.monotonic() + 60
        up: set[tuple[str, str]] = set()
        while up != want and time.monotonic() < end:
            time.sleep(0.5)
            up = {(row["metric"]["run"], row["metric"]["rank"]) for row in server.query("up == 1")}
        assert up == want
        end = time.monotonic() + 30
        moving: set[str] = set()
        while moving != {"0", "1"} and time.monotonic() < end:
            time.sleep(0.5)
            moving = {row["metric"]["rank"] for row in server.query('increase(finetune_steps_total{run="watched"}[30s]) > 0')}
        assert moving == {"0", "1"}
        assert float(server.query('finetune_checkpoint_commit_step{run="watched"}')[0]["value"][1]) > 0
        assert server.query('finetune_loss{run="watched",rank="0"}')
        for target in json.loads(get(f"127.0.0.1:{port}", "/sd")):
            text = get(target["targets"][0], "/metrics")
            assert "finetune_" in text
            lint = subprocess.run([str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
            assert (lint.returncode, lint.stdout + lint.stderr) == (0, ""), target
        run.signal(signal.SIGTERM)
        assert run.finish() == 128 + signal.SIGTERM, run.output()
    finally:
        run.kill()
