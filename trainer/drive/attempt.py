"""One attempt: one life of the ranks, from the order to start until the last rank has ended. Called by drive.py.

In a loop, the attempt collects what it sees in a `Look`, `decide` (pure) picks an `Act`, and the attempt carries it out. An attempt ends
with an `Outcome`. drive.py decides what follows it; fleets.py starts and ends the agents.
"""

import pickle
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from queue import Empty
from typing import Any

import ray

from cluster.agent import Payload, poll_seconds
from cluster.beat import ABSENT, BEFORE_STEPS, PLACING
from cluster.coordinator import Status
from cluster.failures import Failure
from cluster.hang import Hang, HangWatch, Sign
from cluster.interval import observed_failures
from cluster.launch import Fleet, failure_of_ranks
from cluster.patience import Lately
from trainer.drive.account import Account
from trainer.drive.fleets import Fleets, Pause, Room
from trainer.drive.screen import Position, Screen
from trainer.drive.session import NEWS_SECONDS, Session
from trainer.drive.signals import Signals
from trainer.settings.spec import TARGET, ResumePoint, WorkerSpec

TAKEN_OVER_POLL_SECONDS = 5.0
AGENT_SILENT_SECONDS = 5.0
STACKS_SECONDS = 5.0
MOST_HEARTBEATS_WAITED = 4
"""A signal while the ranks start waits at most this many heartbeats to know whether they have begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended. Without a failure and without a pause, the run or this driver's part of it is over."""

    failure: Failure | None = None
    result: Mapping[str, Any] | None = None
    """What rank 0 handed in after all steps, or after a requested stop."""
    pause: Pause | None = None
    """Why another attempt follows with other workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What the driver sees at one moment of an attempt."""

    fleet_ended: bool = False
    ranks_ended: bool = False
    """All ranks have ended."""
    is_orphan: bool = False
    """The coordinator was restarted and does not know the attempt's agents."""
    lost_agents: tuple[int, ...] = ()
    """Ranks whose agents do not answer and thereby hold up the attempt."""
    hang: Hang | None = None
    is_taken_over: bool = False
    """Another process drives this run now."""
    signal: int = 0
    """Number of the signal that the driver got; 0: none."""
    may_begin: bool = False
    """The newest beats are older than the signal: nobody knows yet whether a step was done meanwhile."""
    has_begun: bool = False
    """There may be steps that are not saved."""
    stop_asked_seconds: float | None = None
    """Time since the ranks were asked to stop; None if they were not."""
    stop_grace_seconds: float = 0.0
    pause: Pause | None = None
    """Why the run should go on with other workers."""
    pause_asked: bool = False
    """The ranks were already asked to pause."""


class Act(Enum):
    """What an attempt does about what it sees."""

    TAKE_FLEETS_FAILURE = auto()
    TAKE_RESULT = auto()
    ADOPT = auto()
    GIVE_UP_AGENTS = auto()
    BREAK_HANG = auto()
    GIVE_WAY = auto()
    STOP_AT_ONCE = auto()
    ASK_TO_STOP = auto()
    ASK_TO_PAUSE = auto()
    END_GRACE = auto()
    GO_ON = auto()


def decide(look: Look) -> Act:
    """Pick what to do. The first rule that applies wins: an attempt that has ended is over, whatever else is true of it."""
    if look.fleet_ended:
        return Act.TAKE_FLEETS_FAILURE
    if look.ranks_ended:
        return Act.TAKE_RESULT
    if look.is_orphan:
        return Act.ADOPT
    if look.lost_agents:
        return Act.GIVE_UP_AGENTS
    if look.hang is not None:
        return Act.BREAK_HANG
    if look.is_taken_over:
        return Act.GIVE_WAY
    if look.signal and look.stop_asked_seconds is None:
        if look.has_begun:
            return Act.ASK_TO_STOP
        return Act.GO_ON if look.may_begin else Act.STOP_AT_ONCE
    if look.stop_asked_seconds is not None and look.stop_asked_seconds > look.stop_grace_seconds:
        return Act.END_GRACE
    if look.pause is not None and not look.pause_asked and not look.signal:
        return Act.ASK_TO_PAUSE
    return Act.GO_ON


class Attempt:
    """Runs one life of the ranks below a fleet's agents."""

    def __init__(
        self,
        session: Session,
        *,
        position: Position,
        fleet: Fleet,
        fleets: Fleets,
        room: Room,
        signals: Signals,
        screen: Screen,
        account: Account,
    ) -> None:
        self._session, self._position, self._fleet = session, position, fleet
        self._fleets, self._room, self._signals = fleets, room, signals
        self._screen, self._account = screen, account
        self._known = (position.attempt, fleet.workers, position.start_step, fleet.number, payload_of(session, position))
        self._stop_asked_at: float | None = None
        self._pause: Pause | None = None  # the ranks were asked for it
        self._ended = 0  # number of ended ranks in the last status
        self._saw_signal = False

    def run(self) -> Outcome:
        """Run the attempt from its first order to its end."""
        cluster = self._session.config.cluster
        self._session.patiently("the list of checkpoints", lambda: self._session.ask("start_attempt", *self._known))
        watch = HangWatch(hang_seconds=cluster.hang_seconds, start_seconds=cluster.start_seconds, now=time.monotonic())
        is_taken_over = Lately(TAKEN_OVER_POLL_SECONDS, self._session.seems_taken_over, False)
        outcome = None
        while outcome is None:
            has_ended = self._fleet.wait(0)
            status = self._session.status() if has_ended else self._news()
            outcome = self._act(self._look(status, watch, has_ended, is_taken_over()), status)
        return outcome

    def _news(self) -> Status:
        status = wait_for_news(self._session, self._signals, self._fleet, self._ended, is_told=self._saw_signal)
        self._ended = len(status.ended_ranks)
        self._fleets.seen(status)
        return status

    def _look(self, status: Status, watch: HangWatch, fleet_ended: bool, is_taken_over: bool) -> Look:
        # Without its log, and cut off from the journal when it died, it believes in an attempt that is over.
        knows_ours = status.attempt >= self._position.attempt
        ranks_ended = knows_ours and len(status.ended_ranks) == self._fleet.workers
        is_orphan = status.is_orphan or not knows_ours
        silent = silent_agents(status)
        signal, pause = self._signals.number, None
        self._saw_signal = signal != 0
        heartbeat_seconds = self._session.config.cluster.heartbeat_seconds
        if not fleet_ended and self._pause is None and not signal and status.steps_done > status.start_step:
            pause = self._room.reason_to_pause(status, workers=self._fleet.workers, attempt=self._position.attempt)
        return Look(
            fleet_ended=fleet_ended,
            ranks_ended=ranks_ended,
            is_orphan=is_orphan,
            lost_agents=lost_agents(status, silent, living_nodes()) if silent else (),
            # A restarted coordinator knows nothing of the ranks at first; the watch would take that change for progress.
            hang=None if ranks_ended or is_orphan else watch.look(time.monotonic(), signs(status)),
            is_taken_over=is_taken_over,
            signal=signal,
            may_begin=signal != 0 and may_begin(status, self._signals.seconds, heartbeat_seconds),
            has_begun=has_begun(status),
            stop_asked_seconds=None if self._stop_asked_at is None else time.monotonic() - self._stop_asked_at,
            stop_grace_seconds=self._session.config.cluster.stop_grace_seconds,
            pause=pause,
            pause_asked=self._pause is not None,
        )

    def _act(self, look: Look, status: Status) -> Outcome | None:
        """Carry out the decision. Returns the outcome if that ends the attempt."""
        match decide(look):
            case Act.TAKE_FLEETS_FAILURE:
                return self._take_fleets_failure()
            case Act.TAKE_RESULT:
                return self._take_result()
            case Act.ADOPT:
                self._adopt()
                return None  # the next status has something to show
            case Act.GIVE_UP_AGENTS:
                return self._give_up_agents(look.lost_agents, status)
            case Act.BREAK_HANG:
                assert look.hang is not None
                return self._break_hang(look.hang)
            case Act.GIVE_WAY:
                return self._end()
            case Act.STOP_AT_ONCE:
                self._ask_to_stop("stopping; no step has been done yet")
                return self._end()  # this attempt did no step, so there is nothing new to save
            case Act.ASK_TO_STOP:
                self._ask_to_stop("saving a checkpoint, then stopping (again to stop at once)")
            case Act.END_GRACE:
                self._screen.message(f"the ranks have not ended within cluster.stop_grace_seconds={look.stop_grace_seconds:g}; ending them")
                return self._end()
            case Act.ASK_TO_PAUSE:
                assert look.pause is not None
                self._ask_to_pause(look.pause)
            case Act.GO_ON:
                pass
        self._screen.show(status, self._position, workers=self._fleet.workers, is_stopping=self._signals.number != 0)
        self._account.tell(status)
        return None

    # Orders to an attempt that goes on

    def _adopt(self) -> None:
        attempt = self._position.attempt
        self._session.ask("adopt", *self._known)
        self._session.tell("coordinator_restarted", attempt=attempt)
        self._screen.message("the coordinator died and was started again; the ranks trained on")

    def _ask_to_stop(self, then: str) -> None:
        self._stop_asked_at = time.monotonic()
        self._session.ask("request_stop", self._signals.name)
        self._screen.message(f"{self._signals.name}: {then}")

    def _ask_to_pause(self, pause: Pause) -> None:
        self._pause = pause
        self._session.ask("request_pause", self._position.attempt, pause.reason)
        self._screen.message(f"{pause.reason}; saving a checkpoint, then going on with other workers")

    # Ends

    def _end(self) -> Outcome:
        """End this driver's part of the run without a result."""
        self._fleets.end()
        return Outcome()

    def _take_result(self) -> Outcome:
        """All ranks have ended, by themselves or on request."""
        attempt = self._position.attempt
        return self._outcome(failure_of_ranks(self._session.ask("ends", attempt)))

    def _take_fleets_failure(self) -> Outcome:
        """Ray Train gave up on a worker, and the ranks ended with it."""
        self._fleets.died()
        failure = self._fleet.failure()
        return self._outcome(failure or Failure(kind="infrastructure", rank=None, message="the agents ended before their ranks had"))

    def _outcome(self, failure: Failure | None) -> Outcome:
        result = self._session.ask("result", self._position.attempt)
        return outcome_of(
            failure,
            result,
            pause=None if self._signals.number else self._pause,
            is_taken_over=failure is not None and result is None and self._session.is_taken_over(),
        )

    def _give_up_agents(self, lost: Sequence[int], status: Status) -> Outcome:
        """The agents of these ranks do not answer: their nodes or workers are gone. End the rest of the fleet too."""
        nodes = sorted({status.reports[rank].node_id[:8] for rank in lost})
        ranks = ", ".join(map(str, lost))
        self._session.ask("kill_attempt", self._position.attempt)
        self._fleets.end()
        message = f"the agents of rank{'s' if len(lost) > 1 else ''} {ranks} on node {', '.join(nodes)} do not answer"
        return Outcome(failure=Failure(kind="infrastructure", rank=lost[0], message=message))

    def _break_hang(self, hang: Hang) -> Outcome:
        """Write the stacks of all ranks into the journal, then kill their processes."""
        attempt = self._position.attempt
        self._session.tell("hang", attempt=attempt, kind=hang.kind, ranks=list(hang.ranks), seconds=hang.seconds)
        self._screen.message(f"{hang.describe()}; taking stacks, then starting again")
        self._session.ask("ask_stacks", attempt)
        self._wait_until(lambda now: len(now.stacks | now.ended_ranks) == now.world_size, STACKS_SECONDS)
        self._session.ask("kill_attempt", attempt)
        if not self._wait_until(lambda now: len(now.ended_ranks) == now.world_size, STACKS_SECONDS):
            self._fleets.end()  # a process is in an uninterruptible wait: give up the node's worker with it
        rank = hang.ranks[0] if len(hang.ranks) == 1 else None
        return Outcome(failure=Failure(kind="hang", rank=rank, message=hang.describe()))

    def _wait_until(self, condition: Callable[[Status], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (done := condition(self._session.status())) and time.monotonic() < end:
            time.sleep(0.05)
        return done


def outcome_of(failure: Failure | None, result: dict[str, Any] | None, *, pause: Pause | None, is_taken_over: bool) -> Outcome:
    """What an attempt came to whose ranks have ended, or whose fleet has. `pause`: the ranks were asked for it, and no signal came since.

    An attempt that handed in its result had nothing left to do, so what died afterwards does not matter, however it died."""
    if result is not None:
        return Outcome(result=result, pause=pause if result["stopped"] else None)
    return Outcome() if is_taken_over else Outcome(failure=failure)


def payload_of(session: Session, position: Position) -> Payload:
    """The spec and the data files that the ranks of the attempt at `position` get."""
    failures, observed_seconds = observed_failures(session.newest_events())
    spec = WorkerSpec(
        config=session.config,
        dataset=session.data if isinstance(session.data, str) else None,
        generation=session.generation,
        attempt=position.attempt,
        resume=ResumePoint.at(position.start) if position.start else None,
        threads=session.resources.threads_per_worker,
        identity=session.decided.identity.record(),
        skip=position.skip,
        failures=failures,
        observed_seconds=observed_seconds,
    )
    return Payload(target=TARGET, spec=pickle.dumps(spec), files={} if isinstance(session.data, str) else session.data)


def wait_for_news(session: Session, signals: Signals, fleet: Fleet, ended: int, *, is_told: bool) -> Status:
    """Wait until more than `ended` ranks have ended, the fleet has ended, a signal has come, or a heartbeat interval has passed. Returns
    the status. Signals do not end the wait if `is_told`: the ranks already know."""
    alarm = signals.new_alarm()
    if is_told or not signals.number:
        poll = poll_seconds(fleet.workers, session.config.cluster.heartbeat_seconds)
        ask = partial(session.call, "news", ended, poll)
        news = ask()
        news.future().add_done_callback(lambda _: alarm.put(None))
        with suppress(Empty):
            alarm.get(timeout=poll + NEWS_SECONDS)
        if not fleet.wait(0) and (is_told or not signals.number):
            status: Status = session.answer(news, again=ask)
            return status
    return session.status()


def has_begun(status: Status) -> bool:
    """Whether the attempt may have unsaved steps. Beats may be a second old, and a fast run does many steps in that time."""
    at_work = any(rank.phase not in BEFORE_STEPS for rank in status.ranks.values())
    last = status.checkpoints.last
    return at_work or status.steps_done > status.start_step or (last is not None and last.step > status.start_step)


def may_begin(status: Status, signal_seconds: float, heartbeat_seconds: float) -> bool:
    """Whether a rank may have left its start by now, although no beat says so: a beat tells of a time up to a heartbeat before it came. It
    is not waited for longer than a few heartbeats. `signal_seconds`: time since the signal."""
    oldest_seconds = max((rank.age_seconds for rank in status.ranks.values()), default=-heartbeat_seconds)
    return oldest_seconds + heartbeat_seconds > signal_seconds and signal_seconds < MOST_HEARTBEATS_WAITED * heartbeat_seconds


def signs(status: Status) -> dict[int, Sign]:
    """The hang watch's input: one Sign for each rank that has not ended, also for those that nobody has heard of yet."""
    return {rank: _sign(status, rank) for rank in range(status.world_size) if rank not in status.ended_ranks}


def _sign(status: Status, rank: int) -> Sign:
    known, report = status.ranks.get(rank), status.reports.get(rank)
    state = report.state if report is not None else ""
    if known is None:
        return Sign(state=state, age_seconds=0.0, ticks=0, phase=PLACING if report is None else ABSENT)
    return Sign(state=state, age_seconds=known.age_seconds, ticks=known.ticks, phase=known.phase)


def silent_agents(status: Status) -> list[int]:
    """Ranks that have not ended as far as is known, and whose agents do not answer."""
    return [rank for rank, age in status.agent_ages.items() if age > AGENT_SILENT_SECONDS and rank not in status.ended_ranks]


def lost_agents(status: Status, silent: Sequence[int], alive: Collection[str]) -> tuple[int, ...]:
    """The `silent` ranks that hold up the attempt: all other ranks have ended, or the rank's node is not among those `alive`."""
    if status.ended_ranks and len(status.ended_ranks) + len(silent) >= status.world_size:
        return tuple(silent)
    return tuple(rank for rank in silent if status.reports[rank].node_id not in alive)


def living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
