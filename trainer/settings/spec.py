"""What a run's ranks are told, and what follows from a run's settings alone. Imports no torch: the driver reads it too."""

from dataclasses import dataclass

from dataio.order import Order
from dataio.parquet import Dataset
from trainer.settings.tree import RunConfig

TARGET = "trainer.rank.worker:train_rank"
"""What a rank's process calls, with a WorkerSpec and its RankContext."""
RANK_MODULES = ("trainer.rank.worker", "nvidia.dali.fn")
"""What a rank's process needs, imported once a node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """The commit to go on from, which the driver found valid."""

    step: int
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a rank is told. `dataset` is a converted folder; None if its files travel with the task."""

    config: RunConfig  # resolved: run, storage and virtual_ranks are set
    dataset: str | None
    generation: int
    attempt: int
    resume: ResumePoint | None  # None starts at zero
    threads: int
    skip: frozenset[int] = frozenset()  # steps whose batches are left out for their bad numbers
    failures: int = 0  # of the run so far, and the seconds in which its attempts ran: how often to save with checkpoint_every auto
    observed_seconds: float = 0.0


def make_order(config: RunConfig, dataset: Dataset) -> Order:
    """The order of training that a run's settings and data give."""
    return Order(
        seed=config.train.seed,
        fingerprint=dataset.manifest.fingerprint,
        count=dataset.split("train").count,
        batch_size=config.data.batch_size,
        virtual_ranks=config.train.virtual_ranks,
        window=config.data.shuffle_window,
    )


def total_steps_of(config: RunConfig, steps_per_epoch: int) -> int:
    """Steps that the whole run does."""
    everything = config.train.epochs * steps_per_epoch
    return min(everything, config.train.max_steps) if config.train.max_steps else everything
