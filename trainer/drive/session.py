"""One driver's session of a run: what the driver's parts share, and their access to coordinator and storage. start.py opens it once.

Every question to the storage goes through its Patience (cluster/patience.py), every call of the coordinator through `ask` or `tell`. So
neither an outage nor a coordinator that is being restarted ends a run."""

import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from rich.console import Console
from rich.text import Text

from cluster.coordinator import Status
from cluster.heartbeat import CoordinatorLost
from cluster.journal import Event, Journal, JournalReader
from cluster.launch import Resources, overseer_of, start_coordinator
from cluster.overseer import Overseer
from cluster.patience import Patience
from cluster.storage import Storage
from cluster.store import Commit, NoValidCheckpoint, Store
from cluster.straggler import StragglerLimits
from cluster.whose import namespace_here, owner_here
from trainer.drive.data import ship
from trainer.drive.identity import find_start
from trainer.drive.stages import Begun, Decided
from trainer.settings.spec import order_of, total_steps_of
from trainer.settings.tree import RunConfig

CALL_SECONDS = 60.0
NEWS_SECONDS = 5.0
"""News are answered within a heartbeat or two. Later than this the coordinator is asked as `Session.ask` does."""
POLL_SECONDS = 1.0
OVERSEEN_SECONDS = 2.0
"""While a call takes longer, the coordinator's process is looked at."""
SLOW_SECONDS = 5.0
"""A call that takes longer is shown as a wait for the coordinator."""
ORDER_SECONDS = 10.0
COORDINATOR_SECONDS = 300.0
"""How long the coordinator may leave a call unanswered while the storage answers. It needs seconds, also where Ray restarts it."""

T = TypeVar("T")


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
    reader: JournalReader
    patience: Patience
    generation: int
    """Number of this driver's claim on the run. A driver with a newer claim has taken the run over."""
    coordinator: Any
    """The actor's handle."""
    overseer: Overseer
    """Ends a coordinator that lives and answers nobody."""
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
    def samples_per_step(self) -> float:
        """On average: fewer than `data.batch_size` where the data are few, or an epoch's remainder is spread."""
        return self.decided.dataset.split("train").count / self.steps_per_epoch

    @property
    def resources(self) -> Resources:
        return self.decided.resources

    # The coordinator

    def ask(self, method: str, *args: Any) -> Any:
        """The answer of the coordinator's method. Ray restarts a coordinator that died and repeats its calls, so this may take a while; in
        an outage of the storage it takes as long as that. CoordinatorLost if it is gone for good; what the method raised is raised here."""
        return self.answer(self.call(method, *args), again=lambda: self.call(method, *args))

    def call(self, method: str, *args: Any) -> Any:
        """Call the coordinator's method without waiting. Returns Ray's reference to the answer."""
        return getattr(self.coordinator, method).remote(*args)

    def answer(self, reference: Any, *, again: Callable[[], Any]) -> Any:
        """The answer to a call; see `ask`. `again` makes the same call once more."""
        began, stopping_since = time.monotonic(), math.inf
        while True:
            try:
                return ray.get(reference, timeout=POLL_SECONDS)
            except ray.exceptions.ActorUnavailableError as error:  # on its way back; it may or may not have got the call
                problem = _in_brief(error)
                time.sleep(POLL_SECONDS)
                reference = again()
            except ray.exceptions.GetTimeoutError:
                problem = f"no answer for {time.monotonic() - began:.0f} s"
                self._oversee(time.monotonic() - began)
            except ray.exceptions.ActorDiedError as error:
                raise CoordinatorLost(f"the run's coordinator is gone: {_in_brief(error)}") from error
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, (OSError, ValueError)):  # in its own words, without Ray's account of where it was raised
                    raise cause from None
                raise
            now = time.monotonic()
            if now - began > SLOW_SECONDS:
                self.patience.look("waiting for the coordinator")
            stopping_since = min(stopping_since, now) if self.patience.is_stopping() else math.inf
            is_late = now - began > COORDINATOR_SECONDS and self.storage_answers()
            if is_late or now - stopping_since > self.config.cluster.stop_grace_seconds:
                raise CoordinatorLost(f"the run's coordinator does not answer: {problem}")

    def _oversee(self, unanswered_seconds: float) -> None:
        """End the coordinator if it hangs. Ray starts it again and repeats its calls."""
        if unanswered_seconds < OVERSEEN_SECONDS:
            return
        if (hung := self.overseer.look(time.monotonic())) is not None:
            self.journal.write("coordinator_hung", kind=hung.kind, seconds=hung.seconds, pid=hung.pid)
            self.console.print(Text(hung.describe()), soft_wrap=True)

    def order(self, method: str, *args: Any) -> Any:
        """The answer of the coordinator's method, for what can do without: None where it is gone; agents end by themselves then."""
        with suppress(ray.exceptions.RayError):
            return ray.get(self.call(method, *args), timeout=ORDER_SECONDS)
        return None

    def storage_answers(self) -> bool:
        """Whether the storage is not to blame: a coordinator that is restarted reads it, and waits for it."""
        return self.patience.once("the run's folder", lambda: self.store.newest_generation() >= 0, False)

    def status(self) -> Status:
        status: Status = self.ask("status")
        return status

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event into the journal through the coordinator, which counts failures, or directly if the coordinator is gone."""
        told, began = self.coordinator.event.remote(event, call_id=secrets.token_hex(8), **fields), time.monotonic()
        while time.monotonic() - began < CALL_SECONDS:  # after that it gets the call when it is back
            try:
                ray.get(told, timeout=POLL_SECONDS)
                return
            except ray.exceptions.GetTimeoutError:
                self._oversee(time.monotonic() - began)
            except ray.exceptions.RayError:
                self.journal.write(event, **fields)
                return

    def quarantined(self) -> int:
        """Number of samples that the run has set aside so far."""
        try:
            return self.status().quarantined
        except CoordinatorLost:
            return len({(event.get("split"), event.get("key")) for event in self.reader.known if event["event"] == "sample_quarantined"})

    # The run's folder

    def patiently(self, what: str, operation: Callable[[], T], *, seconds: float = math.inf) -> T:
        """What `operation()` gets from the storage, however long an outage lasts. See Patience.call."""
        return self.patience.call(what, operation, seconds=seconds)

    def events(self) -> list[Event]:
        return self.patiently("the run's journal", self.reader.read)

    def newest_events(self) -> list[Event]:
        """The journal's events; in an outage those that were read before it."""
        events = self.patience.once("the run's journal", self.reader.read, None)
        return self.reader.known if events is None else events

    # For the end of a run, which nothing holds up for ever: what is known if the storage refuses, or if a signal came in an outage.

    def last_events(self) -> list[Event]:
        """The journal's events, waited for as `events` does; those that are known if that is in vain."""
        try:
            return self.events()
        except OSError:
            return self.reader.known

    def saved_step(self) -> int:
        """Step of the newest intact commit, -1 if there is none; as far as the coordinator knows if the storage does not say."""
        try:
            commit = self.patiently("the newest checkpoint", lambda: self.store.newest_valid(lambda path, reason: None))
        except (OSError, NoValidCheckpoint):
            return self._told_step()
        return commit.step if commit is not None else -1

    def _told_step(self) -> int:
        try:
            last = self.status().checkpoints.last
        except CoordinatorLost:
            return max((event["step"] for event in self.reader.known if event["event"] == "checkpoint_committed"), default=-1)
        return last.step if last is not None else -1

    def is_taken_over(self) -> bool:
        """Whether another process drives this run now. False if the storage refuses to say, or if the run is to stop in an outage."""
        try:
            return self.patiently("the run's newest driver", self._has_newer_driver)
        except OSError:
            return False

    def seems_taken_over(self) -> bool:
        """The same without patience: False in an outage."""
        return self.patience.once("the run's newest driver", self._has_newer_driver, False)

    def _has_newer_driver(self) -> bool:
        return self.store.newest_generation() > self.generation

    def committed_step(self) -> int:
        """Step of the newest commit; -1 if there is none."""
        commits = self.patiently("the list of checkpoints", self.store.commits)
        return commits[0].step if commits else -1

    def find_start(self) -> Commit | None:
        """The commit to go on from; prints which ones are damaged."""
        config, fingerprint = self.config, self.decided.fingerprint
        return self.patiently(
            "the newest checkpoint", lambda: find_start(config, self.store, self.journal, fingerprint, self.console.print)
        )


def patience_of(console: Console, journal: Journal, measure: Callable[[float], None] = lambda seconds: None) -> Patience:
    """A Patience that tells its outages on the terminal and in the journal."""
    return Patience(say=lambda line: console.print(Text(line), soft_wrap=True), record=journal.write, measure=measure)


def _measure(coordinator: Any, seconds: float) -> None:
    with suppress(ray.exceptions.RayError):  # a coordinator that is gone has no metrics either
        coordinator.waiting_for_storage.remote(seconds)


def _in_brief(error: Exception) -> str:
    """What Ray says, without the traceback in its middle."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join([*lines[:1], *lines[1:][-1:]]) or type(error).__name__


def open_session(decided: Decided, begun: Begun, *, zygote: str, console: Console) -> Session:
    """Start the run's coordinator. ValueError if the data cannot be shipped to the other nodes."""
    config, storage, cluster = decided.config, decided.storage, decided.config.cluster
    data = decided.location if decided.is_shared else ship(decided.dataset, config)
    steps_per_epoch = order_of(config, decided.dataset.manifest).steps_per_epoch
    coordinator = start_coordinator(
        storage_uri=storage,  # as it is open here: opening an S3 URI may ask the storage where its bucket is
        run=config.run,
        generation=begun.generation,
        keep=cluster.keep_checkpoints,
        metrics_host=cluster.metrics_host,
        discovery_port=cluster.discovery_port,
        storage_retry_seconds=cluster.storage_retry_seconds,
        straggler=StragglerLimits(ratio=cluster.faults.straggler_ratio, steps=cluster.faults.straggler_steps),
        namespace=cluster.metrics_namespace or namespace_here(),
        facts={
            "owner": owner_here(),
            "task": decided.task.name,
            "device": "cuda" if decided.resources.gpus_per_worker > 0 else "cpu",
        },
    )
    return Session(
        decided=decided,
        data=data,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps_of(config, steps_per_epoch),
        store=begun.store,
        journal=begun.journal,
        reader=JournalReader(storage, config.run),
        patience=patience_of(console, begun.journal, measure=partial(_measure, coordinator)),
        generation=begun.generation,
        coordinator=coordinator,
        overseer=overseer_of(coordinator),
        zygote=zygote,
        console=console,
    )
