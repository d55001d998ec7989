"""Panel `measures`: a table of everything that the evaluation measured. Also shown for a task that names no panel of this report."""

from collections.abc import Mapping
from typing import Any

from trainer.report.files import RunFiles
from trainer.report.page import NOTHING, Html, meter, section, table
from trainer.runs.measures import measured, shown
from trainer.tasks.info import TaskInfo


def panel(run: RunFiles) -> Html:
    told = measures_table(run.info, run.summary)
    return section("Measures", told) if told else NOTHING


def measures_table(info: TaskInfo, summary: Mapping[str, Any]) -> Html:
    rows = []
    for measure, value in measured(info, summary):
        text = shown(measure.unit, value, 2)
        rows.append(
            (measure.title, meter(value, text) if measure.unit == "ratio" else text, "" if measure.higher_is_better else "less is better")
        )
    return table(("measure", "test", ""), rows, numeric=(1,)) if rows else NOTHING
