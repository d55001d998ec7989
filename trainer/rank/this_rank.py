"""This rank's identity and its connections: the coordinator, Prometheus, the other ranks. worker.py calls `join` when an attempt begins,
and hands the ThisRank to the rank's other parts.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.exporter import Server, serve_metrics
from cluster.heartbeat import Heartbeat
from cluster.metrics import Metrics
from cluster.rank import Placement, RankContext
from cluster.roster import RankInfo
from trainer.settings.spec import WorkerSpec
from trainer.settings.tree import RunConfig

GROUP_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ThisRank:
    """One rank in one attempt."""

    spec: WorkerSpec
    rank: int
    world_size: int
    place: Placement
    device: torch.device
    files: Mapping[str, memoryview]
    """Files of the data set that travelled with the task, in memory, by name."""
    call: Callable[..., Any]
    """(method, *arguments): calls the coordinator and waits for the answer."""
    metrics: Metrics
    server: Server
    heartbeat: Heartbeat

    @property
    def config(self) -> RunConfig:
        return self.spec.config

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event into the journal, from rank 0 only."""
        if self.rank == 0:
            self.call("event", event, attempt=self.spec.attempt, **fields)


def join(spec: WorkerSpec, context: RankContext) -> ThisRank:
    """Register with the coordinator, and join the process group of the other ranks."""
    config, place, rank = spec.config, context.place, context.rank
    call: Callable[..., Any] = context.call
    device = torch.device("cpu") if place.device_index is None else torch.device("cuda", place.device_index)
    metrics = Metrics(config.run, rank, spec.attempt)
    metrics.set("start_time_seconds", time.time())
    server = serve_metrics(metrics.registry, config.cluster.metrics_host)
    info = RankInfo(host=place.host, pid=os.getpid(), node_id=place.node_id, metrics_address=server.address)
    call("register", spec.attempt, rank, info)
    heartbeat = Heartbeat(
        lambda beat: call("beat", beat),
        rank,
        spec.attempt,
        config.cluster.heartbeat_seconds / 2,  # so that a beat is ready whenever the agent asks
        start_step=spec.resume.step if spec.resume else 0,
    )
    if context.world_size > 1:
        context.join_group(GROUP_TIMEOUT_SECONDS)
    return ThisRank(
        spec=spec,
        rank=rank,
        world_size=context.world_size,
        place=place,
        device=device,
        files=context.files,
        call=call,
        metrics=metrics,
        server=server,
        heartbeat=heartbeat,
    )
