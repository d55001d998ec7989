"""Numbers on their way from a GPU to the host: each arrives as it was, nobody waits but who asks, and their places are used again. The GPU
is a queue of copies that are done when the test says so; tests/gpu has a real one."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.learn import step as steps
from trainer.learn.step import SLOTS_AT_ONCE, Arriving, Slots


class Gpu:
    """Does what is queued, in order, when it is told to."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()
        self.places = self.events = self.waits = 0

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.popleft()()

    def pinned(self, count: int, dtype: torch.dtype) -> Any:
        self.places += count
        places = tuple(Place(self, dtype) for _ in range(count))
        return type("Places", (), {"unbind": lambda _: places})()

    def event(self) -> "Event":
        self.events += 1
        return Event(self)


class Place:
    """A number in pinned memory."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self._gpu, self.dtype, self._value = gpu, dtype, float("nan")

    def copy_(self, value: "Number", *, non_blocking: bool) -> None:
        assert non_blocking
        self._gpu.queue.append(lambda: setattr(self, "_value", value.value))

    def __float__(self) -> float:
        return self._value


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._recorded, self._done = gpu, 0, 0

    def record(self) -> None:
        self._recorded += 1
        number = self._recorded
        self._gpu.queue.append(lambda: setattr(self, "_done", number))

    def query(self) -> bool:
        return self._done == self._recorded

    def synchronize(self) -> None:
        self._gpu.waits += not self.query()
        while not self.query():
            self._gpu.run(1)


class Number:
    """() on the GPU."""

    is_cuda, dtype = True, torch.float32

    def __init__(self, value: float) -> None:
        self.value = value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(steps, "pinned", made.pinned)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["send", "run", "read", "read again"]), st.integers(0, 9)), max_size=300), st.integers(1, 5))
def test_every_number_arrives_as_it_was(acts: list[tuple[str, int]], at_once: int) -> None:
    """However late the device is, and in whatever order numbers are read."""
    gpu, slots, sent, read = Gpu(), Slots(), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "pinned", gpu.pinned)
        patch.setattr(steps, "SLOTS_AT_ONCE", at_once)
        patch.setattr(torch.cuda, "Event", gpu.event)
        most = 0
        for number, (act, which) in enumerate(acts):
            match act:
                case "send":
                    sent.append((Arriving(number, Number(float(number)), slots=slots), float(number)))  # type: ignore[arg-type]
                    most = max(most, len(sent))
                case "run":
                    gpu.run(which)
                case "read" if sent:
                    arriving, value = sent.pop(which % len(sent))
                    was_here, waits = arriving.is_here(), gpu.waits
                    assert arriving.wait() == value
                    assert gpu.waits == waits + (not was_here)
                    read.append((arriving, value))
                case "read again" if read:
                    arriving, value = read[which % len(read)]
                    assert arriving.is_here()
                    assert arriving.wait() == value
        for arriving, value in (*sent, *read):
            assert arriving.wait() == value
    assert gpu.places == gpu.events <= max(0, most - 1) // at_once * at_once + at_once


def test_steps_that_are_read_in_time_take_no_more_memory_and_no_more_events(gpu: Gpu) -> None:
    slots, late = Slots(), deque[Arriving]()
    for number in range(1000):
        late.append(Arriving(number, Number(number / 7), slots=slots))  # type: ignore[arg-type]
        gpu.run(1)
        while late and late[0].is_here():
            assert late[0].wait() == late[0].step / 7
            late.popleft()
        if number > SLOTS_AT_ONCE // 2:
            gpu.run(1)
    assert len(late) <= SLOTS_AT_ONCE
    assert (gpu.places, gpu.events, gpu.waits) == (SLOTS_AT_ONCE, SLOTS_AT_ONCE, 0)


def test_many_threads_read_one_number_once(gpu: Gpu) -> None:
    slots = Slots()
    arriving = Arriving(0, Number(2.5), slots=slots)  # type: ignore[arg-type]
    gpu.run(2)
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(arriving.wait())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2.5] * 8
    taken = [slots.take(torch.float32) for _ in range(SLOTS_AT_ONCE)]
    assert len({id(slot) for slot in taken}) == SLOTS_AT_ONCE == gpu.places, "its place was given back once"


def test_a_number_that_nobody_reads_keeps_its_place(gpu: Gpu) -> None:
    """Its copy may still be under way."""
    slots = Slots()
    Arriving(0, Number(1.0), slots=slots)  # type: ignore[arg-type]
    others = [Arriving(number, Number(float(number)), slots=slots) for number in range(1, 2 * SLOTS_AT_ONCE)]  # type: ignore[arg-type]
    assert [each.wait() for each in others] == [float(number) for number in range(1, 2 * SLOTS_AT_ONCE)]


def test_on_a_cpu_there_are_no_places() -> None:
    slots = Slots()
    arriving = Arriving(0, torch.tensor(3.5), slots=slots)
    assert arriving.is_here()
    assert arriving.wait() == 3.5
    assert not slots._free
