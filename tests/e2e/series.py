"""Commands that train a series of real runs, for the tests that kill them: `python -m trainer.curve` and its like as processes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.running import PROJECT, kill_session

PATIENCE_SECONDS = 900
"""On a machine that is busy with other things."""


def started(module: str, words: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """The command, in a session of its own; what it says goes to the end of `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finished(module: str, words: Sequence[str], log: Path, result: Path) -> dict[str, Any]:
    """Run the command to its end, which must be a good one: the JSON that it leaves in `result`."""
    process = started(module, words, log)
    try:
        status = process.wait(PATIENCE_SECONDS)
    finally:
        kill_session(process.pid)
    assert status == 0, log.read_text()
    found: dict[str, Any] = json.loads(result.read_bytes())
    return found


def events(run: Path) -> list[dict[str, Any]]:
    """A run's journal; none if there is no such run yet."""
    try:
        lines = (run / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def count(run: Path, kind: str) -> int:
    """Events of a kind in a run's journal."""
    return [event["event"] for event in events(run)].count(kind)


def driver_of(process: "subprocess.Popen[bytes]", run: Path, log: Path) -> int:
    """The process of the run's driver, once the run has a checkpoint."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not count(run, "checkpoint_committed"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    return next(int(event["pid"]) for event in reversed(events(run)) if event["event"] == "run_started")


def kill_alone(process: "subprocess.Popen[bytes]", driver: int) -> None:
    """SIGKILL to the command alone, and wait until the run of the process `driver` has ended by itself, as the kernel tells it to."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + PATIENCE_SECONDS
    while _is_alive(driver):
        assert time.monotonic() < end, "the run outlives the command that was killed"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
