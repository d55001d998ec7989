"""A rank's data: its share of the samples, the loader that reads them, the quarantine of unreadable samples, and the ledger.

worker.py opens it at the start of an attempt. dataio.order decides which samples a step has; dataio.loader reads and decodes them.
"""

import platform
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from cluster.beat import DECODING, STEP, STORAGE
from cluster.heartbeat import Heartbeat
from cluster.ledger import LedgerWriter
from cluster.machine import available_memory_bytes
from cluster.storage import Storage
from dataio.batch import Batch
from dataio.config import DEVICE_FRACTION, PIN
from dataio.loader import Loader
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import CorruptShard, Dataset, open_dataset
from dataio.quarantine import BadSample, Quarantine, TooManyBadSamples, allowed
from dataio.schema import UNLABELLED
from dataio.selection import selected
from dataio.unlabelled import UnlabelledError, open_pinned
from trainer.rank.this_rank import ThisRank
from trainer.settings.second_stream import order_of_unlabelled, stream_seed
from trainer.settings.spec import make_order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankData:
    """A rank's view of the data set. Every rank can read every sample; the order decides which ones it trains on."""

    dataset: Dataset
    order: Order
    virtual_ranks: range
    """The virtual ranks that this rank carries."""
    loader: Loader
    second: "Second | None" = None
    """The stream of images without labels, if the run has one."""

    @property
    def share(self) -> float:
        """Fraction of a batch that this rank carries."""
        return len(self.virtual_ranks) / self.order.virtual_ranks

    def samples_of(self, step: int) -> int:
        """Samples of the run's step `step`, over all ranks."""
        return self.order.batch_count(step % self.order.steps_per_epoch)

    def train(self, first: int, last: int) -> "Batches":
        """The batches of the steps `first` .. `last` - 1 (Loader.train), each with its unlabelled images."""
        labelled = self.loader.train(first, last)
        return labelled if self.second is None else paired(labelled, self.second.loader.train(first, last))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Second:
    """The stream of images without labels."""

    dataset: Dataset
    """Of the split `unlabelled` alone."""
    order: Order
    loader: Loader


def paired(labelled: "Batches", unlabelled: "Batches") -> "Batches":
    """The first stream's batches, each with that of the second for the same step and virtual rank."""
    with closing(labelled), closing(unlabelled):
        for step, more in zip(labelled, unlabelled, strict=True):
            yield tuple(replace(batch, unlabelled=other) for batch, other in zip(step, more, strict=True))


def open_data(me: ThisRank) -> RankData:
    config, spec = me.config, me.spec
    dataset = selected(open_dataset(me.files if spec.dataset is None else spec.dataset), config.data)
    unlabelled = open_unlabelled(me) if config.data.unlabelled else None
    streams = 1 if unlabelled is None else 2
    order = make_order(config, dataset)
    virtual_ranks = blocks_of_virtual_ranks(order.virtual_ranks, me.world_size, me.rank)
    open_loader = partial(
        Loader,
        config=config.data,
        virtual_ranks=virtual_ranks,
        device=me.device,
        threads=spec.threads,
        on_bad=quarantine(me, *([dataset] if unlabelled is None else [dataset, unlabelled])),
        memory_bytes=available_memory_bytes() // (2 * me.place.local_world_size * streams),
        on_read_wait=read_wait(me.heartbeat),
        device_fraction=DEVICE_FRACTION / streams,
    )
    loader = open_loader(dataset, order=order, seed=config.train.seed)
    second = None
    if unlabelled is not None:
        of_second = order_of_unlabelled(config, unlabelled.manifest)
        seed = stream_seed(config.train.seed)
        more = open_loader(unlabelled, order=of_second, seed=seed, split=UNLABELLED, row=loader.row)
        second = Second(dataset=unlabelled, order=of_second, loader=more)
    return RankData(dataset=dataset, order=order, virtual_ranks=virtual_ranks, loader=loader, second=second)


def open_unlabelled(me: ThisRank) -> Dataset:
    """The images that the driver has pinned. UnlabelledError if they are not on this node."""
    pinned = me.config.data.unlabelled
    # By a name alone nobody could tell whether they are still the same.
    assert PIN in pinned, "the driver pins the unlabelled images (trainer.drive.start)"
    try:
        return me.waits.call(lambda: open_pinned(pinned), "the unlabelled images")
    except CorruptShard:
        raise
    except ValueError as error:
        raise UnlabelledError(
            f"on {platform.node()}: {error}; every node reads the unlabelled images by itself: convert them (python -m dataio.convert) "
            "onto a storage that all nodes see, and give that folder or URI to --data.unlabelled"
        ) from None


def fill_cache(heartbeat: Heartbeat, loader: Loader, watched: str = "test", second: Second | None = None) -> None:
    """If samples are cached, decode those now that training and the evaluations of the split `watched` need, so that no step has to. It may
    take hours; each row group is a sign of life."""
    heartbeat.tick(DECODING)
    loader.load("train", watched, on_group=heartbeat.tick)
    if second is not None:
        second.loader.load(UNLABELLED, on_group=heartbeat.tick)


def read_wait(heartbeat: Heartbeat) -> Callable[[bool], None]:
    """The loader's callback for a batch that waits for a read: the rank waits for a storage meanwhile, for as long as the loader has
    patience (dataio.remote)."""
    before = STEP

    def on_read_wait(waits: bool) -> None:
        nonlocal before
        if heartbeat.phase != STORAGE:
            before = heartbeat.phase
        heartbeat.tick(STORAGE if waits else before)

    return on_read_wait


def quarantine(me: ThisRank, *datasets: Dataset) -> Callable[[BadSample], None]:
    """The loaders' callback for a bad sample: count it, tell the coordinator, and fail the run if all ranks together exceed the limit,
    which is a fraction of all samples of the data sets."""
    total = sum(split.count for dataset in datasets for split in dataset.manifest.splits.values())
    limit = me.config.data.max_bad_fraction

    def on_record(bad: BadSample) -> None:
        me.metrics.add("quarantined_samples_total", label=bad.kind)
        everywhere = me.call("quarantine", [asdict(bad)])
        if everywhere > allowed(limit, total):
            raise TooManyBadSamples.of(own.records, count=everywhere, total=total, fraction=limit, so_far=" so far")

    own = Quarantine(1.0, total, on_record)

    def on_bad(bad: BadSample) -> None:
        own.add(bad.key, bad.reason, bad.split, bad.sample_id)

    return on_bad


def open_ledger(me: ThisRank, storage: Storage, *, start_step: int) -> LedgerWriter | None:
    """The ledger's writer, if the run keeps a ledger. ValueError if the storage is no local folder."""
    return _ledger(me, storage, "ledger", start_step)


def open_second_ledger(me: ThisRank, storage: Storage, *, start_step: int) -> LedgerWriter | None:
    """That of the images without labels, in a folder of its own, if there are any: its epochs are their own."""
    return _ledger(me, storage, f"ledger/{UNLABELLED}", start_step) if me.config.data.unlabelled else None


def _ledger(me: ThisRank, storage: Storage, folder: str, start_step: int) -> LedgerWriter | None:
    if not me.config.train.ledger:
        return None
    path = Path(storage.local_path(f"{me.config.run}/{folder}", "--train.ledger"))
    return LedgerWriter(path, me.spec.attempt, me.rank, start_step=start_step)


Batches = Generator[tuple[Batch, ...], None, None]


def recorded(batches: Batches, ledger: LedgerWriter | None, me: ThisRank, second: LedgerWriter | None = None) -> Batches:
    """`batches`, unchanged. If there is a ledger, each batch is written into it when the step takes it, and its unlabelled images into
    `second`."""
    return batches if ledger is None else _recorded(batches, ledger, me, second)


def _recorded(batches: Batches, ledger: LedgerWriter, me: ThisRank, second: LedgerWriter | None) -> Batches:
    def record(step: tuple[Batch, ...]) -> None:
        for batch in step:
            for each, into in ((batch, ledger), (batch.unlabelled, second)):
                if each is not None and into is not None:
                    into.record(each.epoch, each.step, each.virtual_rank, each.ids, skipped=each.step in me.spec.skip)

    with closing(batches):
        for step in batches:
            me.waits.call(partial(record, step), "the ledger")
            yield step
