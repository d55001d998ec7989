"""All uses of Ray: the run's cluster, its coordinator actor, and fleets of agents. A fleet is one `fit` of Ray Train.

Called by trainer/drive/{start,session,fleets,attempt}.py; preflight and demand use it too. agent.py defines what the agents do,
controller.py when to try again. Ray Train's own checkpoints, resume and retries are not used (store.py and controller.py say why): it
places one worker per rank, assigns its GPU, and reports which workers died. A fleet carries many attempts, because the rank processes below
the agents die most often, and a `fit` takes several seconds to start.
"""

import atexit
import contextlib
import ipaddress
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray._private.accelerators as accelerators
import ray._private.worker as worker_module
from ray._private.node import Node
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.agent import RankEnd, agent_main
from cluster.backend import AgentsOnly
from cluster.config import ClusterConfig
from cluster.coordinator import CoordinatorActor
from cluster.failures import Failure, classify, described, exit_failure, root_cause
from cluster.process import ProcessStat, process_stat
from cluster.zygote import ZYGOTE_LOST

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
_TEMP_PREFIX = "finetune-ray-"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterHardware:
    """What the cluster offers. `local` is true for a Ray that this process started."""

    local: bool
    nodes: int
    cpus: int
    gpus: int
    node_cpus: tuple[int, ...] = ()
    """CPUs of each node; empty: all on one node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """How many workers there are, and what each gets. With `--workers N:M`, between `fewest` and `most`."""

    workers: int
    fewest: int
    most: int
    cpus_per_worker: float
    gpus_per_worker: int
    threads_per_worker: int

    def with_workers(self, workers: int) -> "Resources":
        return replace(self, workers=workers)


@contextlib.contextmanager
def ray_cluster(
    config: ClusterConfig, *, project: Path, address: str, in_job: bool, cpus: int, verbose: bool = False
) -> Iterator[ClusterHardware]:
    """Join the cluster at `address`, or start a Ray for this run alone and remove all its processes and folders afterwards.

    `project` is the checkout that workers import from; a cluster joined from outside a job gets a copy of it.
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
    _remove_stale_temp_folders()
    temp = None
    try:
        if address:
            _join(address, in_job=in_job, project=project, **common)
            if not config.allow_unauthenticated:
                check_guarded(ray.get_runtime_context().gcs_address, get_authentication_mode() == AuthenticationMode.TOKEN)
        else:
            # Keep the path short: Ray creates Unix sockets below it, whose names are limited to 107 bytes.
            temp = _temp_folder()
            for name, value in _LOCAL_RAY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            # Inherited, not in a runtime_env: the workers that Ray starts in advance would lack that, and would not be used.
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH", "")]))
            with _sigterm_is_ours(), _without_helpers(logs=verbose):
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=temp, **common)
        yield hardware_now(local=not address)
    finally:
        started = set() if temp is None else _processes_of(temp)
        # These processes ignore SIGTERM, and ray.shutdown would wait a second for each. It still has to talk to raylet and GCS.
        _kill(process for process in started if process.is_child and process.name not in ("raylet", "gcs_server"))
        ray.shutdown()
        if temp is not None:
            # Workers end with their raylet, except one that Ray's own shutdown blocked for ever, seen once.
            _kill(started | _processes_of(temp))
            shutil.rmtree(temp, ignore_errors=True)


def hardware_now(*, local: bool) -> ClusterHardware:
    """What the cluster that this process has joined offers now."""
    total = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return ClusterHardware(
        local=local,
        nodes=len(nodes),
        cpus=int(total.get("CPU", 0)),
        gpus=int(total.get("GPU", 0)),
        node_cpus=tuple(int(node["Resources"].get("CPU", 0)) for node in nodes),
    )


def gpus_here() -> int:
    """Number of GPUs that a local Ray would find."""
    count = accelerators.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = accelerators.NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return int(count) if visible is None else min(int(count), len(visible))


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


def _join(address: str, *, in_job: bool, project: Path, **common: Any) -> None:
    """`ray.init` on an existing cluster. A job's environment already has its working directory."""
    runtime_env: dict[str, Any] = {} if in_job else {"working_dir": str(project), "excludes": [".git", ".venv", ".build", "tests"]}
    runtime_env["env_vars"] = _RAY_TRAIN_ENVIRONMENT
    try:
        with _sigterm_is_ours():
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


@contextlib.contextmanager
def _sigterm_is_ours() -> Iterator[None]:
    """Keep the program's own SIGTERM handler, which `ray.init` replaces, and block SIGTERM for every process started meanwhile. A SIGTERM
    that arrives meanwhile is handled at the end. Only in the main thread.

    `timeout` sends SIGTERM to a whole process group, systemd to a whole control group. A local Ray would die of it before the driver can
    save its checkpoint. (Ray hides SIGINT from its processes in the same way.)"""
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _RayProcess:
    """A process of a local Ray. Process ids are reused; an id together with its `start_ticks` is unique."""

    pid: int
    start_ticks: int
    name: str
    is_child: bool
    """Whether this process started it."""


def _processes_of(temp: str) -> set[_RayProcess]:
    """The processes of a local Ray: children of this process whose command names its folder, and all their descendants."""
    seen: dict[int, ProcessStat] = {}
    naming: set[int] = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                stat = process_stat(int(folder.name))
                names_it = temp.encode() in (folder / "cmdline").read_bytes()
                if stat is not None:
                    seen[stat.pid] = stat
                    naming |= {stat.pid} if names_it else set()
    found: set[int] = set()
    added = {pid for pid, stat in seen.items() if stat.parent == os.getpid() and pid in naming}
    while added:
        found |= added
        added = {pid for pid, stat in seen.items() if stat.parent in found} - found
    return {
        _RayProcess(pid=pid, start_ticks=seen[pid].start_ticks, name=seen[pid].name, is_child=seen[pid].parent == os.getpid())
        for pid in found
    }


def _kill(processes: Iterable[_RayProcess]) -> None:
    """Send SIGKILL to those that still live."""
    for process in processes:
        with contextlib.suppress(OSError):
            stat = process_stat(process.pid)
            if stat is not None and stat.start_ticks == process.start_ticks:
                os.kill(process.pid, signal.SIGKILL)


def _temp_folder() -> str:
    """A new folder whose name contains its owner's process id."""
    return tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-")


def _remove_stale_temp_folders() -> None:
    """Remove the folders of runs that were killed before they could clean up; the process ids in the names identify them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMP_PREFIX}*"):
        owner = re.fullmatch(rf"{_TEMP_PREFIX}(\d+)-.*", folder.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def plan_resources(workers: str, config: ClusterConfig, hardware: ClusterHardware) -> Resources:
    """How many workers there are, and what each gets. ValueError if the cluster cannot hold them; with N:M, if it cannot hold N."""
    per_gpu = gpus_of_worker(config, hardware)
    one_a_gpu = max(1, hardware.gpus // per_gpu) if per_gpu else 1
    fewest, most = (one_a_gpu, one_a_gpu) if workers == "auto" else worker_range(workers)
    if per_gpu * fewest > hardware.gpus:
        raise ValueError(
            f"--workers {fewest} with {per_gpu} GPU each needs {per_gpu * fewest} GPUs, the cluster has {hardware.gpus}; "
            f"use --workers {max(1, hardware.gpus // per_gpu)} or --cluster.gpus-per-worker 0"
        )
    cpus: float
    if config.cpus_per_worker:
        cpus = config.cpus_per_worker
        if cpus * fewest > hardware.cpus:
            raise ValueError(
                f"--workers {fewest} with --cluster.cpus-per-worker {config.cpus_per_worker} needs {cpus * fewest:g} CPUs, the cluster has "
                f"{hardware.cpus}; use fewer of either"
            )
    elif fewest < most:  # the final number of workers is unknown, so the share must not depend on it
        cpus = float(max(1, hardware.cpus // hardware.gpus)) if per_gpu else 1.0
    else:
        cpus = even_share(hardware.node_cpus or (hardware.cpus,), most)
    threads = config.threads_per_worker or max(1, int(cpus))
    fitting = min(int(hardware.cpus / cpus + 1e-9), hardware.gpus // per_gpu if per_gpu else most)
    return Resources(
        workers=max(fewest, min(most, fitting)),
        fewest=fewest,
        most=most,
        cpus_per_worker=cpus,
        gpus_per_worker=per_gpu,
        threads_per_worker=threads,
    )


def gpus_of_worker(config: ClusterConfig, hardware: ClusterHardware) -> int:
    return config.gpus_per_worker if config.gpus_per_worker >= 0 else int(hardware.gpus > 0)


def even_share(node_cpus: Sequence[int], workers: int) -> float:
    """The largest number of CPUs that each of `workers` can have without splitting one over nodes: a whole number if there is at least
    one for each, else a fraction."""

    def fits(share: float) -> bool:
        return sum(int(cpus / share + 1e-9) for cpus in node_cpus) >= workers

    whole = max((cpus for cpus in range(1, max(node_cpus) + 1) if fits(cpus)), default=0)
    if whole:
        return float(whole)
    return max(share for cpus in node_cpus for parts in range(1, workers + 1) if fits(share := int(cpus / parts * 10_000) / 10_000 or 1e-4))


def worker_range(workers: str) -> tuple[int, int]:
    """(N, M) for "N:M", (N, N) for "N"."""
    fewest, _, most = workers.partition(":")
    return int(fewest), int(most or fewest)


def workers_that_fit(resources: Resources, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many more workers fit into the free resources of `nodes`, {"CPU": ..., "GPU": ...} each."""
    count = 0
    for free in nodes:
        fits = int(free.get("CPU", 0.0) / resources.cpus_per_worker + 1e-6)
        if resources.gpus_per_worker:
            fits = min(fits, int(free.get("GPU", 0.0) // resources.gpus_per_worker))
        count += fits
    return count


def free_resources() -> list[dict[str, float]]:
    """What is free now on each living node that is not about to leave."""
    leaving = draining_nodes()
    return [free for node, free in ray._private.state.available_resources_per_node().items() if node not in leaving]


def total_resources() -> list[dict[str, float]]:
    """All resources, used or not, of each living node that is not about to leave."""
    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def draining_nodes() -> dict[str, float]:
    """Node id -> unix time at which the node goes (0: unknown), for nodes that Ray drains."""
    return {node: deadline / 1000 for node, deadline in ray._private.state.state.get_draining_nodes().items()}


def remove_placement_group(group: str) -> None:
    """Free a fleet's resources and end what runs there; `group` is its id in hex."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup
    from ray.util.placement_group import remove_placement_group as remove

    remove(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def start_coordinator(**kwargs: Any) -> Any:
    """Start the coordinator as an actor on this node; `kwargs` are Coordinator's, without its log. Returns its handle.

    If it dies, Ray restarts it here, and it goes on from its log, in a folder that ends with this process. Ray repeats the calls made
    meanwhile, so each call may run twice. It counts its restarts itself, and gives up after too many in a short time: a number over the
    whole run would end a long one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    folder = _temp_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    actor = ray.remote(num_cpus=0, max_concurrency=64, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(CoordinatorActor)
    return actor.remote(**kwargs, log=f"{folder}/coordinator.log")


# Ray Train starts an actor, a process with two seconds of imports, for each of these. Agents read no Ray Data, and a placement group ends
# with the actor that made it. The driver watches draining nodes itself (RAY_TRAIN_ENABLE_PREEMPTION_WATCHER is off).
_IDLE = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


def _fit_class() -> Any:
    """Ray Train's trainer without the processes that agents do not need, and without the one that requests nodes. The workers' pending
    placement group requests them too, ends with the driver, and overwrites nobody's `request_resources`."""
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class FixedSize(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    class Fit(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in _IDLE]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            settings["scaling_policy"] = FixedSize(self.scaling_config)
            return super()._initialize_and_run_controller(**settings)

    return Fit


class Fleet:
    """One `fit` of Ray Train, in a thread. It places an agent for each rank and keeps it there, attempt after attempt, until the
    coordinator says "end" or one of Ray's workers dies. It fails if Ray Train cannot place the agents within `placement_seconds`."""

    def __init__(
        self,
        number: int,
        coordinator: Any,
        *,
        name: str,
        resources: Resources,
        modules: Sequence[str],
        notice: str,
        placement_seconds: float,
        heartbeat_seconds: float,
        zygote: str = "",
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`modules`: what the ranks' zygotes import. `zygote`: the name of the zygote that a node's agents share; without it each agent
        has its own. `on_ended` is called in a thread once the fleet has ended."""
        self.number, self.workers = number, resources.workers
        self._failure: Failure | None = None
        self._scratch = _temp_folder()
        self._ended, self._on_ended = threading.Event(), on_ended
        settings = {
            "coordinator": coordinator,
            "fleet": number,
            "modules": list(modules),
            "zygote": zygote,
            "notice": notice,
            "heartbeat_seconds": heartbeat_seconds,
        }
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{placement_seconds:g}"
        threading.Thread(target=self._fit, args=(settings, name, resources), name="fit", daemon=True).start()

    def wait(self, timeout_seconds: float) -> bool:
        """True once the fleet has ended."""
        return self._ended.wait(timeout_seconds)

    def abandon(self) -> None:
        """Stop tracking the fleet: its processes end with this process's connection to Ray; its folder is removed now."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def failure(self) -> Failure | None:
        """Why the fleet failed; None if its agents were told to end. Call it only after `wait` returned True."""
        assert self._ended.is_set()
        return self._failure

    def _fit(self, settings: dict[str, Any], name: str, resources: Resources) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            per_worker["GPU"] = resources.gpus_per_worker
        try:
            _fit_class()(
                agent_main,
                train_loop_config=settings,
                backend_config=AgentsOnly(),
                scaling_config=ScalingConfig(
                    num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
                ),
                run_config=RunConfig(name=name, storage_path=self._scratch, failure_config=FailureConfig(max_failures=0)),
            ).fit()
        except BaseException as error:
            self._failure = failure_of(error)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._ended.set()
            self._on_ended()


def failure_of_ranks(ends: Mapping[int, RankEnd]) -> Failure | None:
    """Why an attempt failed whose ranks ended like this; None if all succeeded."""
    failures = []
    for rank, end in sorted(ends.items()):
        if end.error is not None:
            failures.append(classify(end.error, rank))
        elif end.status == ZYGOTE_LOST:
            failures.append(Failure(kind="infrastructure", rank=rank, message="the process that it was forked from died"))
        elif end.status != 0 and not end.killed_by_order:
            failures.append(exit_failure(rank, end.status))
    return root_cause(failures) if failures else None


def failure_of(error: BaseException) -> Failure:
    """The cause behind an exception of `fit`: the first failing rank's own exception if there is one."""
    by_rank: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if by_rank:
        traces = _traces(str(error))
        return root_cause([_failure_of_one(one, rank, traces.get(rank, "")) for rank, one in sorted(by_rank.items())])
    return _failure_of_one(getattr(error, "controller_failure", error), None, "")


def _traces(text: str) -> dict[int, str]:
    """Rank -> traceback. A rank's exception loses its traceback on the way to the driver; Ray's message about all ranks quotes it."""
    parts = re.split(r"^\[Rank ([\d,]+) Error Snippet\]:\n", text, flags=re.MULTILINE)
    return {
        int(rank): trace.strip()
        for ranks, trace in zip(parts[1::2], parts[2::2], strict=True)
        for rank in ranks.split(",")
        if trace.startswith("Traceback")
    }


def _failure_of_one(error: BaseException, rank: int | None, trace: str) -> Failure:
    cause: BaseException = getattr(error, "_base_exc", error)
    trace = trace or str(getattr(error, "_traceback_str", ""))
    if isinstance(cause, ray.exceptions.RayTaskError):
        trace = trace or str(cause)
        cause = cause.cause or cause
    return replace(classify(described(cause), rank), traceback=trace)
