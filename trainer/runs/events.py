"""The journal's events in words: one table for all who tell people what happened. `watch` shows a line, the report a list.

An event of a kind that is not in the table (from a newer program) is shown plainly, with all its fields.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.runs.measures import in_words, measured, shown
from trainer.settings.units import duration, number, size
from trainer.tasks.info import CLASSIFICATION, TaskInfo

Event = Mapping[str, Any]

STRANGE = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError)
"""What making sense of an event or a summary may raise: an older or newer program wrote it, or anyone."""
LONGEST = 300
"""Characters of a message on one line; for an event that is shown plainly, of all its fields."""
_OF_EVERY_EVENT = frozenset({"time", "event", "writer"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How to show one kind of event."""

    words: Callable[[Event], str] | None = None
    """A sentence without capital and full stop; None shows the fields plainly."""
    is_followed: bool = True
    """Whether `watch` shows it; if not, the progress line or the events around it say enough."""
    is_unusual: bool = True
    """Whether the report lists it; if not, it happens in every run."""


def words_of(event: Event, info: TaskInfo = CLASSIFICATION) -> str:
    """An event in words, for people, on one line; "" if its kind or form is unknown. `info` is of the run's task."""
    name = str(event.get("event"))
    try:
        if name == "evaluation":
            return _evaluation(event, info)
        words = KINDS.get(name, Kind()).words
        return words(event) if words else ""
    except STRANGE:
        return ""


def plainly(event: Event) -> str:
    """All fields except those that every event has; the message first, without its name."""
    message = first_line(event.get("message", ""))
    fields = [f"{key}={_short(value)}" for key, value in event.items() if key not in _OF_EVERY_EVENT and key != "message"]
    return "  ".join(part for part in (message, *fields) if part)[:LONGEST]


def is_followed(event: Event) -> bool:
    return KINDS.get(str(event.get("event")), Kind()).is_followed


def is_unusual(event: Event) -> bool:
    """Whether the report should list it, because it does not happen in every run."""
    is_first_attempt = event.get("event") == "attempt_started" and event.get("attempt") in (0, 1) and event.get("start_step") == 0
    return KINDS.get(str(event.get("event")), Kind()).is_unusual and not is_first_attempt


def is_told_whole(event: Event) -> bool:
    """Whether one line can hold all of it: no traceback, no stacks, no table."""
    texts = [str(value).strip() for value in event.values()]
    return all(len(text) <= LONGEST and "\n" not in text for text in texts)


def first_line(text: object) -> str:
    return _short(str(text).strip().partition("\n")[0])


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


# --- the table ------------------------------------------------------------------------------------------------------------------------


def _step(event: Event) -> str:
    return number(event.get("step"))


def _at_step(event: Event) -> str:
    """A rank's and the coordinator's outages are of a checkpoint, the driver's are of none."""
    return f"step {_step(event)}: " if event.get("step") is not None else ""


def _message(event: Event) -> str:
    return first_line(event.get("message", ""))


def _evaluation(event: Event, info: TaskInfo) -> str:
    """The headline, known or not, and those other measures that the event holds."""
    split = str(event.get("split", "test"))
    read = {measure.key: event.get(f"{split}_{measure.name}") for measure in info.measures}
    told = [(info.headline, read[info.headline.key]), *(pair for pair in measured(info, read) if pair[0] != info.headline)]
    words = ", ".join(f"{in_words(measure, split)} {shown(measure.unit, value)}" for measure, value in told)
    return f"step {_step(event)}: {words}, loss {event.get(f'{split}_loss', float('nan')):.4f}"


def _attempt_started(event: Event) -> str:
    workers = event.get("workers")
    return f"attempt {event.get('attempt')}: {workers} worker{'' if workers == 1 else 's'}, from step {number(event.get('start_step'))}"


def _attempt_failed(event: Event) -> str:
    where = f" on rank {event['rank']}" if event.get("rank") is not None else ""
    lost = event.get("lost_steps")
    cost = f"; {number(lost)} step{'' if lost == 1 else 's'} lost" if lost is not None else ""
    at = f" at step {number(event['last_step'])}" if event.get("last_step") is not None else ""
    return f"attempt {event.get('attempt', '?')} failed{where}{at} ({event.get('kind', '?')}): {_message(event).removesuffix('.')}{cost}"


def _hang(event: Event) -> str:
    ranks = event.get("ranks") or []
    who = f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"
    return f"{who} made no progress for {duration(event.get('seconds'))} ({event.get('kind')})"


def _run_stopped(event: Event) -> str:
    signal = event.get("signal")
    return f"stopped at step {_step(event)}{f' by {signal}' if signal else ''}"


def _versions_differ(event: Event) -> str:
    pairs = ", ".join(f"{name} {before} before, {now} now" for name, (before, now) in event["differs"].items())
    return f"the weights may differ in their last bits: {pairs}"


def _straggler(event: Event) -> str:
    own, others = event["own_seconds"], event["others_seconds"]
    return f"step {_step(event)}: rank {event.get('rank')} is slow, {duration(own)} a step of its own; the others {duration(others)}"


KINDS: Mapping[str, Kind] = {
    "run_started": Kind(words=lambda event: f"started: {event.get('command', '')}", is_unusual=False),
    "attempt_started": Kind(words=_attempt_started),
    "worker_registered": Kind(is_followed=False, is_unusual=False),
    "training_started": Kind(words=lambda event: f"training from step {_step(event)}", is_unusual=False),
    "first_step": Kind(is_followed=False, is_unusual=False),
    "compiled": Kind(words=lambda event: f"compiled in {duration(event.get('seconds'))}"),
    "evaluation": Kind(is_unusual=False),  # uses the measures of its task
    "stopped_early": Kind(
        words=lambda event: (
            f"ends at step {_step(event)}, epoch {number(event['epoch'])}: {number(event['patience'])} evaluations without a better one "
            "(train.patience)"
        ),
        is_unusual=False,
    ),
    "checkpoint_committed": Kind(
        words=lambda event: f"step {_step(event)}: checkpoint saved ({size(event.get('size_bytes'))})", is_unusual=False
    ),
    "checkpoint_failed": Kind(words=lambda event: f"step {_step(event)}: the checkpoint was not saved: {_message(event)}"),
    "checkpoint_corrupt": Kind(words=lambda event: f"checkpoint {event.get('path')} is damaged: {event.get('reason')}"),
    "prune_failed": Kind(is_followed=False),
    "attempt_failed": Kind(words=_attempt_failed),
    "attempt_paused": Kind(words=lambda event: f"to other workers: {event.get('reason')}"),
    "pause_requested": Kind(words=lambda event: f"to other workers: {event.get('reason')}"),
    "notice_stands": Kind(words=lambda event: f"training on in spite of a notice of preemption: {event.get('reason')}"),
    "workers_asked_for": Kind(words=lambda event: f"asked the cluster for {number(event.get('workers'))} more"),
    "settings_chosen": Kind(words=_message),
    "data_corrected": Kind(words=lambda event: f"the data: {_message(event)}", is_unusual=False),
    "samples_chosen": Kind(words=_message, is_unusual=False),
    "versions_differ": Kind(words=_versions_differ),
    "resumed": Kind(words=lambda event: f"going on from the checkpoint of step {_step(event)}"),
    "hang": Kind(words=_hang),
    "coordinator_hung": Kind(
        words=lambda event: f"the coordinator answered nobody for {duration(event.get('seconds'))} ({event.get('kind')})"
    ),
    "stacks": Kind(words=lambda event: f"what rank {event.get('rank', '?')} was doing", is_followed=False),
    "straggler": Kind(words=_straggler),
    "straggler_recovered": Kind(words=lambda event: f"step {_step(event)}: rank {event.get('rank')} is as fast as the others again"),
    "batch_skipped": Kind(words=lambda event: f"the batch of step {_step(event)} is left out: {first_line(event.get('reason'))}"),
    "sample_quarantined": Kind(is_followed=False, is_unusual=False),
    "stop_requested": Kind(words=lambda event: f"asked to stop: {event.get('reason')}"),
    "storage_outage": Kind(words=lambda event: f"{_at_step(event)}the storage does not answer: {_message(event)}"),
    "storage_recovered": Kind(words=lambda event: f"{_at_step(event)}the storage answers again, after {duration(event.get('seconds'))}"),
    "run_taken_over": Kind(words=lambda event: f"taken over by {event.get('by')}"),
    "run_finished": Kind(words=lambda event: f"finished after {number(event.get('steps'))} steps", is_unusual=False),
    "run_stopped": Kind(words=_run_stopped),
    "report_failed": Kind(words=lambda event: f"the report could not be written: {_message(event)}"),
    "report_incomplete": Kind(words=lambda event: f"left out of the report: {first_line('; '.join(event['problems']))}"),
    "run_failed": Kind(words=lambda event: f"failed ({event.get('kind')}): {_message(event)}"),
    "account": Kind(is_followed=False, is_unusual=False),
}
