"""A folder belongs to a living process, and nobody removes it from under it: not even somebody to whom that process has no id."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import owned_folder
from cluster.owned_folder import OWNER, is_owned, new_folder, remove_abandoned

PROJECT = Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from cluster.owned_folder import new_folder; print(new_folder(*sys.argv[1:]).path, flush=True); time.sleep(60)"


def owner_of(parent: Path, prefix: str) -> "tuple[subprocess.Popen[str], Path]":
    """A process that owns a folder `parent/prefix...`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(parent), prefix], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_stays_while_its_owner_lives_whatever_number_it_has_in_its_name(tmp_path: Path) -> None:
    """The owner in another container has an id that is nobody's here."""
    process, folder = owner_of(tmp_path, "run-4194303-")
    try:
        (folder / "session").mkdir()
        (folder / "session" / "socket").write_text("")
        assert remove_abandoned(str(tmp_path), "run-") == []
        assert (folder / "session" / "socket").exists()
        process.send_signal(signal.SIGSTOP)  # frozen is not dead
        assert remove_abandoned(str(tmp_path), "run-") == []
    finally:
        process.kill()
        process.wait()
    assert remove_abandoned(str(tmp_path), "run-") == [str(folder)]
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_certainly_abandoned_is_removed(tmp_path: Path) -> None:
    ours = new_folder(str(tmp_path), "run-")
    notes, another, target = tmp_path / "run-notes", tmp_path / "else", tmp_path / "target"
    for folder in (notes, another, target):
        folder.mkdir()
        (folder / "file").write_text("")  # without an owner: of an older release, or no run's at all
    (tmp_path / "run-link").symlink_to(target)
    unfinished = tmp_path / "run-cut-short"
    unfinished.mkdir()
    assert remove_abandoned(str(tmp_path), "run-") == [str(unfinished)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["else", "run-link", "run-notes", Path(ours.path).name, "target"])
    ours.remove()
    assert not Path(ours.path).exists()


def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / OWNER).write_text("")

    def none_here(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(owned_folder.fcntl, "flock", none_here)
        assert is_owned(folder)
        assert remove_abandoned(str(tmp_path), "run-") == []
        with pytest.raises(OSError, match="No locks"):
            new_folder(str(tmp_path), "run-")
    assert os.listdir(tmp_path) == ["run-1"]
    assert not is_owned(folder)


def test_processes_that_the_owner_executes_do_not_keep_the_folder(tmp_path: Path) -> None:
    owned = new_folder(str(tmp_path), "run-")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        os.close(owned.lock)
        assert not is_owned(Path(owned.path))
    finally:
        child.kill()
        child.wait()
