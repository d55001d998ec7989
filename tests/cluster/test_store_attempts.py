"""A store that no attempt can damage: names of attempts, commits over commits, what cannot be read, folders that go or are copied."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from cluster.storage import Storage, open_storage
from cluster.store import Commit, CorruptCheckpoint, Receipt, Store, UnknownFormat
from tests.cluster.test_store import Died, Interrupted, Report, damage, newest_step, objects, save

READS = 4  # of a checkpoint that save() made: COMMIT, MANIFEST.json and two files
READ_FAILURES = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN]


@pytest.fixture(params=["local", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(open_storage(tmp_path) if request.param == "local" else objects(), "run")


def newest(store: Store) -> Commit:
    commit = Store.open(store.storage, "run").newest_valid(never, mark=False)
    assert commit is not None
    return commit


def never(path: str, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def stage(store: Store, step: int, attempt: int, content: bytes) -> Receipt:
    return store.stage(step, store.newest_generation(), "model.safetensors", content, attempt=attempt)


# Attempts


@pytest.mark.parametrize("attempt", [1, 3])
def test_an_attempt_that_the_run_has_given_up_cannot_touch_what_another_one_committed(store: Store, attempt: int) -> None:
    """A rank that was frozen, or an upload that hung, goes on after the next attempt has got there."""
    generation = store.claim_generation()
    save(store, 10, generation, attempt=attempt)
    save(store, 20, generation, attempt=2)
    for step in (10, 20):
        stage(store, step, 4 - attempt, b"of the other attempt")
        store.stage(step, generation, "rank-0007.json", b"of a larger group", attempt=4 - attempt)
        assert newest_step(store) == 20
    store.prune(2, generation, attempt=4, staged_below=20)
    assert [commit.step for commit in store.commits()] == [20, 10]
    assert len(store.storage.list("run/checkpoints")) == 2


def test_of_two_commits_of_a_step_the_newer_attempt_s_counts_and_each_can_be_loaded(store: Store) -> None:
    generation = store.claim_generation()
    for attempt in (1, 2, 3):
        store.commit(5, generation, [stage(store, 5, attempt, b"%d" % attempt)], {}, attempt=attempt)
    assert (newest(store).attempt, newest(store).read("model.safetensors")) == (3, b"3")
    paths = [commit.path for commit in store.commits()]
    assert len(set(paths)) == 3
    assert [store.load(5, generation, path=path).attempt for path in paths] == [3, 2, 1]
    assert store.load(5, generation).attempt == 3
    with pytest.raises(FileNotFoundError, match="no committed checkpoint of step 5"):
        store.load(5, generation, path="run/checkpoints/elsewhere")
    store.prune(2, generation)
    assert [commit.path for commit in store.commits()] == paths[:1]  # the others would be gone back to by nobody


def test_a_newer_driver_s_commit_counts_before_an_older_one_s_of_any_attempt(store: Store) -> None:
    first = store.claim_generation()
    store.commit(5, first, [stage(store, 5, 9, b"old")], {}, attempt=9)
    second = store.claim_generation()
    store.commit(5, second, [stage(store, 5, 1, b"new")], {}, attempt=1)
    assert newest(store).read("model.safetensors") == b"new"


def test_what_an_older_attempt_staged_comes_too_late(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    receipts = {attempt: [stage(store, 5, attempt, b"%d" % attempt)] for attempt in (1, 2)}
    store.commit(5, generation, receipts[2], {}, attempt=2)
    with pytest.raises(OSError, match=r"attempt 2 has committed .* already: what attempt 1 staged comes too late"):
        store.commit(5, generation, receipts[1], {}, attempt=1)
    assert newest(store).attempt == 2


def test_attempts_are_numbered_from_one(store: Store) -> None:
    store.claim_generation()
    with pytest.raises(ValueError, match="attempt=0"):
        stage(store, 5, 0, b"x")


def test_prune_spares_what_this_attempt_and_newer_ones_stage_and_no_older_one(store: Store) -> None:
    old = store.claim_generation()
    stage(store, 90, 9, b"x")
    new = store.claim_generation()
    assert new > old
    for attempt, step in itertools.product((1, 2, 3), (20, 40)):
        stage(store, step, attempt, b"x")
    save(store, 30, new, attempt=2)
    store.prune(2, new, attempt=2, staged_below=30)
    names = [entry.name.removesuffix(".tmp") for entry in store.storage.list("run/checkpoints")]
    left = sorted((name[-5:], name[:13]) for name in names if "step-00000030" not in name)
    assert left == [("a0002", "step-00000040"), ("a0003", "step-00000020"), ("a0003", "step-00000040")]
    assert newest_step(store) == 30


# A commit over a commit


def watched(calls: int, look: Callable[[], None]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The calls that change a disk: `look` before each, and the `calls`-th raises in place of acting."""
    count, busy = itertools.count(1), []
    for name in ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"):
        real = getattr(os, name)

        def call(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            if not busy:
                if next(count) >= calls:
                    raise Died
                busy.append(True)
                look()
                busy.clear()
            return real(*args, **kwargs)

        yield name, call


def test_a_commit_over_a_commit_has_no_moment_without_one_on_a_disk_and_can_be_done_again_after_any_death(tmp_path: Path) -> None:
    base = Store.open(open_storage(tmp_path / "base"), "run")
    generation = base.claim_generation()
    for step in (10, 20):
        base.commit(step, generation, [stage(base, step, 1, b"first")], {}, attempt=1)
    for fatal in itertools.count(1):
        shutil.copytree(tmp_path / "base", tmp_path / str(fatal))
        store = Store.open(open_storage(tmp_path / str(fatal)), "run")

        def look(store: Store = store) -> None:
            assert newest(store).step == 20

        receipts = [stage(store, 20, 2, b"second")]
        with pytest.MonkeyPatch.context() as patch:
            for name, call in watched(fatal, look):
                patch.setattr(os, name, call)
            try:
                store.commit(20, generation, receipts, {}, attempt=2)
                is_over = True
            except Died:
                is_over = False
        look()
        again = Store.open(store.storage, "run").commit(20, generation, receipts, {}, attempt=2)  # its coordinator was started again
        assert newest(store) == again
        assert again.read("model.safetensors") == b"second"
        if is_over:
            break
    assert fatal > 8


def test_a_commit_over_a_commit_has_no_moment_without_one_on_an_object_store() -> None:
    for call_number in itertools.count(1):
        storage = objects()
        store, looked = Store.open(storage, "run"), []
        generation = store.claim_generation()
        for step in (10, 20):
            save(store, step, generation, attempt=1)

        def look(store: Store = store, looked: list[int] = looked) -> None:
            looked.append(newest(store).step)

        interrupted = Storage(fs=Interrupted(storage.fs, call_number, look), root=storage.root, is_local=False, uri=storage.uri)
        save(Store.open(interrupted, "run"), 20, generation, attempt=2)
        assert newest(store).attempt == 2
        if not looked:
            break
        assert looked == [20]
    assert call_number > 10


def test_a_commit_whose_answer_was_lost_is_done_again_without_harm(store: Store) -> None:
    generation = store.claim_generation()
    receipts = [stage(store, 5, 1, b"x")]
    first = store.commit(5, generation, receipts, {"a": 1}, attempt=1)
    assert Store.open(store.storage, "run").commit(5, generation, receipts, {"a": 1}, attempt=1) == first
    assert newest(store) == first


# What cannot be read


def failing(number: int, error: OSError, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the `number`-th of all reads raise `error`. Returns the paths that were read."""
    paths: list[str] = []
    read, read_chunks = Storage.read, Storage.read_chunks

    def counted(path: str) -> None:
        paths.append(path)
        if len(paths) == number:
            raise error

    def reading(self: Storage, path: str) -> bytes:
        counted(path)
        return read(self, path)

    def reading_chunks(self: Storage, path: str, *args: Any) -> Iterator[bytes]:
        for chunk in read_chunks(self, path, *args):
            counted(path)
            yield chunk

    patch.setattr(Storage, "read", reading)
    patch.setattr(Storage, "read_chunks", reading_chunks)
    return paths


@pytest.mark.parametrize("code", READ_FAILURES, ids=errno.errorcode.get)
def test_what_cannot_be_read_is_no_damage_and_no_reason_to_go_back(store: Store, code: int) -> None:
    generation = store.claim_generation()
    for step in (1, 2):
        save(store, step, generation)
    before = [entry.name for entry in store.storage.list("run/checkpoints")]
    for number in itertools.count(1):
        fresh = Store.open(store.storage, "run")
        with pytest.MonkeyPatch.context() as patch:
            paths = failing(number, OSError(code, os.strerror(code)), patch)
            if number > READS:
                commit = fresh.newest_valid(never)
                assert commit is not None
                assert commit.step == 2
                break
            for read in (partial(fresh.newest_valid, never), partial(fresh.load, 2, generation), partial(fresh.prune, 2, generation)):
                paths.clear()
                with pytest.raises(OSError, match=os.strerror(code)) as caught:
                    read()
                assert caught.value.errno == code  # the caller sees what it is, and waits
                assert not store.storage.is_local or f"{paths[-1].rpartition('/')[0]} cannot be read now" in str(caught.value)
    assert [entry.name for entry in store.storage.list("run/checkpoints")] == before
    assert newest_step(store) == 2


@pytest.mark.parametrize("code", READ_FAILURES, ids=errno.errorcode.get)
def test_what_cannot_be_looked_at_is_not_taken_for_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file that is not there, in a folder that cannot be looked at the moment after."""
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    for step in (1, 2):
        save(store, step, generation)
    with monkeypatch.context() as patch:
        failing(3, FileNotFoundError(errno.ENOENT, "not yet"), patch)

        def lstat(path: str) -> os.stat_result:
            raise OSError(code, os.strerror(code), path)

        patch.setattr(os, "lstat", lstat)
        with pytest.raises(OSError, match=os.strerror(code)):
            store.newest_valid(never)
    assert newest_step(store) == 2


@pytest.mark.parametrize("code", [errno.EUCLEAN, errno.EBADMSG])
def test_what_a_file_system_itself_found_damaged_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    for step in (1, 2):
        save(store, step, generation)
    report: Report = []
    with monkeypatch.context() as patch:
        failing(3, OSError(code, os.strerror(code)), patch)
        assert newest_step(store, report) == 1
    assert len(report) == 1


def test_a_reader_meets_a_run_that_goes_on_and_takes_nothing_for_damaged(store: Store) -> None:
    """At every call of the reader the driver commits newer checkpoints and deletes all that were there."""
    for number in itertools.count(1):
        storage = open_storage(f"{store.storage.root}/{number}") if store.storage.is_local else objects()
        driver = Store.open(storage, "run")
        generation = driver.claim_generation()
        for step in (1, 2):
            save(driver, step, generation)
        calls = 0

        def go_on(driver: Store = driver, generation: int = generation) -> None:
            for step in (3, 4):
                save(driver, step, generation)
            driver.prune(2, generation)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("read", "list", "exists"):
                real = getattr(Storage, name)

                def call(self: Storage, path: str, real: Any = real, number: int = number) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == number:
                        go_on()
                    return real(self, path)

                patch.setattr(Storage, name, call)
            commit = Store.open(storage, "run").newest_valid(never)
        assert commit is not None
        if calls < number:
            break
        assert commit.step in (2, 4)
    assert number > 3


def test_a_file_that_is_gone_while_its_commit_stays_is_damage_after_a_second_look(store: Store) -> None:
    generation = store.claim_generation()
    for step in (1, 2):
        save(store, step, generation)
    path = store.commits()[0].path
    with pytest.MonkeyPatch.context() as patch:  # not seen at first, as by a network file system's cache
        failing(3, FileNotFoundError(errno.ENOENT, "not yet"), patch)
        assert newest(store).step == 2
    store.storage.delete_file(f"{path}/model.safetensors")
    report: Report = []
    assert newest_step(store, report) == 1
    assert [where for where, _ in report] == [path]


# Another format


def test_prune_leaves_a_checkpoint_of_another_format_and_does_not_fail_for_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = store.claim_generation()
    with monkeypatch.context() as patch:
        patch.setattr("cluster.store.VERSION", 2)
        save(store, 5, generation)
    for step in (1, 2, 3):
        save(store, step, generation)
    fresh = Store.open(store.storage, "run")
    fresh.prune(2, generation)
    assert [commit.step for commit in store.commits()] == [5, 3, 2]
    for read in (fresh.peek, lambda: fresh.load(5, generation), lambda: fresh.newest_valid(never)):
        with pytest.raises(UnknownFormat, match=r"step-00000005.* has format 2, and this program reads format 1"):
            read()


# A look before the claim


def test_a_peek_reads_the_newest_manifest_alone_and_changes_nothing(store: Store) -> None:
    assert store.peek() is None
    generation = store.claim_generation()
    for step in (1, 2, 3):
        save(store, step, generation, {"of": step})
    damage(store, 3, "MANIFEST.json")
    damage(store, 2, "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        paths = failing(0, OSError(), patch)
        peeked = store.peek()
    assert peeked is not None
    assert peeked.meta == {"of": 2}
    assert {path.rpartition("/")[2] for path in paths} == {"COMMIT", "MANIFEST.json"}
    assert [commit.step for commit in store.commits()] == [3, 2, 1]


def test_a_run_whose_claims_were_lost_goes_on_above_its_checkpoints(store: Store) -> None:
    for _ in range(3):
        generation = store.claim_generation()
    save(store, 7, generation)
    store.storage.delete_dir("run/generations")
    fresh = Store.open(store.storage, "run")
    again = fresh.claim_generation()
    assert again == 4
    save(fresh, 7, again, {"of": "the fourth"})
    assert newest(store).meta == {"of": "the fourth"}


# Copies


def copy(source: Storage, target: Storage) -> None:
    """As `aws s3 sync` or `cp -r` do: file by file, under the same names."""
    infos = source.fs.get_file_info(pafs.FileSelector(source.at("run"), recursive=True))
    for info in infos:
        if info.type == pafs.FileType.File:
            path = info.path[len(source.root) + 1 :]
            target.write_atomic(path, source.read(path))


@pytest.mark.parametrize("direction", ["disk to objects", "objects to disk", "disk to disk"])
def test_a_copied_run_goes_on(tmp_path: Path, direction: str) -> None:
    """With everything that a run may leave: old names, several attempts, a damaged one, one half staged, claims with and without token."""
    start, _, end = direction.partition(" to ")
    source, target = (
        (open_storage(tmp_path / side) if kind == "disk" else objects()) for side, kind in (("source", start), ("target", end))
    )
    before = Store.open(source, "run")
    before.claim_generation()
    generation = before.claim_generation({"identity": {"digest": "d"}})
    for step, attempt in ((10, 1), (20, 1), (20, 2), (30, 2), (40, 2)):
        save(before, step, generation, {"attempt": attempt}, attempt=attempt)
    damage(before, 40)
    assert newest_step(before) == 30  # and sets 40 aside
    stage(before, 50, 3, b"half")
    want = newest(before)
    copy(source, target)

    store = Store.open(target, "run")
    found = store.newest_valid(never)
    assert found is not None
    assert (found.step, found.meta, found.path) == (30, want.meta, want.path)
    assert [found.read(name) for name in found.files] == [want.read(name) for name in want.files]
    seen: list[Any] = []
    claimed = store.claim_generation({"identity": {"digest": "d"}}, lambda claim: seen.append(claim.note))
    assert claimed == 3
    assert seen == [{"identity": {"digest": "d"}}]
    for step in (40, 50):
        save(store, step, claimed, attempt=4)
        store.prune(2, claimed, attempt=4, staged_below=step)
    assert newest_step(store) == 50
    assert [commit.step for commit in store.commits()] == [50, 40]
    left = [entry.name for entry in store.storage.list("run/checkpoints")]
    assert all(f".g{claimed:04d}" in name for name in left)
    copy(target, source)  # and back
    assert newest(before).step == 50


def test_a_worker_meets_damage_as_such(store: Store) -> None:
    generation = store.claim_generation()
    save(store, 1, generation)
    damage(store, 1)
    with pytest.raises(CorruptCheckpoint, match="SHA-256"):
        Store.open(store.storage, "run").load(1, generation)
