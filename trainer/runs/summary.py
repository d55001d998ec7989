"""Computes the result of a run, `summary.json`, from the journal and from what rank 0 returned. Pure; called by trainer/drive/ending.py.
Its accounting of seconds is also used by trainer/drive/account.py, the report's timeline and status."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.settings.tree import RunConfig
from trainer.tasks.info import TaskInfo, info_of

ACCOUNTED = ("step_seconds", "data_wait_seconds", "exchange_wait_seconds", "evaluation_seconds", "checkpoint_stall_seconds")
"""Fields of History that a run's accounting needs."""

Event = Mapping[str, Any]


def sessions(events: Sequence[Event]) -> list[list[Event]]:
    """Splits the journal into the sessions of its drivers: each begins with `run_started`."""
    out: list[list[Event]] = []
    for event in events:
        if event["event"] == "run_started":
            out.append([])
        if out:
            out[-1].append(event)
    return out


def wall_seconds(events: Sequence[Event]) -> float:
    """Seconds between each driver's first and last event, added up; the time between two drivers does not count."""
    return float(sum(session[-1]["time"] - _began(session) for session in sessions(events)))


def _began(session: Sequence[Event]) -> float:
    """Start time of the session's process: its imports and the start of Ray come before its first event."""
    return float(session[0].get("process_started", session[0]["time"]))


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a session: begin and end as unix times, and the cause that the time went to."""

    begin: float
    end: float
    cause: str
    """"training" (steps, their waits, evaluations, checkpoints), or a cause of `accounting` that the journal alone shows."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def timeline(events: Sequence[Event]) -> list[list[Span]]:
    """Each session from the start of its process to its last event, without gaps: the spans that `accounting` counts, in order of time."""
    told: list[list[Span]] = []
    kept = 0.0  # seconds of training that led to the present state
    marks = {0: 0.0}  # step of a commit -> `kept` at that moment

    def add(cause: str, begin: float, end: float) -> None:
        spans = told[-1]
        at = spans[-1].end if spans else began_session
        for what, first, last in (("other", at, begin), (cause, max(at, begin), end)):
            if last > first:
                if spans and spans[-1].cause == what:
                    spans[-1] = Span(spans[-1].begin, last, what)
                else:
                    spans.append(Span(first, last, what))

    def turn(seconds: float, cause: str) -> None:
        """Assigns the last `seconds` of kept training to `cause`."""
        for spans in reversed(told):
            for index in range(len(spans) - 1, -1, -1):
                if seconds <= 0:
                    return
                span = spans[index]
                if span.cause == "training":
                    cut = span.end - min(seconds, span.seconds)
                    seconds -= span.seconds
                    kept_part = [Span(span.begin, cut, "training")] if cut > span.begin else []
                    spans[index : index + 1] = [*kept_part, Span(cut, span.end, cause)]

    for session in sessions(events):
        told.append([])
        began_session = now = _began(session)
        began, cause, since = now, "start_up", None
        for event in [*session, {"event": "session_ended", "time": session[-1]["time"]}]:
            name, now = event["event"], max(now, event["time"])  # the writers' clocks differ
            if since is not None:
                add("training", since, now)
                kept, since = kept + now - since, now
            match name:
                case "training_started":
                    if since is None:
                        add(cause, began, now)
                    since = now
                case "checkpoint_committed":
                    marks[event["step"]] = kept
                case "attempt_started":
                    start = event["start_step"]
                    marks = {step: mark for step, mark in marks.items() if step <= start}
                    survived = min(kept, marks[max(marks)])
                    turn(kept - survived, "lost_work")
                    kept = survived
                case "compiled":
                    if since is not None:
                        took = min(float(event.get("seconds", 0.0)), kept - marks[max(marks)])
                        turn(took, "compile")
                        kept -= took
                case "hang":
                    if since is not None:  # these seconds were no training; the time before them may have been
                        still = min(float(event.get("seconds", 0.0)), kept - marks[max(marks)])
                        turn(still, "hang")
                        kept -= still
                        began, cause, since = now, "hang", None
                case "attempt_failed" | "attempt_paused":
                    if since is None:
                        add(cause, began, now)
                    began, cause, since = now, "recovery" if name == "attempt_failed" else "resize", None
                case "run_finished" | "run_stopped" | "run_failed":
                    if since is None:
                        add(cause, began, now)
                    began, cause, since = now, "other", None
                case "session_ended":
                    if since is None:
                        add(cause, began, now)
    return told


def accounting(events: Sequence[Event], history: Mapping[str, float]) -> dict[str, float]:
    """Where every second of the drivers' lives went; the values are not negative and add up to `wall_seconds`.

    `history` are rank 0's totals over the steps that survived. The causes: start_up lasts to an attempt's first step; recovery from a
    failure to the next attempt's first step; compile is the part of either that compiling took; resize is like recovery, after a change of
    the number of workers; hang lasts from the last sign of life to the failure; lost_work is training after the commit that a later attempt
    went back to; exchange_wait is what steps waited for other ranks (stragglers) and the network; other is the rest: preparing data, steps
    between a snapshot and its commit where a failure followed, the last checkpoint, the export, shutting down. `timeline` has the same
    seconds in order.
    """
    totals: dict[str, float] = {}
    for span in itertools.chain.from_iterable(timeline(events)):
        totals[span.cause] = totals.get(span.cause, 0.0) + span.seconds
    waits = {cause: totals.get(cause, 0.0) for cause in ("start_up", "compile", "recovery", "resize", "hang")}
    lost = totals.get("lost_work", 0.0)
    training = totals.get("training", 0.0) + lost
    parts = {
        "steps": max(
            0.0, history.get("step_seconds", 0.0) - history.get("data_wait_seconds", 0.0) - history.get("exchange_wait_seconds", 0.0)
        ),
        "data_wait": history.get("data_wait_seconds", 0.0),
        "exchange_wait": history.get("exchange_wait_seconds", 0.0),
        "checkpoint_stall": history.get("checkpoint_stall_seconds", 0.0),
        "evaluation": history.get("evaluation_seconds", 0.0),
    }
    counted = sum(parts.values())
    if counted > training:  # the clocks of ranks and journal differ
        parts = {cause: seconds * training / counted for cause, seconds in parts.items()}
        counted = training
    # A commit that the journal missed (its driver died before) makes the lost work look larger than it was.
    parts |= waits | {"lost_work": min(lost, training - counted)}
    parts["other"] = max(0.0, wall_seconds(events) - sum(parts.values()))
    return parts


def restarts(events: Sequence[Event]) -> int:
    """Attempts after a driver's first one, except those that began because the number of workers changed."""
    return sum(max(0, _count(session, "attempt_started") - 1 - _count(session, "attempt_paused")) for session in sessions(events))


def resizes(events: Sequence[Event]) -> int:
    """How often the number of workers changed from one attempt to the next, within one driver."""
    count = 0
    for session in sessions(events):
        workers = [event.get("workers") for event in session if event["event"] == "attempt_started"]
        count += sum(before != now for before, now in itertools.pairwise(workers))
    return count


def _count(events: Sequence[Event], name: str) -> int:
    return sum(event["event"] == name for event in events)


def summarise(
    *, config: RunConfig, status: str, events: Sequence[Event], result: Mapping[str, Any] | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes summary.json. `result` is rank 0's (None if no attempt ended well); `facts` are known to the driver: workers, classes, task (a
    TaskInfo or its JSON), ... It holds everything that the evaluation returned, numbers early and tables late, because the list of runs
    reads only the beginning."""
    result = result or {}
    history = result.get("history", {})
    evaluation = result.get("evaluation", {})
    parts = accounting(events, history)
    wall = wall_seconds(events)
    step_seconds = history.get("step_seconds", 0.0)
    commits = [e for e in events if e["event"] == "checkpoint_committed"]
    steps_per_epoch = facts.get("steps_per_epoch") or 1
    steps = result.get("steps_done", commits[-1]["step"] if commits else 0)
    said = facts.get("task")
    task = said if isinstance(said, TaskInfo) else info_of({"task": said})
    measures, details = _evaluated(evaluation)
    return {
        "run": config.run,
        "status": status,
        "steps": steps,
        "epochs": steps / steps_per_epoch,
        "workers": facts.get("workers"),
        "virtual_ranks": config.train.virtual_ranks,
        "restarts": restarts(events),
        "preemptions": sum(event["event"] == "attempt_paused" and event.get("kind") == "preempted" for event in events),
        "resized": resizes(events),
        "hangs": _count(events, "hang"),
        "batches_skipped": len({event["step"] for event in events if event["event"] == "batch_skipped"}),
        "samples_seen": history.get("samples"),
        "quarantined": facts.get("quarantined", 0),
        **_chosen(result.get("selection")),
        "train_loss": history.get("train_loss"),  # of the last batch
        "mean_train_loss": history.get("mean_train_loss"),  # of all samples between the last two evaluations
        "test_accuracy": evaluation.get("test_accuracy"),
        "test_loss": evaluation.get("test_loss"),
        **measures,
        "task": task.to_json(),
        "images_per_second": history["samples"] / step_seconds if step_seconds else None,
        "goodput": parts["steps"] / wall if wall and history else None,
        "data_wait_ratio": history["data_wait_seconds"] / step_seconds if step_seconds else None,
        "checkpoint_stall_seconds": history.get("checkpoint_stall_seconds"),
        "recovery_seconds": parts["recovery"],
        "weights_sha256": result.get("weights_sha256"),
        "dataset_fingerprint": facts.get("dataset_fingerprint"),
        "test_fingerprint": facts.get("test_fingerprint"),
        "seconds": wall,
        "compile_seconds": float(sum(event.get("seconds", 0.0) for event in events if event["event"] == "compiled")),
        "profile": next((event["profile"] for event in reversed(events) if event["event"] == "profiled"), None),
        "checkpoints": len(commits),
        "parameters": result.get("parameters"),
        "device": result.get("device"),
        "threads_per_worker": facts.get("threads"),
        "backend": result.get("backend"),
        "cache": result.get("cache"),
        **({"unlabelled": history["unlabelled"]} if history.get("unlabelled") else {}),
        "classes": facts.get("classes"),
        "test_count": evaluation.get("test_count"),
        "train_counts": facts.get("train_counts"),
        "first_classes": history.get("first_classes") or None,
        "per_class": evaluation.get("per_class"),
        "confusion": evaluation.get("confusion"),
        **details,
        "accounting": parts if history else None,
        "ranks": result.get("ranks"),
        "versions": facts.get("versions"),
        "command": facts.get("command"),
    }


def _chosen(selection: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the weights were chosen (trainer.runs.choice.selection_of), where a validation split was watched."""
    return {"selection": selection, "stopped_early": selection["stopped_early"]} if selection else {}


_PLACED = frozenset({"step", "epoch", "test_accuracy", "test_loss", "test_count", "per_class", "confusion"})
"""Keys of an evaluation's entry that have a place of their own in the summary."""


def _evaluated(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(numbers, tables): the other keys of an evaluation, by type."""
    others = {key: value for key, value in entry.items() if key not in _PLACED}
    numbers = {key: value for key, value in others.items() if key.startswith(("test_", "validation_"))}
    return numbers, {key: value for key, value in others.items() if key not in numbers}
