"""How runs end, as a real Prometheus with the shipped rules sees it: two users on one machine, runs of one name, one discovery port. Real
coordinators without Ray, one of them in a process that is killed."""

import json
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.agent import RankEnd
from cluster.coordinator import Coordinator
from cluster.exporter import Server, serve_metrics
from cluster.metrics import Metrics
from cluster.names import FILE_SD
from cluster.roster import RankInfo
from cluster.storage import open_storage
from cluster.store import Store
from deploy.grafana import queries
from tests.ports import free_ports
from tests.prometheus import PROMETHEUS, Prometheus

PROJECT = Path(__file__).resolve().parents[2]
SCRAPE_SECONDS = 0.5
"""What fires after two minutes fires after 1.2 s."""
KILLED = """
import sys, time
from cluster.coordinator import Coordinator
from cluster.storage import open_storage
from cluster.store import Store
storage = open_storage(sys.argv[1])
generation = Store.open(storage, "other").claim_generation()
coordinator = Coordinator(storage, "other", generation, 2, discovery_port=int(sys.argv[2]), namespace="ann")
coordinator.start_attempt(1, 1, 0)
time.sleep(600)
"""


class Run:
    """A coordinator and its only rank, which makes steps as far as Prometheus can tell."""

    def __init__(self, storage: Path, namespace: str, name: str, port: int) -> None:
        opened = open_storage(str(storage))
        self.targets = storage / name / FILE_SD
        generation = Store.open(opened, name).claim_generation()
        self.coordinator = Coordinator(opened, name, generation, 2, discovery_port=port, namespace=namespace, facts={"owner": namespace})
        self.coordinator.start_attempt(1, 1, 0)
        self.metrics = Metrics(name, 0, 1)
        self.metrics.set("start_time_seconds", time.time())
        self.server: Server = serve_metrics(self.metrics.registry)
        self.coordinator.account({"steps": 30.0, "start_up": 10.0})
        self.coordinator.register(1, 0, RankInfo(host="h", pid=1, node_id="n", metrics_address=self.server.address))

    def end(self, state: str) -> tuple[float, float]:
        """As the driver does. Returns for how long it would have waited at most, and for how long it has."""
        self.coordinator.rank_ended(1, 0, RankEnd(status=0, error=None, killed_by_order=False))
        self.server.close()
        most, began = self.coordinator.ended(state), time.monotonic()
        assert self.coordinator.finish(5)
        return most, time.monotonic() - began


class Ends(Prometheus):
    """What it knows of runs' ends."""

    def runs(self, expression: str) -> set[tuple[str, ...]]:
        """Namespace, run and what else tells the results apart."""
        found = [row["metric"] for row in self.query(expression)]
        return {
            (labels.get("namespace", ""), labels["run"], *filter(None, [labels.get("alertname") or labels.get("state")]))
            for labels in found
        }

    def fired(self) -> set[tuple[str, ...]]:
        """All alerts that have fired."""
        return self.runs('count by (namespace, run, alertname) (last_over_time(ALERTS{alertstate="firing"}[10m]))')

    def until(self, expression: str, want: set[tuple[str, ...]]) -> None:
        end = time.monotonic() + 30
        while (found := self.runs(expression)) != want and time.monotonic() < end:
            time.sleep(0.1)
        assert found == want, expression


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Ends, int]]:
    [port] = free_ports(1)
    server = Ends(tmp_path, port, scrape_seconds=SCRAPE_SECONDS)
    yield server, port
    server.stop()


@pytest.mark.timeout(180)
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian package prometheus)")
def test_a_finished_a_failed_a_stopped_and_a_killed_run_of_two_users_raise_exactly_what_is_documented(
    tmp_path: Path, served: tuple[Ends, int]
) -> None:
    prometheus, port = served
    finished = Run(tmp_path / "ann", "ann", "quick", port)
    failed, stopped = Run(tmp_path / "bob", "bob", "quick", port), Run(tmp_path / "bob", "bob", "other", port)
    first, second = Run(tmp_path / "ann", "ann", "moved", port), Run(tmp_path / "ann", "bob", "moved", port)
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "ann"), str(port)], cwd=PROJECT)
    try:
        all_runs = {("ann", "quick"), ("bob", "quick"), ("bob", "other"), ("ann", "other"), ("ann", "moved"), ("bob", "moved")}
        prometheus.until("count by (namespace, run) (up) == count by (namespace, run) (up == 1)", all_runs)
        prometheus.until("finetune_run_state == 1", {(*run, "running") for run in all_runs})
        assert {row["metric"].get("owner", "") for row in prometheus.query("finetune_run_info")} == {"ann", "bob", ""}
        time.sleep(2 * SCRAPE_SECONDS)  # a second scrape tells the coordinators the interval

        for run, state in ((finished, "finished"), (failed, "failed"), (stopped, "stopped")):
            most, waited = run.end(state)
            assert 0 < waited <= most + 1 < 10
            assert json.loads(run.targets.read_text()) == []
        listed = second.targets.read_text()
        first.end("taken_over")
        assert second.targets.read_text() == listed, "the file is the other command's by now"
        second.end("finished")
        ends = {("ann", "quick", "finished"), ("bob", "quick", "failed"), ("bob", "other", "stopped")}
        ends |= {("ann", "moved", "taken_over"), ("bob", "moved", "finished")}
        assert prometheus.runs('last_over_time(finetune_run_state{state!="running"}[1m]) == 1') == ends  # it was waited for
        tile = [query.query for query in queries(run="quick", namespace="ann") if query.panel == "Goodput"]
        assert [[row["value"][1] for row in prometheus.query(query)] for query in tile] == [["0.75"], []], "of a run that has ended too"
        prometheus.until("up", {("ann", "other")})  # the others are no targets any more

        killed.send_signal(signal.SIGKILL)
        killed.wait(30)
        documented = {
            ("bob", "quick", "FinetuneRunFailed"),
            ("bob", "other", "FinetuneRunStopped"),
            ("ann", "other", "FinetuneRunVanished"),
        }
        prometheus.until('last_over_time(ALERTS{alertstate="firing"}[10m])', documented)
        time.sleep(3)  # twice the time that FinetuneTargetDown takes
        assert prometheus.fired() == documented
    finally:
        killed.kill()
        killed.wait(30)


def test_where_no_prometheus_reads_a_run_its_end_waits_for_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "ann", "quick", 0)
    with urllib.request.urlopen(f"http://{run.coordinator.discovery_address()}/metrics", timeout=5) as answer:  # somebody with curl
        text = answer.read().decode()
    assert 'finetune_run_state{attempt="0",rank="coordinator",run="quick",state="running"} 1.0' in text
    most, waited = run.end("finished")
    assert most == 0
    assert waited < 2
    assert json.loads(run.targets.read_text()) == []
