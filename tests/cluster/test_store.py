"""The store: what was committed is found whole, whatever was killed, flipped, cut, filled up or taken over on the way."""

import errno
import itertools
import json
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from cluster.storage import Storage, open_storage
from cluster.store import CorruptCheckpoint, Fenced, NoValidCheckpoint, Receipt, StorageFull, Store, UnknownFormat

Report = list[tuple[str, str]]


def objects() -> Storage:
    return Storage(fs=pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()), root="runs", is_local=False, uri="mock://bucket/runs")


@pytest.fixture(params=["local", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(open_storage(tmp_path) if request.param == "local" else objects(), "run")


def save(store: Store, step: int, generation: int, meta: dict[str, Any] | None = None, *, attempt: int = 1) -> None:
    receipts = [
        store.stage(step, generation, "model.safetensors", [f"weights of {step} ".encode(), memoryview(bytearray(40))], attempt=attempt),
        store.stage(step, generation, "rank-0000.json", json.dumps({"cursor": step}).encode(), attempt=attempt),
    ]
    store.commit(step, generation, receipts, meta or {"world": 1}, attempt=attempt)


def newest_step(store: Store, report: Report | None = None, mark: bool = True) -> int:
    """The step of the newest valid checkpoint, after reading all of it."""
    commit = store.newest_valid(lambda path, reason: None if report is None else report.append((path, reason)), mark=mark)
    if commit is None:
        return -1
    assert commit.read("model.safetensors") == f"weights of {commit.step} ".encode() + bytes(40)
    assert json.loads(commit.read("rank-0000.json")) == {"cursor": commit.step}
    return commit.step


def damage(store: Store, step: int, name: str = "model.safetensors") -> None:
    path = next(commit.path for commit in store.commits() if commit.step == step)
    data = bytearray(store.storage.read(f"{path}/{name}"))
    data[len(data) // 2] ^= 1
    store.storage.write_atomic(f"{path}/{name}", bytes(data))


def test_the_newest_commit_comes_back_whole(store: Store) -> None:
    generation = store.claim_generation()
    for step in (9, 100, 20):
        save(store, step, generation, {"world": 2, "fingerprint": "f00d"})
    commit = store.newest_valid(print)
    assert commit is not None
    assert (commit.step, commit.generation, commit.meta) == (100, 1, {"world": 2, "fingerprint": "f00d"})
    assert newest_step(store) == 100
    assert [c.step for c in store.commits()] == [100, 20, 9]
    assert store.load(20, generation).read("rank-0000.json") == b'{"cursor": 20}'
    with pytest.raises(ValueError, match=r"no file 'x'; it has model.safetensors, rank-0000.json"):
        commit.read("x")


def test_the_folders_are_named_as_documented(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    save(store, 1200, store.claim_generation())
    folder = tmp_path / "run" / "checkpoints" / "step-00001200.g0001"
    assert sorted(os.listdir(folder)) == ["COMMIT", "MANIFEST.json", "model.safetensors", "rank-0000.json"]


def test_a_checkpoint_exists_only_once_it_is_committed(store: Store) -> None:
    generation = store.claim_generation()
    assert newest_step(store) == -1
    store.stage(5, generation, "model.safetensors", b"weights of 5 " + bytes(40), attempt=1)
    assert newest_step(store) == -1
    save(store, 5, generation)
    assert newest_step(store) == 5


def test_reading_needs_no_generation_and_no_right_to_write(tmp_path: Path) -> None:
    writer = Store.open(open_storage(tmp_path), "run")
    generation = writer.claim_generation()
    save(writer, 1, generation)
    save(writer, 2, generation)
    damage(writer, 2)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    report: Report = []
    assert newest_step(Store.open(open_storage(tmp_path), "run"), report, mark=False) == 1
    assert len(report) == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_flip_in_any_byte_and_any_truncation_of_the_newest_falls_back_to_the_one_before(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    save(store, 1, generation)
    save(store, 2, generation)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002.g0001"
    tried = 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        bits = range(0, 8 * len(whole), 1 if path.name == "COMMIT" else 9)  # every bit of COMMIT, one of each other byte
        flips = (whole[: bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1 :] for bit in bits)
        cuts = (whole[:length] for length in range(len(whole)))
        for broken in (*flips, *cuts, whole + b"\0"):
            path.write_bytes(broken)
            report: Report = []
            commit = store.newest_valid(lambda p, r, report=report: report.append((p, r)), mark=False)  # type: ignore[misc]
            assert commit is not None, (path.name, broken)
            assert commit.step == 1, (path.name, broken)
            assert [p for p, _ in report] == ["run/checkpoints/step-00000002.g0001"]
            tried += 1
        path.write_bytes(whole)
    assert tried > 1300
    assert newest_step(store) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "rank-0000.json", "MANIFEST.json", "COMMIT"])
def test_a_corrupt_checkpoint_is_reported_once_and_set_aside(store: Store, name: str) -> None:
    generation = store.claim_generation()
    save(store, 1, generation)
    save(store, 2, generation)
    damage(store, 2, name)
    report: Report = []
    assert newest_step(store, report) == 1
    assert newest_step(store, report) == 1
    assert len(report) == 1
    assert "step-00000002.g0001" in report[0][0]
    assert name in report[0][1]
    assert [commit.step for commit in store.commits()] == [1]
    save(store, 2, generation, attempt=2)  # the run gets there again
    assert newest_step(store, report) == 2
    damage(store, 2, name)  # and is unlucky again
    assert newest_step(store, report) == 1
    assert len(report) == 2


def test_a_missing_file_is_corruption_too(store: Store) -> None:
    generation = store.claim_generation()
    save(store, 1, generation)
    save(store, 2, generation)
    store.storage.delete_file(f"{store.commits()[0].path}/model.safetensors")
    report: Report = []
    assert newest_step(store, report) == 1
    assert "model.safetensors" in report[0][1]


def test_when_all_are_corrupt_the_run_refuses_every_time_and_says_what_to_do(store: Store) -> None:
    generation = store.claim_generation()
    for step in (1, 2):
        save(store, step, generation)
        damage(store, step)
    for _ in range(3):  # setting them aside must not make the run look new
        with pytest.raises(NoValidCheckpoint, match=r"has 2 checkpoint\(s\)") as failure:
            newest_step(store)
    for said in ("2 checkpoint(s)", "step-00000001", "step-00000002", "marked corrupt", "backup", "--run NAME"):
        assert said in str(failure.value)


def test_an_outage_is_not_taken_for_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    save(store, 1, store.claim_generation())

    def fail(*_: object) -> bytes:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", fail)
        with pytest.raises(OSError, match="timed out"):
            newest_step(store)
    assert newest_step(store) == 1


def test_damage_after_the_check_is_found_when_it_is_read(store: Store) -> None:
    save(store, 1, store.claim_generation())
    commit = store.newest_valid(print)
    assert commit is not None
    damage(store, 1)
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors has SHA-256"):
        commit.read("model.safetensors")


def test_a_checkpoint_of_another_format_is_refused_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    with monkeypatch.context() as patch:
        patch.setattr("cluster.store.VERSION", 2)
        save(store, 1, store.claim_generation())
    with pytest.raises(UnknownFormat, match=r"format 2, and this program reads format 1; go on with the release that wrote it.*--run NAME"):
        newest_step(store)
    assert [commit.step for commit in store.commits()] == [1]


# Two drivers


def test_generations_are_unique_however_many_drivers_start_at_once(store: Store) -> None:
    claimed: list[int] = []

    def claim() -> None:
        claimed.append(Store.open(store.storage, "run").claim_generation())

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 8


def test_an_older_driver_cannot_commit_or_prune(store: Store) -> None:
    old = store.claim_generation()
    save(store, 1, old)
    receipt = store.stage(2, old, "model.safetensors", b"x", attempt=1)
    new = Store.open(store.storage, "run").claim_generation()
    with pytest.raises(Fenced, match="generation 2"):
        store.commit(2, old, [receipt], {}, attempt=1)
    with pytest.raises(Fenced):
        store.prune(2, old)
    assert newest_step(store) == 1
    save(store, 2, new)
    assert newest_step(store) == 2


def test_a_generation_nobody_claimed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never claimed"):
        Store.open(open_storage(tmp_path), "run").commit(1, 1, [], {}, attempt=1)


def test_on_object_stores_drivers_never_share_a_prefix_and_ranks_find_their_own() -> None:
    storage = objects()
    first = Store.open(storage, "run")
    generation = first.claim_generation()
    rank = Store.open(storage, "run")  # another process: it only knows the number
    receipt = rank.stage(1, generation, "model.safetensors", b"x", attempt=1)
    commit = first.commit(1, generation, [receipt], {}, attempt=1)
    assert commit.path.startswith("run/checkpoints/step-00000001.g0001-")
    assert commit.read("model.safetensors") == b"x"


class Interrupted:
    """A file system at whose k-th call something else happens first."""

    def __init__(self, fs: Any, call_number: int, act: Callable[[], None]) -> None:
        self._fs, self._left, self._act = fs, call_number, act

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self._act()
            return found(*args, **kwargs)

        return call


def test_a_driver_that_takes_over_at_any_call_of_a_commit_sees_it_or_fences_it_off() -> None:
    """One winner: whoever is told that a checkpoint is committed is told the truth to the next driver."""
    outcomes = []
    for call_number in itertools.count(1):
        storage = objects()
        old, new, taken = Store.open(storage, "run"), Store.open(storage, "run"), []
        save(old, 10, old.claim_generation())

        def take_over(new: Store = new, taken: list[int] = taken) -> None:
            taken.append(new.claim_generation())
            taken.append(newest_step(new))

        interrupted = Interrupted(storage.fs, call_number, take_over)
        doomed = Store.open(Storage(fs=interrupted, root=storage.root, is_local=False, uri=storage.uri), "run")
        try:
            save(doomed, 20, 1)
            acknowledged = True
        except Fenced:
            acknowledged = False
        if not taken:
            break
        assert not acknowledged or taken == [2, 20], call_number
        assert newest_step(new) in (10, 20)
        save(new, 30, 2)
        assert newest_step(new) == 30
        outcomes.append(acknowledged)
    assert len(outcomes) > 10
    assert not any(outcomes)  # the last call of a commit is the look that nobody has come


def test_a_commit_whose_answer_was_lost_is_done_again_without_harm() -> None:
    store = Store.open(objects(), "run")
    generation = store.claim_generation()
    receipts = [store.stage(5, generation, "model.safetensors", b"x", attempt=1)]
    first = store.commit(5, generation, receipts, {"a": 1}, attempt=1)
    deleted: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "delete_file", lambda self, path: deleted.append(path))
        assert store.commit(5, generation, receipts, {"a": 1}, attempt=1) == first
    assert deleted == []  # at no moment was it gone


# What dead attempts leave


def test_leftovers_of_a_dead_attempt_are_replaced_and_not_committed(store: Store) -> None:
    generation = store.claim_generation()
    store.stage(1, generation, "model.safetensors", b"half", attempt=1)
    store.stage(1, generation, "rank-0003.json", b"of a larger group", attempt=1)
    save(store, 1, generation)
    (commit,) = store.commits()
    names = {entry.name for entry in store.storage.list(commit.path)}
    assert names == {"COMMIT", "MANIFEST.json", "model.safetensors", "rank-0000.json"}
    assert newest_step(store) == 1


def test_a_step_reached_again_replaces_its_checkpoint(store: Store) -> None:
    generation = store.claim_generation()
    save(store, 1, generation, {"of": "the first"}, attempt=1)
    save(store, 1, generation, {"of": "the second"}, attempt=2)
    commit = store.newest_valid(print)
    assert commit is not None
    assert (commit.attempt, commit.meta) == (2, {"of": "the second"})


def test_prune_keeps_the_newest_that_verify(store: Store) -> None:
    generation = store.claim_generation()
    for step in range(1, 7):
        save(store, step, generation)
    fresh = Store.open(store.storage, "run")
    if store.storage.is_local:
        damage(store, 6)
        fresh.prune(2, generation)
        assert [commit.step for commit in store.commits()] == [6, 5, 4]  # the bad one does not count, and is left for the reader to report
        report: Report = []
        assert newest_step(fresh, report) == 5
        assert len(report) == 1
    else:
        fresh.prune(2, generation)
        assert [commit.step for commit in store.commits()] == [6, 5]


def test_prune_reaps_what_older_drivers_staged_and_spares_what_is_being_staged(store: Store) -> None:
    old = store.claim_generation()
    store.stage(7, old, "model.safetensors", b"x", attempt=1)
    new = Store.open(store.storage, "run").claim_generation()
    store.stage(3, new, "model.safetensors", b"x", attempt=1)
    store.stage(9, new, "model.safetensors", b"x", attempt=1)
    save(store, 8, new)
    assert len(store.prune(2, new, attempt=1, staged_below=8)) == 2
    assert newest_step(store) == 8
    receipt = Receipt(name="model.safetensors", size_bytes=1, sha256="2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    assert store.commit(9, new, [receipt], {}, attempt=1).read("model.safetensors") == b"x"


def test_keeping_one_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="keep=1"):
        store.prune(1, store.claim_generation())


# Staging


def test_two_ranks_may_not_write_the_same_file(store: Store) -> None:
    generation = store.claim_generation()
    receipt = store.stage(1, generation, "model.safetensors", b"x", attempt=1)
    with pytest.raises(ValueError, match=r"same file: \['model.safetensors'\]"):
        store.commit(1, generation, [receipt, receipt], {}, attempt=1)


@pytest.mark.parametrize("name", ["../x", "a/b", "COMMIT", "MANIFEST.json", "", ".hidden", "x.tmp"])
def test_names_that_could_escape_or_forge_are_refused(store: Store, name: str) -> None:
    generation = store.claim_generation()
    with pytest.raises(ValueError, match="cannot be a checkpoint's file"):
        store.stage(1, generation, name, b"x", attempt=1)
    with pytest.raises(ValueError, match="cannot be a checkpoint's file"):
        store.commit(1, generation, [Receipt(name=name, size_bytes=1, sha256="0")], {}, attempt=1)


def test_a_receipt_without_its_file_is_not_committed(store: Store) -> None:
    generation = store.claim_generation()
    receipt = store.stage(1, generation, "model.safetensors", b"xyz", attempt=1)
    with pytest.raises(OSError, match=r"rank-0001.json: 3 bytes were staged and nothing is there"):
        store.commit(1, generation, [receipt, Receipt(name="rank-0001.json", size_bytes=3, sha256="0")], {}, attempt=1)
    assert newest_step(store) == -1


@pytest.mark.parametrize(
    "chunks",
    [
        b"abcdef",
        bytearray(b"abcdef"),
        memoryview(b"abcdef"),
        [b"abc", b"", bytearray(b"d"), memoryview(b"ef")],
        (memoryview(b"abcdef")[i : i + 1] for i in range(6)),
        memoryview(b"abcdef").cast("B", shape=[2, 3]),
    ],
    ids=["bytes", "bytearray", "memoryview", "list", "iterator", "matrix"],
)
def test_any_buffers_are_staged(tmp_path: Path, chunks: Any) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    receipt = store.stage(1, generation, "file", chunks, attempt=1)
    assert store.commit(1, generation, [receipt], {}, attempt=1).read("file") == b"abcdef"


def test_staging_copies_nothing(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    state = [memoryview(bytearray(10 << 20)), memoryview(bytearray(10 << 20))]
    tracemalloc.start()
    store.stage(1, generation, "model.safetensors", state, attempt=1)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_too_small_a_disk_refuses_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    save(store, 1, generation)
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 1, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    store.stage(2, generation, "fits", bytes(real.f_frsize // 2), attempt=1)
    with pytest.raises(StorageFull, match="twice its size"):
        store.stage(2, generation, "too-large", bytes(real.f_frsize // 2 + 1), attempt=1)
    assert newest_step(store) == 1


def test_a_disk_that_fills_up_on_the_way_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    save(store, 1, generation)
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFull, match="filled up"):
            store.stage(2, generation, "model.safetensors", bytes(25), attempt=1)
    assert newest_step(store) == 1
    save(store, 2, generation)
    assert newest_step(store) == 2


# Death at every call; of a local commit in test_storage_faults.py


class Died(BaseException):
    """Not an Exception: no handler of the store may see it."""


class Mortal:
    """A file system whose k-th changing call raises. A stream that was begun is published as far as it got."""

    def __init__(self, fs: Any, fatal: int, failure: Callable[[], BaseException]) -> None:
        self._fs, self._left, self._failure = fs, fatal, failure

    @property
    def alive(self) -> bool:
        return self._left > 0

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._failure()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name not in ("open_output_stream", "create_dir", "delete_file", "delete_dir"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._count()
            result = found(*args, **kwargs)
            return MortalStream(result, self._count) if name == "open_output_stream" else result

        return call


class MortalStream:
    def __init__(self, stream: Any, count: Callable[[], None]) -> None:
        self._stream, self._count = stream, count

    def __enter__(self) -> "MortalStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, data: Any) -> None:
        self._stream.write(data[: len(data) // 2])
        self._count()
        self._stream.write(data[len(data) // 2 :])


@pytest.mark.parametrize("failure", [Died, lambda: OSError(errno.EIO, "storage is gone")], ids=["death", "outage"])
def test_death_at_every_call_to_an_object_store_leaves_the_old_or_the_new_checkpoint(
    failure: Callable[[], BaseException],
) -> None:
    seen, fatal, finished, torn = [], 0, False, 0
    while not finished:
        fatal += 1
        storage = objects()
        store = Store.open(storage, "run")
        generation = store.claim_generation()
        for step in (10, 20):
            save(store, step, generation)
        mortal = Mortal(storage.fs, fatal, failure)
        doomed = Store.open(Storage(fs=mortal, root=storage.root, is_local=False, uri=storage.uri), "run")
        acknowledged = False
        try:
            save(doomed, 30, generation)
            acknowledged = True
            doomed.prune(2, generation)
        except (Died, OSError):
            pass
        finished = mortal.alive
        report: Report = []
        step = newest_step(store, report)
        torn += len(report)
        assert step == 30 if acknowledged else step in (20, 30)
        seen.append(step)
        save(store, 40, generation)
        assert newest_step(store) == 40
    assert seen == sorted(seen)
    assert fatal > 8
    assert torn == 1  # where COMMIT itself was cut in half


def test_death_of_the_commit_thread_between_rename_and_commit_does_not_block_the_step(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    generation = store.claim_generation()
    save(store, 1, generation)
    save(store, 2, generation)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002.g0001"
    (folder / "COMMIT").unlink()
    assert newest_step(store) == 1
    save(store, 2, generation)
    assert newest_step(store) == 2


def test_a_restored_backup_is_used_again(tmp_path: Path) -> None:
    store = Store.open(open_storage(tmp_path), "run")
    save(store, 1, store.claim_generation())
    folder = tmp_path / "run" / "checkpoints" / "step-00000001.g0001"
    shutil.copytree(folder, tmp_path / "backup")
    damage(store, 1)
    with pytest.raises(NoValidCheckpoint):
        newest_step(store)
    shutil.rmtree(f"{folder}.corrupt")
    shutil.move(tmp_path / "backup", folder)
    assert newest_step(store) == 1
