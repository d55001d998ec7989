"""Evaluates a finished run's model outside the run, on the run's own data or on other data with the same targets. `trainer.evaluate` calls
it and prints the result; trainer.formats opens model and data by it.

It uses the run's own evaluation (trainer.rank.evaluation), with the same batches and precision.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.machine import available_memory_bytes
from dataio.batch import Targets
from dataio.config import DataConfig
from dataio.conversion import Progress
from dataio.loader import Loader
from dataio.manifest import Manifest
from dataio.order import Order
from dataio.parquet import Dataset
from dataio.prepared import Prepared, already_prepared, prepared
from dataio.quarantine import BadSample, Quarantine
from dataio.reading import Repeats, described, warnings
from dataio.remote import is_uri
from dataio.selection import selected
from trainer.export.model_folder import Exported, TextExport, load_export
from trainer.rank.calibrating import calibration_record, measured_record
from trainer.rank.evaluation import evaluate_share, share_of
from trainer.rank.worker import make_repeatable
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import model_of
from trainer.runs.started import started_with
from trainer.settings.say import complain
from trainer.settings.tree import RunConfig
from trainer.tasks.calibration import Temperature
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.matching import match_targets
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import About, named, rows_to_keep
from trainer.tasks.score_log import ScoreLog
from trainer.tasks.task import Result, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The result of an evaluation, and what was evaluated."""

    run: str
    data: str
    about_data: tuple[str, ...]
    """What the data set holds, and what should be known of it, a line each."""
    split: str
    """`all` for data without splits, all of which were evaluated."""
    dataset_fingerprint: str
    device: str
    precision: str
    task: Task
    result: Result
    quarantined: tuple[BadSample, ...]
    """Samples that could not be read and are not counted."""
    recorded: float | None
    """The headline's value in summary.json, if that is for the same split of the same data; else None."""
    seconds: float
    calibration: Mapping[str, Any] | None = None
    """How far the confidence is from the share that comes true (trainer.tasks.calibration), by target."""

    def to_json(self) -> dict[str, Any]:
        """JSON for `--json`. For a classification it has the format from before there were other tasks; other tasks add their name."""
        about = ("run", "data", "split", "dataset_fingerprint", "device", "precision")
        info = self.task.info
        is_classification = info.name == CLASSIFICATION.name
        return {
            **{name: getattr(self, name) for name in about},
            **({} if is_classification else {"task": info.name}),
            f"recorded_{info.headline.name}": self.recorded,
            "seconds": self.seconds,
            "loss": self.result.loss,
            **self.result.measures,
            "count": self.result.count,
            **self.result.details,
            **({"calibration": self.calibration} if self.calibration else {}),
            **({"classes": list(self.task.targets[0].classes)} if is_classification else {}),
            "quarantined": [asdict(bad) for bad in self.quarantined],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A finished run's model with the data to evaluate it on, ready to read."""

    config: RunConfig
    summary: Mapping[str, Any]
    exported: Exported
    data: DataConfig
    dataset: Dataset
    split: str
    is_all: bool
    """The data have no splits, and all of them are evaluated."""
    count: int
    """Samples of the split."""
    loader: Loader
    as_learned: Callable[[Targets], Targets]
    """Converts the data set's targets to those that the model was trained on."""
    quarantine: Quarantine
    device: torch.device
    threads: int


def open_finished(
    folder: RunFolder, changes: Mapping[str, Any], *, split: str, device: torch.device, may_be_of_texts: bool = False
) -> Opened:
    """Load the run's model and open the data. ValueError if model, data and run do not fit together, or if the model takes texts and the
    caller knows images alone. The other arguments are those of `evaluate_finished`."""
    config, summary = started_with(folder), _summary(folder)
    is_channels_last = config.train.channels_last == "on"
    exported = load_export(model_of(folder), device, channels_last=is_channels_last, may_be_of_texts=may_be_of_texts)
    data = replace(config.data, **changes)
    if exported.texts is not None:  # that of the model: the folder that the run began from may be gone
        data = replace(data, tokenizer=_kept_tokenizer(exported.texts, data.root))
    if not _same_place(config.data.path, data.path):
        data = replace(data, corrections=str(changes.get("corrections", "")))  # the run's are about its own data
    found, split, is_all = _found(config.data, data, split)
    dataset, manifest = found.dataset, found.dataset.manifest
    as_learned = match_targets(exported.task.targets, manifest.targets, where=data.path, device=device)
    data = _sized(data, manifest, exported.image_size) if exported.texts is None else _tokenised(data, manifest, exported.texts)

    threads = config.cluster.threads_per_worker or summary.get("threads_per_worker") or torch.get_num_threads()
    make_repeatable(threads)
    count = manifest.splits[split].count
    quarantine = Quarantine(data.max_bad_fraction, count)
    return Opened(
        config=config,
        summary=summary,
        exported=exported,
        data=data,
        dataset=dataset,
        split=split,
        is_all=is_all,
        count=count,
        loader=_loader(dataset, data, device, threads, quarantine),
        as_learned=as_learned,
        quarantine=quarantine,
        device=device,
        threads=threads,
    )


def evaluate_finished(
    folder: RunFolder, changes: Mapping[str, Any], *, split: str, device: torch.device, predictions: str = ""
) -> Evaluated:
    """Load the run's model and evaluate it. ValueError if model, data and run do not fit together.

    `changes` are data settings that differ from the run's. `split` may be `auto`: of the run's own data the test split, of others what is
    not there to be trained on, or all of them if they have no splits. `predictions` is a file to write each sample's prediction to. Its
    labels are indices of the model's outputs, whatever the order of the data set's classes."""
    begin = time.perf_counter()
    opened = open_finished(folder, changes, split=split, device=device, may_be_of_texts=True)
    config, summary, exported, split = opened.config, opened.summary, opened.exported, opened.split
    manifest, task = opened.dataset.manifest, opened.exported.task
    evaluation = task.evaluation(device)
    log = PredictionLog(task.columns, rows_to_keep(task.columns), device) if predictions else None
    scores = ScoreLog(task, opened.count, device)
    # Use the shares that the run's ranks had: the last bits of a sample's outputs may depend on the batch that it is in.
    ranks = int(summary.get("workers") or 1)
    for rank in range(ranks):
        evaluate_share(
            task,
            evaluation,
            exported.model,
            exported.preprocess,
            opened.loader,
            split=split,
            share=share_of(opened.count, rank, ranks),
            precision=config.train.precision,
            as_learned=opened.as_learned,
            log=log,
            scores=scores,
        )
    result = evaluation.result()
    if log is not None and (rows := log.gathered(0, 1)) is not None:
        about = About(step=int(summary.get("steps") or 0), split=split, dataset_fingerprint=manifest.fingerprint, count=result.count)
        Path(predictions).write_bytes(named(rows, opened.dataset.split(split), about).to_parquet())
    is_runs_own = split == "test" and summary.get("dataset_fingerprint") == manifest.fingerprint
    return Evaluated(
        run=folder.name,
        data=opened.data.path,
        about_data=tuple(_about(config.data, opened.data, opened.dataset, split)),
        split="all" if opened.is_all else split,
        dataset_fingerprint=manifest.fingerprint,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        precision=config.train.precision,
        task=task,
        result=result,
        quarantined=opened.quarantine.records,
        recorded=summary.get(task.info.headline.key) if is_runs_own else None,
        calibration=_calibration(scores, exported.temperatures, is_fitted_here=is_runs_own),
        seconds=time.perf_counter() - begin,
    )


def _calibration(scores: ScoreLog, temperatures: Mapping[str, Temperature], *, is_fitted_here: bool) -> dict[str, Any] | None:
    """Temperatures that were fitted on these very samples are cross-fitted again, as the run did it: at their own values, the error would
    be too small."""
    found = scores.gathered(0, 1) or {}
    if is_fitted_here and temperatures and all(each.split == "test" for each in temperatures.values()):
        return calibration_record(found)
    return measured_record(found, temperatures)


def _found(own: DataConfig, data: DataConfig, split: str) -> tuple[Prepared, str, bool]:
    """The data set, the split of it to evaluate, and whether that is all that it holds. ValueError if there is no such split."""
    is_own = _same_place(own.path, data.path)
    found = prepared(data, on_progress=_progress(data.path), whole=split == "auto" and not is_own)
    if is_own:  # with the samples that the run chose, and its fold; of other data it has chosen nothing
        found = replace(found, dataset=selected(found.dataset, data))
    splits, reading = found.dataset.manifest.splits, found.dataset.reading
    if split != "auto":
        if split not in splits or not splits[split].count:
            there = [name for name, info in splits.items() if info.count]
            raise ValueError(f"--split {split}, but {data.path} has only {', '.join(there)}; use --split {there[0] if there else 'test'}")
        return found, split, False
    held_out = reading.held_out if reading is not None else {}
    if "test" in splits and (is_own or "test" not in held_out or "validation" not in splits):
        return found, "test", False
    return (found, "validation", False) if "validation" in splits else (found, "train", True)


def _about(own: DataConfig, data: DataConfig, dataset: Dataset, split: str) -> Iterator[str]:
    """What the user should know of the data: what they are, and whether the run was trained on some of them."""
    manifest, reading = dataset.manifest, dataset.reading
    yield described(manifest, reading)
    if _same_place(own.path, data.path):
        yield from warnings(manifest, reading, dataset.where)
        return
    trained = already_prepared(own)
    if trained is None or trained.manifest.fingerprint == manifest.fingerprint:
        return
    repeats = Repeats()
    for name, part in (("train", selected(trained, own).split("train")), ("evaluated", dataset.split(split))):
        for _, values, sha256 in part.content():
            repeats.add(name, values, sha256)
    if copies := len(repeats.pairs(labels=False)):
        what = f"{copies:,} of these {manifest.unit} are copies of {manifest.unit} that the run was trained on"
        yield f"{what}, so the numbers say less of new ones"


def _same_place(one: str, other: str) -> bool:
    if one == other or is_uri(one) or is_uri(other):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _loader(dataset: Dataset, data: DataConfig, device: torch.device, threads: int, quarantine: Quarantine) -> Loader:
    # The loader needs an order of training, though nothing is trained here.
    splits = dataset.manifest.splits

    def on_bad(bad: BadSample) -> None:
        quarantine.add(bad.key, bad.reason, bad.split, bad.sample_id)

    order = Order(seed=0, fingerprint=dataset.manifest.fingerprint, count=splits["train"].count, batch_size=1, virtual_ranks=1)
    return Loader(
        dataset,
        data,
        order=order,
        virtual_ranks=range(1),
        device=device,
        seed=0,
        threads=threads,
        on_bad=on_bad,
        memory_bytes=available_memory_bytes() // 2,
    )


def _summary(folder: RunFolder) -> Mapping[str, Any]:
    text = folder.read("summary.json")
    return dict(json.loads(text)) if text is not None else {}


def _kept_tokenizer(texts: TextExport, root: str) -> str:
    """A file with the model's tokenizer, for texts that are not converted yet."""
    folder = Path(root).expanduser() / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{texts.tokenizer_sha256[:16]}.json"
    if not file.is_file() or file.read_bytes() != texts.tokenizer:
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_bytes(texts.tokenizer)
        new.replace(file)
    return str(file)


def _tokenised(data: DataConfig, manifest: Manifest, texts: TextExport) -> DataConfig:
    """`data` as they are. ValueError if they are not in the model's own tokens."""
    if manifest.texts is None:
        raise ValueError(f"the model takes texts, and {data.path} holds images")
    if manifest.texts.tokenizer_sha256 != texts.tokenizer_sha256:
        raise ValueError(
            f"{data.path} was made into tokens by another tokenizer ({manifest.texts.tokenizer_sha256[:12]}) than the model's "
            f"({texts.tokenizer_sha256[:12]}); give the source that it was made of"
        )
    return data


def _sized(data: DataConfig, manifest: Manifest, wanted: tuple[int, int]) -> DataConfig:
    """`data` with the image size that the model was trained on. ValueError if no image has this size and none may be resized."""
    if manifest.texts is not None:
        raise ValueError(f"the model takes images, and {data.path} holds texts")
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


def _progress(path: str) -> Callable[[Progress], None]:
    """A callback that prints a line to stderr every few seconds, because converting a source takes a while."""
    shown = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            complain(f"converting {path}: {progress.describe()}")

    return say
