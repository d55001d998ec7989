"""The peer: plain Ray Train with the same faults. How long from SIGKILL of a worker, or from the loss of a node, to the next step?

The same network and batch, DistributedDataParallel, `ray.train.report` with a checkpoint every 5 steps, `FailureConfig(max_failures=3)`;
once with Ray's defaults, and once with the health check every 0.5 s (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S). It measures time and repeated
steps. It does not compare weights after a kill, since torch's own all-reduce is not ours to judge.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.harness import PROJECT, Nodes, spread

Row = dict[str, Any]
SCRIPT = """
import json, os, sys, tempfile, time
from pathlib import Path
import ray, ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

def train(config):
    import torch, torchvision
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    plain = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10)
    model = prepare_model(plain)  # DistributedDataParallel where there is more than one worker: the state is the plain one's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt")
            plain.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"]); start = state["step"]
    log = open(config["log"], "a")
    for step in range(start, config["steps"]):
        images, labels = torch.randn(20, 3, 28, 28), torch.randint(0, 10, (20,))
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        print(json.dumps({"time": time.time(), "rank": rank, "step": step + 1, "pid": os.getpid(),
                          "node": ray.get_runtime_context().get_node_id()}), file=log, flush=True)
        time.sleep(0.05)
        if (step + 1) % 5 == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, f"{folder}/state.pt")
                    ray.train.report({"step": step + 1}, checkpoint=Checkpoint.from_directory(folder))
                else:
                    ray.train.report({"step": step + 1})

address, storage, steps, elastic = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "elastic"
ray.init(address=address, log_to_driver=False)
TorchTrainer(
    train, train_loop_config={"log": f"{storage}/steps.jsonl", "steps": steps},
    scaling_config=ScalingConfig(num_workers=(1, 2) if elastic else 2, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(name="peer", storage_path=storage, failure_config=FailureConfig(max_failures=3),
                         checkpoint_config=CheckpointConfig(num_to_keep=2)),
).fit()
"""


def measure(nodes: Nodes, fault: str, trials: int, *, health_interval_seconds: str = "") -> Row:
    """`fault`: "kill" kills a worker, "node" removes a node."""
    began = time.perf_counter()
    recovery, again = [], []
    for _ in range(trials):
        seconds, steps = _trial(nodes, fault, health_interval_seconds)
        recovery.append(seconds)
        again.append(steps)
    setting = f", health check every {health_interval_seconds} s" if health_interval_seconds else ", as it comes"
    return {
        "fault": f"plain Ray Train{setting}: {'SIGKILL of a worker' if fault == 'kill' else 'node lost'}",
        "promise": "(peer)",
        "trials": trials,
        "violations": 0,
        "detail": f"steps done again: {', '.join(map(str, again))}",
        "detection_seconds": None,
        "recovery_seconds": spread(recovery),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _trial(nodes: Nodes, fault: str, health_interval_seconds: str) -> tuple[float, int]:
    """(seconds from the fault to the next step's end, number of repeated steps)."""
    with tempfile.TemporaryDirectory() as storage:
        environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
        if health_interval_seconds:
            environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = health_interval_seconds
        command = [sys.executable, "-c", SCRIPT, nodes.address, storage, "2000", "elastic" if fault == "node" else "fixed"]
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        log = Path(storage) / "steps.jsonl"
        try:
            _wait(lambda: _newest(log) >= 32, 240)
            rows = _rows(log)
            victim = next(row for row in reversed(rows) if row["rank"] == 1)
            if fault == "kill":
                os.kill(victim["pid"], signal.SIGKILL)
            else:
                nodes.remove(victim["node"])
            at, reached, old = time.time(), _newest(log), {row["pid"] for row in rows}
            _wait(lambda: any(row["pid"] not in old for row in _rows(log)), 240)
            first = next(row for row in _rows(log) if row["pid"] not in old)
            return first["time"] - at, reached - first["step"] + 1
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if fault == "node":
                nodes.nodes.append(nodes.add())


def _rows(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]


def _newest(log: Path) -> int:
    return max((int(row["step"]) for row in _rows(log)), default=0)


def _wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the peer did not get there in time")
        time.sleep(0.05)
