"""Panel `classes`: recall, precision and F1 of each class, the weakest first, with its training images, what each of them weighs, and its
recall at the first evaluation beside that at the last; `-` where no test sample measured it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataio.balance import imbalance_of
from trainer.report.files import RunFiles, class_names
from trainer.report.page import NOTHING, Html, join, number_or_none, section, table, tag
from trainer.runs.certainty import NOT_MEASURED, given_of, in_percent, measured_scores, recall_interval
from trainer.settings.balance import weights_of
from trainer.settings.toml import from_toml
from trainer.settings.units import number, percent


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a run knows of its classes besides the last evaluation; each list has an item for each class, or is empty."""

    images: Sequence[int] = ()
    weights: Sequence[float] = ()
    """What an image of the class counts in the training loss, if they differ."""
    first_recall: Sequence[float] = ()
    first_epoch: float = math.nan


def panel(run: RunFiles) -> Html:
    scores = entries_of(run.summary.get("per_class"))
    if not scores:
        return NOTHING
    unit = run.info.unit
    names = class_names(run.summary.get("classes"), len(scores))
    training = training_of(run, names)
    explained = tag(
        "p",
        f"Weakest first. Recall: how many {unit} of the class are found, with its 95 % interval: how far chance moves it with so many test "
        f"{unit}. Precision: how many {unit} given this name deserve it. {NOT_MEASURED}: nothing was measured.",
    )
    listed = classes_table(scores, names, unit, given_of(run.summary.get("confusion"), len(scores)), training)
    return section("Classes", explained, _told(run, training), listed)


def entries_of(value: object) -> list[Mapping[str, Any]]:
    """The entries of a list in a summary that are objects."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def training_of(run: RunFiles, names: Sequence[str]) -> Training:
    """From the summary and the settings of a run; empty where they do not say, or say it of other classes."""
    counts, first = run.summary.get("train_counts"), run.summary.get("first_classes")
    images = [value for value in counts if isinstance(value, int) and value >= 0] if isinstance(counts, list) else []
    images = images if len(images) == len(names) else []
    recalls, epoch = (first.get("recall"), number_or_none(first.get("epoch"))) if isinstance(first, Mapping) else (None, None)
    known = [value for value in map(number_or_none, recalls) if value is not None] if isinstance(recalls, list) else []
    is_older = isinstance(first, Mapping) and first.get("step") != run.summary.get("steps")
    return Training(
        images=images,
        weights=_weights(run, names, images),
        first_recall=known if len(known) == len(names) and is_older else [],
        first_epoch=math.nan if epoch is None else epoch,
    )


def classes_table(
    scores: Sequence[Mapping[str, Any]], names: Sequence[str], unit: str, given: Sequence[int] | None, training: Training | None = None
) -> Html:
    """`given`: how many samples got each class as an answer; None if that is not known."""
    measured = [measured_scores(entry, given[index] if given else None) for index, entry in enumerate(scores)]
    training = training or Training()

    def weakness(index: int) -> tuple[bool, float, int]:
        f1 = measured[index]["f1"]
        return f1 is None, f1 or 0.0, index  # what was not measured is not weak, and comes last

    rows = []
    for index in sorted(range(len(scores)), key=weakness):
        recall, precision, f1 = (measured[index][name] for name in ("recall", "precision", "f1"))
        interval = recall_interval(scores[index])
        row: list[object] = [names[index]]
        if training.images:
            row.append(number(training.images[index]))
        if training.weights:
            row.append(f"{training.weights[index]:.3g}")
        if training.first_recall:
            row.append(_share(None if recall is None else training.first_recall[index]))
        rows.append(
            (
                *row,
                _share(recall),
                in_percent(interval) if interval else "",
                _share(precision),
                _share(f1),
                number(scores[index].get("support")),
            )
        )
    header = [
        "class",
        *([f"training {unit}"] if training.images else []),
        *(["each counts"] if training.weights else []),
        *([f"recall after {_epochs(training.first_epoch)}"] if training.first_recall else []),
        "recall",
        "95 % interval",
        "precision",
        "F1",
        f"test {unit}" if training.images else unit,
    ]
    return table(header, rows, numeric=tuple(range(1, len(header))))


def _told(run: RunFiles, training: Training) -> Html:
    """How unequal the classes are, and what the run did about it."""
    found = imbalance_of(training.images)
    if not found.is_notable and not training.weights:
        return NOTHING
    said = [f"The largest class has {found.ratio:.3g} times the training {run.info.unit} of the smallest."] if found.is_notable else []
    if training.weights:
        said.append(f"In the training loss the classes have weights, whose mean over the training {run.info.unit} is 1.")
    elif _adjusts(run):
        said.append("In training each logit had the logarithm of its class's share added (data.balance=logit_adjustment).")
    else:
        said.append(f"All {run.info.unit} counted alike in training; --data.balance auto makes up for small classes.")
    return join([tag("p", " ".join(said), class_="soft")])


def _weights(run: RunFiles, names: Sequence[str], images: Sequence[int]) -> Sequence[float]:
    try:
        return (weights_of(from_toml(run.config_text, origin="config.toml"), names, images) or []) if images else []
    except ValueError:  # the settings cannot be read, which the page says elsewhere
        return []


def _adjusts(run: RunFiles) -> bool:
    try:
        return from_toml(run.config_text, origin="config.toml").data.balance == "logit_adjustment"
    except ValueError:
        return False


def _epochs(epoch: float) -> str:
    return "1 epoch" if epoch == 1 else f"{epoch:.3g} epochs" if math.isfinite(epoch) else "the first evaluation"


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else percent(value)
