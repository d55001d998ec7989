"""A driver waits for Prometheus at its end where one reads the run, says so, and is not kept from ending by a signal."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trainer.drive import farewell
from trainer.drive.farewell import tell_state, wait_for_prometheus
from trainer.drive.signals import Signals


class Coordinator:
    """`most` is for how long it would wait; it has been read after `rounds` looks."""

    def __init__(self, most: float | None, rounds: int, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.console = Console(width=200, record=True, quiet=True)
        self._most, self._rounds = most, rounds
        patch.setattr(farewell.ray, "wait", self._wait)
        self.session: Any = SimpleNamespace(order=self._order, call=self._call, console=self.console)

    def _order(self, *asked: Any) -> float | None:
        self.asked.append(asked)
        return self._most

    def _call(self, *asked: Any) -> str:
        self.asked.append(asked)
        return "reference"

    def _wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert references == ["reference"]
        self._rounds -= 1
        return (references, []) if self._rounds < 0 else ([], references)


def test_it_is_waited_for_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator(8.5, 3, monkeypatch)
    most = tell_state(coordinator.session, "finished")
    wait_for_prometheus(coordinator.session, Signals(), most)
    assert coordinator.asked == [("ended", "finished"), ("finish", farewell.DRAIN_SECONDS)]
    assert coordinator._rounds == -1


@pytest.mark.parametrize("most", [0.0, None])  # nobody reads the run; the coordinator is gone
def test_where_nobody_reads_the_run_nothing_is_asked_and_nothing_said(monkeypatch: pytest.MonkeyPatch, most: float | None) -> None:
    coordinator = Coordinator(most, 10**9, monkeypatch)
    wait_for_prometheus(coordinator.session, Signals(), tell_state(coordinator.session, "failed"))
    assert coordinator.asked == [("ended", "failed")]
    assert coordinator.console.export_text() == ""


def test_a_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, signals = Coordinator(60.0, 10**9, monkeypatch), Signals()
    looks = 0

    def wait(references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        nonlocal looks
        looks += 1
        if looks == 2:
            signals._number = 2
        return [], references

    monkeypatch.setattr(farewell.ray, "wait", wait)
    wait_for_prometheus(coordinator.session, signals, 60.0)
    assert looks == 2


def test_a_wait_that_is_not_answered_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, now = Coordinator(60.0, 10**9, monkeypatch), [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(farewell, "time", SimpleNamespace(monotonic=monotonic))
    began = time.monotonic()
    wait_for_prometheus(coordinator.session, Signals(), 60.0)
    assert now[0] <= 60 + farewell.DRAIN_SECONDS + farewell.LATE_SECONDS + 3
    assert time.monotonic() - began < 5
