"""What a rank says of each step to the heartbeat, the curves and the journal; what an attempt does after which step."""

import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from cluster.metrics import Metrics
from tests.trainer.test_meter import stats_of
from trainer.learn.semi import COUNT, NUMBERS, USED, WEIGHT
from trainer.rank.history import Curves, History, Speed
from trainer.rank.observers import BeatStats, Comparison, CurveLog, FirstStep, GuessWatch
from trainer.rank.step_plan import StepPlan
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig
from trainer.tasks.info import CLASSIFICATION, Measure, TaskInfo

TAGGING = TaskInfo(name="multilabel", measures=(Measure(name="map", title="mAP"), Measure(name="f1", title="F1")), panels=())


def test_what_guesses_come_to_is_in_the_curves_row_of_the_step_and_told_to_prometheus() -> None:
    metrics, semi = Metrics("run", 0, 1), SimpleNamespace(newest=torch.zeros(NUMBERS))
    watch = GuessWatch(semi, StepPlan.of(RunConfig(), 10, start_step=0), metrics)  # type: ignore[arg-type]
    for step, (count, used, weight) in enumerate([(10.0, 4.0, 5.0), (0.0, 0.0, 0.0), (8.0, 8.0, 2.0)]):
        semi.newest = torch.zeros(NUMBERS)
        semi.newest[[COUNT, USED, WEIGHT]] = torch.tensor([count, used, weight])
        watch.stepped(stats_of(step))
    assert "unlabelled_used_ratio{" not in generate_latest(metrics.registry).decode(), "before a loss has arrived"
    assert watch.at(0) == {"unlabelled_used": pytest.approx(0.4), "unlabelled_weight": pytest.approx(0.5)}
    assert watch.at(1) == {"unlabelled_used": 0, "unlabelled_weight": 0}, "a step without such images"
    assert watch.at(2) == {"unlabelled_used": 1, "unlabelled_weight": 0.25}
    assert watch.at(2) == {}
    told = generate_latest(metrics.registry).decode()
    for name, value in (("used", "1.0"), ("weight", "0.25")):
        assert re.search(rf"^finetune_unlabelled_{name}_ratio{{[^}}]*}} {value}$", told, re.M)


class Calls:
    """Stands for any part: notes its calls."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **fields: self.made.append((name, *args, *fields.items()))


def beat(info: TaskInfo, entry: dict[str, Any] | None) -> dict[str, float]:
    heartbeat, history = Calls(), History()
    observer = BeatStats(heartbeat, history, Speed(), info)  # type: ignore[arg-type]
    if entry is not None:
        history.evaluated(entry, 1.0)
    observer.stepped(stats_of(0, step_seconds=2.0, exchange_seconds=0.5))
    observer.stepped(stats_of(1, step_seconds=2.0, exchange_seconds=0.25))
    assert [made[:2] for made in heartbeat.made] == [("progress", 1), ("progress", 2)]
    newest: dict[str, float] = heartbeat.made[-1][2]
    assert ("own_seconds", 1.5 + 1.75) in heartbeat.made[-1]
    return newest


def test_where_the_device_knows_a_ranks_own_seconds_the_hosts_do_not_count() -> None:
    heartbeat, seconds = Calls(), iter([0.0, 0.75])
    observer = BeatStats(heartbeat, History(), Speed(), CLASSIFICATION, device_seconds=lambda: next(seconds))  # type: ignore[arg-type]
    for step in range(2):
        observer.stepped(stats_of(step, step_seconds=2.0))
    assert [dict(made[3:])["own_seconds"] for made in heartbeat.made] == [0.0, 0.75]


def test_a_beat_carries_the_tasks_headline_and_an_accuracy_where_the_task_has_one() -> None:
    told = beat(CLASSIFICATION, {"test_loss": 0.5, "test_accuracy": 0.75})
    assert (told["test_headline"], told["test_accuracy"]) == (0.75, 0.75)
    before = beat(CLASSIFICATION, None)
    assert math.isnan(before["test_headline"])
    assert math.isnan(before["test_accuracy"])
    told = beat(TAGGING, {"test_loss": 0.5, "test_map": 0.25, "test_f1": 0.5})
    assert told["test_headline"] == 0.25
    assert "test_accuracy" not in told


@pytest.mark.parametrize("total_steps", [10, 1999, 2000, 5000])
def test_a_runs_curve_has_at_most_some_2000_rows(total_steps: int) -> None:
    curves = Curves()
    plan = StepPlan(start_step=0, total_steps=total_steps, steps_per_epoch=10, eval_every_epochs=1)
    log = CurveLog(curves, Speed(), plan, attempt=3)
    for step in range(total_steps):
        log.stepped(stats_of(step, losses=((step, 0.5),)))
    every = max(1, total_steps // 2000)
    rows = pq.read_table(io.BytesIO(curves.to_parquet())).to_pylist()
    assert [(row["step"], row["epoch"], row["attempt"]) for row in rows] == [(step, step / 10, 3) for step in range(0, total_steps, every)]
    assert len(rows) < 4000


def test_the_first_step_of_an_attempt_is_told_once() -> None:
    told = Calls()
    me = SimpleNamespace(tell=told.told, world_size=4)
    first = FirstStep(me, 20)  # type: ignore[arg-type]
    for step in range(20, 24):
        first.stepped(stats_of(step))
    assert told.made == [("told", "first_step", ("step", 21), ("workers", 4))]


def test_weights_are_compared_every_so_many_steps_and_verdicts_taken_in_after_each() -> None:
    check = Calls()
    comparison = Comparison(check, every=3)  # type: ignore[arg-type]
    for step in range(6):
        comparison.stepped(stats_of(step))
    assert check.made == [("poll",), ("poll",), ("start", 3), ("poll",), ("poll",), ("poll",), ("start", 6), ("poll",)]


@given(start=st.integers(0, 40), epochs=st.integers(1, 5), steps=st.integers(1, 8), every=st.integers(1, 3), probe=st.integers(0, 5))
def test_phases_are_all_steps_that_are_left_once_and_evaluations_come_at_ends_of_epochs(
    start: int, epochs: int, steps: int, every: int, probe: int
) -> None:
    model = ModelConfig(freeze="lp-ft" if probe else "none", lp_epochs=max(1, probe))
    config = RunConfig(model=model, train=replace(TrainConfig(), epochs=epochs, eval_every_epochs=every))
    plan = StepPlan.of(config, steps, start_step=start)
    assert [step for first, last in plan.phases() for step in range(first, last)] == list(range(start, epochs * steps))
    assert not any(first < thaw < last for first, last in plan.phases() for thaw in plan.thaws)
    evaluated = [done for done in range(1, epochs * steps + 1) if plan.evaluates(done)]
    assert evaluated == sorted({*range(every * steps, epochs * steps + 1, every * steps), epochs * steps})
