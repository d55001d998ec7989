"""`python -m cluster.reaper`: outlives a killed driver and ends what it left, its processes and its folder. Started by belongings.py, and
killed by it at an orderly end.

The driver's death is seen by a descriptor of its process, so that SIGKILL, an out-of-memory kill and a crash in native code count too. The
signals that stop a run are blocked in it. It imports the standard library only.

    driver --stdin--> reaper    a line of JSON, {"driver": pid, "folder": ...}; later TOLD, if the driver has told the user why it ends
"""

import contextlib
import json
import os
import select
import sys

from cluster.leftovers import end_all
from cluster.owned_folder import remove_content

TOLD = b"told\n"


def main() -> int:
    line, _, words = os.read(0, 1 << 16).partition(b"\n")
    order = json.loads(line)
    last_words = _wait(order["driver"], words)
    if end_all(order["folder"]):
        sys.stderr.write(f"some processes of this run do not end (see /proc/PID/stack); its folder {order['folder']} stays\n")
        return 1
    remove_content(order["folder"])
    if last_words != TOLD:
        with contextlib.suppress(OSError):
            text = f"error: the driver (process {order['driver']}) was killed; what it had started is ended, and the same command goes on\n"
            os.write(2, text.encode())
    return 0


def _wait(driver: int, words: bytes) -> bytes:
    """Wait until the driver is dead. Returns its last words; it may have said `words` already."""
    try:
        alive = os.pidfd_open(driver)
    except ProcessLookupError:
        return words or _said()
    if os.getppid() != driver:
        return words or _said()
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if 0 in ready:
            words = _said() or words
            poll.unregister(0)
        if alive in ready:
            return words or _said()


def _said() -> bytes:
    try:
        return os.read(0, 1 << 10)
    except OSError:
        return b""


if __name__ == "__main__":
    raise SystemExit(main())
