"""The room that an elastic run lacks, stated so that an autoscaler (KubeRay's, `ray up`'s) brings the nodes for it.

Called by trainer/run.py before the cluster is planned with, and by trainer/drive/drive.py while a run waits for room or is at work with
fewer
workers than it may have. Whether to grow into what came stays with the driver.

What states it is placement groups that wait: an autoscaler counts them, and Ray's head removes them with the job that made them, however
that ended, within a second. (`ray.autoscaler.sdk.request_resources` outlives a killed driver; Ray Train's AutoscalingCoordinator, built on
it, does so for up to 200 s, counts what other jobs hold as room, and overwrites what anyone else asked for.) A group that waits becomes one
that holds as soon as it fits, so it is given back at once: room that a restarting neighbour is about to take again must stay free, and the
driver sees room only where it is free.
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
    """How many workers' groups a run at work has waiting: one for each worker that it lacks, so that an autoscaler which can bring some of
    them does; none while there is room for any, whether free or held by such a group. What is lacking after that is stated after growing.
    """
    return 0 if room > 0 or is_placed else max(0, lacking)


def room_of_worker(resources: Resources) -> dict[str, float]:
    """What a worker takes of a node."""
    return {"CPU": resources.cpus_per_worker} | ({"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {})


class Demand:
    """The groups that wait for one run. They go with its driver, if nobody withdraws them before."""

    def __init__(self, worker: Mapping[str, float]) -> None:
        """`worker` is what a worker takes of a node."""
        self._worker = dict(worker)
        self._stated = (0, 0)
        self._groups: list[Any] = []

    def state(self, groups: int, *, workers_each: int = 1) -> bool:
        """Have so many groups waiting, each for so many workers, all of whom it gets or none. True if that is new."""
        wanted = (groups, workers_each) if groups > 0 else (0, 0)
        if wanted == self._stated:
            return False
        self.withdraw()
        for _ in range(groups):
            self._groups.append(placement_group([dict(self._worker)] * workers_each))  # PACK: on several nodes where one is too small
        self._stated = wanted
        return groups > 0

    def is_placed(self) -> bool:
        """A group found its place: what it waited for is there."""
        return any(placement_group_table(group).get("state") == "CREATED" for group in self._groups)

    def withdraw(self) -> None:
        """Ask for nothing and hold nothing."""
        groups, self._groups, self._stated = self._groups, [], (0, 0)
        for group in reversed(groups):  # those that wait first: they would take what the others give back
            with contextlib.suppress(ray.exceptions.RayError):  # they end with this process at the latest
                remove_placement_group(group)


def lacks_fewest(workers: str, config: ClusterConfig, hardware: ClusterHardware) -> dict[str, float]:
    """What each of the fewest workers takes, if the hardware is too little for all of them and somebody may bring more; else {}. A local
    Ray stays as it is, and a fixed number of workers is a statement about what is there: plan_resources refuses both."""
    fewest, most = (1, 1) if workers == "auto" else worker_range(workers)
    if hardware.local or fewest == most:
        return {}
    gpus, cpus = gpus_of_worker(config, hardware), float(config.cpus_per_worker or 1)
    if gpus * fewest <= hardware.gpus and cpus * fewest <= hardware.cpus:
        return {}
    return {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {})


def wait_for_hardware(workers: str, config: ClusterConfig, hardware: ClusterHardware, tell: Callable[[str], None]) -> ClusterHardware:
    """The cluster's hardware, once it is enough for the fewest workers of N:M. ValueError where it is not within placement_seconds.

    Before the run is planned: what a worker gets, and what the devices can compute, is read off the nodes that are there.
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
