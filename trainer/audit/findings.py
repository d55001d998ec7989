"""What an audit has found, with the names of the samples, and the changes that it proposes. __main__.py puts it together and writes it:
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
from trainer.audit.copies import EXACT, Group, How
from trainer.audit.kept import Kept
from trainer.audit.labels import Answers, doubts_of, judge
from trainer.audit.looks import Odd, Overlap, overlaps, words_of
from trainer.settings.units import percent

Action = Literal["drop", "relabel", "keep"]
ACTIONS: Sequence[Action] = ("drop", "relabel", "keep")
SURE_MARGIN = 0.5
"""A doubted label is proposed to be changed if the answer is so much more probable than it."""
SHOULD_DIFFER = ("test", "validation", "train")
"""Splits that should have no sample in common, those first whose samples stay where they are."""
SAME: Mapping[How, str] = {
    "bytes": "the same file",
    "pixels": "the same pixels",
    "text": "the same text",
    "folded": "the same text but for case, spaces and forms of characters",
    "near": "nearly the same",
    "mirrored": "the mirror image",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A sample of the data."""

    split: str
    row: int
    key: str
    label: str | None
    """The name of its class, if it has one label that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Images of one picture."""

    samples: tuple[Sample, ...]
    how: tuple[How, ...]
    """For each sample how surely it is a copy of another of them."""
    ratio: float

    @property
    def splits(self) -> tuple[str, ...]:
        there = {sample.split for sample in self.samples}
        return tuple(name for name in SHOULD_DIFFER if name in there)

    @property
    def is_leak(self) -> bool:
        """Whether a model is tested, or chosen, by a sample that it has learned."""
        return len(self.splits) > 1

    @property
    def is_contradictory(self) -> bool:
        """Whether they have different labels."""
        return len({sample.label for sample in self.samples if sample.label is not None}) > 1

    @property
    def is_exact(self) -> bool:
        return all(how in EXACT for how in self.how)


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """A label that models which have not seen the sample do not believe."""

    sample: Sample
    answer: str
    of_answer: float
    """Probability of the answer."""
    of_label: float
    """Probability of the label."""

    @property
    def margin(self) -> float:
        return self.of_answer - self.of_label

    @property
    def weight(self) -> float:
        """The larger, the more doubtful."""
        return float(doubts_of(np.array([self.of_answer]), np.array([self.of_label]))[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Oddity:
    """A sample that is unlike the others."""

    sample: Sample
    what: str
    """`dark, blurred`"""
    far: float
    """Robust standard deviations from the median, the largest of its ways; infinite for what is so or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that an audit has found; of each kind the surest first."""

    data: str
    fingerprint: str
    counts: Mapping[str, int]
    """Split -> samples."""
    unit: str
    """What they are, in the plural: images, or texts."""
    classes: tuple[str, ...]
    copies: tuple[Copies, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    oddities: tuple[Oddity, ...] = ()
    unreadable: tuple[Sample, ...] = ()
    left_out: tuple[str, ...] = ()
    """Parts of the audit that were not done, and why."""
    folds: int = 0
    """That were trained for the labels; 0: none."""
    right: float | None = None
    """The share of the training samples that they answered as labelled, not having seen them."""
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
        def of(sample: Sample) -> dict[str, Any]:
            return {"split": sample.split, "key": sample.key, "label": sample.label}

        value = {
            "version": 1,
            "data": self.data,
            "fingerprint": self.fingerprint,
            self.unit: dict(self.counts),
            "folds": self.folds,
            "answered_as_labelled": self.right,
            "copies": [
                {
                    "is_leak": each.is_leak,
                    "labels_differ": each.is_contradictory,
                    "ratio": round(each.ratio, 4),
                    self.unit: [{**of(sample), "how": how} for sample, how in zip(each.samples, each.how, strict=True)],
                }
                for each in self.copies
            ],
            "labels": [
                {
                    **of(each.sample),
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
                    self.unit: pair.samples,
                }
                for pair in self.overlaps
            ],
            "odd": [{**of(each.sample), "what": each.what, "far": _finite(each.far)} for each in self.oddities],
            "unreadable": [of(sample) for sample in self.unreadable],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: float) -> float | None:
    return round(value, 2) if np.isfinite(value) else None


# --- putting it together ----------------------------------------------------------------------------------------------------------------


class Names:
    """Looks up keys and classes of samples by their number among all."""

    def __init__(self, found: Kept, keys: Callable[[str, Sequence[int]], list[str]], classes: Sequence[str]) -> None:
        """`keys` gives the keys of rows of a split."""
        self._found, self._keys, self._classes = found, keys, classes

    def samples(self, numbers: Iterable[int]) -> dict[int, Sample]:
        """Number -> sample. Reads the keys of each split once."""
        wanted = sorted(set(numbers))
        named: dict[int, Sample] = {}
        for split in self._found.splits:
            inside = self._found.of_split(split)
            here = [number for number in wanted if number in inside]
            if not here:
                continue
            for number, key in zip(here, self._keys(split, [each - inside.start for each in here]), strict=True):
                label = int(self._found.labels[number])
                named[number] = Sample(
                    split=split, row=number - inside.start, key=key, label=self._classes[label] if 0 <= label < len(self._classes) else None
                )
        return named


def of_samples(manifest: Manifest, data: str, found: Kept, groups: Sequence[Group], odd: Sequence[Odd], names: Names) -> Findings:
    """What the samples say by themselves."""
    ways = words_of(odd)
    bad = np.flatnonzero(found.is_bad).tolist()
    named = names.samples([*(sample for group in groups for sample in group.samples), *ways, *bad])
    copies = [Copies(samples=tuple(named[sample] for sample in group.samples), how=group.how, ratio=group.ratio) for group in groups]
    farthest = {each.sample: each.far for each in reversed(odd)}
    return Findings(
        data=data,
        fingerprint=manifest.fingerprint,
        counts={name: split.count for name, split in manifest.splits.items()},
        unit=manifest.unit,
        classes=manifest.classes,
        copies=tuple(sorted(copies, key=lambda each: (not each.is_leak, not each.is_contradictory))),  # stable: the surest first
        oddities=tuple(Oddity(sample=named[sample], what=what, far=farthest[sample]) for sample, what in ways.items()),
        unreadable=tuple(named[sample] for sample in bad),
    )


def with_labels(findings: Findings, answers: Mapping[str, Answers], rows: Mapping[str, Mapping[str, int]], *, folds: int) -> Findings:
    """With what the folds say of the labels. `answers`: split -> what models said that have not seen its samples; `rows`: split -> row of
    each key."""
    classes = findings.classes
    doubts = []
    for split, found in answers.items():
        judged = judge(found, len(classes))
        for place in judged.doubted.tolist():
            key = found.keys[place]
            doubts.append(
                Doubt(
                    sample=Sample(split=split, row=rows[split][key], key=key, label=classes[found.given[place]]),
                    answer=classes[found.answers[place]],
                    of_answer=float(found.of_answer[place]),
                    of_label=float(found.of_given[place]),
                )
            )
    train = answers["train"]
    return replace(
        findings,
        doubts=tuple(sorted(doubts, key=lambda doubt: -doubt.weight)),  # stable: by split, then as they were judged
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
    """The class that a sample gets by `relabel`."""
    reason: str


def changes_of(findings: Findings) -> list[Change]:
    """One row for each sample that something was found of: the strongest action, with all reasons. Those to drop first, then those to
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
        reason = f"models that have not seen it say {doubt.answer} ({percent(doubt.of_answer)}), not {doubt.sample.label}"
        is_sure = doubt.margin >= SURE_MARGIN
        yield Change(
            split=doubt.sample.split,
            key=doubt.sample.key,
            action="relabel" if is_sure else "keep",
            label=doubt.answer if is_sure else "",
            reason=reason,
        )
    for odd in findings.oddities:
        yield Change(split=odd.sample.split, key=odd.sample.key, action="keep", reason=f"it is {odd.what}")


def _of_copies(copies: Copies) -> Iterator[Change]:
    stays = copies.splits[0] if copies.splits else ""
    first = next((sample for sample in copies.samples if sample.split == stays), copies.samples[0])
    for sample, how in zip(copies.samples, copies.how, strict=True):
        if copies.is_leak and sample.split != stays and sample.split in SHOULD_DIFFER:
            yield Change(split=sample.split, key=sample.key, action="drop", reason=f"{SAME[how]} as {first.key} of the {stays} split")
        elif copies.is_contradictory:
            other = next(each for each in copies.samples if each.label != sample.label)
            is_sure = copies.is_exact and sample.split == "train"
            yield Change(
                split=sample.split,
                key=sample.key,
                action="drop" if is_sure else "keep",
                reason=f"{SAME[how]} as {other.key}, which is labelled {other.label or 'nothing'} and not {sample.label or 'nothing'}",
            )
        elif sample != first:
            is_sure = how in EXACT and sample.split == first.split == "train"
            yield Change(split=sample.split, key=sample.key, action="drop" if is_sure else "keep", reason=f"{SAME[how]} as {first.key}")
