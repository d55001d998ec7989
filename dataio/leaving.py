"""Ends a command with the exit status that its main function says. Every command does so, and names it before its other imports.

After the last line of Python, native libraries take themselves down: threads of Ray's core worker run on while the objects that they use
are destroyed. A run that Ctrl-C had stopped while Ray was starting, with everything tidied up and said, ended with a segmentation fault
there in one of ten cases, so that its status was 139 and not 130. So the process leaves without that, after Python's own ending: threads
joined, what atexit has, output written out.

Ctrl-C raises KeyboardInterrupt in the main function and nowhere else. Before and after, in imports that take seconds and when all is said,
it ends the process as it does any program, without a traceback.

What a library must not do itself at the end (Ray ends the process with status 1 if it is shut down while a thread still asks it
something) is left to `last`, which takes the process's place.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from dataio.terminal import tell

INTERRUPTED = 128 + signal.SIGINT
Last = Callable[[int], None]
"""Ends what the process has started, and the process with this exit status. Does not return, unless it fails."""

_this: "Leaving | None" = None


def leave_by(last: Last) -> bool:
    """Have this process end by `last(status)`, in the main thread, after all else that Python does at its end. False, and nothing is
    changed, where the process goes on after its main function: in a test or a notebook."""
    if _this is None:
        return False
    _this.last = last
    return True


def leaves() -> bool:
    """Whether this process ends after its main function."""
    return _this is not None


def hear_interrupts() -> None:
    """Have Ctrl-C raise KeyboardInterrupt from now on, also in the background of a shell's script, where it is ignored otherwise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Leaving:
    """Make it first of all: what is registered with atexit before it would be left out."""

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._status = 1  # of what ends by an exception that nobody catches, after Python has shown it
        self.last: Last = os._exit
        atexit.register(self._leave)

    def by(self, main: Callable[[], int]) -> NoReturn:
        """Run `main` and end the process with what it returns, or with the status of the SystemExit that it raises. A KeyboardInterrupt
        for which `main` has no words gets some."""
        global _this
        _this = self
        try:
            hear_interrupts()
            self._status = main()
        except SystemExit as error:
            self._status = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        except KeyboardInterrupt:
            self._status = INTERRUPTED
            tell("SIGINT: stopped", sys.stderr)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(self._status)

    def _leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        with contextlib.suppress(OSError):
            self.last(self._status)
        os._exit(self._status)
