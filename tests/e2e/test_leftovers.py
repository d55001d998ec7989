"""A run leaves no process and no folder of Ray behind, however it ends."""

import contextlib
import json
import os
import pty
import select
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.names import FILE_SD
from cluster.process import process_stat
from tests.e2e.running import Run, processes_of_session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]
COMMON = ["--data.max-bad-fraction", "0.01", "--train.checkpoint-every", "5", "--train.epochs", "200"]


def folders_of(driver: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"finetune-ray-{driver}-*"))


def assert_nothing_left(run: Run) -> None:
    assert folders_of(run.process.pid) == []
    # The run was a session of its own: whoever is still in it was left behind.
    assert processes_of_session(run.process.pid) == []
    # Prometheus is not sent to processes that are gone.
    listed = run.folder / FILE_SD
    assert not listed.exists() or json.loads(listed.read_text()) == []


def commands_of(session: int) -> list[str]:
    """The command lines of a session's processes."""
    found = []
    for pid in processes_of_session(session):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return found


def test_a_local_run_starts_what_it_needs_and_leaves_no_process_and_no_temporary_folder(tmp_path: Path, images: Path) -> None:
    run = Run(*COMMON, "--workers", "2", "--train.max-steps", "12", storage=tmp_path, name="tidy", data=images)
    run.wait_for("training_started")
    assert folders_of(run.process.pid)
    commands = commands_of(run.process.pid)
    assert sum("cluster.zygote" in command for command in commands) == 3, commands  # one, and the two ranks forked from it
    actors = Counter(command for command in commands if command.startswith("ray::") and "IDLE" not in command)
    own = {"ray::CoordinatorActor", "ray::RayTrainWorker", "ray::TrainController", "ray::SynchronizationActor"}
    services = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert {actor.partition(".")[0] for actor in actors} <= own | services, actors
    assert run.finish() == 0, run.output()
    assert_nothing_left(run)


def test_sigterm_to_the_whole_process_group_saves_a_checkpoint_and_ends(tmp_path: Path, images: Path) -> None:
    """As `timeout` does it; systemd and container runtimes send SIGTERM to all processes as well."""
    run = Run(*COMMON, "--workers", "2", storage=tmp_path, name="group", data=images)
    run.wait_for("checkpoint_committed", step=5)
    asked = time.monotonic()
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish() == 128 + signal.SIGTERM, run.output()
    assert time.monotonic() - asked < 30
    stopped = run.wait_for("run_stopped")
    assert f"stopped: step {stopped['step']:,} of 2,400 is saved" in run.output()
    assert run.checkpoints()[-1].name.startswith(f"step-{stopped['step']:08d}")
    assert [event for event in run.new_events() if event["event"] != "account"][-1] == stopped  # no attempt failed, none was begun again
    assert_nothing_left(run)


def test_sigterm_to_the_whole_process_group_while_ray_starts_ends_at_once(tmp_path: Path, images: Path) -> None:
    run = Run(*COMMON, storage=tmp_path, name="early", data=images)
    end = time.monotonic() + 60
    while not folders_of(run.process.pid):
        assert time.monotonic() < end, run.output()
        time.sleep(0.02)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish(timeout=40) == 128 + signal.SIGTERM, run.output()
    assert not run.events()
    assert_nothing_left(run)


def test_a_driver_and_its_zygote_killed_together_leave_nothing(tmp_path: Path, images: Path) -> None:
    """Ray's agents lose their parents and have written over their names; nobody but the reaper could find them."""
    run = Run(*COMMON, storage=tmp_path, name="killed", data=images)
    run.wait_for("checkpoint_committed", step=5)
    shared = set(os.listdir("/dev/shm"))
    zygotes = [pid for pid in processes_of_session(run.process.pid) if b"cluster.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in (*zygotes, run.process.pid):
        with contextlib.suppress(ProcessLookupError):  # ranks die with their zygote
            os.kill(pid, signal.SIGKILL)
    assert run.finish() == -signal.SIGKILL
    end = time.monotonic() + 20
    while processes_of_session(run.process.pid):
        assert time.monotonic() < end, commands_of(run.process.pid)
        time.sleep(0.05)
    assert_nothing_left(run)
    assert set(os.listdir("/dev/shm")) <= shared
    assert f"the driver (process {run.process.pid}) was killed; what it had started is ended" in run.output()


def test_a_command_whose_raylet_dies_says_so_in_a_sentence_and_in_the_journal(tmp_path: Path, images: Path) -> None:
    run = Run(*COMMON, storage=tmp_path, name="lost", data=images)
    run.wait_for("checkpoint_committed", step=5)
    (raylet,) = [pid for pid in processes_of_session(run.process.pid) if process_name(pid) == "raylet"]
    os.kill(raylet, signal.SIGKILL)
    assert run.finish() == 1
    assert run.output().count("error: ") == 1, run.output()
    assert "error: the raylet of this run's Ray died" in run.output()
    assert "Traceback" not in run.output()
    end = run.events()[-1]
    assert (end["event"], end["kind"]) == ("run_failed", "infrastructure")
    end_of_cleaning = time.monotonic() + 20
    while processes_of_session(run.process.pid):
        assert time.monotonic() < end_of_cleaning, commands_of(run.process.pid)
        time.sleep(0.05)
    assert_nothing_left(run)


def process_name(pid: int) -> str:
    stat = process_stat(pid)
    return stat.name if stat is not None else ""


def read_along(terminal: int, is_closed: threading.Event) -> str:
    """What is shown until the terminal is closed."""
    shown = b""
    while not is_closed.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown.decode(errors="replace")


def test_a_run_whose_terminal_is_closed_saves_a_checkpoint_and_leaves_nothing(tmp_path: Path, images: Path) -> None:
    """The terminal takes no output any more, and SIGHUP goes to the whole group."""
    ours, theirs = pty.openpty()
    run = Run(*COMMON, storage=tmp_path, name="closed", data=images, output=theirs)
    os.close(theirs)
    with ThreadPoolExecutor(1) as reader:
        is_closed = threading.Event()
        reading = reader.submit(read_along, ours, is_closed)
        try:
            run.wait_for("checkpoint_committed", step=5)
        finally:
            is_closed.set()
        assert "closed: " in reading.result()  # the progress line, as long as somebody could see it
    os.close(ours)
    os.killpg(run.process.pid, signal.SIGHUP)
    assert run.finish() == 128 + signal.SIGHUP
    stopped = run.wait_for("run_stopped", signal="SIGHUP")
    assert run.checkpoints()[-1].name.startswith(f"step-{stopped['step']:08d}")
    assert run.summary()["status"] == "stopped"
    assert (run.folder / "report.html").exists()
    assert_nothing_left(run)
