"""A run that validation ended early, as its folder is read: by the list of runs, the final table and the report."""

import html
import io
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.trainer.report_runs import BEGAN, at, story, write_pictured
from trainer.report.files import evaluations, read_files
from trainer.report.sections import render
from trainer.runs.__main__ import table
from trainer.runs.choice import Rule, choose, selection_of
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.progress import final_table
from trainer.runs.status import look
from trainer.tasks.info import CLASSIFICATION

RULE = Rule(measure=CLASSIFICATION.headline, patience=2)
ENTRIES: list[dict[str, Any]] = [
    {"step": 40 * epoch, "epoch": float(epoch), "validation_accuracy": accuracy, "validation_loss": 1 - accuracy, "validation_count": 200}
    for epoch, accuracy in enumerate((0.5, 0.79, 0.75, 0.77), start=1)
]
KEPT = (
    "epoch 2 of 4, the best by validation accuracy: 79.00 % (95 % interval: 72.8 to 84.1 %); the last epoch's 77.00 % is within noise of it"
)


def write_early(folder: Path, *, is_running: bool = False) -> RunFolder:
    best = choose(RULE, ENTRIES).best
    assert best is not None
    events = [event for event in story() if event["event"] != "evaluation"]
    end = max(event["time"] for event in events) - BEGAN
    told = [at(end - 20 + n, "evaluation", split="validation", **entry) for n, entry in enumerate(ENTRIES)]
    tested = at(end - 1, "evaluation", split="test", step=80, epoch=2.0, test_accuracy=0.78, test_loss=0.3)
    events = [*events[:-1], *told, *([] if is_running else [tested, events[-1]])]
    write_pictured(
        folder,
        events=events,
        selection=selection_of(RULE, ENTRIES, kept=best, is_early=True),
        stopped_early=True,
        validation_accuracy=0.79,
    )
    if is_running:
        (folder / "summary.json").unlink()
    else:
        os.utime(folder / "summary.json", (BEGAN + end, BEGAN + end))
    return find_run(str(folder))


def test_the_final_table_and_the_report_say_which_epoch_was_kept_and_why_there_were_no_more(tmp_path: Path) -> None:
    folder = write_early(tmp_path / "early")
    console = Console(file=io.StringIO(), width=240)
    console.print(final_table(json.loads((tmp_path / "early" / "summary.json").read_text())))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert KEPT in shown
    assert "after epoch 4: 2 evaluations without a better one (train.patience)" in shown
    run = read_files(folder)
    page = html.unescape(render(run))
    assert KEPT in page
    assert "It ended early, after epoch 4" in page
    assert ">validation<" in page, "its curve has a name"
    # The kept epoch was evaluated on both splits, and neither hides the other.
    assert [event["split"] for event in evaluations(run.events) if event["step"] == 80] == ["validation", "test"]


def test_the_list_of_runs_says_that_it_ended_early(tmp_path: Path) -> None:
    found = look(write_early(tmp_path / "early"), is_live=False)
    assert found is not None
    assert (found.status, found.note) == ("finished", "ended early after epoch 4: 2 evaluations without a better one (train.patience)")


def test_a_run_that_goes_on_is_listed_by_its_validation_split_and_not_as_tested(tmp_path: Path) -> None:
    found = look(write_early(tmp_path / "running", is_running=True), is_live=False, clock=lambda: BEGAN + 40_100.0)
    assert found is not None
    assert (found.status, found.headline, found.headline_split) == ("running", 0.77, "validation")
    assert found.to_json()["test_accuracy"] is None
    assert "77.0 % val" in "\n".join(map(str, table([found], width=None, now=BEGAN)))
