"""One per run: a checkpoint's way pending -> acked -> committed, who is alive and where, when to stop, where Prometheus finds the ranks.

Pure Python and thread-safe; the driver runs it as a Ray actor with several threads. Ranks beat (see heartbeat), ack what they staged and
hand in bad samples; the driver starts attempts, asks for status and for stops. It holds nothing that it cannot rebuild from the run's
folder: attempt, ranks and a requested stop from the journal, commits from the store, bad samples from quarantine.jsonl."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.agent import POLLS_A_SECOND, Order, Payload, RankEnd, Report
from cluster.exporter import serve_discovery, write_file_sd
from cluster.heartbeat import AGAIN_SECONDS, Orders
from cluster.journal import Journal, read_journal
from cluster.metrics import OTHER, Metrics
from cluster.storage import RETRY_SECONDS, Storage, StorageOutage, open_storage
from cluster.store import Commit, Fenced, Receipt, StorageFull, Store
from cluster.straggler import StragglerWatch

QUARANTINE = "quarantine.jsonl"
FILE_SD = "prometheus-targets.json"
COMMIT_PAUSE_SECONDS = 1.0
"""Between two tries to commit in an outage, each of which has its own waits (storage.Retry)."""
COMMITS_WAITING = 2
"""Checkpoints that may wait behind the one that is tried; with more of them it is given up."""
JOURNAL_SECONDS = 10.0
"""A run that ends in an outage waits for so long for the storage to take its last events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """Where a rank runs."""

    host: str
    pid: int
    node_id: str
    metrics_address: str
    """host:port of its /metrics, empty if it serves none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatus:
    """What is known of a rank."""

    steps_done: int
    stats: dict[str, float]
    age_seconds: float
    """Time since its last beat."""
    info: RankInfo | None
    pulse: Mapping[str, int | str]
    """What it was doing: heartbeat.Heartbeat says what is in it."""
    report: Report | None
    """What its agent last said of its process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What the driver's progress line shows."""

    attempt: int
    world_size: int
    start_step: int
    ranks: dict[int, RankStatus]
    steps_done: int
    """Steps that every rank has done."""
    stats_sum: dict[str, float]
    """Over the ranks that said it: images_per_second adds up."""
    stats_mean: dict[str, float]
    """Over the ranks that said it: a loss does not."""
    last_commit_step: int | None
    last_commit_time: float | None
    failed_checkpoints: int
    checkpoint_problem: str
    """Why the newest one of them failed; "" if none did."""
    failed_steps: frozenset[int]
    """Of the attempt: steps whose checkpoints will not be."""
    stop_reason: str | None
    stop_at: int | None
    stop_confirmed: bool
    quarantined: int
    is_orphan: bool
    """The coordinator took up from the journal, and waits for adopt()."""
    reports: dict[int, Report]
    """What the agents of the current fleet last said, by rank."""
    agent_ages: dict[int, float]
    """Seconds since they did."""
    notices: tuple[str, ...]
    """Why nodes of the current fleet are about to go."""
    ended_ranks: frozenset[int]
    """Ranks whose processes have ended; all of them: the attempt is over."""
    stacks: frozenset[int]
    """Ranks whose stacks have come in since they were asked for."""


class StopVote:
    """Agreement on a number of steps after which all ranks stop, with no synchronisation a step. No thread, no clock.

    A proposal is ahead of every step begun. A rank promises it (`seen_stop`) if it has not begun that step, and then waits there.
    Confirmed once all have promised. A rank that was faster says so by `steps_begun`, and a later proposal takes the place of the first;
    the margin doubles, or is what that rank has begun since its beat before, so that slow beats and fast steps meet. Meanwhile ranks beat
    as often as they may. The ranks themselves are at most one step apart, as each step has a collective."""

    def __init__(self, ranks: int, margin: int = 2) -> None:
        self._ranks, self._margin = ranks, margin
        self._begun: dict[int, int] = {}
        self._promised: dict[int, int] = {}
        self.requested = False
        self.stop_at: int | None = None
        self.confirmed = False

    def hear(self, rank: int, steps_begun: int, seen_stop: int | None) -> Orders:
        stride = steps_begun - self._begun.get(rank, steps_begun)
        self._begun[rank] = max(steps_begun, self._begun.get(rank, 0))
        self._promised[rank] = max(seen_stop or 0, self._promised.get(rank, 0))
        if self.requested and not self.confirmed and len(self._begun) == self._ranks:
            self._decide(max(self._begun.values()), max(self._promised.values()), stride)
        again = max(AGAIN_SECONDS, self._ranks / POLLS_A_SECOND) if self.requested and not self.confirmed else None
        return Orders(stop_at=self.stop_at, confirmed=self.confirmed, again_seconds=again)

    def _decide(self, begun: int, promised: int, stride: int) -> None:
        if self.stop_at is None and promised >= begun:
            self.stop_at = promised  # a coordinator before this one proposed it, and some ranks wait there
        elif self.stop_at is None or begun > self.stop_at:
            if self.stop_at is not None:
                self._margin = max(2 * self._margin, stride + 1)
            self.stop_at = begun + self._margin
        self.confirmed = all(promise == self.stop_at for promise in self._promised.values())


@dataclass(kw_only=True, slots=True)
class _Attempt:
    """The current attempt; what is known of it is volatile, what was decided is in the journal."""

    number: int
    world_size: int
    start_step: int
    vote: StopVote
    stragglers: StragglerWatch
    infos: dict[int, RankInfo] = field(default_factory=dict)
    steps_done: dict[int, int] = field(default_factory=dict)
    stats: dict[int, dict[str, float]] = field(default_factory=dict)
    heard_at: dict[int, float] = field(default_factory=dict)
    pulses: dict[int, dict[str, int | str]] = field(default_factory=dict)
    fleet: int = 0
    payload: Payload | None = None
    command: Literal["run", "stacks", "kill"] = "run"
    ends: dict[int, RankEnd] = field(default_factory=dict)
    stacks: set[int] = field(default_factory=set)
    board: dict[str, Any] = field(default_factory=dict)
    """What ranks publish for each other."""
    acks: dict[int, dict[int, list[Receipt]]] = field(default_factory=dict)
    """step -> rank -> what it staged"""
    metas: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed_steps: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """A checkpoint that all ranks have staged."""

    attempt: int
    step: int
    receipts: Sequence[Receipt]
    meta: Mapping[str, Any]


class Coordinator:
    """See the module. Every method may be called from any thread; only news(), wait_committed(), drain() and finish() wait."""

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
        straggler: tuple[float, int] = (1.5, 20),
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage_uri if isinstance(storage_uri, Storage) else open_storage(storage_uri, storage_retry_seconds)
        self._run, self._generation, self._keep, self._clock, self._now = run, generation, keep, clock, now
        self._store = Store.open(self._storage, run)
        self._journal = Journal.open(self._storage, run, f"coordinator-g{generation:04d}", now)
        self._metrics = Metrics(run, "coordinator", 0, owner="coordinator")
        self._straggler = straggler  # ratio, steps in a row: see StragglerWatch
        self._changed = threading.Condition()
        self._attempt: _Attempt | None = None
        self._reports: dict[tuple[int, int], tuple[Report, float]] = {}  # (fleet, rank) -> its agent's last report, and when
        self._over: set[int] = set()  # fleets that are to end
        self._stop_reason: str | None = None
        self._failed_checkpoints = 0
        self._checkpoint_problem = ""
        self._ended_by = OTHER
        """What ended the newest attempt, by its event's kind."""
        commits = self._store.commits()
        self._last_commit = (commits[0].step, commits[0].modified) if commits else None
        self._quarantine_lock = threading.Lock()
        self._bad = _read_quarantine(self._storage, run)
        self._metrics.set("run_quarantined_samples", len(self._bad))
        self._rebuild()
        self._server = serve_discovery(metrics_host, discovery_port, self.targets, self._metrics.registry)
        self._writing_targets = threading.Lock()
        self._closed = threading.Event()
        self._work: queue.Queue[_Work | None] = queue.Queue()
        self._pending = 0
        self._committer = threading.Thread(target=self._commit_all, name="committer", daemon=True)
        self._committer.start()
        self._write_targets()  # one that took up has an address of its own

    # The driver's side

    def start_attempt(self, attempt: int, world_size: int, start_step: int, fleet: int = 0, payload: Payload | None = None) -> None:
        """A new group of ranks, from a state after `start_step` steps; whatever older ranks still say is ignored from here on. The agents
        of `fleet` begin it when they next ask for orders. A stop asked of an older attempt to change the workers is over.

        Call drain() before choosing the state, so that a checkpoint on its way is not lost."""
        commits = self._store.commits()
        with self._changed:
            if self._attempt is not None and attempt <= self._attempt.number:
                raise ValueError(f"attempt={attempt} is not above the attempt before, {self._attempt.number}; attempt numbers count on")
            restarted = self._attempt is not None
            self._attempt = self._new_attempt(attempt, world_size, start_step)
            self._attempt.fleet, self._attempt.payload = fleet, payload
            self._reports = {key: known for key, known in self._reports.items() if key[0] >= fleet}
            # Newer ones were found bad, or rolled back: they are no answer to wait_committed().
            self._last_commit = next(((commit.step, commit.modified) for commit in commits if commit.step <= start_step), None)
            self._changed.notify_all()
        if restarted:
            self._count_restart()
        self._metrics.set("workers", world_size)
        self._journal.write("attempt_started", attempt=attempt, workers=world_size, start_step=start_step, generation=self._generation)
        self._write_targets()  # without those of the attempt before

    def adopt(self, attempt: int, fleet: int, payload: Payload) -> None:
        """Tell a coordinator that took up from the journal what it cannot read there: whom the attempt's agents belong to, and its task."""
        with self._changed:
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.fleet, self._attempt.payload = fleet, payload

    def request_stop(self, reason: str) -> None:
        """Have all ranks stop after the same number of steps, as soon as they can agree on one, and start no more. The first reason
        counts."""
        with self._changed:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            if self._attempt is not None:
                self._attempt.vote.requested = True
        self._journal.write("stop_requested", reason=reason, generation=self._generation)

    def request_pause(self, attempt: int, reason: str) -> None:
        """As request_stop, but for this attempt alone: another one, with other workers, goes on from the commit."""
        with self._changed:
            if not self._is_current(attempt):
                return
            assert self._attempt is not None
            if self._attempt.vote.requested:
                return
            self._attempt.vote.requested = True
        self._journal.write("pause_requested", attempt=attempt, reason=reason)

    def ask_stacks(self, attempt: int) -> None:
        """Have every agent of the attempt send the stacks of its rank, into the journal."""
        with self._changed:
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.command = "stacks"
                self._attempt.stacks.clear()

    def kill_attempt(self, attempt: int) -> None:
        """Have every agent of the attempt kill its rank."""
        with self._changed:
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.command = "kill"

    def ends(self, attempt: int) -> dict[int, RankEnd]:
        """How the ranks of the attempt ended, as far as they have."""
        with self._changed:
            return dict(self._attempt.ends) if self._attempt is not None and self._is_current(attempt) else {}

    def end_fleet(self, fleet: int) -> None:
        """Have its agents end."""
        with self._changed:
            self._over.add(fleet)

    def news(self, ended: int, timeout: float) -> Status:
        """The status as soon as more than `ended` ranks of the attempt have ended, else after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._attempt is None or self._attempt.payload is None or len(self._attempt.ends) > ended, timeout
            )
        return self.status()

    def status(self) -> Status:
        with self._changed:
            attempt, now = self._attempt or self._new_attempt(0, 0, 0), self._clock()
            reports = {rank: known for (fleet, rank), known in self._reports.items() if fleet == attempt.fleet}
            ranks = {
                rank: RankStatus(
                    steps_done=attempt.steps_done.get(rank, attempt.start_step),
                    stats=dict(attempt.stats.get(rank, {})),
                    age_seconds=now - attempt.heard_at[rank],
                    info=attempt.infos.get(rank),
                    pulse=dict(attempt.pulses.get(rank, {})),
                    report=reports[rank][0] if rank in reports else None,
                )
                for rank in sorted(attempt.heard_at)
            }
            stats = [rank.stats for rank in ranks.values()]
            columns = {name: [s[name] for s in stats if name in s] for name in sorted(set().union(*stats))}
            everyone = len(ranks) == attempt.world_size and attempt.world_size > 0
            return Status(
                attempt=attempt.number,
                world_size=attempt.world_size,
                start_step=attempt.start_step,
                ranks=ranks,
                steps_done=min(rank.steps_done for rank in ranks.values()) if everyone else attempt.start_step,
                stats_sum={name: sum(values) for name, values in columns.items()},
                stats_mean={name: sum(values) / len(values) for name, values in columns.items()},
                last_commit_step=self._last_commit[0] if self._last_commit else None,
                last_commit_time=self._last_commit[1] if self._last_commit else None,
                failed_checkpoints=self._failed_checkpoints,
                checkpoint_problem=self._checkpoint_problem,
                failed_steps=frozenset(attempt.failed_steps),
                stop_reason=self._stop_reason,
                stop_at=attempt.vote.stop_at,
                stop_confirmed=attempt.vote.confirmed,
                quarantined=len(self._bad),
                is_orphan=attempt.number > 0 and attempt.payload is None,
                reports={rank: report for rank, (report, _) in reports.items()},
                agent_ages={rank: now - heard for rank, (_, heard) in reports.items()},
                notices=tuple(sorted({report.notice for report, _ in reports.values() if report.notice})),
                ended_ranks=frozenset(attempt.ends),
                stacks=frozenset(attempt.stacks),
            )

    def event(self, event: str, **fields: Any) -> None:
        """Into the journal; failures are counted by their `kind`."""
        self._count(event, fields)
        self._journal.write(event, **fields)

    def account(self, seconds: Mapping[str, float]) -> None:
        """Where the run's seconds went so far, by cause, for Prometheus; `steps` are the useful ones."""
        for cause, value in seconds.items():
            self._metrics.set("run_seconds", value, label=cause)
        if total := sum(seconds.values()):
            self._metrics.set("goodput_ratio", seconds.get("steps", 0.0) / total)

    def discovery_address(self) -> str:
        """host:port of http_sd (path /sd); the coordinator's own /metrics is there too."""
        return self._server.address

    def targets(self) -> list[dict[str, Any]]:
        """http_sd: the ranks of the current attempt and the coordinator."""
        with self._changed:
            number = self._attempt.number if self._attempt else 0
            infos = dict(self._attempt.infos) if self._attempt else {}
        found = [(infos[rank].metrics_address, rank, number) for rank in sorted(infos)] + [(self._server.address, "coordinator", 0)]
        return [
            {"targets": [address], "labels": {"run": self._run, "rank": str(rank), "attempt": str(attempt)}}
            for address, rank, attempt in found
            if address
        ]

    def last_commit(self) -> tuple[int, float] | None:
        """Step and unix time of the newest commit, of earlier drivers too."""
        with self._changed:
            return self._last_commit

    def wait_committed(self, step: int, timeout: float) -> bool:
        """True once the checkpoint of `step`, or a later one, is committed; False when it failed, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._committed(step) or self._failed(step), timeout)
            return self._committed(step)

    def drain(self, timeout: float = 60.0) -> bool:
        """Wait until every checkpoint that all ranks have acked is committed or failed; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending == 0, timeout)

    def finish(self, timeout: float = 60.0) -> bool:
        """drain(), then close(), with what happened in the journal."""
        done = self.drain(timeout)
        self._journal.flush(JOURNAL_SECONDS)
        self.close()
        return done

    def close(self) -> None:
        """End the server and the threads; a checkpoint that is not committed yet stays uncommitted."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._work.put(None)
        self._server.close()
        self._write_targets()

    # The agents' side

    def order(self, fleet: int, rank: int, report: Report, beat: tuple[Any, ...] | None = None) -> Order:
        """What the agent of this rank should be doing now. `beat`: the arguments of a beat() of its rank, answered with it."""
        order = self._order(fleet, rank, report)
        return order if beat is None else replace(order, beat=self.beat(*beat))

    def _order(self, fleet: int, rank: int, report: Report) -> Order:
        with self._changed:
            self._reports[fleet, rank] = report, self._clock()
            current = self._attempt
            if fleet in self._over or (current is not None and fleet < current.fleet):
                return Order(command="end")
            if current is None or current.fleet != fleet or current.payload is None:
                return Order(command="wait")
            fresh = report.attempt != current.number and current.command == "run"
            return Order(
                command=current.command,
                attempt=current.number,
                world_size=current.world_size,
                payload=current.payload if fresh else None,
            )

    def rank_ended(self, attempt: int, rank: int, end: RankEnd) -> None:
        """A rank's process has ended. If not well, the others will not get on without it: they are ended too."""
        with self._changed:
            if not self._is_current(attempt):
                return
            current = self._attempt
            assert current is not None
            current.ends[rank] = end
            current.infos.pop(rank, None)
            if end.status != 0:
                current.command = "kill"
            self._changed.notify_all()
        self._write_targets()

    def stacks(self, attempt: int, rank: int, text: str) -> None:
        """The stacks of a rank, as asked for."""
        self._journal.write("stacks", attempt=attempt, rank=rank, text=text)
        with self._changed:
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.stacks.add(rank)

    # The ranks' side

    def publish(self, attempt: int, key: str, value: Any) -> None:
        """Tell the other ranks of the attempt."""
        with self._changed:
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.board[key] = value

    def lookup(self, attempt: int, key: str) -> Any:
        """What a rank of the attempt published; None if nothing yet."""
        with self._changed:
            return self._attempt.board.get(key) if self._attempt is not None and self._is_current(attempt) else None

    def register(self, attempt: int, rank: int, info: RankInfo) -> None:
        """A rank is up: from now on it is a target of Prometheus."""
        with self._changed:
            if not self._is_current(attempt):
                return
            assert self._attempt is not None
            self._attempt.infos[rank] = info
            self._attempt.heard_at[rank] = self._clock()
        self._journal.write(
            "worker_registered",
            attempt=attempt,
            rank=rank,
            host=info.host,
            pid=info.pid,
            node_id=info.node_id,
            metrics_address=info.metrics_address,
        )
        self._write_targets()

    def beat(
        self,
        attempt: int,
        rank: int,
        steps_done: int,
        seen_stop: int | None,
        stats: Mapping[str, float],
        steps_begun: int | None = None,
        pulse: Mapping[str, int | str] | None = None,
    ) -> Orders:
        """A rank's position, and the stop it has promised, if any; answers with the stop proposed to all. `steps_begun`: see
        heartbeat.Gate."""
        with self._changed:
            if not self._is_current(attempt):
                return Orders(stop_at=None, confirmed=False)
            current = self._attempt
            assert current is not None
            current.steps_done[rank] = max(steps_done, current.steps_done.get(rank, 0))
            current.heard_at[rank] = self._clock()
            if stats:
                current.stats[rank] = dict(stats)
            if pulse:
                current.pulses[rank] = dict(pulse)
            straggler = current.stragglers.hear(rank, steps_done, stats["own_seconds"]) if "own_seconds" in stats else None
            skew = current.stragglers.skew
            orders = current.vote.hear(rank, steps_done if steps_begun is None else steps_begun, seen_stop)
        self._metrics.set("straggler_skew_ratio", skew)
        if straggler is not None:
            self._journal.write(
                "straggler" if straggler.begins else "straggler_recovered",
                attempt=attempt,
                rank=rank,
                step=straggler.steps_done,
                own_seconds=straggler.own_seconds,
                others_seconds=straggler.others_seconds,
            )
        return orders

    def ack(self, attempt: int, rank: int, step: int, receipts: Iterable[Receipt], meta: Mapping[str, Any] | None = None) -> None:
        """A rank has staged its files of the checkpoint after `step` steps. Committed in the background once all ranks of the attempt
        said so; the metas of the ranks are merged. An ack of an older attempt is ignored."""
        with self._changed:
            if not self._is_current(attempt):
                return
            current = self._attempt
            assert current is not None
            current.acks.setdefault(step, {})[rank] = list(receipts)
            current.metas.setdefault(step, {}).update(meta or {})
            if len(current.acks[step]) < current.world_size or step in current.failed_steps:
                return
            everything = [receipt for rank in sorted(current.acks[step]) for receipt in current.acks[step][rank]]
            self._pending += 1
            self._work.put(_Work(attempt=attempt, step=step, receipts=everything, meta=current.metas[step]))
            # Ranks save in the order of steps: what is still incomplete below this one never will be.
            for older in [other for other in current.acks if other <= step]:
                del current.acks[older], current.metas[older]

    def fail_checkpoint(self, attempt: int, rank: int, step: int, message: str) -> None:
        """A rank could not stage its part (disk full): this checkpoint will not be; training goes on with the one before."""
        with self._changed:
            if not self._is_current(attempt):
                return
            assert self._attempt is not None
            self._attempt.acks.pop(step, None)
            self._attempt.metas.pop(step, None)
        self._checkpoint_failed(attempt, step, message, rank=rank)

    def quarantine(self, records: list[dict[str, Any]]) -> int:
        """Samples that could not be read: {"key", "reason", "split", "sample_id"}. Appends those not known yet to quarantine.jsonl;
        answers with the number of distinct ones over all ranks and attempts, against which limits hold."""
        with self._quarantine_lock:
            fresh = []
            for record in records:
                identity = _sample(record)
                if identity not in self._bad:
                    self._bad[identity] = dict(record)
                    fresh.append(record)
            if fresh:
                self._metrics.set("run_quarantined_samples", len(self._bad))
                lines = [json.dumps(record, sort_keys=True) for record in self._bad.values()]
                try:
                    self._storage.without_retries().write_atomic(f"{self._run}/{QUARANTINE}", ("\n".join(lines) + "\n").encode())
                except OSError as error:  # the next record writes them all again, and the journal has them too
                    self._journal.write("quarantine_not_written", message=str(error))
            count = len(self._bad)
        for record in fresh:
            self._journal.write("sample_quarantined", **record)
        return count

    # Inside

    def _count(self, event: str, fields: Mapping[str, Any]) -> None:
        """What an event is to Prometheus."""
        if event in ("attempt_failed", "attempt_paused"):
            self._ended_by = str(fields.get("kind", OTHER))
        if event == "attempt_failed":
            self._metrics.add("failures_total", label=self._ended_by)

    def _count_restart(self) -> None:
        """An attempt begins after another one; `_ended_by` says why that one ended."""
        self._metrics.add("restarts_total", label=self._ended_by)
        if self._ended_by == "numbers":
            self._metrics.add("rollbacks_total")
        self._ended_by = OTHER

    def _write_targets(self) -> None:
        if not self._storage.is_local:
            return
        with self._writing_targets, contextlib.suppress(OSError):  # a full disk costs monitoring its file, not the run its rank
            targets = [] if self._closed.is_set() else self.targets()  # in here: what is written last is the newest
            write_file_sd(self._storage.at(f"{self._run}/{FILE_SD}"), targets)

    def _rebuild(self) -> None:
        """Take over from a coordinator of this generation that died: its attempt, ranks and requested stop are in the journal."""
        for event in read_journal(self._storage, self._run):
            match event:
                case {"event": "attempt_started", "generation": self._generation, "attempt": int(), "workers": int(), "start_step": int()}:
                    if self._attempt is not None:
                        self._count_restart()
                    self._attempt = self._new_attempt(event["attempt"], event["workers"], event["start_step"])
                case {"event": "stop_requested", "generation": self._generation}:
                    self._stop_reason = str(event["reason"])
                case {"event": "attempt_failed" | "attempt_paused"} if self._attempt is not None:
                    self._count(event["event"], event)  # the counters go on where the dead one's were
                case {"event": "worker_registered"} if self._is_current(event["attempt"]):
                    assert self._attempt is not None
                    self._attempt.infos[event["rank"]] = RankInfo(
                        host=event["host"], pid=event["pid"], node_id=event["node_id"], metrics_address=event["metrics_address"]
                    )
                    self._attempt.heard_at[event["rank"]] = self._clock()
        if self._attempt is not None:
            self._attempt.vote.requested = self._stop_reason is not None
            self._metrics.set("workers", self._attempt.world_size)
        if self._last_commit is not None:
            self._metrics.set("checkpoint_commit_step", self._last_commit[0])
            self._metrics.set("checkpoint_commit_time_seconds", self._last_commit[1])

    def _new_attempt(self, number: int, world_size: int, start_step: int) -> _Attempt:
        vote = StopVote(world_size)
        vote.requested = self._stop_reason is not None
        ratio, steps = self._straggler
        stragglers = StragglerWatch(world_size, ratio=ratio, steps=steps)
        return _Attempt(number=number, world_size=world_size, start_step=start_step, vote=vote, stragglers=stragglers)

    def _is_current(self, attempt: int) -> bool:
        return self._attempt is not None and self._attempt.number == attempt

    def _committed(self, step: int) -> bool:
        return self._last_commit is not None and self._last_commit[0] >= step

    def _failed(self, step: int) -> bool:
        return self._attempt is not None and step in self._attempt.failed_steps

    def _commit_all(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._commit(work)
            except Fenced as error:
                self._checkpoint_failed(work.attempt, work.step, str(error), kind="fenced")
                self.request_stop(str(error))
            except Exception as error:  # the thread must outlive any storage: the old checkpoint is unharmed and training goes on
                kind = "storage_full" if isinstance(error, StorageFull) else type(error).__name__
                self._checkpoint_failed(work.attempt, work.step, str(error), kind=kind)
            finally:
                with self._changed:
                    self._pending -= 1
                    self._changed.notify_all()

    def _commit(self, work: _Work) -> None:
        began = self._clock()
        commit = self._commit_through_outages(work)
        seconds, now = self._clock() - began, self._now()
        self._metrics.set("checkpoint_commit_step", work.step)
        self._metrics.set("checkpoint_commit_time_seconds", now)
        self._metrics.set("checkpoint_bytes", commit.size_bytes)
        self._metrics.observe("checkpoint_commit_seconds", seconds)
        self._journal.write(
            "checkpoint_committed", attempt=work.attempt, step=work.step, seconds=seconds, size_bytes=commit.size_bytes, path=commit.path
        )
        with self._changed:
            if self._is_current(work.attempt):
                self._last_commit = (work.step, now)
            self._changed.notify_all()
        try:
            self._store.prune(self._keep, self._generation, staged_below=work.step)
        except (OSError, Fenced) as error:
            self._journal.write("prune_failed", attempt=work.attempt, step=work.step, message=str(error))

    def _commit_through_outages(self, work: _Work) -> Commit:
        """In the order of steps: the checkpoints behind this one wait with it. Given up when the coordinator ends, or when so many wait
        that they would fill the storage, where ranks reach it and this process does not."""
        began: float | None = None
        while True:
            try:
                commit = self._store.commit(work.step, self._generation, work.receipts, work.meta)
            except StorageOutage as error:
                if began is None:
                    began = self._clock()
                    self._journal.write("storage_outage", attempt=work.attempt, step=work.step, message=str(error))
                if self._work.qsize() > COMMITS_WAITING or self._closed.wait(COMMIT_PAUSE_SECONDS):
                    raise
            else:
                if began is not None:
                    self._journal.write("storage_recovered", attempt=work.attempt, step=work.step, seconds=self._clock() - began)
                return commit

    def _checkpoint_failed(self, attempt: int, step: int, message: str, **fields: Any) -> None:
        self._journal.write("checkpoint_failed", attempt=attempt, step=step, message=message, **fields)
        with self._changed:
            known = self._is_current(attempt) and self._failed(step)  # another rank of it said so before
            self._failed_checkpoints += not known
            self._checkpoint_problem = message
            if self._is_current(attempt):
                assert self._attempt is not None
                self._attempt.failed_steps.add(step)
            self._changed.notify_all()
        if not known:
            self._metrics.add("checkpoint_failures_total")


def _sample(record: Mapping[str, Any]) -> tuple[str, int]:
    return record["split"], record["sample_id"]


def _read_quarantine(storage: Storage, run: str) -> dict[tuple[str, int], dict[str, Any]]:
    if not storage.exists(f"{run}/{QUARANTINE}"):
        return {}
    records = [json.loads(line) for line in storage.read(f"{run}/{QUARANTINE}").decode().splitlines() if line]
    return {_sample(record): record for record in records}


class CoordinatorActor(Coordinator):
    """The coordinator with a place for what the ranks hand back at the end of an attempt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._results: dict[int, dict[str, Any]] = {}

    def put_result(self, attempt: int, result: dict[str, Any]) -> None:
        self._results[attempt] = result

    def result(self, attempt: int) -> dict[str, Any] | None:
        return self._results.get(attempt)
