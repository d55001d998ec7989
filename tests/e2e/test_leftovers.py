"""A run leaves no process and no folder of Ray behind."""

import tempfile
from pathlib import Path

import pytest

from tests.e2e.running import Run


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_local_run_leaves_no_process_and_no_temporary_folder(tmp_path: Path, images: Path) -> None:
    run = Run("--train.max-steps", "2", "--data.max-bad-fraction", "0.01", storage=tmp_path, name="tidy", data=images)
    driver = run.process.pid
    run.wait_for("training_started")
    assert list(Path(tempfile.gettempdir()).glob(f"finetune-ray-{driver}-*"))
    assert run.finish() == 0, run.output()
    assert not list(Path(tempfile.gettempdir()).glob(f"finetune-ray-{driver}-*"))
    # The run was a session of its own: whoever is still in it was left behind.
    left = [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and _session(p) == driver]
    assert left == []


def _session(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None
