"""SIGINT and SIGTERM at random moments of a command's whole life: imports, conversion, start, training, evaluation, summary, report.

    python -m benchmarks.faults "a signal at a random moment"

Promised for each trial: the command ends with 128 + the signal, or with 0 if it had finished; its last lines say the truth about what is
saved; no process, temporary folder or shared memory of it is left (and so no port); the same command then goes on to the bits of the
undisturbed run. Real Ray, real processes, real signals. Called by benchmarks.faults.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.names import FILE_SD
from dataio.parquet import open_dataset

Row = dict[str, Any]
NAME = "a signal at a random moment of a whole run"
PROJECT = Path(__file__).resolve().parents[2]
SAMPLE = PROJECT / "dataio" / "samples" / "fashion_mnist"
TRIALS = 50
END_SECONDS = 60.0
"""A command ends within this time after a signal: a checkpoint's grace is 30 s."""
GONE_SECONDS = 5.0
SETTINGS = (
    *("--data.batch-size", "20", "--workers", "2", "--train.virtual-ranks", "2", "--train.epochs", "2", "--train.checkpoint-every", "4"),
    *("--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--model.stem", "native", "--train.precision", "fp32"),
    *("--cluster.threads-per-worker", "1", "--cluster.cpus-per-worker", "1"),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write_pictures(folder: Path, *, train: int = 160, test: int = 40) -> Path:
    """A folder of images, so that a run with a new data root begins with a conversion."""
    dataset = open_dataset(SAMPLE)
    for split, count in (("train", train), ("test", test)):
        source = dataset.split(split)
        labels = source.labels()
        for number, image in enumerate(source.read_group(0).encoded[:count]):
            into = folder / split / dataset.manifest.classes[labels[number]].replace("/", "-")
            into.mkdir(parents=True, exist_ok=True)
            (into / f"{number:05d}.png").write_bytes(bytes(image))
    return folder


class Command:
    """One `trainer.run`, in a session of its own."""

    def __init__(self, scratch: Path, pictures: Path, name: str, *, root: Path) -> None:
        self.folder = scratch / "runs" / name
        self.log = scratch / f"{name}.{time.monotonic_ns()}.log"
        settings = [*SETTINGS, "--data.path", str(pictures), "--data.root", str(root), "--storage", str(scratch / "runs"), "--run", name]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.run", *settings],
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, timeout_seconds: float) -> int:
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"did not end in {timeout_seconds:g} s: {self.tail()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return " | ".join(line.strip()[:200] for line in self.output().splitlines()[-4:])

    def summary(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
            return found
        return {}

    def saved_step(self) -> int:
        """Step of the newest commit; 0 if there is none."""
        steps = [int(re.findall(r"step-(\d+)", str(path))[0]) for path in self.folder.glob("checkpoints/*/COMMIT")]
        return max(steps, default=0)

    def leftovers(self) -> list[str]:
        """What it left behind, after a moment for what is on its way out."""
        end = time.monotonic() + GONE_SECONDS
        while (found := self._leftovers()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _leftovers(self) -> list[str]:
        found = [f"process {pid} ({command})" for pid, command in processes_of(self.process.pid)]
        with contextlib.suppress(FileNotFoundError):
            listed = json.loads((self.folder / FILE_SD).read_text())
            found += [f"{', '.join(target['targets'])} in {FILE_SD}" for target in listed]
        found += [f"folder {path}" for path in Path(tempfile.gettempdir()).glob(f"finetune-*{self.process.pid}*")]
        return found

    def end(self) -> None:
        for pid, _ in processes_of(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(session: int) -> list[tuple[int, str]]:
    """(pid, command) of the living processes of the session that process `session` began."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _, _, its_session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its_session) == session and state != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(folder.name), command[:80]))
    return found


def shared_memory() -> set[str]:
    return {entry.name for entry in os.scandir("/dev/shm") if entry.stat(follow_symlinks=False).st_uid == os.getuid()}


def left_memory(before: set[str]) -> set[str]:
    """Names that are new in /dev/shm, that nobody holds, and that stay: other programs on this machine make semaphores for a moment."""
    end = time.monotonic() + GONE_SECONDS
    left = shared_memory() - before - held_memory()
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left &= shared_memory() - held_memory()
    return left


def held_memory() -> set[str]:
    """Names in /dev/shm that a living process has mapped or open: other runs on this machine have theirs."""
    held = set[str]()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                held |= set(re.findall(r"/dev/shm/(\S+)", (folder / "maps").read_text(errors="replace")))
            with contextlib.suppress(OSError):
                links = [os.readlink(link) for link in (folder / "fd").iterdir()]
                held |= {link.removeprefix("/dev/shm/") for link in links if link.startswith("/dev/shm/")}
    return held


def what_is_untrue(command: Command, status: int, number: signal.Signals) -> str:
    """What is wrong with how the command ended; "" if nothing is."""
    output, saved, summary = command.output(), command.saved_step(), command.summary()
    if "Traceback (most recent call last)" in output:
        return f"traceback: {command.tail()}"
    if status == 0:
        return "" if summary.get("status") == "finished" and "finished" in output else f"exit status 0, and not finished: {command.tail()}"
    if status not in (128 + number, -number):  # the second while Python still starts: the shell reports it as the first
        return f"exit status {status}, not {128 + number}: {command.tail()}"
    if said := re.search(r"step ([\d,]+) of [\d,]+ is saved", output):
        step = int(said[1].replace(",", ""))
        return "" if step == saved else f"it says that step {step} is saved, and step {saved} is"
    if "nothing was saved yet" in output and saved:
        return f"it says that nothing is saved, and step {saved} is"
    if "before training began" in output and saved:
        return f"it says that training did not begin, and step {saved} is saved"
    if summary.get("status") == "finished" and re.search(r"the same command (starts again|goes on)", output):
        return "it says that the run is to go on, and it has finished"
    return ""


class Stops:
    """The undisturbed run, and trials that are compared with it."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._pictures = write_pictures(scratch / "pictures")
        self._root = scratch / "data"
        began = time.monotonic()
        control = Command(scratch, self._pictures, "undisturbed", root=self._root)
        status = control.finish(240)
        self.seconds = time.monotonic() - began
        if status != 0:
            raise AssertionError(f"the undisturbed run ended with {status}: {control.tail()}")
        self.sha256 = control.summary()["weights_sha256"]
        control.end()

    def trial(self, number: int) -> str:
        """One signal and one run after it. Returns at what share of a run's time it came and how the command ended; AssertionError if a
        promise does not hold. Every fourth trial converts its data anew."""
        draw = random.Random(number)
        which = SIGNALS[number % 2]
        share = draw.random()
        root = self._root if number % 4 else self._scratch / f"data-{number}"
        memory = shared_memory()
        first = Command(self._scratch, self._pictures, f"trial-{number:03d}", root=root)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.process.wait(share * self.seconds)
            first.process.send_signal(which)
            status = first.finish(END_SECONDS)
            wrong = what_is_untrue(first, status, which)
            if left := first.leftovers():
                wrong = wrong or f"left behind: {', '.join(left)}"
            if names := left_memory(memory):
                wrong = wrong or f"left in /dev/shm: {', '.join(sorted(names))}"
        finally:
            first.end()
        told = f"{which.name} after {share * self.seconds:.1f} s"
        if wrong:
            raise AssertionError(f"{told}: {wrong}")
        second = Command(self._scratch, self._pictures, f"trial-{number:03d}", root=root)
        try:
            again = second.finish(240)
            if again != 0 or second.summary().get("weights_sha256") != self.sha256:
                raise AssertionError(f"{told}, then the same command: exit status {again}, {second.tail()}")
            if not (second.folder / "report.html").exists():
                raise AssertionError(f"{told}, then the same command: no report")
        finally:
            second.end()
            if root != self._root:
                shutil.rmtree(root, ignore_errors=True)
        return f"{told}: exit status {status}"


def rows(scratch: Path, trials: int, chosen: Callable[[str], bool], say: Callable[[str], None]) -> Iterator[Row]:
    if not chosen(NAME):
        return
    began, problems = time.perf_counter(), []
    stops = Stops(scratch)
    count = trials or TRIALS
    for number in range(count):
        try:
            say(f"{NAME}: {number + 1} of {count}: {stops.trial(number)}")
        except AssertionError as error:
            problems.append(str(error))
            say(f"{NAME}: {number + 1} of {count}: VIOLATION {error}")
    yield {
        "fault": NAME,
        "promise": "a true exit status and last line, nothing left, then the same weights",
        "trials": count,
        "violations": len(problems),
        "detail": problems[0] if problems else "",
        "problems": problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
