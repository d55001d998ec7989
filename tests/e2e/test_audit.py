"""An audit on real Ray: each fold is a run, and however often all of it is killed, the same command ends in the same findings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import PROJECT, SMALL, kill_session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
LENGTH = ("--train.epochs", "6", "--train.checkpoint-every", "2", "--optim.lr", "0.01", "--data.max-bad-fraction", "0.01")
FOLDS = 2


class Audit:
    """One `trainer.audit` process, in a session of its own."""

    def __init__(self, data: Path, out: Path) -> None:
        self.out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        self.log = out.parent / f"{out.name}.{time.monotonic_ns()}.log"
        arguments = ["--data.path", str(data), "--data.root", str(out.parent / "data"), "--folds", str(FOLDS), "--out", str(out)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.audit", *SMALL, *LENGTH, *arguments],
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ},
                start_new_session=True,
            )

    def wait_for_checkpoint(self, fold: int, timeout: float = 300) -> None:
        """Until the run of this fold has committed one, and is in the middle."""
        journal = self.out / "folds" / f"fold-{fold}-of-{FOLDS}" / "journal.jsonl"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if journal.is_file() and "checkpoint_committed" in journal.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no checkpoint of fold {fold}:\n{self.log.read_text()}")

    def finish(self, timeout: float = 400) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        kill_session(self.process.pid)
        self.process.wait()

    def summary(self, fold: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "folds" / f"fold-{fold}-of-{FOLDS}" / "summary.json").read_text())
        return found


def test_an_audit_killed_in_each_fold_ends_in_the_findings_of_one_that_was_not(tmp_path: Path, images: Path) -> None:
    whole = Audit(images, tmp_path / "whole")
    assert whole.finish() == 0, whole.log.read_text()
    assert "fold 2 of 2, about" in whole.log.read_text(), "the time left is told"
    found = json.loads((whole.out / "findings.json").read_text())
    assert (found["folds"], found["images"]) == (FOLDS, {"train": 240, "test": 60})
    assert found["labels"], "a model of 36 steps doubts some label"

    killed = Audit(images, tmp_path / "killed")
    killed.wait_for_checkpoint(1)
    killed.kill()  # SIGKILL to the audit, the run, and all that it started
    stopped = Audit(images, tmp_path / "killed")
    stopped.wait_for_checkpoint(2)
    stopped.process.send_signal(signal.SIGTERM)  # to the audit alone, which passes it on
    assert stopped.finish() == 128 + signal.SIGTERM, stopped.log.read_text()
    assert "the same command goes on" in stopped.log.read_text()
    again = Audit(images, tmp_path / "killed")
    assert again.finish() == 0, again.log.read_text()

    for fold in range(1, FOLDS + 1):
        assert again.summary(fold)["weights_sha256"] == whole.summary(fold)["weights_sha256"]
    for name in ("findings.json", "changes.csv"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    done = Audit(images, tmp_path / "killed")
    assert done.finish() == 0
    assert "starting a local Ray" not in done.log.read_text(), "what has finished is not trained again"
    assert (done.out / "findings.json").read_bytes() == (whole.out / "findings.json").read_bytes()
