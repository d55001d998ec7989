"""Checks before any worker starts: every node sees the storage and the data, and runs the same versions.

Called by trainer/drive/start.py, which passes in the function that looks for the data. A failed check raises an error that says what to do.
"""

import contextlib
import platform
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cluster.launch import ClusterHardware
from cluster.machine import shared_memory_problem
from cluster.storage import Storage, StorageOutage, is_outage, open_storage
from cluster.text import printable
from cluster.versions import versions

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one node saw. `data`: the probe's result there, or None if the data cannot be read."""

    node: str
    storage_error: str
    data: str | None
    is_outage: bool
    """The storage does not answer there for the moment."""
    versions: dict[str, str]
    limits: str = ""
    """What the node has too little of for several GPUs; "" if nothing."""


def check_node(uri: str, run: str, token: str, data_probe: Callable[[], str]) -> NodeReport:
    """Read the driver's token from the storage, write our own, look for the data. Runs on the node being checked."""
    node, storage_error, is_away = platform.node(), "", False
    try:
        storage = open_storage(uri)
        seen = storage.read(f"{run}/.preflight-{token}")
        storage_error = "" if seen == token.encode() else "reads another file than the driver wrote"
        storage.write_atomic(f"{run}/.preflight-{token}-{uuid.uuid4().hex}", node.encode())
    except (OSError, ValueError) as error:
        storage_error, is_away = printable(error), isinstance(error, OSError) and is_outage(error)
    try:
        data: str | None = data_probe()
    except (OSError, ValueError):
        data = None
    return NodeReport(
        node=node, storage_error=storage_error, is_outage=is_away, data=data, versions=versions(), limits=shared_memory_problem()
    )


def preflight(
    storage: Storage,
    run: str,
    hardware: ClusterHardware,
    data_probe: Callable[[], str],
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> bool:
    """True if every node can read the data. ValueError for storage that is not shared or versions that differ; an OSError that is an outage
    (storage.is_outage) while the storage does not answer. `tell` gets a line for what
    may go wrong on a node."""
    token = uuid.uuid4().hex
    try:
        storage.write_atomic(f"{run}/.preflight-{token}", token.encode())
        reports = _reports(storage, run, hardware, token, data_probe)
    except OSError as error:
        if is_outage(error):
            raise
        raise ValueError(
            f"storage {storage.address!r} cannot be written ({printable(error)}); give a folder or URI that can with --storage, "
            "and check its permissions and free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a storage that cannot be written cannot be cleaned up either
            for entry in storage.list(run):
                if entry.name.startswith(f".preflight-{token}"):
                    storage.delete_file(f"{run}/{entry.name}")
    for report in reports:
        if report.is_outage:
            raise StorageOutage(f"storage {storage.address!r} does not answer on node {report.node} ({report.storage_error})")
        if report.storage_error:
            raise ValueError(
                f"storage {storage.address!r} is not shared: node {report.node} cannot use it ({report.storage_error}); "
                "give --storage a network mount present on every node, or s3://..., gs://..."
            )
    first = reports[0]
    for report in reports[1:]:
        differing = {name: (first.versions[name], v) for name, v in report.versions.items() if first.versions[name] != v}
        if differing:
            listed = ", ".join(f"{name} {a} on {first.node} but {b} on {report.node}" for name, (a, b) in differing.items())
            raise ValueError(f"versions differ between nodes: {listed}; install the same constraints.txt on every node")
    for report in reports:
        if report.limits and hardware.gpus > 1:
            tell(f"warning: on node {report.node} {report.limits}")
    here = data_probe()
    return all(report.data == here for report in reports)


def _reports(storage: Storage, run: str, hardware: ClusterHardware, token: str, data_probe: Callable[[], str]) -> list[NodeReport]:
    return on_every_node(hardware, partial(check_node, storage.uri, run, token, data_probe))


def on_every_node(hardware: ClusterHardware, probe: Callable[[], T], *, with_gpus: bool = False) -> list[T]:
    """The results of `probe` on each node, or on each node with GPUs; the probe itself gets no GPU. With one node, it runs in this
    process."""
    if hardware.nodes == 1:
        return [probe()]
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(num_cpus=0)(_call)
    needed = ("GPU",) if with_gpus else ("CPU", "GPU")
    nodes = [node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(name, 0) for name in needed)]
    asked = [remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(probe) for node in nodes]
    return list(ray.get(asked, timeout=120))


def _call(probe: Callable[[], T]) -> T:
    """A plain function for Ray, because a probe may be a `partial`."""
    return probe()
