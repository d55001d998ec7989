"""Finds images that are copies of each other: equal bytes, equal pixels, or the same picture resized, compressed again or mirrored.
__main__.py calls `find_copies`; gather.py made what is compared.

Near copies are found in two steps. Candidates are the nearest neighbours by blurred thumbnails, mirrored ones too, by products of matrices
in blocks. Then an image's candidates are sorted by their distance at the size of the small copies, and those before the last large gap are
its copies: a copy is less than RATIO times as far away as the next different image (Lowe 2004). Both images of a pair have to say so.
That needs no threshold for a data set: where images are alike, a copy has to be closer. Perceptual hashes and principal components of
thumbnails found fewer.

Measured on 2,500 images of Fashion-MNIST with copies resized, compressed and mirrored: 498 of 500 pairs found and one other pair; of groups
of three, 894 of 900 pairs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.audit.gather import THUMB_SIDE, Bytes, Floats, Gathered, blurred
from trainer.audit.kept import Hashes, Ints

NEIGHBOURS = 16
"""Candidates an image has; a picture with as many near copies has no gap after them, and they are not found. Equal images do not count."""
RATIO = 0.55
LOOSE_RATIO = 0.75
"""By thumbnails. Images without such a gap are not looked at any closer: of 900 copies none was lost so, and 94 % of the others are."""
ROWS, COLUMNS = 1024, 4096
"""Thumbnails whose distances are held at once."""
AT_ONCE = 64
"""Images that are compared closely at once, each with its candidates."""

How = Literal["bytes", "pixels", "text", "folded", "near", "mirrored"]
ORDER: Sequence[How] = ("bytes", "pixels", "text", "folded", "near", "mirrored")
"""From the surest to the least sure."""
EXACT: Sequence[How] = ("bytes", "pixels", "text", "folded")
"""`text` and `folded` are of texts (text_copies.py), `bytes`, `pixels` and `mirrored` of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two samples that are copies; the first comes before the second in the data."""

    first: int
    second: int
    how: How
    ratio: float = 0.0
    """Of images, their distance over that of the next different image; of texts, the share that is not common to both. 0 for equal ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Copies of one picture, or of one text."""

    samples: tuple[int, ...]
    """In the order of the data."""
    how: tuple[How, ...]
    """For each of them the surest of its links to others of the group."""
    ratio: float
    """The largest of the links."""


def find_copies(
    found: Gathered,
    *,
    are_equal: Callable[[int, int], bool] = lambda first, second: True,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Group]:
    """All groups of copies, the surest first. `are_equal` says whether two images with the same hash of pixels have the same pixels, where
    they were not decoded at their own size. `on_block` is told how many blocks of thumbnails were compared, of how many."""
    usable = np.flatnonzero(~found.is_bad)
    pairs = [Pair(first=first, second=second, how="bytes") for first, second in equal_pairs(found.bytes_of, usable)]
    alone = firsts(usable, pairs)
    same = [pair for pair in equal_pairs(found.pixels_of, alone) if found.is_native or are_equal(*pair)]
    pairs += [Pair(first=first, second=second, how="pixels") for first, second in same]
    pairs += near_pairs(found.details, found.thumbs, firsts(usable, pairs), on_block=on_block)
    return grouped(pairs)


def equal_pairs(hashes: Hashes, among: Ints) -> Iterator[tuple[int, int]]:
    """Each image with the first one of the same hash."""
    _, first, inverse = np.unique(hashes[among], return_index=True, return_inverse=True)
    firsts = among[first[inverse]]
    repeated = firsts != among
    yield from zip(firsts[repeated].tolist(), among[repeated].tolist(), strict=True)


def firsts(images: Ints, pairs: Iterable[Pair]) -> Ints:
    """Those that are not the second of a pair: of each group of equal images one."""
    return np.setdiff1d(images, np.array([pair.second for pair in pairs], np.int64), assume_unique=False)


def near_pairs(
    details: Bytes, thumbs: Floats, among: Ints, *, on_block: Callable[[int, int], None] = lambda done, total: None
) -> list[Pair]:
    """Pairs of near copies among these images. Fewer than three images have no next different one to compare with."""
    if len(among) < 3:
        return []
    near = neighbours(thumbs, among, min(NEIGHBOURS, len(among) - 1), on_block=on_block)
    has_gap = (near.distances[:, :-1] <= LOOSE_RATIO * near.distances[:, 1:]).any(1)
    said: dict[tuple[int, int], list[tuple[float, bool]]] = defaultdict(list)
    rows = np.flatnonzero(has_gap)
    for begin in range(0, len(rows), AT_ONCE):
        for row, other, ratio, is_mirrored in _closely(details, among, near, rows[begin : begin + AT_ONCE]):
            said[min(row, other), max(row, other)].append((ratio, is_mirrored))
    return [
        Pair(
            first=int(among[first]),
            second=int(among[second]),
            how="mirrored" if both[0][1] else "near",
            ratio=max(ratio for ratio, _ in both),
        )
        for (first, second), both in sorted(said.items())
        if len(both) == 2
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighbours:
    """The nearest neighbours of n images, the nearest first, as positions among them."""

    places: Ints  # (n, k)
    distances: Floats  # (n, k)
    mirrored: npt.NDArray[np.bool_]  # (n, k): the neighbour is closer when mirrored


def neighbours(thumbs: Floats, among: Ints, k: int, *, on_block: Callable[[int, int], None] = lambda done, total: None) -> Neighbours:
    """The k nearest of each image by thumbnails, (N, d) float32, as they are or mirrored; `among` are the rows to compare. Memory does not
    grow with the square of their number."""
    n = len(among)
    centre = np.asarray(thumbs[among[:: max(1, n // 4096)]]).mean(0)
    best = np.full((n, k), np.inf, np.float32)
    places, mirrored = np.zeros((n, k), np.int64), np.zeros((n, k), bool)
    blocks = range(0, n, COLUMNS)
    for done, left in enumerate(blocks, 1):
        columns = thumbs[among[left : left + COLUMNS]]
        plain_of, turned_of = (_for_products(each - centre) for each in (columns, mirror(columns)))
        for top in range(0, n, ROWS):
            part = slice(top, min(top + ROWS, n))
            rows = _with_one(thumbs[among[part]] - centre)
            plain, turned = rows @ plain_of, rows @ turned_of  # (r, c): squared distances less what the row adds, which sort alike
            own = np.arange(max(top, left), min(part.stop, left + len(columns)))
            plain[own - top, own - left] = turned[own - top, own - left] = np.inf
            _take(plain, turned, left, best[part], places[part], mirrored[part])
        on_block(done, len(blocks))
    squares = np.concatenate([((thumbs[among[top : top + ROWS]] - centre) ** 2).sum(1) for top in range(0, n, ROWS)])
    return Neighbours(places=places, distances=np.sqrt(np.maximum(best + squares[:, None], 0)), mirrored=mirrored)


def mirror(thumbs: Floats) -> Floats:
    """(n, d): left and right exchanged."""
    return thumbs.reshape(-1, THUMB_SIDE, THUMB_SIDE)[:, :, ::-1].reshape(len(thumbs), -1)


def _with_one(rows: Floats) -> Floats:
    """(r, d + 1): with a column of ones, by which `_for_products` adds the columns' squared lengths."""
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)


def _for_products(columns: Floats) -> Floats:
    """(d + 1, c): what rows are multiplied by to get squared distances less the squared length of each row."""
    return np.concatenate([-2 * columns, (columns**2).sum(1, keepdims=True)], axis=1).T


def _take(plain: Floats, turned: Floats, left: int, best: Floats, places: Ints, mirrored: npt.NDArray[np.bool_]) -> None:
    """Take a block's distances into the k best of its rows."""
    r, k = best.shape
    away = np.minimum(plain, turned)
    if away.shape[1] > k and not np.isfinite(best[:, -1]).any():  # at first all would be better
        rows, columns = np.repeat(np.arange(r), k), np.argpartition(away, k - 1, axis=1)[:, :k].ravel()
    else:
        rows, columns = np.divmod(np.flatnonzero(away < best[:, -1:]), away.shape[1])
    if not len(rows):
        return
    values = away[rows, columns]
    order = np.lexsort((columns, values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)  # within the row
    rows, columns, values, rank = (each[rank < k] for each in (rows, columns, values, rank))
    new, new_places, new_mirrored = np.full((r, k), np.inf, np.float32), np.zeros((r, k), np.int64), np.zeros((r, k), bool)
    new[rows, rank], new_places[rows, rank] = values, columns + left
    new_mirrored[rows, rank] = turned[rows, columns] < plain[rows, columns]
    touched = np.unique(rows)
    order = np.argsort(np.concatenate([best[touched], new[touched]], axis=1), axis=1, kind="stable")[:, :k]
    for old, fresh in ((best, new), (places, new_places), (mirrored, new_mirrored)):
        old[touched] = np.take_along_axis(np.concatenate([old[touched], fresh[touched]], axis=1), order, axis=1)


def _closely(details: Bytes, among: Ints, near: Neighbours, rows: Ints) -> Iterator[tuple[int, int, float, bool]]:
    """(image, copy, ratio, whether it is mirrored) for these images, as positions in `among`."""
    places, turned = near.places[rows], near.mirrored[rows]
    b, k = places.shape
    own = blurred(details[among[rows]])  # (b, d)
    others = details[among[places.ravel()]]  # (b * k, h, w, 3)
    others = np.where(turned.ravel()[:, None, None, None], others[:, :, ::-1], others)
    apart = np.sqrt(((blurred(others).reshape(b, k, -1) - own[:, None]) ** 2).sum(2, dtype=np.float64))  # (b, k)
    order = np.argsort(apart, axis=1, kind="stable")
    apart, places, turned = (np.take_along_axis(each, order, axis=1) for each in (apart, places, turned))
    for number, row in enumerate(rows.tolist()):
        gaps = np.flatnonzero(apart[number, :-1] < RATIO * apart[number, 1:])
        for each in range(int(gaps[-1]) + 1 if len(gaps) else 0):
            ratio = float(apart[number, each] / apart[number, gaps[-1] + 1])
            yield row, int(places[number, each]), ratio, bool(turned[number, each])


def grouped(pairs: Iterable[Pair]) -> list[Group]:
    """Samples that pairs link, directly or by others, as groups: the surest first, then in the order of the data."""
    above: dict[int, int] = {}

    def root(sample: int) -> int:
        path = [sample]
        while (up := above.setdefault(path[-1], path[-1])) != path[-1]:
            path.append(up)
        for each in path:
            above[each] = path[-1]
        return path[-1]

    links: dict[int, How] = {}
    known = sorted(pairs, key=lambda pair: (ORDER.index(pair.how), pair.first, pair.second))
    for pair in known:
        for sample in (pair.first, pair.second):
            links.setdefault(sample, pair.how)
        first, second = sorted((root(pair.first), root(pair.second)))
        above[second] = first
    members: dict[int, list[int]] = defaultdict(list)
    for sample in sorted(links):
        members[root(sample)].append(sample)
    worst: dict[int, float] = defaultdict(float)
    for pair in known:
        worst[root(pair.first)] = max(worst[root(pair.first)], pair.ratio)
    groups = [
        Group(samples=tuple(linked), how=tuple(links[each] for each in linked), ratio=worst[first]) for first, linked in members.items()
    ]
    return sorted(groups, key=lambda group: (group.ratio, group.samples))
