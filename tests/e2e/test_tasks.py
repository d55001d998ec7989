"""Several labels, several targets, and a task from outside the packages: trained, evaluated, predicted and reported by the commands.

The images are real (benchmarks.emoji): 64 pixels, with a category, a subcategory that some lack, any number of traits, and a number.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.emoji import TRAITS, prepare
from deploy.grafana import queries
from tests.e2e.running import PROJECT, Run
from tests.e2e.test_monitoring import get
from tests.ports import free_ports
from tests.prometheus import PROMETHEUS, Prometheus

MULTILABEL = ("--data.targets", "traits:labels", "--task.loss", "asymmetric")
MULTITASK = ("--data.targets", "category,subcategory,traits:labels,version:number", "--task.head-weights", "learned")
COMMON = (
    *("--train.virtual-ranks", "3", "--data.batch-size", "60", "--optim.lr", "0.005"),
    *("--train.max-steps", "24", "--train.checkpoint-every", "6"),
)
MEASURES = {"score", "category_accuracy", "subcategory_accuracy", "traits_map", "version_mae"}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return prepare(tmp_path_factory.mktemp("emoji"))
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the emoji cannot be had: {error}")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished(name: str, args: Sequence[str], *, runs: Path, data: Path, workers: int, kill: bool = False) -> Run:
    run = Run("--workers", str(workers), *COMMON, *args, storage=runs, name=name, data=data)
    try:
        if kill:
            run.wait_for("checkpoint_committed", step=6)
            run.kill_worker(1)
        assert run.finish(timeout=400) == 0, run.output()
    finally:
        run.kill()
    return run


def assert_the_same(runs: Sequence[Run], task: str) -> None:
    first, *others = (run.summary() for run in runs)
    assert first["task"]["name"] == task
    for other in others:
        assert other["weights_sha256"] == first["weights_sha256"]
        assert other["test_count"] == first["test_count"]
    assert [run.summary()["restarts"] for run in runs][:2] == [0, 1], "the second one was killed once"


def test_several_labels_end_in_the_same_bits_for_any_workers_and_in_a_table_of_labels(emoji: Path, runs: Path) -> None:
    made = [
        finished("labels-1", MULTILABEL, runs=runs, data=emoji, workers=1),
        finished("labels-3", MULTILABEL, runs=runs, data=emoji, workers=3, kill=True),
    ]
    assert_the_same(made, "multilabel")
    summary, folder = made[0].summary(), made[0].folder
    assert 0 <= summary["test_map"] <= 1
    assert {row["name"] for row in summary["labels"]} == set(TRAITS)
    assert all(row["support"] > 0 and 0 <= row["average_precision"] <= 1 for row in summary["labels"])

    evaluated = json.loads(command("trainer.evaluate", str(folder), "--json"))
    assert evaluated["map"] == pytest.approx(summary["test_map"], abs=1e-6)
    assert evaluated["map"] == evaluated["recorded_map"]
    (line,) = command("trainer.predict", str(folder), str(emoji.parent / "images" / "1f3c3.png"), "--json").splitlines()
    assert set(json.loads(line)) > {"image"}
    assert len(pq.read_table(folder / "predictions.parquet")) == summary["test_count"]
    page = (folder / "report.html").read_text()
    assert all(name in page for name in TRAITS)
    rows = [json.loads(line) for line in command("trainer.runs", "--storage", str(runs), "--json").splitlines()]
    (listed,) = (row for row in rows if row["run"] == "labels-1")
    assert (listed["task"], listed["headline_name"], listed["headline"]) == ("multilabel", "map", summary["test_map"])


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[Prometheus, int]]:
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    [port] = free_ports(1)
    server = Prometheus(tmp_path, port)
    yield server, port
    server.stop()


def test_several_targets_end_in_the_same_bits_for_any_workers_and_in_a_table_of_each_head(emoji: Path, runs: Path) -> None:
    made = [
        finished("heads-1", MULTITASK, runs=runs, data=emoji, workers=1),
        finished("heads-2", MULTITASK, runs=runs, data=emoji, workers=2, kill=True),
        finished("heads-3", MULTITASK, runs=runs, data=emoji, workers=3),
    ]
    assert_the_same(made, "multitask")
    summary, folder = made[0].summary(), made[0].folder
    heads: dict[str, Any] = summary["heads"]
    assert {name: head["kind"] for name, head in heads.items()} == {
        "category": "label",
        "subcategory": "label",
        "traits": "labels",
        "version": "number",
    }
    assert heads["subcategory"]["count"] < heads["category"]["count"] == summary["test_count"]
    assert {f"test_{name}" for name in MEASURES} <= summary.keys()
    assert len({head["weight"] for head in heads.values()}) > 1, "weights were to be learned"

    text = command("trainer.evaluate", str(folder))
    assert all(name in text for name in heads)
    said = command("trainer.predict", str(folder), str(emoji.parent / "images" / "1f3c3.png"))
    assert all(name in said for name in heads)
    page = (folder / "report.html").read_text()
    assert all(name in page for name in (*heads, *TRAITS))
    command("trainer.report", "--compare", str(folder), str(made[1].folder), "--out", str(runs / "compare.html"))


def test_a_tasks_own_measures_are_in_prometheus_and_on_the_dashboard(
    emoji: Path, tmp_path: Path, prometheus: tuple[Prometheus, int]
) -> None:
    server, port = prometheus
    run = Run(
        *("--workers", "1", "--train.epochs", "1000", "--cluster.discovery-port", str(port), "--data.test-fraction", "0.02"),
        *("--cluster.metrics-namespace", "ann", "--optim.lr", "0.005", *MULTITASK),
        storage=tmp_path / "runs",
        name="measured",
        data=emoji,
    )
    try:
        run.wait_for("evaluation", timeout=240)
        shown = {each.query for each in queries(run="measured", namespace="ann", rate_interval="5s") if each.panel == "Test measures"}
        (panel,) = (query for query in shown if "test_measure" in query)
        run._until(lambda: {"done": True} if server.query(panel) else None, "a line of the panel", 60)
        assert {row["metric"]["measure"] for row in server.query(panel)} >= MEASURES
        (rank,) = (target["targets"][0] for target in json.loads(get(f"127.0.0.1:{port}", "/sd")) if target["labels"]["rank"] == "0")
        assert "finetune_test_measure{" in get(rank, "/metrics")
    finally:
        run.kill()


def test_a_task_from_outside_the_packages_is_trained_evaluated_predicted_and_reported(images: Path, runs: Path) -> None:
    toy = ("--task.name", "tests.trainer.toy_task:Toy", "--data.max-bad-fraction", "0.01")
    run = Run("--workers", "2", "--train.epochs", "1", *toy, storage=runs, name="toy", data=images)
    assert run.finish(timeout=400) == 0, run.output()
    summary = run.summary()
    assert summary["task"]["name"] == "scale"
    assert 0 <= summary["test_within_one"] <= 1
    assert "within one step" in run.output()
    evaluated = command("trainer.evaluate", str(run.folder), "--data.max-bad-fraction", "0.01")
    assert "within one step" in evaluated.lower()
    image = next((images / "test").rglob("*.png"))
    assert "step " in command("trainer.predict", str(run.folder), str(image))
    os.remove(run.folder / "report.html")
    command("trainer.report", str(run.folder))
    assert "ithin one step" in (run.folder / "report.html").read_text()
