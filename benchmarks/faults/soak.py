"""A long run of short steps on S3: does anything grow that should not? Loop latency, memory, requests, size of checkpoints.

    python -m benchmarks.faults soak

The run is one process (local_ray.py): driver, coordinator, agents and two ranks together, so its memory is that of all of them. Every few
steps rank 0 writes an event, as evaluations, bad samples and outages do, and each evaluation has the confusion matrix of `CLASSES` classes.
Promised: the driver's loop never waits long, its requests per loop (it reads each event of the journal once) and the memory do not grow
from the first quarter to the last, and no checkpoint is larger than its curves (4,000 rows at most), one confusion matrix and a line for
each evaluation. Called by benchmarks.faults.
"""

import contextlib
import json
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.faults import control, local_ray, s3, small_rank
from benchmarks.faults.calls import Storages, Strike, inherit_lives
from benchmarks.faults.local_ray import MessageStrike
from trainer.drive import account, screen

Row = dict[str, Any]
NAME = "soak: 10,000 short steps with events on S3"
STEPS = 10_000
EVENT_EVERY, EVALUATION_EVERY, SAVE_EVERY = 5, 250, 250
CLASSES = 100
SAMPLE_SECONDS = 1.0
ACCOUNT_SECONDS = 2.0
"""How often the driver reads what is new in the journal: often enough that each quarter has many of these reads, at any machine's pace."""
MOST_LOOP_SECONDS = 5.0
"""The longest that the driver may look at nothing, in a quiet network."""
MOST_GROWTH = 1.25
"""Last quarter over first quarter of the run."""
MOST_CHECKPOINT_BYTES = 4_000 * 50 + 4 * CLASSES**2 + 100 * (STEPS // EVALUATION_EVERY) + 20_000
"""Curves, the newest confusion matrix, a line for each evaluation, and the rest: whatever the number of steps, events and bad samples."""
SOAK_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was measured in one second."""

    at: float
    rss_bytes: int
    loops: int
    requests: int
    """Requests of the driver to the storage, since the run began."""


class Meter:
    """Watches the run's process from a thread of its own, and each round of the driver's loop."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self.gaps: list[float] = []
        self.samples: list[Sample] = []
        self._last: float | None = None

    def install(self) -> None:
        real = screen.Screen.show

        def show(*args: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            if self._last is not None:
                self.gaps.append(now - self._last)
            self._last = now
            real(*args, **kwargs)

        setattr(screen.Screen, "show", show)  # noqa: B010
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        began = time.monotonic()
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sample = Sample(at=time.monotonic() - began, rss_bytes=pages * page, loops=len(self.gaps), requests=self._storages.count)
            self.samples.append(sample)
            time.sleep(SAMPLE_SECONDS)


def figures(gaps: list[float], samples: list[Sample], sizes: list[int]) -> dict[str, float]:
    """The numbers that the promise is about. `sizes` are those of the checkpoints, in bytes, in order."""

    def rates(part: list[Sample]) -> float:
        loops = part[-1].loops - part[0].loops
        return (part[-1].requests - part[0].requests) / max(1, loops)

    samples = [sample for sample in samples if 0 < sample.loops < len(gaps)]  # without the start, and without the summary and the report
    quarter = max(2, len(samples) // 4)
    first, last = samples[:quarter], samples[-quarter:]
    ordered = sorted(gaps)
    return {
        "loops": len(gaps),
        "loop_seconds_median": statistics.median(gaps),
        "loop_seconds_p99": ordered[int(0.99 * (len(ordered) - 1))],
        "loop_seconds_most": ordered[-1],
        "requests_per_loop_first_quarter": rates(first),
        "requests_per_loop_last_quarter": rates(last),
        "rss_mb_first_quarter": statistics.median(sample.rss_bytes for sample in first) / 1e6,
        "rss_mb_last_quarter": statistics.median(sample.rss_bytes for sample in last) / 1e6,
        "checkpoint_bytes_first": sizes[0],
        "checkpoint_bytes_middle": sizes[len(sizes) // 2],
        "checkpoint_bytes_last": sizes[-1],
    }


def problems_of(found: dict[str, float]) -> list[str]:
    """Which promises do not hold."""
    problems = []
    if found["loop_seconds_most"] > MOST_LOOP_SECONDS:
        problems.append(f"the driver's loop stood still for {found['loop_seconds_most']:.1f} s")
    if found["rss_mb_last_quarter"] > MOST_GROWTH * found["rss_mb_first_quarter"]:
        problems.append(f"memory grew from {found['rss_mb_first_quarter']:.0f} to {found['rss_mb_last_quarter']:.0f} MB")
    if found["requests_per_loop_last_quarter"] > max(1.0, 2 * found["requests_per_loop_first_quarter"]):
        before, after = found["requests_per_loop_first_quarter"], found["requests_per_loop_last_quarter"]
        problems.append(f"requests per loop grew from {before:.2f} to {after:.2f}")
    if found["checkpoint_bytes_last"] > MOST_CHECKPOINT_BYTES:
        problems.append(f"checkpoints grew to {found['checkpoint_bytes_last']:,.0f} bytes, more than {MOST_CHECKPOINT_BYTES:,}")
    return problems


def _evaluation(step: int) -> dict[str, Any]:
    confusion = [[(step * row + column) % 97 for column in range(CLASSES)] for row in range(CLASSES)]
    return {"step": step, "epoch": step / 50, "test_loss": 1.0, "test_accuracy": 0.5, "confusion": confusion}


def soak_in_child(out: Path, *, steps: int) -> None:
    """The body of a forked process."""
    inherit_lives()
    storages = Storages(f"{s3.BUCKET}/soak", Strike(kind="driver"), keeps=False)
    meter = Meter(storages)
    local_ray.install(MessageStrike(), on_actor=lambda actor: None)
    script = small_rank.SCRIPT
    script.step_seconds = 0.0
    script.event_every, script.evaluation_every, script.evaluation = EVENT_EVERY, EVALUATION_EVERY, _evaluation
    invocation = control.parsed("2")
    train = replace(invocation.config.train, epochs=steps // 50 + 1, max_steps=steps, checkpoint_every=SAVE_EVERY)
    config = replace(invocation.config, train=train, storage=f"s3://{s3.BUCKET}/soak")
    control.save_time(replace(invocation, config=config))
    account.REMOTE_ACCOUNT_SECONDS = ACCOUNT_SECONDS
    storages.install()
    meter.install()
    began = time.monotonic()
    status = control.status_of([])
    seconds = time.monotonic() - began
    from cluster.journal import read_journal
    from cluster.storage import open_storage

    events = read_journal(open_storage(f"s3://{s3.BUCKET}/soak"), "run")
    sizes = [event["size_bytes"] for event in events if event["event"] == "checkpoint_committed"]
    found = {"status": status, "seconds": seconds, "events": len(events), **figures(meter.gaps, meter.samples, sizes)}
    out.write_text(json.dumps(found))


def soak(scratch: Path, *, steps: int = STEPS, timeout_seconds: float = SOAK_SECONDS) -> dict[str, Any]:
    """The figures of one soak; AssertionError if it did not end well."""
    out, log = scratch / "soak.json", scratch / "soak.log"
    pid = os.fork()
    if pid == 0:
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(one, "w", buffering=1, closefd=False) for one in (1, 2))  # noqa: SIM115
            soak_in_child(out, steps=steps)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(0)
    end = time.monotonic() + timeout_seconds
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"{steps} steps did not end in {timeout_seconds:g} s: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)
    if not out.exists():
        raise AssertionError(log.read_text(errors="replace")[-3000:])
    found: dict[str, Any] = json.loads(out.read_text())
    if found["status"] != 0:
        raise AssertionError(f"exit status {found['status']}: {log.read_text(errors='replace')[-2000:]}")
    return found


def rows(scratch: Path, chosen: Callable[[str], bool], say: Callable[[str], None], *, steps: int = STEPS) -> Iterator[Row]:
    if not chosen(NAME):
        return
    began = time.perf_counter()
    control.import_all()
    with s3.Server() as server:
        os.environ |= server.environment
        try:
            found = soak(scratch, steps=steps)
            problems = problems_of(found)
        except AssertionError as error:
            found, problems = {}, [str(error)]
    say(f"{NAME}: {found or problems[0]}")
    shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
    yield {
        "fault": NAME if steps == STEPS else f"soak: {steps} steps",
        "promise": "loop latency, requests, memory and checkpoints bounded",
        "trials": 1,
        "violations": len(problems),
        "detail": f"{shown}; first violation: {problems[0]}" if problems else shown,
        "figures": found,
        "seconds": round(time.perf_counter() - began, 1),
    }
