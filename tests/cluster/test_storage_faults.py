"""Short versions of the campaign's storage faults (benchmarks/faults/storage.py), in a process of their own: some of them fork."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def campaign(name: str, trials: int = 0) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.storage", name, "--trials", str(trials), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [row["detail"] for row in rows if row["violations"]] == [], done.stderr[-3000:]
    assert done.returncode == 0
    return rows


def test_death_at_every_call_of_a_commit_leaves_the_old_or_the_new_checkpoint_whole() -> None:
    rows = campaign("kill_at_every_syscall", 2)
    assert len(rows) == 3
    assert all(row["trials"] > 60 for row in rows)  # with the campaign's 16 files 189


def test_no_damage_is_ever_loaded() -> None:
    assert [row["trials"] for row in campaign("corruptions", 200)] == [200, 200]


def test_a_full_disk_keeps_the_checkpoint_before() -> None:
    (row,) = campaign("disk_full", 400)  # some scan while another thread prunes
    if row["trials"] == 0:
        pytest.skip(row["detail"])
    assert row["trials"] == 400


def test_ten_minutes_without_storage_cost_no_step_and_no_acknowledged_checkpoint() -> None:
    (row,) = campaign("outage", 1)
    assert row["trials"] == 1
