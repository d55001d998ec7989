"""What a rank says of itself, about once a second: one frozen record from the rank to the driver.

A rank's Heartbeat makes it, its agent carries it along with the question for orders, the coordinator keeps the newest, and the driver's
hang watch and progress line read it there. It travels by pickle between processes of one run, which all have the same code."""

from collections.abc import Mapping
from dataclasses import dataclass, field

STARTING = "starting"
"""The phase before the first step, or in which something is compiled."""
EXCHANGE = "exchange"
"""The phase in which a rank waits for the others."""

CALLS_PER_SECOND = 400
"""Of all agents together, and of all beats while a stop is being agreed on: a coordinator answers some thousand calls a second, and has
other things to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's position, its figures, and a sign of life."""

    attempt: int
    rank: int
    steps_done: int
    steps_begun: int
    """One more than steps_done while a step is under way (stop.Gate)."""
    promised_stop: int | None = None
    """The number of steps after which this rank has promised to stop, if any."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Figures of now, such as a loss. Empty: none yet."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Seconds by cause since the run began, over all attempts (trainer.runs.summary.ACCOUNTED)."""
    own_seconds: float | None = None
    """This rank's own work on the steps of this attempt, without its waits for others. None: not known yet."""
    phase: str = STARTING
    """What it is doing: "starting", "step", "exchange", "evaluation", "checkpoint"."""
    ticks: int = 0
    """Grows whenever it gets something done."""
    urgent: bool = False
    """It waits for the answer, a stop is being agreed on, or this is its last beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeatReply:
    """The coordinator's answer to a beat."""

    stop_at: int | None
    """Steps after which to stop, None to go on."""
    confirmed: bool
    """Every rank has promised to stop there."""
    again_seconds: float | None = None
    """A stop is being agreed on: when to beat again, whatever the interval. What a rank says late does not help there."""
