"""A search of real runs: killed with SIGKILL in the middle, and a trial of it too, the same command goes on and ends in the same file to
the byte. tests/trainer/test_search.py has pretended runs for all else."""

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

SPACE = "[optim.lr]\nlow = 1e-4\nhigh = 0.05\n[data.flip]\nvalues = [true, false]\n"
FILES = ("search.json", "search.html", "best.toml")


def started(storage: Path, images: Path) -> "subprocess.Popen[bytes]":
    (storage.parent / "space.toml").write_text(SPACE)
    words = [
        *(sys.executable, "-m", "trainer.search", *SMALL, "--data.path", str(images), "--data.max-bad-fraction", "0.01"),
        *("--data.root", str(storage.parent / "data"), "--storage", str(storage), "--run", "search", "--workers", "1"),
        *("--train.epochs", "2", "--train.checkpoint-every", "2", "--eta", "2", "--trials", "3", "--train.no-ledger"),
        *("--space", str(storage.parent / "space.toml"), "--soup"),
    ]
    with (storage.parent / f"{storage.name}.log").open("ab") as log:
        return subprocess.Popen(words, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finished(storage: Path, images: Path) -> dict[str, Any]:
    process = started(storage, images)
    try:
        status = process.wait(timeout=800)
    finally:
        kill_session(process.pid)
    assert status == 0, (storage.parent / f"{storage.name}.log").read_text()
    found: dict[str, Any] = json.loads((storage / "search" / "search.json").read_bytes())
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def count(folder: Path, kind: str) -> int:
    return [event["event"] for event in events(folder)].count(kind)


def driver_of(process: "subprocess.Popen[bytes]", run: Path, log: Path) -> int:
    """The process of the run's driver, once the run has a checkpoint."""
    end = time.monotonic() + 400
    while not any(event["event"] == "checkpoint_committed" for event in events(run)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    return next(int(event["pid"]) for event in reversed(events(run)) if event["event"] == "run_started")


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_search_killed_in_the_middle_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, images: Path) -> None:
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    first, second = killed / "search" / "trial-000", killed / "search" / "trial-001"
    process = started(killed, images)
    os.kill(driver_of(process, first, log), signal.SIGKILL)  # the trial's own; the search starts it again
    driver = driver_of(process, second, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 400
    while is_alive(driver):
        assert time.monotonic() < end, "the trial outlives the search that was killed"
        time.sleep(0.02)
    assert not (killed / "search" / "search.json").exists()

    search = finished(killed, images)
    assert count(first, "run_started") >= 2, "it went on after its driver was killed"
    assert len(search["trials"]) == 3
    assert {each["end"] for each in search["trials"]} <= {"finished", "stopped"}
    own = next(each for each in search["trials"] if each["trial"] == 0)
    assert (own["end"], own["epochs"]) == ("finished", 2)
    assert search["best"] in [each["run"] for each in search["trials"] if each["end"] == "finished"]

    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    shutil.rmtree(whole / "search" / "trial-001")  # the one that was disturbed, once more without that
    for name in FILES:
        (whole / "search" / name).unlink()
    assert finished(whole, images) == search
    for name in ("search.json", "best.toml"):
        assert (whole / "search" / name).read_bytes() == (killed / "search" / name).read_bytes(), name
    model = (whole / "search" / search["best"] / "model" / "model.safetensors").read_bytes()
    assert model == (killed / "search" / search["best"] / "model" / "model.safetensors").read_bytes()
