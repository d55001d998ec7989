"""`python -m cluster.reaper DRIVER FOLDER`: outlives a driver and ends what it left, its processes and its folder, and takes its processes
off the list that Prometheus reads: when the driver is dead, or when it says so. Started by belongings.py.

The driver's death is seen by a descriptor of its process, so that SIGKILL, an out-of-memory kill and a crash in native code count too. The
signals that stop a run are blocked in it. It imports the standard library only.

    driver --stdin--> reaper    TOLD, if the driver has told the user why it ends; NOW, if all is to be ended while its process waits
"""

import contextlib
import os
import select
import sys

from cluster.leftovers import end_all
from cluster.owned_folder import remove_content
from cluster.target_list import take_back_noted

TOLD = b"told\n"
NOW = b"now\n"


def main(driver: int, folder: str) -> int:
    last_words = _wait(driver)
    was_killed = os.path.exists(folder) and TOLD not in last_words  # a driver in another program removes it itself
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
    """Wait until the driver is dead or says NOW. Returns its last words."""
    try:
        alive = os.pidfd_open(driver)
    except ProcessLookupError:
        return _said()
    if os.getppid() != driver:
        return _said()
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(0, select.POLLIN)
    words = b""
    while NOW not in words:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if 0 in ready:
            said = _said()
            words += said
            if not said:
                poll.unregister(0)
        elif alive in ready:
            break
    return words


def _said() -> bytes:
    """What is in the pipe whose other end was the driver's alone; b"" if that is closed."""
    try:
        return os.read(0, 1 << 10)
    except OSError:
        return b""


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2]))
