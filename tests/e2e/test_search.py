"""A search of real runs: killed with SIGKILL in the middle, and a trial of it too, the same command goes on and ends in the same file to
the byte. tests/trainer/test_search.py has pretended runs for all else."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import SMALL
from tests.e2e.series import count, driver_of, events, finished, kill_alone, started

SPACE = "[optim.lr]\nlow = 1e-4\nhigh = 0.05\n[data.flip]\nvalues = [true, false]\n"
FILES = ("search.json", "search.html", "best.toml")


def words_of(storage: Path, images: Path) -> list[str]:
    (storage.parent / "space.toml").write_text(SPACE)
    return [
        *(*SMALL, "--data.path", str(images), "--data.max-bad-fraction", "0.01"),
        *("--data.root", str(storage.parent / "data"), "--storage", str(storage), "--run", "search", "--workers", "1"),
        *("--train.epochs", "2", "--train.checkpoint-every", "2", "--eta", "2", "--trials", "3", "--train.no-ledger"),
        *("--space", str(storage.parent / "space.toml"), "--soup"),
    ]


def searched(storage: Path, images: Path) -> dict[str, Any]:
    log, result = storage.parent / f"{storage.name}.log", storage / "search" / "search.json"
    return finished("trainer.search", words_of(storage, images), log, result)


def evaluations(run: Path) -> list[tuple[int, float, float]]:
    return [
        (event["step"], event["validation_loss"], event["validation_accuracy"])
        for event in events(run)
        if event["event"] == "evaluation" and event["split"] == "validation"
    ]


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_search_killed_in_the_middle_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, images: Path) -> None:
    killed, log = tmp_path / "killed", tmp_path / "killed.log"
    first, second = killed / "search" / "trial-000", killed / "search" / "trial-001"
    process = started("trainer.search", words_of(killed, images), log)
    os.kill(driver_of(process, first, log), signal.SIGKILL)  # the trial's own; the search starts it again
    kill_alone(process, driver_of(process, second, log))
    assert not (killed / "search" / "search.json").exists()

    search = searched(killed, images)
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
    assert searched(whole, images) == search
    for name in ("search.json", "best.toml"):
        assert (whole / "search" / name).read_bytes() == (killed / "search" / name).read_bytes(), name
    undisturbed = evaluations(whole / "search" / "trial-001")
    assert undisturbed
    assert sorted(set(evaluations(second)))[: len(undisturbed)] == undisturbed, "the same numbers to the last bit"
