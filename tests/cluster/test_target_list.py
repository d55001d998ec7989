"""A list of targets goes with the run that wrote it, and with no other."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.target_list import NOTE, is_of_another, take_back, take_back_noted

PROJECT = Path(__file__).resolve().parents[2]
DRIVER = """
import json, os, sys, time
from cluster.belongings import belongings
from cluster.target_list import NOTE
with belongings([sys.argv[1]]) as ours:
    os.mkdir(ours.folder + "/coordinator-x")
    with open(ours.folder + "/coordinator-x/" + NOTE, "w") as file:
        json.dump({"file": sys.argv[2], "address": "127.0.0.1:2"}, file)
    print("ready", flush=True)
    END
"""

OURS = [{"targets": ["127.0.0.1:1"], "labels": {"run": "pets"}}, {"targets": ["127.0.0.1:2"], "labels": {"run": "pets"}}]


def test_a_list_that_names_us_is_emptied_and_one_of_a_newer_driver_stays(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(OURS))
    take_back(str(path), "127.0.0.1:3")
    assert json.loads(path.read_text()) == OURS
    assert is_of_another(str(path), "127.0.0.1:3")
    assert not is_of_another(str(path), "127.0.0.1:2")
    assert not is_of_another(str(tmp_path / "missing.json"), "127.0.0.1:2")
    take_back(str(path), "127.0.0.1:2")
    assert json.loads(path.read_text()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["targets.json"]


def test_what_is_no_list_or_not_there_is_left_alone(tmp_path: Path) -> None:
    take_back(str(tmp_path / "missing.json"), "a:1")
    for text in ("", "{", "3", "[3]", '[{"labels": {}}]', '{"targets": 1}'):
        (tmp_path / "x.json").write_text(text)
        take_back(str(tmp_path / "x.json"), "a:1")
        assert (tmp_path / "x.json").read_text() == text


def test_the_lists_that_a_dead_driver_has_noted_are_emptied(tmp_path: Path) -> None:
    path, folder = tmp_path / "targets.json", tmp_path / "driver [1]"
    path.write_text(json.dumps(OURS))
    for name, note in (("coordinator-a", {"file": str(path), "address": "127.0.0.1:1"}), ("coordinator-b", {"file": 3}), ("ray", None)):
        (folder / name).mkdir(parents=True)
        if note is not None:
            (folder / name / NOTE).write_text(json.dumps(note))
    take_back_noted(str(folder))
    assert json.loads(path.read_text()) == []


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a name short enough for Ray's sockets, which pytest's own is not."""
    place = Path(f"/tmp/t{os.getpid() % 10_000}")
    place.mkdir(mode=0o700)
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("end", ["time.sleep(600)", "sys.exit(3)"])
def test_however_a_driver_ends_its_run_is_no_target_any_more(place: Path, tmp_path: Path, end: str) -> None:
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(OURS))
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER.replace("END", end), str(place), str(path)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        if "sleep" in end:
            driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=20)  # the reaper holds this end until it is done
    assert json.loads(path.read_text()) == []
