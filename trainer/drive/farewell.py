"""Lets Prometheus learn how a run has ended, before the run's processes are gone. Called by ending.py.

It takes time only where a Prometheus reads the run: one scrape and one refresh of its targets. What it has not read it cannot know, and a
finished run would look like a killed one."""

import time
from contextlib import suppress

import ray

from trainer.drive.session import Session
from trainer.drive.signals import Signals

DRAIN_SECONDS = 5.0
LATE_SECONDS = 5.0
POLL_SECONDS = 0.2


def tell_state(session: Session, state: str) -> float:
    """Export the run's last state. Returns for how many seconds at most wait_for_prometheus() will wait: 0 where none reads this run, or
    where the coordinator is gone."""
    return float(session.order("ended", state) or 0.0)


def wait_for_prometheus(session: Session, signals: Signals, seconds: float) -> None:
    """Wait until Prometheus has read that the run is over and has no process of it to scrape; `seconds` is from tell_state(). A signal ends
    the wait."""
    if seconds <= 0:
        return
    session.console.print(
        f"Prometheus reads this run: waiting until it knows of the end, {seconds:.0f} s at most; Ctrl-C ends the wait", soft_wrap=True
    )
    heard, end = signals.number, time.monotonic() + seconds + DRAIN_SECONDS + LATE_SECONDS
    with suppress(ray.exceptions.RayError):
        finished = session.call("finish", DRAIN_SECONDS)
        while time.monotonic() < end and signals.number == heard:
            if ray.wait([finished], timeout=POLL_SECONDS)[0]:
                return
