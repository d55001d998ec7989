"""Claims about calls whose answer gets lost: they are repeated until they are answered."""

import threading
from multiprocessing import Pipe
from typing import Any

import pytest

from cluster.agent import CALL_PATIENCE_SECONDS, Asking
from cluster.rank import CallFailed, Calls, serve_calls


class Lost(Exception):
    pass


class Far:
    """A coordinator that does not answer for `silent` calls, each of which takes a minute."""

    def __init__(self, silent: int) -> None:
        self.silent, self.now = silent, 0.0
        self.got: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def send(self, method: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        self.got.append((method, args, dict(kwargs)))
        if len(self.got) <= self.silent:
            self.now += 60.0
            raise Lost("timed out")
        if method == "refuse":
            raise ValueError("no")
        return "answer"

    def asking(self) -> Asking:
        return Asking(self.send, (Lost,), clock=lambda: self.now, sleep=lambda seconds: None)


def test_a_call_is_repeated_as_it_was_until_it_is_answered() -> None:
    far = Far(silent=5)
    assert far.asking()("event", "evaluation", step=4) == "answer"
    assert len(far.got) == 6
    method, args, kwargs = far.got[0]
    assert all(call == far.got[0] for call in far.got)
    assert (method, args, kwargs["step"]) == ("event", ("evaluation",), 4)
    other = Far(silent=0)
    other.asking()("event", "evaluation", step=4)
    assert other.got[0][2]["call_id"] != kwargs["call_id"]  # two events may be alike
    far.asking()("ack", 1, 0, 4, [])
    assert far.got[-1] == ("ack", (1, 0, 4, []), {})


def test_nobody_waits_for_ever_and_an_exception_is_an_answer() -> None:
    far = Far(silent=10**9)
    with pytest.raises(CallFailed, match=r"did not answer 'ack' for 6\d\d s \(timed out\)"):
        far.asking()("ack", 1, 0, 4, [])
    assert far.now <= CALL_PATIENCE_SECONDS + 60.0
    refusing = Far(silent=1)
    with pytest.raises(ValueError, match="no"):
        refusing.asking()("refuse")
    assert len(refusing.got) == 2


def test_an_order_is_not_repeated_because_the_next_one_says_more() -> None:
    far = Far(silent=1)
    with pytest.raises(Lost):
        far.asking()("order", 1, 0, None)
    assert len(far.got) == 1


def test_a_call_that_failed_so_says_it_in_the_rank_as_it_was_said() -> None:
    rank, agent = Pipe()
    calls = Calls(rank)

    def ask(method: str) -> None:
        raise CallFailed("the coordinator did not answer 'ack' for 660 s (timed out)")

    threading.Thread(target=serve_calls, args=(agent, ask, lambda error: None), daemon=True).start()
    threading.Thread(target=lambda: calls("ack"), daemon=True).start()
    answer = rank.recv()  # not by Calls.listen, which ends the process with its connection
    assert type(answer.error) is CallFailed
    assert str(answer.error) == "the coordinator did not answer 'ack' for 660 s (timed out)"
