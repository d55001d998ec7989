"""Detects ranks that live but make no progress: stopped, silent, or stuck. Pure: trainer/drive/attempt.py passes in what the coordinator
knows, several times a second.

Each kind has its own budget, because some can be told with more certainty than others:
- stopped: the kernel reports state T in /proc (SIGSTOP, a debugger), and no heartbeat arrived meanwhile; a process that is only slowed down
  still beats. STOPPED_SECONDS are enough.
- silent: the process runs but its heartbeat thread does not (a C call that never releases the interpreter, a storage in state D).
- stuck: heartbeats arrive but nobody makes progress: one rank sleeps or spins, and the others wait for it in a collective.
A step that once took long may do so again, so no rank counts as stuck before ten times the longest step so far. Time in which the driver
itself did not run (a suspended or starved machine) does not count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.beat import EXCHANGE, STARTING

STOPPED_SECONDS = 5.0
SLOWEST_STEPS = 10.0
LONGEST_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What is known about a rank's process at one moment."""

    state: str
    """The state letter in /proc; "" if unknown."""
    age_seconds: float
    """Time since the last heartbeat."""
    ticks: int
    """Increases whenever the rank makes progress."""
    phase: str
    """What the rank says it is doing: see beat.Beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """The ranks to blame, and why. All ranks if the guilty ones cannot be told apart."""

    kind: Literal["stopped", "silent", "stuck", "never started"]
    ranks: tuple[int, ...]
    seconds: float
    """How long they have been in this state."""

    def describe(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        what = {
            "stopped": "stopped (state T: SIGSTOP or a debugger)",
            "silent": "silent: its process lives and its heart does not beat",
            "stuck": "stuck: no step done, nor anything else",
            "never started": "not training yet",
        }[self.kind]
        return f"{who}: {what} for {self.seconds:.0f} s"


class HangWatch:
    """Watches one attempt. `hang_seconds`: budget for silent and stuck ranks; `start_seconds`: budget for the time until the first step."""

    def __init__(self, *, hang_seconds: float, start_seconds: float, now: float) -> None:
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._looked_at, self._watched = now, 0.0  # seconds during which the driver really watched
        self._stopped_since: dict[int, float] = {}
        self._ticks: dict[int, int] = {}
        self._progress_at = 0.0
        self._longest = 0.0
        self._training = False

    def look(self, now: float, signs: Mapping[int, Sign]) -> Hang | None:
        """The hang that has exceeded its budget, if any. `now` in seconds, from any steady clock."""
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
        ticks = {rank: sign.ticks for rank, sign in signs.items()}
        training = bool(signs) and all(sign.phase != STARTING for sign in signs.values())
        if ticks != self._ticks or training != self._training:
            if self._training and training:
                self._longest = max(self._longest, self._watched - self._progress_at)
            self._ticks, self._training, self._progress_at = ticks, training, self._watched
            return None
        still = self._watched - self._progress_at
        if not training:
            return Hang(kind="never started", ranks=tuple(sorted(signs)), seconds=still) if still >= self._start_seconds else None
        if still < max(self._hang_seconds, SLOWEST_STEPS * self._longest):
            return None
        # A rank that waits for the others is not to blame, unless all of them wait.
        guilty = tuple(sorted(rank for rank, sign in signs.items() if sign.phase != EXCHANGE)) or tuple(sorted(signs))
        return Hang(kind="stuck", ranks=guilty, seconds=still)
