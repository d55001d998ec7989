"""What an audit has found, with the names of the images, and the changes that it proposes. __main__.py puts it together and writes it:
`findings.json` for programs, `changes.csv` for a person to edit and a run to read (`data.corrections`). page.py shows it.

Of a finding that is sure the proposal is to drop or to relabel; of another it is to keep, so that the row is there to be changed.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dataio.manifest import Manifest
from dataio.schema import LABEL, Target
from trainer.audit.copies import Group, How
from trainer.audit.gather import Gathered
from trainer.audit.labels import Answers, judge
from trainer.audit.looks import Odd, Overlap, overlaps, words_of
from trainer.settings.units import percent

Action = Literal["drop", "relabel", "keep"]
ACTIONS: Sequence[Action] = ("drop", "relabel", "keep")
SURE_MARGIN = 0.5
"""A doubted label is proposed to be changed if the answer is so much more probable than it."""
SHOULD_DIFFER = ("test", "validation", "train")
"""Splits that should have no image in common, those first whose images stay where they are."""
SAME: Mapping[How, str] = {"bytes": "the same file", "pixels": "the same pixels", "near": "nearly the same", "mirrored": "the mirror image"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image of the data."""

    split: str
    row: int
    key: str
    label: str | None
    """The name of its class, if it has one label that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Images of one picture."""

    images: tuple[Image, ...]
    how: tuple[How, ...]
    """For each image how surely it is a copy of another of them."""
    ratio: float

    @property
    def splits(self) -> tuple[str, ...]:
        there = {image.split for image in self.images}
        return tuple(name for name in SHOULD_DIFFER if name in there)

    @property
    def is_leak(self) -> bool:
        """Whether a model is tested, or chosen, by a picture that it has learned."""
        return len(self.splits) > 1

    @property
    def is_contradictory(self) -> bool:
        """Whether they have different labels."""
        return len({image.label for image in self.images if image.label is not None}) > 1

    @property
    def is_exact(self) -> bool:
        return all(how in ("bytes", "pixels") for how in self.how)


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """A label that models which have not seen the image do not believe."""

    image: Image
    answer: str
    of_answer: float
    """Probability of the answer."""
    of_label: float
    """Probability of the label."""

    @property
    def margin(self) -> float:
        return self.of_answer - self.of_label


@dataclass(frozen=True, kw_only=True, slots=True)
class Oddity:
    """An image that looks unlike the others."""

    image: Image
    what: str
    """`dark, blurred`"""
    far: float
    """Robust standard deviations from the median, the largest of its ways."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that an audit has found; of each kind the surest first."""

    data: str
    fingerprint: str
    counts: Mapping[str, int]
    """Split -> images."""
    classes: tuple[str, ...]
    copies: tuple[Copies, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    oddities: tuple[Oddity, ...] = ()
    unreadable: tuple[Image, ...] = ()
    left_out: tuple[str, ...] = ()
    """Parts of the audit that were not done, and why."""
    folds: int = 0
    """That were trained for the labels; 0: none."""
    right: float | None = None
    """The share of the training images that they answered as labelled, not having seen them."""
    notes: tuple[str, ...] = ()

    @property
    def leaks(self) -> tuple[Copies, ...]:
        return tuple(each for each in self.copies if each.is_leak)

    @property
    def contradictions(self) -> tuple[Copies, ...]:
        """Those that are no leaks."""
        return tuple(each for each in self.copies if each.is_contradictory and not each.is_leak)

    @property
    def repeats(self) -> tuple[Copies, ...]:
        """Copies within a split under one label."""
        return tuple(each for each in self.copies if not each.is_contradictory and not each.is_leak)

    def to_json(self) -> str:
        def of(image: Image) -> dict[str, Any]:
            return {"split": image.split, "key": image.key, "label": image.label}

        value = {
            "version": 1,
            "data": self.data,
            "fingerprint": self.fingerprint,
            "images": dict(self.counts),
            "folds": self.folds,
            "answered_as_labelled": self.right,
            "copies": [
                {
                    "is_leak": each.is_leak,
                    "labels_differ": each.is_contradictory,
                    "ratio": round(each.ratio, 4),
                    "images": [{**of(image), "how": how} for image, how in zip(each.images, each.how, strict=True)],
                }
                for each in self.copies
            ],
            "labels": [
                {
                    **of(each.image),
                    "answer": each.answer,
                    "probability": round(each.of_answer, 6),
                    "probability_of_label": round(each.of_label, 6),
                }
                for each in self.doubts
            ],
            "overlaps": [
                {
                    "classes": [self.classes[pair.first], self.classes[pair.second]],
                    "taken_for_each_other": [pair.first_as_second, pair.second_as_first],
                    "images": pair.images,
                }
                for pair in self.overlaps
            ],
            "odd": [{**of(each.image), "what": each.what, "far": _finite(each.far)} for each in self.oddities],
            "unreadable": [of(image) for image in self.unreadable],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: float) -> float | None:
    return round(value, 2) if np.isfinite(value) else None


# --- putting it together ----------------------------------------------------------------------------------------------------------------


class Names:
    """Looks up keys and classes of images by their number among all."""

    def __init__(self, found: Gathered, keys: Callable[[str, Sequence[int]], list[str]], classes: Sequence[str]) -> None:
        """`keys` gives the keys of rows of a split."""
        self._found, self._keys, self._classes = found, keys, classes

    def images(self, numbers: Iterable[int]) -> dict[int, Image]:
        """Number -> image. Reads the keys of each split once."""
        wanted = sorted(set(numbers))
        named: dict[int, Image] = {}
        for split in self._found.splits:
            inside = self._found.of_split(split)
            here = [number for number in wanted if number in inside]
            if not here:
                continue
            for number, key in zip(here, self._keys(split, [each - inside.start for each in here]), strict=True):
                label = int(self._found.labels[number])
                named[number] = Image(
                    split=split, row=number - inside.start, key=key, label=self._classes[label] if 0 <= label < len(self._classes) else None
                )
        return named


def of_images(manifest: Manifest, data: str, found: Gathered, groups: Sequence[Group], odd: Sequence[Odd], names: Names) -> Findings:
    """What the images say by themselves."""
    ways = words_of(odd)
    bad = np.flatnonzero(found.is_bad).tolist()
    named = names.images([*(image for group in groups for image in group.images), *ways, *bad])
    copies = [Copies(images=tuple(named[image] for image in group.images), how=group.how, ratio=group.ratio) for group in groups]
    farthest = {each.image: each.far for each in reversed(odd)}
    return Findings(
        data=data,
        fingerprint=manifest.fingerprint,
        counts={name: split.count for name, split in manifest.splits.items()},
        classes=manifest.classes,
        copies=tuple(sorted(copies, key=lambda each: (not each.is_leak, not each.is_contradictory))),  # stable: the surest first
        oddities=tuple(Oddity(image=named[image], what=what, far=farthest[image]) for image, what in ways.items()),
        unreadable=tuple(named[image] for image in bad),
    )


def with_labels(findings: Findings, answers: Mapping[str, Answers], rows: Mapping[str, Mapping[str, int]], *, folds: int) -> Findings:
    """With what the folds say of the labels. `answers`: split -> what models said that have not seen its images; `rows`: split -> row of
    each key."""
    classes = findings.classes
    doubts = []
    for split, found in answers.items():
        judged = judge(found, len(classes))
        for place in judged.doubted.tolist():
            key = found.keys[place]
            doubts.append(
                Doubt(
                    image=Image(split=split, row=rows[split][key], key=key, label=classes[found.given[place]]),
                    answer=classes[found.answers[place]],
                    of_answer=float(found.of_answer[place]),
                    of_label=float(found.of_given[place]),
                )
            )
    train = answers["train"]
    return replace(
        findings,
        doubts=tuple(sorted(doubts, key=lambda doubt: -doubt.margin)),  # stable: by split, then as they were judged
        overlaps=tuple(overlaps(train.given, train.answers, len(classes))),
        folds=folds,
        right=float((train.given == train.answers).mean()),
    )


# --- changes ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A row of changes.csv."""

    split: str
    key: str
    action: Action
    label: str = ""
    """The class that an image gets by `relabel`."""
    reason: str


def changes_of(findings: Findings) -> list[Change]:
    """One row for each image that something was found of: the strongest action, with all reasons. Those to drop first, then those to
    relabel, each in the order in which they were found."""
    found: dict[tuple[str, str], Change] = {}
    for change in _proposed(findings):
        place = (change.split, change.key)
        if (known := found.get(place)) is None:
            found[place] = change
            continue
        first = min(known, change, key=lambda each: ACTIONS.index(each.action))
        found[place] = replace(first, reason=f"{known.reason}; {change.reason}")
    return sorted(found.values(), key=lambda change: ACTIONS.index(change.action))


def to_csv(changes: Sequence[Change], targets: Sequence[Target]) -> str:
    """In the form of `data.corrections`, whose reader passes over the reason. Of several targets, one names the column of labels."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(("key", "split", "action", LABEL if len(targets) == 1 else targets[0].name, "reason"))
    writer.writerows((change.key, change.split, change.action, change.label, change.reason) for change in changes)
    return sink.getvalue()


def _proposed(findings: Findings) -> Iterator[Change]:
    for copies in findings.copies:
        yield from _of_copies(copies)
    for doubt in findings.doubts:
        reason = f"models that have not seen it say {doubt.answer} ({percent(doubt.of_answer)}), not {doubt.image.label}"
        is_sure = doubt.margin >= SURE_MARGIN
        yield Change(
            split=doubt.image.split,
            key=doubt.image.key,
            action="relabel" if is_sure else "keep",
            label=doubt.answer if is_sure else "",
            reason=reason,
        )
    for odd in findings.oddities:
        yield Change(split=odd.image.split, key=odd.image.key, action="keep", reason=f"it is {odd.what}")


def _of_copies(copies: Copies) -> Iterator[Change]:
    stays = copies.splits[0] if copies.splits else ""
    first = next((image for image in copies.images if image.split == stays), copies.images[0])
    for image, how in zip(copies.images, copies.how, strict=True):
        if copies.is_leak and image.split != stays and image.split in SHOULD_DIFFER:
            yield Change(split=image.split, key=image.key, action="drop", reason=f"{SAME[how]} as {first.key} of the {stays} split")
        elif copies.is_contradictory:
            other = next(each for each in copies.images if each.label != image.label)
            is_sure = copies.is_exact and image.split == "train"
            yield Change(
                split=image.split,
                key=image.key,
                action="drop" if is_sure else "keep",
                reason=f"{SAME[how]} as {other.key}, which is labelled {other.label or 'nothing'} and not {image.label or 'nothing'}",
            )
        elif image != first:
            is_sure = how in ("bytes", "pixels") and image.split == first.split == "train"
            yield Change(split=image.split, key=image.key, action="drop" if is_sure else "keep", reason=f"{SAME[how]} as {first.key}")
