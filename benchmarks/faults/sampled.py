"""The control plane's faults in whole runs on real Ray: one call of each kind, as a check of the trials in one process (control.py).

    python -m benchmarks.faults "with Ray"

An undisturbed run records the driver's storage calls. Then each kind of call, by the file that it is about, fails once in a run of its own,
and for 90 s in another; the coordinator dies at one message of each method, with real processes and Ray's own restart. Promised: exit
status 0 and the bits of the undisturbed run. Called by benchmarks.faults.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.outages import SETTINGS

Row = dict[str, Any]
PROJECT = Path(__file__).resolve().parents[2]
SCALE = 15.0
OUTAGE_SECONDS = 90.0
END_SECONDS = 240.0
ONCE = "with Ray: one storage call of each kind fails once (local)"
LASTING = "with Ray: 90 s without an answer from one of each kind on (local)"
KILLED = "with Ray: the coordinator dies at one message of each method"
TWICE = "with Ray: each message of the coordinator delivered twice"
NAMES = (ONCE, LASTING, KILLED, TWICE)
METHODS = (
    *("start_attempt", "discovery_address", "order", "register", "news", "event", "ack", "account", "wait_committed", "put_result"),
    *("rank_ended", "ends", "result", "end_fleet", "status"),
)


def kind_of(path: str) -> str:
    """The part of a run's folder that a path is about, e.g. `journal.jsonl` or `checkpoints/step-/COMMIT`."""
    inner = path.partition("/")[2] or "the folder"
    inner = re.sub(r"\.?preflight-.*", "preflight", inner)
    inner = re.sub(r"^\.(.+?)\.\d+-[0-9a-f]+\.tmp$", r"\1", inner)
    return re.sub(r"\d+", "", inner)


def one_of_each(calls: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """(number, kind) of the middle call of each kind, in order. Numbers count from 1."""
    by_kind: dict[str, list[int]] = {}
    for number, (_, path) in enumerate(calls, start=1):
        by_kind.setdefault(kind_of(path), []).append(number)
    return sorted((numbers[len(numbers) // 2], kind) for kind, numbers in by_kind.items())


class Sampled:
    """Whole runs with a plan each, compared with an undisturbed one."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._count = scratch, 0
        record = scratch / "calls.json"
        self.sha256 = self.run({"record": str(record)})
        self.calls = [(call, path) for call, path in json.loads(record.read_text())]

    def run(self, plan: dict[str, Any]) -> str:
        """The hash of the weights that a run with this plan ends with. AssertionError if it does not end with status 0."""
        self._count += 1
        name = f"run-{self._count:03d}"
        storage, log, file = self._scratch / name, self._scratch / f"{name}.log", self._scratch / f"{name}.json"
        file.write_text(json.dumps({"root": str(storage), "scale": SCALE, **plan}))
        command = [sys.executable, "-m", "benchmarks.faults.faulty_driver", "--plan", str(file), "--", *SETTINGS]
        command += ["--storage", str(storage), "--run", "run", "--cluster.storage-retry-seconds", f"{20 / SCALE:g}"]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told = " | ".join(line.strip()[:200] for line in log.read_text(errors="replace").splitlines()[-4:])
        if status is None:
            raise AssertionError(f"did not end in {END_SECONDS:g} s: {told}")
        if status != 0:
            raise AssertionError(f"exit status {status}: {told}")
        summary: dict[str, Any] = json.loads((storage / "run" / "summary.json").read_text())
        return str(summary["weights_sha256"])

    def plans(self, row: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(what happens, plan) of each trial of a row."""
        how = {ONCE: "once", LASTING: "lasting"}.get(row)
        if how is not None:
            for number, kind in one_of_each(self.calls):
                yield f"{kind}, call {number}", {"driver_storage": {"how": how, "first": number, "seconds": OUTAGE_SECONDS / SCALE}}
        elif row == TWICE:
            yield "all", {"message": {"how": "twice", "method": ""}}
        else:
            for index, method in enumerate(METHODS):
                killed = ("killed before", "killed inside", "killed after")[index % 3]
                yield f"{method} {killed}", {"message": {"how": killed, "method": method, "number": 1}}


def rows(scratch: Path, chosen: Callable[[str], bool], say: Callable[[str], None]) -> Iterator[Row]:
    wanted = [name for name in NAMES if chosen(name)]
    if not wanted:
        return
    sampled = Sampled(scratch)
    for name in wanted:
        began, problems, trials = time.perf_counter(), [], 0
        for what, plan in sampled.plans(name):
            trials += 1
            try:
                sha256 = sampled.run(plan)
                if sha256 != sampled.sha256:
                    raise AssertionError(f"weights {sha256[:12]}, not {sampled.sha256[:12]}")
            except AssertionError as error:
                problems.append(f"{what}: {error}")
            say(f"{name}: {what}: {problems[-1] if problems and problems[-1].startswith(what) else 'same bits'}")
        yield {
            "fault": name,
            "promise": "exit status 0, same weights",
            "trials": trials,
            "violations": len(problems),
            "detail": problems[0] if problems else "",
            "problems": problems,
            "seconds": round(time.perf_counter() - began, 1),
        }
