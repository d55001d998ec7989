"""Panel `confusion`: a row for each true class, a column for each answer, and the most frequent mistakes. A cell opens its images as a
popover, which needs no script and closes with Escape; a browser without popovers shows the images below the matrix.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trainer.report.files import Counts, RunFiles, class_names, confusion_of
from trainer.report.page import NOTHING, Html, join, scrolling, section, shade, table, tag
from trainer.report.panels.pictures import labelled_picture, named_cell, shown_samples, why_words
from trainer.report.plots import Values, heat
from trainer.report.thumbnails import PAIRS, SHOWN_CLASSES, Cell
from trainer.runs.measures import one_of
from trainer.settings.units import number, percent

LISTED_PAIRS = 10


def panel(run: RunFiles) -> Html:
    matrix = confusion_of(run.summary)
    count = len(matrix)
    if not count or not matrix.sum():
        return NOTHING
    names = class_names(run.summary.get("classes"), count)
    unit, thumbnails = run.info.unit, run.thumbnails
    can_open = any(row in thumbnails.sources for rows in thumbnails.cells.values() for row in rows)

    def opener(cell: Cell) -> object:
        return _opener(run, matrix, cell, names)

    how = f" A number opens its {unit}." if can_open else ""
    popovers = join(_popover(run, matrix, cell, names) for cell in thumbnails.cells)
    told = _notes(run, can_open)
    is_picture = count > SHOWN_CLASSES
    mistakes = _mistakes(matrix, names, opener, unit, PAIRS if is_picture and thumbnails.sources else LISTED_PAIRS)
    if is_picture:
        opens = tag("p", how.strip(), class_="soft") if how else NOTHING
        return section("Confusion", mistakes, opens, told, heat(_shares(matrix)), popovers)
    explained = tag("p", f"A row for each true class, a column for each answer: right ones are green, wrong ones red.{how}", class_="soft")
    return section("Confusion", explained, grid(matrix, names, opener), told, mistakes, popovers)


def grid(matrix: Counts, names: Sequence[str], shown: Callable[[Cell], object]) -> Html:
    """The matrix alone; `shown` gives the content of a cell."""
    share = _shares(matrix)
    header = tag("tr", tag("th", "is ↓  taken for →", class_="corner"), *(tag("th", name, class_="up", scope="col") for name in names))
    body = [
        tag(
            "tr",
            tag("th", names[i], scope="row"),
            *(
                tag(
                    "td",
                    shown((i, j)),
                    class_="n",
                    style=shade(float(share[i, j]), is_right=i == j),
                    title=f"{names[i]} taken for {names[j]}: {matrix[i, j]} ({percent(float(share[i, j]))})",
                )
                for j in range(len(matrix))
            ),
        )
        for i in range(len(matrix))
    ]
    return scrolling(tag("table", header, *body, class_="confusion"))


def _shares(matrix: Counts) -> Values:
    """(C, C), as fractions of the true class's samples."""
    shares: Values = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return shares


def _mistakes(matrix: Counts, names: Sequence[str], opener: Callable[[Cell], object], unit: str, most: int) -> Html:
    wrong = [(int(matrix[i, j]), int(i), int(j)) for i, j in np.argwhere((matrix > 0) & ~np.eye(len(matrix), dtype=bool))]
    top = sorted(wrong, key=lambda item: (-item[0], item[1], item[2]))[:most]
    if not top:
        return tag("p", f"No {one_of(unit)} was classified wrongly.")
    share = _shares(matrix)
    listed = table(
        ("is", "is taken for", unit, "of the class"),
        [(names[i], names[j], opener((i, j)), percent(float(share[i, j]))) for _, i, j in top],
        numeric=(2, 3),
    )
    return join([tag("h3", "Most frequent mistakes"), listed])


def _notes(run: RunFiles, can_open: bool) -> Html:
    """Which images are missing, and why."""
    found = run.predictions
    notes = [run.no_thumbnails] if run.no_thumbnails and not can_open else [*run.thumbnails.notes]
    if found is not None and not found.is_complete and can_open:
        notes.append(f"Of the {number(found.about.count)} {run.info.unit}, the {number(len(found.ids))} worst are recorded.")
    return tag("p", " ".join(notes), class_="soft") if notes else NOTHING


def _opener(run: RunFiles, matrix: Counts, cell: Cell, names: Sequence[str]) -> object:
    """The number in a cell; a button if the cell has images."""
    count = int(matrix[cell])
    if not any(row in run.thumbnails.sources for row in run.thumbnails.cells.get(cell, ())):
        return number(count) if count else ""
    what = f"{number(count)}: show {named_cell(cell, names)}"
    return tag("button", number(count), type="button", popovertarget=_ident(cell), aria_label=what)


def _popover(run: RunFiles, matrix: Counts, cell: Cell, names: Sequence[str]) -> Html:
    found, thumbnails = run.predictions, run.thumbnails
    rows = [row for row in thumbnails.cells[cell] if row in thumbnails.sources]
    if not rows or found is None:
        return NOTHING
    count = int(matrix[cell])
    which = "the least sure ones" if cell[0] == cell[1] else "the surest mistakes"
    amount = f"{number(len(rows))} of {number(count)}: {which} first" if len(rows) < count else f"{number(count)}, {which} first"
    told = f"{amount}. {why_words(run)}" if any(row in thumbnails.why or row in thumbnails.marks for row in rows) else amount
    pictures = (labelled_picture(row, names, found, thumbnails) for row in rows)
    ident = _ident(cell)
    close = tag("button", "Close", type="button", popovertarget=ident, popovertargetaction="hide")
    return tag(
        "div",
        tag("div", tag("h3", named_cell(cell, names), id=f"{ident}-title"), close, class_="top"),
        tag("p", told, class_="soft"),
        shown_samples(run, pictures),
        id=ident,
        popover="auto",
        role="dialog",
        aria_labelledby=f"{ident}-title",
    )


def _ident(cell: Cell) -> str:
    return f"cell-{cell[0]}-{cell[1]}"
