"""Ends a command with the exit status that its main function says. trainer/run.py and trainer/command.py use it, before other imports.

After the last line of Python, native libraries take themselves down: threads of Ray's core worker run on while the objects that they use
are destroyed. A run that Ctrl-C had stopped while Ray was starting, with everything tidied up and said, ended with a segmentation fault
there in one of ten cases, so that its status was 139 and not 130. So the process leaves without that, after Python's own ending: threads
joined, what atexit has, output written out.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT


class Leaving:
    """Make it first of all: what is registered with atexit before it would be left out."""

    def __init__(self) -> None:
        self._status = 1  # of what ends by an exception that nobody catches, after Python has shown it
        atexit.register(self._leave)

    def by(self, main: Callable[[], int]) -> NoReturn:
        """Run `main` and end the process with what it returns, or with the status of the SystemExit that it raises."""
        try:
            self._status = main()
        except SystemExit as error:
            self._status = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        except KeyboardInterrupt:
            self._status = INTERRUPTED
            raise
        sys.exit(self._status)

    def _leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(self._status)
