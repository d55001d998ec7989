"""The first sentence of a run's page: did it work, how good is it, what did failures cost. Called by sections and compare."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from trainer.report.files import RunFiles, confusion_of, last
from trainer.report.page import number_or_none
from trainer.runs.certainty import interval_words
from trainer.runs.chosen import early_words, kept_words
from trainer.runs.measures import heading, samples, shown
from trainer.settings.units import duration, number

Mood = Literal["good", "warn", "bad"]
_ENDS = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}


def verdict(run: RunFiles) -> tuple[Mood, str]:
    summary = run.summary
    status = _status(run)
    steps = summary.get("steps", last(run.events, "checkpoint_committed", "step"))
    done = f" after {number(steps)} steps" if isinstance(steps, int | float) else ""
    saved = last(run.events, "checkpoint_committed", "step")
    go_on = f"; the newest checkpoint is of step {number(saved)}, and the same command goes on from there" if saved is not None else ""
    trouble = _trouble(run)
    match status:
        case "finished":
            took = f", {duration(summary['seconds'])}" if summary.get("seconds") is not None else ""
            kept = f" Kept: {words}." if (words := kept_words(summary)) else ""
            early = f" It ended early, {words}." if (words := early_words(summary)) else ""
            return ("warn" if trouble else "good"), f"{_result(run)}{done}{took}.{kept}{early} {trouble or 'Nothing failed.'}"
        case "stopped":
            reason = last(run.events, "stop_requested", "reason")
            why = f" ({reason})" if reason else ""
            return "warn", f"Stopped{done}{why} before its end: these numbers are not final{go_on}. {trouble}".rstrip()
        case "":
            return "warn", f"No end is recorded: the run is still going, or was killed{go_on}. {trouble}".rstrip()
    reason = summary.get("error") or last(run.events, "run_failed", "message") or last(run.events, "attempt_failed", "message")
    why = f": {reason}" if reason else ""
    return "bad", f"{status.capitalize()}{done}{why}{go_on}. {trouble}".rstrip()


def _status(run: RunFiles) -> str:
    """The status; empty if no end is recorded."""
    kinds = [event.get("event") for event in run.events]
    ended = next((kind for kind in reversed(kinds) if kind in _ENDS or kind == "run_started"), None)
    if ended == "run_started" and run.summary:  # the summary is of an earlier part of the run, which was started again since
        return ""
    return str(run.summary.get("status") or _ENDS.get(str(ended), ""))


def _result(run: RunFiles) -> str:
    measure, count, unit = run.info.headline, _test_count(run.summary), run.info.unit
    value = number_or_none(run.summary.get(measure.key))
    if value is None:
        return "Finished, without an evaluation"
    of = f"the {number(count)} test {unit}" if count else f"the test {unit}"
    interval = interval_words(run.summary, measure)
    said = shown(measure.unit, value, 2)
    sure = f" (95 % interval: {interval})" if interval else ""
    if run.info.name == "classification":
        return f"{said} of {of} are classified correctly{sure}"
    return f"{heading(measure)} {said} on {of}{sure}"


def _trouble(run: RunFiles) -> str:
    parts = []
    failed = sum(event.get("event") == "attempt_failed" for event in run.events) or run.summary.get("restarts")
    if failed:
        lost = sum(event["lost_steps"] for event in run.events if isinstance(event.get("lost_steps"), int))
        failures = "1 failure" if failed == 1 else f"{number(failed)} failures"
        parts.append(f"{failures} lost {'1 step' if lost == 1 else f'{number(lost)} steps'}.")
    corrupt = sum(event.get("event") == "checkpoint_corrupt" for event in run.events)
    if corrupt:
        parts.append(f"{corrupt} damaged {'checkpoint was' if corrupt == 1 else 'checkpoints were'} found and not used.")
    bad = run.summary.get("quarantined") or len(run.left_out.records)
    if bad:
        parts.append(f"{samples(bad, run.info.unit)} could not be used.")
    return " ".join(parts)


def _test_count(summary: Mapping[str, Any]) -> int:
    if summary.get("test_count"):
        return int(summary["test_count"])
    return int(np.sum(confusion_of(summary)))
