"""A fleet of the real Ray Train: what the driver learns of a rank that raised, that the fleet is there for the next attempt,
and that a coordinator which is killed has forgotten nothing."""

import json
import subprocess
import sys

import pytest

from tests.e2e.running import PROJECT

SCRIPT = """
import dataclasses, json, os, pickle, signal, sys, time
from pathlib import Path
import ray
from cluster.agent import Payload
from cluster.belongings import belongings
from cluster.config import ClusterConfig
from cluster.launch import Fleet, Resources, failure_of_ranks, start_coordinator
from cluster.ray_cluster import ray_cluster
from tests.e2e.running import processes_of_session

def ask(method, *arguments):
    return ray.get(getattr(coordinator, method).remote(*arguments))

def ends(attempt):
    while len(ask("ends", attempt)) < 2:
        assert not fleet.wait(0.1), fleet.failure()
    return ask("ends", attempt)

NOTHING = pickle.dumps(None)
project = Path(sys.argv[1])
with belongings() as ours, ray_cluster(
    ClusterConfig(), project=project, address="", in_job=False, cpus=2, folder=ours.folder, on_lost=print
):
    coordinator = start_coordinator(storage_uri=sys.argv[2], run="fleet", generation=1, keep=2)
    resources = Resources(workers=2, fewest=2, most=2, cpus_per_worker=1.0, gpus_per_worker=0, threads_per_worker=1)
    fleet = Fleet(
        1, coordinator, name="fleet", resources=resources, modules=["torch"], notice="", placement_seconds=60, heartbeat_seconds=1.0
    )
    ask("start_attempt", 1, 2, 0, 1, Payload(target="tests.cluster.ranks:raise_key_error", spec=NOTHING))
    print(json.dumps(dataclasses.asdict(failure_of_ranks(ends(1)))))
    ask("start_attempt", 2, 2, 0, 1, Payload(target="tests.cluster.ranks:join_and_publish", spec=NOTHING, files={"a": ray.put(b"travels")}))
    print(json.dumps([end.status for end in ends(2).values()]))
    ask("put_result", 2, {"stopped": False})
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of_session(os.getsid(0))}
    (pid,) = [pid for pid, name in names.items() if name.startswith(b"ray::CoordinatorActor")]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    print(json.dumps([ask("result", 2), [end.status for end in ask("ends", 2).values()], len(ask("ends", 1))]))
    print(f"the coordinator was back after {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(ask("lookup", 2, "total")))
    ask("end_fleet", 1)
    print(json.dumps([fleet.wait(60), fleet.failure()]))
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_an_exception_on_a_rank_reaches_the_driver_and_the_next_attempt_runs_on_the_same_fleet(tmp_path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(PROJECT), str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, start_new_session=True)
    assert done.returncode == 0, done.stderr
    failure, statuses, known, total, end = (json.loads(line) for line in done.stdout.splitlines()[-5:])
    assert (failure["kind"], failure["message"]) == ("user", "KeyError: 'learning rate'")
    assert failure["rank"] in (0, 1)
    assert failure["traceback"].startswith("Traceback (most recent call last):")
    assert "in look_up" in failure["traceback"]
    assert statuses == [0, 0]
    assert known == [{"stopped": False}, [0, 0], 2]  # by the coordinator that was started in place of the killed one
    assert total == [3.0, "travels"]
    assert end == [True, None]
