"""The GPU's claims are measured by code that nobody can run here; its rehearsal runs all of it, small, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_suite import CLAIMS
from tests.e2e.running import PROJECT


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_each_claim_about_a_gpu_runs_small_on_a_cpu(tmp_path: Path) -> None:
    out, keep = tmp_path / "suite.json", tmp_path / "kept"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--rehearse", "--keep", str(keep), "--out", str(out)]
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=1750, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert list(result["claims"]) == list(CLAIMS)
    for name, row in result["claims"].items():
        assert "failed" not in row, (name, row)
        assert "needs" not in row, (name, row)
        assert {each["name"] for each in row["targets"]} == set(CLAIMS[name].promises)
        assert all(each["met"] is None for each in row["targets"]), "a rehearsal judges nothing"
    assert result["targets"] == []
    assert len(result["claims"]["kernels"]["table"]["kernels"]) > 5
    assert result["claims"]["kernels"]["table"]["launches_a_step"] > 50
    assert json.loads((keep / "tutorial.json").read_text())["rates"], "the tutorial is measured once, for both claims"
