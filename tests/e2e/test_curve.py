"""A learning curve of real runs: killed with SIGKILL in the middle, the same command goes on and ends in the same files to the byte."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import SMALL
from tests.e2e.series import count, driver_of, events, finished, kill_alone, started

SIZES = (60, 120, 240)
FILES = ("curve.json", "curve.html", "label-next.csv")
KILLED = "n0000120-r0"
"""The second run: the largest size comes first."""


def words_of(storage: Path, images: Path) -> list[str]:
    return [
        *(*SMALL, "--data.path", str(images), "--data.max-bad-fraction", "0.01"),
        *("--data.root", str(storage.parent / "data"), "--storage", str(storage), "--run", "curve", "--workers", "1"),
        *("--train.epochs", "4", "--train.checkpoint-every", "2", "--parts", "0.25", "0.5", "1", "--repeats", "1"),
        *("--unlabelled", str(images / "test"), "--next", "5", "--train.no-ledger"),
    ]


def drawn(storage: Path, images: Path) -> dict[str, Any]:
    log, result = storage.parent / f"{storage.name}.log", storage / "curve" / "curve.json"
    return finished("trainer.curve", words_of(storage, images), log, result)


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_curve_killed_in_the_middle_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, images: Path) -> None:
    killed = tmp_path / "killed"
    run, log = killed / "curve" / KILLED, tmp_path / "killed.log"
    process = started("trainer.curve", words_of(killed, images), log)
    kill_alone(process, driver_of(process, run, log))
    summary = run / "summary.json"  # the kernel has sent the run SIGTERM: it saved and stopped
    assert not summary.exists() or json.loads(summary.read_bytes())["status"] == "stopped"
    assert not (killed / "curve" / "curve.json").exists()

    curve = drawn(killed, images)
    assert count(run, "run_started") == 2
    assert count(killed / "curve" / "n0000240-r0", "run_started") == 1, "it had finished"
    assert any(event["event"] == "resumed" for event in events(run)), "it went on from its checkpoint"

    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    shutil.rmtree(whole / "curve" / KILLED)
    for name in FILES:
        (whole / "curve" / name).unlink()
    assert drawn(whole, images) == curve, "as with a run that was not killed"
    assert count(whole / "curve" / KILLED, "run_started") == 1
    for name in FILES:
        assert (whole / "curve" / name).read_bytes() == (killed / "curve" / name).read_bytes(), name
    assert [found["images"] for found in curve["runs"]] == list(SIZES)
    assert len({found["weights_sha256"] for found in curve["runs"]}) == 3
    rows = list(csv.DictReader((whole / "curve" / "label-next.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all((images / "test" / row["image"]).is_file() for row in rows)
