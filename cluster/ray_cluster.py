"""Joins a Ray cluster, or starts a Ray for one run and ends it again. Called by trainer/drive/start.py; launch.py has what is done in it.

A local Ray lives in the run's folder (belongings.py), which also ends what is left of it. It ends with the driver. If its raylet or its GCS
dies, nothing can go on, and Ray itself would take a minute to notice: a thread watches both.

`ray.shutdown` ends the process with status 1, without a word, if another thread is in one of Ray's calls or makes one later ("The core
worker has already been shutdown"), as Ray Train does for seconds while its workers start. So a process that ends anyway does not call it.
"""

import atexit
import contextlib
import ipaddress
import os
import secrets
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray._private.worker as worker_module
from ray._private.node import Node
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

from cluster.config import ClusterConfig
from cluster.launch import ClusterHardware, hardware_now
from cluster.leftovers import RunProcess, kill, processes_of

# Ray polls its workers every 2 s and waits 30 s for a broken process group; nothing is trained in that time. A poll costs controller and
# workers some milliseconds. The death of a rank, the most frequent failure, does not wait for a poll.
_RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Nobody reads what a local Ray reports about its tasks, memory and processes: our metrics come from the ranks and the coordinator. Without
# these reports its processes use a quarter less of a core.
_LOCAL_RAY_ENVIRONMENT = {
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "false",
}
_VITAL = ("raylet", "gcs_server")


class RayNotStarted(OSError):
    """The local Ray did not come up."""

    failure_kind = "infrastructure"


@contextlib.contextmanager
def ray_cluster(
    config: ClusterConfig,
    *,
    project: Path,
    address: str,
    in_job: bool,
    cpus: int,
    folder: str,
    on_lost: Callable[[str], None],
    packages: Sequence[str] = (),
    verbose: bool = False,
    process_ends: bool = False,
) -> Iterator[ClusterHardware]:
    """Join the cluster at `address`, or start a Ray for this run alone in `folder` and end it afterwards, unless `process_ends`: then it
    ends with this process, whose belongings it is, and a cluster notices that its driver has gone.

    `project` is what workers import from: a checkout, or the folder of installed packages. A cluster joined from outside a job gets a copy
    of the checkout, or of those `packages`. `on_lost(name)` is called in a thread if a vital process of the local Ray dies.
    """
    for name, value in _RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray starts workers with niceness 15: Linux then gives them 36 shares of a core for every 1,024 of any other busy process.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour that Ray announces, without its warning
    common: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    # We report a killed worker in one line; Ray would also print a paragraph, whatever log_to_driver says. This is the switch of its
    # debugger.
    worker_module._worker_logs_enabled = verbose
    try:
        if address:
            _join(address, in_job=in_job, code=sent(project, packages), **common)
            if not config.allow_unauthenticated:
                check_guarded(ray.get_runtime_context().gcs_address, get_authentication_mode() == AuthenticationMode.TOKEN)
            yield hardware_now(local=False)
        else:
            _start(folder, project=project, cpus=cpus, verbose=verbose, **common)
            with _watched(on_lost):
                yield hardware_now(local=True)
    finally:
        if process_ends:
            atexit.unregister(ray.shutdown)
        else:
            _end(folder, local=not address)


def _start(folder: str, *, project: Path, cpus: int, verbose: bool, **common: Any) -> None:
    for name, value in _LOCAL_RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one into the home folder, which may not be writable
    # Inherited, not in a runtime_env: the workers that Ray starts in advance would lack that, and would not be used.
    if is_checkout(project):  # what is installed is found without
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH", "")]))
    try:
        with _signals_are_ours(), _without_helpers(logs=verbose):
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder, **common)
    except Exception as error:
        if type(error) is not Exception:  # Ray raises exactly that where its raylet is later than 30 s, which cannot be changed
            raise
        raise RayNotStarted(
            f"the local Ray did not start ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}); "
            "its processes have 30 s for that, which a machine that is busy or short of memory may not keep: give the same command again "
            "when less runs here. FINETUNE_VERBOSE=1 shows what Ray says"
        ) from error


def _end(folder: str, *, local: bool) -> None:
    if local:
        # These processes ignore SIGTERM, and ray.shutdown would wait a second for each. It still has to talk to raylet and GCS.
        kill(one for one in processes_of(folder) if _is_helper(one, folder))
    ray.shutdown()


def _is_helper(process: RunProcess, folder: str) -> bool:
    """Whether it is a process of the local Ray that this one started and that is not vital."""
    with contextlib.suppress(OSError):
        is_rays = folder.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes()  # the zygote's does not name it
        return is_rays and process.parent == os.getpid() and process.name not in _VITAL
    return False


@contextlib.contextmanager
def _watched(on_lost: Callable[[str], None]) -> Iterator[None]:
    """Call `on_lost` in a thread if the local Ray's raylet or GCS dies inside the context."""
    over, end = os.pipe()
    names = {over: ""}
    node = worker_module._global_node
    for name in _VITAL:
        for started in node.all_processes.get(name, []):
            with contextlib.suppress(ProcessLookupError):
                names[os.pidfd_open(started.process.pid)] = name

    def watch() -> None:
        poll = select.poll()
        for descriptor in names:
            poll.register(descriptor, select.POLLIN)
        lost = {names[descriptor] for descriptor, _ in poll.poll()}
        if "" not in lost:
            on_lost(" and ".join(sorted(lost)))

    thread = threading.Thread(target=watch, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        for descriptor in names:
            os.close(descriptor)


def check_guarded(head: str, has_token: bool) -> None:
    """ValueError for a Ray head that other machines reach and that asks for no token: anyone who reaches its ports can run code on its
    nodes."""
    host = head.rpartition(":")[0].strip("[]")
    if not has_token and not (host == "localhost" or ipaddress.ip_address(host).is_loopback):
        raise ValueError(
            f"the Ray head at {head} can be reached from other machines and asks for no token, so who reaches it runs code on its nodes; "
            "start it with one (`ray get-auth-token --generate`, RAY_AUTH_MODE=token: docs/cluster.md, Token), or, where the network keeps "
            "others out, add --cluster.allow-unauthenticated"
        )


def is_checkout(project: Path) -> bool:
    """Whether the packages lie in a checkout, and not among all that is installed."""
    return (project / "pyproject.toml").is_file()


def sent(project: Path, packages: Sequence[str]) -> dict[str, Any]:
    """The part of a runtime environment that brings the code to a cluster. Of installed packages only ours: the nodes have the others."""
    if is_checkout(project):
        return {"working_dir": str(project), "excludes": [".git", ".venv", ".build", "build", "tests"]}
    return {"py_modules": [str(project / package) for package in packages]}


def _join(address: str, *, in_job: bool, code: Mapping[str, Any], **common: Any) -> None:
    """`ray.init` on an existing cluster. A job's environment already has its working directory; other drivers send their `code`."""
    runtime_env: dict[str, Any] = {**({} if in_job else code), "env_vars": _RAY_TRAIN_ENVIRONMENT}
    try:
        with _signals_are_ours():
            ray.init(address=address, runtime_env=runtime_env, **common)
    except ray.exceptions.AuthenticationError as error:
        raise ValueError(
            f"the Ray cluster at {address!r} wants its token ({str(error).splitlines()[0]}); "
            "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (docs/cluster.md, Token)"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); start one with `ray start --head`, "
            "if it is up and wants a token, export RAY_AUTH_MODE=token (docs/cluster.md, Token); "
            "or leave out --cluster.address and RAY_ADDRESS to run on this machine alone"
        ) from error


ENDING_SIGNALS = frozenset({signal.SIGTERM, signal.SIGHUP})


@contextlib.contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Keep the program's own SIGTERM handler, which `ray.init` replaces, and block SIGTERM and SIGHUP for every process started meanwhile.
    A signal that arrives meanwhile is handled at the end. Only in the main thread.

    `timeout` sends SIGTERM to a whole process group, systemd to a whole control group, and a terminal that is closed SIGHUP. A local Ray
    would die of it before the driver can save its checkpoint. (Ray hides SIGINT from its processes in the same way.)"""
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    except SystemExit as error:  # an earlier thread received it while Ray's handler replaced ours
        if error.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _without_helpers(*, logs: bool) -> Iterator[None]:
    """A Ray started inside has no autoscaler (there is no other node), no API server (nobody uses it) and, unless its workers' `logs`
    are wanted, no log monitor. That saves three processes with seconds of imports; the log monitor would also use half a percent of a
    core."""
    idle = ["start_monitor", "start_api_server", *([] if logs else ["start_log_monitor"])]
    before = {name: getattr(Node, name) for name in idle}
    for name in idle:
        setattr(Node, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)
