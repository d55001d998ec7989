"""The driver's patience: an outage is waited out and told once, a refusal is not waited for, signals are heard, and nothing slow is waited
for while ranks train."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.patience import LONGEST_PAUSE_SECONDS, WAITING, Lately, Patience
from cluster.storage import StorageOutage, StorageRefused

AWAY = (StorageOutage("no answer"), OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"))


class Told:
    """A Patience with a clock that moves for those who sleep, and all that it says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.seconds: list[float] = []
        self.patience = Patience(
            say=self.lines.append,
            record=lambda event, **fields: self.events.append((event, fields)),
            measure=self.seconds.append,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class Failing:
    """Raises each of `errors` in turn, then answers."""

    def __init__(self, *errors: OSError) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@given(errors=st.lists(st.sampled_from(AWAY), max_size=40))
def test_an_answer_comes_after_any_number_of_failures_and_the_outage_is_told_once(errors: list[OSError]) -> None:
    told, operation = Told(), Failing(*errors)
    assert told.patience.call("the newest checkpoint", operation) == "done"
    assert operation.calls == len(errors) + 1
    assert told.names == ["storage_outage", "storage_recovered"] * bool(errors)
    assert len(told.lines) == 2 * bool(errors)
    assert told.patience.seconds_away == 0
    if errors:
        assert "the storage does not answer; waiting for it (the newest checkpoint: " in told.lines[0]
        recovered = told.events[1][1]
        assert recovered["what"] == ["the newest checkpoint"]
        assert recovered["seconds"] == pytest.approx(told.now - 1000)
        assert told.seconds[-1] == 0  # the metric ends with the outage
        assert told.seconds == [*sorted(told.seconds[:-1]), 0]
        assert told.now - 1000 <= len(errors) * LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize("error", [StorageRefused("give other keys"), PermissionError(errno.EACCES, "no"), FileNotFoundError(2, "no")])
def test_what_is_no_outage_is_not_waited_for(error: OSError) -> None:
    told, operation = Told(), Failing(error)
    with pytest.raises(type(error)) as failure:
        told.patience.call("the newest checkpoint", operation)
    assert failure.value is error
    assert operation.calls == 1
    assert told.events == []


def test_patience_may_have_an_end() -> None:
    told = Told()
    with pytest.raises(StorageOutage, match=r"summary.json: .*no answer"):
        told.patience.call("summary.json", Failing(*[AWAY[0]] * 100), seconds=30)
    assert told.now - 1000 == pytest.approx(30, abs=0.3)
    assert told.names == ["storage_outage"]
    assert told.patience.seconds_away > 29  # nobody has found it back
    assert told.patience.call("the journal", Failing()) == "done"
    assert told.names == ["storage_outage", "storage_recovered"]


def test_what_can_be_done_without_is_asked_for_once() -> None:
    told, operation = Told(), Failing(*[AWAY[1]] * 3)
    for _ in range(3):
        assert told.patience.once("the run's journal", operation, "instead") == "instead"
        told.now += 20
    assert operation.calls == 3
    assert told.lines == ["the storage does not answer; the run goes on without (the run's journal: [Errno 5] Input/output error)"]
    assert told.seconds == [0, 20, 40]
    assert told.patience.once("the run's journal", operation, "instead") == "done"
    assert told.lines[1:] == ["the storage answers again, after 60 s"]


def test_a_refusal_of_what_can_be_done_without_is_told_once_and_the_run_goes_on() -> None:
    told, refusal = Told(), StorageRefused("the storage refuses bucket/x; the credentials are not valid (any more)")
    operation = Failing(refusal, refusal)
    assert [told.patience.once("the run's journal", operation, "instead") for _ in range(3)] == ["instead", "instead", "done"]
    (line,) = told.lines
    assert "credentials are not valid" in line
    assert told.events == []
    told.patience.once("the run's journal", Failing(refusal), "")  # after it had answered
    assert len(told.lines) == 2


def test_an_answer_to_a_question_of_before_the_newest_failure_does_not_end_an_outage() -> None:
    told = Told()
    old_question, asked = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        assert old_question.wait(30)

    thread = threading.Thread(target=lambda: told.patience.once("old", slow, None))
    thread.start()
    assert asked.wait(30)
    told.now += 1
    told.patience.once("new", Failing(AWAY[0]), "")
    old_question.set()
    thread.join()
    assert told.names == ["storage_outage"]
    told.patience.once("newer", Failing(), "")
    assert told.names == ["storage_outage", "storage_recovered"]


# Signals


def on_signal(number: int) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Whether the signal has come, and what puts things back."""
    heard: list[int] = []
    before = signal.signal(number, lambda *_: heard.append(number))
    return lambda: bool(heard), lambda: signal.signal(number, before) and None


def test_a_signal_ends_the_wait_in_an_outage_at_once() -> None:
    shown: list[str] = []
    patience = Patience(say=lambda line: None, record=lambda event, **fields: None)
    is_stopping, restore = on_signal(signal.SIGTERM)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with patience.watched(show=shown.append, is_stopping=is_stopping), pytest.raises(StorageOutage):
            patience.call("the newest checkpoint", Failing(*[AWAY[0]] * 1000))
        assert time.monotonic() - began < 30
        assert WAITING in shown
    finally:
        restore()


def test_a_signal_is_heard_while_the_storage_is_silent() -> None:
    """The operation itself never ends: a file system that hangs, a server that accepts and says nothing."""
    patience = Patience(say=lambda line: None, record=lambda event, **fields: None)
    patience.once("before", Failing(AWAY[0]), "")
    never = threading.Event()
    is_stopping, restore = on_signal(signal.SIGINT)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with patience.watched(show=lambda waiting: None, is_stopping=is_stopping), pytest.raises(StorageOutage, match="is to stop"):
            patience.call("the newest checkpoint", lambda: never.wait(60))
    finally:
        restore()
        never.set()


def test_a_second_signal_ends_the_program_in_the_middle_of_a_wait() -> None:
    def leave(*_: object) -> None:
        raise SystemExit(130)

    never = threading.Event()
    before = signal.signal(signal.SIGINT, leave)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(SystemExit):
            Patience(say=lambda line: None, record=lambda event, **fields: None).call("x", lambda: never.wait(60))
    finally:
        signal.signal(signal.SIGINT, before)
        never.set()


def test_a_wait_in_another_thread_draws_nothing() -> None:
    told = Told()
    shown: list[str] = []
    answers: list[str] = []
    with told.patience.watched(show=shown.append, is_stopping=lambda: True):
        thread = threading.Thread(target=lambda: answers.append(told.patience.call("x", Failing(*AWAY))))
        thread.start()
        thread.join()
    assert answers == ["done"]
    assert shown == []


# Slow questions


def test_a_slow_question_holds_up_nobody_and_is_put_once_at_a_time() -> None:
    now = 100.0
    goes_on, ended = threading.Semaphore(0), threading.Semaphore(0)
    asked: list[float] = []

    def question() -> str:
        asked.append(now)
        assert goes_on.acquire(timeout=30)
        threading.Timer(0.01, ended.release).start()
        return f"of {asked[-1]:g}"

    lately = Lately(5.0, question, "first", clock=lambda: now)
    assert lately() == "first"
    assert asked == []  # not before its time
    for _ in range(20):
        now += 1
        assert lately() == "first"  # the storage is silent
    assert asked == [106.0]
    goes_on.release()
    assert ended.acquire(timeout=30)
    while lately() == "first":
        time.sleep(0.001)
    assert lately() == "of 106"
    while len(asked) < 2:
        now += 6
        lately()
        time.sleep(0.001)
    goes_on.release()
