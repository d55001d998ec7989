"""The arithmetic behind `--dry-run`: what a run would do and what it would need. Called by dry_run.py.

`describe` only computes; the caller finds the facts (manifest, devices). Only `model_facts` does work: it builds the model without weights
and counts parameters and operations.
"""

import dataclasses
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text
from torch import nn

from cluster.interval import AUTO, steps_between
from dataio.codecs.make import row_of
from dataio.manifest import Manifest, image_hw, shape_of
from trainer.models.adapters import resting
from trainer.models.vision import has_depthwise, head_of
from trainer.rank.profile import count_work
from trainer.settings.length import length_of
from trainer.settings.programs import program
from trainer.settings.rules import validate
from trainer.settings.texts import is_text
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.units import duration, flops, number, size
from trainer.tasks.task import Task

_FLOAT32_BYTES = 4  # weights, gradients and optimiser state stay fp32 under bf16 autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices that the run would get."""

    workers: int
    name: str
    """Name of each worker's device for people, e.g. `CPU`, `NVIDIA H200`."""
    memory_bytes: int | None = None
    """Memory of one device."""
    flops_per_second: float | None = None
    """Measured speed of one device at the run's precision; without it there is no time estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Numbers counted on the built model."""

    parameters: int
    trainable: int
    """Parameters that `model.freeze` and `model.lora_rank` let change at the end of training."""
    buffer_bytes: int
    flops_per_image: float | None
    """Forward and backward of one image; None if an operation of the model cannot be counted."""
    has_depthwise: bool = False
    """On a CPU this decides what train.precision=auto becomes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What would run. A value is None if it is unknown without the converted data."""

    config: RunConfig
    devices: Devices
    model: ModelFacts
    classes: int | None
    train_images: int | None
    test_images: int | None
    shape: tuple[int, ...] | None
    """(height, width) of the images, (tokens,) of the longest text."""
    virtual_ranks: int
    batch_per_virtual_rank: int
    steps_per_epoch: int | None
    total_steps: int | None
    model_bytes: int
    """Weights, buffers, gradients, optimiser state and EMA on each device; activations come on top."""
    cache_bytes: int | None
    """Decoded images of both splits, all workers together."""
    checkpoint_bytes: int
    checkpoint_every: int | None
    """Steps between two checkpoints; None if measurements will decide it."""
    total_flops: float | None
    seconds: float | None
    destination: str


def model_facts(task: Task, config: ModelConfig, *, shape: tuple[int, ...]) -> ModelFacts:
    """Build the task's model (with random weights, so without a download) and count. `shape` is (height, width) of the data's images, or
    (tokens,) of the longest text; the work on a text depends on its length and is not counted."""
    model = task.build(dataclasses.replace(config, weights="none"), shape=shape, seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rest = resting(model)
    trainable = parameters - sum(parameter.numel() for name, parameter in model.named_parameters() if name in rest)
    if config.freeze == "backbone":
        trainable = sum(parameter.numel() for parameter in head_of(model)[1].parameters())
    seen = (config.image_size, config.image_size) if config.image_size else shape
    return ModelFacts(
        parameters=parameters,
        trainable=trainable,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        flops_per_image=_flops_per_image(model, image_hw(seen), is_head_only=config.freeze == "backbone") if len(seen) == 2 else None,
        has_depthwise=has_depthwise(model),
    )


def describe(config: RunConfig, manifest: Manifest | None, devices: Devices, model: ModelFacts, *, is_new: bool = True) -> Plan:
    """What `config` would do on `devices`. ValueError if the run could not start. `is_new`: it was never started.

    Without a manifest (data not converted yet), everything that depends on the number of images is None.
    """
    virtual_ranks = config.train.virtual_ranks or devices.workers
    validate(config, workers=devices.workers)
    train = manifest.splits["train"].count if manifest else None
    test = manifest.splits["test"].count if manifest and "test" in manifest.splits else None
    shape = shape_of(manifest, config.data) if manifest else (config.data.image_size,) * 2 if config.data.image_size else None
    steps_per_epoch = total_steps = checkpoint_every = None
    validate(config, workers=devices.workers, shape=shape)
    if manifest is not None:
        length = length_of(config, manifest, workers=devices.workers, is_new=is_new)
        steps_per_epoch, total_steps = length.steps_per_epoch, length.total_steps
        checkpoint_every = steps_between(config.train.checkpoint_every, steps_per_epoch)

    weights = model.parameters * _FLOAT32_BYTES + model.buffer_bytes
    moments = 2 if config.optim.name == "adamw" else 1 if config.optim.momentum > 0 else 0
    optimizer = moments * model.trainable * _FLOAT32_BYTES
    ema = weights if config.train.ema else 0
    gradients = model.trainable * _FLOAT32_BYTES
    cache = None
    if train is not None and manifest is not None:
        cache = 0 if config.data.cache == "none" else (train + (test or 0)) * row_of(manifest, config.data).nbytes
    work = None
    if total_steps is not None and steps_per_epoch and train and model.flops_per_image:
        work = total_steps / steps_per_epoch * train * model.flops_per_image
    speed = devices.flops_per_second
    return Plan(
        config=config,
        devices=devices,
        model=model,
        classes=len(manifest.classes) if manifest else None,
        train_images=train,
        test_images=test,
        shape=shape,
        virtual_ranks=virtual_ranks,
        batch_per_virtual_rank=config.data.batch_size // virtual_ranks,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        model_bytes=weights + gradients + optimizer + ema,
        cache_bytes=cache,
        checkpoint_bytes=weights + optimizer + ema,
        checkpoint_every=checkpoint_every,
        total_flops=work,
        seconds=work / (speed * devices.workers) if work and speed else None,
        destination=f"{config.storage.rstrip('/')}/{config.run or '<named after the recipe and the settings>'}",
    )


def table(plan: Plan) -> Table:
    """The plan for a console."""
    config, devices = plan.config, plan.devices
    unit = "texts" if is_text(config.model) else "images"
    rows: list[tuple[str, str]] = []
    if plan.train_images is None:
        rows.append(("Data", f"{config.data.path}: not converted yet; steps and sizes are known once it is ({program('convert')})"))
    else:
        side = ""
        if plan.shape:
            side = f", {plan.shape[0]}x{plan.shape[1]} pixels" if len(plan.shape) == 2 else f", {plan.shape[0]} tokens at most"
        test = f", {number(plan.test_images)} to test" if plan.test_images is not None else ""
        classes = counted(plan.classes or 0, "class", "classes")
        rows.append(("Data", f"{config.data.path}: {number(plan.train_images)} {unit} to train{test}, {classes}{side}"))
    resized = f", images resized to {config.model.image_size} pixels" if config.model.image_size else ""
    share = "" if plan.model.trainable == plan.model.parameters else f" ({number(plan.model.trainable)} trained)"
    rows.append(("Model", f"{config.model.name}, {number(plan.model.parameters)} parameters{share}{resized}"))
    rows.append(("Weights", config.model.weights))
    rows.append(("Workers", f"{devices.workers} on {devices.name}, {config.train.precision}"))
    parts = f", in {plan.virtual_ranks} virtual ranks of {plan.batch_per_virtual_rank}" if plan.virtual_ranks > 1 else ""
    rows.append(("Batch", f"{config.data.batch_size} {unit}{parts}"))
    if plan.total_steps is not None:
        epochs = "1 epoch" if config.train.epochs == 1 else f"{config.train.epochs} epochs"
        limit = f", stopped by train.max_steps={config.train.max_steps}" if config.train.max_steps else ""
        rows.append(("Steps", f"{number(plan.total_steps)}: {epochs} of {number(plan.steps_per_epoch)}{limit}"))
    room = f" of {size(devices.memory_bytes)}" if devices.memory_bytes else ""
    rows.append(("Model memory", f"{size(plan.model_bytes)}{room} on each device; activations come on top"))
    if plan.cache_bytes is not None:
        cache = f"{size(plan.cache_bytes)} of decoded {unit} (data.cache={config.data.cache})"
        rows.append(("Data memory", cache if plan.cache_bytes else f"none: {unit} are decoded every epoch"))
    keep = config.cluster.keep_checkpoints
    every = f", every {number(plan.checkpoint_every)} steps" if plan.checkpoint_every else ""
    if config.train.checkpoint_every == AUTO:
        every = ", as often as measurements say"
    rows.append(("Checkpoints", f"{size(plan.checkpoint_bytes)} x {keep} kept = {size(plan.checkpoint_bytes * keep)}{every}"))
    if plan.total_flops is not None:
        rows.append(("Work", f"{flops(plan.total_flops)} ({flops(plan.model.flops_per_image)} an image)"))
    if plan.seconds is not None:
        rows.append(("Time", f"about {duration(plan.seconds)} of computing, if nothing else is in the way"))
    rows.append(("Writes to", plan.destination))

    shown = Table(title="What would run", title_justify="left", show_header=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        shown.add_row(name, Text(value))
    return shown


def counted(count: int, one: str, several: str = "") -> str:
    """`1 class`, `3 classes`; several are the word with an s, if no other is given."""
    return f"{number(count)} {one if count == 1 else several or f'{one}s'}"


def _flops_per_image(model: nn.Module, seen: tuple[int, int], *, is_head_only: bool) -> float | None:
    """Count FLOPs on tensors without data, so no arithmetic runs."""
    if is_head_only:
        model.requires_grad_(False)
        head_of(model)[1].requires_grad_(True)
    return count_work(model.train(), seen, precision="fp32").flops_per_image
