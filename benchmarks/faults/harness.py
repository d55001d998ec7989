"""Runs for the fault campaign: a Ray cluster whose nodes are local processes, and `trainer.run` processes watched through their journals.
Called by runs.py, ray_train.py and the campaign's command line."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.agent import process_state
from cluster.ledger import read_ledger
from cluster.process import process_stat

PROJECT = Path(__file__).resolve().parents[2]
INJECT = Path(__file__).resolve().parent / "inject"
# A small BatchNorm network on real images: the system is tested, not the model.
SETTINGS = (
    *("--data.path", str(PROJECT / "dataio" / "samples" / "fashion_mnist"), "--data.batch-size", "40"),
    *("--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--model.stem", "native"),
    *("--train.precision", "fp32", "--train.ema", "0.99", "--train.epochs", "2", "--train.max-steps", "80"),
    *("--train.checkpoint-every", "5", "--train.verify-every", "10", "--train.ledger"),
    *("--cluster.threads-per-worker", "1", "--cluster.cpus-per-worker", "1"),
)
STEPS = 80
OBJECT_STORE_BYTES = 128 << 20
Event = Mapping[str, Any]


class Nodes:
    """A Ray cluster whose nodes are processes on this machine: a head without CPUs, and nodes with one CPU each."""

    def __init__(self, count: int, scratch: Path) -> None:
        self.action_file = scratch / "action"
        os.environ |= {
            # The project too: nodes on one host share Ray's folder of packages, and see each other's changes there.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(INJECT), str(PROJECT), os.environ.get("PYTHONPATH", "")])),
            "FAULT_ACTION_FILE": str(self.action_file),
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(count)]
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

    def remove(self, node_id: str) -> None:
        """Kills the node's processes, all at once."""
        (node,) = [node for node in self.nodes if node.node_id == node_id]
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def close(self) -> None:
        self._cluster.shutdown()


class Trial:
    """One `trainer.run` process. Its output goes to a file next to its folder."""

    def __init__(self, nodes: Nodes, storage: Path, name: str, *args: str) -> None:
        self.folder = storage / name
        self.log = storage / f"{name}.log"
        self.action_file = nodes.action_file
        storage.mkdir(parents=True, exist_ok=True)
        self.seen_before = len(self.all_events())
        command = [
            *(sys.executable, "-m", "trainer.run", *SETTINGS, "--storage", str(storage), "--run", name),
            *("--cluster.address", nodes.address, "--cluster.allow-unauthenticated", *args),
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def all_events(self) -> list[Event]:
        try:
            lines = (self.folder / "journal.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def events(self, name: str = "", **fields: Any) -> list[Event]:
        """Events of this process with this name and these fields."""
        return [
            event
            for event in self.all_events()[self.seen_before :]
            if (not name or event["event"] == name) and all(event.get(key) == value for key, value in fields.items())
        ]

    def wait_for(self, name: str, timeout_seconds: float = 180.0, **fields: Any) -> Event:
        return self.until(lambda: self.events(name, **fields), f"{name} {fields}", timeout_seconds)[0]

    def wait_for_step(self, step: int) -> None:
        """Waits for a commit of this step, or a later one."""
        self.until(lambda: [e for e in self.events("checkpoint_committed") if e["step"] >= step], f"commit of step {step}", 180.0)

    def until(self, find: Callable[[], Any], what: str, timeout_seconds: float) -> Any:
        end = time.monotonic() + timeout_seconds
        while not (found := find()):
            if self.process.poll() is not None and not (found := find()):
                raise AssertionError(f"the run ended with {self.process.returncode} before {what}: {self.tail()}")
            if time.monotonic() > end:
                raise AssertionError(f"no {what} in {timeout_seconds:g} s: {self.tail()}")
            if not found:
                time.sleep(0.02)
        return found

    def pid_of(self, rank: int) -> int:
        return int(self.events("worker_registered", rank=rank)[-1]["pid"])

    def node_of(self, rank: int) -> str:
        return str(self.events("worker_registered", rank=rank)[-1]["node_id"])

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> float:
        """Sends a signal to a rank's process; returns the unix time."""
        os.kill(self.pid_of(rank), number)
        return time.time()

    def inject(self, rank: int, action: str) -> float:
        """Makes a rank do one of the actions of inject/sitecustomize.py; returns the unix time."""
        self.action_file.write_text(action)
        return self.kill(rank, signal.SIGUSR2)

    def finish(self, timeout_seconds: float = 300.0) -> int:
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the run did not end in {timeout_seconds:g} s: {self.tail()}") from None

    def end(self) -> None:
        """Sends SIGKILL to the driver and its children, if it still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self) -> str:
        return self.log.read_text()[-2000:]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def seen(self) -> dict[tuple[int, int], tuple[tuple[int, ...], bool]]:
        """(step, virtual rank) -> (sample ids, whether the batch was left out), for the steps that count."""
        return {(r.step, r.virtual_rank): (r.ids, r.skipped) for r in read_ledger(self.folder / "ledger")}

    def detection_seconds(self, since: float) -> float:
        """Seconds from the fault until the driver knew of it."""
        known = [e["time"] for e in self.events() if e["event"] in ("attempt_failed", "hang", "attempt_paused") and e["time"] >= since]
        return float(min(known)) - since if known else float("nan")

    def recovery_seconds(self, since: float) -> float:
        """Seconds from the fault to the end of the first step after it."""
        steps = [e["time"] for e in self.events("first_step") if e["time"] >= since]
        return float(min(steps)) - since if steps else float("nan")


def parent_of(pid: int) -> int:
    stat = process_stat(pid)
    assert stat is not None, f"process {pid} is gone"
    return stat.parent


def process_named(text: str) -> int:
    """The process whose command line contains `text`."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if text.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                    return int(folder.name)
    raise AssertionError(f"no process is called {text!r}")


@contextlib.contextmanager
def throttled(pid: int, *, run_seconds: float = 0.02, stop_seconds: float = 0.08) -> Iterator[None]:
    """Lets a process run only part of the time: SIGSTOP and SIGCONT in turns."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(stop_seconds)
                os.kill(pid, signal.SIGCONT)
                time.sleep(run_seconds)
        os._exit(0)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def saturated(processes: int) -> Iterator[None]:
    """Keeps every core busy with other work."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Minimum, median, maximum."""
    known = sorted(value for value in values if value == value)
    if not known:
        return None
    return {"min": round(known[0], 2), "median": round(known[len(known) // 2], 2), "max": round(known[-1], 2)}


def pick(seed: int) -> random.Random:
    """A random generator: the same seed gives the same choices."""
    return random.Random(seed)


__all__ = ["STEPS", "Nodes", "Trial", "parent_of", "pick", "process_named", "process_state", "saturated", "spread", "throttled"]
