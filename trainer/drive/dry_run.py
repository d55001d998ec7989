"""`--dry-run`: finds the data and the devices and prints what would run. Called by trainer/run.py; plan.py does the arithmetic.

It starts no driver, so it may import torch."""

import shlex

import torch
from rich.console import Console

from cluster.storage import open_storage
from dataio.convert import is_converted, source_of
from dataio.manifest import USUAL_SIDE, Manifest, image_size_of
from dataio.parquet import open_dataset
from dataio.schema import Target, single_label
from trainer.drive.capability import here, settled
from trainer.drive.check import Question, Refused, built
from trainer.drive.identity import resolved, run_prefix
from trainer.drive.plan import Devices, describe, model_facts, table
from trainer.settings.identity import weights_sha256
from trainer.settings.packages import check_installed
from trainer.settings.programs import program
from trainer.settings.rules import worker_count
from trainer.settings.tree import RunConfig
from trainer.tasks.make import make_task


def dry_run(config: RunConfig, recipes: tuple[str, ...], console: Console) -> int:
    """Print what would run: steps, memory, cost."""
    check_installed(config.model)
    manifest = open_dataset(config.data.path).manifest if is_converted(config.data.path) else None
    targets = manifest.targets if manifest else _targets_of_source(config)
    task = make_task(config.task, targets, label_smoothing=config.optim.label_smoothing)
    size = (
        image_size_of(manifest, config.data)
        if manifest
        else (config.data.image_size or (32 if config.data.fit == "refuse" else USUAL_SIDE),) * 2
    )
    gpus = torch.cuda.device_count()
    devices = _devices(worker_count(config) or max(1, gpus), gpus)
    if manifest is not None:
        config = _named(config, recipes, manifest, workers=devices.workers, image_size=size)
    if config.model.weights != "imagenet":  # a dry run downloads nothing
        asked = Question(
            task=config.task,
            targets=targets,
            label_smoothing=config.optim.label_smoothing,
            model=config.model,
            image_size=size,
            seed=config.train.seed,
            loss=config.optim.loss,
            augment=config.data.augment,
        )
        found = built(asked)
        if isinstance(found, Refused):
            raise found.error()
        for line in found.notes:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    facts = model_facts(task, config.model, image_size=size)
    config = settled(
        config,
        here(use_gpus=gpus > 0 and config.cluster.gpus_per_worker != 0),
        has_depthwise=facts.has_depthwise,
        tell=lambda line: console.print(line, soft_wrap=True, markup=False),
    )
    console.print(table(describe(config, manifest, devices, facts)))
    if manifest is None:
        command = shlex.join([*program("convert").split(), config.data.path, "DEST"])
        console.print(f"For exact numbers convert the data first: {command}", soft_wrap=True, highlight=False)
    return 0


def _targets_of_source(config: RunConfig) -> tuple[Target, ...]:
    """Targets of data that are not converted yet. ValueError if there is nothing to convert."""
    source = source_of(config.data)
    if source.kind.startswith("cifar"):  # counting CIFAR's classes would need a download
        return single_label(tuple(map(str, range(10))))
    return source.targets


def _devices(workers: int, gpus: int) -> Devices:
    return Devices(
        workers=workers,
        name=torch.cuda.get_device_name(0) if gpus else "CPU",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpus else None,
    )


def _named(config: RunConfig, recipes: tuple[str, ...], manifest: Manifest, *, workers: int, image_size: tuple[int, int]) -> RunConfig:
    """`config` with the name that the run will have."""
    return resolved(
        config,
        open_storage(config.storage, config.cluster.storage_retry_seconds),
        workers=workers,
        fingerprint=manifest.fingerprint,
        weights=weights_sha256(config.model.weights),
        prefix=run_prefix(config, recipes),
        image_size=image_size,
    ).config
