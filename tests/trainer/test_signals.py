"""A signal may come at any moment of a command: what it does and what is said of it depend on the phase, and what is said is true."""

import select
import signal
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.drive.signals import INTERRUPTIBLE, Phase, Signals, farewell

NEWEST = "the same command goes on from the newest saved checkpoint"
# phase -> what is said after "SIGINT: stopped"
SAID = {
    Phase.BEGINNING: " before training began; the same command starts again",
    Phase.DRY_RUN: "; a dry run changes nothing",
    Phase.SETTING_UP: " before training began; the same command starts again",
    Phase.PREPARING_DATA: " while the data were opened or converted; the same command goes on after the last complete shard",
    Phase.RESUMING: f" before training went on; {NEWEST}",
    Phase.TRAINING: f"; {NEWEST}",
    Phase.ENDING: " while the end of the run was written down; the same command completes it",
    Phase.REPORTING: " before report.html was written; the same command, or python -m trainer.report, writes it",
    Phase.OVER: "; all of the run is written",
}


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Signals:
    """At each look at the clock a second has passed."""
    now = iter(range(100, 1000))
    monkeypatch.setattr("trainer.drive.signals.time", SimpleNamespace(monotonic=lambda: next(now)))
    return Signals()


@pytest.mark.parametrize("phase", Phase)
def test_each_phase_has_a_sentence_and_only_before_training_it_says_so(phase: Phase) -> None:
    assert farewell(phase, "SIGINT") == f"SIGINT: stopped{SAID[phase]}"
    assert farewell(phase, "SIGHUP", at_once=True) == f"SIGHUP: stopped at once{SAID[phase]}"
    assert ("before training" in SAID[phase]) == (phase in (Phase.BEGINNING, Phase.SETTING_UP, Phase.RESUMING))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", Phase)
def test_the_first_signal_interrupts_what_can_be_done_again_and_lets_the_rest_be_completed(
    signals: Signals, phase: Phase, number: signal.Signals
) -> None:
    with signals.heard():
        signals.enter(phase)
        if phase in INTERRUPTIBLE:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)
    assert (signals.number, signals.name, signals.phase) == (number, number.name, phase)
    assert {Phase.BEGINNING, Phase.TRAINING, Phase.ENDING, Phase.OVER}.isdisjoint(INTERRUPTIBLE)


class Interrupted:
    """A signal comes while it is destroyed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Plain:
    """Can be referred to weakly."""


def drop_in_a_destructor() -> None:
    Interrupted()


def drop_in_a_callback() -> None:
    plain = Plain()
    reference = weakref.ref(plain, lambda _: signal.raise_signal(signal.SIGINT))
    del plain
    assert reference() is None


def waited_on(drop: Callable[[], None]) -> None:
    """As work that the signal is to interrupt: for a minute at most."""
    drop()
    for _ in range(60_000):
        select.select([], [], [], 0.001)


@pytest.mark.parametrize("drop", [drop_in_a_destructor, drop_in_a_callback])
@pytest.mark.parametrize("phase", sorted(INTERRUPTIBLE, key=lambda phase: phase.name))
def test_an_interrupt_that_python_drops_is_raised_again_and_nothing_is_printed(
    signals: Signals, phase: Phase, drop: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    dropped: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", dropped.append)
        with signals.heard():
            signals.enter(phase)
            with pytest.raises(KeyboardInterrupt):
                waited_on(drop)
    assert (dropped, signals.name) == ([], "SIGINT")
    assert capfd.readouterr().err == ""


def test_an_interrupt_that_was_dropped_is_raised_once_where_a_phase_ends_first(signals: Signals) -> None:
    with signals.heard():
        signals.enter(Phase.PREPARING_DATA)
        drop_in_a_destructor()
        with pytest.raises(KeyboardInterrupt):
            signals.enter(Phase.SETTING_UP)
        for _ in range(20):
            select.select([], [], [], 0.005)  # no second one comes


def test_other_exceptions_that_python_drops_are_shown_as_ever(signals: Signals) -> None:
    dropped: list[Any] = []

    class Faulty:
        """Its destructor fails."""

        def __del__(self) -> None:
            raise ValueError("x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", dropped.append)
        with signals.heard():
            signals.enter(Phase.SETTING_UP)
            Faulty()
        assert sys.unraisablehook == dropped.append
    assert [each.exc_type for each in dropped] == [ValueError]


@pytest.mark.parametrize("phase", Phase)
def test_a_second_signal_ends_the_command_at_once_in_every_phase(signals: Signals, phase: Phase, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    with signals.heard(), signals.leaving_by(left.append):
        signals.enter(Phase.TRAINING)
        signal.raise_signal(signal.SIGTERM)
        signals.enter(phase)  # a signal that asked for a checkpoint interrupts nothing that comes after it
        signal.raise_signal(signal.SIGINT)
    assert left == [128 + signal.SIGINT]
    assert signals.number == signal.SIGTERM
    assert capfd.readouterr().err == f"{farewell(phase, 'SIGINT', at_once=True)}\n"


def test_outside_a_run_a_second_signal_leaves_by_an_exception_and_the_same_one_twice_at_once_is_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.drive.signals.time", SimpleNamespace(monotonic=lambda: now))
    signals = Signals()
    assert (signals.number, signals.name) == (0, "")
    with signals.heard():
        signals.enter(Phase.TRAINING)
        signal.raise_signal(signal.SIGTERM)
        now += 0.1
        signal.raise_signal(signal.SIGTERM)  # to the process's group
        now += 1.0
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 128 + signal.SIGINT
    assert signals.number == signal.SIGTERM
    assert NEWEST in capfd.readouterr().err


def test_an_interrupt_that_something_swallowed_is_raised_again_before_anything_else_begins(signals: Signals) -> None:
    with signals.heard():
        signals.enter(Phase.SETTING_UP)
        with suppress(BaseException):  # as a library's destructor does
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signals.enter(Phase.TRAINING)


def test_a_signal_at_the_very_beginning_waits_until_the_command_is_armed(signals: Signals) -> None:
    with signals.heard():
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signals.enter(Phase.SETTING_UP)


def test_a_signal_while_the_end_is_written_leaves_out_what_is_not_needed_for_it(signals: Signals) -> None:
    with signals.heard():
        signals.enter(Phase.ENDING)
        signal.raise_signal(signal.SIGINT)
        assert signals.cuts_short
        with pytest.raises(KeyboardInterrupt):
            signals.enter(Phase.REPORTING)
        signals.enter(Phase.OVER)


def test_nohup_is_respected_and_all_handlers_are_given_back(signals: Signals) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in numbers]
        with signals.heard():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in handlers
        assert [signal.getsignal(number) for number in numbers] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signals.number == 0
