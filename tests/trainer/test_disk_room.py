"""A run that cannot save is refused before it begins, with the numbers; one that may run out of room is warned."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.storage import open_storage
from trainer.drive import disk_room
from trainer.drive.disk_room import check_room, judge, needed_bytes, state_bytes
from trainer.settings.tree import OptimConfig, RunConfig, TrainConfig

MIB = 1 << 20


def test_a_checkpoint_holds_the_weights_their_average_and_the_optimizers_memory() -> None:
    def of(optim: OptimConfig, ema: float) -> int:
        return state_bytes(RunConfig(optim=optim, train=TrainConfig(ema=ema)), 100)

    assert of(OptimConfig(name="sgd", momentum=0.0), 0.0) == 100
    assert of(OptimConfig(name="sgd", momentum=0.9), 0.0) == 200
    assert of(OptimConfig(name="adamw"), 0.0) == 300
    assert of(OptimConfig(name="adamw"), 0.999) == 400


sizes = st.integers(0, 1 << 40)


@given(free=sizes, state=st.integers(1, 1 << 36), keep=st.integers(2, 10), has=st.integers(0, 10), has_spill=st.booleans())
def test_only_what_cannot_save_at_all_is_refused(free: int, state: int, keep: int, has: int, has_spill: bool) -> None:
    found = judge(free_bytes=free, state_bytes=state, keep=keep, has_already=has, has_spill=has_spill)
    assert (found == "refuse") == (free < state and not has_spill)
    assert found != "enough" or free >= 2 * state  # cluster.store asks for twice the room of a file
    assert found != "warn" or free < needed_bytes(state, keep, has)


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    said = {"free": 0}
    monkeypatch.setattr(
        disk_room, "os", SimpleNamespace(statvfs=lambda path: SimpleNamespace(f_bavail=said["free"] // 4096, f_frsize=4096), path=os.path)
    )
    monkeypatch.setattr(disk_room, "is_another_disk", lambda setting, storage: not storage.is_local)
    return said


def test_the_numbers_and_the_way_out_are_in_the_message(tmp_path: Path, free_bytes: dict[str, int]) -> None:
    config = RunConfig(run="run", optim=OptimConfig(name="sgd", momentum=0.9), cluster=ClusterConfig(keep_checkpoints=3))
    storage, told = open_storage(tmp_path), list[str]()
    free_bytes["free"] = 80 * MIB
    with pytest.raises(ValueError, match=r"has 83\.9 MB free, and a checkpoint of this run takes 105 MB; .*--storage"):
        check_room(storage, config, 50 * MIB, told.append)
    assert told == []
    free_bytes["free"] = 300 * MIB
    check_room(storage, config, 50 * MIB, told.append)
    (line,) = told
    assert "has 315 MB free, and 3 checkpoints of 105 MB with one more being written may need 524 MB" in line
    assert "--cluster.keep-checkpoints" in line
    free_bytes["free"] = 600 * MIB
    check_room(storage, config, 50 * MIB, told.append)
    check_room(open_storage("s3://bucket/runs?region=x"), config, 50 * MIB, told.append)
    assert len(told) == 1
