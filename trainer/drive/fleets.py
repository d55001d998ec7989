"""Starts and ends a run's fleets, one at a time, and watches how much room the cluster has for them. Called by drive.py and attempt.py.

A fleet is a set of agents that Ray Train placed, one per rank (cluster.launch). With `--workers N:M` a fleet is as large as the cluster has
room for, and cluster.demand tells an autoscaler which workers are lacking.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import ray

from cluster.coordinator import Status
from cluster.demand import Demand, groups_wanted, room_of_worker
from cluster.failures import Failure
from cluster.launch import (
    Fleet,
    Resources,
    draining_nodes,
    free_resources,
    nodes_with_file,
    remove_placement_group,
    total_resources,
    workers_that_fit,
)
from trainer.drive.notices import Notices
from trainer.drive.session import Session
from trainer.drive.signals import Signals
from trainer.settings.spec import rank_modules

CLUSTER_POLL_SECONDS = 2.0
SETTLE_SECONDS = 3.0
FLEET_END_SECONDS = 10.0
NOTICE_POLL_SECONDS = 60.0
"""How often nodes that the run has left are asked whether their notice still stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """Why an attempt should end at a commit and another one begin with other workers."""

    kind: Literal["preempted", "grow"]
    reason: str


class Room:
    """Knows how many workers the cluster has room for: polls the cluster, waits for room, and asks an autoscaler for more."""

    def __init__(
        self,
        resources: Resources,
        *,
        may_ask: bool,
        placement_seconds: float,
        grow_after_seconds: float,
        notice: str = "",
        tell: Callable[..., None],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`may_ask`: an autoscaler or a person may add nodes. `notice`: the file with which a node gives notice. `tell(event, **fields)`
        writes into the journal, `say` on the terminal."""
        self._resources, self._may_ask, self._tell, self._say = resources, may_ask, tell, say
        self._placement_seconds, self._grow_after_seconds = placement_seconds, grow_after_seconds
        self._demand = Demand(room_of_worker(resources))
        self._asked_for = 0  # workers asked for since the present fleet began
        self._room_since: float | None = None
        self._looked_at = 0.0
        self._notice, self._notices, self._asked_notices_at = notice, Notices(), 0.0
        self._avoided: frozenset[str] = frozenset()

    @property
    def avoided(self) -> frozenset[str]:
        """Ids of the nodes on which the next fleet must not be placed, as they have given notice and there is room elsewhere."""
        return self._avoided

    def choose_nodes(self, workers: int) -> None:
        """Decide whether the next fleet, of exactly `workers`, keeps away from nodes that have given notice. Waits for what the previous
        fleet gives back, if it matters."""
        self._avoided = self._noticed_nodes()
        settled = time.monotonic() + SETTLE_SECONDS
        while self._avoided and workers_that_fit(self._resources, free_resources(self._avoided)) < workers:
            if time.monotonic() > settled:
                self._avoided = frozenset()
                return
            time.sleep(0.2)

    def wait(self, *, is_stopping: Callable[[], bool], show: Callable[[str], None]) -> int | None:
        """Wait until the cluster has room for at least the fewest workers. Returns for how many there is room, or None if time ran out or
        the run is to stop. Calls `show` repeatedly with what it is waiting for; "" means nothing worth showing yet.

        Ray gives back what the previous fleet held within a second or two, so this waits that long first. If there is still too little
        room, it asks for the fewest workers in one group: two waiting runs that each held half of what they need would wait for each
        other. Nodes that have given notice count only if there is no room elsewhere."""
        fewest, most = self._resources.fewest, self._resources.most
        self._avoided = self._noticed_nodes()
        began = time.monotonic()
        settled = began + SETTLE_SECONDS
        try:
            while True:
                now = time.monotonic()
                if self._demand.is_placed():
                    # Do not count this room yet: Ray's free resources are a moment old and may or may not include it.
                    self._demand.withdraw()
                    settled = now + SETTLE_SECONDS
                room = min(most, workers_that_fit(self._resources, free_resources(self._avoided)))
                possible = min(most, workers_that_fit(self._resources, total_resources(self._avoided)))
                if room >= fewest and (room >= possible or now > settled):
                    return room
                if self._avoided and room < fewest and now > settled:
                    self._avoided = frozenset()
                    continue
                if is_stopping() or now - began > self._placement_seconds:
                    return None
                if room < fewest and self._may_ask and now > settled:
                    self._demand.state(1, workers_each=fewest)
                show(f"waiting for room for {fewest} workers, there is for {room}" if room < fewest else "")
                time.sleep(0.2)
        finally:
            self._demand.withdraw()

    def taken(self) -> None:
        """A new fleet takes its room: reset the counts."""
        self._room_since, self._asked_for = None, 0
        self._notices.moved()

    def reason_to_pause(self, status: Status, *, workers: int, attempt: int) -> Pause | None:
        """A Pause if a node of this run is about to go, or there is room for more than `workers`. Also asks for lacking workers."""
        if (answer := self._notices.hear(notices_of(status))) is not None:
            if answer.act == "leave":
                return Pause(kind="preempted", reason=f"notice of preemption: {answer.reason}")
            self._tell("notice_stands", attempt=attempt, nodes=list(answer.nodes), reason=answer.reason)
            self._say(f"warning: {answer.reason} still announces that the node goes, and there is no room elsewhere; training on there")
        now = time.monotonic()
        if now - self._looked_at < CLUSTER_POLL_SECONDS:
            return None
        self._looked_at = now
        ours = {report.node_id for report in status.reports.values()}
        if leaving := sorted(node[:8] for node in draining_nodes() if node in ours):
            return Pause(kind="preempted", reason=f"Ray drains node {', '.join(leaving)}")
        if now - self._asked_notices_at > NOTICE_POLL_SECONDS:
            self._noticed_nodes()
        lacking = self._resources.most - workers
        if lacking <= 0:
            return None
        free = min(lacking, workers_that_fit(self._resources, free_resources(self._notices.nodes)))
        if self._may_ask:
            self._ask(groups_wanted(lacking=lacking, room=free, is_placed=self._demand.is_placed()), attempt)
        if free <= 0:
            self._room_since = None
            return None
        self._room_since = now if self._room_since is None else self._room_since
        if now - self._room_since < self._grow_after_seconds:
            return None
        return Pause(kind="grow", reason=f"there is room for {workers + free} workers, {workers} are at work")

    def _noticed_nodes(self) -> frozenset[str]:
        """Nodes whose notice stands: where the run has no agents left, somebody has to go and look."""
        self._asked_notices_at = time.monotonic()
        if self._notices.nodes:
            self._notices.keep(nodes_with_file(self._notice, self._notices.nodes))
        return self._notices.nodes

    def _ask(self, workers: int, attempt: int) -> None:
        """Tell an autoscaler how many workers are lacking and have no room."""
        if self._demand.state(workers) and workers != self._asked_for:
            self._asked_for = workers
            self._tell("workers_asked_for", attempt=attempt, workers=workers)

    def withdraw(self) -> None:
        """Withdraw all requests: they would take the room that an ending fleet gives back and the next fleet needs."""
        self._demand.withdraw()


def notices_of(status: Status) -> dict[str, str]:
    """The notice of each node where the run has agents; "" for none."""
    said: dict[str, str] = {}
    for report in status.reports.values():
        said[report.node_id] = said.get(report.node_id) or report.notice
    return said


class Fleets:
    """Starts and ends fleets, at most one at a time."""

    def __init__(self, session: Session, room: Room, signals: Signals) -> None:
        self._session, self._room, self._signals = session, room, signals
        self._present: Fleet | None = None
        self._count = 0
        self._workers = session.resources.workers
        self._placement_group = ""

    @property
    def present(self) -> Fleet | None:
        return self._present

    @property
    def workers(self) -> int:
        """Number of workers of the present fleet, or of the last one if there is none."""
        return self._workers

    def start(self, attempt: int, *, show: Callable[[str], None]) -> Failure | None:
        """Start a fleet of as many agents as there is room for. Returns a failure if there is too little room. Returns None without
        starting a fleet if the run is to stop. `show` is called with what this waits for."""
        resources, cluster = self._session.resources, self._session.config.cluster
        workers = resources.most
        if resources.fewest < resources.most:
            room = self._room.wait(is_stopping=lambda: self._signals.number != 0, show=show)
            if room is None:
                return None if self._signals.number else self._no_room()
            workers = room
        else:
            self._room.choose_nodes(workers)
        self._room.taken()
        self._count += 1
        self._workers, self._placement_group = workers, ""
        self._present = Fleet(
            self._count,
            self._session.coordinator,
            name=f"{self._session.config.run}-{attempt}-{os.getpid()}",
            resources=resources.with_workers(workers),
            avoid=self._room.avoided,
            modules=rank_modules(self._session.config),
            zygote=self._session.zygote,
            notice=cluster.preemption_notice,
            placement_seconds=cluster.placement_seconds,
            heartbeat_seconds=cluster.heartbeat_seconds,
            on_ended=self._signals.wake,
        )
        return None

    def _no_room(self) -> Failure:
        return Failure(
            kind="infrastructure",
            rank=None,
            message=f"the cluster had no room for {self._session.resources.fewest} workers in cluster.placement_seconds="
            f"{self._session.config.cluster.placement_seconds:g}; add nodes, or ask for fewer with --workers",
        )

    def seen(self, status: Status) -> None:
        """Remember from the agents' reports which placement group the fleet holds in Ray."""
        self._placement_group = next((r.placement_group for r in status.reports.values()), "") or self._placement_group

    def end(self) -> None:
        """Ask the agents to end and wait for it. If they do not, remove their placement group."""
        self._room.withdraw()
        fleet, self._present = self._present, None
        if fleet is None:
            return
        self._session.order("end_fleet", fleet.number)
        if not fleet.wait(FLEET_END_SECONDS) and self._placement_group:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(self._placement_group)
            fleet.wait(FLEET_END_SECONDS)
        fleet.abandon()

    def died(self) -> None:
        """The fleet has ended by itself."""
        self._room.withdraw()
        self._present = None
