"""`python -m trainer.evaluate RUN`: how good a finished run's model is, on the run's own data or on other data with the same classes.

Every sample is counted once, by the code that evaluates during training (`trainer.rank.evaluation`, `trainer.tasks`), in the same batches
and precision: on the run's own test split the result is the one in its summary.json. Single images are `trainer.predict`'s.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataio.batch import Targets
from dataio.config import DataConfig
from dataio.convert import Progress, open_prepared
from dataio.loader import Loader
from dataio.manifest import Manifest
from dataio.order import Order
from dataio.quarantine import BadSample, Quarantine
from dataio.schema import LABEL, Target
from trainer.models.export import load_export
from trainer.rank.evaluation import evaluate_share, share_of
from trainer.rank.worker import make_repeatable
from trainer.runs.folder import RunFolder, find_run
from trainer.settings.cli import fail
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.settings.units import number, percent
from trainer.tasks.make import make_task
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import About, named, rows_to_keep
from trainer.tasks.task import Result

PROG = "python -m trainer.evaluate"
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What is evaluated; whatever is not given is as it was in the run."""

    path: str = ""
    """Another data set with the same classes: a converted folder, or any source that dataio.convert takes. Empty takes the run's own."""
    root: str = ""
    """Folder for downloads and for sources that had to be converted."""
    fit: Literal["run", "refuse", "stretch", "crop"] = "run"
    """What is done with images of another size than the model was trained on."""
    test_fraction: float | None = None
    """Fraction held out for testing, by a hash of the key, where the source has no test split."""
    max_bad_fraction: float | None = None
    """Unreadable fraction of the samples above which there is no result."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate the model of a finished run."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    data: DataArguments = field(default_factory=DataArguments)
    split: Literal["test", "train"] = "test"
    """Part of the data set that is evaluated; train too is taken as it is, without augmentation."""
    predictions: str = ""
    """A file for the answer to each image: predictions.parquet, as the run writes it for its own test split."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """One JSON object instead of tables."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An evaluation and what it was of."""

    run: str
    data: str
    split: str
    dataset_fingerprint: str
    device: str
    precision: str
    classes: tuple[str, ...]
    result: Result
    quarantined: tuple[BadSample, ...]
    """Samples that could not be read; they are not counted."""
    recorded_accuracy: float | None
    """What summary.json says of the same split of the same data; None where it says nothing of it."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        about = ("run", "data", "split", "dataset_fingerprint", "device", "precision", "recorded_accuracy", "seconds")
        return {
            **{name: getattr(self, name) for name in about},
            "loss": self.result.loss,
            **self.result.measures,
            "count": self.result.count,
            **self.result.details,
            "classes": list(self.classes),
            "quarantined": [asdict(bad) for bad in self.quarantined],
        }


def main(argv: Sequence[str]) -> int:
    """0 with a result on stdout, 2 (SystemExit) where there cannot be one."""
    arguments = tyro.cli(Arguments, prog=PROG, args=argv)
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU here; use --device cpu or auto")
        device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
        folder = find_run(arguments.run, arguments.storage)
        report = evaluate_run(folder, arguments.data, split=arguments.split, device=device, predictions=arguments.predictions)
    except (ValueError, OSError) as error:
        fail(str(error))
    if arguments.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        show(report, Console() if sys.stdout.isatty() else Console(width=120, highlight=False))
    return 0


def evaluate_run(folder: RunFolder, changes: DataArguments, *, split: str, device: torch.device, predictions: str = "") -> Report:
    """Load the run's model and evaluate it. ValueError where model, data and run do not go together. `predictions` is a file for the
    answer to each sample; its labels are the model's outputs, whatever the order of the data set's classes."""
    begin = time.perf_counter()
    config, summary = _config(folder), _summary(folder)
    exported = load_export(folder, device, channels_last=config.train.channels_last == "on")
    data = _changed(config.data, changes)
    _, dataset = open_prepared(data, on_progress=_progress(data.path))
    manifest = dataset.manifest
    to_class = class_mapping(exported.classes, manifest.classes, where=data.path)
    if split not in manifest.splits or not manifest.splits[split].count:
        there = [name for name, info in manifest.splits.items() if info.count]
        raise ValueError(f"--split {split}, but {data.path} has only {', '.join(there)}; use --split {there[0] if there else 'test'}")
    data = _sized(data, manifest, exported.image_size)

    threads = config.cluster.threads_per_worker or summary.get("threads_per_worker") or torch.get_num_threads()
    make_repeatable(threads)
    count = manifest.splits[split].count
    quarantine = Quarantine(data.max_bad_fraction, count)
    # An order is training's; nothing is trained here.
    order = Order(seed=0, fingerprint=manifest.fingerprint, count=manifest.splits["train"].count, batch_size=1, virtual_ranks=1)
    loader = Loader(
        dataset,
        data,
        order=order,
        virtual_ranks=range(1),
        device=device,
        seed=0,
        threads=threads,
        on_bad=lambda bad: _add(quarantine, bad),
    )
    task = make_task(TaskConfig(), (Target(name=LABEL, kind="label", classes=exported.classes),))
    evaluation = task.evaluation(device)
    answers = PredictionLog(task.columns, rows_to_keep(task.columns), device) if predictions else None
    # In the shares that the run's ranks had: a sample's logits may depend, in their last bits, on the batch that it is in.
    ranks = int(summary.get("workers") or 1)
    for rank in range(ranks):
        evaluate_share(
            task,
            evaluation,
            exported.model,
            exported.preprocess,
            loader,
            split=split,
            share=share_of(count, rank, ranks),
            precision=config.train.precision,
            as_learned=Relabelled(to_class, device) if to_class != list(range(len(to_class))) else lambda targets: targets,
            log=answers,
        )
    result = evaluation.result()
    if answers is not None and (found := answers.gathered(0, 1)) is not None:
        about = About(step=int(summary.get("steps") or 0), split=split, dataset_fingerprint=manifest.fingerprint, count=result.count)
        Path(predictions).write_bytes(named(found, dataset.split(split), about).to_parquet())
    is_runs_own = split == "test" and summary.get("dataset_fingerprint") == manifest.fingerprint
    return Report(
        run=folder.name,
        data=data.path,
        split=split,
        dataset_fingerprint=manifest.fingerprint,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        precision=config.train.precision,
        classes=exported.classes,
        result=result,
        quarantined=quarantine.records,
        recorded_accuracy=summary.get("test_accuracy") if is_runs_own else None,
        seconds=time.perf_counter() - begin,
    )


class Relabelled:
    """A data set's labels as the model's outputs."""

    def __init__(self, to_class: Sequence[int], device: torch.device) -> None:
        self._to_class = torch.tensor(to_class, device=device)

    def __call__(self, targets: Targets) -> Targets:
        labels = targets[LABEL]
        return {LABEL: torch.where(labels < 0, labels, self._to_class[labels.clamp(min=0)])}  # a bad sample's -1 stays


def class_mapping(model: Sequence[str], data: Sequence[str], *, where: str) -> list[int]:
    """For each class of the data set the model's output of the same name; the order may differ, the names may not (ValueError)."""
    unknown, missing = [name for name in data if name not in model], [name for name in model if name not in data]
    if unknown or missing:
        parts = [
            *([f"the model does not know {_some(unknown)}"] if unknown else []),
            *([f"the data set lacks {_some(missing)}"] if missing else []),
        ]
        raise ValueError(
            f"the classes of {where} are not the model's: {'; '.join(parts)}. The names must be the same: "
            "rename the folders or convert the data with `python -m dataio.convert --classes ...`, or give a data set of these classes"
        )
    return [list(model).index(name) for name in data]


def show(report: Report, console: Console) -> None:
    """Tables for people."""
    result, accuracy = report.result, report.result.measures["accuracy"]
    console.print(Text(f"{report.run} on the {report.split} split of {report.data}", style="bold"), soft_wrap=True)
    recorded = report.recorded_accuracy
    note = ""
    if recorded is not None:
        note = " (as in summary.json)" if recorded == accuracy else f" (summary.json: {percent(recorded, 2)})"
    console.print(f"accuracy {percent(accuracy, 2)}{note}")
    console.print(f"loss     {result.loss:.4f}")
    console.print(f"images   {number(result.count)}, {report.precision} on {report.device}, {report.seconds:.1f} s")
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("images", "recall", "precision", "f1"):
        table.add_column(name, justify="right")
    table.add_column("most often taken for")
    for index, (name, score) in enumerate(zip(report.classes, result.details["per_class"], strict=True)):
        ratios = (percent(value) for value in (score["recall"], score["precision"], score["f1"]))
        table.add_row(Text(name), number(score["support"]), *ratios, Text(_confused_with(report, index)))
    console.print(table)
    if report.quarantined:
        shown = "".join(f"\n  {bad.key}: {bad.reason}" for bad in report.quarantined[:_SHOWN])
        more = f"\n  and {len(report.quarantined) - _SHOWN} more" if len(report.quarantined) > _SHOWN else ""
        console.print(Text(f"{len(report.quarantined)} image(s) could not be read and are not counted:{shown}{more}"), soft_wrap=True)


def _confused_with(report: Report, index: int) -> str:
    wrong = {other: count for other, count in enumerate(report.result.details["confusion"][index]) if other != index and count}
    if not wrong:
        return ""
    other = max(wrong, key=lambda other: wrong[other])
    return f"{report.classes[other]} ({wrong[other]})"


def _config(folder: RunFolder) -> RunConfig:
    text = folder.read("config.toml")
    if text is None:
        raise ValueError(f"{folder.location} has no config.toml, which says how the model was trained; give the folder that the run wrote")
    return from_toml(text.decode(), origin=f"{folder.location}/config.toml")


def _summary(folder: RunFolder) -> Mapping[str, Any]:
    text = folder.read("summary.json")
    return dict(json.loads(text)) if text is not None else {}


def _changed(data: DataConfig, changes: DataArguments) -> DataConfig:
    given: dict[str, Any] = {name: value for name, value in asdict(changes).items() if value not in ("", None, "run")}
    return replace(data, **given)


def _sized(data: DataConfig, manifest: Manifest, wanted: tuple[int, int]) -> DataConfig:
    """`data` with the size that the model was trained on. ValueError where no image has it and none may be resized."""
    height, width = wanted
    if set(manifest.image_sizes) == {f"{height}x{width}"}:
        return data
    seen = ", ".join(sorted(manifest.image_sizes, key=lambda size: -manifest.image_sizes[size])[:3])
    if height != width:
        raise ValueError(
            f"the model was trained on images of {height}x{width} (HxW), those of {data.path} have other sizes ({seen}) and are resized to "
            f"squares only; resize them to {height}x{width} before"
        )
    if data.fit == "refuse" and f"{height}x{width}" not in manifest.image_sizes:
        raise ValueError(
            f"the model was trained on images of {height}x{width} (HxW), those of {data.path} have other sizes ({seen}), which "
            "data.fit=refuse refuses; add --data.fit crop or --data.fit stretch to have them resized"
        )
    return replace(data, image_size=height)


def _add(quarantine: Quarantine, bad: BadSample) -> None:
    quarantine.add(bad.key, bad.reason, bad.split, bad.sample_id)


def _progress(path: str) -> Callable[[Progress], None]:
    """A line on stderr every few seconds: a source that was never converted takes a while."""
    shown = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"converting {path}: {progress.describe()}", file=sys.stderr)

    return say


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


if __name__ == "__main__":
    # Before anything creates a CUDA context: cuBLAS reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main(sys.argv[1:]))
