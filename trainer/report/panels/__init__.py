"""What the report shows of a task: panels, by the names that a TaskInfo lists. A panel makes its part of the page from a run's files, or
nothing if they hold nothing for it. It knows the form of an evaluation's `Result.details`, never the task itself. Called by sections.
"""

from collections.abc import Callable, Mapping

from trainer.report.files import RunFiles
from trainer.report.page import Html, section, short, tag
from trainer.report.panels import classes, confusion, examples, heads, labels, measures, numbers

Panel = Callable[[RunFiles], Html]

PANELS: Mapping[str, Panel] = {
    "confusion": confusion.panel,
    "examples": examples.panel,
    "classes": classes.panel,
    "labels": labels.panel,
    "heads": heads.panel,
    "numbers": numbers.panel,
    "measures": measures.panel,
}


def panels_of(run: RunFiles) -> tuple[list[Html], list[str]]:
    """The panels that the run's task names, in its order, with a note on each that is unknown or failed; and the notes. Never raises,
    because an error would cost the rest of the page. If none of a task's panels exists, the table of its measures is shown."""
    unknown = [name for name in run.info.panels if name not in PANELS]
    notes = [f"The task names the panel {short(name, 80)}, which this report does not have." for name in unknown]
    made = []
    for name in [name for name in run.info.panels if name in PANELS] or ["measures"]:
        try:
            made.append(PANELS[name](run))
        except Exception as error:  # anyone may have written the summary
            notes.append(f"The panel {name} could not be made of what the evaluation wrote: {short(error, 200)}.")
    if notes:
        made.append(section("Not shown", tag("ul", *(tag("li", note) for note in notes), class_="notes")))
    return made, notes
