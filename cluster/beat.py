"""A beat: what a rank reports about once a second. One frozen record that travels from the rank to the driver.

A rank's Heartbeat creates it, its agent sends it with the question for orders, and the coordinator keeps the newest. The driver's hang
watch and progress line read it there. It is pickled between processes of one run, which all run the same code."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# What a rank is doing. hang.py says what counts as progress in each phase and how long there may be none.
PLACING = "placing"
"""Of the driver's view only: no agent has reported for this rank yet."""
ABSENT = "absent"
"""Of the driver's view only: the rank has an agent, and has not said a word yet."""
STARTING = "starting"
"""Before the first step: imports, model, weights, checkpoint."""
JOINING = "joining"
"""Before the first step, waiting for the other ranks: the process group, and what it is used for first."""
DECODING = "decoding"
"""Samples are decoded into the cache; ticks with each row group."""
COMPILING = "compiling"
"""The step is compiled, or the device measured."""
STEP = "step"
EXCHANGE = "exchange"
"""Waiting for the other ranks between the first step and the end."""
EVALUATION = "evaluation"
"""Ticks with each batch."""
MEASURING = "measuring"
"""What an evaluation's measures are made of is there; ranking the scores of many labels takes a while, and no part of it ticks."""
CHECKPOINT = "checkpoint"
"""Waiting for the coordinator to commit the last checkpoint; ticks with each of its answers."""
STORAGE = "storage"
"""Waiting for a storage: the checkpoint before, or a file, is not written yet. Ticks while it waits, with a patience of its own."""
COORDINATOR = "coordinator"
"""Waiting for an answer of the coordinator, which may have died and be on its way back. Ticks while it waits, with a patience."""
EXPORTING = "exporting"
"""Rank 0 writes what the run leaves: curves, model."""

BEFORE_STEPS = frozenset({PLACING, ABSENT, STARTING, JOINING, DECODING, COMPILING})
"""Phases in which a rank has no unsaved steps, unless it had done some before."""

_IN_WORDS = {
    ABSENT: "starting workers",
    STARTING: "loading data and model",
    JOINING: "waiting for all workers to join",
    DECODING: "decoding samples into the cache",
    COMPILING: "compiling",
    STORAGE: "waiting for the storage",
    COORDINATOR: "waiting for the coordinator",
    CHECKPOINT: "waiting for the last checkpoint",
    EXPORTING: "writing the model",
}


def in_words(phases: Iterable[str]) -> str:
    """What ranks in these phases are doing, for a person: the first phase of the list above that any of them is in. "" for steps and
    evaluations."""
    there = set(phases)
    return next((words for phase, words in _IN_WORDS.items() if phase in there), "")


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
    """What the rank is doing: one of the names above."""
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
