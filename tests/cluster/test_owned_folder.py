"""Folders with a living owner are left alone, those of dead owners are removed. Locks are real, owners are real processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import owned_folder
from cluster.owned_folder import LOCK_FILE, create, is_abandoned, remove_abandoned

OWNER = """
import sys
from cluster.owned_folder import create
folder = create("run-", sys.argv[1])
open(folder.path + "/data", "w").write("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def owner(parent: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_folder_stays_while_its_owner_lives_and_goes_once_it_was_killed(tmp_path: Path) -> None:
    process, path = owner(tmp_path)
    with process:
        assert not is_abandoned(path)
        assert remove_abandoned(f"{tmp_path}/run-*") == []
        assert Path(path, "data").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert is_abandoned(path)
        assert Path(path, "data").exists()  # a question changes nothing
        assert remove_abandoned(f"{tmp_path}/run-*") == [path]
        assert not Path(path).exists()


def test_a_forked_child_keeps_its_parents_folder(tmp_path: Path) -> None:
    """A killed driver's children may still write into its folder."""
    reading, writing = os.pipe()
    maker = os.fork()
    if maker == 0:
        folder = create("run-", str(tmp_path))
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)  # lives until the test lets it go
            os._exit(0)
        Path(folder.path, "ready").touch()
        os._exit(0)
    os.waitpid(maker, 0)
    os.close(reading)
    (path,) = map(str, tmp_path.iterdir())
    assert Path(path, "ready").exists()
    assert not is_abandoned(path)
    os.close(writing)
    with open(f"{path}/{LOCK_FILE}") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the child is gone
    assert is_abandoned(path)


def test_only_its_own_kind_of_folder_is_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_FILE).touch()
    (tmp_path / "run-link").symlink_to(elsewhere)
    (tmp_path / "run-file").touch()
    older = tmp_path / "run-of-an-older-version"
    older.mkdir()
    (older / "data").touch()
    (tmp_path / "run-empty").mkdir()
    assert remove_abandoned(f"{tmp_path}/run-*") == [f"{tmp_path}/run-empty"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run-file", "run-link", "run-of-an-older-version"]
    assert (elsewhere / LOCK_FILE).exists()


def test_its_owner_removes_it(tmp_path: Path) -> None:
    folder = create("run-", str(tmp_path))
    assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the lock file", "before the lock"])
def test_a_folder_removed_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Another process clears up at the worst moments: the maker then has a folder all the same, and it is its own."""
    cleared: list[str] = []

    def clear() -> None:
        if not cleared:
            cleared.extend(["", *remove_abandoned(f"{tmp_path}/run-*")])

    real_open, real_flock = os.open, fcntl.flock
    if moment == "before the lock file":

        def opened(path: str, flags: int, *mode: int) -> int:
            if flags & os.O_CREAT and str(path).endswith(LOCK_FILE):
                clear()
            return real_open(path, flags, *mode)

        monkeypatch.setattr(owned_folder.os, "open", opened)
    else:

        def locked(file: int, how: int) -> None:
            monkeypatch.setattr(owned_folder.fcntl, "flock", real_flock)
            clear()
            real_flock(file, how)

        monkeypatch.setattr(owned_folder.fcntl, "flock", locked)
    folder = create("run-", str(tmp_path))
    monkeypatch.undo()
    assert len(cleared) == 2
    assert cleared[1] != folder.path
    assert [str(path) for path in tmp_path.iterdir()] == [folder.path]
    assert not is_abandoned(folder.path)


def test_without_locks_a_folder_is_never_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(owned_folder.fcntl, "flock", refused)
    folder = create("run-", str(tmp_path))
    Path(folder.path, "data").touch()
    monkeypatch.undo()
    assert not is_abandoned(folder.path)
    assert remove_abandoned(f"{tmp_path}/run-*") == []
    assert Path(folder.path, "data").exists()
