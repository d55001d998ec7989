"""What the driver reads out of a status: with a real coordinator, no Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.coordinator import Coordinator, RankInfo
from trainer.drive import has_begun

HERE = RankInfo(host="here", pid=1, node_id="node", metrics_address="")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(str(tmp_path), "run", 1, 2)
    coordinator.start_attempt(1, 2, 10)
    yield coordinator
    coordinator.close()


def beat(coordinator: Coordinator, rank: int, steps_done: int, phase: str) -> None:
    coordinator.beat(1, rank, steps_done, None, {}, steps_done + 1, {"phase": phase, "ticks": 1, "urgent": 0})


def test_an_attempt_has_begun_once_a_rank_may_have_steps_that_are_not_saved(coordinator: Coordinator) -> None:
    assert not has_begun(coordinator.status())
    for rank in range(2):
        coordinator.register(1, rank, HERE)
        beat(coordinator, rank, 10, "starting")
    assert not has_begun(coordinator.status())
    beat(coordinator, 1, 10, "step")  # it may have done many since
    assert has_begun(coordinator.status())


def test_a_rank_that_compiles_again_after_its_first_steps_has_begun(coordinator: Coordinator) -> None:
    for rank in range(2):
        beat(coordinator, rank, 14, "starting")
    assert has_begun(coordinator.status())
