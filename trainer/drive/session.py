"""One driver's session of a run: what the driver's parts share, and their access to coordinator and store. start.py opens it once."""

import secrets
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
    """What the driver's parts share. It lives as long as one command."""

    decided: Decided
    data: str | dict[str, Any]
    """How the ranks reach the data set: its folder or URI, or its files in Ray's object store."""
    steps_per_epoch: int
    total_steps: int
    store: Store
    journal: Journal
    generation: int
    """Number of this driver's claim on the run. A driver with a newer claim has taken the run over."""
    coordinator: Any
    """The actor's handle."""
    zygote: str
    """Name under which each node's zygote is found."""
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
        """Write an event into the journal through the coordinator, which counts failures, or directly if the coordinator is gone."""
        try:
            ray.get(self.coordinator.event.remote(event, call_id=secrets.token_hex(8), **fields), timeout=CALL_SECONDS)
        except ray.exceptions.RayError:
            self.journal.write(event, **fields)

    # The run's folder

    def events(self) -> list[dict[str, Any]]:
        return read_journal(self.storage, self.config.run)

    def is_taken_over(self) -> bool:
        """Whether another process drives this run now. False if the storage does not answer."""
        try:
            return self.store.newest_generation() > self.generation
        except OSError:
            return False

    def committed_step(self) -> int:
        """Step of the newest commit; -1 if there is none."""
        commits = self.store.commits()
        return commits[0].step if commits else -1

    def find_start(self) -> Commit | None:
        """The commit to go on from; prints which ones are damaged."""
        return find_start(self.config, self.store, self.journal, self.decided.fingerprint, self.console.print)


def open_session(decided: Decided, begun: Begun, *, zygote: str, console: Console) -> Session:
    """Claim the run and start its coordinator. ValueError if the data cannot be shipped to the other nodes."""
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
            storage_uri=storage,  # as it is open here: opening an S3 URI may ask the storage where its bucket is
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
