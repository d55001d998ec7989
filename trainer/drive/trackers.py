"""Copies the run into experiment trackers while it trains (`track`): a process `finetune track` for each, beside the driver. Called by
start.py.

The processes read the run's folder, as they would from anywhere else. What becomes of them is told, and nothing else: a tracker that is
away, refuses or hangs costs the run nothing. They belong to the driver (cluster/belongings.py) and go with it, however it ends; what a
tracker has not been told by then the same command, or `finetune track`, tells it later.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cluster.redact import redact
from trainer.drive.signals import Signals
from trainer.runs.folder import RunFolder
from trainer.settings.programs import program
from trainer.settings.trackers import trackers_of
from trainer.settings.tree import RunConfig

LAST_WORD_SECONDS = 30.0
"""How long the trackers have to take the end of the run."""
POLL_SECONDS = 0.1
Tell = Callable[[str], None]


@contextmanager
def tracked(config: RunConfig, folder: RunFolder, signals: Signals, tell: Tell) -> Iterator[None]:
    """Inside the context the run is copied into the trackers that `config` names. At its end they have some seconds for the last word,
    which a signal cuts short."""
    started = list(_started(config, folder.location, tell))
    try:
        yield
    finally:
        heard, deadline = signals.number, time.monotonic() + LAST_WORD_SECONDS
        while any(each.is_at_work for each in started) and time.monotonic() < deadline:
            if signals.number != heard or signals.cuts_short:
                break
            time.sleep(POLL_SECONDS)
        for each in started:
            each.end()


def _started(config: RunConfig, run: str, tell: Tell) -> "Iterator[_Tracker]":
    for name, place in trackers_of(config.track).items():
        words = [run, "--to", name, *(["--at", place] if place else [])]
        try:
            yield _Tracker(name, words, tell)
        except OSError as error:  # no room for another process
            tell(f"{name}: {program('track')} cannot be started ({error.strerror}); the run goes on without")


class _Tracker:
    """`finetune track`, as a child whose words are told."""

    def __init__(self, name: str, words: Sequence[str], tell: Tell) -> None:
        self._name, self._tell = name, tell
        self._again = f"{program('track')} {shlex.join(redact(word) for word in words)}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.track", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,  # Ctrl-C in a terminal is for the run, whose end is still to be told
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    @property
    def is_at_work(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Let it go if it still works, and say how the rest is told."""
        if self.is_at_work:
            self._process.kill()
            self._tell(f"{self._name} has not all of the run yet; this tells it the rest: {self._again}")
        self._process.wait()
        self._reader.join(timeout=1.0)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tell(f"{self._name}: {line.decode(errors='replace').rstrip()}")
