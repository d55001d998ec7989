"""Detects ranks that live but make no progress: stopped, silent, or stuck. Pure: trainer/drive/attempt.py passes in what the coordinator
knows, several times a second.

Each kind has its own budget, because some can be told with more certainty than others:
- stopped: the kernel reports state T in /proc (SIGSTOP, a debugger), and no heartbeat arrived meanwhile; a process that is only slowed down
  still beats. STOPPED_SECONDS are enough.
- silent: the process runs but its heartbeat thread does not (a C call that never releases the interpreter, a storage in state D).
- stuck: heartbeats arrive, but the rank neither ticks nor changes its phase.

What may take how long without a tick follows from the phase (beat):

    placing                                     no limit here: Ray Train gives up after cluster.placement_seconds
    absent, starting, decoding, compiling       start_seconds
    measuring                                   start_seconds
    joining                                     start_seconds, and only if no other rank is awaited
    step, evaluation, checkpoint, exporting     hang_seconds, and ten times the longest step so far
    exchange                                    the same, and only if no other rank is awaited
    storage, coordinator                        the same, but the rank ticks as long as it has patience: waiting for these is no hang

Each rank is judged by itself, so one that ticks hides nobody. A rank that waits for others (joining, exchange) is to blame only if all
wait. One in a step may be waiting for others unseen (a GPU, or an all-reduce inside the backward pass), so it is not to blame while another
rank starts, evaluates or waits for a storage: that one goes on or exceeds its own limit. Time in which the driver itself did not run (a
suspended or starved machine) does not count."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.beat import ABSENT, BEFORE_STEPS, COORDINATOR, EVALUATION, EXCHANGE, JOINING, MEASURING, PLACING, STEP, STORAGE

STOPPED_SECONDS = 5.0
SLOWEST_STEPS = 10.0
LONGEST_LOOK_SECONDS = 1.0

_WAITS_FOR_OTHERS = frozenset({JOINING, EXCHANGE})
_MAY_WAIT_UNSEEN = frozenset({STEP})
_MAY_BE_AWAITED = BEFORE_STEPS | {EVALUATION, MEASURING, STORAGE, COORDINATOR}
_OWN_WORK = frozenset({STEP, EVALUATION})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What is known about a rank's process at one moment."""

    state: str
    """The state letter in /proc; "" if unknown."""
    age_seconds: float
    """Time since the last heartbeat; 0 for a rank that has not registered yet."""
    ticks: int
    """Increases whenever the rank makes progress."""
    phase: str
    """What the rank says it is doing: see beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """The ranks to blame, and why. All ranks if the guilty ones cannot be told apart."""

    kind: Literal["stopped", "silent", "stuck", "never started"]
    ranks: tuple[int, ...]
    seconds: float
    """How long they have been in this state."""
    phase: str = ""
    """What they were doing, if that is known and the same for all."""

    def describe(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        what = {
            "stopped": "stopped (state T: SIGSTOP or a debugger)",
            "silent": "silent: its process lives and its heart does not beat",
            "stuck": "stuck: no step done, nor anything else",
            "never started": "never registered" if self.phase == ABSENT else "not training yet",
        }[self.kind]
        doing = f" ({self.phase})" if self.phase not in ("", ABSENT, STEP) else ""
        return f"{who}: {what}{doing} for {self.seconds:.0f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Progress:
    """A rank's newest progress, and when it was made on the watch's clock."""

    ticks: int
    phase: str
    at: float


class HangWatch:
    """Watches one attempt. `hang_seconds`: budget for silent and stuck ranks; `start_seconds`: budget for the time until the first step."""

    def __init__(self, *, hang_seconds: float, start_seconds: float, now: float) -> None:
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._looked_at, self._watched = now, 0.0  # seconds during which the driver really watched
        self._stopped_since: dict[int, float] = {}
        self._progress: dict[int, _Progress] = {}
        self._longest = 0.0

    def look(self, now: float, signs: Mapping[int, Sign]) -> Hang | None:
        """The hang that has exceeded its budget, if any. `now` in seconds, from any steady clock; `signs`: all ranks that have not ended,
        whether they have registered or not."""
        self._watched += min(max(now - self._looked_at, 0.0), LONGEST_LOOK_SECONDS)
        self._looked_at = now
        return self._stopped(signs) or self._silent(signs) or self._stuck(signs)

    def _stopped(self, signs: Mapping[int, Sign]) -> Hang | None:
        self._stopped_since = {
            rank: self._stopped_since.get(rank, self._watched) for rank, sign in signs.items() if sign.state in ("T", "t")
        }
        late = {
            rank: self._watched - since
            for rank, since in self._stopped_since.items()
            if self._watched - since >= STOPPED_SECONDS <= signs[rank].age_seconds
        }
        return Hang(kind="stopped", ranks=tuple(sorted(late)), seconds=max(late.values())) if late else None

    def _silent(self, signs: Mapping[int, Sign]) -> Hang | None:
        late = {rank: sign.age_seconds for rank, sign in signs.items() if sign.age_seconds >= self._hang_seconds <= self._watched}
        return Hang(kind="silent", ranks=tuple(sorted(late)), seconds=max(late.values())) if late else None

    def _stuck(self, signs: Mapping[int, Sign]) -> Hang | None:
        self._note_progress(signs)
        overdue = {rank for rank, sign in signs.items() if self._still(rank) >= self._limit(sign.phase)}
        if not overdue:
            return None
        # Waiting for others is nobody's fault, unless all wait, and all for too long.
        excused = set(_WAITS_FOR_OTHERS)
        if any(sign.phase in _MAY_BE_AWAITED for sign in signs.values()):  # in time, or guilty themselves
            excused |= _MAY_WAIT_UNSEEN
        guilty = {rank for rank in overdue if signs[rank].phase not in excused}
        if any(signs[rank].phase in _MAY_WAIT_UNSEEN for rank in guilty):
            # Which of them waits for which does not show, nor does whose last tick came a moment before the other's.
            guilty |= {rank for rank, sign in signs.items() if sign.phase in _MAY_WAIT_UNSEEN and self._is_late(rank, sign)}
        if len(overdue) == len(signs) and all(sign.phase in _WAITS_FOR_OTHERS for sign in signs.values()):
            guilty = overdue
        return self._blamed(guilty, signs) if guilty else None

    def _blamed(self, guilty: set[int], signs: Mapping[int, Sign]) -> Hang:
        phases = {signs[rank].phase for rank in guilty}
        return Hang(
            kind="never started" if phases <= BEFORE_STEPS else "stuck",
            ranks=tuple(sorted(guilty)),
            seconds=max(self._still(rank) for rank in guilty),
            phase=phases.pop() if len(phases) == 1 else "",
        )

    def _note_progress(self, signs: Mapping[int, Sign]) -> None:
        for rank, sign in signs.items():
            known = self._progress.get(rank)
            if known is not None and (known.ticks, known.phase) == (sign.ticks, sign.phase):
                continue
            if known is not None and known.phase in _OWN_WORK:
                self._longest = max(self._longest, self._watched - known.at)
            self._progress[rank] = _Progress(ticks=sign.ticks, phase=sign.phase, at=self._watched)
        self._progress = {rank: known for rank, known in self._progress.items() if rank in signs}

    def _still(self, rank: int) -> float:
        """Seconds since the rank's newest progress."""
        return self._watched - self._progress[rank].at

    def _is_late(self, rank: int, sign: Sign) -> bool:
        return self._still(rank) >= self._limit(sign.phase) / 2

    def _limit(self, phase: str) -> float:
        if phase == PLACING:
            return math.inf
        if phase in BEFORE_STEPS or phase == MEASURING:
            return self._start_seconds
        return max(self._hang_seconds, SLOWEST_STEPS * self._longest)
