"""Claims about what a run asks an autoscaler for. The driver's use of it is in tests/trainer/test_room.py, a real one in tests/e2e."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import demand
from cluster.config import ClusterConfig
from cluster.demand import Demand, groups_wanted, lacks_fewest, wait_for_hardware
from cluster.launch import ClusterHardware, plan_resources


def hardware(cpus: int, gpus: int = 0, *, local: bool = False) -> ClusterHardware:
    return ClusterHardware(local=local, nodes=1, cpus=cpus, gpus=gpus)


@given(st.integers(-2, 64), st.integers(0, 64), st.booleans())
def test_each_lacking_worker_is_asked_for_unless_there_is_room_for_any(lacking: int, room: int, is_placed: bool) -> None:
    wanted = groups_wanted(lacking=lacking, room=room, is_placed=is_placed)
    assert wanted == (0 if room or is_placed or lacking < 0 else lacking)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 16), st.integers(0, 4), st.integers(-1, 2), st.integers(0, 3))
def test_an_elastic_run_waits_wherever_the_plan_would_refuse_it(fewest, more, cpus, gpus, per_gpu, per_cpu) -> None:
    workers, config = f"{fewest}:{fewest + more}", ClusterConfig(gpus_per_worker=per_gpu, cpus_per_worker=per_cpu)
    lacks = lacks_fewest(workers, config, hardware(cpus, gpus))
    assert not lacks_fewest(workers, config, hardware(cpus, gpus, local=True))
    if more == 0:
        assert not lacks
        return
    if not lacks:
        plan_resources(workers, config, hardware(cpus, gpus))
    else:
        assert lacks["CPU"] * fewest > cpus or lacks["GPU"] * fewest > gpus


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """The groups that wait."""
    groups: list[list[dict[str, float]]] = []
    monkeypatch.setattr(demand, "placement_group", lambda bundles: groups.append(bundles) or bundles)
    monkeypatch.setattr(demand, "remove_placement_group", lambda group: groups.remove(group))
    return groups


def test_gpu_nodes_are_waited_for_and_planned_with(groups: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch) -> None:
    later = iter([hardware(0), hardware(8, 1), hardware(16, 2)])
    seen, told = [], []
    monkeypatch.setattr(demand, "hardware_now", lambda local: seen.append([*groups]) or next(later))
    monkeypatch.setattr(demand, "WAIT_POLL_SECONDS", 0)
    config = ClusterConfig(gpus_per_worker=1)
    found = wait_for_hardware("2:4", config, hardware(0), told.append)
    assert (found.cpus, found.gpus) == (16, 2)
    assert seen == [[[{"CPU": 1.0, "GPU": 1.0}] * 2]] * 3
    assert groups == []
    assert plan_resources("2:4", config, found).workers == 2
    assert len(told) == 1


def test_nodes_that_nobody_brings_are_an_error_that_says_what_was_needed(
    groups: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(demand, "hardware_now", lambda local: hardware(8, 2))
    monkeypatch.setattr(demand, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda seconds: None))
    with pytest.raises(ValueError, match=r"--workers 4:8 needs at least 4 workers of 1 CPU and 1 GPU, .*_seconds=5 .*2 GPUs.*fewer"):
        wait_for_hardware("4:8", ClusterConfig(placement_seconds=5), hardware(8, 2), lambda line: None)
    assert groups == []


def test_the_same_demand_is_stated_once_and_another_replaces_it(groups: list[list[dict[str, float]]]) -> None:
    asked = Demand({"CPU": 2.0})
    assert asked.state(3)
    assert not asked.state(3)
    assert groups == [[{"CPU": 2.0}]] * 3
    assert asked.state(1, workers_each=2)
    assert groups == [[{"CPU": 2.0}] * 2]
    assert not asked.state(0)
    assert groups == []
