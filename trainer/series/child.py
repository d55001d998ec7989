"""The process of one run of a series, as a child that does not outlive its parent. `run_child` starts it; its callers are train.py and
trainer.audit.

`python -m trainer.series.child PARENT WORDS` asks the kernel to be sent SIGTERM when its parent dies, and becomes `python WORDS`. So a run
of a series whose command was killed saves a checkpoint and ends, and the same command goes on.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

_PR_SET_PDEATHSIG = 1
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a child ended."""

    status: int
    """Its exit status, or 128 + signal if one ended it, or came too late for it."""
    signal: int
    """Number of the first signal that came to this process meanwhile; 0: none."""


def run_child(words: Sequence[str], *, output: IO[bytes] | None = None) -> Ended:
    """Run `python WORDS` to its end; what it says goes to `output`, or where this process's words go. Signals to this process meanwhile are
    the child's: the first asks it to save and end, a second one ends it at once. Only in the main thread."""
    process: subprocess.Popen[bytes] | None = None
    heard: list[int] = []

    def pass_on(number: int) -> None:
        heard.append(number)
        if process is not None:
            process.send_signal(number)

    with hearing(pass_on):
        process = start_child(words, output=output)
        if heard:  # before there was a child
            process.send_signal(heard[0])
        status = process.wait()
    first = heard[0] if heard else 0
    if status < 0:
        return Ended(status=128 - status, signal=first)
    return Ended(status=status or (128 + first if first else 0), signal=first)


def start_child(words: Sequence[str], *, output: IO[bytes] | None = None) -> "subprocess.Popen[bytes]":
    """Start `python WORDS`, which is sent SIGTERM when the thread that calls this ends. Signals of a terminal do not reach it."""
    command = [sys.executable, "-m", "trainer.series.child", str(os.getpid()), *words]
    errors = None if output is None else subprocess.STDOUT
    # A group of its own, so that Ctrl-C in a terminal reaches it once, by us.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, process_group=0)


@contextmanager
def hearing(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile `pass_on(number)` is called for each signal that asks this process to end. Only in the main thread."""

    def heard(number: int, frame: FrameType | None) -> None:
        pass_on(number)

    numbers = [number for number in _HEARD if signal.getsignal(number) != signal.SIG_IGN]  # nohup works
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def main(argv: Sequence[str]) -> None:
    """Become the run. `argv`: the parent's process id, and the words."""
    parent, *words = argv
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before it could be asked for
        return
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(sys.argv[1:])
