"""A run's exporters without the run: real registries and servers with numbers that move, and the target file that the run would write.

Used by the tests of deploy.up and deploy.preview; by hand: python -m tests.deploy.exporters STORAGE RUN"""

import json
import math
import sys
import time
from pathlib import Path

from cluster.exporter import Server, serve_metrics
from cluster.metrics import CAUSES, STATES, Metrics
from cluster.names import FILE_SD

STEP_SECONDS = 0.1
BATCH = 64


class Exporters:
    """Two ranks and a coordinator. `tick()` is one step of the run."""

    def __init__(self, storage: Path, run: str, ranks: int = 2) -> None:
        self._folder, self._run, self._count = storage / run, run, ranks
        self._folder.mkdir(parents=True, exist_ok=True)
        self.coordinator = Metrics(run, "coordinator", 0, owner="coordinator")
        self.coordinator.set("run_quarantined_samples", 0)
        self.coordinator.describe("run_info", {"owner": "ann", "task": "classification", "device": "cpu"})
        self.enter("running")
        self._coordinator = serve_metrics(self.coordinator.registry)
        self.ranks: list[tuple[Metrics, Server]] = []
        self.attempt, self.step = 0, 0
        self.begin()

    def begin(self) -> None:
        """A new attempt, with exporters of its own."""
        self.attempt += 1
        for _, server in self.ranks:
            server.close()
        metrics = [Metrics(self._run, rank, self.attempt) for rank in range(self._count)]
        self.ranks = [(rank, serve_metrics(rank.registry)) for rank in metrics]
        for rank in metrics:
            rank.set("start_time_seconds", time.time())
            rank.set("planned_steps", 2000)
        self.coordinator.set("workers", self._count)
        addresses = [(server.address, str(rank), self.attempt) for rank, (_, server) in enumerate(self.ranks)]
        addresses.append((self._coordinator.address, "coordinator", 0))
        targets = [
            {"targets": [a], "labels": {"namespace": "ann", "run": self._run, "rank": r, "attempt": str(n)}} for a, r, n in addresses
        ]
        (self._folder / FILE_SD).write_text(json.dumps(targets))

    def enter(self, state: str) -> None:
        for each in STATES:
            self.coordinator.set("run_state", float(each == state), label=each)
        self.coordinator.set("run_state_time_seconds", time.time(), label=state)

    def fail(self, kind: str = "infrastructure") -> None:
        self.coordinator.add("failures_total", label=kind)
        self.coordinator.add("restarts_total", label=kind)
        self.begin()

    def tick(self) -> None:
        self.step += 1
        for number, (rank, _) in enumerate(self.ranks):
            compute, wait = STEP_SECONDS * (0.7 + 0.1 * number), STEP_SECONDS * 0.1
            rank.add("steps_total")
            rank.add("samples_total", BATCH / self._count)
            rank.add("compute_seconds_total", compute)
            rank.add("forward_backward_seconds_total", 0.9 * compute)
            rank.add("optimizer_seconds_total", 0.1 * compute)
            rank.add("data_wait_seconds_total", wait)
            rank.add("reduce_seconds_total", STEP_SECONDS - compute - wait)
            rank.add("checkpoint_stall_seconds_total", 0.001)
            rank.add("decode_seconds_total", 0.02)
            rank.add("read_bytes_total", 1_000_000)
            rank.add("read_wait_seconds_total", 0.001)
            rank.observe("step_seconds", STEP_SECONDS)
            rank.set("step", self.step)
            rank.set("epoch", self.step / 150)
            rank.set("loss", 0.4 + 2 * math.exp(-self.step / 120))
            rank.set("learning_rate", 0.001 * (1 - self.step / 2000))
            rank.set("gradient_norm", 1 + 3 * math.exp(-self.step / 50))
            rank.set("images_per_second", BATCH / self._count / STEP_SECONDS)
            rank.set("host_memory_bytes", 900e6 + 50e6 * number)
            rank.set("loader_memory_bytes", 40e6)
            if self.step % 50 == 0:
                rank.set("test_accuracy_ratio", 0.9 - 0.6 * math.exp(-self.step / 150))
                rank.set("test_loss", 0.5 + 1.5 * math.exp(-self.step / 150))
                rank.add("evaluation_seconds_total", 0.3)
                rank.observe("checkpoint_stage_seconds", 0.03)
        seconds = {"steps": 0.8, "data_wait": 0.1, "exchange_wait": 0.05, "start_up": 0.0, "evaluation": 0.05}
        for cause in CAUSES:
            self.coordinator.set("run_seconds", self.step * STEP_SECONDS * seconds.get(cause, 0.0) + 4 * (cause == "start_up"), label=cause)
        self.coordinator.set("goodput_ratio", 0.8 * self.step * STEP_SECONDS / (self.step * STEP_SECONDS + 4))
        self.coordinator.set("straggler_skew_ratio", 1.07)
        if self.step % 50 == 0:
            self.coordinator.set("checkpoint_commit_step", self.step)
            self.coordinator.set("checkpoint_commit_time_seconds", time.time())
            self.coordinator.set("checkpoint_bytes", 26e6)
            self.coordinator.observe("checkpoint_commit_seconds", 0.004)

    def quarantine(self) -> None:
        self.ranks[0][0].add("quarantined_samples_total", label="truncated")
        self.coordinator.set("run_quarantined_samples", 1)

    def close(self) -> None:
        for _, server in self.ranks:
            server.close()
        self._coordinator.close()
        (self._folder / FILE_SD).write_text("[]")


if __name__ == "__main__":
    run = Exporters(Path(sys.argv[1]), sys.argv[2])
    while run.step < 900:
        time.sleep(STEP_SECONDS)
        run.tick()
        if run.step == 250:
            run.fail()
        if run.step == 200:
            run.quarantine()
    run.close()
