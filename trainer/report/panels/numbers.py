"""Panel `numbers`: how far the model's numbers are from the true ones. Drawn from predictions.parquet if it has both columns: `target` and
`prediction` for a task with one number, `NAME_target` and `NAME_prediction` for the number NAME among several.
"""

import numpy as np

from trainer.report.files import RunFiles
from trainer.report.page import NOTHING, Html, section, tag
from trainer.report.panels.measures import measures_table
from trainer.report.plots import Values, histogram, scatter
from trainer.tasks.predictions import Predictions


def panel(run: RunFiles) -> Html:
    parts = [part for part in (measures_table(run.info, run.summary), number_figures(run.predictions, "", "n")) if part]
    return section("Numbers", *parts) if parts else NOTHING


def number_figures(found: Predictions | None, name: str, ident: str) -> Html:
    """Plots of predicted against true values, and of their differences; nothing if they are not recorded. The plots' ids use `ident`."""
    pair = numbers_of(found, name)
    if pair is None:
        return NOTHING
    said, true = pair
    return tag(
        "div",
        tag("figure", tag("figcaption", "Said and true"), scatter(true, said, x="true", y="said", ident=f"{ident}s")),
        tag("figure", tag("figcaption", "Said minus true"), histogram(said - true, x="difference", ident=f"{ident}h")),
        class_="figures",
    )


def numbers_of(found: Predictions | None, name: str) -> tuple[Values, Values] | None:
    """(predicted, true), each (n,) float64, of the samples that have both."""
    prefix = f"{name}_" if name else ""
    columns = {} if found is None else found.columns
    said, true = columns.get(f"{prefix}prediction"), columns.get(f"{prefix}target")
    if said is None or true is None or said.ndim != 1 or true.ndim != 1:
        return None
    said, true = said.astype(np.float64), true.astype(np.float64)
    known = np.isfinite(said) & np.isfinite(true)
    return (said[known], true[known]) if known.any() else None
