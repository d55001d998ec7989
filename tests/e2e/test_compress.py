"""A compression of a real run: killed with SIGKILL in the middle of its fine-tuning, the same command goes on and ends in the same weights
and the same answers to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import PROJECT, kill_session
from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE
from trainer.settings.tree import ModelConfig

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")

NETWORK = ModelConfig(name="timm/test_efficientnet", weights="none", stem="native", image_size=40)
KILLED = "pruned"


def started(run: Path, storage: Path) -> "subprocess.Popen[bytes]":
    words = [
        *(sys.executable, "-m", "trainer.compress", str(run), "--storage", str(storage), "--run", "job", "--workers", "1"),
        *("--prune", "0.5", "--multiple", "1", "--teach", "--int8", "--max-drop", "100", "--calls", "3"),
        *("--train.max-steps", "12", "--train.checkpoint-every", "2", "--cluster.threads-per-worker", "1"),
    ]
    with (storage.parent / f"{storage.name}.log").open("ab") as log:
        return subprocess.Popen(words, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finished(run: Path, storage: Path) -> dict[str, Any]:
    process = started(run, storage)
    try:
        status = process.wait(timeout=900)
    finally:
        kill_session(process.pid)
    assert status == 0, (storage.parent / f"{storage.name}.log").read_text()
    found: dict[str, Any] = json.loads((storage / "job" / "compress.json").read_bytes())
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def answers(job: Path) -> dict[str, bytes]:
    """All that is a function of the weights."""
    return {str(path.relative_to(job)): path.read_bytes() for path in sorted((job / "stages").iterdir())} | {
        name: (job / name).read_bytes()
        for name in ("pruned/model/model.safetensors", "exports/pruned/model.onnx", "exports/int8/model.onnx")
    }


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_compression_killed_in_the_middle_goes_on_and_ends_in_the_same_weights_and_answers(tmp_path: Path) -> None:
    run = train(tmp_path, replace(BASE, run="wide", model=NETWORK, train=replace(BASE.train, precision="fp32")), 20)
    killed = tmp_path / "killed"
    process = started(run, killed)
    tuning = killed / "job" / KILLED
    end = time.monotonic() + 900
    while not any(event["event"] == "checkpoint_committed" for event in events(tuning)):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    driver = next(event["pid"] for event in events(tuning) if event["event"] == "run_started")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{driver}/stat").exists() and Path(f"/proc/{driver}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the run outlives the command that was killed"
        time.sleep(0.02)
    assert not (killed / "job" / "compress.json").exists()
    asked_before = (killed / "job" / "stages" / "whole.json").stat().st_mtime_ns

    found = finished(run, killed)
    assert [event["event"] for event in events(tuning)].count("run_started") == 2
    assert (killed / "job" / "stages" / "whole.json").stat().st_mtime_ns == asked_before, "it was not asked again"

    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    for folder in (KILLED, "stages", "exports", "channels"):
        shutil.rmtree(whole / "job" / folder)
    (whole / "job" / "compress.json").unlink()
    assert finished(run, whole)["stages"] == found["stages"], "as with one that was not killed"
    assert [event["event"] for event in events(whole / "job" / KILLED)].count("run_started") == 1
    assert answers(whole / "job") == answers(killed / "job")

    stages = {row["stage"]: row for row in found["stages"]}
    assert list(stages) == ["whole", "pruned", "int8"]
    assert stages["int8"]["bytes"] < stages["pruned"]["bytes"] < stages["whole"]["bytes"]
    assert all(row["count"] == 500 and row["interval_95_percent"] for row in stages.values())
    assert all(found["measured"][stage]["milliseconds"].keys() == {"1", "32"} for stage in stages)
    assert "<svg" in (killed / "job" / "compress.html").read_text()
