"""The command line `finetune export RUN --to FORMAT` (`python -m trainer.formats`): a finished run's model for other programs.

What is made is first asked about every sample of the run's test set, and compared with the model itself. Only what agrees is written,
with a manifest that says what was compared.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Annotated

import torch
import tyro
from torch import Tensor

from cluster.storage import Storage, open_storage
from trainer.drive.guarded import guarded
from trainer.export.model_folder import outputs_of
from trainer.formats import quantise
from trainer.formats.check import Compared, compare, points_lost
from trainer.formats.library import make_weights
from trainer.formats.made import FORMATS, Format, Made
from trainer.formats.manifest import MANIFEST_FILE, card_of, in_words, manifest_of, write
from trainer.formats.onnx_graph import make_onnx, require_onnx
from trainer.formats.program import make_program
from trainer.rank.finished import Opened, open_finished
from trainer.runs.folder import RunFolder, find_run
from trainer.runs.model_files import described, model_of, model_sha256, takes_texts
from trainer.settings.programs import program
from trainer.settings.say import complain, say, say_json
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.units import percent, size

EXPORTS = "exports"
INT8 = "onnx-int8"


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The data to compare on. Settings that are not given keep the run's values."""

    path: str = ""
    """Another place of the run's data, if they have moved."""
    root: str = ""
    """Folder for downloads and for sources that had to be converted."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a finished run's model for other programs, and prove that it is still the same model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    to: tuple[Format, ...] = ("onnx",)
    """onnx: a graph for ONNX Runtime. torch: a program for PyTorch alone. safetensors: weights for timm or torchvision, of images alone."""
    int8: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also an ONNX graph with int8 weights and activations, of little more than a quarter of the size."""
    preprocessing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Resize and normalise inside the graph, which then takes decoded images as uint8 (onnx and torch)."""
    out: str = ""
    """Folder or URI to write to, a folder for each format. Empty: `exports` in the run's folder."""
    max_difference: float = 1e-4
    """Refuse a format whose outputs differ from the model's by more than this part of the largest output. int8 has --max-drop instead."""
    max_drop: float = 1.0
    """Refuse an int8 model that loses more than so many points of the headline measure; of one that is no ratio, so many per cent of it."""
    calibration: str = ""
    """Folder with images from which int8 takes its scales. Empty: images of the run's training split."""
    calibration_images: int = quantise.IMAGES
    """How many of them."""
    data: DataArguments = field(default_factory=DataArguments)
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the manifests as JSON, a line each."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A format to make: the name of its folder, and how."""

    name: str
    make: Callable[[], Made]
    is_exact: bool


def main(argv: Sequence[str]) -> int:
    """0 if all formats were written; 1 if one was refused or cannot be written, 128 + signal if one stopped it. Exits with 2 (SystemExit)
    for wrong arguments or a run whose model cannot be exported."""
    arguments = tyro.cli(Arguments, prog=program("export"), args=argv)
    # An interrupt is an exception, so that no temporary folder stays.
    return guarded(lambda _: _carry_out(arguments), stopped=f"stopped; a format has its {MANIFEST_FILE}, or it is not whole")


def _carry_out(arguments: Arguments) -> int:
    _check_arguments(arguments)
    run = find_run(arguments.run, arguments.storage)
    if takes_texts(described(model_of(run))):  # which says first what is missing of an unfinished run
        _check_for_texts(arguments)
    storage, base = _place(run, arguments.out)
    changes = {name: value for name, value in asdict(arguments.data).items() if value}
    opened = open_finished(run, changes, split="auto", device=torch.device("cpu"), may_be_of_texts=True)
    refused = 0
    for job in _jobs(arguments, run, opened):
        refused += not _export(job, arguments, run, opened, storage, f"{base}/{job.name}")
    return 1 if refused else 0


def _check_arguments(arguments: Arguments) -> None:
    """ValueError for what cannot be done, before anything is loaded."""
    if not arguments.to:
        raise ValueError(f"--to names no format; give one or more of {', '.join(FORMATS)}")
    if arguments.int8 and "onnx" not in arguments.to:
        raise ValueError(f"--int8 is a kind of ONNX, and --to says {', '.join(arguments.to)}; add onnx, or leave --int8 out")
    for name, value in (("max-difference", arguments.max_difference), ("max-drop", arguments.max_drop)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name} {value} is a limit; give a number of 0 or more")
    if arguments.calibration_images < 1:
        raise ValueError(f"--calibration-images {arguments.calibration_images}: scales come from images; use 1 or more")
    if arguments.calibration and not arguments.int8:
        raise ValueError(f"--calibration {arguments.calibration} is for --int8, which is not asked for; add it")
    if "onnx" in arguments.to:
        require_onnx()


def _check_for_texts(arguments: Arguments) -> None:
    """ValueError for what is of images."""
    if arguments.preprocessing:
        raise ValueError(
            f"--preprocessing is of images: no graph holds a tokenizer, and {arguments.run} is a model of texts; leave it out, and use the "
            "tokenizer.json beside the graph"
        )
    if arguments.calibration or arguments.calibration_images != quantise.IMAGES:
        raise ValueError(
            f"--calibration is of images: in int8 a model of texts, such as {arguments.run}, measures its activations as they come; "
            "leave it out"
        )


def _place(run: RunFolder, out: str) -> tuple[Storage, str]:
    """The storage to write to, and the folder in it."""
    if not out:
        return run.storage, f"{run.name}/{EXPORTS}"
    return open_storage(out), ""


def _jobs(arguments: Arguments, run: RunFolder, opened: Opened) -> Iterator[_Job]:
    inside, exported = arguments.preprocessing, opened.exported
    for each in dict.fromkeys(arguments.to):
        match each:
            case "onnx":
                graph = cache(partial(make_onnx, exported, is_prepared_inside=inside, threads=opened.threads))  # int8 is made of it too
                yield _Job(name="onnx", make=graph, is_exact=True)
                if arguments.int8:
                    yield _Job(name=INT8, make=partial(_quantised, graph, arguments, opened), is_exact=False)
            case "torch":
                yield _Job(name="torch", make=partial(make_program, exported, is_prepared_inside=inside), is_exact=True)
            case "safetensors":
                config = ModelConfig(**described(model_of(run))["model"])
                yield _Job(name="safetensors", make=partial(make_weights, exported, config), is_exact=True)


def _quantised(graph: Callable[[], Made], arguments: Arguments, opened: Opened) -> Made:
    if opened.exported.texts is not None:
        return quantise.quantised_as_it_goes(graph(), opened.exported, threads=opened.threads)
    images = list(_calibration(arguments, opened))
    inside = arguments.preprocessing
    return quantise.quantised(graph(), opened.exported, images, is_prepared_inside=inside, threads=opened.threads)


def _calibration(arguments: Arguments, opened: Opened) -> Iterator[Tensor]:
    """Batches of (n, 3, H, W) uint8 to calibrate by. One that cannot be read is black."""
    if arguments.calibration:
        yield from quantise.images_of_folder(opened.exported, arguments.calibration, arguments.calibration_images)
        return
    ids = quantise.places(opened.dataset.manifest.splits["train"].count, arguments.calibration_images)
    for batch in opened.loader.evaluate("train", ids, batch_size=quantise.BATCH):
        yield batch.samples


def _export(job: _Job, arguments: Arguments, run: RunFolder, opened: Opened, storage: Storage, folder: str) -> bool:
    """Make, compare and write a format. Returns whether it was written."""
    made = job.make()
    compared = compare(opened, made.ask)
    headline = opened.exported.task.info.headline
    if why := refusal(job, compared, arguments, opened):
        complain(f"{job.name}: refused, nothing was written: {why}")
        return False
    description = described(model_of(run))
    manifest = manifest_of(
        made,
        compared,
        opened.exported,
        description,
        run=run.name,
        model_sha256=model_sha256(description),
        outputs=outputs_of(opened.exported.task),
    )
    where = write(storage, folder.lstrip("/"), made, manifest, card_of(made, compared, opened.exported, run=run.name))
    if arguments.json:
        say_json({"folder": where, **manifest})
        return True
    say(f"{where}: {made.main}, {size(sum(len(data) for data in made.files.values()))}")
    for line in in_words(compared, headline):
        say(f"  {line}")
    return True


def refusal(job: _Job, compared: Compared, arguments: Arguments, opened: Opened) -> str:
    """Why what was made is not the model any more; "" if it is."""
    headline = opened.exported.task.info.headline
    if job.is_exact:
        if compared.largest_difference <= arguments.max_difference:
            return ""
        return (
            f"outputs differ by {compared.largest_difference:.2g} of the largest output"
            + ("" if compared.changed is None else f", and {compared.changed} of {compared.samples} answers with them")
            + f"; --max-difference allows {arguments.max_difference:g}"
        )
    own, theirs = compared.own.measures[headline.name], compared.result.measures[headline.name]
    points, is_ratio = points_lost(own, theirs, headline), headline.unit == "ratio"
    if points <= arguments.max_drop:
        return ""
    interval = "" if compared.drop is None else " (95 % interval {:.1f} to {:.1f})".format(*(100 * each for each in compared.drop))
    what = (
        f"{percent(own, 2)} to {percent(theirs, 2)}, by {points:.2f} points"
        if is_ratio
        else f"{own:.4g} to {theirs:.4g}, by {points:.2f} %"
    )
    lost = f"{headline.in_words} goes from {what}{interval}; --max-drop allows {arguments.max_drop:g}"
    if opened.exported.texts is not None:
        return f"{lost}; use the graph in float32"
    return (
        f"{lost}. Calibrate by images like those of the data (--calibration), or by more of them (--calibration-images), or train the "
        f"model with this rounding: {program('compress')} {arguments.run} --int8"
    )


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    leaving.by(lambda: main(sys.argv[1:]))
