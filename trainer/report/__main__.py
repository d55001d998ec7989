"""`python -m trainer.report`: the page of a run, or of two runs compared. Only the command line; sections and compare make the pages."""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trainer.report.compare import render_comparison
from trainer.report.files import read_files
from trainer.report.sections import Report, make_report
from trainer.runs.folder import find_run
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import complain, say
from trainer.settings.tree import RunConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write report.html into a run's folder, or compare two runs on one page."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The run's folder (path or URI), or its name under --storage."""
    compare: Annotated[tuple[str, str] | tuple[()], tyro.conf.arg(metavar="RUN RUN")] = ()
    """Two runs, each as RUN: what differs in settings, curves and results, and whether it is more than chance."""
    out: str = ""
    """With --compare: the page's file; by default compare-RUN-RUN.html in this folder."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, prog=program("report"), args=argv)
    try:
        if arguments.compare:
            written = _compare(arguments)
        else:
            if arguments.out:
                raise ValueError(f"--out {arguments.out} goes with --compare; the report of one run is in its own folder")
            written = _tell(make_report(find_run(arguments.run, arguments.storage)))
    except (ValueError, OSError) as error:
        fail(str(error))
    say(written)
    return 0


def _tell(report: Report) -> str:
    for problem in report.problems:
        complain(f"warning: not shown: {problem}")
    return report.location


def _compare(arguments: Arguments) -> str:
    if arguments.run:
        raise ValueError(f"--compare takes two runs; {arguments.run} is one more")
    first, second = (find_run(run, arguments.storage) for run in arguments.compare)
    out = Path(arguments.out or f"compare-{first.name}-{second.name}.html")
    html = render_comparison(read_files(first, pictures=False), read_files(second, pictures=False))
    out.write_bytes(html.encode(errors="replace"))
    return str(out)


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
