"""A run's fleets, one after another: the room that the cluster has for them, their start and their end.

A fleet is a set of agents that Ray Train placed, one a rank (cluster.launch). With `--workers N:M` it is as large as there is room for, and
an autoscaler is told of what is lacking (cluster.demand). Called by drive.py and attempt.py.
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
    remove_placement_group,
    total_resources,
    workers_that_fit,
)
from trainer.drive.session import Session
from trainer.drive.signals import Signals
from trainer.settings.spec import RANK_MODULES

CLUSTER_POLL_SECONDS = 2.0
SETTLE_SECONDS = 3.0
FLEET_END_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """Why an attempt is to end at a commit, and another to begin with other workers."""

    kind: Literal["preempted", "grow"]
    reason: str


class Room:
    """What the cluster has room for. Looks at it now and then, waits for room, and asks for more."""

    def __init__(
        self,
        resources: Resources,
        *,
        may_ask: bool,
        placement_seconds: float,
        grow_after_seconds: float,
        tell: Callable[..., None],
    ) -> None:
        """`may_ask`: somebody may bring nodes. `tell(event, **fields)` writes into the journal."""
        self._resources, self._may_ask, self._tell = resources, may_ask, tell
        self._placement_seconds, self._grow_after_seconds = placement_seconds, grow_after_seconds
        self._demand = Demand(room_of_worker(resources))
        self._asked_for = 0  # workers, since the present fleet began
        self._room_since: float | None = None
        self._looked_at = 0.0

    def wait(self, *, is_stopping: Callable[[], bool], show: Callable[[str], None]) -> int | None:
        """How many workers the cluster holds now, at least the fewest; None if it did not in time, or the run is to stop. `show` is told
        again and again what is waited for, "" where that is nothing yet.

        What the fleet before this one held comes back within a second or two: that is waited for. If it is too little then, the fewest are
        asked for, and in one group: two runs that wait, each holding half of what it needs, would wait for each other."""
        fewest, most = self._resources.fewest, self._resources.most
        began = time.monotonic()
        settled = began + SETTLE_SECONDS
        try:
            while True:
                now = time.monotonic()
                if self._demand.is_placed():
                    # Not counted in place: what Ray calls free is a moment old, and this room may be in it still, or not yet again.
                    self._demand.withdraw()
                    settled = now + SETTLE_SECONDS
                room = min(most, workers_that_fit(self._resources, free_resources()))
                possible = min(most, workers_that_fit(self._resources, total_resources()))
                if room >= fewest and (room >= possible or now > settled):
                    return room
                if is_stopping() or now - began > self._placement_seconds:
                    return None
                if room < fewest and self._may_ask and now > settled:
                    self._demand.state(1, workers_each=fewest)
                show(f"waiting for room for {fewest} workers, there is for {room}" if room < fewest else "")
                time.sleep(0.2)
        finally:
            self._demand.withdraw()

    def taken(self) -> None:
        """A new fleet begins: what is counted of its room begins anew."""
        self._room_since, self._asked_for = None, 0

    def reason_to_pause(self, status: Status, *, workers: int, attempt: int) -> Pause | None:
        """A node of the `workers` at work is about to go, or there is room for more of them. Asks for those that are lacking."""
        if status.notices:
            return Pause(kind="preempted", reason=f"notice of preemption: {'; '.join(status.notices)}")
        now = time.monotonic()
        if now - self._looked_at < CLUSTER_POLL_SECONDS:
            return None
        self._looked_at = now
        ours = {report.node_id for report in status.reports.values()}
        if leaving := sorted(node[:8] for node in draining_nodes() if node in ours):
            return Pause(kind="preempted", reason=f"Ray drains node {', '.join(leaving)}")
        lacking = self._resources.most - workers
        if lacking <= 0:
            return None
        free = min(lacking, workers_that_fit(self._resources, free_resources()))
        if self._may_ask:
            self._ask(groups_wanted(lacking=lacking, room=free, is_placed=self._demand.is_placed()), attempt)
        if free <= 0:
            self._room_since = None
            return None
        self._room_since = now if self._room_since is None else self._room_since
        if now - self._room_since < self._grow_after_seconds:
            return None
        return Pause(kind="grow", reason=f"there is room for {workers + free} workers, {workers} are at work")

    def _ask(self, workers: int, attempt: int) -> None:
        """Tell an autoscaler how many workers are lacking, where there is room for none of them."""
        if self._demand.state(workers) and workers != self._asked_for:
            self._asked_for = workers
            self._tell("workers_asked_for", attempt=attempt, workers=workers)

    def withdraw(self) -> None:
        """Ask for nothing: it would take what a fleet that ends gives back, and the next one needs that."""
        self._demand.withdraw()


class Fleets:
    """At most one at a time."""

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
        """Of the present fleet; of the last one where there is none."""
        return self._workers

    def start(self, attempt: int, *, show: Callable[[str], None]) -> Failure | None:
        """A fleet of as many agents as there is room for, if there is none; the failure where there is too little room. None without a
        fleet: the run is to stop. `show` is told what is waited for."""
        resources, cluster = self._session.resources, self._session.config.cluster
        workers = resources.most
        if resources.fewest < resources.most:
            room = self._room.wait(is_stopping=lambda: self._signals.number != 0, show=show)
            if room is None:
                return None if self._signals.number else self._no_room()
            workers = room
        self._room.taken()
        self._count += 1
        self._workers, self._placement_group = workers, ""
        self._present = Fleet(
            self._count,
            self._session.coordinator,
            name=f"{self._session.config.run}-{attempt}-{os.getpid()}",
            resources=resources.with_workers(workers),
            modules=RANK_MODULES,
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
        """Take from the agents' reports what the fleet holds in Ray."""
        self._placement_group = next((r.placement_group for r in status.reports.values()), "") or self._placement_group

    def end(self) -> None:
        """Have the agents end, and wait for that; what does not end by itself loses its place."""
        self._room.withdraw()
        fleet, self._present = self._present, None
        if fleet is None:
            return
        with suppress(ray.exceptions.RayError):  # without a coordinator the agents end by themselves
            self._session.ask("end_fleet", fleet.number)
        if not fleet.wait(FLEET_END_SECONDS) and self._placement_group:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(self._placement_group)
            fleet.wait(FLEET_END_SECONDS)
        fleet.abandon()

    def died(self) -> None:
        """The fleet has ended by itself."""
        self._room.withdraw()
        self._present = None
