"""`python -m cluster.reaper DRIVER FOLDER`: outlives a killed driver and ends what it left, its processes and its folder, and takes its
processes off the list that Prometheus reads. Started by belongings.py, and killed by it at an orderly end.

The driver's death is seen by a descriptor of its process, so that SIGKILL, an out-of-memory kill and a crash in native code count too. The
signals that stop a run are blocked in it. It imports the standard library only.

    driver --stdin--> reaper    TOLD, if the driver has told the user why it ends
"""

import contextlib
import os
import select
import sys

from cluster.leftovers import end_all
from cluster.owned_folder import remove_content
from cluster.target_list import take_back_noted

TOLD = b"told\n"


def main(driver: int, folder: str) -> int:
    last_words = _wait(driver)
    was_killed = os.path.exists(folder) and last_words != TOLD  # an orderly end removes it
    stays = end_all(folder)
    take_back_noted(folder)
    if stays:
        sys.stderr.write(f"some processes of this run do not end (see /proc/PID/stack); its folder {folder} stays\n")
        return 1
    remove_content(folder)
    if was_killed:
        with contextlib.suppress(OSError):
            text = f"error: the driver (process {driver}) was killed; what it had started is ended, and the same command goes on\n"
            os.write(2, text.encode())
    return 0


def _wait(driver: int) -> bytes:
    """Wait until the driver is dead. Returns its last words."""
    try:
        alive = os.pidfd_open(driver)
    except ProcessLookupError:
        return _said()
    if os.getppid() == driver:
        poll = select.poll()
        poll.register(alive, select.POLLIN)
        poll.poll()
    return _said()


def _said() -> bytes:
    """What is in the pipe whose other end was the driver's alone."""
    try:
        return os.read(0, 1 << 10)
    except OSError:
        return b""


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2]))
