"""Claims about a commit that is made again, because the coordinator that made it died: wherever that was, the checkpoint is there in the
end, and one that was there stays there all the time."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import store as module
from cluster.storage import open_storage
from cluster.store import Fenced, Receipt, Store


class Died(BaseException):
    pass


def staged(tmp_path: Path, name: str) -> tuple[Store, int, list[Receipt]]:
    store = Store.open(open_storage(tmp_path / name), "run")
    generation = store.claim_generation()
    return store, generation, [store.stage(4, generation, f"rank-{rank}", b"x" * rank) for rank in range(3)]


def again(store: Store) -> Store:
    """As another process opens it."""
    return Store.open(store.storage, "run")


def test_a_commit_that_was_cut_short_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in itertools.count(1):
        store, generation, receipts = staged(tmp_path, f"runs-{point}")
        passed = itertools.count(1)

        def reached(passed: Iterator[int] = passed, point: int = point) -> None:
            if next(passed) == point:
                raise Died

        def mortal(real: Any, reached: Any = reached) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                reached()
                result = real(*arguments, **named)
                reached()
                return result

            return call

        try:
            with monkeypatch.context() as patch:
                for owner, name in ((os, "rename"), (os, "unlink"), (module, "write_new"), (module, "sync_dir")):
                    patch.setattr(owner, name, mortal(getattr(owner, name)))
                store.commit(4, generation, receipts, {"a": 1})
        except Died:
            pass
        else:
            assert point > 10
            return
        again(store).commit(4, generation, receipts, {"a": 1})
        commit = again(store).newest_valid(print)
        assert commit is not None
        assert (commit.step, commit.meta, commit.read("rank-2")) == (4, {"a": 1}, b"xx")


def test_a_commit_that_is_there_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, generation, receipts = staged(tmp_path, "runs")
    made = store.commit(4, generation, receipts, {"a": 1})
    with monkeypatch.context() as patch:
        for owner, name in ((os, "rename"), (os, "unlink"), (module, "write_new")):
            patch.setattr(owner, name, lambda *_: pytest.fail("touched"))
        assert again(store).commit(4, generation, receipts, {"a": 1}) == made
    with pytest.raises(OSError, match="nothing is there"):  # another checkpoint of this step, which nobody staged
        again(store).commit(4, generation, receipts, {"a": 2})
    again(store).claim_generation()
    with pytest.raises(Fenced):
        again(store).commit(4, generation, receipts, {"a": 1})
