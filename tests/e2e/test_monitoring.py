"""While runs go on, end and fail, the shipped Prometheus configuration scrapes every rank, every panel has data, and alerts fire."""

import dataclasses
import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dataio.config import DataConfig
from dataio.manifest import SplitInfo
from dataio.parquet import ShardWriter, open_dataset
from dataio.prepared import prepare
from deploy.grafana import queries
from tests.e2e.running import Run
from tests.ports import free_ports
from tests.prometheus import CONFIG, PROMETHEUS, Prometheus

PROMTOOL = shutil.which("promtool")

NOT_HERE = {"gpu", "peak", "resize", "hour", "ray", "node", "dcgm", "validation"}
"""What panels need that these runs do not have: GPUs, a validation split, another number of workers (test_elastic.py), an hour, other
exporters."""
ENDS = {"FinetuneRunFailed", "FinetuneRunVanished", "FinetuneRunStopped"}
"""FinetuneTargetDown is not among them: at this scale it fires after 1.2 s, and a rank that ends is a target for as long."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason="prometheus is not installed (Debian package prometheus)"),
]


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        body: bytes = response.read()
        return body.decode()


def firing(server: Prometheus) -> set[str]:
    return {row["metric"]["alertname"] for row in server.query('count by (alertname) (ALERTS{alertstate="firing"})')}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[Prometheus, int]]:
    [port] = free_ports(1)
    server = Prometheus(tmp_path, port)
    yield server, port
    server.stop()


def test_the_shipped_configuration_is_valid() -> None:
    checked = subprocess.run([str(PROMTOOL), "check", "config", str(CONFIG)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def rotten(images: Path, folder: Path) -> Path:
    """The images converted, and one of them no image any more since: a rank finds it."""
    whole = open_dataset(prepare(DataConfig(path=str(images), root=str(folder / "whole"), max_bad_fraction=0.01)))
    out = folder / "rotten"
    out.mkdir(parents=True)
    splits = {}
    for name in whole.manifest.splits:
        split = whole.split(name)
        writer = ShardWriter(out / f"{name}-00000.parquet")
        for number in range(split.groups):
            group = split.read_group(number)
            encoded = [bytes(each) for each in group.encoded]
            if name == "train" and number == 0:
                encoded[3] = b"rotten"
            writer.write_group(encoded, group.targets, list(group.keys), [bytes(32)] * len(encoded))
        splits[name] = SplitInfo(count=split.count, shards=(writer.close(),))
    (out / "manifest.json").write_text(dataclasses.replace(whole.manifest, splits=splits).to_json())
    return out


class Watch:
    """What was there at some time: panels' queries that had data, alerts that fired."""

    def __init__(self, server: Prometheus, run: str) -> None:
        self._server = server
        self._empty = {
            f"{q.dashboard}: {q.panel}: {q.query}": q
            for q in queries(run=run, namespace="ann", rate_interval="5s")
            if q.needs not in NOT_HERE
        }
        self.fired: set[str] = set()

    def look(self) -> None:
        for name, each in list(self._empty.items()):
            if self._server.query(each.query):
                del self._empty[name]
        self.fired |= firing(self._server)

    def empty(self, *but: str) -> list[str]:
        """Queries that never had data, but for those that need one of `but`."""
        return sorted(name for name, each in self._empty.items() if each.needs not in but)

    def until(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        self.look()
        while not done() and time.monotonic() < end:
            time.sleep(0.5)
            self.look()


def test_every_rank_is_scraped_every_panel_has_data_and_alerts_fire(
    tmp_path: Path, images: Path, prometheus: tuple[Prometheus, int]
) -> None:
    server, port = prometheus
    data = rotten(images, tmp_path / "data")
    common = ("--data.max-bad-fraction", "0.01", "--cluster.discovery-port", str(port), "--cluster.metrics-namespace", "ann")
    watch = Watch(server, "watched")
    run = Run(
        *("--workers", "2", "--train.epochs", "1000", "--data.cache", "none", *common),
        *("--data.unlabelled", str(images / "test")),
        storage=tmp_path / "runs",
        name="watched",
        data=data,
    )
    try:
        run.wait_for("checkpoint_committed")
        want = {("watched", "0"), ("watched", "1"), ("watched", "coordinator")}
        up: set[tuple[str, str]] = set()

        def all_up() -> bool:
            nonlocal up
            up = {(row["metric"]["run"], row["metric"]["rank"]) for row in server.query("up == 1")}
            return up == want

        watch.until(all_up, 60)
        assert up == want
        for target in json.loads(get(f"127.0.0.1:{port}", "/sd")):
            text = get(target["targets"][0], "/metrics")
            lint = subprocess.run([str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
            assert (lint.returncode, lint.stdout + lint.stderr) == (0, ""), target
        watch.until(lambda: not watch.empty("alert", "down target", "failure", "end"), 30)
        another_users_run_of_the_same_name_and_port_finishes(tmp_path, images, server, port)

        run.kill_worker(1)
        run.wait_for("training_started", attempt=2)
        watch.until(lambda: {"FinetuneRestarted", "FinetuneGoodputLow"} <= watch.fired, 60)
        assert {"FinetuneRestarted", "FinetuneGoodputLow"} <= watch.fired, watch.fired

        run.kill()  # the whole machine, as it were: nobody is left to tell Prometheus
        watch.until(lambda: "FinetuneRunVanished" in watch.fired and not watch.empty("end"), 40)
        assert watch.fired & ENDS == {"FinetuneRunVanished"}
        assert watch.empty("end") == []
    finally:
        run.kill()

    # Steps that are far too long: losses are no numbers any more, whatever batch is left out.
    wrong = Run(
        *("--workers", "1", "--optim.lr", "1e25", "--train.epochs", "1000", *common),
        *("--cluster.faults.max-rollbacks", "10"),  # four restarts may be over before Prometheus has found the run
        storage=tmp_path / "runs",
        name="wrong",
        data=data,
    )
    try:
        watch.until(lambda: {"FinetuneRollback", "FinetuneCrashLoop"} <= watch.fired or wrong.process.poll() is not None, 90)
        watch.until(lambda: {"FinetuneRollback", "FinetuneCrashLoop"} <= watch.fired, 5)
    finally:
        wrong.kill()
    assert {"FinetuneRollback", "FinetuneCrashLoop"} <= watch.fired, (watch.fired, wrong.output())


def another_users_run_of_the_same_name_and_port_finishes(folder: Path, images: Path, server: Prometheus, port: int) -> None:
    """It is found on the port that the first one has, is waited for at its end, and raises nothing for having ended."""
    run = Run(
        *("--workers", "1", "--train.max-steps", "40", "--data.max-bad-fraction", "0.01"),
        *("--cluster.discovery-port", str(port), "--cluster.metrics-namespace", "bob"),
        storage=folder / "runs of bob",
        name="watched",
        data=images,
    )
    try:
        assert run.finish() == 0, run.output()
    finally:
        run.kill()
    assert "Prometheus reads this run: waiting until it knows of the end" in run.output()
    assert [row["value"][1] for row in server.query('last_over_time(finetune_run_state{namespace="bob",state="finished"}[2m])')] == ["1"]
    # Prometheus keeps the last sample of a target that is gone for some scrapes, then marks it stale.
    end = time.monotonic() + 60
    while "bob" in (up := {row["metric"]["namespace"] for row in server.query("up")}) and time.monotonic() < end:
        time.sleep(0.2)
    assert up == {"ann"}
    for_bob = server.query('last_over_time(ALERTS{namespace="bob",alertstate="firing"}[5m])')
    assert not {row["metric"]["alertname"] for row in for_bob} & ENDS
