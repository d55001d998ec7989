"""What a trial has come to, read from its run's folder: its score at a rung, whether it has finished or cannot go on. Called by running.py
while it waits, and by results.py. Pure but for the reading."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runs.choice import Rule, choose
from trainer.search.ladder import Score
from trainer.series.train import Member, Summary
from trainer.settings.tree import RunConfig

Event = Mapping[str, Any]
_NEARLY = 1e-6
"""Epochs are steps divided by the steps of an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A run of the search."""

    number: int
    config: RunConfig
    steps_per_epoch: int

    @property
    def name(self) -> str:
        """The run's folder within the search's."""
        return f"trial-{self.number:03d}"

    @property
    def member(self) -> Member:
        return Member(name=self.name, config=self.config, steps=self.steps_per_epoch * self.config.train.epochs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a trial has come to."""

    evaluations: tuple[Event, ...] = ()
    """Of the validation split, each step once, in order."""
    summary: Summary | None = None
    """Of a run that has finished."""
    diverged: str = ""
    """Why the run cannot go on, if its numbers are to blame: the same settings would come to the same end."""

    def score(self, rule: Rule, epochs: int, whole: int) -> tuple[Score, bool]:
        """(score after `epochs` of the `whole`, whether it is known by now). What the run did beyond them does not count."""
        until = [event for event in self.evaluations if float(event["epoch"]) <= epochs + _NEARLY]
        if self.summary is None:
            has_come = epochs < whole and any(float(event["epoch"]) >= epochs - _NEARLY for event in until)
            if not has_come:
                return None, bool(self.diverged)
        if not until:
            return None, True
        best = choose(rule, until).best if rule.keeps_best else until[-1]
        return (None if best is None else rule.value_of(best)), True


def seen_in(events: Iterable[Event], summary: Summary | None, rule: Rule) -> Seen:
    by_step: dict[int, Event] = {}
    diverged = ""
    for event in events:
        match event:
            case {"event": "evaluation", "step": int(step), "epoch": float() | int(), "split": "validation"} if rule.key in event:
                by_step[step] = event  # a run that went back to a checkpoint evaluates again, and comes to the same
            case {"event": "run_failed", "kind": "numbers"}:
                diverged = str(event.get("message", "")) or "its loss is not finite"
            case {"event": "run_started" | "run_finished"}:
                diverged = ""
    return Seen(
        evaluations=tuple(by_step[step] for step in sorted(by_step)),
        summary=summary,
        diverged="" if summary is not None else diverged,
    )


def last_failure(events: Sequence[Event]) -> str:
    """The kind of the failure with which the run's last driver ended; "" if it did not end so."""
    for event in reversed(events):
        match event:
            case {"event": "run_failed"}:
                return str(event.get("kind", ""))
            case {"event": "run_started" | "run_finished" | "run_stopped"}:
                return ""
    return ""
