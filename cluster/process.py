"""What Linux reports about a process: /proc/PID/stat, parsed in one place. No Ray, no torch.

Called by the agent (is its rank stopped?), launch (what has a local Ray started?), the driver (when did it start?) and the list of runs
(does a run's driver live?)."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessStat:
    """A process at one moment (proc_pid_stat(5))."""

    pid: int
    name: str
    """The kernel's name, at most 15 bytes; it may contain spaces and brackets."""
    state: str
    """A letter: R, S, D, T (stopped), Z (dead, not yet waited for), ..."""
    parent: int
    cpu_seconds: float
    """User and system time."""
    children_cpu_seconds: float
    """CPU time of the children that have ended and were waited for."""
    start_ticks: int
    """Start time in clock ticks since boot. Process ids are reused; an id together with this is unique."""

    @property
    def is_alive(self) -> bool:
        return self.state not in ("Z", "X", "x")

    def started(self) -> float:
        """Unix time at which the process started."""
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_ticks / TICKS_PER_SECOND)


def process_stat(pid: int | Literal["self"]) -> ProcessStat | None:
    """What /proc says about a process now; None if it is gone. Any other OSError passes through."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def parse_stat(text: str) -> ProcessStat:
    """Parse the content of a /proc/PID/stat. The name may contain anything, so it ends at the last bracket."""
    before, _, after = text.rpartition(")")
    pid, _, name = before.partition(" (")
    fields = after.split()  # starts at the third field, the state
    user, system, children_user, children_system = map(int, fields[11:15])
    return ProcessStat(
        pid=int(pid),
        name=name,
        state=fields[0],
        parent=int(fields[1]),
        cpu_seconds=(user + system) / TICKS_PER_SECOND,
        children_cpu_seconds=(children_user + children_system) / TICKS_PER_SECOND,
        start_ticks=int(fields[19]),
    )
