"""Writes a finished run's model without a share of its channels: a folder with a model like any run's, and the settings of the run that
fine-tunes it. __main__.py and trainer.compress call it.

    DIR/model/           what a run exports: weights, config.json, card; predict, export, push and train.teacher take it
    DIR/finetune.toml    the run's own settings, from these weights; `finetune run --config` takes it. Written last
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.storage import is_uri, open_storage
from trainer.export.model_folder import Exported, export_model, load_export
from trainer.models.stem import enlarging_of
from trainer.prune.choose import Cost, check_fraction, cost_of, pruned, require_torch_pruning
from trainer.rank.worker import make_repeatable
from trainer.runs.folder import RUN_MARKS, RunFolder
from trainer.runs.model_files import MODEL_FOLDER, WEIGHTS_FILE, described, model_of
from trainer.runs.started import started_with
from trainer.settings.fields import replaced
from trainer.settings.toml import to_toml
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.values import widths_of, widths_text

SETTINGS_FILE = "finetune.toml"
UNDER_WAY = ".finetune-prune"
"""A folder that has this file was begun by this command, which has not come to its end there: the same command may go on."""
PRUNED = "pruned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A pruned model that lies in its folder."""

    folder: Path
    weights: Path
    settings: Path
    """Those of the run that fine-tunes it."""
    config: RunConfig
    """The same."""
    before: Cost
    after: Cost
    bytes_before: int
    """Of the file of weights."""
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "weights": str(self.weights),
            "settings": str(self.settings),
            "widths": widths_of(self.config.model.widths),
            "before": {**dataclasses.asdict(self.before), "bytes": self.bytes_before},
            "after": {**dataclasses.asdict(self.after), "bytes": self.bytes_after},
        }


def place_of(run: RunFolder, out: str) -> Path:
    """The folder to write to: `out`, or one in the run's. ValueError if it is none of this machine, or a run's own."""
    if not out:
        if not run.storage.is_local:
            raise ValueError(f"the run lies in {run.storage.address}, and weights are read from this machine; say with --out DIR where to")
        return Path(run.storage.at(f"{run.name}/{PRUNED}"))
    if is_uri(out):
        raise ValueError(f"--out {out} is on another machine, and model.weights is a file of this one; give a folder here")
    folder = Path(out).expanduser().absolute()
    if any((folder / mark).exists() for mark in RUN_MARKS if mark != MODEL_FOLDER):
        raise ValueError(f"--out {out} is a run's folder, whose model would be replaced; give another one")
    is_ours = any((folder / name).exists() for name in (SETTINGS_FILE, UNDER_WAY))
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise ValueError(f"--out {out} holds something that finetune prune has not written; give another folder, or empty that one")
    return folder


def write_pruned(run: RunFolder, folder: Path, *, fraction: float, multiple: int) -> Written:
    """Prune the run's model and write it to `folder`. ValueError if it cannot be pruned: nothing is written then."""
    check_fraction(fraction, multiple)
    require_torch_pruning()
    description = described(model_of(run))
    config = started_with(run)
    make_repeatable(1)  # sums of more threads may choose otherwise where two channels are about as good
    exported = load_export(model_of(run), torch.device("cpu"), channels_last=False)
    own = ModelConfig(**description["model"])
    side = own.image_size
    seen = (side, side) if side else exported.image_size
    blank = dataclasses.replace(own, weights="none")
    found = pruned(
        exported.model,
        lambda: exported.task.build(blank, seed=0, shape=exported.image_size),
        name=own.name,
        fraction=fraction,
        seen=seen,
        multiple=multiple,
    )
    widths = widths_text({**widths_of(own.widths), **found.widths})
    weights = folder / MODEL_FOLDER / WEIGHTS_FILE
    tuned = settings_after(config, own, weights=str(weights), widths=widths)
    at = open_storage(folder)
    at.write_atomic(UNDER_WAY, b"")
    at.delete_file(SETTINGS_FILE)  # of a model that is replaced
    _export(exported, found.model.state_dict(), tuned, folder)
    at.write_atomic(SETTINGS_FILE, to_toml(tuned).encode())
    at.delete_file(UNDER_WAY)
    return Written(
        folder=folder,
        weights=weights,
        settings=folder / SETTINGS_FILE,
        config=tuned,
        before=cost_of(exported.model, seen),
        after=cost_of(found.model, seen),
        bytes_before=_weights_bytes(run),
        bytes_after=weights.stat().st_size,
    )


def settings_after(config: RunConfig, model: ModelConfig, *, weights: str, widths: str) -> RunConfig:
    """The settings by which the pruned `model` is fine-tuned: the run's, with these weights, all layers trained, and a name of its own."""
    changes: Mapping[str, Any] = {
        "run": "",
        "resume": "auto",
        "model.stem": model.stem,
        "model.weights": weights,
        "model.widths": widths,
        "model.freeze": "none",  # what is left of the channels has to learn what the others did
    }
    for key, value in changes.items():
        config = replaced(config, key, value)
    return config


def _export(exported: Exported, tensors: Mapping[str, torch.Tensor], config: RunConfig, folder: Path) -> None:
    at = open_storage(folder.parent)
    export_model(
        storage=at,
        run=folder.name,
        tensors=tensors,
        config=config,
        task=exported.task,
        data_image_size=exported.image_size,
        summary={},
        enlarged=enlarging_of(exported.model),
    )


def _weights_bytes(run: RunFolder) -> int:
    folder = model_of(run)
    return sum(entry.size_bytes for entry in folder.storage.list(folder.name) if entry.name == WEIGHTS_FILE)
