"""What this process may use of the machine: CPUs, memory, open files, shared memory. Linux; no Ray, no torch.

trainer/run.py asks for CPUs before it starts a local Ray, the ranks ask for memory before they decide what to cache. Others limit a
process below what the machine has: an affinity (taskset, Slurm), a control group (Docker, Kubernetes, systemd; version 1 or 2, and the
limits of all groups around it hold too), and resource limits (ulimit).

Files are read through `read(path)`, which returns None for a file that is not there; tests pass in what other machines say.
"""

import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

Read = Callable[[str], str | None]

OPEN_FILES = 1024
"""Fewest open files with which a run is started: the raylet of a local Ray holds some hundreds of sockets and pipes."""
MOST_OPEN_FILES = 65_536
"""More is not asked for: some programs, when they start another, close every number up to the limit."""
SHARED_MEMORY_BYTES = 64 << 20
"""Docker's default for /dev/shm. With less, Ray's object store moves to /tmp, and NCCL fails between GPUs of one node."""
_V1_UNLIMITED_BYTES = 1 << 60
"""Version 1 says "no limit" as the largest number of whole pages."""


def read_file(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:  # not there, or not for us
        return None


# CPUs


def usable_cpus(read: Read = read_file, *, allowed: int | None = None) -> int:
    """CPUs that this process can keep busy: those that it may run on, or fewer where a control group limits the time on them. A quota of
    1.5 CPUs counts as 2, as in Go and Java: two threads then get 1.5 CPUs' worth of work done, one would get 1.

    `allowed`: the CPUs of its affinity, for tests."""
    allowed = len(os.sched_getaffinity(0)) if allowed is None else allowed
    return max(1, min([allowed, *(math.ceil(quota - 1e-6) for quota in _cpu_quotas(read))]))


def _cpu_quotas(read: Read) -> Iterator[float]:
    for folder in _groups(read, "cpu"):
        if (text := read(f"{folder}/cpu.max")) is not None:
            quota = parse_cpu_max(text)
        else:
            quota = parse_cfs(read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us"))
        if quota is not None:
            yield quota


def parse_cpu_max(text: str) -> float | None:
    """CPUs in a cpu.max, such as "150000 100000"; None for "max 100000"."""
    quota, period = [*text.split(), "100000"][:2]
    return None if quota == "max" else int(quota) / int(period)


def parse_cfs(quota: str | None, period: str | None) -> float | None:
    """CPUs in version 1's cpu.cfs_quota_us and cpu.cfs_period_us; None for no limit (-1)."""
    if quota is None or period is None or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)


# Memory


def available_memory_bytes(read: Read = read_file) -> int:
    """Memory that this process could still allocate: the machine's available memory, or less where a control group sets a limit. File
    contents that the kernel would drop (inactive_file) do not count as used."""
    return max(0, min([parse_available(read("/proc/meminfo") or ""), *(limit - used for limit, used in _memory_limits(read))]))


def memory_limit_bytes(read: Read = read_file) -> int | None:
    """The smallest limit of the control groups of this process; None if none has any."""
    return min((limit for limit, _ in _memory_limits(read)), default=None)


def _memory_limits(read: Read) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be dropped) of each group that has a limit."""
    for folder in _groups(read, "memory"):
        if (text := read(f"{folder}/memory.max")) is not None:
            limits = [parse_limit(text), parse_limit(read(f"{folder}/memory.high") or "max")]
            used, droppable = read(f"{folder}/memory.current"), "inactive_file"
        else:
            limits = [parse_limit(read(f"{folder}/memory.limit_in_bytes") or "max")]
            used, droppable = read(f"{folder}/memory.usage_in_bytes"), "total_inactive_file"
        set_limits = [limit for limit in limits if limit is not None]
        if set_limits and used is not None:
            yield min(set_limits), max(0, int(used) - parse_stat(read(f"{folder}/memory.stat") or "", droppable))


def parse_available(meminfo: str) -> int:
    """MemAvailable of a /proc/meminfo, in bytes."""
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable, which Linux has since 3.14")


def parse_limit(text: str) -> int | None:
    """A limit in bytes; None for "max", and for the number that version 1 says instead."""
    text = text.strip()
    return None if text == "max" or int(text) >= _V1_UNLIMITED_BYTES else int(text)


def parse_stat(text: str, name: str) -> int:
    """A number in a memory.stat; 0 if it is not there."""
    fields = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    return int(fields.get(name, 0))


# Control groups


def _groups(read: Read, controller: str) -> list[str]:
    """Folders with the limits of this process for a controller: its group and all groups around it that can be seen here."""
    text = read("/proc/self/cgroup") or ""
    path = group_of(text, controller)
    # Version 1 has a folder for each controller; version 2, where one group has all, may lie beside it, or alone.
    root = f"/sys/fs/cgroup/{controller}" if has_v1(text, controller) else "/sys/fs/cgroup"
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root, *("/".join([root, *parts[: count + 1]]) for count in range(len(parts)))]


def has_v1(text: str, controller: str) -> bool:
    """Whether a /proc/self/cgroup names the controller in version 1."""
    return any(controller in line.split(":", 2)[1].split(",") for line in text.splitlines() if line.count(":") >= 2)


def group_of(text: str, controller: str) -> str:
    """The process's group for a controller, by a /proc/self/cgroup: that of version 1 if there is one, else that of version 2."""
    unified = ""
    for line in text.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            return path
        if number == "0" and not controllers:
            unified = path
    return unified


# Resource limits, and shared memory


def raise_open_files() -> int:
    """Raise this process's limit of open files to MOST_OPEN_FILES if it may, for itself and what it starts. Returns the limit. ValueError
    if it stays below OPEN_FILES."""
    limit, hard = (MOST_OPEN_FILES if each == resource.RLIM_INFINITY else each for each in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(hard, MOST_OPEN_FILES)
    if limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        limit = wanted
    if limit < OPEN_FILES:
        raise ValueError(
            f"this process may have {limit} files open, and a run needs {OPEN_FILES} (Ray's sockets and pipes, shards, checkpoints); raise "
            "the hard limit: ulimit -Hn as root, LimitNOFILE= in systemd, --ulimit nofile=65536 in Docker"
        )
    return limit


def shared_memory_problem(free_bytes: int | None = None) -> str:
    """What small shared memory will mean, and the remedy; "" if there is enough. `free_bytes`: of /dev/shm, for tests."""
    if free_bytes is None:
        try:
            found = os.statvfs("/dev/shm")
        except OSError:
            return "there is no /dev/shm: Ray keeps its objects in /tmp, which is slower, and several GPUs cannot work together; mount one"
        free_bytes = found.f_bavail * found.f_frsize
    if free_bytes >= SHARED_MEMORY_BYTES:
        return ""
    return (
        f"/dev/shm has {free_bytes / 1e6:.0f} MB free, less than {SHARED_MEMORY_BYTES / 1e6:.0f}: Ray keeps its objects in /tmp, which is "
        "slower, and several GPUs of this machine may fail to work together; give it more (docker run --shm-size=1g; in Kubernetes an "
        "emptyDir of medium Memory)"
    )
