"""Joining and starting Ray, without Ray: which signals its processes hear, and whose death ends a run."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from cluster import ray_cluster

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_processes_started_meanwhile_do_not_hear_what_ends_a_group_and_later_ones_do(number: signal.Signals) -> None:
    wait = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with ray_cluster._signals_are_ours():
        hidden = subprocess.Popen(wait, stdout=subprocess.PIPE)
    open_to_it = subprocess.Popen(wait, stdout=subprocess.PIPE)
    for process in (hidden, open_to_it):
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
    assert open_to_it.wait(10) == -number
    assert hidden.poll() is None
    hidden.kill()
    assert hidden.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("with_thread", [False, True], ids=["main-thread-only", "another-thread-hears-it"])
def test_the_programs_own_sigterm_handler_has_the_last_word_though_ray_sets_another(with_thread: bool) -> None:
    script = f"""
        import os, signal, sys, threading, time
        from cluster.ray_cluster import _signals_are_ours
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if {with_thread}:  # begun before, so that SIGTERM is not blocked in it
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        with _signals_are_ours():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(5):
                time.sleep(0.1)
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=PROJECT, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.fixture
def vital(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """What stands for the raylet and the GCS of a local Ray."""
    processes = {name: subprocess.Popen(["sleep", "60"]) for name in ("raylet", "gcs_server")}
    known = {name: [SimpleNamespace(process=process)] for name, process in processes.items()}
    monkeypatch.setattr(ray_cluster.worker_module, "_global_node", SimpleNamespace(all_processes=known))
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_death_of_a_vital_process_is_told_at_once(vital: dict[str, "subprocess.Popen[bytes]"], name: str) -> None:
    lost: SimpleQueue[str] = SimpleQueue()
    with ray_cluster._watched(lost.put):
        assert lost.empty()
        vital[name].kill()
        assert lost.get(timeout=20) == name
    assert lost.empty()


def test_an_orderly_end_is_no_death(vital: dict[str, "subprocess.Popen[bytes]"]) -> None:
    lost: SimpleQueue[str] = SimpleQueue()
    before = set(os.listdir("/proc/self/fd"))
    with ray_cluster._watched(lost.put):
        pass
    for process in vital.values():
        process.kill()
        process.wait()
    assert lost.empty()
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    assert "ray-watch" not in [thread.name for thread in threading.enumerate()]


def test_a_local_ray_has_a_token_of_its_own_and_writes_none_into_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(os.environ.get("RAY_AUTH_TOKEN", "")))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for more in ({}, {}, {"RAY_AUTH_TOKEN_PATH": "/mine"}):
        monkeypatch.setattr(os, "environ", {**bare, **more})
        ray_cluster._start("/folder", project=PROJECT, cpus=1, verbose=False)
    assert [len(token) for token in seen] == [64, 64, 0]
    assert seen[0] != seen[1]


def test_a_checkout_is_sent_whole_and_of_installed_packages_only_ours(tmp_path: Path) -> None:
    assert ray_cluster.sent(PROJECT, ("a",))["working_dir"] == str(PROJECT)
    assert ray_cluster.sent(tmp_path, ("a", "b")) == {"py_modules": [str(tmp_path / "a"), str(tmp_path / "b")]}


def test_workers_of_a_local_ray_import_from_a_checkout_and_find_installed_packages_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(os.environ.get("PYTHONPATH", "")))
    for project in (PROJECT, tmp_path):
        monkeypatch.setattr(os, "environ", {**os.environ, "PYTHONPATH": "/mine"})
        ray_cluster._start("/folder", project=project, cpus=1, verbose=False)
    assert seen == [f"{PROJECT}{os.pathsep}/mine", "/mine"]


@pytest.mark.parametrize("error", [Exception("The current node timed out during startup. This could\nhappen")], ids=repr)
def test_a_local_ray_that_does_not_start_is_said_in_a_sentence(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare Exception of Ray's would go past every clause of the command and show forty lines of its traceback."""

    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    said = rf"^the local Ray did not start \(({str(error).partition(chr(10))[0]})\); .*give the same command again"
    with pytest.raises(ray_cluster.RayNotStarted, match=said) as raised:
        ray_cluster._start(str(tmp_path), project=PROJECT, cpus=1, verbose=False)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError("a sentence"), ValueError("a sentence"), TypeError("a bug"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr
)
def test_any_other_exception_of_a_local_ray_stays_as_it_is(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(type(error)) as raised:
        ray_cluster._start(str(tmp_path), project=PROJECT, cpus=1, verbose=False)
    assert raised.value is error
