"""Joining and starting Ray, without Ray: which signals its processes hear."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster import ray_cluster

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_processes_started_meanwhile_do_not_hear_what_ends_a_group_and_later_ones_do(number: signal.Signals) -> None:
    wait = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with ray_cluster._signals_are_ours():
        hidden = subprocess.Popen(wait, stdout=subprocess.PIPE)
    open_to_it = subprocess.Popen(wait, stdout=subprocess.PIPE)
    for process in (hidden, open_to_it):
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
    assert open_to_it.wait(10) == -number
    assert hidden.poll() is None
    hidden.kill()
    assert hidden.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("with_thread", [False, True], ids=["main-thread-only", "another-thread-hears-it"])
def test_the_programs_own_sigterm_handler_has_the_last_word_though_ray_sets_another(with_thread: bool) -> None:
    script = f"""
        import os, signal, sys, threading, time
        from cluster.ray_cluster import _signals_are_ours
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if {with_thread}:  # begun before, so that SIGTERM is not blocked in it
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        with _signals_are_ours():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(5):
                time.sleep(0.1)
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=PROJECT, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
