"""The coordinator, one per run. It tracks checkpoints until they are committed, tracks the ranks and where they run, coordinates stops, and
lists the ranks for Prometheus.

Pure Python and thread-safe; the driver runs it as a Ray actor with several threads. Ranks send beats (heartbeat.py), acknowledge staged
checkpoints and report bad samples. The driver starts attempts and asks for status and stops.

This is a thin shell: one lock, the journal and the metrics around parts that know neither threads nor storage: roster.py (who takes
part), commits.py (which checkpoints are complete), stop.py (the common stop), quarantined.py (bad samples). committer.py writes the
commits, targets.py publishes the ranks. The coordinator can rebuild all its state from the run's folder: attempt, ranks and a requested
stop from the journal, commits from the store, bad samples from quarantine.jsonl."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.agent import AgentOrder, AgentReport, Payload, RankEnd
from cluster.beat import Beat, BeatReply
from cluster.commits import CheckpointNews, Commits, Committed, Staged
from cluster.committer import FENCED, Committer
from cluster.journal import Journal, read_journal
from cluster.metrics import OTHER, Metrics
from cluster.names import QUARANTINE
from cluster.quarantined import Quarantined
from cluster.roster import Attempt, RankInfo, RankStatus, Roster
from cluster.stop import StopVote
from cluster.storage import RETRY_SECONDS, Storage, open_storage
from cluster.store import Receipt, Store
from cluster.straggler import Straggler, StragglerLimits
from cluster.targets import Discovery, ScrapeTarget, targets_of

JOURNAL_SECONDS = 10.0
"""How long a run that ends in an outage waits for the storage to take its last events."""


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
    """The coordinator was rebuilt from the journal and waits for adopt()."""
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


class _Endings:
    """Counts failures, and restarts by what ended the attempt before."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._newest = metrics, OTHER

    def take(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take in a journal event, if it says how an attempt ended."""
        if event in ("attempt_failed", "attempt_paused"):
            self._newest = str(fields.get("kind", OTHER))
        if event == "attempt_failed":
            self._metrics.add("failures_total", label=self._newest)

    def restarted(self) -> None:
        """An attempt begins after another one."""
        self._metrics.add("restarts_total", label=self._newest)
        if self._newest == "numbers":
            self._metrics.add("rollbacks_total")
        self._newest = OTHER


class Coordinator:
    """See the module. Every method may be called from any thread; only news(), wait_committed(), drain() and finish() block."""

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
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage_uri if isinstance(storage_uri, Storage) else open_storage(storage_uri, storage_retry_seconds)
        self._run, self._generation, self._clock = run, generation, clock
        self._store = Store.open(self._storage, run)
        self._journal = Journal.open(self._storage, run, f"coordinator-g{generation:04d}", now)
        self._metrics = Metrics(run, "coordinator", 0, owner="coordinator")
        self._endings = _Endings(self._metrics)
        self._changed = threading.Condition()  # the one lock: guards roster, commits, vote, reason and bad samples
        self._roster = Roster(straggler or StragglerLimits())
        self._commits = Commits(self._newest_commit())
        self._vote = StopVote(0)
        self._stop_reason: str | None = None
        self._bad = self._read_quarantine()
        self._writing_quarantine = threading.Lock()
        self._metrics.set("run_quarantined_samples", len(self._bad))
        self._rebuild()
        self._discovery = Discovery(self._storage, run, metrics_host, discovery_port, self.targets, self._metrics.registry)
        self._committer = Committer(
            self._store,
            generation,
            keep,
            on_committed=self._committed,
            on_failed=self._commit_failed,
            on_settled=self._settled,
            journal=self._journal,
            metrics=self._metrics,
            clock=clock,
            now=now,
        )
        self._discovery.write()  # a rebuilt coordinator has a new address

    # The driver's side

    def start_attempt(self, attempt: int, world_size: int, start_step: int, fleet: int = 0, payload: Payload | None = None) -> None:
        """Begin a new group of ranks, from a state after `start_step` steps. Messages from older ranks are ignored from now on. The agents
        of `fleet` begin it when they next ask for orders. A pause of an older attempt (request_pause) is over.

        Call drain() before choosing the state, so that a checkpoint in progress is not lost."""
        # Newer commits were found bad, or rolled back, so they do not count for wait_committed().
        last = self._newest_commit(up_to=start_step)
        begun = Attempt(number=attempt, world_size=world_size, start_step=start_step, fleet=fleet, payload=payload)
        with self._changed:
            before = self._roster.attempt
            if before is not None and attempt <= before.number:
                raise ValueError(f"attempt={attempt} is not above the attempt before, {before.number}; attempt numbers count on")
            self._begin(begun, last)
            self._changed.notify_all()
        if before is not None:
            self._endings.restarted()
        self._metrics.set("workers", world_size)
        self._journal.write("attempt_started", attempt=attempt, workers=world_size, start_step=start_step, generation=self._generation)
        self._discovery.write()  # without the ranks of the previous attempt

    def adopt(self, attempt: int, fleet: int, payload: Payload) -> None:
        """Give a coordinator that was rebuilt from the journal what the journal does not hold: the attempt's fleet and payload."""
        with self._changed:
            self._roster.adopt(attempt, fleet, payload)

    def request_stop(self, reason: str) -> None:
        """Have all ranks stop after the same number of steps, as soon as they can agree on one, and start no new ones. The first reason
        counts."""
        with self._changed:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            self._vote.request()
        self._journal.write("stop_requested", reason=reason, generation=self._generation)

    def request_pause(self, attempt: int, reason: str) -> None:
        """Like request_stop, but for this attempt only: another one, with other workers, continues from the commit."""
        with self._changed:
            if not self._roster.is_current(attempt) or self._vote.requested:
                return
            self._vote.request()
        self._journal.write("pause_requested", attempt=attempt, reason=reason)

    def ask_stacks(self, attempt: int) -> None:
        """Have every agent of the attempt send its rank's stacks to the journal."""
        with self._changed:
            self._roster.ask_stacks(attempt)

    def kill_attempt(self, attempt: int) -> None:
        """Have every agent of the attempt kill its rank."""
        with self._changed:
            self._roster.kill(attempt)

    def ends(self, attempt: int) -> dict[int, RankEnd]:
        """How the attempt's ranks ended, for those that have."""
        with self._changed:
            return self._roster.ends(attempt)

    def end_fleet(self, fleet: int) -> None:
        """Have the fleet's agents end."""
        with self._changed:
            self._roster.end_fleet(fleet)

    def news(self, ended: int, timeout: float) -> Status:
        """The status: as soon as more than `ended` ranks of the attempt have ended, or after `timeout` seconds."""

        def is_there() -> bool:
            attempt = self._roster.attempt
            return attempt is None or attempt.payload is None or len(self._roster.ends()) > ended

        with self._changed:
            self._changed.wait_for(is_there, timeout)
        return self.status()

    def status(self) -> Status:
        with self._changed:
            now = self._clock()
            attempt = self._roster.attempt or Attempt(number=0, world_size=0, start_step=0)
            ranks, reports = self._roster.ranks(now), self._roster.reports()
            is_complete = len(ranks) == attempt.world_size > 0
            return Status(
                attempt=attempt.number,
                world_size=attempt.world_size,
                start_step=attempt.start_step,
                ranks=ranks,
                steps_done=min(rank.steps_done for rank in ranks.values()) if is_complete else attempt.start_step,
                checkpoints=self._commits.news(),
                stop=StopNews(reason=self._stop_reason, at=self._vote.stop_at, confirmed=self._vote.confirmed),
                quarantined=len(self._bad),
                is_orphan=attempt.number > 0 and attempt.payload is None,
                reports=reports,
                agent_ages=self._roster.agent_ages(now),
                notices=tuple(sorted({report.notice for report in reports.values() if report.notice})),
                ended_ranks=frozenset(self._roster.ends()),
                stacks=self._roster.stacks(),
            )

    def event(self, event: str, **fields: Any) -> None:
        """Write an event to the journal; failures are counted by their `kind`."""
        self._endings.take(event, fields)
        self._journal.write(event, **fields)

    def account(self, seconds: Mapping[str, float]) -> None:
        """Export to Prometheus how the run's seconds were spent so far, by cause; `steps` counts the useful ones."""
        for cause, value in seconds.items():
            self._metrics.set("run_seconds", value, label=cause)
        if total := sum(seconds.values()):
            self._metrics.set("goodput_ratio", seconds.get("steps", 0.0) / total)

    def waiting_for_storage(self, seconds: float) -> None:
        """Export to Prometheus how long the storage has not answered the driver; 0 once it does."""
        self._metrics.set("storage_waiting_seconds", seconds)

    def discovery_address(self) -> str:
        """host:port of http_sd (path /sd); the coordinator's own /metrics is there too."""
        return self._discovery.address

    def targets(self) -> list[ScrapeTarget]:
        """The http_sd targets: the ranks of the current attempt and the coordinator."""
        with self._changed:
            attempt, infos = self._roster.attempt, self._roster.infos()
        return targets_of(self._run, attempt.number if attempt else 0, infos, self._discovery.address)

    def last_commit(self) -> Committed | None:
        """The newest commit, including those of earlier drivers."""
        with self._changed:
            return self._commits.last

    def wait_committed(self, step: int, timeout: float) -> bool:
        """True once the checkpoint of `step`, or a later one, is committed; False if it failed, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._commits.is_committed(step) or self._commits.is_failed(step), timeout)
            return self._commits.is_committed(step)

    def drain(self, timeout: float = 60.0) -> bool:
        """Wait until every checkpoint that all ranks have acknowledged is committed or failed; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._commits.in_hand == 0, timeout)

    def finish(self, timeout: float = 60.0) -> bool:
        """drain(), then close(), with all events written to the journal."""
        done = self.drain(timeout)
        self._journal.flush(JOURNAL_SECONDS)
        self.close()
        return done

    def close(self) -> None:
        """End the server and the threads; a checkpoint that is not yet committed stays uncommitted."""
        if self._committer.close():
            self._discovery.close()

    # The agents' side

    def order(self, fleet: int, rank: int, report: AgentReport, beat: Beat | None = None) -> AgentOrder:
        """What this rank's agent should do now. `beat`: a beat of its rank, which the order answers."""
        with self._changed:
            order = self._roster.order(fleet, rank, report, self._clock())
        return order if beat is None else replace(order, reply=self.beat(beat))

    def rank_ended(self, attempt: int, rank: int, end: RankEnd) -> None:
        """A rank's process has ended. If it failed, the others cannot continue and are killed."""
        with self._changed:
            if not self._roster.ended(attempt, rank, end):
                return
            self._changed.notify_all()
        self._discovery.write()

    def stacks(self, attempt: int, rank: int, text: str) -> None:
        """A rank's stacks, as requested."""
        self._journal.write("stacks", attempt=attempt, rank=rank, text=text)
        with self._changed:
            self._roster.told_stacks(attempt, rank)

    # The ranks' side

    def publish(self, attempt: int, key: str, value: Any) -> None:
        """Publish a value for the other ranks of the attempt."""
        with self._changed:
            self._roster.publish(attempt, key, value)

    def lookup(self, attempt: int, key: str) -> Any:
        """The value that a rank of the attempt published; None if nothing yet."""
        with self._changed:
            return self._roster.lookup(attempt, key)

    def register(self, attempt: int, rank: int, info: RankInfo) -> None:
        """A rank is up: from now on Prometheus scrapes it."""
        with self._changed:
            if not self._roster.register(attempt, rank, info, self._clock()):
                return
        self._journal.write(
            "worker_registered",
            attempt=attempt,
            rank=rank,
            host=info.host,
            pid=info.pid,
            node_id=info.node_id,
            metrics_address=info.metrics_address,
        )
        self._discovery.write()

    def beat(self, beat: Beat) -> BeatReply:
        """Take in a rank's position and its promised stop, if any; the reply holds the stop proposed to all."""
        with self._changed:
            heard = self._roster.hear(beat, self._clock())
            if heard is None:
                return BeatReply(stop_at=None, confirmed=False)
            reply = self._vote.hear(beat.rank, beat.steps_begun, beat.promised_stop)
        self._metrics.set("straggler_skew_ratio", heard.skew)
        if heard.straggler is not None:
            self._write_straggler(beat.attempt, heard.straggler)
        return reply

    def ack(self, attempt: int, rank: int, step: int, receipts: Iterable[Receipt], meta: Mapping[str, Any] | None = None) -> None:
        """A rank has staged its files of the checkpoint after `step` steps. Once all ranks of the attempt have, the checkpoint is
        committed in the background, with the ranks' metas merged. An ack of an older attempt is ignored."""
        with self._changed:
            staged = self._commits.ack(attempt, rank, step, receipts, meta or {})
            if staged is not None:
                self._committer.put(staged)  # under the lock, to keep the order in which they became complete

    def fail_checkpoint(self, attempt: int, rank: int, step: int, message: str) -> None:
        """A rank could not stage its part (disk full): this checkpoint fails; training continues with the previous one."""
        with self._changed:
            if not self._commits.withdraw(attempt, step):
                return
        self._checkpoint_failed(attempt, step, message, rank=rank)

    def quarantine(self, records: list[dict[str, Any]]) -> int:
        """Record samples that could not be read: {"key", "reason", "split", "sample_id"}. New ones go into quarantine.jsonl and the
        journal. Returns the number of distinct ones over all ranks and attempts; the limits apply to that number."""
        with self._changed:
            new, count = self._bad.add(records), len(self._bad)
        if new:
            self._write_quarantine()
        for record in new:
            self._journal.write("sample_quarantined", **record)
        return count

    # The committer's side

    def _committed(self, staged: Staged, time: float) -> None:
        with self._changed:
            self._commits.committed(staged.attempt, staged.step, time)
            self._changed.notify_all()

    def _commit_failed(self, staged: Staged, kind: str, message: str) -> None:
        self._checkpoint_failed(staged.attempt, staged.step, message, kind=kind)
        if kind == FENCED:
            self.request_stop(message)

    def _settled(self) -> None:
        with self._changed:
            self._commits.settled()
            self._changed.notify_all()

    # Inside

    def _begin(self, attempt: Attempt, last: Committed | None) -> None:
        self._roster.begin(attempt)
        self._commits.begin(attempt.number, attempt.world_size, last)
        self._vote = StopVote(attempt.world_size, requested=self._stop_reason is not None)

    def _checkpoint_failed(self, attempt: int, step: int, message: str, **fields: Any) -> None:
        self._journal.write("checkpoint_failed", attempt=attempt, step=step, message=message, **fields)
        with self._changed:
            is_new = self._commits.failed(attempt, step, message)
            self._changed.notify_all()
        if is_new:
            self._metrics.add("checkpoint_failures_total")

    def _newest_commit(self, up_to: int | None = None) -> Committed | None:
        """The newest commit in the store, after at most `up_to` steps."""
        commits = (commit for commit in self._store.commits() if up_to is None or commit.step <= up_to)
        return next((Committed(step=commit.step, time=commit.modified) for commit in commits), None)

    def _write_straggler(self, attempt: int, straggler: Straggler) -> None:
        self._journal.write(
            "straggler" if straggler.begins else "straggler_recovered",
            attempt=attempt,
            rank=straggler.rank,
            step=straggler.steps_done,
            own_seconds=straggler.own_seconds,
            others_seconds=straggler.others_seconds,
        )

    def _read_quarantine(self) -> Quarantined:
        path = f"{self._run}/{QUARANTINE}"
        return Quarantined.from_lines(self._storage.read(path) if self._storage.exists(path) else b"")

    def _write_quarantine(self) -> None:
        with self._writing_quarantine:
            with self._changed:  # under the lock, so that the last write holds the newest records
                lines, count = self._bad.to_lines(), len(self._bad)
            self._metrics.set("run_quarantined_samples", count)
            try:
                self._storage.without_retries().write_atomic(f"{self._run}/{QUARANTINE}", lines)
            except OSError as error:  # the next write contains all of them again, and so does the journal
                self._journal.write("quarantine_not_written", message=str(error))

    def _rebuild(self) -> None:
        """Take over from a coordinator of this generation that died: read its attempt, ranks and requested stop from the journal."""
        last = self._commits.last
        for event in read_journal(self._storage, self._run):
            match event:
                case {"event": "attempt_started", "generation": self._generation, "attempt": int(), "workers": int(), "start_step": int()}:
                    if self._roster.attempt is not None:
                        self._endings.restarted()
                    self._begin(Attempt(number=event["attempt"], world_size=event["workers"], start_step=event["start_step"]), last)
                case {"event": "stop_requested", "generation": self._generation}:
                    self._stop_reason = str(event["reason"])
                    self._vote.request()
                case {"event": "attempt_failed" | "attempt_paused"} if self._roster.attempt is not None:
                    self._endings.take(event["event"], event)  # counters continue from the dead coordinator's
                case {"event": "worker_registered"} if self._roster.is_current(event["attempt"]):
                    info = RankInfo(
                        host=event["host"], pid=event["pid"], node_id=event["node_id"], metrics_address=event["metrics_address"]
                    )
                    self._roster.register(event["attempt"], event["rank"], info, self._clock())
        if (attempt := self._roster.attempt) is not None:
            self._metrics.set("workers", attempt.world_size)
        if last is not None:
            self._metrics.set("checkpoint_commit_step", last.step)
            self._metrics.set("checkpoint_commit_time_seconds", last.time)


class CoordinatorActor(Coordinator):
    """The coordinator, plus a place for what the ranks return at the end of an attempt. Ray names its process after this class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._results: dict[int, dict[str, Any]] = {}

    def put_result(self, attempt: int, result: dict[str, Any]) -> None:
        self._results[attempt] = result

    def result(self, attempt: int) -> dict[str, Any] | None:
        return self._results.get(attempt)
