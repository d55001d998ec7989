"""The command line `python -m trainer.evaluate RUN`: evaluates a finished run's model, on its own data or on other data with the same
classes.

On the run's own test split the result equals the one in its summary.json. trainer.rank.finished does the evaluation; this file parses the
arguments and prints the result. For single images use `trainer.predict`.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.text import shown
from trainer.rank.finished import Evaluated, evaluate_finished
from trainer.runs.certainty import NOT_MEASURED, given_of, interval_words, measured_scores
from trainer.runs.folder import find_run
from trainer.runs.measures import one_of
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import Terminal, say_json
from trainer.settings.tree import RunConfig
from trainer.settings.units import number, percent
from trainer.tasks.info import Measure

_SHOWN = 8
_LONGEST_LINE = 2000


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The data to evaluate. Settings that are not given keep the run's values."""

    path: str = ""
    """Another data set with the model's classes, or some of them: a converted folder, or any source that dataio.convert takes. Empty: the
    run's own data."""
    root: str = ""
    """Folder for downloads and for sources that had to be converted."""
    image_column: str = ""
    """Column of a table or of Parquet files that has the images; empty finds it by its usual names."""
    label_column: str = ""
    """Column that has the one label; empty finds it by its usual names."""
    text_column: str = ""
    """Column of a table, of JSON lines or of Parquet files that has the texts, or two for pairs; empty finds it by its usual names."""
    fit: Literal["run", "refuse", "stretch", "crop"] = "run"
    """How to handle images whose size differs from the one the model was trained on."""
    test_fraction: float | None = None
    """Fraction of each class held out for testing, by a hash of the key, where the source has no test split."""
    max_bad_fraction: float | None = None
    """The evaluation fails if more than this fraction of the samples is unreadable."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate the model of a finished run."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    data: DataArguments = field(default_factory=DataArguments)
    split: Literal["auto", "test", "validation", "train"] = "auto"
    """Split of the data set to evaluate. auto takes the test split; of other data without one the validation split; and all images of other
    data without splits. The train split is not augmented either."""
    predictions: str = ""
    """File to write each image's prediction to, in the format of the predictions.parquet that a run writes for its own test split."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of tables."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""


def main(argv: Sequence[str]) -> int:
    """Print the result to stdout and return 0. Exits with status 2 (SystemExit) if there can be no result."""
    arguments = tyro.cli(Arguments, prog=program("evaluate"), args=argv)
    # cuBLAS reads this once, so set it before anything creates a CUDA context.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU here; use --device cpu or auto")
        device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
        folder = find_run(arguments.run, arguments.storage)
        changes = {name: value for name, value in asdict(arguments.data).items() if value not in ("", None, "run")}
        found = evaluate_finished(folder, changes, split=arguments.split, device=device, predictions=arguments.predictions)
    except (ValueError, OSError) as error:
        fail(str(error))
    if arguments.json:
        say_json(found.to_json())
    else:
        show(found, Terminal() if sys.stdout.isatty() else Terminal(width=120, highlight=False))
    return 0


def show(found: Evaluated, console: Console) -> None:
    """Print the evaluation as tables for people."""
    what = f"all {number(found.result.count)} {found.task.info.unit} of" if found.split == "all" else f"the {found.split} split of"
    console.print(Text(f"{found.run} on {what} {found.data}", style="bold"), soft_wrap=True)
    for line in found.about_data:
        console.print(Text(shown(line, _LONGEST_LINE)), soft_wrap=True)
    lines = list(_lines(found))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(Text(f"{name:<{width}} {text}"), soft_wrap=True)
    details = found.result.details
    unit = found.task.info.unit
    classes = found.task.targets[0].classes
    for table in _tables(details, classes, unit):
        console.print(table)
    for name, head in details.get("heads", {}).items():
        for table in _tables(head["details"], head["details"].get("classes", ()), unit):
            console.print(Text(f"\n{name}", style="bold"))
            console.print(table)
    if found.quarantined:
        listed = "".join(f"\n  {shown(bad.key)}: {shown(bad.reason)}" for bad in found.quarantined[:_SHOWN])
        more = f"\n  and {len(found.quarantined) - _SHOWN} more" if len(found.quarantined) > _SHOWN else ""
        told = f"{len(found.quarantined)} {one_of(unit)}(s) could not be read and are not counted:{listed}{more}"
        console.print(Text(told), soft_wrap=True)


def _lines(found: Evaluated) -> Iterator[tuple[str, str]]:
    result, info = found.result, found.task.info
    for measure in info.measures:
        value = result.measures[measure.name]
        note = ""
        if measure == info.headline and found.recorded is not None:
            note = " (as in summary.json)" if found.recorded == value else f" (summary.json: {_measured(measure, found.recorded)})"
        interval = interval_words({measure.key: value, "test_count": result.count, **result.details}, measure)
        yield measure.in_words, _measured(measure, value) + note + (f", 95 % interval: {interval}" if interval else "")
    yield "loss", f"{result.loss:.4f}"
    heads = found.calibration["heads"] if found.calibration else {}
    for name, head in heads.items():
        yield f"calibration error{f' of {shown(name)}' if len(heads) > 1 else ''}", _calibration(head, found.split)
    yield info.unit, f"{number(result.count)}, {found.precision} on {found.device}, {found.seconds:.1f} s"


def _calibration(head: Mapping[str, Any], split: str) -> str:
    without = percent(head["ece"], 2)
    if not head["fitted_on"]:
        return f"{without}; this model has no temperature that calibrates it"
    where = "cross-fitted on these samples" if head["cross_fitted"] else f"fitted on the {head['fitted_on']} split"
    own = ", which these are" if not head["cross_fitted"] and head["fitted_on"] == split else ""
    return f"{without}, {percent(head['calibrated_ece'], 2)} at the temperature {head['temperature']:.4g} ({where}{own})"


def _measured(measure: Measure, value: float) -> str:
    if math.isnan(value):
        return "?"
    return percent(value, 2) if measure.unit == "ratio" else f"{value:.4g}"


def _tables(details: Mapping[str, Any], classes: Sequence[str], unit: str) -> Iterator[Table]:
    """One table for each kind of `details` known here: per class, per label, per head."""
    if "per_class" in details:
        yield _class_table(details, classes, unit)
    if "labels" in details:
        yield _label_table(details["labels"], unit)
    if "heads" in details:
        yield _head_table(details["heads"], unit)


def _class_table(details: Mapping[str, Any], classes: Sequence[str], unit: str) -> Table:
    table = _table("class", (unit, "recall", "precision", "f1"))
    table.add_column("most often taken for")
    given = given_of(details["confusion"], len(classes))
    for index, (name, score) in enumerate(zip(classes, details["per_class"], strict=True)):
        measured = measured_scores(score, given[index] if given else None)
        ratios = (NOT_MEASURED if (value := measured[key]) is None else percent(value) for key in ("recall", "precision", "f1"))
        table.add_row(Text(name), number(score["support"]), *ratios, Text(_confused_with(details["confusion"], classes, index)))
    return table


def _label_table(labels: Sequence[Mapping[str, Any]], unit: str) -> Table:
    table = _table("label", (unit, "given", "average precision", "recall", "precision", "f1"))
    for label in labels:
        ratios = (NOT_MEASURED if label[key] is None else percent(label[key]) for key in ("average_precision", "recall", "precision", "f1"))
        table.add_row(Text(label["name"]), number(label["support"]), number(label["predicted"]), *ratios)
    return table


def _head_table(heads: Mapping[str, Mapping[str, Any]], unit: str) -> Table:
    table = _table("target", ("kind", unit, "weight", "loss"))
    for name, head in heads.items():
        loss = NOT_MEASURED if head["loss"] is None else f"{head['loss']:.4f}"
        table.add_row(Text(name), head["kind"], number(head["count"]), f"{head['weight']:.4g}", loss)
    return table


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _confused_with(confusion: Sequence[Sequence[int]], classes: Sequence[str], index: int) -> str:
    wrong = {other: count for other, count in enumerate(confusion[index]) if other != index and count}
    if not wrong:
        return ""
    other = max(wrong, key=lambda other: wrong[other])
    return f"{classes[other]} ({wrong[other]})"


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
