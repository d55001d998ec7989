"""Chooses among the samples of a training split: the first ones of a fixed order, or all but one of k folds. Pure, but for reading labels.

`selected` makes the data set that a run trains on, for the driver and for each rank; `planned` tells the numbers before there is a
conversion. The choice is a function of the choice's seed, and of the samples' labels and contents: neither names nor places of files, nor
the order of training (dataio.order, which permutes the chosen samples) play a part in it.

Samples belong to groups (`sources.splits.strata` of the first target): those of one class, those with the same rarest label, or those
whose numbers are in the same tenth. Within a group a hash of (choice seed, content) puts them in order.

A part is the first N samples of one long order, so parts are nested: the groups take turns (`turns`), and after any number of turns each
group has had its exact share, rounded up or down. Webster's method, which gives each place to the group whose next sample has the smallest
(j + 1/2) / size, is nearer on average, but not bound: of groups of 7, 1, 1 and 1 its first four places all go to the large one, whose share
is 2.8. Tijdeman (1980, "The chairman assignment problem") proves that a bound of 1 - 1/(2k - 2) for k groups can be kept, by the rule
that `turns` follows; for two groups it is rounding to the nearest.

Folds deal out the same order, group after group: so a fold has each group's share and the k-th of all samples, rounded up or down.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from dataio.config import DataConfig
from dataio.fold import Choice
from dataio.manifest import Manifest
from dataio.order import mixed
from dataio.parquet import Dataset, PartOfSplit, Split
from dataio.schema import Target
from dataio.text import shown

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

FOLD_SPLIT = "validation"
"""The held-out fold is scored as this split; one that the data store is not used then."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """What was chosen, for those who tell it."""

    choice: Choice
    train: int
    """Samples to train on."""
    held: int
    """Samples of the fold."""
    whole: int
    """Samples of the training split."""
    unit: str
    """What the samples are, in the plural."""
    by: str
    """What the groups are, in words."""
    hidden: int = 0
    """Samples of the data's own validation split, in whose place the fold is."""
    vanished: tuple[str, ...] = ()
    """Classes that have training samples, and none among the chosen ones."""

    @property
    def line(self) -> str:
        """`trains on 600 of 6,000 images, stratified by class (data.part=0.1, data.choice_seed=0)`."""
        fold = self.choice.fold
        but = f", all but {fold.described}" if fold is not None and self.train + self.held == self.whole else ""
        scored = f"; {fold.described}, {self.held:,} {self.unit}, is the {FOLD_SPLIT} split" if fold is not None else ""
        return f"trains on {self.train:,} of {self.whole:,} {self.unit}{but}, stratified by {self.by}{scored} ({self.choice.settings})"

    @property
    def warnings(self) -> tuple[str, ...]:
        told = []
        if self.vanished:
            named = ", ".join(shown(name, 40) for name in self.vanished[:_SHOWN])
            more = f" and {len(self.vanished) - _SHOWN} more" if len(self.vanished) > _SHOWN else ""
            one = len(self.vanished) == 1
            told.append(
                f"none of the chosen training {self.unit} is of class{'' if one else 'es'} {named}{more}, so the model never answers "
                f"{'it' if one else 'them'}; a larger data.part has some"
            )
        if self.hidden:
            told.append(f"the data's own {FOLD_SPLIT} split of {self.hidden:,} {self.unit} is not used: the fold is in its place")
        return tuple(told)


# --- the order ------------------------------------------------------------------------------------------------------------------------


def turns(sizes: Sequence[int], count: int) -> Iterator[int]:
    """Yields the number of the group whose turn it is, `count` times; a group of size n has n turns in all.

    After N turns a group has had n N / sum(sizes) of them, give or take less than one. The j-th turn of a group is due in a range of places
    that keeps it within Tijdeman's bound; of the groups whose range has begun, the one whose range ends first takes the place.
    """
    total, groups = sum(sizes), [group for group, size in enumerate(sizes) if size]
    assert 0 <= count <= total, (count, total)
    scale = max(1, 2 * len(groups) - 2)  # the bound is 1 - 1/scale
    taken = [0] * len(sizes)

    def begins(group: int) -> int:
        return -(-total * (1 + scale * taken[group]) // (scale * sizes[group]))

    def ends(group: int) -> int:
        return total * (scale - 1 + scale * taken[group]) // (scale * sizes[group])

    if len(groups) == 1:
        yield from groups * count
        return
    waiting, ready = [(begins(group), group) for group in groups], list[tuple[int, int]]()
    heapq.heapify(waiting)
    for place in range(1, count + 1):
        while waiting and waiting[0][0] <= place:
            _, group = heapq.heappop(waiting)
            heapq.heappush(ready, (ends(group), group))
        _, group = heapq.heappop(ready)
        yield group
        taken[group] += 1
        if taken[group] < sizes[group]:
            heapq.heappush(waiting, (begins(group), group))


def by_group(groups: Ids, contents: npt.NDArray[np.uint64], seed: int) -> Ids:
    """All samples (n,), group after group, each in the order of its hashes; equal contents stay in the order in which they are stored.

    `groups` (n,); `contents` (n,): the first 8 bytes of each sample's SHA-256, which are as good as random already."""
    key = np.frombuffer(hashlib.blake2b(f"choice 1\n{seed}".encode(), digest_size=8).digest(), "<u8")[0]
    return np.lexsort((mixed(contents, key), groups)).astype(np.int64, copy=False)


def ranked(groups: Ids, contents: npt.NDArray[np.uint64], *, seed: int, count: int) -> Ids:
    """The first `count` samples of the order that parts are prefixes of."""
    placed = by_group(groups, contents, seed)
    _, starts, sizes = np.unique(groups[placed], return_index=True, return_counts=True)
    at = starts.tolist()
    found = np.empty(count, np.int64)
    for place, group in enumerate(turns(sizes.tolist(), count)):
        found[place] = placed[at[group]]
        at[group] += 1
    return found


def choose(groups: Ids, contents: npt.NDArray[np.uint64], choice: Choice) -> tuple[Mask, Mask]:
    """(n,) whether each sample is trained on, and (n,) whether it is held out as the fold. ValueError if there are not enough."""
    train, held = np.zeros(len(groups), bool), np.zeros(len(groups), bool)
    count, _ = choice.sizes(len(groups))
    left = by_group(groups, contents, choice.seed)
    if choice.fold is not None:
        is_held = np.arange(len(left)) % choice.fold.folds == choice.fold.number - 1
        held[left[is_held]] = True
        left = left[~is_held]
    _, starts, sizes = np.unique(groups[left], return_index=True, return_counts=True)
    had = _turns_of_each(sizes.tolist(), count)
    rank = np.arange(len(left)) - np.repeat(starts, sizes)  # (left,) each sample's place in its group
    train[left[rank < np.repeat(had, sizes)]] = True
    return train, held


def planned(sizes: Sequence[int], choice: Choice) -> tuple[list[int], list[int]]:
    """Samples of each group that are trained on, and that are held out as the fold: what `choose` chooses, from the groups' sizes alone."""
    count, _ = choice.sizes(sum(sizes))
    held = [0] * len(sizes)
    if (fold := choice.fold) is not None:
        dealt = 0
        for group, size in enumerate(sizes):
            held[group] = fold.size(dealt + size) - fold.size(dealt)
            dealt += size
    left = [size - out for size, out in zip(sizes, held, strict=True)]
    return _turns_of_each(left, count).tolist(), held


def _turns_of_each(sizes: Sequence[int], count: int) -> Ids:
    """How many of the first `count` turns each group has."""
    if count == sum(sizes):
        return np.array(sizes, np.int64)
    had = np.zeros(len(sizes), np.int64)
    every = turns(sizes, count)
    while some := list(islice(every, 1 << 16)):
        had += np.bincount(some, minlength=len(sizes))
    return had


# --- data sets ------------------------------------------------------------------------------------------------------------------------


def selected(dataset: Dataset, config: DataConfig) -> Dataset:
    """The data set with the chosen samples as its training split, and with the fold as its validation split; the very same data set if
    nothing is chosen. ValueError if there are not enough samples.

    The chosen samples are numbered anew, in the order in which they are stored. Row groups are read as before, and with a `shuffle_window`
    its samples lie in as many row groups as it takes to hold them. It reads the first target's
    column and the hashes of the training split; choosing takes some 40 bytes a sample for a moment, and the result keeps a bit for each."""
    choice = Choice.of(config)
    if choice.is_all:
        return dataset
    from dataio.sources.splits import strata  # here: sources take a tenth of a second to import, and most runs choose nothing

    whole, first = dataset.split("train"), dataset.manifest.targets[0]
    choice.sizes(whole.count)  # ValueError before anything is read
    column, contents = whole.marks(first.name)
    train, held = choose(strata(first, column), contents, choice)
    parts: dict[str, Split] = {"train": PartOfSplit("train", whole, train)}
    stored = dataset.manifest.splits
    hidden = 0
    if choice.fold is not None:
        parts[FOLD_SPLIT] = PartOfSplit(FOLD_SPLIT, whole, held)
        hidden = stored[FOLD_SPLIT].count if FOLD_SPLIT in stored else 0
    counts: dict[str, tuple[int, ...]] = {}
    with_classes = [target for target in dataset.manifest.targets if target.classes]
    if with_classes == [first]:
        masks = {"train": train, FOLD_SPLIT: held}
        counts = {name: _of_each_class(first, column[masks[name]]) for name in parts}
    return dataset.with_parts(
        parts,
        class_counts=counts,
        selected=Selected(
            choice=choice,
            train=int(train.sum()),
            held=int(held.sum()),
            whole=whole.count,
            unit=dataset.manifest.unit,
            by=_group_words(first, dataset.manifest.unit),
            hidden=hidden,
            vanished=_vanished(first, _of_each_class(first, column), counts["train"]) if counts else (),
        ),
    )


def selected_counts(
    manifest: Manifest, class_counts: Sequence[int], config: DataConfig
) -> tuple[Manifest, tuple[tuple[int, ...], tuple[int, ...]], Selected | None]:
    """The same from numbers alone, for data that are not converted yet: the manifest with other counts; the samples of each class that are
    trained on, and those in the fold. `class_counts`: training samples of each class of the first target, if that is a label and they are
    known; else empty, and so are the numbers by class. ValueError if there are not enough samples."""
    choice = Choice.of(config)
    if choice.is_all or "train" not in manifest.splits:
        return manifest, ((), ()), None
    first, stored = manifest.targets[0], manifest.splits
    whole = stored["train"].count
    train, held = choice.sizes(whole)
    by_class: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if first.kind == "label" and sum(class_counts) == whole:
        of_train, of_held = planned(class_counts, choice)
        by_class = (tuple(of_train), tuple(of_held))
    counts = {name: info.count for name, info in stored.items()} | {"train": train} | ({FOLD_SPLIT: held} if choice.fold else {})
    return (
        manifest.with_counts(counts),
        by_class,
        Selected(
            choice=choice,
            train=train,
            held=held,
            whole=whole,
            unit=manifest.unit,
            by=_group_words(first, manifest.unit),
            hidden=stored[FOLD_SPLIT].count if choice.fold is not None and FOLD_SPLIT in stored else 0,
            vanished=_vanished(first, class_counts, by_class[0]) if by_class[0] else (),
        ),
    )


def _group_words(target: Target, unit: str) -> str:
    return {"label": "class", "labels": f"each {unit.removesuffix('s')}'s rarest label", "number": f"tenths of {shown(target.name, 40)}"}[
        target.kind
    ]


def _of_each_class(target: Target, column: npt.NDArray[np.generic]) -> tuple[int, ...]:
    if target.kind == "label":
        labels = column.astype(np.int64)
        return tuple(np.bincount(labels[labels >= 0], minlength=len(target.classes)).tolist())
    return tuple((column == 1).sum(0).tolist())


def _vanished(target: Target, whole: Sequence[int], chosen: Sequence[int]) -> tuple[str, ...]:
    return tuple(name for name, before, now in zip(target.classes, whole, chosen, strict=True) if before and not now)
