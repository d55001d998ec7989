"""A run that is tracked while it trains (`--track`), as a user starts it. What becomes of trackers is in tests/trainer/test_trackers.py."""

from pathlib import Path

import pytest

from tests.e2e.running import Run, processes_of_session
from tests.trainer.test_track import records


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_and_its_tracker_end_together(images: Path, tmp_path: Path) -> None:
    run = Run("--track", "tensorboard", "--train.max-steps", "12", storage=tmp_path, name="pets", data=images)
    assert run.finish() == 0, run.output()
    assert "tensorboard: pets: finished; tensorboard has all of it" in run.output()
    assert processes_of_session(run.process.pid) == []
    tags = {value.tag for event in records(run.folder / "tensorboard") for value in event.summary.value}
    assert {"train/loss", "test/accuracy"} <= tags
