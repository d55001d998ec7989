"""What a run does in a Ray cluster: its share of the resources, its coordinator actor, and fleets of agents. A fleet is one `fit` of Ray
Train. ray_cluster.py joins or starts the cluster.

Called by trainer/drive/{start,session,fleets,attempt}.py; preflight and demand use it too. agent.py defines what the agents do,
controller.py when to try again. Ray Train's own checkpoints, resume and retries are not used (store.py and controller.py say why): it
places one worker per rank, assigns its GPU, and reports which workers died. A fleet carries many attempts, because the rank processes below
the agents die most often, and a `fit` takes several seconds to start.
"""

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray._private.accelerators as accelerators
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.agent import RankEnd, agent_main
from cluster.backend import AgentsOnly
from cluster.config import ClusterConfig
from cluster.coordinator import CoordinatorActor
from cluster.failures import Failure, classify, described, exit_failure, root_cause, unwrapped
from cluster.leftovers import FOLDER_VARIABLE
from cluster.overseer import Actor, Overseer
from cluster.zygote import ZYGOTE_LOST

NODE_ID_LABEL = "ray.io/node-id"
"""The label that Ray gives each node by itself."""


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


def free_resources(avoided: Collection[str] = ()) -> list[dict[str, float]]:
    """What is free now on each living node that is not about to leave and not `avoided` (ids)."""
    leaving = {*draining_nodes(), *avoided}
    return [free for node, free in ray._private.state.available_resources_per_node().items() if node not in leaving]


def total_resources(avoided: Collection[str] = ()) -> list[dict[str, float]]:
    """All resources, used or not, of each living node that is not about to leave and not `avoided` (ids)."""
    leaving = {*draining_nodes(), *avoided}
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def draining_nodes() -> dict[str, float]:
    """Node id -> unix time at which the node goes (0: unknown), for nodes that Ray drains."""
    return {node: deadline / 1000 for node, deadline in ray._private.state.state.get_draining_nodes().items()}


def nodes_with_file(path: str, nodes: Collection[str], timeout_seconds: float = 10.0) -> set[str]:
    """Which of these nodes (ids) live and have the file. One that does not answer in time counts as one that has it."""
    look = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path): node
        for node in alive.intersection(nodes)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_seconds) if asked else ([], [])
    without = set()
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # the node has gone meanwhile, or nothing can be started there
            without |= set() if ray.get(answer) else {asked[answer]}
    return set(asked.values()) - without


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
    ours = os.environ.get(FOLDER_VARIABLE)
    folder = tempfile.mkdtemp(prefix="coordinator-", dir=ours)
    if ours is None:  # else it goes with the driver's belongings, after Prometheus' list was taken back by the note in it
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    actor = ray.remote(
        num_cpus=0,
        max_concurrency=64,
        concurrency_groups={_OVERSEER: 1},
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )(CoordinatorActor)
    return actor.remote(**kwargs, log=f"{folder}/coordinator.log")


_OVERSEER = "overseer"
"""A thread of the coordinator's own for the overseer's questions: the others may all have calls that wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayAnswer:
    """See overseer.Answer."""

    reference: Any

    def is_there(self) -> bool:
        return bool(ray.wait([self.reference], timeout=0)[0])


def overseer_of(coordinator: Any) -> Overseer:
    """An Overseer of the coordinator with this handle."""

    def find() -> Actor | None:
        known = {}
        with contextlib.suppress(ray.exceptions.RayError):
            known = ray._private.state.actors(coordinator._actor_id.hex())
        return Actor(pid=known["Pid"], is_ready=known["State"] == "ALIVE") if known else None

    def ask() -> RayAnswer:
        return RayAnswer(reference=coordinator.last_commit.options(concurrency_group=_OVERSEER).remote())

    return Overseer(find, ask)


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
        avoid: Collection[str] = (),
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`modules`: what the ranks' zygotes import. `zygote`: the name of the zygote that a node's agents share; without it each agent
        has its own. `avoid`: ids of nodes on which no agent may be placed. `on_ended` is called in a thread once the fleet has ended."""
        self.number, self.workers = number, resources.workers
        self._failure: Failure | None = None
        self._scratch = tempfile.mkdtemp(prefix="fit-", dir=os.environ.get(FOLDER_VARIABLE))
        self._ended, self._on_ended = threading.Event(), on_ended
        self._label_selector = {NODE_ID_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else None
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
                    num_workers=resources.workers,
                    use_gpu=resources.gpus_per_worker > 0,
                    resources_per_worker=per_worker,
                    label_selector=self._label_selector,
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
    return _failure_of_one(error, None, "")


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
    cause, quoted = unwrapped(error)
    return replace(classify(described(cause), rank), traceback=trace or quoted)
