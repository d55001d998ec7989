"""A rank's data: its share of the samples, the loader that reads them, the quarantine of unreadable samples, and the ledger.

worker.py opens it at the start of an attempt. dataio.order decides which samples a step has; dataio.loader reads and decodes them.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cluster.beat import DECODING, STEP, STORAGE
from cluster.heartbeat import Heartbeat
from cluster.ledger import LedgerWriter
from cluster.machine import available_memory_bytes
from cluster.storage import Storage
from dataio.batch import Batch
from dataio.loader import Loader
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import Dataset, open_dataset
from dataio.quarantine import BadSample, Quarantine, TooManyBadSamples, allowed
from dataio.selection import selected
from trainer.rank.this_rank import ThisRank
from trainer.settings.spec import make_order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankData:
    """A rank's view of the data set. Every rank can read every sample; the order decides which ones it trains on."""

    dataset: Dataset
    order: Order
    virtual_ranks: range
    """The virtual ranks that this rank carries."""
    loader: Loader

    @property
    def share(self) -> float:
        """Fraction of a batch that this rank carries."""
        return len(self.virtual_ranks) / self.order.virtual_ranks

    def samples_of(self, step: int) -> int:
        """Samples of the run's step `step`, over all ranks."""
        return self.order.batch_count(step % self.order.steps_per_epoch)


def open_data(me: ThisRank) -> RankData:
    config, spec = me.config, me.spec
    dataset = selected(open_dataset(me.files if spec.dataset is None else spec.dataset), config.data)
    order = make_order(config, dataset)
    virtual_ranks = blocks_of_virtual_ranks(order.virtual_ranks, me.world_size, me.rank)
    loader = Loader(
        dataset,
        config.data,
        order=order,
        virtual_ranks=virtual_ranks,
        device=me.device,
        seed=config.train.seed,
        threads=spec.threads,
        on_bad=quarantine(me, dataset),
        memory_bytes=available_memory_bytes() // (2 * me.place.local_world_size),
        on_read_wait=read_wait(me.heartbeat),
    )
    return RankData(dataset=dataset, order=order, virtual_ranks=virtual_ranks, loader=loader)


def fill_cache(heartbeat: Heartbeat, loader: Loader, watched: str = "test") -> None:
    """If samples are cached, decode those now that training and the evaluations of the split `watched` need, so that no step has to. It may
    take hours; each row group is a sign of life."""
    heartbeat.tick(DECODING)
    loader.load("train", watched, on_group=heartbeat.tick)


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


def quarantine(me: ThisRank, dataset: Dataset) -> Callable[[BadSample], None]:
    """The loader's callback for a bad sample: count it, tell the coordinator, and fail the run if all ranks together exceed the limit."""
    total = sum(split.count for split in dataset.manifest.splits.values())
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
    if not me.config.train.ledger:
        return None
    folder = Path(storage.local_path(f"{me.config.run}/ledger", "--train.ledger"))
    return LedgerWriter(folder, me.spec.attempt, me.rank, start_step=start_step)


Batches = Generator[tuple[Batch, ...], None, None]


def recorded(batches: Batches, ledger: LedgerWriter | None, me: ThisRank) -> Batches:
    """`batches`, unchanged. If there is a ledger, each batch is written into it when the step takes it."""
    return batches if ledger is None else _recorded(batches, ledger, me)


def _recorded(batches: Batches, ledger: LedgerWriter, me: ThisRank) -> Batches:
    def record(step: tuple[Batch, ...]) -> None:
        for batch in step:
            ledger.record(batch.epoch, batch.step, batch.virtual_rank, batch.ids, skipped=batch.step in me.spec.skip)

    with closing(batches):
        for step in batches:
            me.waits.call(partial(record, step), "the ledger")
            yield step
