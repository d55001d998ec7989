"""Claims: all claims of a run say the same of it, however many drivers start at once, and whatever kills them on the way."""

import contextlib
import errno
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from cluster import claims as claims_module
from cluster.claims import Claim, Claims
from cluster.storage import Storage, open_storage
from tests.cluster.test_store import Died, Interrupted, Mortal


def objects(fs: Any = None) -> Storage:
    mock = fs or pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem())
    return Storage(fs=mock, root="runs", is_local=False, uri="mock://bucket/runs")


@pytest.fixture(params=["local", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path) if request.param == "local" else objects()


class Refused(ValueError):
    pass


def claim(storage: Storage, what: str) -> int:
    """Claims the run for a driver that takes it for `what`, and refuses to follow one that takes it for something else."""

    def check(before: Claim) -> None:
        if before.note.get("what", what) != what:
            raise Refused(f"{before.note['what']} then, {what} now")

    return Claims(storage, "run").make({"what": what}, check, floor=lambda: 0)


def notes(storage: Storage) -> list[str]:
    """What the claims say, oldest first."""
    names = [entry.name for entry in storage.list("run/generations")]
    return [Claims(storage, "run").read(int(name[1:])).note["what"] for name in names if name.startswith("g")]


def test_a_claim_says_who_and_what_and_the_next_one_sees_it(storage: Storage) -> None:
    assert [claim(storage, "cats"), claim(storage, "cats")] == [1, 2]
    said = Claims(storage, "run").read(2)
    assert (said.pid, said.note, len(said.token)) == (os.getpid(), {"what": "cats"}, 0 if storage.is_local else 8)
    with pytest.raises(Refused, match="cats then, dogs now"):
        claim(storage, "dogs")
    assert notes(storage) == ["cats", "cats"]
    assert len(storage.list("run/generations")) == (2 if storage.is_local else 4)  # a refused driver leaves nothing


@pytest.mark.parametrize("trial", range(4))
def test_of_many_drivers_that_take_a_new_run_for_different_things_only_those_of_one_kind_get_it(storage: Storage, trial: int) -> None:
    kinds = ["cats", "dogs", "cats", "dogs", "birds", "cats"]
    outcome: list[str | None] = [None] * len(kinds)
    together = threading.Barrier(len(kinds))

    def drive(number: int) -> None:
        together.wait()
        try:
            claim(storage, kinds[number])
        except Refused:
            return
        outcome[number] = kinds[number]

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = {what for what in outcome if what is not None}
    assert len(got) == 1
    assert outcome == [what if what in got else None for what in kinds]
    assert set(notes(storage)) == got


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "CLAIM_PATIENCE_SECONDS", 0.01)


@pytest.mark.usefixtures("impatient")
def test_a_driver_that_comes_at_any_call_of_another_one_s_claim_gets_the_run_or_leaves_it() -> None:
    """The other one stands still meanwhile, longer than anybody waits for it."""
    outcomes = []
    for call_number in itertools.count(1):
        storage, second = objects(), []

        def come(storage: Storage = storage, second: list[str] = second) -> None:
            try:
                claim(storage, "dogs")
                second.append("got it")
            except Refused:
                second.append("refused")

        try:
            claim(objects(Interrupted(storage.fs, call_number, come)), "cats")
            first = "got it"
        except Refused:
            first = "refused"
        if not second:
            break
        assert [first, *second].count("got it") == 1, call_number
        winner = "cats" if first == "got it" else "dogs"
        assert claim(storage, winner) > 1
        with pytest.raises(Refused):
            claim(storage, "birds")
        outcomes.append(first)
    assert set(outcomes) == {"got it", "refused"}
    assert len(outcomes) >= 5


@pytest.mark.usefixtures("impatient")
def test_death_at_any_call_of_a_claim_on_an_object_store_leaves_it_whole_or_not_at_all() -> None:
    for fatal in itertools.count(1):
        storage = objects()
        mortal = Mortal(storage.fs, fatal, Died)
        with contextlib.suppress(Died):
            claim(objects(mortal), "cats")
        if mortal.alive:
            break
        claimed = [name for entry in storage.list("run/generations") if (name := entry.name).startswith("g")]
        torn = any(not Claims(storage, "run").read(int(name[1:])).host for name in claimed)
        assert not torn or fatal > 3  # the mock publishes what was written so far, which no object store does
        if claimed and not torn:
            with pytest.raises(Refused):
                claim(storage, "dogs")
            claim(storage, "cats")
        else:
            claim(storage, "dogs")
    assert fatal > 3


def dying(fatal: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The calls that change a disk, of which the `fatal`-th raises in place of acting."""
    count = itertools.count(1)
    for name in ("open", "write", "fsync", "link", "unlink", "mkdir"):
        real = getattr(os, name)

        def call(*args: Any, real: Callable[..., Any] = real, name: str = name, **kwargs: Any) -> Any:
            if next(count) >= fatal:
                if name == "write" and next(count) == fatal + 1:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Died
            return real(*args, **kwargs)

        yield name, call


def test_death_at_any_call_of_a_claim_on_a_disk_leaves_it_whole_or_not_at_all(tmp_path: Path) -> None:
    seen = []
    for fatal in itertools.count(1):
        storage = open_storage(tmp_path / str(fatal))
        with pytest.MonkeyPatch.context() as patch:
            for name, call in dying(fatal):
                patch.setattr(os, name, call)
            try:
                claim(storage, "cats")
                is_over = True
            except Died:
                is_over = False
        if is_over:
            break
        seen.append(notes(storage))
        if seen[-1]:
            with pytest.raises(Refused):
                claim(storage, "dogs")
        assert claim(storage, "cats" if seen[-1] else "dogs") == 1 + len(seen[-1])
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ([], ["cats"])
    assert len(seen) > 8


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("content", [b"", b'{"token": "", "host": "no', b"[]", b"null", b"\xff"])
def test_a_claim_that_was_cut_short_says_nothing_and_stops_nobody(storage: Storage, content: bytes) -> None:
    """Older releases, and disks without hard links, create the file before they write it."""
    storage.write_atomic("run/generations/g0007", content)
    assert Claims(storage, "run").read(7) == Claim(generation=7)
    assert claim(storage, "cats") == 8


def test_a_claim_of_an_older_release_says_who_and_not_what(storage: Storage) -> None:
    storage.write_atomic("run/generations/g0001", json.dumps({"token": "", "host": "here", "pid": 7}).encode())
    assert Claims(storage, "run").read(1) == Claim(generation=1, host="here", pid=7)
    assert claim(storage, "cats") == 2


def test_a_claim_that_another_process_is_still_writing_is_waited_for(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    whole = Claim(generation=1, host="here", pid=7, note={"what": "dogs"}).encoded()
    storage.write_atomic("run/generations/g0001", b"")
    looked: list[int] = []
    real = Claims.read

    def read(self: Claims, generation: int) -> Claim:
        looked.append(generation)
        if len(looked) == 2:
            storage.write_atomic("run/generations/g0001", whole)
        return real(self, generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "read", read)
        with pytest.raises(Refused, match="dogs then, cats now"):
            claim(storage, "cats")
    assert len(looked) == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links_is_claimed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    storage = open_storage(tmp_path)
    assert [claim(storage, "cats"), claim(storage, "cats")] == [1, 2]
    with pytest.raises(Refused):
        claim(storage, "dogs")
    assert sorted(entry.name for entry in storage.list("run/generations")) == ["g0001", "g0002"]


def test_a_link_whose_answer_the_network_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "sent again")

    monkeypatch.setattr(os, "link", link)
    assert claim(open_storage(tmp_path), "cats") == 1
