"""Builds the learner: the model with its optimiser and moving average, and the step over it. Called by trainer.rank.worker, and by
benchmarks that measure the same step without the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from cluster.reduce import TreeReducer
from dataio.balance import class_counts
from dataio.manifest import Manifest, image_hw
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import Dataset
from dataio.schema import Target
from dataio.unlabelled import known_classes
from trainer.learn.augment.mix import make_mix, mixed_loss
from trainer.learn.augment.views import Views, make_views
from trainer.learn.balance import balanced_loss, heaviest_of
from trainer.learn.depth import depths_of
from trainer.learn.ema import Ema
from trainer.learn.gradients import DdpGradients, Gradients, PassConfig, PlainGradients, StepObserver, TreeGradients
from trainer.learn.objectives import autocast_for, supervised
from trainer.learn.optim import build_optimizer, clip_gradients, set_learning_rate, set_trainable
from trainer.learn.own import own_augment, own_loss
from trainer.learn.semi import STRONG_ERASE, STRONG_MAGNITUDE, STRONG_OPS, Rule, Semi
from trainer.learn.step import UNOBSERVED, Stepper
from trainer.learn.teacher import Teacher, load_teacher, taught_loss
from trainer.learn.update import Update
from trainer.models.im2col import use_im2col
from trainer.models.normalise import mean_and_std
from trainer.models.padded import pad_channels
from trainer.models.rounded import round_layers
from trainer.models.vision import Preprocess, head_of
from trainer.runs.model_files import pinned
from trainer.settings.balance import asks_for_balance
from trainer.settings.second_stream import stream_seed
from trainer.settings.texts import is_text
from trainer.settings.tree import RunConfig
from trainer.tasks.make import make_task
from trainer.tasks.task import Task


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Learner:
    """The model and all that trains it, on their device."""

    config: RunConfig
    task: Task
    model: nn.Module
    preprocess: nn.Module
    """Takes samples from the loader: (n, 3, H, W) uint8, or (n, T) int32 of texts."""
    optimizer: torch.optim.Optimizer
    head_name: str
    ema: Ema | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    class_counts: tuple[int, ...] = ()
    """Training images of each class, if the settings balance classes."""
    teacher: Teacher | None = None
    """The model whose answers are learned beside the labels."""
    semi: Semi | None = None
    """What learns from images without labels."""

    @property
    def heaviest(self) -> float:
        """How many times the loss of one sample may count."""
        return heaviest_of(self.config, self.task, self.class_counts)

    def set_trainable(self, epoch: int) -> None:
        """Freeze or thaw the parameters for `epoch`. If that changes what is trained, make a new stepper."""
        model = self.config.model
        set_trainable(self.model, model.freeze, epoch, lp_epochs=model.lp_epochs, head_name=self.head_name)

    def set_learning_rate(self, step: int, total_steps: int) -> float:
        """Set every parameter group's learning rate for `step`. Returns that of the backbone's last block."""
        return set_learning_rate(self.optimizer, self.config.optim, step, total_steps)

    def stepper(self, *, world_size: int = 1, rank: int = 0, observer: StepObserver = UNOBSERVED, order: Order | None = None) -> Stepper:
        """The step over the parameters that are trained now. In ddp mode this is a collective. `order` says how large batches are; without
        it they are as the settings say."""
        clip_norm = self.config.optim.clip_norm
        clip = partial(clip_gradients, max_norm=clip_norm) if clip_norm else None
        update = Update(self.model, self.optimizer, clip=clip, ema=self.ema)
        return Stepper(self._gradients(update, world_size, rank, order), update, observer)

    def _gradients(self, update: Update, world_size: int, rank: int, order: Order | None) -> Gradients:
        train = self.config.train
        loss = own_loss(self.config.optim.loss, self.task)
        loss = loss or balanced_loss(self.config, self.task, self.class_counts, self.device)
        if (mix := make_mix(seed=train.seed, mixup=train.mixup, cutmix=train.cutmix)) is not None:
            loss = mixed_loss(loss or self.task.loss_sum)
        if self.teacher is not None:
            weight, temperature = train.teacher_weight, train.teacher_temperature
            loss = taught_loss(loss or self.task.loss_sum, self.task, weight=weight, temperature=temperature)
        if self.semi is not None:
            loss = self.semi.loss(loss or self.task.loss_sum)
        objective = supervised(self.task, self.preprocess, autocast_for(self.device, train.precision), loss)
        # A single virtual rank has nothing to add up; the plain step gives the same bits without the tree's flat vector.
        is_tree = train.reduction == "tree" and train.virtual_ranks > 1
        # In tree mode each virtual rank goes through the model by itself; otherwise all of this rank's go through together.
        blocks = [blocks_of_virtual_ranks(train.virtual_ranks, world_size, each) for each in range(world_size)]
        at_once = [range(v, v + 1) for v in blocks[rank]] if is_tree else [blocks[rank]]
        passes = PassConfig(
            seed=train.seed,
            accumulate=train.accumulate,
            full_batches=self._full_batches(at_once, order),
            semi=self.semi,
            full_unlabelled=self._full_batches(at_once, self.semi.order) if self.semi is not None else (),
            compile_model=train.compile,
            cuda_graphs=train.cuda_graphs == "on",
            augment=own_augment(self.config.data.augment, train.seed),
            views=views_of(self.config),
            mix=mix,
            teacher=self.teacher,
        )
        wire = torch.bfloat16 if train.reduce_dtype == "bf16" else torch.float32
        if is_tree:
            reducer = TreeReducer(blocks, rank, wire=wire)
            return TreeGradients(self.model, self.task, objective, passes, reducer, looks_at_gradients=not update.adds_up)
        if world_size > 1:
            compress = wire != torch.float32
            return DdpGradients(self.model, self.task, objective, passes, world_size=world_size, compress=compress)
        return PlainGradients(self.model, self.task, objective, passes)

    def _full_batches(self, together: Sequence[range], order: Order | None) -> tuple[int, ...]:
        """The sizes in which samples go through the model, but for those of a short last step. `together`: virtual ranks that do so as one
        batch. In ddp mode all ranks have equally many, as compiling one is a collective there."""
        train = self.config.train
        if order is None or not order.spread:
            return (len(together[0]) * self.config.data.batch_size // train.virtual_ranks // train.accumulate,)
        batches = {size for ranks in together for size in order.batch_sizes(ranks)}
        parts = {part for size in batches for part in (size // train.accumulate, -(-size // train.accumulate))}
        sizes = sorted(parts - {0, 1}) or [1]  # where others have more, a single sample has no statistics and is not compiled
        return (sizes[0], sizes[-1]) if train.reduction == "ddp" else tuple(sizes)


def views_of(config: RunConfig) -> Views | None:
    """The built-in augmentation on the device; None if the settings ask for none."""
    mean, _ = mean_and_std(config)
    return make_views(config.data, seed=config.train.seed, image_size=config.model.image_size, mean=mean)


def preprocess_of(config: RunConfig) -> nn.Module:
    """Takes samples from the loader to what the network gets. On the CPU."""
    if is_text(config.model):
        from trainer.models.text import Tokens  # here: it imports transformers

        return Tokens()
    mean, std = mean_and_std(config)
    return Preprocess(
        mean=mean,
        std=std,
        image_size=config.model.image_size,
        interpolation=config.model.interpolation,
        channels_last=config.train.channels_last == "on",
    )


def task_of(config: RunConfig, manifest: Manifest) -> Task:
    """The task that the run's settings and its data call for."""
    holds_texts = manifest.texts is not None
    return make_task(config.task, manifest.targets, label_smoothing=config.optim.label_smoothing, holds_texts=holds_texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondStream:
    """What `build_learner` wants of the images without labels."""

    order: Order
    target: Target
    """What their own folders say of classes."""


def semi_of(config: RunConfig, task: Task, stream: SecondStream, device: torch.device) -> Semi:
    """What learns from the images of `stream`, by the run's settings."""
    train, data = config.train, config.data
    (target,) = task.targets
    mean, _ = mean_and_std(config)
    plain = replace(data, policy="none", jitter=(0.0, 0.0, 0.0, 0.0), erase=0.0, rotate=0.0)
    changed = replace(
        plain,
        crop="pad",  # the weak view is cropped already
        policy=train.unlabelled_policy,
        policy_ops=STRONG_OPS,
        policy_magnitude=STRONG_MAGNITUDE,
        erase=STRONG_ERASE,
    )
    seed, side = stream_seed(train.seed), config.model.image_size
    strong = make_views(changed, seed=seed, image_size=side, mean=mean)
    assert strong is not None
    return Semi(
        Rule(method=train.semi, classes=len(target.classes), threshold=train.threshold, decay=train.semi_decay),
        stream.order,
        weight=train.unlabelled_weight,
        weak=make_views(plain, seed=seed, image_size=side, mean=mean),
        strong=strong,
        known=known_classes(stream.target, target.classes),
        labels=stream.target.name,
        device=device,
    )


def class_counts_of(config: RunConfig, dataset: Dataset) -> tuple[int, ...]:
    """What `build_learner` wants of the data: the classes' training images if the settings balance them."""
    return class_counts(dataset) if asks_for_balance(config) else ()


def views_are_fixed(config: RunConfig) -> bool:
    """Whether a sample looks the same in every epoch."""
    data, train = config.data, config.train
    is_moved = data.flip or data.padding or data.augment or train.mixup or train.cutmix
    return not is_moved and views_of(config) is None


def teacher_of(config: RunConfig, task: Task, shape: tuple[int, ...], device: torch.device) -> Teacher | None:
    """The teacher that the settings name. ValueError if it cannot teach `task`."""
    if not config.train.teacher:
        return None
    return load_teacher(
        pinned(config.train.teacher, config.storage),
        task,
        image_hw=image_hw(shape),
        device=device,
        precision=config.train.precision,
        channels_last=config.train.channels_last == "on",
    )


def build_learner(
    config: RunConfig,
    task: Task,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    class_counts: Sequence[int] = (),
    teacher: Teacher | None = None,
    stream: SecondStream | None = None,
) -> Learner:
    """Build the learner for images of `shape` (H, W), or texts of (T,) tokens at most, on `device`, with the weights that the settings
    name. `class_counts`: from `class_counts_of`; `teacher`: from `teacher_of`, which is asked if it is not given. Without `stream` it
    learns from labels alone."""
    assert config.train.channels_last != "auto", "train.channels_last=auto is to be decided before (trainer.drive.capability)"
    is_channels_last = config.train.channels_last == "on"
    model = task.build(config.model, shape=shape, seed=config.train.seed_of_layers)
    model = model.to(device).to(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
    if config.train.quantise == "int8":
        round_layers(model)
    elif config.train.small_maps == "product":
        use_im2col(model)
    if config.train.pad_channels:
        pad_channels(model, config.model.name)
    task.bind(model)
    head_name, _ = head_of(model)
    depths = depths_of(model, config.model.name, head_name) if config.optim.layer_decay != 1 else None
    return Learner(
        config=config,
        task=task,
        model=model,
        preprocess=preprocess_of(config).to(device),
        optimizer=build_optimizer(model, config.optim, head_name, depths),
        head_name=head_name,
        ema=Ema(model, config.train.ema) if config.train.ema else None,
        device=device,
        class_counts=tuple(class_counts),
        teacher=teacher or teacher_of(config, task, shape, device),
        semi=semi_of(config, task, stream, device) if stream is not None else None,
    )
