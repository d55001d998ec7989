"""The images in the report, or the texts: chosen by predictions.parquet, read from the data set, and scaled down. Called by files.

The predictions alone decide which images are chosen. For classification these are, in each cell of the confusion matrix, the mistakes with
the highest confidence (among right answers, those with the lowest), and the most confident mistakes of all; for other tasks, the samples
with the largest loss. They are read if the data set can still be read, within READ_BYTES, scaled down, and put into the page, within
PAGE_BYTES; `notes` names what is left out.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from dataio.config import DataConfig
from dataio.manifest import MANIFEST_NAME, Manifest, ManifestError
from dataio.parquet import Dataset, Split, open_dataset
from dataio.remote import is_remote, is_uri, local_path
from dataio.selection import selected
from trainer.report.overlay import overlay, seen
from trainer.settings.units import number, size
from trainer.tasks.explanations import Explanations
from trainer.tasks.highlights import Highlights, Mark
from trainer.tasks.predictions import Predictions, worst_first

SHOWN_CLASSES = 30
"""A larger confusion matrix becomes a picture, and keeps only the images of its most frequent mistakes."""
WORST = 24
PER_CELL, PER_RIGHT_CELL = 12, 6
PAIRS = 40  # kinds of mistakes that keep their images where the matrix is a picture
SIDE = 96  # pixels; smaller images stay as they are
LOSSLESS_SIDE = 64
PAGE_BYTES = 2_000_000  # for all images, in their form in the page
TEXT_CHARACTERS = 600
"""Of a text, the beginning."""
MARK_BYTES = 72
"""What a mark adds to the page."""
READ_BYTES = 256_000_000  # of the data set; row groups are read whole
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # those that a data set may hold (dataio.codecs.image.sniff)
_TURNS: Mapping[object, Image.Transpose] = {  # by the orientation in an image's EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Cell = tuple[int, int]
"""(true class, answer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnails:
    """The chosen and scaled images of a report."""

    worst: Sequence[int] = ()
    """Rows of the predictions: the mistakes with the highest confidence, or the samples with the largest loss."""
    cells: Mapping[Cell, Sequence[int]]
    """Rows of the predictions, in the order in which the cell shows them."""
    sources: Mapping[int, str]
    """Row -> image as a data: URI; or the text's beginning, which is text and no markup."""
    are_texts: bool = False
    notes: Sequence[str] = ()
    """Sentences: what is left out, and why."""
    why: Mapping[int, str] = field(default_factory=dict)
    """Row -> the image with the map of where the answer comes from, as a data: URI."""
    marks: Mapping[int, Sequence[Mark]] = field(default_factory=dict)
    """Row -> the characters of the text that the answer comes from."""


NO_THUMBNAILS = Thumbnails(cells={}, sources={})


def find_dataset(config: DataConfig, fingerprint: str) -> Dataset:
    """Opens the run's data set where it was; downloads and converts nothing. ValueError or OSError if it cannot be read any more."""
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
            return selected(dataset, config)  # a run numbers the samples that it chose
    raise ValueError("the data set of this run is not there any more (no converted folder has its fingerprint)")


def _fingerprint(folder: Path) -> str:
    try:
        return Manifest.from_json((folder / MANIFEST_NAME).read_bytes()).fingerprint
    except (OSError, ManifestError):
        return ""


def choose(found: Predictions, classes: int) -> tuple[list[int], dict[Cell, list[int]]]:
    """(the worst, images by cell), as rows of `found`. Only classifications have cells."""
    worst = worst_rows(found)
    if not found.is_classification:
        return worst, {}
    order = worst_first(found)
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


def worst_rows(found: Predictions) -> list[int]:
    """For classification the mistakes with the highest confidence; for another task the samples with the largest loss, if it has one."""
    if found.is_classification:
        order = worst_first(found)
        rows = order[found.labels[order] != found.answers[order]]
    elif "loss" in found.columns:
        losses = np.nan_to_num(found.columns["loss"].astype(np.float64), nan=-np.inf, posinf=np.finfo(np.float64).max)
        order = np.lexsort((found.ids, -losses))
        rows = order[np.isfinite(losses[order])]
    else:
        rows = np.zeros(0, dtype=np.int64)
    worst: list[int] = rows[:WORST].tolist()
    return worst


def _uses(found: Predictions, classes: int, worst: Sequence[int], cells: Mapping[Cell, Sequence[int]]) -> Counter[int]:
    """How often the page shows each row, the most informative first, since room may run out: the worst, then each cell's first, each cell's
    second, ..."""
    matrix = found.confusion(classes) if cells else np.zeros((0, 0), dtype=np.int64)
    wrong_first = sorted(cells, key=lambda cell: (cell[0] == cell[1], -int(matrix[cell]), cell))
    deepest = max((len(rows) for rows in cells.values()), default=0)
    return Counter([*worst, *(cells[cell][depth] for depth in range(deepest) for cell in wrong_first if depth < len(cells[cell]))])


def rows_to_show(found: Predictions, split: Split, classes: int) -> list[int]:
    """The rows whose images the page shows, as far as reading them takes no more than READ_BYTES; the most informative first."""
    uses = list(_uses(found, classes, *choose(found, classes)))
    groups, _ = _groups(split, found, uses)
    readable = {row for members in groups.values() for row in members}
    return [row for row in uses if row in readable]


def look_up(found: Predictions, dataset: Dataset, classes: int, explanations: Explanations | Highlights | None = None) -> Thumbnails:
    """Reads the chosen images from `dataset`. Raises what reading raises."""
    worst, cells = choose(found, classes)
    uses = _uses(found, classes, worst, cells)
    if (split := dataset.split(found.about.split)).holds_texts:
        return _texts(found, split, worst, cells, uses, explanations if isinstance(explanations, Highlights) else None)
    encoded, unread = _read(split, found, list(uses))
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
    maps = explanations if isinstance(explanations, Explanations) else None
    why = _explained(found, maps, {row: encoded[row] for row in sources}, uses, PAGE_BYTES - used)
    notes = []
    if unfit:
        notes.append(f"{number(unfit)} more images would make this page larger than {size(PAGE_BYTES)} and are left out.")
    if unread:
        notes.append(f"{number(unread)} images are left out, as reading them takes more than {size(READ_BYTES)} of the data set.")
    if undecodable:
        notes.append(f"{number(undecodable)} images could not be decoded for this page.")
    return Thumbnails(worst=worst, cells=cells, sources=sources, notes=notes, why=why)


def _texts(
    found: Predictions,
    split: Split,
    worst: Sequence[int],
    cells: Mapping[Cell, Sequence[int]],
    uses: Mapping[int, int],
    highlights: Highlights | None,
) -> Thumbnails:
    """The chosen texts, as far as they fit into the page."""
    sources: dict[int, str] = {}
    used = unfit = 0
    for row, text in zip(uses, split.texts(found.ids[list(uses)]), strict=True):
        text = text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}..."
        used += uses[row] * len(text.encode())
        if used > PAGE_BYTES:
            unfit += 1
        else:
            sources[row] = text
    notes = [f"{number(unfit)} more texts would make this page larger than {size(PAGE_BYTES)} and are left out."] if unfit else []
    by_id = {} if highlights is None else highlights.by_id()
    marks: dict[int, Sequence[Mark]] = {}
    for row in sources:
        each = by_id.get(int(found.ids[row]), ())
        used += uses[row] * MARK_BYTES * len(each)
        if each and used <= PAGE_BYTES:
            marks[row] = each
    return Thumbnails(worst=worst, cells=cells, sources=sources, notes=notes, are_texts=True, marks=marks)


def _explained(
    found: Predictions, explanations: Explanations | None, encoded: Mapping[int, bytes], uses: Mapping[int, int], left: int
) -> dict[int, str]:
    """The images that have a map, with it, within `left` bytes of the page."""
    why: dict[int, str] = {}
    maps = {} if explanations is None else explanations.by_id()
    for row, data in encoded.items():
        heat = maps.get(int(found.ids[row]))
        source = None if explanations is None or heat is None or not heat.any() else _overlaid(data, heat, explanations)
        if source is not None and (left := left - uses[row] * len(source)) >= 0:
            why[row] = source
    return why


def _overlaid(encoded: bytes, heat: npt.NDArray[np.uint8], explanations: Explanations) -> str | None:
    """An image as the model saw it, with its map, as a data: URI; None if it cannot be decoded. Never raises."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))
            image = seen(_upright(opened).convert("RGB"), explanations.about.image_hw, explanations.about.fit)
            return _encoded(overlay(image, heat, side=SIDE))
    except Exception:
        return None


def _read(split: Split, found: Predictions, rows: Sequence[int]) -> tuple[dict[int, bytes], int]:
    """The encoded images of `rows`, and how many were left out because of READ_BYTES."""
    by_group, unread = _groups(split, found, rows)
    encoded: dict[int, bytes] = {}
    for group, members in by_group.items():
        images = split.read_group(group).encoded
        for row in members:
            encoded[row] = images[int(found.ids[row] - split.group_offsets[group])].tobytes()
    return encoded, unread


def _groups(split: Split, found: Predictions, rows: Sequence[int]) -> tuple[dict[int, list[int]], int]:
    """The row groups to read, each with those of `rows` that lie in it, and how many rows were left out because of READ_BYTES."""
    groups = np.searchsorted(split.group_offsets, found.ids[list(rows)], side="right") - 1
    by_group: dict[int, list[int]] = {}
    for row, group in zip(rows, groups.tolist(), strict=True):
        by_group.setdefault(group, []).append(row)
    kept: dict[int, list[int]] = {}
    left, unread = READ_BYTES, 0
    for group, members in by_group.items():
        left -= split.group_bytes(group)
        if left < 0 and kept:
            unread += len(members)
        else:
            kept[group] = members
    return kept, unread


def thumbnail(encoded: bytes, *, formats: tuple[str, ...] = FORMATS) -> str | None:
    """An image of at most SIDE pixels a side, as a data: URI; None if it cannot be decoded. It is always encoded again, so no byte of the
    data set gets into the page unchanged. Never raises: Pillow meets broken files with exceptions of a dozen kinds."""
    try:
        with Image.open(io.BytesIO(encoded), formats=formats) as opened:
            return _as_uri(opened)
    except Exception:
        return None


def _as_uri(opened: Image.Image) -> str:
    """An opened image, scaled down, as a data: URI. Raises what Pillow raises."""
    opened.draft("RGB", (2 * SIDE, 2 * SIDE))
    small = _upright(opened).convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return _encoded(small)


def _upright(opened: Image.Image) -> Image.Image:
    """The image turned as its EXIF says."""
    # Not ImageOps.exif_transpose, which also encodes all tags again, and raises where one of them is malformed.
    try:
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the tags are broken, the pixels need not be
        turn = None
    return opened if turn is None else opened.transpose(turn)


def _encoded(small: Image.Image) -> str:
    pixels = np.asarray(small)
    # From the pixels alone, because Pillow copies a file's comments and tags.
    small = Image.fromarray(pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels)
    sink = io.BytesIO()
    if max(small.size) <= LOSSLESS_SIDE:
        small.save(sink, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(sink, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"
