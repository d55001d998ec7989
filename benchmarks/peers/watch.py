"""Runs a contender's command and watches it from outside: when it said which accuracy, how much memory its processes had; kills it in the
middle if asked to. Called by `__main__.py`.

All processes that a command starts carry a mark in their environment, as benchmarks/photos.py does it: Ray's outlive their parents.
"""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import PROJECT
from benchmarks.peers.contenders import LOG, STARTED, Contender, text_of

MARK = "BENCHMARK_PEERS"
LOOK_SECONDS = 0.2
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One process from its start to its end, or to its SIGKILL."""

    seconds: float
    evaluations: tuple[tuple[float, float], ...]
    """(seconds after the start, test accuracy), of this life."""
    peak_rss_bytes: int
    """The most that all its processes had together; a page that two share counts twice."""
    was_killed: bool
    failure: str = ""
    """The end of its output, if it failed by itself."""


def live(contender: Contender, place: Path, *, timeout_seconds: float, until: float = 2.0, kill_after: float | None = None) -> Life:
    """Runs the command until it ends, has said an accuracy of `until`, or has lived for `kill_after` seconds; what is left of it is killed
    then. RuntimeError if it does not end in time."""
    place.mkdir(parents=True, exist_ok=True)
    log = place / LOG
    said_before = len(contender.accuracies(place))
    mark = uuid.uuid4().hex
    evaluations: list[tuple[float, float]] = []
    peak = 0
    with log.open("a") as output:
        print(STARTED, file=output, flush=True)
        began = time.perf_counter()
        process = subprocess.Popen(
            contender.command(place),
            cwd=PROJECT,
            env={**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                has_ended = process.poll() is not None
                now = time.perf_counter() - began
                said = contender.accuracies(place)[said_before:]
                evaluations += [(now, accuracy) for accuracy in said[len(evaluations) :]]
                peak = max(peak, rss_bytes(mark))
                was_killed = kill_after is not None and now >= kill_after
                if has_ended or was_killed or any(accuracy >= until for _, accuracy in evaluations):
                    break
                if now > timeout_seconds:
                    raise RuntimeError(f"{contender.name} did not end within {timeout_seconds:.0f} s:\n{text_of(log)[-3000:]}")
                time.sleep(LOOK_SECONDS)
        finally:
            kill_all(mark)
            returncode = process.wait()
    return Life(
        seconds=now,
        evaluations=tuple(evaluations),
        peak_rss_bytes=peak,
        was_killed=was_killed and not has_ended,
        failure=f"ended with {returncode}:\n{text_of(log)[-3000:]}" if has_ended and returncode else "",
    )


def marked(mark: str) -> Iterator[int]:
    """The living processes that have this mark."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def rss_bytes(mark: str) -> int:
    total = 0
    for pid in marked(mark):
        with contextlib.suppress(OSError):  # it has just ended
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return total


def kill_all(mark: str, *, sleep: Callable[[float], object] = time.sleep) -> None:
    """SIGKILL to all of a command's processes at once, as when its machine is lost, until none is left."""
    while pids := list(marked(mark)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sleep(0.05)
