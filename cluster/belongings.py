"""What a driver has on this machine besides its run's storage: a temporary folder and the processes it starts. Both go when the driver
does, however it ends. Called by trainer/drive/start.py; ray_cluster.py puts Ray into the folder.

If the driver is killed, reaper.py removes both, a process that was started first. At an orderly end a command's process leaves both to it
too, and waits: a shell takes the driver's place, and ends with its exit status once the reaper is done. So none of Ray's code runs in the
driver while Ray is taken down, and none can end it with another status: it does so by itself where a thread still asks it something. A
driver inside another program (a test) removes both itself. leftovers.py says which processes are meant.
"""

import contextlib
import fcntl
import getpass
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from cluster.leftovers import FOLDER_VARIABLE, end_all
from cluster.machine import raise_open_files
from cluster.owned_folder import OwnedFolder, create, remove_abandoned
from cluster.reaper import NOW, TOLD
from cluster.target_list import take_back_noted

PREFIX = "finetune-ray-"
# Ray's sockets, <folder>/session_2026-11-28_17-33-33_123456_<pid>/sockets/plasma_store, may have 107 bytes.
_SOCKET_BYTES = 107
_BELOW_FOLDER = len("/session_2026-11-28_17-33-33_123456_4194304/sockets/plasma_store")
_RANDOM_BYTES = 9  # mkdtemp's letters and a dash
_LEAST_FREE_BYTES = 64 << 20
_PROJECT = str(Path(__file__).resolve().parents[1])
_SHELL = "/bin/sh"
LeaveBy = Callable[[Callable[[int], None]], bool]
"""Takes what ends the process, given its exit status; False if the process does not end here (dataio/leaving.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Belongings:
    """The folder, and the process that guards it."""

    folder: str
    reaper: "subprocess.Popen[bytes]"

    def end_at_once(self, status: int) -> NoReturn:
        """End this process now, without any clean-up of its own: the reaper does that a moment later. The user was told why."""
        assert self.reaper.stdin is not None
        with contextlib.suppress(OSError):  # somebody has killed it
            os.write(self.reaper.stdin.fileno(), TOLD)
        os._exit(status)


@contextlib.contextmanager
def belongings(candidates: Sequence[str] | None = None, *, leave_by: LeaveBy = lambda last: False) -> Iterator[Belongings]:
    """Make a folder for this driver and start its reaper; at the end, kill the processes that belong to it and remove it, at once or, if
    `leave_by` takes it, when the process ends. All processes started inside inherit FOLDER_VARIABLE. ValueError if no folder can be used;
    `candidates` are the places to try."""
    raise_open_files()
    folder = temp_folder(temp_places() if candidates is None else candidates)
    reaper = None
    try:
        reaper = _start_reaper(folder.path)
        with _environment({FOLDER_VARIABLE: folder.path, **stand_ins(folder.path)}):
            yield Belongings(folder=folder.path, reaper=reaper)
    finally:
        if reaper is None or not leave_by(partial(_leave, folder, reaper)):
            _end(folder, reaper)


def _end(folder: OwnedFolder, reaper: "subprocess.Popen[bytes] | None") -> None:
    end_all(folder.path)
    take_back_noted(folder.path)
    folder.remove()
    if reaper is not None:
        reaper.kill()
        reaper.communicate()


def _leave(folder: OwnedFolder, reaper: "subprocess.Popen[bytes]", status: int) -> None:
    """Become a shell that ends with `status` once the reaper has ended the rest. Signals can change nothing any more. Returns only if there
    is no reaper or no shell; then the rest is ended here."""
    assert reaper.stdin is not None
    assert reaper.stdout is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if reaper.poll() is None and os.access(_SHELL, os.X_OK):
        os.write(reaper.stdin.fileno(), TOLD)  # should the shell be killed
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 3) for end in (reaper.stdout.fileno(), reaper.stdin.fileno())]
        for place, end in enumerate(ends):
            os.dup2(end, place)
        os.execv(_SHELL, ["sh", "-c", f"{{ echo {NOW.decode().strip()}; }} 2>/dev/null; read -r done; exit {status & 0xFF}"])
    _end(folder, reaper)


def _start_reaper(folder: str) -> "subprocess.Popen[bytes]":
    """In a group of its own, with the signals that end a run blocked: it outlives a killed group."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        return subprocess.Popen(
            [sys.executable, "-S", "-m", "cluster.reaper", str(os.getpid()), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,  # at its end the driver waits for this to be closed
            env={"PYTHONPATH": _PROJECT, "PYTHONDONTWRITEBYTECODE": "1"},
            process_group=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def stand_ins(folder: str) -> dict[str, str]:
    """Environment variables for an account without a name or without a home folder that can be written to, as a container has that was
    started with `--user 12345`. Libraries ask for both: for their caches, and for names of folders."""
    found = {}
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or not os.access(home, os.W_OK | os.X_OK):
        found["HOME"] = folder
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        found["USER"] = f"uid{os.getuid()}"
    return found


# Limits of this machine that would end a run later, in worse words


def temp_places() -> list[str]:
    """Where the folder may be, the preferred place first."""
    private = os.environ.get("XDG_RUNTIME_DIR", "")
    return list(dict.fromkeys([preferred_place(), *filter(os.path.isabs, [private]), "/tmp", "/dev/shm", "/var/tmp"]))


def preferred_place() -> str:
    """Where TMPDIR says."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none that can be written to, or full
        return os.environ.get("TMPDIR", "/tmp")


def temp_folder(places: Sequence[str]) -> OwnedFolder:
    """A new folder in the first of `places` that can be used. Removes what dead drivers left there. ValueError if there is none."""
    problems = []
    for place in places:
        if problem := problem_of(place):
            problems.append(problem)
            continue
        remove_abandoned(f"{glob.escape(place)}/{PREFIX}*")
        try:
            return create(f"{PREFIX}{os.getpid()}-", place)
        except OSError as error:
            problems.append(f"{place} cannot be used ({error.strerror})")
    raise ValueError(
        f"there is no temporary folder for Ray: {'; '.join(problems)}; export TMPDIR=FOLDER, a short path on a disk of this machine "
        f"where {_LEAST_FREE_BYTES >> 20} MiB are free"
    )


def problem_of(place: str) -> str:
    """Why the folder cannot be in `place`; "" if it can."""
    most = longest_place()
    if len(os.fsencode(place)) > most:
        return f"{place} is too long (Ray's sockets below it may have {_SOCKET_BYTES} bytes, which leaves {most} for it)"
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return f"{place} cannot be used ({error.strerror})"
    return f"{place} has only {free >> 20} MiB free" if free < _LEAST_FREE_BYTES else ""


def longest_place() -> int:
    """The most bytes that the path of a place for the folder may have."""
    return _SOCKET_BYTES - _BELOW_FOLDER - len(f"/{PREFIX}{os.getpid()}") - _RANDOM_BYTES
