"""The process of one fold: an ordinary run, `python -m trainer.run`, as a child. folds.py starts it by `run_child`.

`python -m trainer.audit.child ARGUMENTS` asks the kernel to be sent SIGTERM when its parent dies, and becomes `python -m trainer.run
ARGUMENTS`. So a run does not outlive an audit that was killed: it saves a checkpoint and ends, and the same command goes on.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_child(arguments: Sequence[str]) -> int:
    """Run `trainer.run` with these arguments to its end. Returns its exit status, or 128 + signal if one ended it, or came too late for
    it. Signals to this process meanwhile are the child's: the first asks it to save and end, a second one ends it at once. Only in the main
    thread."""
    # A group of its own, so that Ctrl-C in a terminal reaches it once, by us.
    command = [sys.executable, "-m", "trainer.audit.child", str(os.getpid()), *arguments]
    process: subprocess.Popen[bytes] | None = None
    heard: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if process is not None:
            process.send_signal(number)

    with _hearing(pass_on):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        if heard:  # before there was a child
            process.send_signal(heard[0])
        status = process.wait()
    if status < 0:
        return 128 - status
    return status or (128 + heard[0] if heard else 0)


@contextmanager
def _hearing(pass_on: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    numbers = [number for number in _HEARD if signal.getsignal(number) != signal.SIG_IGN]  # nohup works
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def main(argv: Sequence[str]) -> None:
    """Become the run. `argv`: the parent's process id, and the run's arguments."""
    parent, *arguments = argv
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before it could be asked for
        return
    os.execv(sys.executable, [sys.executable, "-m", "trainer.run", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
