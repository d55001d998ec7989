"""Claims about the rank's half of a checkpoint."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.checkpointer import Buffers, Checkpointer, Files
from cluster.store import Receipt


class Recorder:
    """A store and coordinator in memory; `gate` holds up staging."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.staged: list[tuple[int, str, bytes]] = []
        self.acked: list[tuple[int, list[str], dict[str, Any]]] = []
        self.failed: list[tuple[int, str]] = []
        self.error: Exception | None = None

    def stage(self, step: int, name: str, buffers: Buffers) -> Receipt:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        data = b"".join(bytes(buffer) for buffer in buffers)
        self.staged.append((step, name, data))
        return Receipt(name=name, size_bytes=len(data), sha256="")

    def ack(self, step: int, receipts: list[Receipt], meta: dict[str, Any]) -> None:
        self.acked.append((step, [receipt.name for receipt in receipts], meta))

    def checkpointer(self) -> Checkpointer:
        return Checkpointer(stage=self.stage, ack=self.ack, on_failed=lambda step, error: self.failed.append((step, str(error))))


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
