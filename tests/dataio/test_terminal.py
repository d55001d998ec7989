"""A command works whoever reads along, and shows what can be shown. Each test is a process of its own."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataio.terminal import prepared

PROJECT = Path(__file__).resolve().parents[2]
PRINT = """
import os, sys
from dataio.terminal import prepare_output
prepare_output(survive=SURVIVE)
BEFORE
for number in range(3000):
    print("a line of text", number)
    print("an error", number, file=sys.stderr)
os.write(WORKED, b"done")
"""


def run(*, survive: bool = True, before: str = "", **how: Any) -> tuple[int, bytes]:
    """Exit status of a command that prints a lot, and what it wrote when all was printed."""
    ours, theirs = os.pipe()
    script = PRINT.replace("SURVIVE", str(survive)).replace("BEFORE", before).replace("WORKED", str(theirs))
    try:
        done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, pass_fds=[theirs], timeout=60, check=False, **how)
    finally:
        os.close(theirs)
    with open(ours, "rb") as file:
        return done.returncode, file.read()


def test_a_reader_that_has_gone_ends_nothing() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    assert run(stdout=theirs, stderr=theirs) == (0, b"done")
    assert run(stdout=theirs, stderr=theirs, survive=False)[1] == b""  # `| head` ends other commands
    os.close(theirs)


def test_a_terminal_that_was_closed_ends_nothing() -> None:
    ours, theirs = pty.openpty()
    os.close(ours)  # writing there is EIO from now on
    assert run(stdin=theirs, stdout=theirs, stderr=theirs) == (0, b"done")
    os.close(theirs)


def test_a_full_disk_under_the_log_ends_nothing() -> None:
    with open("/dev/full", "wb") as full:
        assert run(stdout=full, stderr=full) == (0, b"done")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("survive", [False, True])
def test_descriptors_that_are_closed_at_the_start_are_nobody_elses(closed: tuple[int, ...], survive: bool, tmp_path: Path) -> None:
    """The next file that is opened would take their numbers, and get what is printed."""
    mine = tmp_path / "file"
    command = " ".join(f"{number}>&-" for number in closed)
    before = f"descriptor = os.open({str(mine)!r}, os.O_RDWR | os.O_CREAT); assert descriptor > 2; os.write(2, b'x'); os.read(0, 1)"
    script = PRINT.replace("SURVIVE", str(survive)).replace("BEFORE", before).replace("WORKED", "descriptor")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {command}', sys.executable, script],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, mine.read_text()) == (0, "done")
    assert len(done.stdout.splitlines()) == (0 if 1 in closed else 3000)


@pytest.mark.parametrize("survive", [False, True])
def test_what_an_output_cannot_show_is_escaped(survive: bool) -> None:
    script = f"""
import sys
from rich.console import Console
from dataio.terminal import prepare_output
prepare_output(survive={survive})
name = "gr\\xf6\\xdfe \\u4e2d \\udcc3"
print(name)
print(name, file=sys.stderr)
Console(width=40).print(name)
"""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, env=ascii_only, capture_output=True, timeout=60, check=True)
    shown = b"gr\\xf6\\xdfe \\u4e2d \\udcc3"
    assert (done.stdout.splitlines(), done.stderr.splitlines()) == ([shown, shown], [shown])


def test_a_stream_that_is_no_file_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream:
        pass

    stream: Any = Stream()
    assert prepared(stream, survive=True) is stream
