"""A learning curve of real runs: killed with SIGKILL in the middle, the same command goes on and ends in the same files to the byte."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import PROJECT, SMALL, kill_session

SIZES = (60, 120, 240)
FILES = ("curve.json", "curve.html", "label-next.csv")
KILLED = "n0000120-r0"
"""The second run: the largest size comes first."""


def started(storage: Path, images: Path) -> "subprocess.Popen[bytes]":
    words = [
        *(sys.executable, "-m", "trainer.curve", *SMALL, "--data.path", str(images), "--data.max-bad-fraction", "0.01"),
        *("--data.root", str(storage.parent / "data"), "--storage", str(storage), "--run", "curve", "--workers", "1"),
        *("--train.epochs", "4", "--train.checkpoint-every", "2", "--parts", "0.25", "0.5", "1", "--repeats", "1"),
        *("--unlabelled", str(images / "test"), "--next", "5", "--train.no-ledger"),
    ]
    with (storage.parent / f"{storage.name}.log").open("ab") as log:
        return subprocess.Popen(words, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finished(storage: Path, images: Path) -> dict[str, Any]:
    process = started(storage, images)
    try:
        status = process.wait(timeout=500)
    finally:
        kill_session(process.pid)
    assert status == 0, (storage.parent / f"{storage.name}.log").read_text()
    curve: dict[str, Any] = json.loads((storage / "curve" / "curve.json").read_bytes())
    return curve


def events(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_curve_killed_in_the_middle_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, images: Path) -> None:
    killed = tmp_path / "killed"
    process = started(killed, images)
    run = killed / "curve" / KILLED
    end = time.monotonic() + 400
    while not any(event["event"] == "checkpoint_committed" for event in events(run)):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    driver = next(event["pid"] for event in events(run) if event["event"] == "run_started")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{driver}/stat").exists() and Path(f"/proc/{driver}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the run outlives the curve that was killed"
        time.sleep(0.02)
    summary = run / "summary.json"  # the kernel has sent the run SIGTERM: it saved and stopped
    assert not summary.exists() or json.loads(summary.read_bytes())["status"] == "stopped"
    assert not (killed / "curve" / "curve.json").exists()

    curve = finished(killed, images)
    assert [event["event"] for event in events(run)].count("run_started") == 2
    assert [event["event"] for event in events(killed / "curve" / "n0000240-r0")].count("run_started") == 1, "it had finished"
    assert any(event["event"] == "resumed" for event in events(run)), "it went on from its checkpoint"

    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    shutil.rmtree(whole / "curve" / KILLED)
    for name in FILES:
        (whole / "curve" / name).unlink()
    assert finished(whole, images) == curve, "as with a run that was not killed"
    assert [event["event"] for event in events(whole / "curve" / KILLED)].count("run_started") == 1
    for name in FILES:
        assert (whole / "curve" / name).read_bytes() == (killed / "curve" / name).read_bytes(), name
    assert [found["images"] for found in curve["runs"]] == list(SIZES)
    assert len({found["weights_sha256"] for found in curve["runs"]}) == 3
    rows = list(csv.DictReader((whole / "curve" / "label-next.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all((images / "test" / row["image"]).is_file() for row in rows)
