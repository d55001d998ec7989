"""Real runs for the end-to-end tests: `python -m trainer.run` as a process of its own, watched through its journal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
# A small BatchNorm network and few images: what is tested is the system, not the model.
SMALL = [
    *("--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--model.stem", "native"),
    *("--data.batch-size", "20", "--train.precision", "fp32", "--train.ledger", "--cluster.threads-per-worker", "1"),
]
Event = Mapping[str, Any]


class Run:
    """One `trainer.run` process. `args` come after those of `SMALL`."""

    def __init__(
        self,
        *args: str,
        storage: Path,
        name: str,
        data: Path,
        environment: Mapping[str, str] | None = None,
        output: int | None = None,
        settings: Sequence[str] = SMALL,
    ) -> None:
        """`output`: a descriptor that the run prints to, in place of its log. `settings`: in place of those of `SMALL`."""
        self.folder = storage / name
        self.args = [
            *settings,
            "--data.path",
            str(data),
            "--data.root",
            str(storage / "data"),
            "--storage",
            str(storage),
            "--run",
            name,
            *args,
        ]
        self.log = storage / f"{name}.{time.monotonic_ns()}.log"
        storage.mkdir(parents=True, exist_ok=True)
        self.seen_before = len(self.events())
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.run", *self.args],
                cwd=PROJECT,
                stdout=log if output is None else output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def events(self) -> list[Event]:
        try:
            lines = (self.folder / "journal.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def new_events(self) -> list[Event]:
        """Of this process, where an earlier one ran under the same name."""
        return self.events()[self.seen_before :]

    def wait_for(self, event: str, *, timeout: float = 120, **fields: Any) -> Event:
        def find() -> Event | None:
            for candidate in self.new_events():
                if candidate["event"] == event and all(candidate.get(key) == value for key, value in fields.items()):
                    return candidate
            return None

        return self._until(find, f"{event} {fields}", timeout)

    def _until(self, find: Callable[[], Event | None], what: str, timeout: float) -> Event:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if (found := find()) is not None:
                return found
            if self.process.poll() is not None and find() is None:
                raise AssertionError(f"the run ended with {self.process.returncode} before {what}:\n{self.output()}")
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"no {what} in {timeout} s:\n{self.output()}")

    def kill_worker(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to the process of `rank` in the newest attempt."""
        os.kill(self.pid_of(rank), number)

    def pid_of(self, rank: int) -> int:
        return int(self._registered(rank)["pid"])

    def node_of(self, rank: int) -> str:
        """The id of the Ray node that `rank` is on in the newest attempt."""
        return str(self._registered(rank)["node_id"])

    def _registered(self, rank: int) -> Event:
        return [e for e in self.new_events() if e["event"] == "worker_registered" and e["rank"] == rank][-1]

    def signal(self, number: signal.Signals) -> None:
        """To the driver alone, as `kill PID` does."""
        self.process.send_signal(number)

    def finish(self, timeout: float = 180) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run did not end in {timeout} s:\n{self.output()}") from None

    def kill(self) -> None:
        """SIGKILL to the driver and all it started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def output(self) -> str:
        return self.log.read_text()

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def checkpoints(self) -> list[Path]:
        """Committed ones, oldest first."""
        return sorted(p for p in (self.folder / "checkpoints").iterdir() if (p / "COMMIT").exists() and ".corrupt" not in p.name)


def processes_of_session(leader: int) -> list[int]:
    """Living processes of the session that process `leader` began."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def kill_session(leader: int) -> None:
    """SIGKILL to all processes of that session. They may end each other meanwhile."""
    for pid in processes_of_session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def once_agents_answer(
    command: Callable[[], "subprocess.CompletedProcess[str]"], timeout: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a `ray job` command. A head answers 500 to it in its first seconds, until the agent of a node has started."""
    end = time.monotonic() + timeout
    while True:
        done = command()
        if done.returncode == 0 or "No available agent" not in done.stdout + done.stderr or time.monotonic() > end:
            return done
        time.sleep(0.5)
