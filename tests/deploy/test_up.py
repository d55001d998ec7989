"""deploy.up and deploy.preview with the real Prometheus, on exporters of real registries (tests.deploy.exporters)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.preview import DASHBOARD_NAMES, written
from deploy.preview import main as preview
from deploy.prometheus import ALERTS
from deploy.up import grafana_command, grafana_environment, runs_folder
from deploy.up import main as up
from tests.deploy.exporters import Exporters

PROJECT = Path(__file__).resolve().parents[2]
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package prometheus)")
pytestmark = pytest.mark.timeout(240)


def ask(url: str, query: str) -> list[Any]:
    with urllib.request.urlopen(f"{url}/api/v1/query?" + urllib.parse.urlencode({"query": query}), timeout=10) as response:
        return list(json.load(response)["data"]["result"])


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.up", *arguments],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Exporters, subprocess.Popen[str]]]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "runs").mkdir()
    process = start("--storage", str(folder / "runs"), "--port", "0", "--data", str(folder / "data"), "--scrape-seconds", "0.5")
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        if found := re.match(r"Prometheus +(http://127\.0\.0\.1:\d+) ", line):
            url = found[1]
        if line.startswith("Ctrl-C"):
            break
    assert url, process.stderr.read() if process.stderr else ""
    run = Exporters(folder / "runs", "made by hand")  # after the start: runs are found as they come
    yield url, run, process
    run.close()
    if process.poll() is None:
        process.kill()
        process.wait()


@needs_prometheus
def test_a_run_that_starts_later_is_scraped_drawn_and_watched_and_ctrl_c_ends_everything(
    served: tuple[str, Exporters, subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, run, process = served
    end = time.monotonic() + 90
    ranks: set[str] = set()
    while time.monotonic() < end and (ranks != {"0", "1", "coordinator"} or run.step < 60):
        run.tick()
        time.sleep(0.1)
        ranks = {row["metric"]["rank"] for row in ask(url, "up == 1")}
    assert ranks == {"0", "1", "coordinator"}
    with urllib.request.urlopen(f"{url}/api/v1/rules", timeout=10) as response:
        loaded = [rule["name"] for rule in json.load(response)["data"]["groups"][0]["rules"]]
    assert loaded == [alert.name for alert in ALERTS]

    for name in DASHBOARD_NAMES:
        out = tmp_path / f"{name}.png"
        assert preview(["--prometheus", url, "--run", "made by hand", "--out", str(out), "--dashboard", name]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert preview(["--prometheus", url, "--run", "another", "--out", str(tmp_path / "no.png")]) == 2
    assert "knows no run 'another'; it knows: made by hand" in capsys.readouterr().err
    assert preview(["--prometheus", url, "--run", "made by hand", "--namespace", "bob", "--out", str(tmp_path / "no.png")]) == 2
    assert "no run 'made by hand' in the namespace 'bob'; there is one in: ann" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()

    under = children(process.pid)
    assert len(under) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in under)


def test_a_uri_and_a_missing_folder_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/runs is not a folder.*--discovery HOST:9410"):
        runs_folder("s3://bucket/runs")
    with pytest.raises(ValueError, match=r"does not exist.*mkdir -p"):
        runs_folder(str(tmp_path / "typo"))
    assert runs_folder(str(tmp_path / "first"), is_default=True) == tmp_path / "first"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        runs_folder(str(tmp_path / "file"))


@needs_prometheus
def test_a_taken_port_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--storage", str(tmp_path), "--port", str(port))
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"--port {port} cannot be used" in said
    assert "--port 0" in said


def test_without_prometheus_the_package_is_named(tmp_path: Path) -> None:
    process = start("--storage", str(tmp_path), "--port", "0", PATH=str(tmp_path))
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "apt install prometheus" in said) == (2, True)


def test_grafana_is_started_with_our_dashboards_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert grafana_command() is None
    binary = tmp_path / "bin" / "grafana"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "defaults.ini").write_text("")
    assert grafana_command() == [str(binary), "server", "--homepath", str(tmp_path)]
    environment = grafana_environment("http://127.0.0.1:9090", 3000, tmp_path)
    assert environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert (Path(environment["GF_PATHS_PROVISIONING"]) / "datasources" / "prometheus.yaml").exists()
    assert (Path(environment["FINETUNE_DASHBOARDS"]) / "run.json").exists()


def test_wrong_settings_and_a_silent_prometheus_end_with_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert up(["--storage", str(tmp_path), "--scrape-seconds", "0"]) == 2
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert "--scrape-seconds 0.0 must be at least 0.1" in capsys.readouterr().err
    assert preview(["--prometheus", "http://127.0.0.1:1", "--run", "r", "--out", str(tmp_path / "x.png")]) == 2
    assert "python -m deploy.up starts one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123, "percentunit", "12 %"),
        (0.0123, "percentunit", "1.2 %"),
        (0.0021, "s", "2.1 ms"),
        (0.0, "s", "0 s"),
        (26e6, "bytes", "26 MB"),
    ],
)
def test_values_have_units(value: float, unit: str, text: str) -> None:
    assert written(value, unit, None) == text
