"""Stops all ranks after the same number of steps without a synchronisation in each step: both sides of one protocol. No thread, no clock.

The coordinator holds a StopVote, each rank a Gate (inside its Heartbeat); they communicate through beats (beat.py). A proposal to stop
after P steps binds a rank only if it arrives before the rank has begun step P: after that, the rank is inside a collective that the
others must join. So ranks report the steps they have *begun*, not only those they have done."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.beat import CALLS_PER_SECOND, BeatReply

AGAIN_SECONDS = 0.02  # between two beats while the ranks agree on a stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a vote is. What a new coordinator needs to know of it."""

    margin: int
    stop_at: int | None
    confirmed: bool
    promised: Mapping[int, int]
    """By rank; only those above 0."""


class StopVote:
    """The coordinator's side: agreement on a number of steps after which all ranks stop.

    A proposal lies ahead of every begun step. A rank promises it if it has not begun that step, and then waits there. The stop is
    confirmed once all have promised. `steps_begun` shows that a rank was faster than the proposal; a later proposal then replaces it.
    The margin doubles, or becomes what that rank has begun since its previous beat, so that the vote converges even with slow beats and
    fast steps. Meanwhile ranks beat as often as they may. Ranks are at most one step apart, because each step has a collective."""

    def __init__(self, ranks: int, margin: int = 2, *, requested: bool = False) -> None:
        self._ranks, self._margin, self._requested = ranks, margin, requested
        self._begun: dict[int, int] = {}
        self._promised: dict[int, int] = {}
        self._stop_at: int | None = None
        self._confirmed = False

    @property
    def requested(self) -> bool:
        return self._requested

    @property
    def stop_at(self) -> int | None:
        """The newest proposal."""
        return self._stop_at

    @property
    def confirmed(self) -> bool:
        """Every rank has promised the newest proposal."""
        return self._confirmed

    @property
    def agreement(self) -> Agreement:
        promised = {rank: promise for rank, promise in self._promised.items() if promise}
        return Agreement(margin=self._margin, stop_at=self._stop_at, confirmed=self._confirmed, promised=promised)

    def take_up(self, agreement: Agreement) -> None:
        """Go on from what another coordinator's vote has reached. What the ranks have begun since, their next beats say."""
        self._margin, self._stop_at, self._confirmed = agreement.margin, agreement.stop_at, agreement.confirmed
        self._promised = dict(agreement.promised)

    def request(self) -> None:
        self._requested = True

    def hear(self, rank: int, steps_begun: int, promised_stop: int | None) -> BeatReply:
        # Nobody promises what nobody asked for: the coordinator that was asked is dead, and so is what it knew.
        self._requested = self._requested or promised_stop is not None
        stride = steps_begun - self._begun.get(rank, steps_begun)
        self._begun[rank] = max(steps_begun, self._begun.get(rank, 0))
        self._promised[rank] = max(promised_stop or 0, self._promised.get(rank, 0))
        if self._requested and not self._confirmed and len(self._begun) == self._ranks:
            self._decide(max(self._begun.values()), max(self._promised.values()), stride)
        again = max(AGAIN_SECONDS, self._ranks / CALLS_PER_SECOND) if self._requested and not self._confirmed else None
        return BeatReply(stop_at=self._stop_at, confirmed=self._confirmed, again_seconds=again)

    def _decide(self, begun: int, promised: int, stride: int) -> None:
        if self._stop_at is None and promised >= begun:
            self._stop_at = promised  # a previous coordinator proposed it, and some ranks wait there
        elif self._stop_at is None or begun > self._stop_at:
            if self._stop_at is not None:
                self._margin = max(2 * self._margin, stride + 1)
            self._stop_at = begun + self._margin
        # Every rank, and not only those whose promise is known: one that has promised nothing may be past the stop by now.
        self._confirmed = all(self._promised.get(rank) == self._stop_at for rank in range(self._ranks))


class Gate:
    """A rank's side: what it has begun and promised. After `n` steps, arrive(n) says whether step n may begin."""

    def __init__(self, start_step: int) -> None:
        self._steps_done = start_step
        self._steps_begun = start_step + 1  # no gate before the first step
        self._stop_at: int | None = None
        self._confirmed = False

    @property
    def steps_done(self) -> int:
        return self._steps_done

    @property
    def steps_begun(self) -> int:
        return self._steps_begun

    @property
    def stop_at(self) -> int | None:
        """The stop that this rank has promised."""
        return self._stop_at

    def done(self, steps_done: int) -> None:
        """Record finished steps; arrive() decides later whether the next one may begin."""
        self._steps_done = steps_done

    def take(self, reply: BeatReply) -> None:
        """Take in a proposal, unless the step it would forbid has begun."""
        if reply.stop_at is None or reply.stop_at < max(self._steps_begun, self._stop_at or 0):
            return
        self._stop_at, self._confirmed = reply.stop_at, reply.confirmed

    def arrive(self, steps_done: int) -> bool | None:
        """True: stop here. False: the next step has begun. None: wait for confirmation, or for another proposal."""
        self._steps_done = steps_done
        if self._stop_at is None or steps_done < self._stop_at:
            self._steps_begun = max(self._steps_begun, steps_done + 1)
            return False
        assert steps_done == self._stop_at, f"{steps_done} steps done, but promised to stop after {self._stop_at}"
        return True if self._confirmed else None
