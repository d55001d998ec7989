"""A command's exit status is what its main function says, whatever native libraries do when the process is taken down. Real processes."""

import ast
import signal
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


INTERRUPTS = """
import os, signal

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
"""


@pytest.mark.parametrize("inherited", ["SIG_DFL", "SIG_IGN"])
def test_ctrl_c_that_a_command_has_no_words_for_ends_it_with_a_line(inherited: str) -> None:
    before = f"import signal; signal.signal(signal.SIGINT, signal.{inherited})\n"  # SIG_IGN: in the background of a shell's script
    done = run(before, LEAVES, INTERRUPTS, ENDS.format(end="interrupt()"), "leaving.by(main)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "no end of linea thread\natexit\n", "SIGINT: stopped\n")


@pytest.mark.parametrize(
    "late", ["interrupt()", "atexit.register(interrupt); leaving.by(lambda: 0)"], ids=["while it imports", "at its end"]
)
def test_ctrl_c_outside_the_main_function_ends_the_process_without_a_traceback(late: str) -> None:
    done = run(LEAVES, INTERRUPTS, "import atexit\n", late)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


COMMANDS = sorted(
    str(path.relative_to(PROJECT))
    for package in ("dataio", "trainer", "deploy/serve")
    for path in (PROJECT / package).rglob("*.py")
    if any(is_main(statement) for statement in ast.parse(path.read_text()).body)
)


@pytest.mark.parametrize("path", [path for path in COMMANDS if path not in ("trainer/command.py", "trainer/series/child.py")])
def test_every_command_ends_so(path: str) -> None:
    """trainer/command.py is the entry point of them all; trainer/series/child.py becomes another program."""
    body = ast.parse((PROJECT / path).read_text()).body
    first = next(index for index, statement in enumerate(body) if is_main(statement))
    before = [ast.unparse(statement) for statement in body[1:first]]
    assert [line for line in before if not line.startswith(("from dataio.leaving import", "from dataio.terminal import"))] == []
    assert ast.unparse(body[first]).startswith("if __name__ == '__main__':\n    leaving = Leaving()\n    prepare_output(")
    assert "leaving.by(" in ast.unparse(body[-1])


def test_the_commands_are_found() -> None:
    assert {"trainer/run.py", "trainer/predict.py", "dataio/convert.py", "deploy/serve/__main__.py"} <= set(COMMANDS)


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
