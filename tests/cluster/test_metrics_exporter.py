"""Metrics and how Prometheus finds them: lint-clean, served with the right types, and scraped by a real Prometheus."""

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from cluster.exporter import Server, serve_discovery, serve_metrics, write_file_sd
from cluster.failures import Kind
from cluster.metrics import CAUSES, ENDS, LABELS, METRICS, MOST_MEASURES, OTHER, RUNNING, Metrics, most_series
from cluster.names import PREFIX
from cluster.text import shown
from dataio.codecs.image.sniff import KINDS
from tests.ports import free_ports
from trainer.runs.summary import accounting

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")


def filled(owner: str, rank: int | str) -> Metrics:
    """All that there can be."""
    metrics = Metrics("run-1", rank, 2, owner=owner)  # type: ignore[arg-type]
    for number, metric in enumerate(METRICS):
        if metric.info:
            if metric.owner == owner:
                metrics.describe(metric.name, dict.fromkeys(metric.info, "x"))
        elif metric.owner == owner:
            declared = tuple(f"value {n}" for n in range(metric.declared))
            if declared:
                metrics.declare(metric.name, declared)
            for label in metric.values or (*declared, *([OTHER] if declared else [""])):
                match metric.kind:
                    case "counter":
                        metrics.add(metric.name, number, label=label)
                    case "gauge":
                        metrics.set(metric.name, number, label=label)
                    case "histogram":
                        metrics.observe(metric.name, number)
    return metrics


def series(metrics: Metrics) -> list[str]:
    """As they are scraped, without their values."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]


def get(address: str, path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found: list[Server] = []
    yield found
    for server in found:
        server.close()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
@pytest.mark.parametrize("owner", ["rank", "coordinator"])
def test_promtool_finds_nothing_to_say(servers: list[Server], owner: str) -> None:
    servers.append(serve_metrics(filled(owner, 0).registry))
    content_type, text = get(servers[0].address)
    assert content_type.startswith("text/plain; version=0.0.4")
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_row_of_the_table_is_exported_with_the_labels_and_no_others() -> None:
    seen = set()
    for owner in ("rank", "coordinator"):
        for family in filled(owner, 3).registry.collect():
            row = next(m for m in METRICS if m.full_name.removesuffix("_total") == family.name)
            seen.add(row.name)
            assert family.documentation == row.help
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == {*LABELS} | ({row.label} if row.label else set()) | set(row.info)
                assert (sample.labels["run"], sample.labels["rank"], sample.labels["attempt"]) == ("run-1", "3", "2")
    assert seen == {metric.name for metric in METRICS}


def test_names_follow_prometheus_and_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.full_name.startswith(PREFIX)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert metric.kind != "histogram" or not metric.label, metric.name
        assert not any(bad in metric.name for bad in ("_ms", "_mb", "_percent", "_minutes")), metric.name


@pytest.mark.parametrize("owner", ["rank", "coordinator"])
def test_a_process_has_the_stated_number_of_series_and_no_label_makes_more(owner: Any) -> None:
    metrics = filled(owner, 3)
    assert len(series(metrics)) == len(set(series(metrics))) == most_series(owner)
    for metric in METRICS:
        if metric.owner == owner and metric.label:
            for value in ("/home/somebody/photo-17.png", "sample 4711"):
                (metrics.add if metric.kind == "counter" else metrics.set)(metric.name, 5, label=value)
    assert len(series(metrics)) == most_series(owner)
    assert len(series(Metrics("run-1", 3, 2, owner=owner))) < most_series(owner)


def test_what_no_listed_value_fits_counts_as_other() -> None:
    metrics = Metrics("run-1", 0, 2)
    metrics.add("quarantined_samples_total", 2, label="bitten by a dog")
    metrics.add("quarantined_samples_total", 3, label="struck by lightning")
    metrics.add("quarantined_samples_total", label="truncated")
    (family,) = (family for family in metrics.registry.collect() if family.name == "finetune_quarantined_samples")
    assert {s.labels["reason"]: s.value for s in family.samples if s.value} == {"other": 5, "truncated": 1}


def test_labels_have_the_values_that_their_sources_give() -> None:
    values = {metric.name: metric.values for metric in METRICS if metric.label and not metric.declared}
    kinds = get_args(Kind)
    assert values == {
        "quarantined_samples_total": (*KINDS, OTHER),
        "failures_total": (*kinds, OTHER),
        "restarts_total": tuple(k for k in (*kinds, "grow", OTHER) if k not in ("storage", "data", "user")),  # these end the run
        "run_seconds": CAUSES,
        "run_state": (RUNNING, *ENDS, OTHER),
        "run_state_time_seconds": (RUNNING, *ENDS, OTHER),
    }
    assert set(CAUSES) == set(accounting([], {}))
    assert all(OTHER in each for each in values.values())


@given(names=st.lists(st.text(st.characters(codec=None), min_size=1, max_size=10), max_size=100))
def test_a_run_declares_the_values_of_a_label_and_what_there_is_no_room_for_is_other(names: list[str]) -> None:
    metrics = Metrics("run-1", 0, 2)
    metrics.declare("test_measure", names)
    for number, name in enumerate(names):
        metrics.set("test_measure", number, label=name)
    metrics.set("test_measure", -1, label="never declared" * 2)
    (family,) = (family for family in metrics.registry.collect() if family.name == "finetune_test_measure")
    found = {sample.labels["measure"]: sample.value for sample in family.samples}
    names = [shown(name) for name in names]  # as the page writes them: without characters that steer a terminal
    distinct = list(dict.fromkeys(names))
    kept = [name for name in distinct[:MOST_MEASURES] if name != OTHER]
    assert found == {name: max(n for n, other in enumerate(names) if other == name) for name in kept} | {OTHER: -1}
    assert len(found) <= MOST_MEASURES + 1


def test_values_are_declared_once_and_only_where_the_table_leaves_them_to_the_run() -> None:
    metrics = Metrics("run-1", 0, 2)
    metrics.declare("test_measure", ["accuracy"])
    with pytest.raises(AssertionError, match="declared before"):
        metrics.declare("test_measure", ["map"])
    with pytest.raises(AssertionError, match="listed in the table"):
        metrics.declare("quarantined_samples_total", ["truncated"])
    assert all(bool(metric.label) == bool(metric.values or metric.declared) for metric in METRICS)
    assert not any(metric.declared and (metric.values or metric.kind != "gauge") for metric in METRICS)


def test_units_are_in_the_names() -> None:
    units = {metric.name: metric.unit for metric in METRICS}
    assert (units["step_seconds"], units["data_wait_seconds_total"], units["goodput_ratio"]) == ("seconds", "seconds", "ratio")
    assert (units["images_per_second"], units["samples_total"], units["restarts_total"]) == ("images/second", "samples", "restarts")
    assert (units["gpu_power_watts"], units["checkpoint_bytes"], units["read_bytes_total"]) == ("watts", "bytes", "bytes")
    bare = {"learning_rate", "gradient_norm", "test_measure", "validation_measure", "run_state", "run_info"}
    assert {name for name, unit in units.items() if not unit} == bare


def test_a_value_that_is_not_known_any_more_is_gone_and_may_come_back() -> None:
    metrics = Metrics("run-1", 0, 2)
    metrics.set("gpu_power_watts", 300)
    metrics.unset("gpu_power_watts")
    assert not [name for name in series(metrics) if "gpu_power_watts" in name]
    metrics.set("gpu_power_watts", 310)
    assert metrics.registry.get_sample_value("finetune_gpu_power_watts", {"run": "run-1", "rank": "0", "attempt": "2"}) == 310


def test_a_gauge_is_absent_until_it_is_set_and_a_counter_starts_at_zero(servers: list[Server]) -> None:
    metrics = Metrics("run", 0, 1)
    servers.append(serve_metrics(metrics.registry))
    _, text = get(servers[0].address)
    assert "finetune_loss{" not in text
    assert 'finetune_steps_total{attempt="1",rank="0",run="run"} 0.0' in text
    metrics.set("loss", 0.25)
    metrics.add("steps_total", 3)
    metrics.observe("step_seconds", 0.05)
    _, text = get(servers[0].address)
    assert 'finetune_loss{attempt="1",rank="0",run="run"} 0.25' in text
    assert 'finetune_steps_total{attempt="1",rank="0",run="run"} 3.0' in text
    assert 'finetune_step_seconds_sum{attempt="1",rank="0",run="run"} 0.05' in text  # exact, not a bucket's midpoint


def test_a_wrong_name_kind_or_label_is_our_mistake_and_found_at_once() -> None:
    metrics = Metrics("run", 0, 1)
    with pytest.raises(KeyError):
        metrics.add("no_such_metric")
    with pytest.raises(AssertionError, match="loss is a gauge"):
        metrics.add("loss")
    with pytest.raises(AssertionError, match="'reason'"):
        metrics.add("quarantined_samples_total")
    coordinator = Metrics("run", "coordinator", 0, owner="coordinator")
    with pytest.raises(AssertionError, match="run_info is described"):
        coordinator.set("run_info", 1)
    with pytest.raises(AssertionError, match="run_info takes the labels"):
        coordinator.describe("run_info", {"hostname": "gpu-17"})


def test_listens_on_loopback_unless_told_otherwise(servers: list[Server]) -> None:
    servers.append(serve_metrics(Metrics("run", 0, 1).registry))
    assert servers[0].address.startswith("127.0.0.1:")
    servers.append(serve_metrics(Metrics("run", 0, 1).registry, "0.0.0.0"))
    assert not servers[1].address.startswith("0.0.0.0")
    get(servers[1].address)


def test_a_broken_target_list_and_a_wrong_path_are_http_errors(servers: list[Server]) -> None:
    servers.append(serve_discovery("127.0.0.1", 0, lambda: 1 // 0))  # type: ignore[arg-type, return-value]
    for path, status in (("/sd", 500), ("/nothing", 404)):
        with pytest.raises(urllib.error.HTTPError) as failure:
            get(servers[0].address, path)
        assert failure.value.code == status


def test_a_port_in_use_is_the_users_to_choose_again(servers: list[Server]) -> None:
    servers.append(serve_metrics(Metrics("run", 0, 1).registry))
    port = int(servers[0].address.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port} .* port 0 takes a free one"):
        serve_metrics(Metrics("run", 0, 1).registry, "127.0.0.1", port)
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port} .* port 0 takes a free one"):
        serve_discovery("127.0.0.1", port, list, wait_seconds=0.3)


def test_a_port_that_a_killed_run_still_holds_is_waited_for(servers: list[Server]) -> None:
    leftover = serve_discovery("127.0.0.1", 0, list)
    port = int(leftover.address.rpartition(":")[2])
    threading.Timer(0.5, leftover.close).start()
    servers.append(serve_discovery("127.0.0.1", port, lambda: [{"targets": ["new"]}]))
    assert [each["targets"] for each in json.loads(get(servers[0].address, "/sd")[1])] == [["new"]]


def test_file_sd_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "sd" / "targets.json"
    write_file_sd(path, [{"targets": ["a:1"], "labels": {"rank": "0"}}])
    write_file_sd(path, [{"targets": ["b:2"], "labels": {"rank": "1"}}])
    assert json.loads(path.read_text()) == [{"targets": ["b:2"], "labels": {"rank": "1"}}]
    assert [entry.name for entry in path.parent.iterdir()] == ["targets.json"]
    with pytest.raises(ValueError, match=r"does not end in .json"):
        write_file_sd(tmp_path / "targets.yaml", [])


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian package prometheus)")
def test_a_real_prometheus_finds_and_scrapes_every_rank_both_ways(tmp_path: Path, servers: list[Server]) -> None:
    targets: list[dict[str, Any]] = []
    for rank in range(2):
        metrics = Metrics("run-1", rank, 1)
        metrics.set("loss", 0.5 + rank)
        servers.append(serve_metrics(metrics.registry))
        targets.append({"targets": [servers[-1].address], "labels": {"run": "run-1", "rank": str(rank), "attempt": "1"}})
    servers.append(serve_discovery("127.0.0.1", 0, lambda: targets))
    write_file_sd(tmp_path / "targets.json", targets)
    (tmp_path / "prometheus.yml").write_text(
        json.dumps(  # JSON is YAML
            {
                "global": {"scrape_interval": "300ms", "scrape_timeout": "250ms"},
                "scrape_configs": [
                    {
                        "job_name": "http",
                        "honor_labels": True,
                        "http_sd_configs": [{"url": f"http://{servers[-1].address}/sd", "refresh_interval": "500ms"}],
                    },
                    {"job_name": "file", "honor_labels": True, "file_sd_configs": [{"files": [str(tmp_path / "targets.json")]}]},
                ],
            }
        )
    )
    address = "127.0.0.1:{}".format(*free_ports(1))
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [
            str(PROMETHEUS),
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        wanted = {(job, str(rank)) for job in ("http", "file") for rank in range(2)}
        up = wait_for(address, 'up{run="run-1"} == 1', wanted, process)
        assert set(up) == wanted, (tmp_path / "log").read_text()[-2000:]
        losses = wait_for(address, 'finetune_loss{run="run-1",attempt="1"}', wanted, process)
        assert losses == {(job, rank): 0.5 + int(rank) for job, rank in wanted}
        # A rank is gone: so are its series, and not only after Prometheus's five minutes.
        gone = targets.pop()
        assert gone["labels"]["rank"] == "1"
        servers.pop(1).close()
        write_file_sd(tmp_path / "targets.json", targets)
        left = {(job, "0") for job in ("http", "file")}
        assert set(wait_for(address, 'finetune_loss{run="run-1"}', left, process)) == left
        assert set(wait_for(address, 'up{run="run-1"}', left, process)) == left
    finally:
        process.kill()
        process.wait(10)
        log.close()


def wait_for(address: str, query: str, wanted: set[tuple[str, str]], process: subprocess.Popen[bytes]) -> dict[tuple[str, str], float]:
    """The query's values by (job, rank), as soon as all are there, or what there is after 40 s."""
    found: dict[tuple[str, str], float] = {}
    deadline = time.monotonic() + 40
    while set(found) != wanted and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        try:
            _, text = get(address, "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        except OSError:
            continue
        result = json.loads(text)["data"]["result"]
        found = {(row["metric"]["job"], row["metric"]["rank"]): float(row["value"][1]) for row in result}
    return found
