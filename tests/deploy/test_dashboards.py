"""Dashboards are what the code says, complete, and made of metrics that exist; provisioning and compose.yaml point at what is there."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import CAUSES, METRICS
from deploy.grafana import DASHBOARDS, queries
from deploy.grafana.__main__ import main as write_dashboards
from deploy.grafana.model import to_dict
from deploy.grafana.panels import COLUMNS, places
from deploy.prometheus import ALERTS, rules
from deploy.prometheus.names import fill, metrics_in, name

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_committed_dashboards_are_what_the_code_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_dashboards(["--check"]) == 0
    assert write_dashboards(["--out", str(tmp_path)]) == 0
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace("Goodput", "Badput"))
    assert write_dashboards(["--check", "--out", str(tmp_path)]) == 1
    assert "run.json is not what" in capsys.readouterr().err


def test_every_metric_is_on_a_panel_or_in_an_alert() -> None:
    used = set().union(*(metrics_in(query.query) for query in queries(run="r"))) | metrics_in(rules())
    assert {metric.name for metric in METRICS} - used == set()


def test_an_unknown_metric_is_refused_with_the_nearest_ones() -> None:
    assert fill('max({loss}{run="r"})') == 'max(finetune_loss{run="r"})'
    assert name("step_seconds_bucket") == "finetune_step_seconds_bucket"
    with pytest.raises(ValueError, match=r"'losss' is no metric.*near: loss"):
        fill("{losss}")
    with pytest.raises(ValueError, match="is a histogram"):
        name("step_seconds")
    with pytest.raises(ValueError, match="no metric"):
        name("loss_sum")
    with pytest.raises(ValueError, match="no metric"):
        metrics_in("rate(finetune_no_such_total[5m])")


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_have_ids_descriptions_units_and_places_that_do_not_overlap(dashboard: Any) -> None:
    board = to_dict(dashboard)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells, panel["title"]
        cells |= covered
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert all(references)
        assert len(set(references)) == len(references)
    titles = [panel.title for _, _, inside in places(dashboard) for panel, _ in inside]
    assert len(set(titles)) == len(titles)
    assert [variable["name"] for variable in board["templating"]["list"]][:3] == ["datasource", "namespace", "run"]
    assert [link["tags"] for link in board["links"]] == [["finetune"]]


def test_variables_are_filled_in_and_a_run_s_name_stays_inside_its_string() -> None:
    for query in queries(run='a"b', rate_interval="15s"):
        assert "$" not in query.query
        assert 'run="a"b"' not in query.query
    assert any('{namespace="c\\"d",run="a\\"b"}[15s]' in query.query for query in queries(run='a"b', namespace='c"d', rate_interval="15s"))


def test_every_query_is_of_one_run_of_one_namespace_or_keeps_both_apart() -> None:
    """But for those of whole nodes, which have no run."""
    for query in queries(run="r", namespace="n"):
        if query.needs not in ("ray", "node", "dcgm"):
            of_one = query.query.count('namespace="n",run="r"')
            assert of_one == query.query.count('run="r"') > 0 or "by (namespace, run" in query.query, query.query


def test_what_one_dashboard_says_another_one_does_not_contradict() -> None:
    """A tile or panel of one title is one query, wherever it stands; seconds a second are shown as a share."""
    queries_of: dict[str, set[tuple[str, ...]]] = {}
    for dashboard in DASHBOARDS:
        for _, _, inside in places(dashboard):
            for panel, _ in inside:
                if panel.kind in ("stat", "state"):
                    queries_of.setdefault(panel.title, set()).add(tuple(query.expr for query in panel.queries))
                for query in panel.queries:
                    if panel.unit == "s":
                        assert not re.fullmatch(r"(avg|max)\(rate\(\{\w+_seconds_total\}.*\)\)", query.expr), panel.title
                        assert not re.match(r"\w+\((0.5, )?sum by \(rank\) \(rate\(\{\w+_seconds_total\}\S+\)\)$", query.expr), panel.title
    assert [title for title, found in queries_of.items() if len(found) > 1] == []


def test_the_goodput_tile_has_no_warning_colour_before_its_alert_may_fire() -> None:
    [tile] = [panel for _, _, inside in places(DASHBOARDS[0]) for panel, _ in inside if panel.title == "Goodput"]
    first, later = tile.queries
    assert (first.legend, tile.looks[first.legend].color) == ("first hour", "blue")
    assert first.expr.endswith("< 3600")
    assert later.expr.endswith(">= 3600")


def test_causes_are_shown_in_words() -> None:
    for _, _, inside in places(DASHBOARDS[0]):
        for panel, _ in inside:
            if any(query.legend == "{{cause}}" for query in panel.queries):
                assert not [cause for cause in CAUSES if "_" in (panel.looks[cause].name if cause in panel.looks else cause)], panel.title
                board = to_dict(DASHBOARDS[0])
                [made] = [each for each in board["panels"] if each["title"] == panel.title]
                shown = {each["matcher"]["options"]: each["properties"][0]["value"] for each in made["fieldConfig"]["overrides"]}
                assert shown == {cause: look.name for cause, look in panel.looks.items()}


def test_no_query_has_a_series_for_every_rank() -> None:
    """`by (rank)` is always inside of something that makes few of many."""
    for query in queries(run="r"):
        if "by (rank" in query.query:
            assert re.match(r"(topk|bottomk|max|min|quantile)\(", query.query), query.query


def test_provisioning_reads_the_dashboards_that_compose_mounts() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "an image without its version changes by itself"
        for volume in service["volumes"]:
            source, target, *mode = re.fullmatch(r"(\$\{.*?\}|[^:]+):([^:]+)(?::(ro))?", volume).groups()  # type: ignore[union-attr]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
                assert mode == ["ro"]
            elif not source.startswith("${"):
                assert source in compose["volumes"]
            if target == "/runs":
                assert mode == ["ro"]
    grafana, prometheus, alertmanager = services["grafana"], services["prometheus"], services["alertmanager"]
    assert "--web.listen-address=127.0.0.1:9093" in alertmanager["command"]
    assert alertmanager["network_mode"] == "host"
    assert f"{grafana['environment']['GF_SERVER_HTTP_ADDR']}:" == "127.0.0.1:"
    assert "--web.listen-address=127.0.0.1:9090" in prometheus["command"]
    assert prometheus["network_mode"] == grafana["network_mode"] == "host"
    mounts = dict(reversed(volume.split(":")[:2]) for volume in grafana["volumes"])
    folder = mounts[grafana["environment"]["FINETUNE_DASHBOARDS"]]
    assert sorted(path.stem for path in (DEPLOY / folder).glob("*.json")) == sorted(board.name for board in DASHBOARDS)
    provisioning = DEPLOY / mounts["/etc/grafana/provisioning"]
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((provisioning / "dashboards" / "finetune.yaml").read_text())["providers"][0]
    assert source["url"] == "${PROMETHEUS_URL}"
    assert provider["options"]["path"] == "${FINETUNE_DASHBOARDS}"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert json.loads((DEPLOY / folder / Path(home).name).read_text())["uid"] == "finetune-run"
    inside = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())
    prometheus_mounts = {volume.rsplit(":ro", 1)[0].rsplit(":", 1)[1] for volume in prometheus["volumes"]}
    assert set(inside["rule_files"]) <= prometheus_mounts
    assert inside["alerting"]["alertmanagers"][0]["static_configs"] == [{"targets": ["127.0.0.1:9093"]}]
    assert inside["scrape_configs"][0]["file_sd_configs"][0]["files"] == ["/targets/*.json"]


def test_alertmanager_sends_one_message_for_a_run_of_a_namespace() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "alertmanager.yml").read_text())
    names = {receiver["name"] for receiver in settings["receivers"]}
    routes = [settings["route"], *settings["route"]["routes"]]
    assert {route["receiver"] for route in routes} <= names
    assert settings["route"]["group_by"] == settings["inhibit_rules"][0]["equal"] == ["cluster", "namespace", "run"]
    ended = settings["inhibit_rules"][0]["source_matchers"][0].partition("=~")[2].strip('"').split("|")
    assert set(ended) <= {alert.name for alert in ALERTS}


def test_compose_is_valid_to_docker(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    checked = subprocess.run(
        command, env={"FINETUNE_RUNS": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
