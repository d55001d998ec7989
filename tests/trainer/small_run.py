"""What a run does, without the cluster around it, for the tests of what is done with a finished run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.storage import open_storage
from dataio.loader import Loader
from dataio.parquet import open_dataset
from trainer.export.model_folder import export_model, text_export
from trainer.learn.build import build_learner, task_of
from trainer.learn.step import train_steps
from trainer.rank.evaluation import evaluate
from trainer.rank.worker import make_repeatable
from trainer.settings.spec import make_order
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig


def train(storage: Path, config: RunConfig, steps: int = 40) -> Path:
    """Train on `config.data.path`, evaluate and export: the run's folder."""
    make_repeatable(1)
    dataset, device = open_dataset(config.data.path), torch.device("cpu")
    order = make_order(config, dataset)
    loader = Loader(
        dataset, config.data, order=order, virtual_ranks=range(2), device=device, seed=0, on_bad=lambda bad: pytest.fail(str(bad))
    )
    learner = build_learner(config, task_of(config, dataset.manifest), loader.shape, device)
    learner.set_trainable(0)
    for _ in train_steps(
        learner.stepper(),
        loader.train(0, steps),
        start_step=0,
        stop_step=steps,
        steps_per_epoch=order.steps_per_epoch,
        batch_count=order.batch_count,
        set_learning_rate=lambda step: config.optim.lr,
        device=device,
        sum_over_ranks=False,
    ):
        pass
    model, precision = learner.model, config.train.precision
    result = evaluate(learner.task, model, learner.preprocess, dataset, loader, ema=learner.ema, precision=precision).entry()
    assert learner.ema is not None
    summary = {**result, "workers": 1, "threads_per_worker": 1, "dataset_fingerprint": dataset.manifest.fingerprint}
    at = open_storage(storage)
    at.write_atomic(f"{config.run}/config.toml", to_toml(replace(config, storage=at.uri)).encode())
    at.write_atomic(f"{config.run}/summary.json", json.dumps(summary).encode())
    export_model(
        storage=at,
        run=config.run,
        tensors=learner.ema.weights(),
        config=config,
        task=learner.task,
        data_image_size=loader.shape,
        summary=summary,
        texts=text_export(config, dataset.manifest.texts),
    )
    return storage / config.run
