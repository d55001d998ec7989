"""The page of a compression: size against accuracy, and the table. One file without a script. __main__.py writes it."""

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.compress.results import Answered, Timed, table
from trainer.report.page import page, section, tag
from trainer.report.page import table as html_table
from trainer.report.plots import MOST_LINES, plot
from trainer.runs.measures import heading
from trainer.tasks.info import Measure

TITLE = "How small the model gets"
NOTE = (
    "Accuracies are of the whole test split, asked through the files that are listed; the same command gives them again to the bit. "
    "Times and memory are measurements of this machine, in turns, and differ from one time to the next."
)


def drawn(rows: Sequence[Answered], timed: Mapping[str, Timed], measure: Measure) -> str:
    """The page as HTML."""
    scale = 100 if measure.unit == "ratio" else 1
    points = [(row.stage, np.array([row.bytes / 1e6]), np.array([scale * row.value]), "o") for row in rows[:MOST_LINES]]
    figure = plot(points, marks=(), x=f"size in MB (upwards: {heading(measure)})", log=False, ident="sizes")
    head, cells = table(rows, timed, measure)
    refused = [tag("p", f"{row.stage} is refused: {row.refused}", class_="verdict warn") for row in rows if row.refused]
    return page(
        TITLE,
        tag("header", tag("h1", TITLE)),
        *refused,
        section("Size against accuracy", tag("figure", figure)),
        section("Stage by stage", html_table(head, cells, numeric=range(1, len(head))), tag("p", NOTE, class_="soft")),
    )
