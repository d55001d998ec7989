"""Claims about the zygote: what it forks has everything imported, is watched to its end, and never outlives its agent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.process import process_stat
from cluster.zygote import ZYGOTE_LOST, Forked, Zygote

PROJECT = Path(__file__).resolve().parents[2]


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    stat = process_stat(pid)
    return stat is None or not stat.is_alive


def soon(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_what_it_forks_has_the_imports_and_the_files_it_was_handed_and_its_end_is_told():
    ended: list[Forked] = []
    zygote = Zygote(["numpy"], on_ended=ended.append)
    try:
        reading, writing = os.pipe()
        forked = zygote.fork("tests.cluster.ranks:say_hello", [writing, writing])
        assert forked.wait(30) == 0
        pid, imported, descriptors = os.read(reading, 100).decode().split()
        assert (int(pid), imported, descriptors) == (forked.pid, "True", "2")
        assert pid not in (str(os.getpid()), str(zygote.pid))
        assert ended == [forked]
        assert zygote.fork("tests.cluster.ranks:fail", []).wait(30) == 7
        assert zygote.fork("tests.cluster.ranks:no_such_function", []).wait(30) == 1
    finally:
        zygote.close()


def test_what_is_imported_is_left_alone_by_the_garbage_collections_of_what_it_forks():
    zygote = Zygote(["numpy"])
    try:
        reading, writing = os.pipe()
        assert zygote.fork("tests.cluster.ranks:count_frozen", [writing]).wait(30) == 0
        frozen, numpy_is_tracked = os.read(reading, 100).decode().split()
        assert int(frozen) > 0
        assert numpy_is_tracked == "False"
    finally:
        zygote.close()


def test_it_forks_where_the_folder_that_its_user_worked_in_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray keeps a copy of the code for each node, and may remove one that a worker stands in."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(PROJECT))
    zygote = Zygote(["tests.cluster.ranks"])
    try:
        folder.rmdir()
        reading, writing = os.pipe()
        forked = zygote.fork("tests.cluster.ranks:say_hello", [writing])
        assert forked.wait(30) == 0
        assert os.read(reading, 100).decode().startswith(f"{forked.pid} ")
    finally:
        zygote.close()


def test_a_file_that_cannot_be_handed_over_is_an_error_and_harms_no_other_fork():
    zygote = Zygote([])
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            zygote.fork("tests.cluster.ranks:say_hello", [10_000])
        assert zygote.fork("tests.cluster.ranks:fail", []).wait(30) == 7
    finally:
        zygote.close()


def test_a_killed_process_is_told_apart_from_its_siblings():
    zygote = Zygote([])
    try:
        pipes = [os.pipe() for _ in range(3)]
        forked = [zygote.fork("tests.cluster.ranks:sleep", [writing]) for _, writing in pipes]
        for reading, _ in pipes:
            assert os.read(reading, 10) == b"awake"
        forked[1].signal(signal.SIGKILL)
        assert forked[1].wait(20) == -signal.SIGKILL
        assert (forked[0].wait(0.05), forked[2].wait(0.05)) == (None, None)
        forked[0].signal(signal.SIGTERM)
        assert forked[0].wait(20) == -signal.SIGTERM
    finally:
        zygote.close()
    assert forked[2].wait(20) in (-signal.SIGKILL, ZYGOTE_LOST)
    assert soon(lambda: gone(forked[2].pid))


def test_when_the_zygote_dies_so_does_what_it_forked_and_that_is_told():
    zygote = Zygote([])
    try:
        reading, writing = os.pipe()
        forked = zygote.fork("tests.cluster.ranks:sleep", [writing])
        assert os.read(reading, 10) == b"awake"
        os.kill(zygote.pid, signal.SIGKILL)
        assert forked.wait(20) == ZYGOTE_LOST
        assert zygote.lost
        assert soon(lambda: gone(forked.pid))
        assert zygote.fork("tests.cluster.ranks:sleep", [writing]).wait(20) == ZYGOTE_LOST
    finally:
        zygote.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_agent_dies_so_does_everything_below_it(number: signal.Signals):
    script = (
        "import os, sys, time\nfrom cluster.zygote import Zygote\nzygote = Zygote([])\nreading, writing = os.pipe()\n"
        "forked = zygote.fork('tests.cluster.ranks:sleep', [writing])\nos.read(reading, 10)\n"
        "print(zygote.pid, forked.pid, flush=True)\ntime.sleep(600)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    pids = [int(pid) for pid in agent.stdout.readline().split()]
    assert not any(gone(pid) for pid in pids)
    agent.send_signal(number)
    agent.wait(20)
    assert soon(lambda: all(gone(pid) for pid in pids))


def test_more_files_than_one_message_carries_are_refused():
    zygote = Zygote([])
    try:
        with pytest.raises(ValueError, match="251 open files for one process, at most 250 can be handed over"):
            zygote.fork("tests.cluster.ranks:sleep", [0] * 251)
    finally:
        zygote.close()


def test_users_of_one_name_share_a_zygote_and_each_keeps_its_own():
    name = f"test-{os.getpid()}-shared"
    with ThreadPoolExecutor(8) as pool:  # all at once: one of them starts it
        users = list(pool.map(lambda _: Zygote([], name=name), range(8)))
    try:
        assert len({user.pid for user in users}) == 1
        pipes = [os.pipe() for _ in users]
        forked = [user.fork("tests.cluster.ranks:sleep", [writing]) for user, (_, writing) in zip(users, pipes, strict=True)]
        for reading, _ in pipes:
            assert os.read(reading, 10) == b"awake"
        users[3].close()
        assert soon(lambda: gone(forked[3].pid))
        assert not any(gone(one.pid) for one in forked[:3] + forked[4:])
        latecomer = Zygote([], name=name)
        assert latecomer.pid == users[0].pid
        latecomer.close()
    finally:
        for user in users:
            user.close()
    assert soon(lambda: gone(users[0].pid))
    another = Zygote([], name=name)
    assert another.pid != users[0].pid
    another.close()


def test_what_is_forked_has_the_environment_folder_and_output_of_who_asked(tmp_path: Path):
    script = (
        "import sys\nfrom cluster.zygote import Zygote\nzygote = Zygote([], name=sys.argv[1])\n"
        "assert zygote.fork('tests.cluster.ranks:say_where', []).wait(30) == 0\nprint(zygote.pid)\n"
    )
    name = f"test-{os.getpid()}-places"
    first = Zygote([], name=name)  # of this process: another environment, folder and output
    try:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OF_ITS_USER": "yes"}
        user = subprocess.run(
            [sys.executable, "-c", script, name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        first.close()
    assert user.stdout.splitlines() == [f"yes {tmp_path}", str(first.pid)]
    assert user.stderr.splitlines() == ["and a word on standard error"]
