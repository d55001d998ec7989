"""The members of a run: the agents of its fleets, and the ranks of the current attempt. Pure: no thread, no clock, no storage.

The coordinator's State holds one instance and passes in the time. What an agent should do (`order`) follows from the attempt that the
driver began and from the ranks' reports. Messages about an attempt other than the current one are ignored: a method that takes an
attempt's number then returns False or None. Every message may come twice: a second one changes nothing, and the method says so in the
same way.

It can be pickled for the coordinator's log. What a new coordinator is told again stays behind: the agents' reports, and the payload, which
may refer to Ray's object store."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.agent import AgentOrder, AgentReport, Payload, RankEnd
from cluster.beat import STARTING, Beat
from cluster.straggler import Straggler, StragglerLimits, StragglerWatch


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
    """What is known about a rank that has registered or beaten."""

    steps_done: int
    stats: Mapping[str, float]
    totals: Mapping[str, float]
    phase: str
    ticks: int
    """For these four fields, see beat.Beat."""
    age_seconds: float
    """Time since its last beat."""
    info: RankInfo | None
    report: AgentReport | None
    """The agent's latest report on the rank's process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One life of the ranks, as the driver began it."""

    number: int
    world_size: int
    start_step: int
    fleet: int = 0
    """The fleet whose agents run it."""
    payload: Payload | None = None
    """What its ranks run. None after a restart of the coordinator: neither its log nor the journal holds it. The driver must then adopt the
    attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What a beat has revealed."""

    straggler: Straggler | None
    """An episode of a slow rank begins or ends."""
    skew: float
    """The slowest rank over the median."""


@dataclass(kw_only=True, slots=True)
class _Rank:
    heard_at: float | None = None
    info: RankInfo | None = None
    beat: Beat | None = None
    end: RankEnd | None = None
    has_told_stacks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _AgentSaid:
    report: AgentReport
    at: float


@dataclass(kw_only=True, slots=True)
class _Current:
    """State of the current attempt."""

    attempt: Attempt
    stragglers: StragglerWatch
    command: Literal["run", "stacks", "kill"] = "run"
    ranks: dict[int, _Rank] = field(default_factory=dict)
    board: dict[str, Any] = field(default_factory=dict)
    """Values that ranks publish for each other."""

    def rank(self, number: int) -> _Rank:
        return self.ranks.setdefault(number, _Rank())


class Roster:
    """See the module."""

    def __init__(self, limits: StragglerLimits) -> None:
        self._limits = limits
        self._current: _Current | None = None
        self._agents: dict[tuple[int, int], _AgentSaid] = {}  # by (fleet, rank)
        self._over: set[int] = set()  # fleets that are to end
        self._ended_before: dict[int, RankEnd] = {}
        self._attempt_before = 0

    def __getstate__(self) -> dict[str, Any]:
        current = self._current
        if current is not None:
            current = replace(current, attempt=replace(current.attempt, payload=None))
        return {**self.__dict__, "_current": current, "_agents": {}}

    def taken_over(self, now: float) -> None:
        """A new coordinator holds this roster: silence counts from now on, because nobody was there to be told."""
        for rank in self._current.ranks.values() if self._current is not None else ():
            if rank.heard_at is not None:
                rank.heard_at = now

    # The driver's side

    @property
    def attempt(self) -> Attempt | None:
        """The current attempt."""
        return self._current.attempt if self._current is not None else None

    def is_current(self, attempt: int) -> bool:
        return self._of(attempt) is not None

    def begin(self, attempt: Attempt) -> None:
        """Begin a new group of ranks, about which nothing is known yet. Agents of older fleets are forgotten, and how ranks ended before
        the attempt before."""
        if self._current is not None:
            self._attempt_before, self._ended_before = self._current.attempt.number, self.ends()
        stragglers = StragglerWatch(attempt.world_size, ratio=self._limits.ratio, steps=self._limits.steps)
        self._current = _Current(attempt=attempt, stragglers=stragglers)
        self._agents = {key: said for key, said in self._agents.items() if key[0] >= attempt.fleet}
        self._over = {fleet for fleet in self._over if fleet >= attempt.fleet}  # order() ends the older ones anyway

    def adopt(self, attempt: int, fleet: int, payload: Payload | None) -> None:
        """Complete an attempt that was taken over."""
        if (current := self._of(attempt)) is not None:
            current.attempt = replace(current.attempt, fleet=fleet, payload=payload)

    def ask_stacks(self, attempt: int) -> None:
        """Have every agent of the attempt send its rank's stacks."""
        if (current := self._of(attempt)) is not None and current.command == "run":
            current.command = "stacks"
            for rank in current.ranks.values():
                rank.has_told_stacks = False

    def kill(self, attempt: int) -> None:
        """Have every agent of the attempt kill its rank."""
        if (current := self._of(attempt)) is not None:
            current.command = "kill"

    def end_fleet(self, fleet: int) -> None:
        """Have its agents end."""
        self._over.add(fleet)

    # The agents' side

    def order(self, fleet: int, rank: int, report: AgentReport, now: float) -> AgentOrder:
        """What this rank's agent should do."""
        self._agents[fleet, rank] = _AgentSaid(report=report, at=now)
        current = self.attempt
        if fleet in self._over or (current is not None and fleet < current.fleet):
            return AgentOrder(command="end")
        if self._current is None or current is None or current.fleet != fleet:
            return AgentOrder(command="wait")
        command = self._current.command
        is_new = report.attempt != current.number and command == "run"
        if is_new and current.payload is None:
            return AgentOrder(command="wait")
        return AgentOrder(
            command=command,
            attempt=current.number,
            world_size=current.world_size,
            payload=current.payload if is_new else None,
        )

    def ended(self, attempt: int, rank: int, end: RankEnd) -> bool:
        """A rank's process has ended. If it failed, the others cannot continue and are to be killed."""
        if (current := self._of(attempt)) is None or current.rank(rank).end is not None:
            return False
        known = current.rank(rank)
        known.end, known.info = end, None
        if end.status != 0:
            current.command = "kill"
        return True

    def told_stacks(self, attempt: int, rank: int) -> bool:
        """A rank's stacks have arrived."""
        if (current := self._of(attempt)) is None or current.rank(rank).has_told_stacks:
            return False
        current.rank(rank).has_told_stacks = True
        return True

    # The ranks' side

    def register(self, attempt: int, rank: int, info: RankInfo, now: float) -> bool:
        """A rank is up."""
        if (current := self._of(attempt)) is None:
            return False
        known = current.rank(rank)
        if known.end is not None or known.info == info:
            return False
        known.info, known.heard_at = info, now
        return True

    def hear(self, beat: Beat, now: float) -> Heard | None:
        """Take in a beat. A beat that was overtaken by a newer one does not reset the position, and one without figures keeps the
        earlier figures."""
        if (current := self._of(beat.attempt)) is None:
            return None
        rank = current.rank(beat.rank)
        before = rank.beat
        rank.heard_at = now
        rank.beat = beat
        if before is not None:
            steps_done = max(beat.steps_done, before.steps_done)
            rank.beat = replace(beat, steps_done=steps_done, stats=beat.stats or before.stats, totals=beat.totals or before.totals)
        straggler = None
        if beat.own_seconds is not None:
            straggler = current.stragglers.hear(beat.rank, beat.steps_done, beat.own_seconds)
        return Heard(straggler=straggler, skew=current.stragglers.skew)

    def publish(self, attempt: int, key: str, value: Any) -> None:
        """Publish a value for the other ranks of the attempt. The first one for a key counts."""
        if (current := self._of(attempt)) is not None:
            current.board.setdefault(key, value)

    def lookup(self, attempt: int, key: str) -> Any:
        """The value that a rank of the attempt published; None if nothing yet."""
        current = self._of(attempt)
        return current.board.get(key) if current is not None else None

    # What is known

    def infos(self) -> dict[int, RankInfo]:
        """The ranks that are up, in order."""
        ranks = self._current.ranks if self._current is not None else {}
        return {number: rank.info for number, rank in sorted(ranks.items()) if rank.info is not None}

    def ends(self, attempt: int | None = None) -> dict[int, RankEnd]:
        """How the ranks of the attempt (None: the current one) ended, for those that have. Known of this attempt and of the one before."""
        if attempt == self._attempt_before:
            return dict(self._ended_before)
        current = self._current if attempt is None else self._of(attempt)
        ranks = current.ranks if current is not None else {}
        return {number: rank.end for number, rank in ranks.items() if rank.end is not None}

    def stacks(self) -> frozenset[int]:
        """Ranks whose stacks have arrived since they were requested."""
        ranks = self._current.ranks if self._current is not None else {}
        return frozenset(number for number, rank in ranks.items() if rank.has_told_stacks)

    def reports(self) -> dict[int, AgentReport]:
        """Latest reports of the current fleet's agents, by rank."""
        return {rank: said.report for rank, said in self._fleet().items()}

    def agent_ages(self, now: float) -> dict[int, float]:
        """Seconds since those reports."""
        return {rank: now - said.at for rank, said in self._fleet().items()}

    def ranks(self, now: float) -> dict[int, RankStatus]:
        """The ranks that have registered or beaten, in order."""
        if self._current is None:
            return {}
        start_step, reports = self._current.attempt.start_step, self.reports()
        found = {}
        for number, rank in sorted(self._current.ranks.items()):
            if rank.heard_at is not None:
                beat = rank.beat
                found[number] = RankStatus(
                    steps_done=beat.steps_done if beat else start_step,
                    stats=beat.stats if beat else {},
                    totals=beat.totals if beat else {},
                    phase=beat.phase if beat else STARTING,
                    ticks=beat.ticks if beat else 0,
                    age_seconds=now - rank.heard_at,
                    info=rank.info,
                    report=reports.get(number),
                )
        return found

    def _of(self, attempt: int) -> _Current | None:
        return self._current if self._current is not None and self._current.attempt.number == attempt else None

    def _fleet(self) -> dict[int, _AgentSaid]:
        fleet = self._current.attempt.fleet if self._current is not None else 0
        return {rank: said for (number, rank), said in self._agents.items() if number == fleet}
