"""The report's part on images without labels: whether they helped, how many of them were used over time, and which classes the guesses
leave out. Called by sections; control.py finds the run to compare with, trainer.learn.semi makes the numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.report.control import command_for, gain_of
from trainer.report.files import RunFiles, class_names, evaluations
from trainer.report.page import NOTHING, Html, number_or_none, section, short, tag
from trainer.report.plots import Line, plot
from trainer.settings.units import number, percent

STARVED = 0.2
"""A class is starved if the guesses that are used give it less than this part of what it has among the labelled images."""
LISTED = 10
_LINES = (
    ("used", "unlabelled_used"),
    ("mean weight", "unlabelled_weight"),
    ("right, of all", "unlabelled_right"),
    ("right, of the used", "unlabelled_used_right"),
)


def unlabelled_section(run: RunFiles) -> Html:
    seen = run.summary.get("unlabelled")
    if not isinstance(seen, Mapping) or not seen:
        return NOTHING
    gain, unknown = gain_of(run)
    parts: list[Html] = []
    if gain is not None:
        how = "the same test images, one by one" if gain.is_paired else "their test images, as if they were different ones"
        parts += [
            tag("p", gain.sentence()),
            tag("p", f"Compared with {short(gain.control, 200)}, which did the same {number(gain.steps)} steps, on {how}.", class_="soft"),
        ]
    else:
        parts += [
            tag("p", f"Whether they helped is not known. {short(unknown, 500)} This command does the same steps without them:"),
            tag("pre", command_for(run)),
        ]
    parts += [tag("p", sentence) for sentence in sentences(seen, class_names(run.summary.get("classes"), _classes(seen)), _labelled(run))]
    lines = [line for line in (_line(run, *each) for each in _LINES) if len(line[1])]
    if lines:
        title = tag("figcaption", "Guesses at unlabelled images since the evaluation before, %")
        parts.append(tag("div", tag("figure", title, plot(lines, marks=(), x="epoch", log=False, ident="u0")), class_="figures"))
    return section("Unlabelled images", *parts, tag("p", _EXPLAINED, class_="soft"))


_EXPLAINED = (
    "Used: the guess counts by more than one half. Each image counts in the divisor of the loss, used or not. What is known of the images' "
    "classes is shown here, and was not used in training."
)


def sentences(seen: Mapping[str, object], classes: Sequence[str], labelled: Sequence[float]) -> list[str]:
    """What the last guesses came to. `labelled`: the share of each class among the labelled images."""
    used, known = number_or_none(seen.get("unlabelled_used")), number_or_none(seen.get("unlabelled_known"))
    weight = number_or_none(seen.get("unlabelled_weight")) or 0.0
    told = [f"Before the last evaluation {percent(used or 0.0)} of the images were used, and an image counted {weight:.2f} on average."]
    right, used_right = number_or_none(seen.get("unlabelled_right")), number_or_none(seen.get("unlabelled_used_right"))
    if known and right is not None:
        of_used = f"; of those that were used, {percent(used_right)}" if used_right is not None else ""
        told.append(f"Of {number(known)} guesses at images whose class is known, {percent(right)} were right{of_used}.")
    else:
        told.append("How many guesses were right is not known: nothing says what the images show.")
    if names := starved(seen, classes, labelled):
        more = f" and {number(len(names) - LISTED)} more" if len(names) > LISTED else ""
        told.append(
            f"Hardly guessed: {', '.join(short(name, 60) for name in names[:LISTED])}{more}. These classes have less than a fifth of their "
            "share of the labelled images among the guesses that are used: either there are few such images, or the model overlooks them."
        )
    return told


def starved(seen: Mapping[str, object], classes: Sequence[str], labelled: Sequence[float]) -> list[str]:
    """The classes that the used guesses leave out, the rarest first."""
    counts = _numbers(seen.get("unlabelled_used_guesses"))
    total = sum(counts)
    if not total or len(counts) != len(classes) or len(labelled) != len(classes):
        return []
    ratios = [count / total / share if share else 1.0 for count, share in zip(counts, labelled, strict=True)]
    return [classes[index] for index in sorted(range(len(ratios)), key=lambda index: ratios[index]) if ratios[index] < STARVED]


def _labelled(run: RunFiles) -> list[float]:
    """The share of each class among the labelled images; equal ones where that is not known."""
    count = _classes(run.summary.get("unlabelled") or {})
    counts = _numbers(run.summary.get("train_counts"))
    if len(counts) != count or not sum(counts):
        return [1 / count] * count if count else []
    return [each / sum(counts) for each in counts]


def _classes(seen: Mapping[str, object]) -> int:
    return len(_numbers(seen.get("unlabelled_used_guesses")))


def _numbers(value: object) -> list[float]:
    found = [number_or_none(each) for each in value] if isinstance(value, list) else []
    return [each for each in found if each is not None] if None not in found else []


def _line(run: RunFiles, label: str, key: str) -> Line:
    told = [(number_or_none(event.get("epoch")), number_or_none(event.get(key))) for event in evaluations(run.events)]
    known = np.array([(epoch, 100 * value) for epoch, value in told if epoch is not None and value is not None], dtype=np.float64)
    points = known.reshape(-1, 2)
    return label, points[:, 0], points[:, 1], "o-"
