"""A command's exit status is what its main function says, whatever native libraries do when the process is taken down. Real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

CRASHES = """
import ctypes, os, signal
crash = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda argument: os.kill(os.getpid(), signal.SIGSEGV))
ctypes.CDLL(None).__cxa_atexit(crash, None, None)  # C's: it comes after Python's own ending
"""

LEAVES = """
from dataio.leaving import Leaving
leaving = Leaving()
"""

ENDS = """
import atexit, sys, threading, time
atexit.register(lambda: print("atexit"))
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()

def main():
    sys.stdout.write("no end of line")
    {end}
"""


def run(*parts: str) -> subprocess.CompletedProcess[str]:
    program = "".join(parts)
    return subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("return 0", 0),
        ("return 130", 130),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit", 0),
        ("sys.exit('words')", 1),
        ("raise ValueError('a bug')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_crash_of_native_code_at_the_end_changes_no_exit_status(end: str, status: int) -> None:
    done = run(LEAVES, CRASHES, ENDS.format(end=end), "leaving.by(main)")
    assert done.returncode == status
    assert done.stdout == "no end of linea thread\natexit\n"
    assert ("a bug" in done.stderr) == ("a bug" in end)
    assert ("words" in done.stderr) == ("words" in end)


def test_without_it_the_crash_is_the_exit_status() -> None:
    done = run(CRASHES, ENDS.format(end="return 130"), "sys.exit(main())")
    assert done.returncode == -11


def test_output_that_nobody_reads_any_more_is_no_error() -> None:
    closed = "import os, sys; os.close(1); sys.stdout = None\n"
    assert run(LEAVES, closed, "leaving.by(lambda: 5)").returncode == 5


@pytest.mark.parametrize(("last", "status"), [("os._exit(status + 1)", 8), ("open('/nowhere/at/all')", 7), ("pass", 7)])
def test_what_ends_the_process_in_its_place_comes_last_and_is_given_the_status(last: str, status: int) -> None:
    ends = f"""
import atexit, os
from dataio.leaving import leave_by, leaves

def last(status):
    print("last", status, flush=True)
    {last}

assert not leaves() and not leave_by(last)

def main():
    atexit.register(lambda: print("atexit"))
    assert leaves() and leave_by(last)
    return 7

leaving.by(main)
"""
    done = run(LEAVES, ends)
    assert (done.returncode, done.stdout, done.stderr) == (status, "atexit\nlast 7\n", "")
