"""Limits of the machine, read from what real machines say: affinity, control groups of both versions, and resource limits."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.machine import (
    OPEN_FILES,
    SHARED_MEMORY_BYTES,
    Read,
    available_memory_bytes,
    group_of,
    memory_limit_bytes,
    parse_cpu_max,
    shared_memory_problem,
    usable_cpus,
)

MEMINFO = "MemTotal:       16374260 kB\nMemFree:          612344 kB\nMemAvailable:    8388608 kB\nBuffers:          101332 kB\n"
GIB = 1 << 30

BARE = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope\n"}
"""A desktop: version 2, groups without limits; the root has no such files."""

V2_CONTAINER = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "0::/\n",
    "/sys/fs/cgroup/cpu.max": "150000 100000\n",
    "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    "/sys/fs/cgroup/memory.high": "max\n",
    "/sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
    "/sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {2 * GIB}\ninactive_anon 0\ninactive_file {GIB}\nactive_file {GIB}\n",
}
"""docker run --cpus 1.5 --memory 4g, seen from inside."""

V2_NESTED = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope\n",
    "/sys/fs/cgroup/kubepods.slice/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/kubepods.slice/memory.max": f"{7 * GIB}\n",
    "/sys/fs/cgroup/kubepods.slice/memory.current": f"{5 * GIB}\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cpu.max": "300000 100000\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/memory.max": "max\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope/memory.max": f"{6 * GIB}\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope/memory.high": f"{5 * GIB}\n",
    "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope/memory.current": f"{GIB}\n",
}
"""A pod, seen from the host: the pod limits CPUs, the container memory, and another pod has taken most of what all may have."""

V1_CONTAINER = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "\n".join(
        [
            "11:memory:/docker/0123abcd",
            "10:cpuset:/docker/0123abcd",
            "4:cpu,cpuacct:/docker/0123abcd",
            "1:name=systemd:/docker/0123abcd",
            "0::/system.slice/containerd.service",
        ]
    ),
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "/sys/fs/cgroup/memory/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {GIB // 2}\n",
}
"""Docker with version 1: the path is the host's, and what is mounted is the container's own group."""

V1_UNLIMITED = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "4:memory:/session\n3:cpuset:/\n2:cpuacct:/\n1:cpu:/\n0::/\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GIB}\n",
    "/sys/fs/cgroup/memory/session/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/session/memory.usage_in_bytes": f"{8 * GIB}\n",
}


def machine(files: dict[str, str]) -> Read:
    return files.get


@pytest.mark.parametrize(
    ("files", "cpus", "limit", "available"),
    [
        (BARE, 8, None, 8 * GIB),
        (V2_CONTAINER, 2, 4 * GIB, 2 * GIB),
        (V2_NESTED, 3, 5 * GIB, 2 * GIB),
        (V1_CONTAINER, 2, 2 * GIB, 3 * GIB // 2),
        (V1_UNLIMITED, 8, None, 8 * GIB),
        ({"/proc/meminfo": MEMINFO}, 8, None, 8 * GIB),
    ],
    ids=["bare", "v2", "v2 nested", "v1", "v1 unlimited", "no control groups"],
)
def test_the_narrowest_limit_counts(files: dict[str, str], cpus: int, limit: int | None, available: int) -> None:
    assert usable_cpus(machine(files), allowed=8) == cpus
    assert memory_limit_bytes(machine(files)) == limit
    assert available_memory_bytes(machine(files)) == available


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000", None), ("max", None), ("50000 100000", 0.5), ("400000 50000", 8.0), ("100000", 1.0)]
)
def test_a_quota_is_time_by_period(text: str, cpus: float | None) -> None:
    assert parse_cpu_max(text) == cpus


@given(st.integers(1, 64), st.integers(1_000, 10_000_000))
def test_there_is_always_a_cpu_and_never_more_than_the_affinity_allows(allowed: int, quota: int) -> None:
    files = V2_CONTAINER | {"/sys/fs/cgroup/cpu.max": f"{quota} 100000"}
    cpus = usable_cpus(machine(files), allowed=allowed)
    assert 1 <= cpus <= allowed
    assert cpus == allowed or cpus - 1 < quota / 100_000 <= cpus


def test_a_group_that_has_used_more_than_it_may_leaves_nothing_and_not_less() -> None:
    assert available_memory_bytes(machine(V2_CONTAINER | {"/sys/fs/cgroup/memory.current": f"{9 * GIB}"})) == 0


def test_the_group_of_a_controller_is_that_of_version_1_where_both_are_mounted() -> None:
    text = V1_CONTAINER["/proc/self/cgroup"]
    assert group_of(text, "cpu") == "/docker/0123abcd"
    assert group_of(text, "hugetlb") == "/system.slice/containerd.service"
    assert group_of("", "cpu") == ""


def in_a_process(code: str, *, cpus: set[int] | None = None) -> str:
    def limit() -> None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    run = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.strip()


def test_a_process_that_was_given_one_cpu_counts_one() -> None:
    one = {min(os.sched_getaffinity(0))}
    assert in_a_process("from cluster.machine import usable_cpus; print(usable_cpus())", cpus=one) == "1"
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


def test_this_machine_has_memory() -> None:
    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 1 << 20 < available_memory_bytes() < total


def test_open_files_are_as_many_as_allowed_and_too_few_are_refused_by_name() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = "import resource; from cluster.machine import raise_open_files; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))\n"
    more = limits.format(256, min(hard, 4096)) + "print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert in_a_process(more) == "4096 4096 4096"
    fewer = limits.format(256, 512) + "try: raise_open_files()\nexcept ValueError as error: print(error)"
    said = in_a_process(fewer)
    assert f"may have 512 files open, and a run needs {OPEN_FILES}" in said
    assert "LimitNOFILE=" in said


def test_small_shared_memory_is_said_with_its_remedy() -> None:
    assert shared_memory_problem(SHARED_MEMORY_BYTES) == ""
    assert "/dev/shm has 17 MB free" in shared_memory_problem(16 << 20)
    assert "--shm-size" in shared_memory_problem(0)


def test_a_run_that_may_use_one_cpu_takes_one_thread() -> None:
    """`taskset -c 0`: it took as many as the machine has cores, and they shared one."""
    code = (
        "from cluster.config import ClusterConfig; from cluster.launch import ClusterHardware, plan_resources\n"
        "from trainer.run import environment\n"
        "here = ClusterHardware(local=True, nodes=1, cpus=environment().cpus, gpus=0)\n"
        "print(here.cpus, plan_resources('1', ClusterConfig(), here).threads_per_worker)"
    )
    assert in_a_process(code, cpus={min(os.sched_getaffinity(0))}) == "1 1"
