"""A finished run on texts, without the training: a tiny encoder whose head is as it is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.storage import Storage
from dataio.manifest import Manifest
from dataio.prepared import open_prepared
from dataio.selection import selected
from trainer.export.model_folder import export_model, text_export
from trainer.learn.build import task_of
from trainer.settings.fields import replaced
from trainer.settings.texts import with_text_model
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig


def text_config(model: Path, table: Path, **changes: Any) -> RunConfig:
    """Of a run on the texts of `table`, whose data are converted beside it."""
    config = RunConfig()
    for key, value in {
        "model.name": f"hf/{model}",
        "data.path": str(table),
        "data.root": str(table.parent / "data"),
        "data.max_tokens": 32,
        "data.batch_size": 20,
        "train.precision": "fp32",
        "train.channels_last": "off",
        "train.virtual_ranks": 2,
        "cluster.threads_per_worker": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }.items():
        config = replaced(config, key, value)
    return with_text_model(config)


def manifest_of(config: RunConfig) -> Manifest:
    """Of the run's data, which are converted if they are not."""
    return selected(open_prepared(config.data)[1], config.data).manifest


def finished_text_run(storage: Storage, config: RunConfig, *, answer: int | None = None) -> None:
    """The folder of the run `config.run`. `answer`: the class that its model gives every text; None: what the head's random weights say."""
    manifest = manifest_of(config)
    task = task_of(config, manifest)
    model: Any = task.build(config.model, seed=0, shape=(24,))
    if answer is not None:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.eye(len(model.head.bias))[answer])
    summary = {"status": "finished", "workers": 1, "threads_per_worker": 1, "dataset_fingerprint": manifest.fingerprint, "steps": 4}
    storage.write_atomic(f"{config.run}/config.toml", to_toml(replace(config, storage=storage.uri)).encode())
    storage.write_atomic(f"{config.run}/summary.json", json.dumps(summary).encode())
    export_model(
        storage=storage,
        run=config.run,
        tensors=model.state_dict(),
        config=config,
        task=task,
        data_image_size=(24,),
        summary=summary,
        texts=text_export(config, manifest.texts),
    )
