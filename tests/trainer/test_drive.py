"""What the driver reads out of a status: with a real coordinator, no Ray."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import pytest

from cluster.beat import Beat
from cluster.coordinator import Coordinator
from cluster.roster import RankInfo
from trainer.drive.drive import Drive, has_begun
from trainer.settings.tree import RunConfig

HERE = RankInfo(host="here", pid=1, node_id="node", metrics_address="")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(str(tmp_path), "run", 1, 2)
    coordinator.start_attempt(1, 2, 10)
    yield coordinator
    coordinator.close()


class _NoNews:
    """A coordinator whose news never comes; `status` is what it says at once."""

    def __init__(self) -> None:
        self.news = self

    def remote(self, *_: object) -> "_NoNews":
        return self

    def future(self) -> "Future[None]":
        return Future()


class _Fleet:
    workers = 1

    def wait(self, timeout_seconds: float) -> bool:
        return False


def test_a_driver_that_waits_hears_of_a_signal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive.__new__(Drive)
    drive.signal, drive.signal_at, drive.config = 0, 0.0, RunConfig()
    drive.coordinator, drive.woken = _NoNews(), SimpleQueue()
    monkeypatch.setattr(drive, "ask", lambda method: method)
    kill = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with drive.signals():
        kill.start()
        began = time.monotonic()
        assert drive.wait_for_news(_Fleet(), 0, is_told=False) == "status"  # type: ignore[comparison-overlap, arg-type]
    assert drive.signal == signal.SIGINT
    assert time.monotonic() - began < 30  # else it waits a minute for the news


def beat(coordinator: Coordinator, rank: int, steps_done: int, phase: str) -> None:
    coordinator.beat(Beat(attempt=1, rank=rank, steps_done=steps_done, steps_begun=steps_done + 1, phase=phase, ticks=1))


def test_an_attempt_has_begun_once_a_rank_may_have_steps_that_are_not_saved(coordinator: Coordinator) -> None:
    assert not has_begun(coordinator.status())
    for rank in range(2):
        coordinator.register(1, rank, HERE)
        beat(coordinator, rank, 10, "starting")
    assert not has_begun(coordinator.status())
    beat(coordinator, 1, 10, "step")  # it may have done many since
    assert has_begun(coordinator.status())


def test_a_rank_that_compiles_again_after_its_first_steps_has_begun(coordinator: Coordinator) -> None:
    for rank in range(2):
        beat(coordinator, rank, 14, "starting")
    assert has_begun(coordinator.status())
