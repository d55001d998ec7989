"""Which evaluation's weights a run keeps, and when it has waited long enough for a better one. Pure: both follow from the settings and from
the history of evaluations, which every checkpoint holds. So a run that was killed, resized or rolled back chooses as one that was not.

Called by trainer.rank (best.py decides by it), the driver (selection.py checks the settings) and whoever says what was chosen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.settings.tree import TrainConfig
from trainer.tasks.info import Measure, TaskInfo

LOSS = Measure(name="loss", title="Loss", unit="number", higher_is_better=False)
"""The loss as a measure to choose by. It is not among a task's measures: every task has one."""
VALIDATION = "validation"

Entry = Mapping[str, Any]


def validation_key(measure: Measure) -> str:
    """Where an evaluation of the validation split, and summary.json, hold a measure."""
    return f"{VALIDATION}_{measure.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What makes an evaluation better than another, and how long to wait for a better one."""

    measure: Measure
    keeps_best: bool = True
    """Its weights are kept. If not, those of the last step are, and the evaluations decide only when the run ends."""
    patience: int = 0
    """Evaluations without an improvement after which the run ends; 0: never."""
    min_delta: float = 0.0

    @property
    def key(self) -> str:
        return validation_key(self.measure)

    def value_of(self, entry: Entry) -> float | None:
        """The measure, as a number of which more is better; None if it is not known."""
        return _signed(entry.get(self.key), self.measure.higher_is_better)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the evaluations so far come to."""

    best: Entry | None = None
    """The best of them; None if there was none."""
    waited: int = 0
    """Evaluations since the last improvement."""
    stops: bool = False
    """The run has waited long enough, and ends."""

    @property
    def step(self) -> int | None:
        """The number of steps after which the best evaluation was made."""
        return None if self.best is None else int(self.best["step"])


def rule_of(train: TrainConfig, info: TaskInfo) -> Rule:
    """The rule that the settings and the task make. `train.select` is decided. ValueError if the task has no measure of that name."""
    wanted = train.select_measure
    known = {measure.name: measure for measure in (*info.measures, LOSS)}
    if wanted and wanted not in known:
        raise ValueError(f"train.select_measure={wanted!r} is no measure of the task {info.name}; it must be one of {', '.join(known)}")
    return Rule(
        measure=known[wanted] if wanted else info.headline,
        keeps_best=train.select == "best",
        patience=train.patience,
        min_delta=train.min_delta,
    )


def choose(rule: Rule, evaluations: Iterable[Entry]) -> Choice:
    """The choice among `evaluations`, in the order in which they were made. Those of another split do not count.

    An evaluation replaces the best before it if its measure is better, or equally good with a lower loss; so of equal ones the earliest
    stays. One whose measure is NaN or infinite is better than none. For the patience, the measure has to be better by more than `min_delta`
    than at the last improvement, so that many small steps count as soon as they add up.
    """
    best: Entry | None = None
    mark: float | None = None  # the measure at the last improvement
    waited = 0
    for entry in evaluations:
        if rule.key not in entry:
            continue
        value = rule.value_of(entry)
        if best is None or _is_better(rule, entry, best):
            best = entry
        if value is not None and (mark is None or value - mark > rule.min_delta):
            mark, waited = value, 0
        else:
            waited += 1
    return Choice(best=best, waited=waited, stops=0 < rule.patience <= waited)


def selection_of(rule: Rule, evaluations: Sequence[Entry], *, kept: Entry, is_early: bool) -> dict[str, Any]:
    """How the weights of the evaluation `kept` were chosen, for summary.json and trainer.runs.chosen. JSON. `is_early`: there were steps
    left to do."""
    counted = [entry for entry in evaluations if rule.key in entry]
    choice = choose(rule, counted)

    def shown(entry: Entry) -> dict[str, Any]:
        named = {"value": rule.key, "count": f"{VALIDATION}_count", "step": "step", "epoch": "epoch"}
        return {name: entry.get(key) for name, key in named.items()}

    return {
        "select": "best" if rule.keeps_best else "last",
        "measure": asdict(rule.measure),
        "kept": shown(kept),
        "last": shown(evaluations[-1]),
        "evaluations": len(counted),
        "patience": rule.patience,
        "waited": choice.waited,
        "stopped_early": is_early and choice.stops,
    }


def _is_better(rule: Rule, new: Entry, old: Entry) -> bool:
    values = rule.value_of(new), rule.value_of(old)
    if values[0] is None or values[1] is None or values[0] == values[1]:
        if (values[0] is None) != (values[1] is None):
            return values[1] is None
        losses = [_signed(entry.get(validation_key(LOSS)), LOSS.higher_is_better) for entry in (new, old)]
        return losses[0] is not None and (losses[1] is None or losses[0] > losses[1])
    return values[0] > values[1]


def _signed(value: Any, higher_is_better: bool) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if higher_is_better else -float(value)
