"""Claims about the rank's half of a checkpoint."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.beat import EXCHANGE, STORAGE
from cluster.checkpointer import STALL_SECONDS, Buffers, Checkpointer, Files
from cluster.owned_folder import LOCK_FILE
from cluster.spill import Spill, is_another_disk
from cluster.storage import StorageOutage, StorageRefused, open_storage
from cluster.store import Receipt, StorageFull


class Recorder:
    """A store and coordinator in memory; `gate` holds up staging."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.staged: list[tuple[int, str, bytes]] = []
        self.acked: list[tuple[int, list[str], dict[str, Any]]] = []
        self.failed: list[tuple[int, str]] = []
        self.error: Exception | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.tries = 0
        self.stage_now = self.stage

    def stage(self, step: int, name: str, buffers: Buffers) -> Receipt:
        self.tries += 1
        assert self.gate.wait(10)
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        data = b"".join(bytes(buffer) for buffer in buffers)
        self.staged.append((step, name, data))
        return Receipt(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def ack(self, step: int, receipts: list[Receipt], meta: dict[str, Any]) -> None:
        self.acked.append((step, [receipt.name for receipt in receipts], meta))

    def checkpointer(self, spill: Spill | None = None, **more: Any) -> Checkpointer:
        return Checkpointer(
            stage=lambda step, name, buffers: self.stage_now(step, name, buffers),
            ack=self.ack,
            on_failed=lambda step, error: self.failed.append((step, str(error))),
            on_event=lambda event, fields: self.events.append((event, fields)),
            spill=spill,
            look_seconds=0.01,
            pause=lambda seconds: time.sleep(0.001),
            **more,
        )

    @property
    def acked_steps(self) -> list[int]:
        return [step for step, _, _ in self.acked]


def snapshot_of(state: bytearray) -> Files:
    copied = bytes(state)

    def files() -> Iterator[tuple[str, Buffers]]:
        yield "state", [copied]

    return files


def test_a_checkpoint_holds_the_state_of_its_step_whatever_happens_afterwards() -> None:
    recorder, state = Recorder(), bytearray(b"at step 1")
    recorder.gate.clear()
    checkpointer = recorder.checkpointer()
    checkpointer.save(1, lambda: snapshot_of(state), {"a": 1})
    state[:] = b"at step 2"
    recorder.gate.set()
    checkpointer.wait()
    assert recorder.staged == [(1, "state", b"at step 1")]
    assert recorder.acked == [(1, ["state"], {"a": 1})]


def test_only_one_checkpoint_is_in_flight_and_waiting_for_it_counts_as_stall() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    checkpointer = recorder.checkpointer()
    checkpointer.save(1, lambda: snapshot_of(bytearray(b"1")), {})
    threading.Timer(0.2, recorder.gate.set).start()
    stall = checkpointer.save(2, lambda: snapshot_of(bytearray(b"2")), {})
    assert stall >= 0.1
    assert checkpointer.stall_seconds >= stall
    assert 0.1 <= checkpointer.backpressure_seconds <= checkpointer.stall_seconds
    assert [step for step, _, _ in recorder.acked[:1]] == [1]
    checkpointer.wait()
    assert [step for step, _, _ in recorder.acked] == [1, 2]


def test_a_full_disk_is_reported_and_training_goes_on() -> None:
    recorder = Recorder()
    recorder.error = OSError(28, "No space left on device")
    checkpointer = recorder.checkpointer()
    checkpointer.save(1, lambda: snapshot_of(bytearray(b"1")), {})
    checkpointer.wait()
    assert recorder.acked == []
    assert recorder.failed == [(1, "[Errno 28] No space left on device")]
    recorder.error = None
    checkpointer.save(2, lambda: snapshot_of(bytearray(b"2")), {})
    checkpointer.wait()
    assert [step for step, _, _ in recorder.acked] == [2]


def test_any_other_error_surfaces_in_the_training_thread() -> None:
    recorder = Recorder()
    recorder.error = RuntimeError("fenced by a newer generation")
    checkpointer = recorder.checkpointer()
    checkpointer.save(1, lambda: snapshot_of(bytearray(b"1")), {})
    with pytest.raises(RuntimeError, match="fenced"):
        checkpointer.save(2, lambda: snapshot_of(bytearray(b"2")), {})


# An outage of the storage


def spill_in(folder: Path, *, run: str = "run", generation: int = 1, rank: int = 0) -> Spill:
    return Spill(str(folder), run, generation, rank, open_storage("s3://bucket/runs?region=x"))


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def parts(step: int) -> Files:
    return lambda: [("model", [b"weights ", b"%d" % step]), ("rank", [b"%d" % step]), ("empty", [])]


def test_an_outage_is_waited_out_on_the_nodes_disk_and_the_order_of_steps_is_kept(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    for step in (1, 2):
        checkpointer.save(step, lambda step=step: parts(step), {"step": step})  # type: ignore[misc]
    until(lambda: [name for name, _ in recorder.events].count("checkpoint_spilled") == 2)
    assert len(files_in(tmp_path)) == 6
    assert recorder.acked == []
    assert recorder.failed == []
    recorder.error = None
    checkpointer.wait()
    checkpointer.save(3, lambda: parts(3), {"step": 3})
    checkpointer.wait()
    assert recorder.acked == [(step, ["model", "rank", "empty"], {"step": step}) for step in (1, 2, 3)]
    expected = [(step, name, b"".join(data)) for step in (1, 2, 3) for name, data in parts(step)()]
    assert recorder.staged == expected
    assert files_in(tmp_path) == []
    until(lambda: len(recorder.events) == 4)
    assert [name for name, _ in recorder.events] == ["storage_outage", "checkpoint_spilled", "checkpoint_spilled", "storage_recovered"]
    checkpointer.close()
    assert os.listdir(tmp_path) == []


def test_only_the_newest_two_wait_and_the_others_are_given_up_by_name(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    most = 0
    for step in range(1, 8):
        checkpointer.save(step, lambda step=step: parts(step), {})  # type: ignore[misc]
        most = max(most, len(files_in(tmp_path)))
    until(lambda: len(recorder.failed) == 5)
    assert most <= 9  # two that wait, and one being written
    assert all("dropped in an outage" in message for _, message in recorder.failed)
    recorder.error = None
    checkpointer.wait()
    assert recorder.acked_steps == sorted(recorder.acked_steps)
    assert recorder.acked_steps[-1] == 7
    assert sorted(recorder.acked_steps + [step for step, _ in recorder.failed]) == list(range(1, 8))
    checkpointer.close()


def test_the_one_that_is_on_its_way_is_not_dropped_however_slow_the_storage(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    checkpointer.save(1, lambda: parts(1), {})
    until(lambda: recorder.tries > 3)
    recorder.error = None
    recorder.gate.clear()  # back, and slow: step 1 is on its way
    tries = recorder.tries
    until(lambda: recorder.tries > tries or bool(recorder.staged))
    for step in (2, 3, 4):
        checkpointer.save(step, lambda step=step: parts(step), {})  # type: ignore[misc]
    until(lambda: len(recorder.failed) == 2)
    recorder.gate.set()
    checkpointer.wait()
    assert recorder.acked_steps == [1, 4]
    checkpointer.close()


def test_an_outage_in_mid_checkpoint_uploads_each_file_once(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))

    def files() -> Iterator[tuple[str, Buffers]]:
        yield "first", [b"1"]
        recorder.error = StorageOutage("gone in the middle")
        yield "second", [b"2"]
        yield "third", [b"3"]

    checkpointer.save(1, lambda: files, {})
    until(lambda: files_in(tmp_path) == ["second", "third"])
    recorder.error = None
    checkpointer.wait()
    assert recorder.staged == [(1, "first", b"1"), (1, "second", b"2"), (1, "third", b"3")]
    assert recorder.acked == [(1, ["first", "second", "third"], {})]
    checkpointer.close()


def test_the_next_save_sends_a_checkpoint_that_waits_for_the_storage_to_the_disk(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    waited = threading.Event()

    def stage(step: int, name: str, buffers: Buffers) -> Receipt:
        while not checkpointer.hurried():  # a storage that fails, tried again and again
            waited.set()
            time.sleep(0.001)
        raise StorageOutage("gave up")

    recorder.stage_now = stage
    checkpointer.save(1, lambda: parts(1), {})
    assert waited.wait(10)
    assert not checkpointer.hurried()
    checkpointer.save(2, lambda: parts(2), {})
    until(lambda: [name for name, _ in recorder.events].count("checkpoint_spilled") == 2)
    recorder.stage_now = recorder.stage
    checkpointer.close()


def test_what_the_disk_spoilt_meanwhile_is_not_uploaded(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    checkpointer.save(1, lambda: [("model", [b"weights"])].copy, {})
    until(lambda: any(name == "checkpoint_spilled" for name, _ in recorder.events))
    (path,) = (path for path in tmp_path.rglob("model"))
    (tmp_path / "spoilt").write_bytes(b"wEights")
    os.replace(tmp_path / "spoilt", path)  # at once, as it is read all the time
    recorder.error = None
    checkpointer.wait()
    assert recorder.acked == []
    ((step, message),) = recorder.failed
    assert step == 1
    assert "is not what was written" in message
    checkpointer.close()


@pytest.mark.parametrize(
    "error",
    [StorageRefused("the credentials have expired"), StorageFull("no room for a file of 45.0 MB"), OSError(116, "Stale file handle")],
    ids=lambda error: type(error).__name__,
)
def test_what_the_storage_refuses_waits_on_the_nodes_disk_until_it_takes_it(tmp_path: Path, error: OSError) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = error
    checkpointer.save(1, lambda: parts(1), {})
    until(lambda: len(recorder.events) == 2)
    (event, fields), _ = recorder.events
    assert event == "storage_outage"
    assert fields == {"step": 1, "message": str(error)}
    recorder.error = None  # renewed, freed, mounted again
    checkpointer.wait()
    assert recorder.acked_steps == [1]
    assert recorder.failed == []
    checkpointer.close()


def test_a_run_that_ends_with_a_storage_that_refuses_says_so(tmp_path: Path) -> None:
    """Not as an outage: another attempt would meet the same refusal."""
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageRefused("the credentials have expired")
    checkpointer.save(7, lambda: parts(7), {})
    with pytest.raises(StorageRefused, match=r"step 7 wait in .*\(the credentials have expired\)"):
        checkpointer.wait(0.05)
    checkpointer.close()
    assert os.listdir(tmp_path) == []


def test_a_run_that_ends_in_an_outage_says_what_is_lost_and_leaves_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    checkpointer.save(7, lambda: parts(7), {})
    with pytest.raises(StorageOutage, match=r"step 7 wait in .*\(nobody answers\)"):
        checkpointer.wait(0.2)
    checkpointer.close()
    assert os.listdir(tmp_path) == []


def test_a_lost_coordinator_surfaces_in_the_training_thread_from_the_upload_too(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpointer = recorder.checkpointer(spill_in(tmp_path))
    recorder.error = StorageOutage("nobody answers")
    checkpointer.save(1, lambda: parts(1), {})

    def ack(*_: object) -> None:
        raise RuntimeError("the actor died")

    until(lambda: len(recorder.events) == 2)
    checkpointer._ack = ack
    recorder.error = None
    with pytest.raises(RuntimeError, match="the actor died"):
        checkpointer.wait()
    checkpointer.close()


def test_leftovers_of_killed_ranks_are_removed_and_what_lives_is_left_alone_whoever_wrote_it(tmp_path: Path) -> None:
    """Two containers may share the disk and run the same command: neither sees the other's processes."""
    living = spill_in(tmp_path, generation=1)
    living.begin(5, [], {}).add("of-the-living", [b"x"])
    killed = os.fork()
    if killed == 0:
        for run, generation in (("run", 1), ("run", 2), ("other", 1)):
            spill_in(tmp_path, run=run, generation=generation).begin(5, [], {}).add(f"{run}-{generation}", [b"x"])
        os._exit(0)
    os.waitpid(killed, 0)
    successor = spill_in(tmp_path, generation=2)
    assert files_in(tmp_path) == ["of-the-living"]
    successor.close()
    living.close()
    assert os.listdir(tmp_path) == []


# A storage that stalls


class Waits:
    """What the checkpointer says while it waits, on a clock that each wait moves on."""

    def __init__(self, seconds: float) -> None:
        self.now, self._seconds = 1000.0, seconds
        self.phases: list[str] = []

    def __call__(self, phase: str) -> None:
        self.phases.append(phase)
        self.now += self._seconds

    @property
    def settings(self) -> dict[str, Any]:
        return {"on_wait": self, "clock": lambda: self.now}


def test_a_save_that_waits_for_a_stalled_write_says_so_all_the_time_and_goes_on_when_it_ends() -> None:
    recorder, waits = Recorder(), Waits(1.0)
    recorder.gate.clear()
    checkpointer = recorder.checkpointer(**waits.settings)
    checkpointer.save(1, lambda: parts(1), {})
    saving = threading.Thread(target=lambda: checkpointer.save(2, lambda: parts(2), {}))
    saving.start()
    until(lambda: len(waits.phases) >= 5)
    assert set(waits.phases) == {STORAGE}
    recorder.gate.set()
    saving.join(10)
    checkpointer.wait()
    assert recorder.acked_steps == [1, 2]


def test_a_save_that_waits_for_a_stalled_write_gives_up_after_its_patience() -> None:
    recorder, waits = Recorder(), Waits(600.0)
    recorder.gate.clear()
    checkpointer = recorder.checkpointer(**waits.settings)
    checkpointer.save(1, lambda: parts(1), {})
    with pytest.raises(StorageOutage, match=r"has not taken checkpoint-1 for 3600 s"):
        checkpointer.save(2, lambda: parts(2), {})
    assert len(waits.phases) == 7
    recorder.gate.set()


def test_a_wait_for_the_proof_of_the_numbers_is_no_wait_for_the_storage() -> None:
    """The proof may need other ranks: who waits for it must not look as if it made progress."""
    recorder, waits, proven = Recorder(), Waits(1.0), threading.Event()

    def files() -> Iterator[tuple[str, Buffers]]:
        assert proven.wait(10)
        yield "state", [b"1"]

    checkpointer = recorder.checkpointer(**waits.settings)
    checkpointer.save(1, lambda: files, {})
    saving = threading.Thread(target=lambda: checkpointer.save(2, lambda: parts(2), {}))
    saving.start()
    until(lambda: len(waits.phases) >= 3)
    assert set(waits.phases) == {EXCHANGE}
    proven.set()
    saving.join(10)
    checkpointer.wait()


def test_a_local_disk_that_stalls_does_not_hold_up_the_steps_where_there_is_another_one(tmp_path: Path) -> None:
    recorder, waits = Recorder(), Waits(STALL_SECONDS + 1)
    recorder.gate.clear()
    checkpointer = recorder.checkpointer(spill_in(tmp_path), may_stall=True, **waits.settings)
    for step in (1, 2, 3):
        checkpointer.save(step, lambda step=step: parts(step), {})  # type: ignore[misc]
    until(lambda: [name for name, _ in recorder.events].count("checkpoint_spilled") == 3)
    assert recorder.acked == []
    assert recorder.tries == 1  # while that write may go on, nobody else writes the same file
    recorder.gate.set()
    checkpointer.wait()
    assert recorder.acked_steps[-1] == 3
    assert recorder.acked_steps == sorted(recorder.acked_steps)
    checkpointer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_remote_storage_and_another_disk_are_worth_spilling_for(tmp_path: Path, is_remote: bool) -> None:
    storage = open_storage("s3://bucket/runs?region=x" if is_remote else tmp_path / "not" / "made" / "yet")
    assert is_another_disk(str(tmp_path), storage) is is_remote
    assert is_another_disk("/dev/shm", storage)


def test_a_spill_folder_that_is_somebody_elses_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"finetune-spill-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match=r"--cluster\.spill-dir"):
        spill_in(tmp_path).begin(1, [], {})
