"""Whatever ends a driver, nothing of it stays on the machine: no process and no folder. Real processes, no Ray."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import belongings as module
from cluster.belongings import PREFIX, belongings, longest_place, stand_ins, temp_folder
from cluster.leftovers import FOLDER_VARIABLE, end_all, kill, processes_of

PROJECT = Path(__file__).resolve().parents[2]
# A driver with a child in its own session, and one whose parent is gone; both outlive an ordinary end.
DRIVER = """
import os, subprocess, sys, time
from cluster.belongings import belongings
with belongings([sys.argv[1]]) as ours:
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    subprocess.run(["sh", "-c", "sleep 600 >/dev/null & "])
    open(ours.folder + "/file", "w").close()
    print(ours.folder, ours.reaper.pid, flush=True)
    END
"""
# A command's process, which ends with the driver. Its last words are said, and a thread runs, when the belongings are left already.
LEAVING = """
import os, signal, sys, threading, time
from dataio.leaving import Leaving, leave_by
leaving = Leaving()
from cluster.belongings import belongings
import subprocess

def main():
    try:
        with belongings([sys.argv[1]], leave_by=leave_by) as ours:
            subprocess.Popen(["sleep", "600"], start_new_session=True)
            subprocess.run(["sh", "-c", "sleep 600 >/dev/null & "])
            open(ours.folder + "/file", "w").close()
            print(ours.folder, ours.reaper.pid, flush=True)
            END
    finally:
        print("last words", file=sys.stderr)
    return 143

leaving.by(main)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a name short enough for Ray's sockets, which pytest's own is not."""
    place = Path(f"/tmp/e{os.getpid() % 10_000}")
    place.mkdir(mode=0o700)
    yield place
    shutil.rmtree(place)


def driver(place: Path, end: str, program: str = DRIVER) -> "tuple[subprocess.Popen[str], str, int]":
    """A driver that does `end` last. Returns it, its folder and its reaper."""
    process = subprocess.Popen(
        [sys.executable, "-c", program.replace("END", end), str(place)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    folder, reaper = process.stdout.readline().split()
    return process, folder, int(reaper)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_driver_leaves_nothing_and_that_is_said(place: Path, number: signal.Signals) -> None:
    process, folder, reaper = driver(place, "time.sleep(600)")
    assert len(processes_of(folder)) == 2
    for stopping in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the reaper hears none of them, and is not in the driver's group
        os.kill(reaper, stopping)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=20)  # the reaper holds this end until it is done
    assert process.returncode == -number
    assert list(place.iterdir()) == []
    assert processes_of(folder) == set()
    assert f"the driver (process {process.pid}) was killed; what it had started is ended, and the same command goes on" in said


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise KeyboardInterrupt", "os.kill(ours.reaper.pid, 9)"])
def test_an_orderly_end_is_complete_when_the_driver_has_ended(place: Path, end: str) -> None:
    process, folder, reaper = driver(place, end)
    process.communicate(timeout=20)
    assert list(place.iterdir()) == []
    assert processes_of(folder) == set()
    assert not Path(f"/proc/{reaper}").exists()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", 143),
        ("return 0", 0),
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", 130),
        ("os.kill(ours.reaper.pid, 9); ours.reaper.wait()", 143),  # then the driver does it itself
        ("os.close(0); os.close(1)", 143),
        ("ours.end_at_once(7)", 7),
    ],
)
def test_a_process_that_ends_with_its_driver_has_ended_all_and_has_its_status(place: Path, end: str, status: int) -> None:
    process, folder, reaper = driver(place, end, LEAVING)
    _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert list(place.iterdir()) == []
    assert processes_of(folder) == set()
    assert ("last words\n" in said) == ("at_once" not in end)
    assert "killed" not in said
    while Path(f"/proc/{reaper}").exists():  # it has closed its output and is on its way out
        time.sleep(0.01)


def test_a_killed_process_that_is_about_to_end_is_told_as_such(place: Path) -> None:
    process, folder, _ = driver(place, "os.kill(os.getpid(), 9)", LEAVING)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, list(place.iterdir()), processes_of(folder)) == (-signal.SIGKILL, [], set())
    assert "was killed" in said


def test_signals_change_nothing_once_the_rest_is_being_ended(place: Path) -> None:
    """The reaper is held up meanwhile."""
    process, folder, reaper = driver(place, "pass; os.kill(ours.reaper.pid, signal.SIGSTOP)", LEAVING)
    while Path(f"/proc/{process.pid}/comm").read_text() != "sh\n":
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert len(processes_of(folder)) == 2
    os.kill(reaper, signal.SIGCONT)
    process.communicate(timeout=20)
    assert (process.returncode, list(place.iterdir()), processes_of(folder)) == (143, [], set())


def test_an_end_at_once_leaves_the_rest_to_the_reaper_which_says_nothing_more(place: Path) -> None:
    process, folder, _ = driver(place, "ours.end_at_once(7)")
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (7, "")
    assert list(place.iterdir()) == []
    assert processes_of(folder) == set()


def test_what_belongs_to_a_run_is_found_whoever_its_parent_is_and_nothing_else_is(tmp_path: Path) -> None:
    folder = str(tmp_path / "run-1")
    os.mkdir(folder)
    log = f"{folder}/log"
    Path(log).write_text("")
    wait = "import sys, time; print('here', flush=True); time.sleep(600)"
    marked = {**os.environ, FOLDER_VARIABLE: folder}
    titled = f"file = open({log!r}); {wait}"

    def start(*command: str, environment: dict[str, str] | None = None, executable: str | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(command, env=environment, executable=executable, stdout=subprocess.PIPE, text=True, start_new_session=True)

    theirs = [
        start(sys.executable, "-c", wait, environment=marked),
        start(sys.executable, "-c", wait, f"--temp-dir={folder}/session"),  # as Ray names it
        start("ray::Agent", "-c", titled, environment={}, executable=sys.executable),  # as Ray's agents are after they took their titles
        start(sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}], env={{}})", folder),
    ]
    others = [
        start(sys.executable, "-c", wait),
        start(sys.executable, "-c", wait, environment={**os.environ, FOLDER_VARIABLE: f"{folder}2"}),
        start(sys.executable, "-c", wait, f"{folder}2/session"),
        start("sh", "-c", f"echo here; exec tail -f {log}"),  # somebody reads the log
    ]
    try:
        for process in (*theirs, *others):
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
        found = processes_of(folder)
        assert len(found) == 5  # the last has a child
        assert {process.pid for process in theirs} < {process.pid for process in found}
        kill([replace(process, start_ticks=process.start_ticks + 1) for process in found])  # others that have their ids now
        assert processes_of(folder) == found
        assert end_all(folder) == set()
        assert [process.wait(10) for process in theirs] == [-signal.SIGKILL] * 4
        assert [process.poll() for process in others] == [None] * 4
    finally:
        for process in (*theirs, *others):
            process.kill()
            process.communicate()


def test_a_temporary_folder_too_long_for_rays_sockets_or_full_is_passed_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "a-temporary-folder-of-a-batch-job"
    long.mkdir()
    assert len(str(long)) > longest_place() >= len(str(place))
    with belongings([str(long), str(place)]) as ours:
        assert Path(ours.folder).parent == place
        assert len(f"{ours.folder}/session_2026-11-28_17-33-33_123456_{os.getpid()}/sockets/plasma_store") <= 107
        assert os.environ[FOLDER_VARIABLE] == ours.folder
    assert FOLDER_VARIABLE not in os.environ
    said = rf"{long} is too long \(Ray's sockets .* 107 bytes.*; /nowhere cannot be used .*export TMPDIR="
    with pytest.raises(ValueError, match=said):
        temp_folder([str(long), "/nowhere"])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=3 << 20))
    with pytest.raises(ValueError, match=rf"{place} has only 3 MiB free; export TMPDIR=FOLDER, .* where 64 MiB are free"):
        temp_folder([str(place)])


def test_the_folder_of_a_dead_driver_is_removed_by_the_next_one_though_its_reaper_was_killed_too(place: Path) -> None:
    process, folder, reaper = driver(place, "time.sleep(600)")
    os.kill(reaper, signal.SIGKILL)
    process.kill()
    assert end_all(folder) == set()
    process.communicate(timeout=20)
    assert Path(folder).exists()
    temp_folder([str(place)]).remove()
    assert list(place.glob(f"{PREFIX}*")) == []


def test_an_account_without_name_and_home_gets_both_for_the_time_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that was started with `--user 12345`: no entry in /etc/passwd, HOME=/."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    assert stand_ins("/folder") == {}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "HOME" not in stand_ins("/folder")
    monkeypatch.setattr(os, "access", lambda path, how: str(path).startswith(str(place)))
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with belongings([str(place)]) as ours:
        assert os.path.expanduser("~/.cache") == f"{ours.folder}/.cache"
        assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.environ["HOME"] == str(tmp_path)
    assert "USER" not in os.environ
    monkeypatch.delenv("HOME")  # and Path.home() is an error then
    assert stand_ins("/folder")["HOME"] == "/folder"
