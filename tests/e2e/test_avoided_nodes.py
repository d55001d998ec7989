"""A fleet of the real Ray Train is not placed on nodes that have given notice, and Ray is asked whether a notice still stands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import PROJECT

SCRIPT = """
import json, os, sys, time
import ray
from ray.cluster_utils import Cluster
from cluster.launch import Fleet, Resources, free_resources, nodes_with_file, start_coordinator

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["PYTHONPATH"] = sys.argv[1]
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
nodes.add_node(num_cpus=2)
ray.init(address=nodes.address, logging_level="ERROR")
head, other = (node["NodeID"] for node in ray.nodes())

def placed(number, avoid):
    coordinator = start_coordinator(storage_uri=sys.argv[2], run=f"fleet-{number}", generation=1, keep=2)
    resources = Resources(workers=1, fewest=1, most=1, cpus_per_worker=1.0, gpus_per_worker=0, threads_per_worker=1)
    fleet = Fleet(
        number, coordinator, name=f"fleet-{number}", resources=resources, modules=[], notice="", placement_seconds=60,
        heartbeat_seconds=1.0, avoid=avoid,
    )
    ray.get(coordinator.start_attempt.remote(1, 1, 0, number, None))
    while not (reports := ray.get(coordinator.status.remote()).reports):
        assert not fleet.wait(0.1), fleet.failure()
    ray.get(coordinator.end_fleet.remote(number))
    assert fleet.wait(60)
    return [report.node_id for report in reports.values()]

print(json.dumps([placed(1, {head}) == [other], placed(2, {other}) == [head]]))
print(json.dumps([len(free_resources()), len(free_resources({head})), len(free_resources({head, other}))]))
here = {head, other, "gone"}
print(json.dumps([nodes_with_file(sys.argv[2], here) == {head, other}, sorted(nodes_with_file(sys.argv[2] + "/no", here))]))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_fleet_keeps_away_from_the_nodes_that_it_is_told_to_avoid(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(PROJECT), str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    where, room, notices = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    assert where == [True, True]
    assert room == [2, 1, 0]
    assert notices == [True, []]
