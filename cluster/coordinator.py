"""The coordinator, one per run. It tracks checkpoints until they are committed, tracks the ranks and where they run, coordinates stops, and
lists the ranks for Prometheus.

Pure Python and thread-safe; the driver runs it as a Ray actor with several threads. Ranks send beats (heartbeat.py), acknowledge staged
checkpoints and report bad samples. The driver starts attempts and asks for status and stops.

This is a thin shell: one lock, a log, the journal and the metrics around a State (state.py), which knows neither threads nor storage.
committer.py writes the commits, targets.py publishes the ranks, outbox.py writes the journal.

It may die anywhere. Every message that changes what it knows is in its log before it is answered, and Ray starts it again on the same node,
where it reads the log and goes on. No call does more when it comes twice. Without its log (lost, or the disk is full) it rebuilds what it
can from the run's folder: attempt, ranks and a requested stop from the journal, commits from the store, bad samples from
quarantine.jsonl. The journal then says so (`coordinator_log_lost`)."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.agent import AgentOrder, AgentReport, Payload, RankEnd
from cluster.beat import Beat, BeatReply
from cluster.commits import CheckpointNews, Committed, Staged
from cluster.committer import Committer
from cluster.failures import is_refusal
from cluster.journal import read_journal
from cluster.memory import LOG_LOST, Memory
from cluster.metrics import RUNNING, STATES, TAKEN_OVER, Metrics
from cluster.names import QUARANTINE
from cluster.outbox import Outbox
from cluster.quarantined import Quarantined, QuarantineFile
from cluster.roster import Attempt, RankInfo, RankStatus
from cluster.state import RESTART_WINDOW_SECONDS, AttemptOver, Event, State, rebuilt
from cluster.storage import RETRY_SECONDS, Storage, is_transient, open_storage
from cluster.store import Receipt, Store
from cluster.straggler import StragglerLimits
from cluster.target_list import NOTE
from cluster.targets import Discovery, ScrapeTarget, targets_of

JOURNAL_SECONDS = 10.0
"""How long a run that ends in an outage waits for the storage to take its last events."""
MOST_RESTARTS = 20
"""Restarts within RESTART_WINDOW_SECONDS after which the coordinator gives up: it dies of something that comes again."""
FIRST_READ_SECONDS = 2.0
"""Time between two tries to read the run's folder when a coordinator without a log begins in an outage."""
TICK_SECONDS = 0.001
"""Between two states of a run that came at one time."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class CoordinatorKeepsDying(RuntimeError):
    """The coordinator was started again too often in too short a time."""

    failure_kind = "infrastructure"


@dataclass(frozen=True, kw_only=True, slots=True)
class StopNews:
    """What is known about a stop."""

    reason: str | None
    """Why the run should stop; None if nobody asked."""
    at: int | None
    """The number of steps proposed to the ranks."""
    confirmed: bool
    """All ranks have promised it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What the driver sees of the run."""

    attempt: int
    world_size: int
    start_step: int
    ranks: dict[int, RankStatus]
    steps_done: int
    """Steps that every rank has done."""
    checkpoints: CheckpointNews
    stop: StopNews
    quarantined: int
    is_orphan: bool
    """The coordinator was started again and waits for adopt()."""
    reports: dict[int, AgentReport]
    """Latest reports of the current fleet's agents, by rank."""
    agent_ages: dict[int, float]
    """Seconds since those reports."""
    notices: tuple[str, ...]
    """Why nodes of the current fleet are about to go."""
    ended_ranks: frozenset[int]
    """Ranks whose processes have ended; if all have, the attempt is over."""
    stacks: frozenset[int]
    """Ranks whose stacks have arrived since they were requested."""


class Coordinator:
    """See the module. Every method may be called from any thread, and may come twice; only news(), wait_committed(), drain() and finish()
    block."""

    def __init__(
        self,
        storage_uri: str | Storage,
        run: str,
        generation: int,
        keep: int,
        metrics_host: str = "127.0.0.1",
        discovery_port: int = 0,
        storage_retry_seconds: float = RETRY_SECONDS,
        *,
        straggler: StragglerLimits | None = None,
        namespace: str = "",
        facts: Mapping[str, str] | None = None,
        log: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`namespace` and `facts` tell Prometheus whose run it is. `log`: a file in a private folder on this machine's disk, for this
        coordinator and its successors alone; None keeps none."""
        storage = storage_uri if isinstance(storage_uri, Storage) else open_storage(storage_uri, storage_retry_seconds)
        self._run, self._namespace, self._clock, self._now = run, namespace, clock, now
        self._metrics, self._exported = Metrics(run, "coordinator", 0, owner="coordinator"), dict[tuple[str, str], float]()
        self._changed = threading.Condition()  # the one lock: guards the memory
        self._memory = Memory(None if log is None else Path(log), clock=clock, now=now)
        store = Store.open(storage, run)
        took_over = self._begin(storage, store, generation, straggler or StragglerLimits(), sleep)
        self._outbox = Outbox(storage, run, f"coordinator-g{generation:04d}", untold=self._untold, told=self._told, now=now)
        self._quarantine = QuarantineFile(storage, run, content=self._bad_lines, on_problem=self._quarantine_problem, clock=clock)
        self._export_all(facts or {})
        self._discovery = Discovery(
            storage,
            run,
            metrics_host,
            discovery_port,
            self._targets,
            self._metrics.registry,
            may_move=took_over,
            note=None if log is None else Path(log).with_name(NOTE),
        )
        self._committer = Committer(
            store,
            generation,
            keep,
            on_committed=self._committed,
            on_failed=self._commit_failed,
            on_settled=self._settled,
            on_waiting=self._commit_waits,
            tell=self._tell,
            metrics=self._metrics,
            clock=clock,
            now=now,
        )
        if took_over:
            self._take_over()
        self._outbox.write()
        self._discovery.write()  # the address is a new one

    @property
    def _state(self) -> State:
        return self._memory.state

    # The driver's side

    def start_attempt(self, attempt: int, world_size: int, start_step: int, fleet: int = 0, payload: Payload | None = None) -> None:
        """Begin a new group of ranks, from a state after `start_step` steps. Messages from older ranks are ignored from now on. The agents
        of `fleet` begin it when they next ask for orders. A pause of an older attempt (request_pause) is over. AttemptOver if another
        attempt has this number or a higher one.

        Call drain() before choosing the state, so that a checkpoint in progress is not lost."""
        begun = Attempt(number=attempt, world_size=world_size, start_step=start_step, fleet=fleet)
        with self._changed:
            before = self._state.roster.attempt
            if before is None or attempt > before.number:
                self._do("begin", begun)
            elif not _is_same(before, begun):
                raise AttemptOver(
                    f"attempt={attempt} of {world_size} ranks from step {start_step} is not above the attempt before, {before.number} of "
                    f"{before.world_size} from step {before.start_step}; attempt numbers count on"
                )
            self._state.roster.adopt(attempt, fleet, payload)  # the log does not hold the payload
            self._changed.notify_all()
        self._metrics.set("workers", world_size)
        self._quarantine.flush()
        self._outbox.write()
        self._discovery.write()  # without the ranks of the previous attempt

    def adopt(self, attempt: int, world_size: int, start_step: int, fleet: int, payload: Payload) -> None:
        """Give a coordinator that was started again what it cannot know: the attempt's payload, its fleet if the log is lost, and the
        attempt itself if that had not reached the journal either. An attempt older than the newest changes nothing."""
        with self._changed:
            before = self._state.roster.attempt
            if before is None or attempt > before.number:
                self._do("begin", Attempt(number=attempt, world_size=world_size, start_step=start_step, fleet=fleet))
            self._do("adopt", attempt, fleet)
            self._state.roster.adopt(attempt, fleet, payload)
            self._changed.notify_all()

    def request_stop(self, reason: str) -> None:
        """Have all ranks stop after the same number of steps, as soon as they can agree on one, and start no new ones. The first reason
        counts."""
        self._message("request_stop", reason)

    def request_pause(self, attempt: int, reason: str) -> None:
        """Like request_stop, but for this attempt only: another one, with other workers, continues from the commit."""
        self._message("request_pause", attempt, reason)

    def ask_stacks(self, attempt: int) -> None:
        """Have every agent of the attempt send its rank's stacks to the journal. Too late for ranks that are to be killed."""
        self._message("ask_stacks", attempt)

    def kill_attempt(self, attempt: int) -> None:
        """Have every agent of the attempt kill its rank."""
        self._message("kill", attempt)

    def ends(self, attempt: int) -> dict[int, RankEnd]:
        """How the attempt's ranks ended, for those that have."""
        with self._changed:
            return self._state.roster.ends(attempt)

    def end_fleet(self, fleet: int) -> None:
        """Have the fleet's agents end."""
        self._message("end_fleet", fleet)

    def news(self, ended: int, timeout: float) -> Status:
        """The status: as soon as more than `ended` ranks of the attempt have ended, or after `timeout` seconds."""

        def is_there() -> bool:
            attempt = self._state.roster.attempt
            return attempt is None or attempt.payload is None or len(self._state.roster.ends()) > ended

        with self._changed:
            self._changed.wait_for(is_there, timeout)
        return self.status()

    def status(self) -> Status:
        status = self._status()
        self._outbox.write()  # what an answer tells, the journal has: here and below
        return status

    def _status(self) -> Status:
        with self._changed:
            state, now = self._state, self._clock()
            attempt = state.roster.attempt or Attempt(number=0, world_size=0, start_step=0)
            ranks, reports = state.roster.ranks(now), state.roster.reports()
            is_complete = len(ranks) == attempt.world_size > 0
            return Status(
                attempt=attempt.number,
                world_size=attempt.world_size,
                start_step=attempt.start_step,
                ranks=ranks,
                steps_done=min(rank.steps_done for rank in ranks.values()) if is_complete else attempt.start_step,
                checkpoints=state.commits.news(),
                stop=StopNews(reason=state.stop_reason, at=state.vote.stop_at, confirmed=state.vote.confirmed),
                quarantined=len(state.bad),
                is_orphan=attempt.number > 0 and attempt.payload is None,
                reports=reports,
                agent_ages=state.roster.agent_ages(now),
                notices=tuple(sorted({report.notice for report in reports.values() if report.notice})),
                ended_ranks=frozenset(state.roster.ends()),
                stacks=state.roster.stacks(),
            )

    def event(self, event: str, *, call_id: str = "", **fields: Any) -> None:
        """Write an event to the journal; failures are counted by their `kind`. `call_id`: made up by the caller, who may then repeat the
        call as often as it likes; without one each call counts."""
        self._message("event", call_id, event, fields)

    def account(self, seconds: Mapping[str, float]) -> None:
        """Export to Prometheus how the run's seconds were spent so far, by cause; `steps` counts the useful ones."""
        for cause, value in seconds.items():
            self._metrics.set("run_seconds", value, label=cause)
        if total := sum(seconds.values()):
            self._metrics.set("goodput_ratio", seconds.get("steps", 0.0) / total)

    def waiting_for_storage(self, seconds: float) -> None:
        """Export to Prometheus how long the storage has not answered the driver; 0 once it does."""
        self._metrics.set("storage_waiting_seconds", seconds)

    def put_result(self, attempt: int, result: dict[str, Any]) -> None:
        """What rank 0 returns at the end of the attempt. The first one counts."""
        self._message("put_result", attempt, result)

    def result(self, attempt: int) -> dict[str, Any] | None:
        """What put_result() was given; only the newest attempts' are kept."""
        with self._changed:
            return self._state.result(attempt)

    def discovery_address(self) -> str:
        """host:port of http_sd (path /sd); the coordinator's own /metrics is there too."""
        return self._discovery.address

    def targets(self) -> list[ScrapeTarget]:
        """The http_sd targets: the ranks of the current attempt and the coordinator."""
        return self._discovery.targets()

    def _targets(self, address: str) -> list[ScrapeTarget]:
        with self._changed:
            attempt, infos = self._state.roster.attempt, self._state.roster.infos()
        return targets_of(self._run, attempt.number if attempt else 0, infos, address, self._namespace)

    def last_commit(self) -> Committed | None:
        """The newest commit, including those of earlier drivers."""
        with self._changed:
            return self._state.commits.last

    def wait_committed(self, step: int, timeout: float) -> bool:
        """True once the checkpoint of `step`, or a later one, is committed; False if it failed, or after `timeout` seconds."""
        with self._changed:
            commits = self._state.commits
            self._changed.wait_for(lambda: commits.is_committed(step) or commits.is_failed(step), timeout)
            is_committed = commits.is_committed(step)
        self._outbox.write()
        return is_committed

    def drain(self, timeout: float = 60.0) -> bool:
        """Wait until every checkpoint that all ranks have acknowledged is committed or failed; False after `timeout` seconds."""
        self._quarantine.flush()
        with self._changed:
            done = self._changed.wait_for(lambda: self._state.commits.in_hand == 0, timeout)
        self._outbox.write()
        return done

    def ended(self, state: str) -> float:
        """The run has come to its end, one of metrics.ENDS. Returns for how many seconds at most finish() will wait until Prometheus has
        read that; 0 where none reads this run."""
        self._enter(state)
        return self._discovery.mark()

    def finish(self, timeout: float = 60.0) -> bool:
        """drain(), then close(), with all events written to the journal, and all processes off the list that Prometheus reads. If one reads
        this run, it is waited for: first until it has read the last values, then until it has read the empty list."""
        done = self.drain(timeout)
        self._outbox.flush(JOURNAL_SECONDS)
        self._discovery.retire()
        self.close()
        return done

    def close(self) -> None:
        """End the server and the threads; a checkpoint that is not yet committed stays uncommitted."""
        if self._committer.close():
            self._quarantine.close()
            self._outbox.close()
            self._discovery.close()
            with self._changed:
                self._memory.close()

    # The agents' side

    def order(self, fleet: int, rank: int, report: AgentReport, beat: Beat | None = None) -> AgentOrder:
        """What this rank's agent should do now. `beat`: a beat of its rank, which the order answers."""
        with self._changed:
            order = self._state.roster.order(fleet, rank, report, self._clock())
        return order if beat is None else replace(order, reply=self.beat(beat))

    def rank_ended(self, attempt: int, rank: int, end: RankEnd) -> None:
        """A rank's process has ended. If it failed, the others cannot continue and are killed."""
        if self._message("rank_ended", attempt, rank, end):
            self._discovery.write()

    def stacks(self, attempt: int, rank: int, text: str) -> None:
        """A rank's stacks, as requested."""
        self._message("told_stacks", attempt, rank, text)

    # The ranks' side

    def publish(self, attempt: int, key: str, value: Any) -> None:
        """Publish a value for the other ranks of the attempt. The first one for a key counts."""
        self._message("publish", attempt, key, value)

    def lookup(self, attempt: int, key: str) -> Any:
        """The value that a rank of the attempt published; None if nothing yet."""
        with self._changed:
            return self._state.roster.lookup(attempt, key)

    def register(self, attempt: int, rank: int, info: RankInfo) -> None:
        """A rank is up: from now on Prometheus scrapes it."""
        if self._message("register", attempt, rank, info, self._clock()):
            self._discovery.write()

    def beat(self, beat: Beat) -> BeatReply:
        """Take in a rank's position and its promised stop, if any; the reply holds the stop proposed to all."""
        with self._changed:
            heard = self._state.roster.hear(beat, self._clock())
            if heard is None:
                return BeatReply(stop_at=None, confirmed=False)
            vote = self._state.vote
            before = vote.agreement if vote.requested else None
            reply = vote.hear(beat.rank, beat.steps_begun, beat.promised_stop)
            if vote.requested and (now := vote.agreement) != before:
                self._do("agree", now)  # a beat is logged only where the agreement gets on
        self._metrics.set("straggler_skew_ratio", heard.skew)
        if heard.straggler is not None:
            self._message("straggler", beat.attempt, heard.straggler)
        return reply

    def ack(self, attempt: int, rank: int, step: int, receipts: Iterable[Receipt], meta: Mapping[str, Any] | None = None) -> None:
        """A rank has staged its files of the checkpoint after `step` steps. Once all ranks of the attempt have, the checkpoint is
        committed in the background, with the ranks' metas merged. An ack of an older attempt is ignored."""
        with self._changed:
            staged = self._do("ack", attempt, rank, step, list(receipts), dict(meta or {}))
            if staged is not None:
                self._committer.put(staged)  # under the lock, to keep the order in which they became complete

    def fail_checkpoint(self, attempt: int, rank: int, step: int, message: str, is_refused: bool = False) -> None:
        """A rank could not stage its part (disk full): this checkpoint fails; training continues with the previous one. `is_refused`: the
        storage would refuse it again."""
        self._message("fail_checkpoint", attempt, rank, step, message, is_refused)

    def quarantine(self, records: list[dict[str, Any]]) -> int:
        """Record samples that could not be read: {"key", "reason", "split", "sample_id"}. New ones go into quarantine.jsonl and the
        journal. Returns the number of distinct ones over all ranks and attempts; the limits apply to that number."""
        with self._changed:
            new = self._do("quarantine", records) if records else []
            count = len(self._state.bad)
        if new:
            self._metrics.set("run_quarantined_samples", count)
            self._quarantine.added(count)
            self._outbox.write()
        return count

    # The committer's side

    def _committed(self, staged: Staged, time: float, fields: dict[str, Any]) -> None:
        self._message("committed", (staged.attempt, staged.step), time, fields)

    def _commit_failed(self, staged: Staged, kind: str, error: Exception) -> None:
        self._message("commit_failed", (staged.attempt, staged.step), kind, str(error), is_refusal(error))

    def _settled(self, staged: Staged) -> None:
        self._message("settled", (staged.attempt, staged.step))

    def _commit_waits(self, problem: str) -> None:
        with self._changed:
            self._state.commits.waits(problem)

    # The state and its log

    def _message(self, message: str, *arguments: Any) -> Any:
        """Apply a message to the state, log it, and write what it gave the journal. Returns its result."""
        with self._changed:
            result = self._do(message, *arguments)
            self._changed.notify_all()
        self._outbox.write()
        return result

    def _do(self, message: str, *arguments: Any) -> Any:
        """The part of _message() under the lock."""
        result = self._memory.do(message, *arguments)
        for (name, label), count in self._state.counts.items():
            if (new := count - self._exported.get((name, label), 0)) > 0:
                self._metrics.add(name, new, label)
                self._exported[name, label] = count
        return result

    def _begin(self, storage: Storage, store: Store, generation: int, limits: StragglerLimits, sleep: Callable[[float], None]) -> bool:
        """Find the state to begin with. Returns whether another coordinator of this generation had it before."""
        has_log, problem = self._memory.take_up()
        if has_log:
            return True
        state = _patiently(lambda: _rebuilt(storage, store, self._run, generation, limits), sleep)
        self._memory.begin(state)
        if state.roster.attempt is None:
            return False
        fields = {"attempt": state.roster.attempt.number, "message": f"rebuilt from the run's folder: {problem}"}
        state.apply(self._now(), "say", (LOG_LOST, fields))
        return True

    def _take_over(self) -> None:
        """Go on where another coordinator died."""
        with self._changed:
            self._state.roster.taken_over(self._clock())
            self._do("restarted")
            if self._discovery.problem:  # somebody took the port of the dead one; that must not end the run
                self._do("say", "discovery_moved", {"address": self._discovery.address, "message": self._discovery.problem})
            restarts = len(self._state.restarts)
            for staged in self._state.commits.left_over():
                self._committer.put(staged)
            count = len(self._state.bad)
        self._quarantine.taken_over(count)
        if restarts > MOST_RESTARTS:
            self.close()
            raise CoordinatorKeepsDying(
                f"the coordinator of run {self._run!r} was started again {restarts} times within {RESTART_WINDOW_SECONDS / 60:g} minutes; "
                "see its errors (--verbose), then give the same command again"
            )

    # What the parts ask

    def _untold(self, serial: int) -> Sequence[Event]:
        with self._changed:
            return self._state.untold_after(serial)

    def _told(self, serial: int) -> None:
        with self._changed:
            self._do("told", serial)

    def _tell(self, event: str, **fields: Any) -> None:
        self._message("say", event, fields)

    def _bad_lines(self, since: int) -> tuple[int, bytes]:
        with self._changed:
            return len(self._state.bad), self._state.bad.to_lines(since)

    def _quarantine_problem(self, message: str) -> None:
        self._tell("quarantine_not_written", message=message)

    def _enter(self, state: str) -> None:
        """Export that the run is in this state now."""
        for each in STATES:
            self._metrics.set("run_state", float(each == state), label=each)
        now = self._now()
        if state == RUNNING:
            self._running_since = now
        # The run itself goes on, elsewhere, since before this is noticed: its newest state is the other coordinator's.
        self._metrics.set("run_state_time_seconds", self._running_since + TICK_SECONDS if state == TAKEN_OVER else now, label=state)

    def _export_all(self, facts: Mapping[str, str]) -> None:
        """Metrics from what is known at the beginning; counters continue from those of a dead coordinator."""
        state, attempt, last = self._state, self._state.roster.attempt, self._state.commits.last
        self._metrics.describe("run_info", facts)
        self._enter(RUNNING)
        self._metrics.set("run_quarantined_samples", len(state.bad))
        if attempt is not None:
            self._metrics.set("workers", attempt.world_size)
        if last is not None:
            self._metrics.set("checkpoint_commit_step", last.step)
            self._metrics.set("checkpoint_commit_time_seconds", last.time)


class CoordinatorActor(Coordinator):
    """The coordinator as an actor. Ray names its process after this class."""


def _rebuilt(storage: Storage, store: Store, run: str, generation: int, limits: StragglerLimits) -> State:
    path = f"{run}/{QUARANTINE}"
    return rebuilt(
        generation,
        limits,
        commits=[Committed(step=commit.step, time=commit.modified) for commit in store.commits()],
        quarantined=Quarantined.from_lines(storage.read(path) if storage.exists(path) else b""),
        journal=read_journal(storage, run),
    )


def _patiently(read: Callable[[], T], sleep: Callable[[float], None]) -> T:
    """`read()`, again and again while the storage does not answer. Callers wait meanwhile: whatever they were told now would be wrong."""
    while True:
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
            logger.warning("the coordinator waits for the storage: %s", error)
            sleep(FIRST_READ_SECONDS)


def _is_same(begun: Attempt, again: Attempt) -> bool:
    """Whether start_attempt() came a second time. A coordinator that was rebuilt from the journal does not know the fleet."""
    known = (begun.number, begun.world_size, begun.start_step)
    return known == (again.number, again.world_size, again.start_step) and (begun.fleet == again.fleet or begun.payload is None)
