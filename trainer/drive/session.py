"""One driver's session of a run: what its parts share, and the coordinator and the store as they reach them. Made once, by start.py."""

from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from cluster.coordinator import Status
from cluster.journal import Journal, read_journal
from cluster.launch import Resources, start_coordinator
from cluster.storage import Storage
from cluster.store import Commit, Store
from cluster.straggler import StragglerLimits
from trainer.drive.data import ship
from trainer.drive.identity import find_start
from trainer.drive.stages import Begun, Decided
from trainer.settings.spec import make_order, total_steps_of
from trainer.settings.tree import RunConfig

CALL_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Lives as long as one command."""

    decided: Decided
    data: str | dict[str, Any]
    """The data set as the ranks reach it: its folder or URI, or its files in Ray's object store."""
    steps_per_epoch: int
    total_steps: int
    store: Store
    journal: Journal
    generation: int
    """The driver's claim on the run; a newer one has taken it over."""
    coordinator: Any
    """The actor's handle."""
    zygote: str
    """Name of the nodes' zygotes."""
    console: Console

    @property
    def config(self) -> RunConfig:
        return self.decided.config

    @property
    def storage(self) -> Storage:
        return self.decided.storage

    @property
    def resources(self) -> Resources:
        return self.decided.resources

    # The coordinator

    def ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.coordinator, method).remote(*args), timeout=CALL_SECONDS)

    def status(self) -> Status:
        status: Status = self.ask("status")
        return status

    def tell(self, event: str, **fields: Any) -> None:
        """Into the journal by way of the coordinator, which counts failures; directly where it is gone."""
        try:
            ray.get(self.coordinator.event.remote(event, **fields), timeout=CALL_SECONDS)
        except ray.exceptions.RayError:
            self.journal.write(event, **fields)

    # The run's folder

    def events(self) -> list[dict[str, Any]]:
        return read_journal(self.storage, self.config.run)

    def is_taken_over(self) -> bool:
        """Another process drives this run now. A storage that does not answer says nothing about that."""
        try:
            return self.store.newest_generation() > self.generation
        except OSError:
            return False

    def committed_step(self) -> int:
        """Of the newest commit; -1 where there is none."""
        commits = self.store.commits()
        return commits[0].step if commits else -1

    def find_start(self) -> Commit | None:
        """The commit to go on from; says which are damaged."""
        return find_start(self.config, self.store, self.journal, self.decided.fingerprint, self.console.print)


def open_session(decided: Decided, begun: Begun, *, zygote: str, console: Console) -> Session:
    """Claim the run, and start its coordinator. ValueError where the data reach no other node."""
    config, storage, cluster = decided.config, decided.storage, decided.config.cluster
    data = decided.location if decided.is_shared else ship(decided.dataset, config)
    steps_per_epoch = make_order(config, decided.dataset).steps_per_epoch
    generation = begun.store.claim_generation()
    return Session(
        decided=decided,
        data=data,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps_of(config, steps_per_epoch),
        store=begun.store,
        journal=begun.journal,
        generation=generation,
        coordinator=start_coordinator(
            storage_uri=storage.uri,
            run=config.run,
            generation=generation,
            keep=cluster.keep_checkpoints,
            metrics_host=cluster.metrics_host,
            discovery_port=cluster.discovery_port,
            storage_retry_seconds=cluster.storage_retry_seconds,
            straggler=StragglerLimits(ratio=cluster.faults.straggler_ratio, steps=cluster.faults.straggler_steps),
        ),
        zygote=zygote,
        console=console,
    )
