"""A coordinator that lives and answers nobody is killed by the driver, and one that is only slow is not. Its process is a real one."""

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from cluster.overseer import SILENT_SECONDS, Actor, Hung, Overseer
from cluster.process import process_stat


class Question:
    """What the overseer asked: answered or not."""

    def __init__(self, is_answered: bool) -> None:
        self.is_answered = is_answered

    def is_there(self) -> bool:
        return self.is_answered


class World:
    """A process that stands for the coordinator, and a clock."""

    def __init__(self, process: "subprocess.Popen[bytes]", *, name: str = "sleep", is_ready: bool = True, answers: bool = False) -> None:
        self.process, self.is_ready, self.answers = process, is_ready, answers
        self.now, self.asked = 1000.0, 0
        self.overseer = Overseer(lambda: Actor(pid=process.pid, is_ready=self.is_ready), self.ask, name=name)

    def ask(self) -> Question:
        self.asked += 1
        return Question(self.answers)

    def look(self, seconds: float, every: float = 1.0) -> Hung | None:
        """Look each second for so long, or until the coordinator was killed."""
        for _ in range(int(seconds / every)):
            if (hung := self.overseer.look(self.now)) is not None:
                return hung
            self.now += every
        return None


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["sleep", "600"])
    wait_for_state(process, "S")
    yield process
    process.kill()
    process.wait()


def wait_for_state(process: "subprocess.Popen[bytes]", state: str) -> None:
    until = time.monotonic() + 20
    while (stat := process_stat(process.pid)) is None or (stat.name, stat.state) != ("sleep", state):
        assert time.monotonic() < until
        time.sleep(0.01)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGSTOP)
    wait_for_state(process, "T")


def test_a_stopped_coordinator_is_killed_after_a_few_seconds(process: "subprocess.Popen[bytes]") -> None:
    world = World(process)
    stop(process)
    hung = world.look(60)
    assert hung == Hung(kind="stopped", pid=process.pid, seconds=5.0)
    assert "SIGSTOP" in hung.describe()
    assert process.wait(10) == -signal.SIGKILL
    assert world.look(600) is None, "a dead one is Ray's to start again"


def test_one_that_is_let_go_in_time_lives(process: "subprocess.Popen[bytes]") -> None:
    world = World(process, answers=True)
    for _ in range(3):
        stop(process)
        assert world.look(4) is None
        process.send_signal(signal.SIGCONT)
        wait_for_state(process, "S")
        assert world.look(2) is None
    assert process.poll() is None


def test_one_that_runs_and_answers_nobody_has_a_minute(process: "subprocess.Popen[bytes]") -> None:
    world = World(process)
    assert world.look(SILENT_SECONDS) is None
    hung = world.look(10)
    assert hung is not None
    assert (hung.kind, hung.pid) == ("silent", process.pid)
    assert process.wait(10) == -signal.SIGKILL
    assert world.asked == 1, "it is asked again only once it has answered"


@pytest.mark.parametrize(
    ("name", "is_ready", "answers"),
    [
        pytest.param("sleep", True, True, id="it answers, and only the driver's call waits for the storage"),
        pytest.param("sleep", False, False, id="it begins, which may have to wait for the storage"),
        pytest.param("another", True, False, id="the process id is another process's here"),
    ],
)
def test_others_are_left_alone(process: "subprocess.Popen[bytes]", name: str, is_ready: bool, answers: bool) -> None:
    world = World(process, name=name, is_ready=is_ready, answers=answers)
    assert world.look(1000) is None
    if name != "sleep":
        stop(process)
        assert world.look(1000) is None
    assert process.poll() is None


def test_two_short_stops_between_which_calls_were_answered_are_not_one(process: "subprocess.Popen[bytes]") -> None:
    world = World(process)
    stop(process)
    for _ in range(5):
        assert world.look(4) is None
        world.now += 600
    assert process.poll() is None


def test_time_in_which_the_driver_did_not_run_does_not_count(process: "subprocess.Popen[bytes]") -> None:
    world = World(process)
    stop(process)
    assert world.look(4 * 3600, every=3600.0) is None
    assert process.poll() is None
