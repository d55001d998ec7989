"""Tells an autoscaler (KubeRay's, `ray up`'s) which workers an elastic run lacks, so that it brings the nodes.

Called by trainer/drive/start.py before the run is planned, and by trainer/drive/fleets.py while a run waits for room or works with fewer
workers than it may have. The driver decides whether to grow into new room.

Pending placement groups state the demand. An autoscaler counts them, and Ray's head removes them within a second after their job ends,
however it ended. The alternatives are worse: `ray.autoscaler.sdk.request_resources` outlives a killed driver. Ray Train's
AutoscalingCoordinator, built on it, does so for up to 200 s, counts what other jobs hold as room, and overwrites other users' requests. A
pending group reserves its resources as soon as it fits, so it is removed at once: room that a restarting neighbour is about to take again
must stay free, and the driver sees only free room.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.config import ClusterConfig
from cluster.launch import ClusterHardware, Resources, gpus_of_worker, hardware_now, worker_range

WAIT_POLL_SECONDS = 0.5


def groups_wanted(*, lacking: int, room: int, is_placed: bool) -> int:
    """How many groups, of one worker each, a working run keeps pending. One for each lacking worker, so that an autoscaler that can bring
    only some of them does. None while there is room for any worker, free or reserved by such a group; what is lacking then is requested
    after growing.
    """
    return 0 if room > 0 or is_placed else max(0, lacking)


def room_of_worker(resources: Resources) -> dict[str, float]:
    """The resources that a worker takes on a node."""
    return {"CPU": resources.cpus_per_worker} | ({"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {})


class Demand:
    """The pending groups of one run. They end with its driver, unless they are withdrawn before."""

    def __init__(self, worker: Mapping[str, float]) -> None:
        """`worker`: the resources that a worker takes on a node."""
        self._worker = dict(worker)
        self._stated = (0, 0)
        self._groups: list[Any] = []

    def state(self, groups: int, *, workers_each: int = 1) -> bool:
        """Keep this many groups pending, each for `workers_each` workers, placed all together or not at all. Returns True if this demand
        is new."""
        wanted = (groups, workers_each) if groups > 0 else (0, 0)
        if wanted == self._stated:
            return False
        self.withdraw()
        for _ in range(groups):
            self._groups.append(placement_group([dict(self._worker)] * workers_each))  # PACK: uses several nodes if one is too small
        self._stated = wanted
        return groups > 0

    def is_placed(self) -> bool:
        """True if a group was placed: the room it waited for exists."""
        return any(placement_group_table(group).get("state") == "CREATED" for group in self._groups)

    def withdraw(self) -> None:
        """Request nothing and reserve nothing."""
        groups, self._groups, self._stated = self._groups, [], (0, 0)
        for group in reversed(groups):  # pending ones first: they would take what the others release
            with contextlib.suppress(ray.exceptions.RayError):  # the groups end with this process at the latest
                remove_placement_group(group)


def lacks_fewest(workers: str, config: ClusterConfig, hardware: ClusterHardware) -> dict[str, float]:
    """The resources of each of the fewest workers, if the hardware is too small for all of those and an autoscaler may add more; else
    {}. A local Ray never grows, and a fixed number of workers states what is there: plan_resources refuses both."""
    fewest, most = (1, 1) if workers == "auto" else worker_range(workers)
    if hardware.local or fewest == most:
        return {}
    gpus, cpus = gpus_of_worker(config, hardware), float(config.cpus_per_worker or 1)
    if gpus * fewest <= hardware.gpus and cpus * fewest <= hardware.cpus:
        return {}
    return {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {})


def wait_for_hardware(workers: str, config: ClusterConfig, hardware: ClusterHardware, tell: Callable[[str], None]) -> ClusterHardware:
    """The cluster's hardware, once it is enough for the fewest workers of N:M. ValueError if it is not within placement_seconds.

    Must run before the plan: the nodes that are there decide what a worker gets and what the devices can compute.
    """
    worker = lacks_fewest(workers, config, hardware)
    if not worker:
        return hardware
    fewest, _ = worker_range(workers)
    each = " and ".join(f"{count:g} {name}" for name, count in worker.items())
    needs = f"--workers {workers} needs at least {fewest} worker{'s' if fewest > 1 else ''} of {each}"
    tell(f"{needs}, the cluster has {hardware.cpus} CPUs and {hardware.gpus} GPUs; asked for nodes, waiting for them")
    demand = Demand(worker)
    began = time.monotonic()
    try:
        while lacks_fewest(workers, config, hardware):
            if time.monotonic() - began > config.placement_seconds:
                raise ValueError(
                    f"{needs}, and after cluster.placement_seconds={config.placement_seconds:g} the cluster has {hardware.cpus} CPUs and "
                    f"{hardware.gpus} GPUs: no autoscaler brought such nodes; add some, ask for fewer with --workers, or for less with "
                    "--cluster.cpus-per-worker or --cluster.gpus-per-worker"
                )
            demand.state(1, workers_each=fewest)
            time.sleep(WAIT_POLL_SECONDS)
            hardware = hardware_now(local=False)
    finally:
        demand.withdraw()
    return hardware
