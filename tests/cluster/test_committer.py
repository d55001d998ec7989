"""How long the committer tries: through an outage without end, through a refusal for ten minutes, and for an old checkpoint not twice."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cluster.commits import Staged
from cluster.committer import COMMITS_WAITING, Committer
from cluster.failures import is_refusal
from cluster.metrics import Metrics
from cluster.storage import StorageOutage, StorageRefused
from cluster.store import Commit
from cluster.waiting import REFUSAL_PATIENCE_SECONDS

TRY_SECONDS = 60.0
REFUSED, AWAY = StorageRefused("the token has expired"), StorageOutage("no answer")


class Storage:
    """Each try takes a minute and ends in `answer(step, tries of that step)`, or in a commit."""

    def __init__(self, answer: Callable[[int, int], Exception | None]) -> None:
        self.answer, self.now, self.tries = answer, 0.0, Counter[int]()
        self.go = threading.Event()

    def commit(self, step: int, *_: Any, **__: Any) -> Commit:
        assert self.go.wait(20)
        self.tries[step] += 1
        self.now += TRY_SECONDS
        if (error := self.answer(step, self.tries[step])) is not None:
            raise error
        return Commit(step=step, generation=1, path=f"step-{step}", manifest={"meta": {}, "files": {}}, storage=None)  # type: ignore[arg-type]

    def prune(self, *_: Any, **__: Any) -> None: ...


def ends_of(storage: Storage, steps: list[int]) -> list[tuple[int, float, bool | None]]:
    """Of each step, put at once: when its way ended, in seconds, and whether that was a refusal; None for a commit."""
    ends: list[tuple[int, float, bool | None]] = []
    done = threading.Event()

    def settled(staged: Staged) -> None:
        if staged.step == steps[-1]:
            done.set()

    committer = Committer(
        storage,  # type: ignore[arg-type]
        1,
        2,
        on_committed=lambda staged, *_: ends.append((staged.step, storage.now, None)),
        on_failed=lambda staged, kind, error: ends.append((staged.step, storage.now, is_refusal(error))),
        on_settled=settled,
        on_waiting=lambda message: None,
        tell=lambda *_, **__: None,
        metrics=Metrics("run", "coordinator", 0, owner="coordinator"),
        clock=lambda: storage.now,
    )
    for step in steps:
        committer.put(Staged(attempt=1, step=step, receipts=[], meta={}))
    storage.go.set()
    assert done.wait(20)
    committer.close()
    return ends


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.committer.COMMIT_PAUSE_SECONDS", 0.0)


def test_a_refusal_is_waited_out_once_for_all_that_wait_and_once_for_the_last() -> None:
    storage = Storage(lambda step, tried: REFUSED)
    ends = ends_of(storage, [2, 4, 6])
    assert [step for step, _, _ in ends] == [2, 4, 6]
    assert all(was_refused for _, _, was_refused in ends)
    first, second, last = (seconds for _, seconds, _ in ends)
    assert REFUSAL_PATIENCE_SECONDS < first <= REFUSAL_PATIENCE_SECONDS + 2 * TRY_SECONDS
    assert second == first + TRY_SECONDS  # a newer one holds all that it holds
    assert REFUSAL_PATIENCE_SECONDS < last - second <= REFUSAL_PATIENCE_SECONDS + 2 * TRY_SECONDS


def test_an_outage_is_waited_out_without_end_and_refusals_between_begin_anew() -> None:
    answers = [AWAY] * 50 + [REFUSED] * 8 + [AWAY] * 50 + [REFUSED] * 8
    storage = Storage(lambda step, tried: answers[tried - 1] if tried <= len(answers) else None)
    [(step, _, was_refused)] = ends_of(storage, [2])
    assert (step, was_refused, storage.tries[2]) == (2, None, len(answers) + 1)


def test_a_checkpoint_that_is_given_up_because_too_many_wait_in_an_outage_is_none_that_was_refused() -> None:
    storage = Storage(lambda step, tried: AWAY if step == 2 else None)
    steps = list(range(2, 2 * COMMITS_WAITING + 5, 2))
    ends = ends_of(storage, steps)
    assert [(step, was_refused) for step, _, was_refused in ends] == [(2, False), *((step, None) for step in steps[1:])]


def test_after_a_commit_a_refusal_is_a_new_one() -> None:
    storage = Storage(lambda step, tried: REFUSED if step != 2 or tried < 9 else None)
    (_, committed, was_refused), (_, given_up, _), _ = ends_of(storage, [2, 4, 6])
    assert was_refused is None
    assert given_up - committed > REFUSAL_PATIENCE_SECONDS
