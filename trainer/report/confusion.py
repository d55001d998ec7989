"""The report's part about single images: a confusion matrix whose cells open their images, and the worst mistakes. Called by report.

Which images are shown follows from predictions.parquet alone: in each cell the surest mistakes (of right answers the least sure), and the
surest of all. They are read from the data set where it can still be read, within READ_BYTES, made small, and put into the page, within
PAGE_BYTES; where something is left out, the page says so. Cells open as popovers, which need no script and close with Escape; a browser
that does not know them shows their images below the matrix.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dataio.config import DataConfig
from dataio.manifest import MANIFEST_NAME, Manifest, ManifestError
from dataio.parquet import Dataset, Split, open_dataset
from dataio.remote import is_remote, is_uri, local_path
from trainer.report.page import NOTHING, Html, image, join, scrolling, section, shade, short, table, tag
from trainer.report.plots import heat
from trainer.settings.units import number, percent, size
from trainer.tasks.predictions import Predictions, worst_first

SHOWN_CLASSES = 30  # a larger confusion matrix becomes a picture
WORST = 24
PER_CELL, PER_RIGHT_CELL = 12, 6
PAIRS = 40  # kinds of mistakes whose images are kept where the matrix is a picture
LISTED_PAIRS = 10
SIDE = 96  # pixels; smaller images stay as they are
LOSSLESS_SIDE = 64
PAGE_BYTES = 2_000_000  # of all images, as they are in the page
READ_BYTES = 256_000_000  # of the data set: row groups are read whole
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # those that a data set may hold (dataio.codecs.image.sniff)

Counts = npt.NDArray[np.int64]
Cell = tuple[int, int]
"""Class and answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shots:
    """The images of a report, chosen and made small."""

    worst: Sequence[int] = ()
    """Rows of the predictions: the surest mistakes."""
    cells: Mapping[Cell, Sequence[int]]
    """Rows of the predictions, in the order in which a cell shows them."""
    sources: Mapping[int, str]
    """By row: the image as a data: URI."""
    notes: Sequence[str] = ()
    """Sentences: what is not shown, and why."""


NO_SHOTS = Shots(cells={}, sources={})


def find_dataset(config: DataConfig, fingerprint: str) -> Dataset:
    """The run's data set, where it was: nothing is downloaded or converted. ValueError or OSError where it cannot be read any more."""
    if is_remote(config.path):
        candidates: list[str | Path] = [config.path]
    else:
        path = (local_path(config.path) if is_uri(config.path) else None) or Path(config.path).expanduser()
        root = Path(config.root).expanduser()
        folders = [path, *(sorted(folder.parent for folder in root.glob(f"*/{MANIFEST_NAME}")) if root.is_dir() else ())]
        candidates = [folder for folder in folders if _fingerprint(folder) == fingerprint]
    for where in candidates:
        dataset = open_dataset(where)
        if dataset.manifest.fingerprint == fingerprint:
            return dataset
    raise ValueError("the data set of this run is not there any more (no converted folder has its fingerprint)")


def _fingerprint(folder: Path) -> str:
    try:
        return Manifest.from_json((folder / MANIFEST_NAME).read_bytes()).fingerprint
    except (OSError, ManifestError):
        return ""


def choose(found: Predictions, classes: int) -> tuple[list[int], dict[Cell, list[int]]]:
    """(the surest mistakes, images by cell): rows of `found`."""
    order = worst_first(found)
    wrong = found.labels[order] != found.answers[order]
    worst = order[wrong][:WORST].tolist()
    cell_of = found.labels[order] * classes + found.answers[order]
    by_cell = np.argsort(cell_of, kind="stable")
    numbers, starts, counts = np.unique(cell_of[by_cell], return_index=True, return_counts=True)
    kept = {
        (int(cell) // classes, int(cell) % classes): order[by_cell[start : start + count]]
        for cell, start, count in zip(numbers, starts, counts, strict=True)
    }
    if classes > SHOWN_CLASSES:
        pairs = sorted((cell for cell in kept if cell[0] != cell[1]), key=lambda cell: (-len(kept[cell]), cell))[:PAIRS]
        kept = {cell: kept[cell] for cell in pairs}
    return worst, {cell: rows[: PER_RIGHT_CELL if cell[0] == cell[1] else PER_CELL].tolist() for cell, rows in kept.items()}


def look_up(found: Predictions, dataset: Dataset, classes: int) -> Shots:
    """The chosen images, read from `dataset`. Raises what reading it raises."""
    worst, cells = choose(found, classes)
    # The most telling first, as room may run out: the worst, then each cell's first, each cell's second, ...
    sizes = found.confusion(classes)
    wrong_first = sorted(cells, key=lambda cell: (cell[0] == cell[1], -int(sizes[cell]), cell))
    deepest = max((len(rows) for rows in cells.values()), default=0)
    wanted = [*worst, *(cells[cell][depth] for depth in range(deepest) for cell in wrong_first if depth < len(cells[cell]))]
    uses = Counter(wanted)  # in the order of their first use
    encoded, unread = _read(dataset.split(found.about.split), found, list(uses))
    sources: dict[int, str] = {}
    used = unfit = undecodable = 0
    for row, times in uses.items():
        if row not in encoded:
            continue
        source = thumbnail(encoded[row])
        if source is None:
            undecodable += 1
        elif used + times * len(source) > PAGE_BYTES:
            unfit += 1
        else:
            used += times * len(source)
            sources[row] = source
    notes = []
    if unfit:
        notes.append(f"{number(unfit)} more images would make this page larger than {size(PAGE_BYTES)} and are left out.")
    if unread:
        notes.append(f"{number(unread)} images are left out, as reading them takes more than {size(READ_BYTES)} of the data set.")
    if undecodable:
        notes.append(f"{number(undecodable)} images could not be decoded for this page.")
    return Shots(worst=worst, cells=cells, sources=sources, notes=notes)


def _read(split: Split, found: Predictions, rows: Sequence[int]) -> tuple[dict[int, bytes], int]:
    """Encoded images of `rows`, and how many of them are beyond READ_BYTES."""
    groups = np.searchsorted(split.group_offsets, found.ids[list(rows)], side="right") - 1
    by_group: dict[int, list[int]] = {}
    for row, group in zip(rows, groups.tolist(), strict=True):
        by_group.setdefault(group, []).append(row)
    encoded: dict[int, bytes] = {}
    left, unread = READ_BYTES, 0
    for group, members in by_group.items():
        left -= split.group_bytes(group)
        if left < 0 and encoded:
            unread += len(members)
            continue
        images = split.read_group(group).encoded
        for row in members:
            encoded[row] = images[int(found.ids[row] - split.group_offsets[group])].tobytes()
    return encoded, unread


def thumbnail(encoded: bytes) -> str | None:
    """At most SIDE pixels wide and high, as a data: URI; None where it cannot be decoded. Always encoded anew: no byte of the data set gets
    into the page as it is."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = ImageOps.exif_transpose(opened).convert("RGB")
            small.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    pixels = np.asarray(small)
    # From the pixels alone, as Pillow hands a file's comments and tags on.
    small = Image.fromarray(pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels)
    sink = io.BytesIO()
    if max(small.size) <= LOSSLESS_SIDE:
        small.save(sink, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(sink, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


# --- HTML -----------------------------------------------------------------------------------------------------------------------------


def confusion_section(matrix: Counts, names: Sequence[str], found: Predictions | None, shots: Shots, missing: str) -> Html:
    """`matrix` (C, C) counts [label][answer]; `missing` says why there is no image, where there is none."""
    count = len(matrix)
    if not count or not matrix.sum():
        return NOTHING
    totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    share = matrix / totals  # (C, C) float64, of the true class's images
    wrong = [(int(matrix[i, j]), int(i), int(j)) for i, j in np.argwhere((matrix > 0) & ~np.eye(count, dtype=bool))]
    is_picture = count > SHOWN_CLASSES
    top = sorted(wrong, key=lambda item: (-item[0], item[1], item[2]))
    shown = top[: PAIRS if is_picture and shots.sources else LISTED_PAIRS]
    listed = table(
        ("is", "is taken for", "images", "of the class"),
        [(names[i], names[j], _opener(matrix, (i, j), names, shots), percent(float(share[i, j]))) for _, i, j in shown],
        numeric=(2, 3),
    )
    popovers = join(_popover(matrix, cell, names, found, shots) for cell in shots.cells) if found is not None else NOTHING
    can_open = any(row in shots.sources for rows in shots.cells.values() for row in rows)
    notes = [missing] if missing and not can_open else [*shots.notes]
    if found is not None and not found.is_complete and can_open:
        notes.append(f"Of the {number(found.about.count)} images, the {number(len(found.ids))} worst are recorded.")
    told = tag("p", " ".join(notes), class_="soft") if notes else NOTHING
    how = " A number opens its images." if can_open else ""
    mistakes = join([tag("h3", "Most frequent mistakes"), listed]) if top else tag("p", "No image was classified wrongly.")
    if is_picture:
        opens = tag("p", how.strip(), class_="soft") if how else NOTHING
        return section("Confusion", mistakes, opens, told, heat(share), popovers)
    header = tag("tr", tag("th", "is ↓  taken for →", class_="corner"), *(tag("th", name, class_="up", scope="col") for name in names))
    body = [
        tag(
            "tr",
            tag("th", names[i], scope="row"),
            *(
                tag(
                    "td",
                    _opener(matrix, (i, j), names, shots),
                    class_="n",
                    style=shade(float(share[i, j]), is_right=i == j),
                    title=f"{names[i]} taken for {names[j]}: {matrix[i, j]} ({percent(float(share[i, j]))})",
                )
                for j in range(count)
            ),
        )
        for i in range(count)
    ]
    grid = scrolling(tag("table", header, *body, class_="confusion"))
    explained = tag("p", f"A row for each true class, a column for each answer: right ones are green, wrong ones red.{how}", class_="soft")
    return section("Confusion", explained, grid, told, mistakes, popovers)


def _opener(matrix: Counts, cell: Cell, names: Sequence[str], shots: Shots) -> object:
    """A cell's number; a button where it has images."""
    count = int(matrix[cell])
    if not any(row in shots.sources for row in shots.cells.get(cell, ())):
        return number(count) if count else ""
    what = f"{number(count)}: show {_what(cell, names)}"
    return tag("button", number(count), type="button", popovertarget=_ident(cell), aria_label=what)


def _popover(matrix: Counts, cell: Cell, names: Sequence[str], found: Predictions, shots: Shots) -> Html:
    rows = [row for row in shots.cells[cell] if row in shots.sources]
    if not rows:
        return NOTHING
    count = int(matrix[cell])
    which = "the least sure ones" if cell[0] == cell[1] else "the surest mistakes"
    amount = f"{number(len(rows))} of {number(count)}: {which} first" if len(rows) < count else f"{number(count)}, {which} first"
    ident = _ident(cell)
    close = tag("button", "Close", type="button", popovertarget=ident, popovertargetaction="hide")
    return tag(
        "div",
        tag("div", tag("h3", _what(cell, names), id=f"{ident}-title"), close, class_="top"),
        tag("p", amount, class_="soft"),
        tag("div", *(_shot(row, names, found, shots.sources[row]) for row in rows), class_="shots"),
        id=ident,
        popover="auto",
        role="dialog",
        aria_labelledby=f"{ident}-title",
    )


def worst_section(names: Sequence[str], found: Predictions | None, shots: Shots, missing: str) -> Html:
    """The surest wrong answers."""
    if found is None:
        return NOTHING
    worst = list(shots.worst) or _worst_rows(found)
    if not worst:
        return NOTHING
    about = "Wrong answers, the surest first. An answer's percentage is the probability that the model gave it."
    pictured = [row for row in worst if row in shots.sources]
    if pictured:
        figures = tag("div", *(_shot(row, names, found, shots.sources[row], said=True) for row in pictured), class_="shots worst")
        return section("Worst mistakes", tag("p", about, class_="soft"), figures)
    rows = [
        (found.keys[row], names[found.labels[row]], names[found.answers[row]], percent(float(found.confidence[row])), _loss(found, row))
        for row in worst
    ]
    told = tag("p", f"{about} {missing}".strip(), class_="soft")
    return section("Worst mistakes", told, table(("key", "is", "is taken for", "sure", "loss"), rows, numeric=(3, 4)))


def _worst_rows(found: Predictions) -> list[int]:
    order = worst_first(found)
    worst: list[int] = order[found.labels[order] != found.answers[order]][:WORST].tolist()
    return worst


def _loss(found: Predictions, row: int) -> str:
    return f"{found.losses[row]:.2f}"


def _shot(row: int, names: Sequence[str], found: Predictions, source: str, *, said: bool = False) -> Html:
    key, sure = short(found.keys[row], 200), percent(float(found.confidence[row]))
    is_right = found.labels[row] == found.answers[row]
    lines: list[Html] = []
    if said:
        lines += [tag("span", names[found.labels[row]]), tag("b", names[found.answers[row]])]
    lines += [tag("span", f"{sure} sure"), tag("span", key, class_="id")]
    pixels = "pixels" if source.startswith("data:image/png") else ""
    what = f"{key}: {_what((int(found.labels[row]), int(found.answers[row])), names)}, {sure} sure"
    picture = image(src=source, alt=what, class_=pixels)
    title = f"{key}, loss {_loss(found, row)}"
    return tag("figure", picture, tag("figcaption", *lines), class_="right" if is_right else "wrong", title=title)


def _what(cell: Cell, names: Sequence[str]) -> str:
    return f"{names[cell[0]]}, recognised" if cell[0] == cell[1] else f"{names[cell[0]]} taken for {names[cell[1]]}"


def _ident(cell: Cell) -> str:
    return f"cell-{cell[0]}-{cell[1]}"


def problems(found: Predictions, summary: Mapping[str, Any], matrix: Counts) -> Iterator[str]:
    """Why these predictions are not those of the run's last evaluation."""
    if found.about.step != summary.get("steps"):
        yield f"they are of step {number(found.about.step)}, the summary is of step {number(summary.get('steps'))}"
    elif found.about.dataset_fingerprint != summary.get("dataset_fingerprint"):
        yield "they are of another data set"
    elif len(found.ids) and not _are_classes(found.labels, len(matrix)) & _are_classes(found.answers, len(matrix)):
        yield "they are of other classes"
    elif found.is_complete and not np.array_equal(found.confusion(len(matrix)), matrix):
        yield "they are of another evaluation: its confusion matrix is not the summary's"


def _are_classes(values: Counts, classes: int) -> bool:
    return bool(values.min() >= 0 and values.max() < classes)
