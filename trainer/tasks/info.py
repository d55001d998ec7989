"""Descriptions of tasks for code that does not compute with them: the driver, the list of runs, the report. Imports no torch.

A task (trainer.tasks.task) makes its own TaskInfo. The driver gets it from the model check (trainer.drive.check), and writes it into the
journal (`run_started`, key `task`) and into summary.json, where readers of a run's folder find it. Runs older than task names are image
classification (`info_of`).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A number that an evaluation computes."""

    name: str
    """In the field's terms: accuracy, map, skin_tone_accuracy. Evaluation entries and summary.json hold it under `key`."""
    title: str
    """For people, e.g. Accuracy."""
    unit: Literal["ratio", "number"] = "ratio"
    """A ratio goes from 0 to 1 and is shown in percent."""
    higher_is_better: bool = True

    @property
    def key(self) -> str:
        return f"test_{self.name}"

    @property
    def in_words(self) -> str:
        """The title for use within a sentence, e.g. accuracy. Abbreviations keep their capitals."""
        return self.title[:1].lower() + self.title[1:] if self.title[1:2].islower() else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskInfo:
    """A task as its readers see it."""

    name: str
    """classification, multilabel, multitask, or the name that a user's own task gives itself."""
    unit: str = "images"
    """What samples are called, in the plural."""
    measures: tuple[Measure, ...]
    """The first one is the headline: the number by which two runs are compared."""
    panels: tuple[str, ...]
    """The report's panels in order, by their names in `trainer.report.panels`."""
    loss_floor: float | None = 0.0
    """The lowest value that the loss can have; None if it has no lower bound, as with learned weights of several losses."""

    def __post_init__(self) -> None:
        if not self.measures:
            raise ValueError(f"task {self.name} has no measure; give it at least one, the headline first")

    @property
    def headline(self) -> Measure:
        return self.measures[0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. `from_json` returns an equal TaskInfo."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskInfo":
        """ValueError if `value` did not come from `to_json`. Keys from a later release are ignored."""
        try:
            known = {name: value[name] for name in cls.__slots__ if name in value}
            known["measures"] = tuple(Measure(**{key: each[key] for key in Measure.__slots__ if key in each}) for each in value["measures"])
            known["panels"] = tuple(value["panels"])
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{value!r:.80} describes no task ({error})") from None


CLASSIFICATION = TaskInfo(
    name="classification",
    measures=(
        Measure(name="accuracy", title="Accuracy"),
        Measure(name="balanced_accuracy", title="Balanced accuracy"),
        Measure(name="macro_f1", title="Macro F1"),
    ),
    panels=("confusion", "examples", "classes"),
)
"""One of several labels per image."""


MULTILABEL = TaskInfo(
    name="multilabel",
    measures=(
        Measure(name="map", title="mAP"),
        Measure(name="micro_f1", title="Micro F1"),
        Measure(name="macro_f1", title="Macro F1"),
        Measure(name="exact_match", title="Exact match"),
    ),
    panels=("labels", "examples"),
)
"""Any number of labels per image."""


def measure_name(target: str, measure: str) -> str:
    """A multitask's name for a measure of one target, in a form that JSON keys and Prometheus accept."""
    return f"{re.sub(r'[^a-z0-9]+', '_', target.lower()).strip('_') or 'target'}_{measure}"


def info_of(*said: Mapping[str, Any] | None) -> TaskInfo:
    """The task named by the first of `said` (summaries, journal events) that names one; else classification, the only task of old runs."""
    for each in said:
        if each and isinstance(each.get("task"), Mapping):
            return TaskInfo.from_json(each["task"])
    return CLASSIFICATION
