"""CPU time and memory of a process and its descendants, from /proc. Called by a measured process about itself."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.process import process_stat


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Of a process and its descendants, in bytes."""

    pss_bytes: int
    """Proportional set size: a page that n processes share counts as 1/n in each. Mapped files are in it."""
    private_bytes: int
    """The part of it that is no file: heaps, stacks, shared memory."""
    peak_rss_bytes: int
    """Sum of the processes' peaks; shared pages count in each."""


def cpu_seconds() -> float:
    """User and system time of this process, of its descendants that live, and of those that were waited for."""
    seconds = 0.0
    for pid in tree():
        try:
            stat = process_stat(pid)
            # Its CPU clock, to the nanosecond (clock_getcpuclockid(3) makes its number like this); stat counts in ticks of 10 ms.
            own = time.clock_gettime(~pid << 3 | 2)
        except OSError:  # it has just ended; if it was waited for, its time is in its parent's
            continue
        if stat is not None:
            seconds += own + stat.children_cpu_seconds
    return seconds


def memory() -> Memory:
    pss = private = peak = 0
    for pid in tree():
        try:
            rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
            status = _kilobytes(Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue
        pss += rollup["Pss"]
        private += rollup["Pss"] - rollup.get("Pss_File", 0)
        peak += status.get("VmHWM", 0)
    return Memory(pss_bytes=pss * 1024, private_bytes=private * 1024, peak_rss_bytes=peak * 1024)


def tree(root: int | None = None) -> Iterator[int]:
    """`root`, by default this process, and its descendants."""
    pid = os.getpid() if root is None else root
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from tree(int(child))


def _kilobytes(text: str) -> dict[str, int]:
    pairs = (line.split(":", 1) for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) for name, value in pairs}
