"""What /proc says of a process is read as the kernel writes it, whatever the process calls itself."""

import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from cluster.process import TICKS_PER_SECOND, ProcessStat, parse_stat, process_stat

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=15)


@given(
    pid=st.integers(1, 2**22),
    name=NAMES,
    state=st.sampled_from("RSDTtZXI"),
    parent=st.integers(0, 2**22),
    ticks=st.tuples(*[st.integers(0, 2**40)] * 4),
    start_ticks=st.integers(0, 2**50),
)
def test_any_name_leaves_the_fields_where_they_are(
    pid: int, name: str, state: str, parent: int, ticks: tuple[int, int, int, int], start_ticks: int
) -> None:
    """The fields of proc_pid_stat(5), from the first to the 24th."""
    before = [state, parent, *[9] * 9, *ticks, 20, 0, 1, 0, start_ticks, 7, 7]
    stat = parse_stat(f"{pid} ({name}) {' '.join(map(str, before))}\n")
    user, system, children_user, children_system = ticks
    assert stat == ProcessStat(
        pid=pid,
        name=name,
        state=state,
        parent=parent,
        cpu_seconds=(user + system) / TICKS_PER_SECOND,
        children_cpu_seconds=(children_user + children_system) / TICKS_PER_SECOND,
        start_ticks=start_ticks,
    )
    assert stat.is_alive == (state not in "ZX")


def test_a_process_that_names_itself_like_fields_is_told_by_the_kernel_as_it_is() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b') S 1 (', 0, 0, 0); print(1, flush=True); time.sleep(600)"
    began = time.time()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        stat = process_stat(child.pid)
        assert stat is not None
        assert (stat.pid, stat.name, stat.parent, stat.is_alive) == (child.pid, ") S 1 (", os.getpid(), True)
        assert abs(stat.started() - began) < 2.0
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        stopped = process_stat(child.pid)
        assert stopped is not None
        assert (stopped.state, stopped.start_ticks) == ("T", stat.start_ticks)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        dead = process_stat(child.pid)
        assert dead is not None
        assert not dead.is_alive  # a zombie: its parent has not waited for it
    assert process_stat(child.pid) is None


def test_this_process_is_itself() -> None:
    own, by_id = process_stat("self"), process_stat(os.getpid())
    assert own is not None
    assert by_id is not None
    assert (own.pid, own.parent, own.start_ticks) == (os.getpid(), os.getppid(), by_id.start_ticks)
    assert own.cpu_seconds > 0
