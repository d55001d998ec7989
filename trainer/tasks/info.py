"""What is said of a task by those that compute nothing of it: the driver, the list of runs, the report. Imports no torch.

A task (trainer.tasks.task) makes its TaskInfo in the rank; the driver learns it when the model is checked, writes it into the journal
(`run_started`, key `task`) and into summary.json, and whoever reads a run's folder finds it there. Runs from before tasks had names are
image classification: `info_of`.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A number that an evaluation gives."""

    name: str
    """In the field's words: accuracy, map, skin_tone_accuracy. An evaluation's entry, and summary.json, hold it as `key`."""
    title: str
    """For people: Accuracy."""
    unit: Literal["ratio", "number"] = "ratio"
    """A ratio is from 0 to 1 and shown in percent."""
    higher_is_better: bool = True

    @property
    def key(self) -> str:
        return f"test_{self.name}"

    @property
    def in_words(self) -> str:
        """The title within a sentence: accuracy; what is an abbreviation keeps its capitals."""
        return self.title[:1].lower() + self.title[1:] if self.title[1:2].islower() else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskInfo:
    """A task as its readers see it."""

    name: str
    """classification, multilabel, multitask, or the name that a task outside the packages gives itself."""
    unit: str = "images"
    """What samples are called, in the plural."""
    measures: tuple[Measure, ...]
    """The first is the headline: the one number by which two runs are compared."""
    panels: tuple[str, ...]
    """Of the report, by their name in `trainer.report.panels`, in order."""
    loss_floor: float | None = 0.0
    """The lowest value that the loss can have; None where it has none, as with learned weights of several losses."""

    def __post_init__(self) -> None:
        if not self.measures:
            raise ValueError(f"task {self.name} has no measure; give it at least one, the headline first")

    @property
    def headline(self) -> Measure:
        return self.measures[0]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives back an equal TaskInfo."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskInfo":
        """ValueError where `value` is nothing that `to_json` gave. Keys that a later release adds are left out."""
        try:
            known = {name: value[name] for name in cls.__slots__ if name in value}
            known["measures"] = tuple(Measure(**{key: each[key] for key in Measure.__slots__ if key in each}) for each in value["measures"])
            known["panels"] = tuple(value["panels"])
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{value!r:.80} describes no task ({error})") from None


CLASSIFICATION = TaskInfo(
    name="classification",
    measures=(Measure(name="accuracy", title="Accuracy"),),
    panels=("confusion", "examples", "classes"),
)
"""One label of several an image."""


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
"""Any number of labels an image."""


def measure_name(target: str, measure: str) -> str:
    """What a task of several targets calls a measure of one of them: a name that keys and Prometheus take."""
    return f"{re.sub(r'[^a-z0-9]+', '_', target.lower()).strip('_') or 'target'}_{measure}"


def info_of(*said: Mapping[str, Any] | None) -> TaskInfo:
    """The task that the first of `said` (summaries, journal events) to name one is of. Else classification, as all runs once were."""
    for each in said:
        if each and isinstance(each.get("task"), Mapping):
            return TaskInfo.from_json(each["task"])
    return CLASSIFICATION
