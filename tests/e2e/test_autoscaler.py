"""A run on a cluster whose autoscaler starts real nodes: it asks for the workers that it lacks, takes them in, and leaves no demand behind.

Ray's autoscaler (the one that KubeRay runs) with its provider of nodes for tests, which starts raylets on this machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.services import get_node_ip_address
from ray.autoscaler.v2.sdk import get_cluster_status

from benchmarks.faults.harness import throttled
from tests.e2e.running import PROJECT, Run, kill_session
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
MOST_NODES = 2
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"  # by these names the provider knows the head
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
COMMON = [
    *("--train.epochs", "1000", "--train.eval-every-epochs", "1000", "--optim.schedule", "constant", "--train.checkpoint-every", "5"),
    *("--data.max-bad-fraction", "0.01", "--data.batch-size", "24", "--train.virtual-ranks", "3", "--cluster.cpus-per-worker", "1"),
    *("--cluster.keep-checkpoints", "10000"),  # one of them is compared below, however far the run gets meanwhile
]


class AutoscalingCluster:
    """A head without CPUs, and an autoscaler that may add nodes of one CPU. (Ray's own class of this name begins with `ray stop --force`:
    it would end every Ray of this machine.)"""

    def __init__(self) -> None:
        port, client_port = free_ports(2)
        self.address = f"{get_node_ip_address()}:{port}"
        self.temp = tempfile.TemporaryDirectory(prefix="ra-")  # short: Ray makes Unix sockets in it
        self.log = Path(self.temp.name) / "head.log"
        config = Path(self.temp.name) / "autoscaler.json"
        node_types = {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "object_store_memory": 100 << 20}, "node_config": {}, "max_workers": MOST_NODES},
        }
        config.write_text(
            json.dumps(
                {
                    "cluster_name": "test",
                    "max_workers": MOST_NODES,
                    "idle_timeout_minutes": 10,
                    "provider": {
                        "type": "external",
                        "module": PROVIDER,
                        "gcs_address": self.address,
                        "head_node_id": HEAD_ID,
                        "launch_multiple": True,
                    },
                    "available_node_types": node_types,
                    "head_node_type": HEAD_TYPE,
                    "auth": {},
                    "docker": {},
                    "file_mounts": {},
                    "cluster_synced_files": [],
                    "file_mounts_sync_continuously": False,
                    "rsync_exclude": [],
                    "rsync_filter": [],
                    **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
                    **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
                }
            )
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "0"),
                *("--port", str(port), "--ray-client-server-port", str(client_port), "--min-worker-port", "0", "--max-worker-port", "0"),
                *("--include-dashboard", "false", "--object-store-memory", str(100 << 20), "--disable-usage-stats"),
                *("--temp-dir", self.temp.name, "--autoscaling-config", str(config)),
            ],
            cwd=PROJECT,
            env={
                **os.environ,
                "RAY_enable_autoscaler_v2": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_AUTH_MODE": "disabled",
                # PYTHONPATH: nodes of one host share Ray's folder of packages, and what one does there another sees.
                "RAY_worker_niceness": "0",
                "RAY_TRAIN_V2_ENABLED": "1",
                "PYTHONPATH": str(PROJECT),
            },
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 60
        while "will now block forever" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def workers_in_demand(self) -> int:
        """What the autoscaler is asked for, in workers, and cannot bring."""
        demands = get_cluster_status(self.address).resource_demands
        assert not demands.cluster_constraint_demand, "that would outlive its driver"
        return sum(bundle.count for group in demands.placement_group_demand for bundle in group.bundles_by_count)

    def close(self) -> None:
        kill_session(self.process.pid)  # the provider's nodes would outlive the head
        self.process.wait()
        self.temp.cleanup()


@pytest.fixture
def cluster() -> Iterator[AutoscalingCluster]:
    cluster = AutoscalingCluster()
    yield cluster
    cluster.close()


def wait_for_demand(cluster: AutoscalingCluster, workers: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while cluster.workers_in_demand() != workers:
        assert time.monotonic() < end, f"{cluster.workers_in_demand()} workers in demand, not {workers}"
        time.sleep(0.2)


def test_an_elastic_run_gets_its_nodes_from_an_autoscaler_and_its_demand_dies_with_it(
    cluster: AutoscalingCluster, tmp_path: Path, images: Path
) -> None:
    common = (*COMMON, "--cluster.address", cluster.address, "--cluster.allow-unauthenticated")
    here: Any = {"storage": tmp_path, "data": images, "environment": {"RAY_AUTH_MODE": "disabled"}}
    run = Run(*common, "--workers", "1:3", "--cluster.grow-after-seconds", "1", name="elastic", **here)
    # There is no node but the head: the first is asked for before the run is planned, the others once it is at work.
    run.wait_for("first_step", timeout=60, attempt=1, workers=1)
    with throttled(run.pid_of(0)):  # the fewer steps meanwhile, the fewer to do again below
        assert run.wait_for("workers_asked_for", attempt=1)["workers"] == 2
        run.wait_for("pause_requested", attempt=1)
    assert run.wait_for("attempt_paused", attempt=1)["kind"] == "grow"
    run.wait_for("first_step", attempt=2, workers=2)
    # The cluster has no third node: the demand waits, and is no more than that.
    assert run.wait_for("workers_asked_for", attempt=2)["workers"] == 1
    wait_for_demand(cluster, 1, seconds=10)
    step = run.wait_for("checkpoint_committed", attempt=2)["step"]
    run.signal(signal.SIGKILL)
    run.finish()
    wait_for_demand(cluster, 0, seconds=10)
    told = [line for line in run.output().splitlines() if "demand" in line or "autoscaler" in line or "warn" in line.lower()]
    assert not told, run.output()

    alone = Run(*common, "--workers", "1", "--train.max-steps", str(step), "--train.checkpoint-every", "1000", name="alone", **here)
    assert alone.finish() == 0, alone.output()
    assert weights(alone, step) == weights(run, step)


def weights(run: Run, step: int) -> bytes:
    [checkpoint] = [one for one in run.checkpoints() if one.name.startswith(f"step-{step:08d}.")]
    return (checkpoint / "model.safetensors").read_bytes()
