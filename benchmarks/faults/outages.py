"""Whole runs on S3 whose service is away for a while at the moments that matter: real Ray, real ranks, moto behind a proxy.

    python -m benchmarks.faults "whole run on S3"

Promised: whatever the moment, the command waits, ends with exit status 0, and gives the bits of the undisturbed run. Called by
benchmarks.faults; tests/e2e/test_s3_outage.py uses `Outages` with short outages.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.faults.s3 import BUCKET, Proxy, Server, Weather
from cluster.journal import read_journal
from cluster.storage import Storage, open_storage

Row = dict[str, Any]
Moment = Literal["set-up", "steady state", "a rank's death", "the last commit", "the export"]
MOMENTS: tuple[Moment, ...] = ("set-up", "steady state", "a rank's death", "the last commit", "the export")

PROJECT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4
SETTINGS = (
    *("--data.path", str(PROJECT / "dataio" / "samples" / "fashion_mnist"), "--data.batch-size", "20", "--workers", "2"),
    *("--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--model.stem", "native", "--train.precision", "fp32"),
    *("--train.epochs", "1", "--train.max-steps", str(STEPS), "--train.checkpoint-every", str(EVERY), "--train.virtual-ranks", "2"),
    *("--cluster.threads-per-worker", "1", "--cluster.cpus-per-worker", "1"),
)


class S3Run:
    """One command on S3, behind the proxy. Its journal is read past the proxy."""

    def __init__(self, proxy: Proxy, storage: Storage, prefix: str, name: str, scratch: Path, *, scale: float) -> None:
        self._storage, self.name = storage, name
        self.log = scratch / f"{name}.{time.monotonic_ns()}.log"
        plan = scratch / f"{name}.plan.json"
        plan.write_text(json.dumps({"root": f"{BUCKET}/{prefix}", "scale": scale}))
        command = [sys.executable, "-m", "benchmarks.faults.faulty_driver", "--plan", str(plan), "--"]
        command += [*SETTINGS, "--storage", f"s3://{BUCKET}/{prefix}", "--run", name]
        command += ["--cluster.storage-retry-seconds", f"{20 / scale:g}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **proxy.environment},
                start_new_session=True,
            )

    def events(self, name: str = "", **fields: Any) -> list[dict[str, Any]]:
        return [
            event
            for event in read_journal(self._storage, self.name)
            if (not name or event["event"] == name) and all(event.get(key) == value for key, value in fields.items())
        ]

    def wait_for(self, name: str, timeout_seconds: float = 120.0, **fields: Any) -> dict[str, Any]:
        end = time.monotonic() + timeout_seconds
        while not (found := self.events(name, **fields)):
            if self.process.poll() is not None and not self.events(name, **fields):
                raise AssertionError(f"the run ended with {self.process.returncode} before {name} {fields}: {self.output()[-2000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"no {name} {fields} in {timeout_seconds:g} s: {self.output()[-2000:]}")
            time.sleep(0.1)
        return found[-1]

    def kill_rank(self, rank: int) -> None:
        os.kill(int(self.wait_for("worker_registered", rank=rank)["pid"]), signal.SIGKILL)

    def finish(self, timeout_seconds: float) -> int:
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end in {timeout_seconds:g} s: {self.output()[-2000:]}") from None
        finally:
            self.end()

    def end(self) -> None:
        """SIGKILL to what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def sha256(self) -> str:
        summary: dict[str, Any] = json.loads(self._storage.read(f"{self.name}/summary.json"))
        return str(summary["weights_sha256"])


class Outages:
    """A service, a proxy before it, and the undisturbed run that all others are compared with."""

    def __init__(self, server: Server, proxy: Proxy, scratch: Path) -> None:
        os.environ |= server.environment
        self._proxy, self._scratch, self._count = proxy, scratch, 0
        self._storage = open_storage(f"s3://{BUCKET}/outages")
        control = self.start("undisturbed")
        status = control.finish(180)
        if status != 0:
            raise AssertionError(f"the undisturbed run ended with {status}: {control.output()[-2000:]}")
        self.sha256 = control.sha256()

    def start(self, name: str, *, scale: float = 1.0) -> S3Run:
        return S3Run(self._proxy, self._storage, "outages", name, self._scratch, scale=scale)

    def trial(self, moments: tuple[Moment, ...], seconds: float, weather: Weather, *, scale: float = 1.0) -> None:
        """One run with an outage of `seconds` at each of `moments`. AssertionError says what does not hold."""
        self._count += 1
        name = f"trial-{self._count:03d}"
        if "set-up" in moments:
            self._proxy.turn_for(weather, seconds + 3)  # the imports take about three seconds
        run = self.start(name, scale=scale)
        try:
            if "steady state" in moments:
                run.wait_for("checkpoint_committed", step=EVERY, timeout_seconds=120 + seconds)
                self._outage(weather, seconds)
            if "a rank's death" in moments:
                run.wait_for("first_step", timeout_seconds=120 + seconds)
                run.kill_rank(1)
                self._outage(weather, seconds)
            turned = []
            if "the last commit" in moments:
                turned.append(self._proxy.turn_at(f"PUT /{BUCKET}/outages/{name}/checkpoints/step-{STEPS:08d}", weather, seconds))
            if "the export" in moments:
                if turned:
                    turned[-1].wait(120 + seconds)
                turned.append(self._proxy.turn_at(f"PUT /{BUCKET}/outages/{name}/curves.parquet", weather, seconds))
            status = run.finish(180 + 3 * seconds * len(moments))
            if status != 0:
                raise AssertionError(f"exit status {status}: {run.output()[-2000:]}")
            if not all(event.is_set() for event in turned):
                raise AssertionError("the run never made the request at which the service was to go away")
            if run.sha256() != self.sha256:
                raise AssertionError(f"weights {run.sha256()[:12]}, not {self.sha256[:12]}")
        finally:
            run.end()
            self._proxy.turn("open")

    def _outage(self, weather: Weather, seconds: float) -> None:
        self._proxy.turn(weather)
        time.sleep(seconds)
        self._proxy.turn("open")


@contextlib.contextmanager
def opened(scratch: Path) -> Iterator[Outages]:
    with Server() as server:
        proxy = Proxy(server.port)
        try:
            yield Outages(server, proxy, scratch)
        finally:
            proxy.close()


# 600 s pass ten times faster: with them the waits of driver and coordinator, and the time for which an operation is tried again.
LENGTHS = ((30.0, 1.0), (90.0, 1.0), (600.0, 10.0))
WEATHERS: tuple[Weather, ...] = ("refuse", "hang", "drop")


def rows(scratch: Path, chosen: Callable[[str], bool], say: Callable[[str], None]) -> Iterator[Row]:
    """A row for each moment, with the three lengths in three kinds of weather."""
    wanted = [moment for moment in MOMENTS if chosen(name_of(moment))]
    if not wanted:
        return
    with opened(scratch) as outages:
        for moment in wanted:
            began, problems = time.perf_counter(), []
            for (seconds, scale), weather in zip(LENGTHS, WEATHERS, strict=True):
                try:
                    outages.trial((moment,), seconds / scale, weather, scale=scale)
                except AssertionError as error:
                    problems.append(f"{seconds:g} s, {weather}: {error}")
                say(f"{name_of(moment)}: {seconds:g} s, {weather}: {problems[-1] if problems else 'same bits'}")
            yield {
                "fault": name_of(moment),
                "promise": "exit status 0, same weights",
                "trials": len(LENGTHS),
                "violations": len(problems),
                "detail": problems[0] if problems else "",
                "seconds": round(time.perf_counter() - began, 1),
            }


def name_of(moment: Moment) -> str:
    return f"whole run on S3, the service away for 30, 90 and 600 s at {moment}"


NAMES = tuple(name_of(moment) for moment in MOMENTS)
