"""What the coordinator knows, as a pure function of the messages that changed it. No thread, no storage, no clock.

memory.py holds one. It hands each message to `apply` with the time, and writes it into its log before the coordinator answers. A successor
applies the logged messages to a new State and has the same one. So a public method here is a message: its result and its effect depend on
its arguments, the messages before, and `self.time` alone. A message that comes twice changes nothing the second time, whoever repeats it:
Ray, an agent that got no answer, or the driver.

What is to be written into the journal waits in `untold`, until the coordinator says that the journal has it."""

import itertools
import pickle
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.agent import RankEnd
from cluster.commits import Commits, Committed, Staged
from cluster.metrics import OTHER
from cluster.quarantined import Quarantined
from cluster.roster import Attempt, RankInfo, Roster
from cluster.stop import Agreement, StopVote
from cluster.store import Receipt
from cluster.straggler import Straggler, StragglerLimits

CALLS_KEPT = 10_000
"""Ids of calls that are remembered, to know one that comes again."""
EVENTS_KEPT = 10_000
"""Events that wait for the journal; beyond that the oldest are lost, as in the journal's own backlog."""
ATTEMPTS_KEPT = 2
"""Attempts whose results are remembered."""
RESTART_WINDOW_SECONDS = 600.0
FENCED = "fenced"
"""Kind of a commit's failure: a newer driver has claimed the run."""


class AttemptOver(ValueError):
    """The driver began an attempt whose number is not above the attempt before: it knows less than its coordinator."""

    failure_kind = "infrastructure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A line for the journal."""

    serial: int
    """Counts a coordinator's events, over its restarts."""
    time: float
    """Unix time of what happened, in seconds."""
    event: str
    fields: Mapping[str, Any]


class State:
    """See the module. Besides messages it has properties and questions, which change nothing."""

    def __init__(
        self, generation: int, limits: StragglerLimits, *, commits: Iterable[Committed] = (), quarantined: Quarantined | None = None
    ) -> None:
        self.generation = generation
        self.time = 0.0
        """Unix time of the message that is being applied."""
        self.roster = Roster(limits)
        self.commits = Commits(commits)
        self.vote = StopVote(0)
        self.stop_reason: str | None = None
        self.bad = quarantined or Quarantined()
        self.counts: dict[tuple[str, str], float] = {}
        """Counters for Prometheus, by name and label."""
        self.untold: deque[Event] = deque()
        self.restarts: tuple[float, ...] = ()
        """Unix times of the coordinator's restarts in the last RESTART_WINDOW_SECONDS."""
        self._serial = 0
        self._ended_by = OTHER  # what ended the attempt before the next one
        self._calls: dict[str, None] = {}
        self._results: dict[int, dict[str, Any]] = {}

    def apply(self, time: float, message: str, arguments: tuple[Any, ...]) -> Any:
        """Apply a message; returns its result."""
        self.time = time
        return getattr(self, message)(*arguments)

    # Snapshots for the log

    def dumped(self) -> bytes:
        return pickle.dumps(self)

    @staticmethod
    def from_dump(dump: bytes) -> "State":
        state: State = pickle.loads(dump)
        return state

    # From the driver

    def begin(self, attempt: Attempt) -> None:
        """An attempt begins."""
        if self.roster.attempt is not None:
            self._count("restarts_total", self._ended_by)
            if self._ended_by == "numbers":
                self._count("rollbacks_total")
        self._ended_by = OTHER
        self.roster.begin(attempt)
        self.commits.begin(attempt.number, attempt.world_size, attempt.start_step)
        self.vote = StopVote(attempt.world_size, requested=self.stop_reason is not None)
        self._results = {number: result for number, result in self._results.items() if number > attempt.number - ATTEMPTS_KEPT}
        self._say(
            "attempt_started",
            attempt=attempt.number,
            workers=attempt.world_size,
            start_step=attempt.start_step,
            generation=self.generation,
        )

    def adopt(self, attempt: int, fleet: int) -> None:
        self.roster.adopt(attempt, fleet, None)

    def request_stop(self, reason: str) -> None:
        """The first reason counts."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self.vote.request()
            self._say("stop_requested", reason=reason, generation=self.generation)

    def request_pause(self, attempt: int, reason: str) -> None:
        if self.roster.is_current(attempt) and not self.vote.requested:
            self.vote.request()
            self._say("pause_requested", attempt=attempt, reason=reason)

    def ask_stacks(self, attempt: int) -> None:
        self.roster.ask_stacks(attempt)

    def kill(self, attempt: int) -> None:
        self.roster.kill(attempt)

    def end_fleet(self, fleet: int) -> None:
        self.roster.end_fleet(fleet)

    def event(self, call_id: str, event: str, fields: Mapping[str, Any]) -> None:
        """Somebody's event for the journal; failures are counted by their `kind`."""
        if self._is_new(call_id):
            self._count_end(event, fields)
            self._say(event, **fields)

    # From agents and ranks

    def rank_ended(self, attempt: int, rank: int, end: RankEnd) -> bool:
        return self.roster.ended(attempt, rank, end)

    def told_stacks(self, attempt: int, rank: int, text: str) -> None:
        if self.roster.told_stacks(attempt, rank):
            self._say("stacks", attempt=attempt, rank=rank, text=text)

    def publish(self, attempt: int, key: str, value: Any) -> None:
        self.roster.publish(attempt, key, value)

    def register(self, attempt: int, rank: int, info: RankInfo, now: float) -> bool:
        """`now`: the roster's time."""
        if not self.roster.register(attempt, rank, info, now):
            return False
        self._say(
            "worker_registered",
            attempt=attempt,
            rank=rank,
            host=info.host,
            pid=info.pid,
            node_id=info.node_id,
            metrics_address=info.metrics_address,
        )
        return True

    def agree(self, agreement: Agreement) -> None:
        """The vote on a stop has got somewhere. Beats themselves are no messages: they come each second, and come again."""
        self.vote.take_up(agreement)

    def straggler(self, attempt: int, straggler: Straggler) -> None:
        self._say(
            "straggler" if straggler.begins else "straggler_recovered",
            attempt=attempt,
            rank=straggler.rank,
            step=straggler.steps_done,
            own_seconds=straggler.own_seconds,
            others_seconds=straggler.others_seconds,
        )

    def ack(self, attempt: int, rank: int, step: int, receipts: list[Receipt], meta: Mapping[str, Any]) -> Staged | None:
        return self.commits.ack(attempt, rank, step, receipts, meta)

    def fail_checkpoint(self, attempt: int, rank: int, step: int, message: str, is_refused: bool = False) -> None:
        if self.commits.withdraw(attempt, rank, step):
            self._checkpoint_failed(attempt, step, message, is_refused=is_refused, rank=rank)

    def quarantine(self, records: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns the new ones."""
        new = self.bad.add(records)
        for record in new:
            self._say("sample_quarantined", **record)
        return new

    def put_result(self, attempt: int, result: dict[str, Any]) -> None:
        """The first one counts."""
        current = self.roster.attempt
        if current is None or attempt > current.number - ATTEMPTS_KEPT:
            self._results.setdefault(attempt, result)

    # From the committer

    def committed(self, staged: tuple[int, int], time: float, fields: Mapping[str, Any]) -> None:
        """`staged`: attempt and step."""
        attempt, step = staged
        self.commits.committed(attempt, step, time)
        self._say("checkpoint_committed", attempt=attempt, step=step, **fields)

    def commit_failed(self, staged: tuple[int, int], kind: str, message: str, is_refused: bool) -> None:
        attempt, step = staged
        self._checkpoint_failed(attempt, step, message, is_refused=is_refused, kind=kind)
        if kind == FENCED:
            self.request_stop(message)

    def settled(self, staged: tuple[int, int]) -> None:
        self.commits.settled(*staged)

    # From the coordinator itself

    def say(self, event: str, fields: Mapping[str, Any]) -> None:
        self._say(event, **fields)

    def told(self, serial: int) -> None:
        """The journal has all events up to this one."""
        while self.untold and self.untold[0].serial <= serial:
            self.untold.popleft()

    def restarted(self) -> None:
        """A new coordinator has taken over."""
        self.restarts = (*(time for time in self.restarts if time > self.time - RESTART_WINDOW_SECONDS), self.time)

    # Questions

    def untold_after(self, serial: int) -> list[Event]:
        """Events after this one that the journal may lack, in order."""
        return list(itertools.takewhile(lambda event: event.serial > serial, reversed(self.untold)))[::-1]

    def result(self, attempt: int) -> dict[str, Any] | None:
        return self._results.get(attempt)

    # Inside

    def _say(self, event: str, **fields: Any) -> None:
        self._serial += 1
        self.untold.append(Event(serial=self._serial, time=self.time, event=event, fields=fields))
        if len(self.untold) > EVENTS_KEPT:
            self.untold.popleft()

    def _is_new(self, call_id: str) -> bool:
        """Whether a call did not come before. A call without an id counts as new."""
        if call_id in self._calls:
            return False
        if call_id:
            self._calls[call_id] = None
            if len(self._calls) > CALLS_KEPT:
                del self._calls[next(iter(self._calls))]
        return True

    def _checkpoint_failed(self, attempt: int, step: int, message: str, *, is_refused: bool, **fields: Any) -> None:
        self._say("checkpoint_failed", attempt=attempt, step=step, message=message, **fields)
        if self.commits.failed(attempt, step, message, is_refused=is_refused):
            self._count("checkpoint_failures_total")

    def _count(self, name: str, label: str = "") -> None:
        self.counts[name, label] = self.counts.get((name, label), 0) + 1

    def _count_end(self, event: str, fields: Mapping[str, Any]) -> None:
        if event in ("attempt_failed", "attempt_paused"):
            self._ended_by = str(fields.get("kind", OTHER))
        if event == "attempt_failed":
            self._count("failures_total", self._ended_by)


def rebuilt(
    generation: int,
    limits: StragglerLimits,
    *,
    commits: Iterable[Committed],
    quarantined: Quarantined,
    journal: Iterable[Mapping[str, Any]],
) -> State:
    """What can be known of a dead coordinator of this generation without its log: attempt, ranks, counters, a requested stop or pause.
    Acknowledged but uncommitted checkpoints, ends and results are lost."""
    existing = sorted(commits, key=lambda commit: commit.step)
    state = State(generation, limits, commits=existing, quarantined=quarantined)
    for event in in_order(journal):
        state.time = float(event["time"])
        begun = state.roster.attempt
        match event:
            case {"event": "attempt_started", "generation": said, "attempt": int(), "workers": int(), "start_step": int()} if (
                said == generation
            ):
                number = event["attempt"]
                if begun is None or number > begun.number:
                    state.begin(Attempt(number=number, world_size=event["workers"], start_step=event["start_step"]))
            case {"event": "stop_requested", "generation": said, "reason": reason} if said == generation:
                state.request_stop(str(reason))
            case {"event": "pause_requested", "attempt": int(), "reason": reason}:
                state.request_pause(event["attempt"], str(reason))
            case {"event": "attempt_failed" | "attempt_paused"} if begun is not None:
                state._count_end(event["event"], event)  # counters continue from the dead coordinator's
            case {"event": "worker_registered", "attempt": int(), "rank": int()} if state.roster.is_current(event["attempt"]):
                info = RankInfo(host=event["host"], pid=event["pid"], node_id=event["node_id"], metrics_address=event["metrics_address"])
                state.register(event["attempt"], event["rank"], info, 0.0)
            case {"event": "coordinator_log_lost"} if begun is not None:
                state.restarted()
            case _:
                pass
    if existing and state.roster.attempt is not None:  # what is newer than its start, the attempt has made: what is bad is set aside
        state.commits.committed(state.roster.attempt.number, existing[-1].step, existing[-1].time)
    state.told(state._serial)  # they come from the journal
    return state


def in_order(journal: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A run's events by attempt, its beginning first, the others by time: a clock that was set back does not put an attempt before an
    earlier one. An event that names no attempt belongs to the one before it."""
    found, newest = [], 0
    for event in journal:
        number = event.get("attempt")
        newest = number if isinstance(number, int) else newest
        found.append((newest, event["event"] != "attempt_started", event))
    return [event for _, _, event in sorted(found, key=lambda each: each[:2])]
