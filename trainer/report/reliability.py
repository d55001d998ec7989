"""The report's part on confidence: a reliability plot, and the calibration errors without and with the temperature. Called by sections; the
record is made by trainer.tasks.calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.report.files import RunFiles
from trainer.report.page import NOTHING, Html, number_or_none, section, short, table, tag
from trainer.report.plots import Line, diagonal
from trainer.settings.units import number, percent

SHOWN_HEADS = 12


def reliability_section(run: RunFiles) -> Html:
    record = run.summary.get("calibration")
    heads = record.get("heads") if isinstance(record, Mapping) else None
    known = {str(name): head for name, head in heads.items() if isinstance(head, Mapping)} if isinstance(heads, Mapping) else {}
    shown = dict(list(known.items())[:SHOWN_HEADS])
    figures = [_figure(name if len(known) > 1 else "", head, f"r{index}") for index, (name, head) in enumerate(shown.items())]
    if not shown:
        return NOTHING
    rows = [
        (
            short(name, 120),
            _share(head, "ece"),
            _share(head, "calibrated_ece"),
            _share(head, "adaptive_ece"),
            _share(head, "calibrated_adaptive_ece"),
            number(number_or_none(head.get("temperature"))),
            tag("span", _where(head, run.info.unit), class_="nobreak"),
        )
        for name, head in shown.items()
    ]
    columns = ("", "error", "calibrated", "adaptive error", "calibrated", "temperature", "fitted on")
    rest = len(known) - len(shown)
    more = tag("p", f"and {number(rest)} more in summary.json", class_="soft") if rest > 0 else NOTHING
    about = tag("p", _EXPLAINED, class_="soft")
    return section("Confidence", tag("div", *figures, class_="figures"), table(columns, rows, numeric=(1, 2, 3, 4, 5)), more, about)


_EXPLAINED = (
    "Of the answers that are 80 % sure, 80 % should be right: then the points lie on the dashed line. The error is how far they are from "
    "it on average (expected calibration error, 15 bins of equal width; adaptive: of equally many samples). Calibrated: with the outputs "
    "divided by the temperature, as predict does, which changes no answer. Confidences elsewhere on this page are not calibrated."
)


def _figure(name: str, head: Mapping[str, Any], ident: str) -> Html:
    title = f"How often the answer is right{f': {short(name, 80)}' if name else ''}, %"
    lines = [_line("not calibrated", head.get("bins")), _line("calibrated", head.get("calibrated_bins"))]
    drawing = diagonal([line for line in lines if len(line[1])], x="confidence, %", ident=ident)
    return tag("figure", tag("figcaption", title), drawing, style="max-width:36rem")


def _line(label: str, bins: object) -> Line:
    points = [
        (100 * sure, 100 * right)
        for each in (bins if isinstance(bins, Sequence) and not isinstance(bins, str) else ())
        if isinstance(each, Mapping)
        and (sure := number_or_none(each.get("confidence"))) is not None
        and (right := number_or_none(each.get("right"))) is not None
    ]
    both = np.array(points, dtype=np.float64).reshape(-1, 2)
    return label, both[:, 0], both[:, 1], "o-"


def _share(head: Mapping[str, Any], key: str) -> str:
    value = number_or_none(head.get(key))
    return "?" if value is None else percent(value, 2)


def _where(head: Mapping[str, Any], unit: str) -> str:
    fitted = f"{short(head.get('fitted_on', '?'), 40)}, {number(head.get('fitted_count'))} {unit}"
    return f"{fitted}, cross-fitted" if head.get("cross_fitted") else fitted
