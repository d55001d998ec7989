"""CPU time and memory of a process and its descendants, from /proc. A measured process (child.py) calls it about itself."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.process import process_stat


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of a process and its descendants, in bytes."""

    pss_bytes: int
    """Proportional set size: a page shared by n processes counts as 1/n in each. It includes mapped files."""
    private_bytes: int
    """The part that is not files: heaps, stacks, shared memory."""
    peak_rss_bytes: int
    """Sum of the processes' peaks; shared pages count in each process."""


def cpu_seconds() -> float:
    """User and system time of this process, of its living descendants, and of those that were waited for."""
    seconds = 0.0
    for pid in tree():
        try:
            stat = process_stat(pid)
            # Its CPU clock, in nanoseconds (clock_getcpuclockid(3) computes the clock's number like this); stat counts in ticks of 10 ms.
            own = time.clock_gettime(~pid << 3 | 2)
        except OSError:  # it has just ended; if it was waited for, its parent has its time
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
