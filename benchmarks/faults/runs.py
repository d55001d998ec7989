"""The campaign's faults of whole runs: processes killed and stopped, nodes lost and added, corrupt numbers; each in a run on real Ray.

A trial is a run with a fault in mid-training. The promise for every trial: it ends well, its weights equal those of an undisturbed run to
the last bit, and its ledger shows the same samples in the same steps. Rows with a different promise say so.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.harness import STEPS, Nodes, Trial, parent_of, pick, process_named, saturated, spread, throttled

Row = dict[str, Any]


class Campaign:
    """The runs on one cluster, and the undisturbed run that all are compared with."""

    def __init__(self, nodes: Nodes, storage: Path, *, workers: int = 2, say: Callable[[str], None] = print) -> None:
        self.nodes, self.storage, self.workers, self.say = nodes, storage, workers, say
        self.count = 0
        self.control = self.start("--workers", str(workers))
        self._expect(self.control.finish() == 0, f"the control run failed: {self.control.tail()}")
        self.sha256 = self.control.summary()["weights_sha256"]
        self.seen = self.control.seen()

    def start(self, *args: str, name: str = "") -> Trial:
        self.count += 1
        has_workers = "--workers" in args
        always = () if has_workers else ("--workers", str(self.workers))
        virtual = ("--train.virtual-ranks", "4")
        return Trial(self.nodes, self.storage, name or f"trial-{self.count:03d}", *always, *virtual, *args)

    def row(self, fault: str, trials: int, one: Callable[[int], tuple[Trial, float]], promise: str = "same weights, same ledger") -> Row:
        """`one(number)` does a trial; it returns the finished trial with the unix time of its fault."""
        began = time.perf_counter()
        problems, detection, recovery = [], [], []
        for number in range(trials):
            try:
                trial, at = one(number)
                detection.append(trial.detection_seconds(at))
                recovery.append(trial.recovery_seconds(at))
            except AssertionError as error:
                problems.append(f"trial {number}: {error}")
            self.say(f"{fault}: {number + 1} of {trials}, {len(problems)} violations")
        return {
            "fault": fault,
            "promise": promise,
            "trials": trials,
            "violations": len(problems),
            "detail": problems[0] if problems else "",
            "detection_seconds": spread(detection),
            "recovery_seconds": spread(recovery),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def same(self, trial: Trial, *, restarts: int | None = None) -> None:
        """Checks that the run ended well, with the weights and the ledger of the undisturbed run."""
        status = trial.finish()
        self._expect(status == 0, f"exit status {status}: {trial.tail()}")
        summary = trial.summary()
        self._expect(summary["weights_sha256"] == self.sha256, f"weights {summary['weights_sha256'][:12]}, not {self.sha256[:12]}")
        self._expect(trial.seen() == self.seen, "another ledger")
        if restarts is not None:
            self._expect(summary["restarts"] == restarts, f"{summary['restarts']} restarts, not {restarts}")

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise AssertionError(otherwise)

    # Processes that die

    def rank_killed(self, number: int) -> tuple[Trial, float]:
        """SIGKILL of a random rank, at a random moment after a random step."""
        random = pick(number)
        trial = self.start()
        trial.wait_for_step(5 * random.randrange(1, STEPS // 5 - 1))
        time.sleep(random.random() * 0.5)
        at = trial.kill(random.randrange(self.workers))
        self.same(trial, restarts=1)
        return trial, at

    def agent_killed(self, number: int) -> tuple[Trial, float]:
        """SIGKILL of one of Ray's own workers: an agent, and with it the rank."""
        trial = self.start()
        trial.wait_for_step(20)
        os.kill(process_named("ray::RayTrainWorker"), signal.SIGKILL)
        at = time.time()
        self.same(trial, restarts=1)
        return trial, at

    def zygote_killed(self, number: int) -> tuple[Trial, float]:
        trial = self.start()
        trial.wait_for_step(20)
        os.kill(parent_of(trial.pid_of(number % self.workers)), signal.SIGKILL)
        at = time.time()
        self.same(trial, restarts=1)
        return trial, at

    def coordinator_killed(self, number: int) -> tuple[Trial, float]:
        """The coordinator is restarted and the ranks continue: no restart of the run."""
        trial = self.start()
        trial.wait_for_step(20)
        os.kill(process_named("ray::CoordinatorActor"), signal.SIGKILL)
        at = time.time()
        self.same(trial, restarts=0)
        return trial, at

    def driver_killed(self, number: int) -> tuple[Trial, float]:
        """SIGKILL of the driver, then the same command again."""
        name = f"driver-{number}"
        first = self.start(name=name)
        first.wait_for_step(20)
        first.end()
        at = time.time()
        trial = self.start(name=name)
        self.same(trial)
        self._expect(bool(trial.events("resumed")), "started from zero")
        return trial, at

    def stopped_by_sigterm(self, number: int) -> tuple[Trial, float]:
        """SIGTERM: a commit within the grace period, status 143; then the same command again."""
        name = f"sigterm-{number}"
        first = self.start(name=name)
        first.wait_for_step(20)
        at = time.time()
        first.process.terminate()
        status = first.finish(60)
        self._expect(status == 128 + signal.SIGTERM, f"exit status {status}")
        last = max(event["step"] for event in first.events("checkpoint_committed"))
        trial = self.start(name=name)
        self.same(trial)
        self._expect(trial.events("resumed")[0]["step"] == last, "did not go on from the step it stopped at")
        return trial, at

    # Ranks without progress

    def rank_stopped(self, number: int) -> tuple[Trial, float]:
        trial = self.start()
        trial.wait_for_step(20)
        at = trial.kill(number % self.workers, signal.SIGSTOP)
        hang = trial.wait_for("hang")
        self._expect((hang["kind"], hang["ranks"]) == ("stopped", [number % self.workers]), f"told {hang}")
        self.same(trial, restarts=1)
        self._expect(len(trial.events("stacks")) == self.workers, "not the stacks of all ranks")
        return trial, at

    def rank_hangs_in_python(self, number: int) -> tuple[Trial, float]:
        """The main thread of one rank sleeps; the other waits in a collective. cluster.hang_seconds is 10 here."""
        trial = self.start("--cluster.hang-seconds", "10")
        trial.wait_for_step(20)
        at = trial.inject(number % self.workers, "hang")
        hang = trial.wait_for("hang")
        self._expect((hang["kind"], hang["ranks"]) == ("stuck", [number % self.workers]), f"told {hang}")
        self.same(trial, restarts=1)
        stacks = {event["rank"]: event["text"] for event in trial.events("stacks")}
        self._expect(len(stacks) == self.workers, "not the stacks of all ranks")
        self._expect("sitecustomize" in stacks[number % self.workers], "the hanging line is not in its stack")
        return trial, at

    def both_cores_saturated(self, number: int) -> tuple[Trial, float]:
        """Two minutes of other work on every core: nothing is killed."""
        at = time.time()
        with saturated(2 * (os.cpu_count() or 1)):
            trial = self.start(
                "--cluster.hang-seconds", "10", "--train.epochs", "20", "--train.max-steps", "0", "--train.eval-every-epochs", "20"
            )
            trial.wait_for("first_step", 600.0)
            end = time.monotonic() + 120
            while time.monotonic() < end and trial.process.poll() is None:
                time.sleep(1)
        trial.process.terminate()
        trial.finish()
        told = trial.events("hang") + trial.events("attempt_failed")
        self._expect(not told, f"told {told}")
        return trial, at

    def rank_straggles(self, number: int) -> tuple[Trial, float]:
        """One rank gets a fifth of the time: it is reported by name, and nothing is killed."""
        trial = self.start("--cluster.hang-seconds", "30", "--cluster.faults.straggler-steps", "10")
        trial.wait_for_step(10)
        at = time.time()
        slow = number % self.workers
        with throttled(trial.pid_of(slow)):
            told = trial.wait_for("straggler")
        self._expect(told["rank"] == slow, f"told {told}")
        self.same(trial, restarts=0)
        return trial, at

    # Numbers

    def gradient_is_nan(self, number: int) -> tuple[Trial, float]:
        """Returns to the last commit and skips the batch: the same weights as a run without that batch from the start."""
        trial = self.start()
        trial.wait_for_step(20)
        at = trial.inject(number % self.workers, "nan")
        skipped = trial.wait_for("batch_skipped")["step"]
        status = trial.finish()
        self._expect(status == 0, f"exit status {status}: {trial.tail()}")
        control = f"nan-control-{number}"
        (self.storage / control).mkdir(parents=True)
        (self.storage / control / "journal.jsonl").write_text(
            f'{{"time":0.0,"event":"batch_skipped","attempt":0,"step":{skipped},"reason":"the control leaves it out too"}}\n'
        )
        other = self.start(name=control)
        self._expect(other.finish() == 0, other.tail())
        self._expect(trial.summary()["weights_sha256"] == other.summary()["weights_sha256"], "other weights than without the batch")
        seen = trial.seen()
        self._expect(seen == other.seen(), "another ledger than without the batch")
        left_out = {step for (step, _), (_, is_skipped) in seen.items() if is_skipped}
        self._expect(left_out == {skipped}, f"left out {left_out}, not {skipped}")
        self._expect({key: ids for key, (ids, _) in seen.items()} == {key: ids for key, (ids, _) in self.seen.items()}, "lost samples")
        return trial, at

    def weight_is_flipped(self, number: int) -> tuple[Trial, float]:
        """One bit of one weight of one rank: found at the next check, before any checkpoint that could contain it."""
        trial = self.start()
        trial.wait_for_step(20)
        rank = number % self.workers
        at = trial.inject(rank, "flip")
        failed = trial.wait_for("attempt_failed")
        self._expect(failed["kind"] == "numbers", f"told {failed}")
        who = "ranks 0, 1" if self.workers == 2 else f"rank {rank}"
        self._expect(who in failed["message"], f"told {failed['message']}")
        self.same(trial, restarts=1)
        return trial, at

    # Nodes

    def node_lost_and_added(self, number: int) -> tuple[Trial, float]:
        """`--workers 1:N`: after a node dies (SIGKILL of all its processes) the run continues with fewer; after a node joins, with more."""
        trial = self.start("--workers", f"1:{self.workers}", "--cluster.grow-after-seconds", "2", "--train.max-steps", "80")
        trial.wait_for_step(10)
        self.nodes.remove(trial.node_of(1))
        at = time.time()
        trial.until(lambda: trial.events("first_step", workers=self.workers - 1), "a step with fewer workers", 180)
        self.nodes.nodes.append(self.nodes.add())
        self.same(trial)
        worlds = [event["workers"] for event in trial.events("attempt_started")]
        self._expect(worlds == [self.workers, self.workers - 1, self.workers], f"workers {worlds}")
        return trial, at

    def node_drained(self, number: int) -> tuple[Trial, float]:
        """`ray drain-node` with a deadline: before it, the run commits and moves elsewhere; no failure is counted."""
        spare = self.nodes.add()
        self.nodes.nodes.append(spare)
        trial = self.start("--workers", f"1:{self.workers}")
        trial.wait_for_step(10)
        node = trial.node_of(0)
        at = time.time()
        drain = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.nodes.address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"),
        ]
        subprocess.run(drain, check=True, capture_output=True)
        paused = trial.wait_for("attempt_paused", 60)
        self._expect(paused["kind"] == "preempted" and paused["time"] < at + 60, f"told {paused}")
        self.same(trial)
        self._expect(not trial.events("attempt_failed"), "a failure was charged")
        self._expect(
            all(e["node_id"] != node for e in trial.events("worker_registered") if e["attempt"] > paused["attempt"]), "stayed there"
        )
        self.nodes.remove(node)
        return trial, at

    def notice_of_preemption(self, number: int) -> tuple[Trial, float]:
        """A file that a spot instance's hook creates: the run commits and continues."""
        notice = self.storage / f"notice-{number}"
        trial = self.start("--cluster.preemption-notice", str(notice))
        trial.wait_for_step(10)
        at = time.time()
        notice.touch()
        paused = trial.wait_for("attempt_paused", 60)
        notice.unlink()
        self._expect(paused["kind"] == "preempted", f"told {paused}")
        self.same(trial)
        self._expect(not trial.events("attempt_failed"), "a failure was charged")
        return trial, at

    # Workers

    def any_number_of_workers(self, flags: tuple[str, ...], counts: tuple[int, ...]) -> Row:
        """The same configuration with each number of workers, and with a changing one (a node lost, a node added), gives one hash."""
        began = time.perf_counter()
        hashes = {}
        for count in counts:
            trial = self.start("--workers", str(count), "--cluster.cpus-per-worker", "0", *flags)
            hashes[str(count)] = trial.summary()["weights_sha256"] if trial.finish(900) == 0 else trial.tail()
            self.say(f"{count} workers: {hashes[str(count)][:16]}")
        trial = self.start("--workers", "1:2", "--cluster.grow-after-seconds", "1", *flags)
        trial.wait_for_step(5)
        self.nodes.remove(trial.node_of(1))
        trial.until(lambda: trial.events("first_step", workers=1), "a step with one worker", 180)
        self.nodes.nodes.append(self.nodes.add())
        hashes["elastic"] = trial.summary()["weights_sha256"] if trial.finish(900) == 0 else trial.tail()
        worlds = [event["workers"] for event in trial.events("attempt_started")]
        self.say(f"elastic, {worlds} workers: {hashes['elastic'][:16]}")
        if worlds != [2, 1, 2]:
            hashes["elastic"] = f"workers {worlds} instead of [2, 1, 2]"
        return {
            "fault": f"workers {', '.join(map(str, counts))}, and 2 -> 1 -> 2: {' '.join(flags)}",
            "promise": "one weights_sha256",
            "trials": len(hashes),
            "violations": len(set(hashes.values())) - 1,
            "detail": "" if len(set(hashes.values())) == 1 else str(hashes),
            "detection_seconds": None,
            "recovery_seconds": None,
            "seconds": round(time.perf_counter() - began, 1),
        }


ROWS: dict[str, tuple[Callable[[Campaign, int], tuple[Trial, float]], int, str]] = {
    "SIGKILL of a rank": (Campaign.rank_killed, 50, "same weights, same ledger, one restart"),
    "SIGKILL of Ray's worker (the agent)": (Campaign.agent_killed, 3, "same weights, same ledger, one restart"),
    "SIGKILL of a zygote": (Campaign.zygote_killed, 2, "same weights, same ledger, one restart"),
    "SIGKILL of the coordinator": (Campaign.coordinator_killed, 2, "same weights, same ledger, no restart"),
    "SIGKILL of the driver, resubmitted": (Campaign.driver_killed, 3, "same weights, same ledger"),
    "SIGTERM, resubmitted": (Campaign.stopped_by_sigterm, 2, "committed in time; same weights, same ledger"),
    "SIGSTOP of a rank": (Campaign.rank_stopped, 3, "named, stacks of all ranks, same weights, same ledger"),
    "hang in Python, the others in a collective": (Campaign.rank_hangs_in_python, 3, "named, stacks, same weights, same ledger"),
    "straggler": (Campaign.rank_straggles, 2, "named, not killed; same weights, same ledger"),
    "all cores saturated for two minutes": (Campaign.both_cores_saturated, 1, "nothing is killed"),
    "NaN in a gradient": (Campaign.gradient_is_nan, 2, "same weights as without that batch; every sample trained on or skipped once"),
    "one flipped bit in one weight of one rank": (Campaign.weight_is_flipped, 2, "found, named, same weights, same ledger"),
    "node lost, then added (--workers 1:2)": (Campaign.node_lost_and_added, 2, "same weights, same ledger"),
    "node drained with a deadline": (Campaign.node_drained, 1, "committed in time, left; no failure charged; same weights, same ledger"),
    "notice of preemption": (Campaign.notice_of_preemption, 1, "no failure charged; same weights, same ledger"),
}
