"""Two processes that drive the same run: the newer one goes on, the older one says so and ends."""

import json
from pathlib import Path

import pytest

from tests.e2e.running import Run

STEPS = 600


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_second_driver_takes_the_run_over_and_the_first_ends_with_a_message(tmp_path: Path, images: Path) -> None:
    args = ["--data.max-bad-fraction", "0.01", "--train.checkpoint-every", "5", "--train.max-steps", str(STEPS), "--train.epochs", "100"]
    first = Run(*args, storage=tmp_path, name="twice", data=images)
    first.wait_for("checkpoint_committed", step=5)
    second = Run(*args, storage=tmp_path, name="twice", data=images)
    assert first.finish() == 1, first.output()
    assert f"run twice was taken over by process {second.process.pid} on " in first.output()
    assert "--run NAME" in first.output()
    assert "Traceback" not in first.output()
    assert second.finish() == 0, second.output()

    generation = {event["attempt"]: event["generation"] for event in first.events() if event["event"] == "attempt_started"}
    assert sorted(generation.values()) == [1, 2]
    taken_over = second.wait_for("run_taken_over")["time"]
    late = [e for e in first.events() if e["event"] == "checkpoint_committed" and generation[e["attempt"]] == 1 and e["time"] > taken_over]
    assert late == []
    resumed = second.wait_for("resumed")["step"]
    assert 0 < resumed < STEPS
    claims = [json.loads((tmp_path / "twice" / "generations" / f"g{number:04d}").read_text()) for number in (1, 2)]
    commits = [json.loads(path.read_text()) for path in (tmp_path / "twice" / "checkpoints").glob("*/MANIFEST.json")]
    assert len(commits) == 3
    said = [*(claim["note"]["identity"] for claim in claims), *(commit["meta"]["identity"] for commit in commits)]
    assert all(identity == said[0] for identity in said)  # what the run is, claimed and in each commit
    summary = second.summary()
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
