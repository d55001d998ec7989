"""The spec that a run's ranks get, and values that follow from a run's settings and data. The driver and the ranks import it; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.store import Commit
from dataio.length_order import LengthOrder
from dataio.manifest import Manifest
from dataio.order import Order, spreads
from dataio.parquet import Dataset
from trainer.settings.texts import modules_of
from trainer.settings.tree import RunConfig

TARGET = "trainer.rank.worker:train_rank"
"""The function that a rank's process calls with a WorkerSpec and its RankContext."""
RANK_MODULES = ("trainer.rank.worker", "nvidia.dali.fn")
"""Modules that a rank's process needs. A zygote imports them once per node."""


def rank_modules(config: RunConfig) -> tuple[str, ...]:
    """The same, with what the run's model is made of."""
    return (*RANK_MODULES, *modules_of(config.model))


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """The commit to go on from, which the driver found valid."""

    step: int
    generation: int
    path: str
    """Its folder: several attempts may have committed that step."""

    @classmethod
    def at(cls, commit: Commit) -> "ResumePoint":
        return cls(step=commit.step, generation=commit.generation, path=commit.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a rank needs to know. `dataset` is a converted folder or URI; None if its files travel with the task."""

    config: RunConfig  # resolved: run, storage and virtual_ranks are set
    dataset: str | None
    generation: int
    attempt: int
    resume: ResumePoint | None  # None starts at step 0
    threads: int
    identity: Mapping[str, Any] = field(default_factory=dict)  # the run's identity record (trainer.drive.record), for its commits
    skip: frozenset[int] = frozenset()  # steps whose batches are skipped for a bad loss
    failures: int = 0  # of the run so far; with `observed_seconds` it decides how often `checkpoint_every auto` saves
    observed_seconds: float = 0.0  # in which the run's attempts ran


def make_order(config: RunConfig, dataset: Dataset) -> Order:
    """The order of samples in training, from the run's settings and data. Reads the lengths of texts."""
    order = order_of(config, dataset.manifest)
    if dataset.manifest.texts is None:
        return order
    same = {each.name: getattr(order, each.name) for each in fields(order)}
    return LengthOrder(**same, lengths=dataset.split("train").lengths(), sort_steps=config.data.sort_steps)


def order_of(config: RunConfig, manifest: Manifest, virtual_ranks: int = 0) -> Order:
    """Its sizes: which step has how many samples, from the data's manifest. `virtual_ranks` stands for 0 in the settings."""
    data, count = config.data, manifest.splits["train"].count
    virtual_ranks = config.train.virtual_ranks or virtual_ranks
    does_spread = data.remainder == "spread" or (
        data.remainder == "auto" and spreads(count=count, batch_size=data.batch_size, virtual_ranks=virtual_ranks)
    )
    return Order(
        seed=config.train.seed,
        fingerprint=manifest.fingerprint,
        count=count,
        batch_size=data.batch_size,
        virtual_ranks=virtual_ranks,
        window=data.shuffle_window,
        spread=does_spread,
    )


def total_steps_of(config: RunConfig, steps_per_epoch: int) -> int:
    """Number of steps of the whole run."""
    everything = config.train.epochs * steps_per_epoch
    return min(everything, config.train.max_steps) if config.train.max_steps else everything
