"""What a conversion found in its source besides the samples: what it did not read, what it held out, copies of images, classes of no use.

Convert writes it as reading.json beside the manifest, whose form stays the same: a program that knows no reading.json reads the folder as
before, and a folder made before has none. The pairs of equal images are listed in repeats.jsonl. `described` and `warnings` put it into
words, for `dataio.convert` and for the line that each run begins with.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from dataio.foreign import json_of
from dataio.manifest import Manifest
from dataio.schema import UNLABELLED, Target, is_single_label
from dataio.text import json_line, shown

READING_NAME = "reading.json"
REPEATS_NAME = "repeats.jsonl"
_SHOWN = 5
_SHOWN_CLASSES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The content of reading.json."""

    held_out: Mapping[str, float] = field(default_factory=dict)
    """Split -> the fraction of the training samples that were held out for it."""
    not_read: tuple[str, ...] = ()
    """Files, or groups of files, of the source that are no part of the data."""
    class_counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Split -> samples of each class of the only target that has any."""
    corrected: Mapping[str, int] = field(default_factory=dict)
    """"relabelled" and "dropped" -> samples that corrections relabelled and left out, over all splits."""
    transparent: int = 0
    """Images with an alpha channel, over all splits."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """Split -> its samples whose bytes are those of a training sample."""
    contradictory: int = 0
    """Samples whose bytes have another label elsewhere."""
    copied: tuple[str, ...] = ()
    """Some of the copies, in words."""
    contradicted: tuple[str, ...] = ()
    """Some of the samples with two labels, in words."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Reading | None":
        """None for text that is none; it is only told, so nothing depends on it. Keys of a later version are ignored."""
        try:
            value = json_of(text)
            if not isinstance(value, dict):
                return None
            known = {name: value[name] for name in (each.name for each in fields(cls)) if name in value}
            return cls(
                held_out={str(split): float(fraction) for split, fraction in known.get("held_out", {}).items()},
                not_read=tuple(map(str, known.get("not_read", ()))),
                class_counts={str(split): tuple(map(int, counts)) for split, counts in known.get("class_counts", {}).items()},
                corrected={str(word): int(count) for word, count in known.get("corrected", {}).items()},
                transparent=int(known.get("transparent", 0)),
                copies={str(split): int(count) for split, count in known.get("copies", {}).items()},
                contradictory=int(known.get("contradictory", 0)),
                copied=tuple(map(str, known.get("copied", ()))),
                contradicted=tuple(map(str, known.get("contradicted", ()))),
            )
        except (ValueError, TypeError, AttributeError, OverflowError):
            return None


def described(manifest: Manifest, reading: Reading | None) -> str:
    """The data in one line: `3 classes (ant, bee, cat): 60 train, 6 test images; test held out of train; not read: 2 .txt`."""
    reading = reading or Reading()
    splits = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    only_one = sum(split.count for split in manifest.splits.values()) == 1
    unit = manifest.unit.removesuffix("s") if only_one else manifest.unit
    parts = [f"{targets_described(manifest.targets)}: {splits} {unit}"]
    if (train := reading.class_counts.get("train")) and len(train) > 1:
        least, most = min(train), max(train)
        parts[0] += f" ({least:,} of each class to train)" if least == most else f" ({least:,} to {most:,} of a class to train)"
    if reading.held_out:
        parts.append(", ".join(f"{split} held out of train ({fraction:.0%})" for split, fraction in reading.held_out.items()))
    if reading.corrected:
        parts.append(corrections_told(reading.corrected))
    if manifest.texts is not None:
        cut = f", of which {manifest.texts.cut:,} had more and were cut" if manifest.texts.cut else ""
        parts.append(f"{manifest.texts.longest} tokens at most{cut}")
    if manifest.quarantined:
        parts.append(f"{manifest.quarantined:,} could not be used")
    if reading.not_read:
        more = f" and {len(reading.not_read) - _SHOWN_CLASSES} more" if len(reading.not_read) > _SHOWN_CLASSES else ""
        parts.append(f"not read: {', '.join(map(shown, reading.not_read[:_SHOWN_CLASSES]))}{more}")
    return "; ".join(parts)


def corrections_told(counts: Mapping[str, int]) -> str:
    """`3 relabelled and 2 dropped by corrections`."""
    return f"{' and '.join(f'{count:,} {word}' for word, count in counts.items())} by corrections"


def targets_described(targets: Sequence[Target]) -> str:
    """`3 classes (ant, bee, cat)`; for other targets their names and kinds."""
    if is_single_label(targets):
        return _classes(targets[0])
    return ", ".join(f"{shown(target.name)} ({_classes(target) if target.classes else target.kind})" for target in targets)


def _classes(target: Target) -> str:
    count = len(target.classes)
    more = ", ..." if count > _SHOWN_CLASSES else ""
    named = ", ".join(shown(name, 40) for name in target.classes[:_SHOWN_CLASSES])
    return f"{count:,} class{'' if count == 1 else 'es'} ({named}{more})"


def warnings(manifest: Manifest, reading: Reading | None, where: str) -> Iterator[str]:
    """What the user should know before the data are trained on. `where` is the converted folder, for display."""
    for alike in names_alike(manifest.targets):
        yield f"the classes {' and '.join(map(repr, alike))} differ only in case, spaces or dashes; if they are one, give it one name"
    if reading is None:
        return
    unit, shows = manifest.unit, "image shows" if manifest.texts is None else "text is of"
    for split, count in reading.copies.items():
        if count:
            yield (
                f"{count:,} of {manifest.splits[split].count:,} {split} {unit} are copies of training {unit}, so the {split} results say "
                f"less of new ones: {_listed(reading.copied)}; all are in {where}/{REPEATS_NAME}"
            )
    if reading.contradictory:
        yield (
            f"{reading.contradictory:,} {unit} occur with two labels, one of which is wrong: "
            f"{_listed(reading.contradicted)}; all are in {where}/{REPEATS_NAME}"
        )
    train = reading.class_counts.get("train", ())
    for split, counts in reading.class_counts.items():
        if split in ("train", UNLABELLED):
            continue
        rows = list(zip(manifest.classes, train, counts, strict=False))
        if untrained := [name for name, there, here in rows if here and not there]:
            yield f"no training {shows} {_named(untrained)}, so each of them in {split} will be answered wrongly"
        if split == "test" and (untested := [name for name, _, here in rows if not here]):
            yield f"no test {shows} {_named(untested)}, so the results say nothing of {'it' if len(untested) == 1 else 'them'}"


def _named(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"class{'' if len(classes) == 1 else 'es'} {', '.join(shown(name, 40) for name in classes[:_SHOWN])}{more}"


def _listed(examples: Sequence[str]) -> str:
    return ", ".join(map(shown, examples[:2]))


def names_alike(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    """Groups of classes of one target that differ only in case, spaces, dashes or underscores."""
    found: list[tuple[str, ...]] = []
    for target in targets:
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name in target.classes:
            groups["".join(name.casefold().replace("_", " ").replace("-", " ").split()) or name].append(name)
        found += [tuple(names) for names in groups.values() if len(names) > 1]
    return found


class Repeats:
    """Finds samples with equal bytes. It holds twelve bytes a sample, and knows a hash by its first eight."""

    def __init__(self) -> None:
        self._splits: list[str] = []
        self._starts: list[int] = []
        self._hashes, self._values = array("Q"), array("I")

    def add(self, split: str, values: bytes, sha256: bytes) -> None:
        if not self._splits or self._splits[-1] != split:
            self._splits.append(split)
            self._starts.append(len(self._hashes))
        self._hashes.append(int.from_bytes(sha256[:8], "little"))
        self._values.append(int.from_bytes(values[:4].ljust(4, b"\0"), "little"))

    def pairs(self, *, labels: bool) -> "list[Pair]":
        """Each sample whose bytes came before: in the training split, if it is of another one; or, with `labels`, under another label."""
        hashes = np.array(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        first = np.ones(len(order), bool)
        first[1:] = hashes[order][1:] != hashes[order][:-1]
        repeated = order[~first]
        firsts = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))][~first]
        pairs = []
        for row, before in sorted(zip(repeated.tolist(), firsts.tolist(), strict=True)):
            (split, place), (of_split, of_place) = self._place(row), self._place(before)
            if UNLABELLED in (split, of_split):
                continue
            is_copy = split != of_split and of_split == "train"
            differs = labels and self._values[row] != self._values[before]
            if is_copy or differs:
                pairs.append(Pair(split=split, row=place, of_split=of_split, of_row=of_place, is_copy=is_copy, differs=differs))
        return pairs

    def _place(self, row: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._splits[number], row - self._starts[number]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A sample, and an earlier one with the same bytes."""

    split: str
    row: int
    of_split: str
    of_row: int
    is_copy: bool
    """The earlier one is a training sample, this one is of another split."""
    differs: bool
    """They have different labels."""


def examples_of(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Some pairs in words."""
    return tuple(f"{line['key']} = {line['same_as']}" for line in lines[:_SHOWN])


def lines_of(pairs: Sequence[Pair], keys: Callable[[str, Sequence[int]], list[str]]) -> list[dict[str, Any]]:
    """The pairs as repeats.jsonl lists them. `keys` gives the keys of rows of a split."""
    named: dict[tuple[str, int], str] = {}
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        wanted[pair.split].add(pair.row)
        wanted[pair.of_split].add(pair.of_row)
    for split, rows in wanted.items():
        ordered = sorted(rows)
        named.update({(split, row): key for row, key in zip(ordered, keys(split, ordered), strict=True)})
    return [
        {
            "split": pair.split,
            "key": named[pair.split, pair.row],
            "same_as_split": pair.of_split,
            "same_as": named[pair.of_split, pair.of_row],
            "labels_differ": pair.differs,
        }
        for pair in pairs
    ]


def repeats_text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json_line(line) + "\n" for line in lines)
