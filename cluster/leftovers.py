"""Finds and ends the processes of a run by the run's folder, whoever their parents are now. Called by belongings.py (at a run's end),
reaper.py (when the driver was killed) and ray_cluster.py. Standard library only, because the reaper starts beside the run.

A process belongs to the run if its environment names the folder (all that the driver starts inherits FOLDER_VARIABLE), or if it is one of
Ray's or Python's and its command line or an open file names it (some of Ray's processes write their title over their environment, and one
whose parent was killed has another parent), or if an ancestor belongs to the run.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.process import ProcessStat, process_stat

FOLDER_VARIABLE = "FINETUNE_RUN_FOLDER"
_TITLE = b"ray::"  # of a process of Ray's that has overwritten its command line, and its environment behind it


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProcess:
    """A process of a run. Process ids are reused; an id together with its `start_ticks` is unique."""

    pid: int
    start_ticks: int
    name: str
    parent: int


def processes_of(folder: str) -> set[RunProcess]:
    """The living processes of the run with this folder, without this process and the reaper."""
    seen = {stat.pid: stat for stat in _living() if stat.pid != os.getpid()}
    found: set[int] = set()
    added = {pid for pid in seen if _names(pid, os.fsencode(folder))}
    while added:
        found |= added
        added = {pid for pid, stat in seen.items() if stat.parent in found} - found
    return {RunProcess(pid=pid, start_ticks=seen[pid].start_ticks, name=seen[pid].name, parent=seen[pid].parent) for pid in found}


def kill(processes: Iterable[RunProcess]) -> None:
    """Send SIGKILL to those that still live."""
    for process in processes:
        with contextlib.suppress(OSError):
            stat = process_stat(process.pid)
            if stat is not None and stat.start_ticks == process.start_ticks:
                os.kill(process.pid, signal.SIGKILL)


def end_all(folder: str, *, seconds: float = 5.0) -> set[RunProcess]:
    """Kill the processes of the run until there are none, at most for `seconds`: some may be about to start others. Returns those that
    are left, in an uninterruptible wait."""
    end = time.monotonic() + seconds
    while left := processes_of(folder):
        kill(left)
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return left


def _living() -> Iterator[ProcessStat]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stat = process_stat(int(name))
                if stat is not None and stat.is_alive:
                    yield stat


def _names(pid: int, folder: bytes) -> bool:
    with contextlib.suppress(OSError):  # another user's, or it has ended meanwhile
        environment = b"\0" + _read(f"/proc/{pid}/environ") + b"\0"
        # The variable's value is the whole folder: "=" comes before it and a zero after it.
        if FOLDER_VARIABLE.encode() + b"=" + folder + b"\0" in environment:
            return True
        if not _may_be_rays(os.readlink(f"/proc/{pid}/exe")):
            return False  # perhaps somebody reads a log there
        command = _read(f"/proc/{pid}/cmdline")
        if folder + b"/" in command.replace(b"\0", b"/"):
            return b"\0cluster.reaper\0" not in command
        # Others need not be searched: there may be thousands of files.
        return command.startswith(_TITLE) and any(_opened_in(f"/proc/{pid}/fd", os.fsdecode(folder)))
    return False


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _may_be_rays(program: str) -> bool:
    return program == os.path.realpath(sys.executable) or "/ray/core/" in program


def _opened_in(descriptors: str, folder: str) -> Iterator[bool]:
    for descriptor in os.listdir(descriptors):
        with contextlib.suppress(OSError):
            yield os.readlink(f"{descriptors}/{descriptor}").startswith(f"{folder}/")
