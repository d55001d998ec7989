"""Finds texts that are copies of each other: the same text, the same but for case, spaces and forms of characters, or nearly the same.
__main__.py calls `find_text_copies`; texts.py made what is compared, copies.py puts pairs together.

Near copies share most of their shingles (runs of LENGTH characters; Broder 1997), each counting by how few texts have it: so texts of one
template are not copies as long as what is filled in differs. The measure is the weighted Jaccard index, and every pair of at least LEAST
is found (prefix filtering, Chaudhuri et al. 2006): of two such texts, each has their rarest common shingle among those that it lists first.
Weights are whole numbers, so that no order of adding changes what is found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.audit.copies import Group, Pair, equal_pairs, firsts, grouped
from trainer.audit.kept import Ints
from trainer.audit.texts import GatheredTexts, Shingles

LEAST = 55
"""Per cent of what two texts have together that they have in common, if they are copies. Chosen by 4,000 snippets of film reviews and 400
copies of them (docs/audit.md)."""
MOST_SHARED = 2_000
"""A shingle that more texts list first is no sign of a copy: a template's, or a phrase of which short texts consist."""
AT_ONCE = 1 << 14
"""Pairs that are compared at once."""
_UNIT = 64
"""A shingle that half of the texts have weighs so much."""


def find_text_copies(found: GatheredTexts, *, on_block: Callable[[int, int], None] = lambda done, total: None) -> list[Group]:
    """All groups of copies, the surest first. `on_block` is told how many pairs were compared, of how many."""
    usable = np.flatnonzero(~found.is_bad)
    pairs = [Pair(first=first, second=second, how="text") for first, second in equal_pairs(found.bytes_of, usable)]
    alone = firsts(usable, pairs)
    pairs += [Pair(first=first, second=second, how="folded") for first, second in equal_pairs(found.folded_of, alone)]
    pairs += near_pairs(found.shingles, firsts(usable, pairs), on_block=on_block)
    return grouped(pairs)


def near_pairs(
    shingles: Shingles, among: Ints, *, least: int = LEAST, on_block: Callable[[int, int], None] = lambda done, total: None
) -> list[Pair]:
    """Pairs of near copies among these texts: those that have `least` per cent in common."""
    if len(among) < 2:
        return []
    weighed = _weighed(shingles, among)
    pairs = _candidates(weighed, least)  # (pairs, 2)
    found = []
    for begin in range(0, len(pairs), AT_ONCE):
        part = pairs[begin : begin + AT_ONCE]
        common = _in_common(weighed, part)
        together = weighed.totals[part].sum(1) - common
        for row in np.flatnonzero(100 * common >= least * together).tolist():
            first, second = among[part[row]].tolist()
            found.append(Pair(first=first, second=second, how="near", ratio=1 - float(common[row] / together[row])))
        on_block(begin + len(part), len(pairs))
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Weighed:
    """The shingles of n texts, those of each by how rare they are."""

    ids: Ints  # (shingles,): from 0
    starts: Ints  # (n + 1,)
    weights: Ints  # (shingles,)
    totals: Ints  # (n,): the weight of each text

    @property
    def texts(self) -> Ints:
        """(shingles,): which of the texts has each."""
        return np.repeat(np.arange(len(self.totals)), np.diff(self.starts))


def _weighed(shingles: Shingles, among: Ints) -> _Weighed:
    values, starts = shingles.of(among)
    _, ids, counts = np.unique(values, return_inverse=True, return_counts=True)
    weight_of = np.maximum(1, np.rint(_UNIT * np.log2(len(among) / counts))).astype(np.int64)  # (different shingles,)
    texts = np.repeat(np.arange(len(among)), np.diff(starts))
    ids = ids[np.lexsort((ids, counts[ids], texts))]
    weights = weight_of[ids]
    return _Weighed(ids=ids, starts=starts, weights=weights, totals=_sums(weights, starts))


def _sums(values: Ints, starts: Ints) -> Ints:
    """(n,): the sum of each part of `values`."""
    before = np.concatenate(([0], np.cumsum(values)))
    return before[starts[1:]] - before[starts[:-1]]


def _candidates(weighed: _Weighed, least: int) -> npt.NDArray[np.int64]:
    """(pairs, 2), each once, the first text first: those that may have `least` per cent in common, by what is left of both from a shingle
    that they share. From their rarest common one on, all that they have in common is left."""
    texts = weighed.texts
    before = np.concatenate(([0], np.cumsum(weighed.weights)))
    rest = before[weighed.starts[1:]][texts] - before[:-1]  # (shingles,): the weight of this one and of all behind it
    listed = 100 * rest >= least * weighed.totals[texts]
    ids, texts, rest = weighed.ids[listed], texts[listed], rest[listed]
    order = np.lexsort((texts, ids))
    ids, texts, rest = ids[order], texts[order], rest[order]
    begins = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    sizes = np.diff(np.concatenate((begins, [len(ids)])))
    left = np.repeat(begins + sizes, sizes) - np.arange(len(ids)) - 1  # (listed,): entries of the same shingle behind each
    left[np.repeat(sizes > MOST_SHARED, sizes)] = 0
    n, known, fresh = len(weighed.totals), np.empty(0, np.int64), list[Ints]()
    for away in range(1, int(left.max(initial=0)) + 1):
        here = np.flatnonzero(left >= away)
        first, second = texts[here], texts[here + away]
        most = np.minimum(rest[here], rest[here + away])
        near = 100 * most >= least * (weighed.totals[first] + weighed.totals[second] - most)
        fresh.append(first[near] * n + second[near])
        if sum(map(len, fresh)) > len(known) + AT_ONCE:
            known, fresh = np.unique(np.concatenate((known, *fresh))), []
    known = np.unique(np.concatenate((known, *fresh)))
    return np.stack(np.divmod(known, n), axis=1)


def _in_common(weighed: _Weighed, pairs: npt.NDArray[np.int64]) -> Ints:
    """(pairs,): the weight of what the texts of each pair have in common."""
    ids = int(weighed.ids.max(initial=0)) + 1
    sides = []
    for texts in pairs.T:
        sizes = weighed.starts[texts + 1] - weighed.starts[texts]
        pair = np.repeat(np.arange(len(texts)), sizes)
        places = np.arange(len(pair)) + np.repeat(weighed.starts[texts] - np.cumsum(sizes) + sizes, sizes)
        sides.append((pair * ids + weighed.ids[places], weighed.weights[places]))
    (one, weights), (other, _) = sides
    common, place, _ = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    found = np.zeros(len(pairs), np.int64)
    np.add.at(found, common // ids, weights[place])
    return found
