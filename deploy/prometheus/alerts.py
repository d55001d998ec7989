"""Alerts as code: when somebody should look at a run. `rules()` returns the text of alerts.yml; docs/alerts.md says what to do.

Every expression yields one series per run, so a cluster of 1,000 ranks that fails as a whole raises one alert. A run is known by its name,
its namespace, and the cluster where a label says it: two users' runs of one name are two, and Alertmanager can route by any of them.
Windows are long enough that a start, an evaluation, a compilation or a change of the number of workers raises none. Expressions sum over
attempts, because each attempt's series have their own labels. What a run repairs by itself is at most a warning; that it ended badly is
critical. Alertmanager decides who gets an alert.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deploy.prometheus.names import fill

RUNBOOK = "https://docs.example.com/ray-finetune/alerts.md"
"""Where docs/alerts.md is to be read: a placeholder, as registry.example.com is one; `--runbook URL` puts yours in its place."""
K = "cluster, namespace, run"
"""What tells runs apart."""
NAME = "{{ with $labels.namespace }}{{ . }}/{{ end }}{{ $labels.run }}"
ENDED_SECONDS = 3600
"""How long an end is told, unless the run goes on."""
SCRAPE_SECONDS = 5.0
"""The scrape interval in prometheus.yml."""
EVALUATION_SECONDS = 15.0
MENDED = "grow|preempted"
"""Kinds of restarts that are not failures."""


class Clock:
    """Durations of the rules, all scaled by the same factor, so that a test can try an hour's alert in a minute."""

    def __init__(self, time_scale: float, scrape_seconds: float) -> None:
        self._scale, self._shortest = time_scale, 4 * scrape_seconds

    def window(self, seconds: float) -> str:
        """Length of a range selector; never so short that a rate has fewer than four scrapes."""
        return _duration(max(seconds * self._scale, self._shortest))

    def after(self, seconds: float) -> str:
        """A duration for which a state lasts."""
        return _duration(seconds * self._scale)

    def seconds(self, seconds: float) -> str:
        """The duration as a number."""
        return f"{seconds * self._scale:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """A rule. `{loss}` in an expression is a metric's name without its prefix."""

    name: str
    severity: Literal["critical", "warning", "info"]
    expr: Callable[[Clock], str]
    for_seconds: float
    summary: str
    description: str

    @property
    def anchor(self) -> str:
        """Anchor of its heading in docs/alerts.md."""
        return self.name.lower()


def last_in(clock: Clock, states: str) -> str:
    """When runs that were read lately came into one of these states last, by a matcher's second half."""
    return f"max by ({K}) (max_over_time({{run_state_time_seconds}}{{state{states}}}[{clock.window(ENDED_SECONDS)}]))"


ALERTS: tuple[Alert, ...] = (
    Alert(
        name="FinetuneStalled",
        severity="critical",
        # Evaluations run at the end of each epoch; a run that has done all its steps exports. FinetuneNoProgress covers a run that hangs in
        # either.
        expr=lambda c: (
            f"""
            sum by ({K}) (increase({{steps_total}}[{c.window(600)}])) == 0
            and on ({K}) max by ({K}) ({{steps_total}}) > 0
            unless on ({K}) max by ({K}) ({{epoch}}) % 1 == 0
            unless on ({K}) max by ({K}) ({{step}}) >= max by ({K}) ({{planned_steps}})"""
        ),
        for_seconds=60,
        summary="Run {run} makes no steps",
        description="Its ranks answer, but no rank has made a step for ten minutes in the middle of an epoch, {{ $value }} steps in all.",
    ),
    Alert(
        name="FinetuneNoProgress",
        severity="critical",
        expr=lambda c: (
            f"""
            (sum by ({K}) (increase({{steps_total}}[{c.window(1500)}])) or sum by ({K}) ({{workers}}) * 0) == 0
            and on ({K}) max by ({K}) ({{workers}} offset {c.window(1500)})"""
        ),
        for_seconds=300,
        summary="Run {run} gets nowhere",
        description="Its coordinator lives, and in half an hour there were {{ $value }} steps: a start, a recovery or an evaluation "
        "hangs, or the cluster has no room for its workers.",
    ),
    Alert(
        name="FinetuneRunFailed",
        severity="critical",
        expr=lambda c: (
            f"""
            {last_in(c, '="failed"')} > {last_in(c, '!="failed"')}"""
        ),
        for_seconds=0,
        summary="Run {run} has failed",
        description="It was given up at {{ $value | humanizeTimestamp }}, and says why in its log and journal. Once the cause is mended, "
        "the same command goes on from the newest checkpoint.",
    ),
    Alert(
        name="FinetuneRunVanished",
        severity="critical",
        expr=lambda c: (
            f"""
            (
              {last_in(c, '="running"')}
              unless on ({K}) {last_in(c, '!="running"')} > {last_in(c, '="running"')}
            )
            unless on ({K}) max by ({K}) ({{run_state}})"""
        ),
        for_seconds=120,
        summary="Run {run} has vanished",
        description="It ran since {{ $value | humanizeTimestamp }} and has not said how it ended: its driver was killed, its node is "
        "gone, or Prometheus does not reach it any more. The same command goes on from the newest checkpoint.",
    ),
    Alert(
        name="FinetuneRunStopped",
        severity="info",
        expr=lambda c: (
            f"""
            {last_in(c, '="stopped"')} > {last_in(c, '!="stopped"')}"""
        ),
        for_seconds=0,
        summary="Run {run} was stopped before its end",
        description="On a signal, at {{ $value | humanizeTimestamp }}. The same command goes on.",
    ),
    Alert(
        name="FinetuneTargetDown",
        severity="warning",
        # Of a run whose coordinator answers: it takes a lost rank off the list by itself. For the others there is FinetuneRunVanished.
        expr=lambda c: (
            f"""
            count by ({K}) (up{{run!=""}} == 0 and max_over_time(up{{run!=""}}[{c.window(3600)}]) > 0)
            / count by ({K}) (up{{run!=""}}) > 0.1
            and on ({K}) max by ({K}) (up{{run!="",rank="coordinator"}}) == 1"""
        ),
        for_seconds=120,
        summary="{{ $value | humanizePercentage }} of run {run}'s processes do not answer",
        description='Prometheus cannot scrape them any more: rank{{ range query (printf "topk(5, up{namespace=%q,run=%q} == 0)" '
        "$labels.namespace $labels.run) }} {{ .Labels.rank }}{{ end }}. A rank that the run itself has given up is no target any more.",
    ),
    Alert(
        name="FinetuneTargetUnreachable",
        severity="warning",
        # Those of a run that answers otherwise; and those that are new. What was left by a killed run is neither.
        expr=lambda c: (
            f"""
            count by ({K}) (
              (up{{run!=""}} == 0 unless max_over_time(up{{run!=""}}[{c.window(3600)}]) > 0)
              and on ({K}) max by ({K}) (up{{run!="",rank="coordinator"}}) == 1
              or (up{{run!=""}} == 0 unless max_over_time(up{{run!=""}}[{c.window(3600)}]) > 0 unless up{{run!=""}} offset {c.after(3600)})
            )"""
        ),
        for_seconds=600,
        summary="{{ $value }} process(es) of run {run} were never reached",
        description="Prometheus knows {{ $value }} addresses of this run of which none has answered: they are out of its reach.",
    ),
    Alert(
        name="FinetuneCrashLoop",
        severity="critical",
        # The run gives up after three attempts without a commit, so two are already late.
        expr=lambda c: (
            f"""
            round(sum by ({K}) (increase({{restarts_total}}{{kind!~"{MENDED}"}}[{c.window(900)}]))) >= 3
            or (
              round(sum by ({K}) (increase({{restarts_total}}{{kind!~"{MENDED}"}}[{c.window(900)}]))) >= 2
              unless on ({K}) sum by ({K}) (increase({{checkpoint_commit_seconds_count}}[{c.window(900)}])) > 0
            )"""
        ),
        for_seconds=0,
        summary="Run {run} fails again and again",
        description="{{ $value }} restarts after failures in 15 minutes. It gives up when its budget (cluster.faults) is spent.",
    ),
    Alert(
        name="FinetuneRestarted",
        severity="info",
        expr=lambda c: (
            f"""
            round(sum by ({K}, kind) (increase({{restarts_total}}{{kind!="grow"}}[{c.window(600)}]))) > 0"""
        ),
        for_seconds=0,
        summary="Run {run} was restarted: {{ $labels.kind }}",
        description="{{ $value }} restart(s) in ten minutes because of {{ $labels.kind }}; the run goes on from its newest checkpoint.",
    ),
    Alert(
        name="FinetuneNonFiniteLoss",
        severity="critical",
        expr=lambda _: (
            f"""
            count by ({K}) (
              {{loss}} != {{loss}} or abs({{loss}}) == Inf
              or {{test_loss}} != {{test_loss}} or abs({{test_loss}}) == Inf
              or {{validation_loss}} != {{validation_loss}} or abs({{validation_loss}}) == Inf
              or {{gradient_norm}} != {{gradient_norm}} or abs({{gradient_norm}}) == Inf
            )"""
        ),
        for_seconds=0,
        summary="Loss or gradient of run {run} is not a number",
        description="NaN or infinity on {{ $value }} rank(s).",
    ),
    Alert(
        name="FinetuneRollback",
        severity="warning",
        expr=lambda c: (
            f"""
            round(sum by ({K}) (increase({{rollbacks_total}}[{c.window(1800)}]))) > 0"""
        ),
        for_seconds=0,
        summary="Run {run} went back to an older checkpoint",
        description="{{ $value }} time(s) in half an hour, because of wrong numbers: NaN, a spike of the loss, or weights that differ.",
    ),
    Alert(
        name="FinetuneGoodputLow",
        severity="warning",
        expr=lambda c: (
            f"""
            min by ({K}) ({{goodput_ratio}}) < 0.9
            and on ({K}) sum by ({K}) ({{run_seconds}}) > {c.seconds(3600)}"""
        ),
        for_seconds=600,
        summary="Run {run} wastes time",
        description="Only {{ $value | humanizePercentage }} of its time are useful steps. Most of the rest:"
        '{{ range query (printf "topk(3, sum by (cause) (%s{namespace=%q,run=%q,cause!=\\"steps\\"}))" "{run_seconds}" '
        "$labels.namespace $labels.run) }} "
        '{{ reReplaceAll "_" " " .Labels.cause }} {{ .Value | humanizeDuration }}{{ end }}.',
    ),
    Alert(
        name="FinetuneDataWait",
        severity="warning",
        expr=lambda c: (
            f"""
            sum by ({K}) (rate({{data_wait_seconds_total}}[{c.window(300)}]))
            / sum by ({K}) (rate({{step_seconds_sum}}[{c.window(300)}])) > 0.3"""
        ),
        for_seconds=600,
        summary="Run {run} waits for data",
        description="{{ $value | humanizePercentage }} of the steps' time is spent waiting for batches; 30 % is the limit.",
    ),
    Alert(
        name="FinetuneStraggler",
        severity="warning",
        expr=lambda _: (
            f"""
            max by ({K}) ({{straggler_skew_ratio}}) > 1.5"""
        ),
        for_seconds=300,
        summary="A rank holds up run {run}",
        description="The slowest rank takes {{ $value | humanize }} times the median's time for a step: rank"
        '{{ range query (printf "topk(1, sum by (rank) (rate(%s{namespace=%q,run=%q}[5m])))" "{compute_seconds_total}" '
        "$labels.namespace $labels.run) }} "
        "{{ .Labels.rank }}{{ end }}.",
    ),
    Alert(
        name="FinetuneCheckpointAge",
        severity="warning",
        # Counted from the start of the ranks if the newest commit is older, and only if there are steps that it lacks.
        expr=lambda c: (
            f"""
            time() - max by ({K}) ({{checkpoint_commit_time_seconds}} or {{start_time_seconds}}) > {c.seconds(1800)}
            and on ({K}) max by ({K}) ({{step}})
            unless on ({K}) max by ({K}) ({{step}}) <= max by ({K}) ({{checkpoint_commit_step}})"""
        ),
        for_seconds=60,
        summary="Run {run} has not saved for long",
        description="{{ $value | humanizeDuration }} of work are in no checkpoint.",
    ),
    Alert(
        name="FinetuneCheckpointFailing",
        severity="warning",
        expr=lambda c: (
            f"""
            round(sum by ({K}) (increase({{checkpoint_failures_total}}[{c.window(900)}]))) > 0"""
        ),
        for_seconds=0,
        summary="Checkpoints of run {run} fail",
        description="{{ $value }} in 15 minutes. Training goes on; what it would lose grows.",
    ),
    Alert(
        name="FinetuneCheckpointStall",
        severity="warning",
        expr=lambda c: (
            f"""
            sum by ({K}) (rate({{checkpoint_stall_seconds_total}}[{c.window(900)}]))
            / (sum by ({K}) (rate({{step_seconds_sum}}[{c.window(900)}]))
            + sum by ({K}) (rate({{checkpoint_stall_seconds_total}}[{c.window(900)}]))) > 0.1"""
        ),
        for_seconds=900,
        summary="Steps of run {run} wait for checkpoints",
        description="{{ $value | humanizePercentage }} of the time goes to waiting for checkpoints.",
    ),
    Alert(
        name="FinetuneStorageAway",
        severity="warning",
        expr=lambda c: (
            f"""
            max by ({K}) ({{storage_waiting_seconds}}) > {c.seconds(120)}"""
        ),
        for_seconds=0,
        summary="The storage of run {run} does not answer",
        description="It has not for {{ $value | humanizeDuration }}. The run waits for it: steps go on, and what would be saved waits on "
        "the nodes' disks.",
    ),
    Alert(
        name="FinetuneQuarantine",
        severity="warning",
        # Taken over all coordinators of the run: a resumed run starts with the number that the previous one left.
        expr=lambda c: (
            f"""
            max by ({K}) ({{run_quarantined_samples}})
            - min_over_time(max by ({K}) ({{run_quarantined_samples}})[{c.window(3600)}:{c.window(60)}]) > 0"""
        ),
        for_seconds=0,
        summary="Run {run} leaves samples out",
        description="{{ $value }} more sample(s) could not be read within the last hour.",
    ),
    Alert(
        name="FinetuneFewerWorkers",
        severity="info",
        expr=lambda c: (
            f"""
            max by ({K}) ({{workers}}) < max by ({K}) (max_over_time({{workers}}[{c.window(21600)}]))"""
        ),
        for_seconds=1800,
        summary="Run {run} has fewer workers than it had",
        description="{{ $value }} workers for half an hour; it had more within six hours.",
    ),
    Alert(
        name="FinetuneGpuIdle",
        severity="warning",
        expr=lambda c: (
            f"""
            avg by ({K}) (avg_over_time({{gpu_utilization_ratio}}[{c.window(900)}])) < 0.3
            and on ({K}) sum by ({K}) (rate({{steps_total}}[{c.window(900)}])) > 0"""
        ),
        for_seconds=900,
        summary="GPUs of run {run} are mostly idle",
        description="A kernel ran on them in {{ $value | humanizePercentage }} of the time.",
    ),
)


def rules(*, time_scale: float = 1.0, scrape_seconds: float = SCRAPE_SECONDS, runbook: str = RUNBOOK) -> str:
    """The text of a rule file. `time_scale` scales every window, duration and age (0.01: what takes ten minutes fires after 6 s), so
    that a test sees real alerts fire. `scrape_seconds` is Prometheus's scrape interval there."""
    if not time_scale > 0:
        raise ValueError(f"time_scale={time_scale} must be above 0; 1 is the alerts as they are")
    clock = Clock(time_scale, scrape_seconds)
    head = [
        "# Written by `python -m deploy.prometheus` from deploy/prometheus/alerts.py; change that instead.",
        "groups:",
        "  - name: finetune",
        f"    interval: {_duration(max(1.0, EVALUATION_SECONDS * min(time_scale, 1.0)))}",
        "    rules:",
    ]
    return "\n".join([*head, *(line for alert in ALERTS for line in _rule(alert, clock, runbook))]) + "\n"


def _rule(alert: Alert, clock: Clock, runbook: str) -> list[str]:
    expression = fill(alert.expr(clock)).strip("\n").split("\n")
    indent = len(expression[0]) - len(expression[0].lstrip())
    return [
        f"      - alert: {alert.name}",
        "        expr: |",
        *(f"          {line[indent:]}" for line in expression),
        f"        for: {clock.after(alert.for_seconds)}",
        "        labels:",
        f"          severity: {alert.severity}",
        "        annotations:",
        f"          summary: {json.dumps(alert.summary.replace('{run}', NAME))}",
        f"          description: {json.dumps(_named(alert.description))}",
        f"          runbook_url: {json.dumps(f'{runbook}#{alert.anchor}')}",
    ]


def _named(description: str) -> str:
    """Fill in metric names, but only in quoted strings that hold nothing else: a template's own braces are doubled and stay."""
    parts = description.split('"')
    return '"'.join(fill(part) if part.startswith("{") and part.endswith("}") and "{{" not in part else part for part in parts)


def _duration(seconds: float) -> str:
    """The duration in Prometheus's notation."""
    milliseconds = round(seconds * 1000)
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms" if milliseconds else "0s"
