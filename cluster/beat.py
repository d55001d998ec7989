"""A beat: what a rank reports about once a second. One frozen record that travels from the rank to the driver.

A rank's Heartbeat creates it, its agent sends it with the question for orders, and the coordinator keeps the newest. The driver's hang
watch and progress line read it there. It is pickled between processes of one run, which all run the same code."""

from collections.abc import Mapping
from dataclasses import dataclass, field

STARTING = "starting"
"""Phase before the first step, or while something is compiled."""
EXCHANGE = "exchange"
"""Phase in which a rank waits for the others."""

CALLS_PER_SECOND = 400
"""Limit for all agents together, and for all beats while the ranks agree on a stop. A coordinator answers a few thousand calls a second,
and has other work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's position, its figures, and a sign of life."""

    attempt: int
    rank: int
    steps_done: int
    steps_begun: int
    """One more than steps_done while a step is running (stop.Gate)."""
    promised_stop: int | None = None
    """The number of steps after which this rank has promised to stop, if any."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Current figures, such as the loss. Empty if there are none yet."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Seconds by cause since the run began, over all attempts (trainer.runs.summary.ACCOUNTED)."""
    own_seconds: float | None = None
    """This rank's own work on the steps of this attempt, without waiting for others. None: not known yet."""
    phase: str = STARTING
    """What the rank is doing: "starting", "step", "exchange", "evaluation", "checkpoint"."""
    ticks: int = 0
    """Increases whenever the rank makes progress."""
    urgent: bool = False
    """The rank waits for the answer, the ranks are agreeing on a stop, or this is the last beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeatReply:
    """The coordinator's answer to a beat."""

    stop_at: int | None
    """Number of steps after which to stop; None to continue."""
    confirmed: bool
    """Every rank has promised to stop there."""
    again_seconds: float | None = None
    """When to beat again, whatever the interval: set while the ranks agree on a stop, where a late beat would delay all of them."""
