"""What the report shows of a task: panels by the names that a TaskInfo lists. A panel makes its part of the page from a run's files, and
nothing where they hold nothing for it; it knows what an evaluation wrote (`Result.details`), never the task itself.
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


def panels_of(run: RunFiles) -> list[Html]:
    """Those that the run's task names, in its order, and a note on each that is not there or not possible; never an error, which would cost
    the rest of the page. A task none of whose panels is there has the table of its measures."""
    unknown = [name for name in run.info.panels if name not in PANELS]
    notes = [f"The task names the panel {short(name, 80)}, which this report does not have." for name in unknown]
    made = []
    for name in [name for name in run.info.panels if name in PANELS] or ["measures"]:
        try:
            made.append(PANELS[name](run))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a summary of any author
            notes.append(f"The panel {name} could not be made of what the evaluation wrote: {short(error, 200)}.")
    if notes:
        made.append(section("Not shown", tag("ul", *(tag("li", note) for note in notes), class_="notes")))
    return made
