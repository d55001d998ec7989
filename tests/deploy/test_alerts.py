"""Each alert fires when it should and is silent when it should not, as Prometheus's own promtool sees it."""

import shutil
import subprocess
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.prometheus import ALERTS, rules
from deploy.prometheus.__main__ import FILE
from deploy.prometheus.__main__ import main as write_rules
from deploy.prometheus.names import metrics_in

PROMTOOL = shutil.which("promtool")
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "alerts.md"
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")

RANK = 'run="r",rank="0",attempt="1",instance="a"'
COORDINATOR = 'run="r",rank="coordinator",attempt="0",instance="c"'


@dataclass(frozen=True)
class Case:
    """`series` in promtool's notation, a value a minute; a name without labels is rank 0's or, after `@`, the coordinator's."""

    alert: str
    why: str
    series: dict[str, str]
    at: str
    fires: bool

    def __str__(self) -> str:
        return f"{self.alert}-{'fires' if self.fires else 'silent'}-{self.why.replace(' ', '-')}"


def labelled(short: str) -> str:
    if "{" in short:
        base, _, rest = short.partition("{")
        own = rest.rstrip("}")
        if base == "up":
            return f"up{{{own}}}"
        where = COORDINATOR if base.startswith("@") else RANK
        return f"finetune_{base.lstrip('@')}{{{where if 'run=' not in own else own}{',' + own if 'run=' not in own else ''}}}"
    return f"finetune_{short.lstrip('@')}{{{COORDINATOR if short.startswith('@') else RANK}}}"


STEPS = "0+60x90"
STUCK = "0+60x10 600x80"
FIRES, SILENT = True, False
UP = {'up{run="r",rank="coordinator"}': "1x30", 'up{run="r",rank="0"}': "1x30"}
UP90 = {'up{run="r",rank="coordinator"}': "1x90"}


def since(state: str, namespace: str = "", instance: str = "c") -> str:
    """When a run came into a state."""
    return f'@run_state_time_seconds{{namespace="{namespace}",run="r",rank="coordinator",instance="{instance}",state="{state}"}}'


def at(state: str, namespace: str = "", instance: str = "c") -> str:
    """Whether it is in it."""
    return f'@run_state{{namespace="{namespace}",run="r",rank="coordinator",instance="{instance}",state="{state}"}}'


KILLED = {since("running"): "60x20 stale", at("running"): "1x20 stale"}


def ended(state: str, namespace: str = "") -> dict[str, str]:
    """A run of twenty minutes."""
    return {
        since("running", namespace): "60x21 stale",
        at("running", namespace): "1x19 0x1 stale",
        since(state, namespace): "_x19 1200x1 stale",
        at(state, namespace): "0x19 1x1 stale",
    }


def resumed(state: str, before: str = "_x29", running: str = "1800x60") -> dict[str, str]:
    """Half an hour after its beginning, by another coordinator; `finished` fifteen minutes later."""
    then = {since("running", instance="d"): f"{before} {running}", at("running", instance="d"): f"{before} {running}"}
    if state == "running":
        return then
    return {
        since("running", instance="d"): "_x29 1800x15 stale",
        at("running", instance="d"): "_x29 1x14 0x1 stale",
        since(state, instance="d"): "_x43 2700x1 stale",
        at(state, instance="d"): "_x29 0x14 1x1 stale",
    }


def taken_over(namespace: str = "") -> dict[str, str]:
    """After twenty minutes it learns that another command goes on with it, since its fifteenth."""
    return {
        since("running", namespace): "60x21 stale",
        at("running", namespace): "1x19 0x1 stale",
        since("taken_over", namespace): "_x19 61x1 stale",
        at("taken_over", namespace): "0x19 1x1 stale",
    }


CASES = (
    Case("FinetuneStalled", "in the middle of an epoch", {"steps_total": STUCK, "epoch": "0+.03x10 2.5x80"}, "30m", FIRES),
    Case("FinetuneStalled", "steps go on", {"steps_total": STEPS, "epoch": "0+.03x90"}, "30m", SILENT),
    Case("FinetuneStalled", "evaluation at an epoch's end", {"steps_total": STUCK, "epoch": "0+.1x10 1x80"}, "30m", SILENT),
    Case("FinetuneStalled", "start and compilation", {"steps_total": "0x90"}, "30m", SILENT),
    Case(
        "FinetuneStalled",
        "all steps are done",
        {"steps_total": STUCK, "epoch": "0+.03x10 2.5x80", "step": "600x90", "planned_steps": "600x90"},
        "30m",
        SILENT,
    ),
    Case("FinetuneStalled", "finished", {"steps_total": "0+60x10 stale", "epoch": "0+.03x10 stale"}, "30m", SILENT),
    Case("FinetuneNoProgress", "no room for workers", {"@workers": "2x90", "steps_total": "0+60x10 stale"}, "50m", FIRES),
    Case("FinetuneNoProgress", "never a step", {"@workers": "2x90"}, "40m", FIRES),
    Case("FinetuneNoProgress", "a start of ten minutes", {"@workers": "2x90"}, "20m", SILENT),
    Case("FinetuneNoProgress", "steps go on", {"@workers": "2x90", "steps_total": STEPS}, "50m", SILENT),
    Case("FinetuneNoProgress", "finished", {"@workers": "2x40 stale", "steps_total": "0+60x10 stale"}, "60m", SILENT),
    # The end of a run: `since` is when it came into a state, in seconds of the test. The targets go a scrape or two after the last one.
    Case("FinetuneRunFailed", "given up", ended("failed"), "25m", FIRES),
    Case("FinetuneRunFailed", "finished", ended("finished"), "25m", SILENT),
    Case("FinetuneRunFailed", "stopped", ended("stopped"), "25m", SILENT),
    Case("FinetuneRunFailed", "killed", KILLED, "25m", SILENT),
    Case("FinetuneRunFailed", "an hour ago", ended("failed"), "90m", SILENT),
    Case("FinetuneRunFailed", "resumed", ended("failed") | resumed("running"), "35m", SILENT),
    Case("FinetuneRunFailed", "resumed and finished", ended("failed") | resumed("finished"), "60m", SILENT),
    Case("FinetuneRunFailed", "another user's of the same name", ended("failed") | ended("finished", "ann"), "25m", FIRES),
    Case("FinetuneRunVanished", "killed", KILLED, "25m", FIRES),
    Case("FinetuneRunVanished", "killed and still a target", KILLED | {'up{run="r",rank="coordinator"}': "1x20 0x70"}, "25m", FIRES),
    Case("FinetuneRunVanished", "running", {since("running"): "60x90", at("running"): "1x90"}, "25m", SILENT),
    Case("FinetuneRunVanished", "finished", ended("finished"), "25m", SILENT),
    Case("FinetuneRunVanished", "failed", ended("failed"), "25m", SILENT),
    Case("FinetuneRunVanished", "stopped", ended("stopped"), "25m", SILENT),
    Case("FinetuneRunVanished", "resumed at once", KILLED | resumed("running", "_x20"), "24m", SILENT),
    Case("FinetuneRunVanished", "resumed later", KILLED | resumed("running"), "35m", SILENT),
    Case("FinetuneRunVanished", "resumed and finished", KILLED | resumed("finished"), "60m", SILENT),
    Case(
        "FinetuneRunVanished", "killed once more after a stop", ended("stopped") | resumed("running", "_x30", "1800x5 stale"), "40m", FIRES
    ),
    Case("FinetuneRunVanished", "taken over", taken_over() | resumed("running", "_x15"), "25m", SILENT),
    Case("FinetuneRunVanished", "taken over by another user", taken_over("ann"), "25m", SILENT),
    Case("FinetuneRunVanished", "taken over and then killed", taken_over() | resumed("running", "_x15", "900x25 stale"), "50m", FIRES),
    Case("FinetuneRunFailed", "taken over by one that fails", taken_over() | resumed("failed"), "60m", FIRES),
    Case(
        "FinetuneRunVanished",
        "another user's of the same name goes on",
        KILLED | {since("running", "ann"): "60x90", at("running", "ann"): "1x90"},
        "25m",
        FIRES,
    ),
    Case("FinetuneRunStopped", "on a signal", ended("stopped"), "25m", FIRES),
    Case("FinetuneRunStopped", "finished", ended("finished"), "25m", SILENT),
    Case("FinetuneRunStopped", "goes on", ended("stopped") | resumed("running"), "35m", SILENT),
    Case("FinetuneTargetDown", "a rank of two", UP | {'up{run="r",rank="1"}': "1x10 0x20"}, "15m", FIRES),
    Case("FinetuneTargetDown", "one scrape failed", UP | {'up{run="r",rank="1"}': "1x10 0 1x20"}, "11m", SILENT),
    Case("FinetuneTargetDown", "given up by the run", UP | {'up{run="r",rank="1"}': "1x10 stale"}, "15m", SILENT),
    Case("FinetuneTargetDown", "somebody else's", UP | {'up{job="node"}': "1x10 0x20"}, "15m", SILENT),
    Case("FinetuneTargetDown", "finished", {'up{run="r",rank="coordinator"}': "1x10 0 stale"}, "13m", SILENT),
    Case(
        "FinetuneTargetDown", "killed", {'up{run="r",rank="coordinator"}': "1x10 0x20", 'up{run="r",rank="0"}': "1x10 0x20"}, "15m", SILENT
    ),
    Case(
        "FinetuneTargetDown",
        "one of many",
        UP | {f'up{{run="r",rank="{n}"}}': "1x30" for n in range(1, 20)} | {'up{run="r",rank="20"}': "1x10 0x20"},
        "15m",
        SILENT,
    ),
    Case("FinetuneTargetUnreachable", "a new run", {'up{run="r",rank="coordinator"}': "0x30"}, "15m", FIRES),
    Case("FinetuneTargetUnreachable", "a rank of a run that answers", UP90 | {'up{run="r",rank="1"}': "0x90"}, "85m", FIRES),
    Case("FinetuneTargetUnreachable", "reached before", {'up{run="r",rank="1"}': "1x10 0x20"}, "25m", SILENT),
    Case("FinetuneTargetUnreachable", "killed long ago", {'up{run="r",rank="coordinator"}': "1x10 0x170"}, "150m", SILENT),
    Case("FinetuneCrashLoop", "three in 15 minutes", {'@restarts_total{kind="infrastructure"}': "0x10 1 2 3x80"}, "14m", FIRES),
    Case("FinetuneCrashLoop", "two and no commit", {'@restarts_total{kind="infrastructure"}': "0x10 1 2x80"}, "14m", FIRES),
    Case(
        "FinetuneCrashLoop",
        "two and commits",
        {'@restarts_total{kind="infrastructure"}': "0x10 1 2x80", "@checkpoint_commit_seconds_count": "0+1x90"},
        "14m",
        SILENT,
    ),
    Case("FinetuneCrashLoop", "an elastic run grows", {'@restarts_total{kind="grow"}': "0x10 1 2 3 4x80"}, "15m", SILENT),
    Case("FinetuneCrashLoop", "Prometheus was started late", {'@restarts_total{kind="hang"}': "7x90"}, "14m", SILENT),
    Case("FinetuneRestarted", "one", {'@restarts_total{kind="hang"}': "0x10 1x80"}, "14m", FIRES),
    Case("FinetuneRestarted", "long ago", {'@restarts_total{kind="hang"}': "0x10 1x80"}, "40m", SILENT),
    Case("FinetuneRestarted", "an elastic run grows", {'@restarts_total{kind="grow"}': "0x10 1x80"}, "14m", SILENT),
    Case("FinetuneNonFiniteLoss", "NaN", {"loss": "1x10 NaN NaN NaN"}, "12m", FIRES),
    Case("FinetuneNonFiniteLoss", "infinite gradient", {"loss": "1x20", "gradient_norm": "1x10 Inf Inf Inf"}, "12m", FIRES),
    Case("FinetuneNonFiniteLoss", "finite", {"loss": "1x20", "gradient_norm": "1x20", "test_loss": "2x20"}, "12m", SILENT),
    Case("FinetuneRollback", "one", {"@rollbacks_total": "0x10 1x80"}, "14m", FIRES),
    Case("FinetuneRollback", "none", {"@rollbacks_total": "0x90"}, "14m", SILENT),
    Case("FinetuneGoodputLow", "after an hour", {"@goodput_ratio": "0.5x90", '@run_seconds{cause="steps"}': "3000+60x90"}, "60m", FIRES),
    Case("FinetuneGoodputLow", "a start", {"@goodput_ratio": "0.5x90", '@run_seconds{cause="start_up"}': "0+60x90"}, "30m", SILENT),
    Case("FinetuneGoodputLow", "good", {"@goodput_ratio": "0.95x90", '@run_seconds{cause="steps"}': "3000+60x90"}, "60m", SILENT),
    Case("FinetuneDataWait", "half", {"data_wait_seconds_total": "0+30x90", "step_seconds_sum": "0+60x90"}, "30m", FIRES),
    Case("FinetuneDataWait", "a tenth", {"data_wait_seconds_total": "0+6x90", "step_seconds_sum": "0+60x90"}, "30m", SILENT),
    Case("FinetuneDataWait", "first minutes", {"data_wait_seconds_total": "0+30x90", "step_seconds_sum": "0+60x90"}, "8m", SILENT),
    Case("FinetuneStraggler", "twice as slow", {"@straggler_skew_ratio": "2x90"}, "10m", FIRES),
    Case("FinetuneStraggler", "for a moment", {"@straggler_skew_ratio": "1x5 2x2 1x90"}, "8m", SILENT),
    Case("FinetuneCheckpointAge", "never saved", {"start_time_seconds": "0x90", "step": "0+60x90"}, "40m", FIRES),
    Case(
        "FinetuneCheckpointAge",
        "saved long ago",
        {"start_time_seconds": "0x90", "step": "0+60x90", "@checkpoint_commit_time_seconds": "300x90", "@checkpoint_commit_step": "300x90"},
        "40m",
        FIRES,
    ),
    Case(
        "FinetuneCheckpointAge",
        "resumed from a commit of last week",
        {
            "start_time_seconds": "0x90",
            "step": "0+60x90",
            "@checkpoint_commit_time_seconds": "-600000x90",
            "@checkpoint_commit_step": "0x90",
        },
        "20m",
        SILENT,
    ),
    Case(
        "FinetuneCheckpointAge",
        "a long evaluation after a commit",
        {"start_time_seconds": "0x90", "step": "300x90", "@checkpoint_commit_time_seconds": "300x90", "@checkpoint_commit_step": "300x90"},
        "60m",
        SILENT,
    ),
    Case("FinetuneCheckpointFailing", "one", {"@checkpoint_failures_total": "0x10 1x80"}, "14m", FIRES),
    Case("FinetuneCheckpointFailing", "none", {"@checkpoint_failures_total": "0x90"}, "14m", SILENT),
    Case("FinetuneCheckpointStall", "a third", {"checkpoint_stall_seconds_total": "0+20x90", "step_seconds_sum": "0+40x90"}, "40m", FIRES),
    Case(
        "FinetuneCheckpointStall",
        "a hundredth",
        {"checkpoint_stall_seconds_total": "0+.6x90", "step_seconds_sum": "0+59x90"},
        "40m",
        SILENT,
    ),
    Case("FinetuneStorageAway", "for minutes", {"@storage_waiting_seconds": "_x10 0+60x80"}, "16m", FIRES),
    Case("FinetuneStorageAway", "for a minute", {"@storage_waiting_seconds": "_x10 30 60 90 0x80"}, "13m", SILENT),
    Case("FinetuneStorageAway", "it answers again", {"@storage_waiting_seconds": "0+60x10 0x80"}, "14m", SILENT),
    Case("FinetuneQuarantine", "a new one", {"@run_quarantined_samples": "0x10 1x80"}, "14m", FIRES),
    Case("FinetuneQuarantine", "none", {"@run_quarantined_samples": "0x90"}, "14m", SILENT),
    Case(
        "FinetuneQuarantine",
        "resumed with those of before",
        {
            '@run_quarantined_samples{run="r",rank="coordinator",instance="b"}': "3x10 stale",
            '@run_quarantined_samples{run="r",rank="coordinator",instance="c"}': "_x13 3x80",
        },
        "80m",
        SILENT,
    ),
    Case("FinetuneFewerWorkers", "for long", {"@workers": "4x10 2x90"}, "60m", FIRES),
    Case("FinetuneFewerWorkers", "a short while", {"@workers": "4x10 2x10 4x90"}, "45m", SILENT),
    Case("FinetuneGpuIdle", "a tenth", {"gpu_utilization_ratio": "0.1x90", "steps_total": STEPS}, "40m", FIRES),
    Case("FinetuneGpuIdle", "busy", {"gpu_utilization_ratio": "0.9x90", "steps_total": STEPS}, "40m", SILENT),
    Case("FinetuneGpuIdle", "no steps yet", {"gpu_utilization_ratio": "0.0x90", "steps_total": "0x90"}, "40m", SILENT),
)


def test_the_committed_rules_are_what_the_code_says(tmp_path: Path) -> None:
    assert write_rules(["--check"]) == 0
    (tmp_path / "alerts.yml").write_text(FILE.read_text().replace("> 0.3", "> 0.4"))
    assert write_rules(["--check", "--out", str(tmp_path / "alerts.yml")]) == 1


def test_every_alert_names_real_metrics_and_has_a_runbook_entry() -> None:
    assert metrics_in(FILE.read_text())
    entries = [line.removeprefix("### ") for line in RUNBOOK.read_text().splitlines() if line.startswith("### ")]
    assert entries == [alert.name for alert in ALERTS]
    for rule in yaml.safe_load(rules())["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
        assert "$value" in rule["annotations"]["description"] + rule["annotations"]["summary"]
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (urllib.parse.urlsplit(page).scheme, anchor) == ("https", rule["alert"].lower())
        assert rule["expr"].count("by (cluster, namespace, run") == rule["expr"].count(" by (") > 0  # who routes by them finds them
        assert rule["expr"].count("on (cluster, namespace, run)") == rule["expr"].count(" on (")


def test_a_runbook_is_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "alerts.yml"
    assert write_rules(["--out", str(out), "--runbook", "docs/alerts.md"]) == 2
    assert "'docs/alerts.md' is no URL" in capsys.readouterr().err
    assert write_rules(["--out", str(out), "--runbook", "https://wiki.example.org/alerts"]) == 0
    assert 'runbook_url: "https://wiki.example.org/alerts#finetunestalled"' in out.read_text()


def test_every_alert_is_tried_firing_and_silent() -> None:
    assert {(case.alert, case.fires) for case in CASES} == {(alert.name, fires) for alert in ALERTS for fires in (True, False)}


@needs_promtool
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_promtool_accepts_the_rules(tmp_path: Path, scale: float) -> None:
    (tmp_path / "alerts.yml").write_text(rules(time_scale=scale, scrape_seconds=1.0))
    checked = subprocess.run([str(PROMTOOL), "check", "rules", str(tmp_path / "alerts.yml")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_scaled_rules_are_the_same_but_for_their_times() -> None:
    whole, short = (yaml.safe_load(rules(time_scale=scale, scrape_seconds=1.0))["groups"][0]["rules"] for scale in (1.0, 0.01))
    assert [rule["alert"] for rule in whole] == [rule["alert"] for rule in short]
    assert [rule["annotations"] for rule in whole] == [rule["annotations"] for rule in short]
    stalled = next(rule for rule in short if rule["alert"] == "FinetuneStalled")
    assert (stalled["for"], "[6s]" in stalled["expr"]) == ("600ms", True)
    with pytest.raises(ValueError, match="time_scale=0 must be above 0"):
        rules(time_scale=0)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    # Each alert by itself: a case that evaluates all the others too takes twenty times as long.
    whole = yaml.safe_load(rules())
    files = []
    for rule in whole["groups"][0]["rules"]:
        name = rule["alert"]
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump({"groups": [{"name": "finetune", "interval": "1m", "rules": [rule]}]}))
        tests = [tried_by_promtool(case) for case in CASES if case.alert == name]
        files.append(tmp_path / f"tests-{name}.yml")
        files[-1].write_text(yaml.safe_dump({"rule_files": [f"{name}.yml"], "evaluation_interval": "1m", "tests": tests}))
    tried = subprocess.run([str(PROMTOOL), "test", "rules", *map(str, files)], capture_output=True, text=True, timeout=120, check=False)
    assert tried.returncode == 0, tried.stdout + tried.stderr


def tried_by_promtool(case: Case) -> dict[str, Any]:
    return {
        "name": str(case),
        "interval": "1m",
        "input_series": [{"series": labelled(name), "values": values} for name, values in case.series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": case.at,
                "exp_samples": [{"labels": "{}", "value": int(case.fires)}],
            }
        ],
    }
