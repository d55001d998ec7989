"""Makes batches on the device from a converted data set: order, storage and codec put together, two steps ahead of training.

Called by the trainer's ranks (trainer.rank): worker trains with `train`, evaluation uses `evaluate`. Order and codec alone decide what a
batch holds: the same bits for any cache, backend, number of workers, and step to resume at. The trainer normalises, and computes losses
and metrics; the `on_bad` callback (`quarantine.Quarantine`) decides what a bad sample means for the run.

Decoded samples can stay in three places (`data.cache`):
- device, host (`resident`): each split is decoded once, when it is first used, and stays; a batch is a gather.
- none (`streamed`): a step decodes its own samples and keeps none, so each is decoded once an epoch whatever the order. Threads read
  encoded row groups ahead and keep them within `memory_bytes` (`stream`). With a `shuffle_window` this memory holds the few groups of each
  lane's window, and a group is read once an epoch. Without a window every step reads groups from all over the data set, which is only
  cheap while all of it fits.
"""

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataio.ahead import batches_ahead
from dataio.batch import Batch, Ids
from dataio.codecs.codec import Codec, Row
from dataio.codecs.device import exact_device, upload
from dataio.codecs.make import make_codec, row_of
from dataio.config import DEVICE_FRACTION, DataConfig
from dataio.fetch import Fetched, Fetches, Supply
from dataio.length_order import LengthOrder
from dataio.order import Order
from dataio.parquet import Dataset
from dataio.quarantine import BadSample
from dataio.resident import Resident
from dataio.streamed import Streamed
from dataio.texts import padded

BLOCK_BYTES = 2 * 2**20
"""Where samples stay in the host's memory, steps are made in blocks of about this size, which its caches hold: for a small batch the calls
cost more than the bytes. An image of 32 px takes 2.3 us in single batches of 100, and 1.2 us in blocks of six."""
GPU_BLOCK_BYTES = 16 * 2**20
"""The same where samples stay on the device: there a block costs the host the same few launches whatever its size, and no cache limits
it. It is ten steps of 512 images of 32 px."""
TRAIN_PART = 0.75
"""Fraction of the memory for encoded row groups that training gets; evaluation, which reads in order, gets the rest."""
STEPS_PLANNED = 64
"""Steps whose row groups are planned in advance where no window limits the useful number."""
BAD = -1
"""Label of a sample that could not be decoded, or that has none: it has no weight in the loss and is not counted in evaluation. It is the
`missing` value of schema.Target for labels; targets of other kinds hold theirs."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Tokens:
    """A count of them."""

    given: int = 0
    """Those of texts."""
    padded: int = 0
    """With those that pad a batch."""


class Loader:
    """Batches of one worker. `order` is that of the training split; `virtual_ranks` are those this worker carries.

    `on_bad` is called once for each bad sample, from whatever thread meets it; its exceptions surface where batches are consumed.
    `memory_bytes` is the host memory that this worker may use. The default suits small data sets; who knows the machine says how much.
    `on_read_wait(True)` is called in the consumer's thread about every second in which the next batch waits for a read of the data, and
    `on_read_wait(False)` when that wait is over.
    Only one thread may ask for batches.

    For a second stream beside the first: `split` is the one to train on, `row` the form of the first one's samples, and `device_fraction`
    what of the free device memory it may take.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        order: Order,
        virtual_ranks: range,
        device: torch.device,
        seed: int,
        threads: int = 1,
        on_bad: Callable[[BadSample], None],
        memory_bytes: int = 1 << 30,
        on_read_wait: Callable[[bool], None] = lambda waits: None,
        split: str = "train",
        row: Row | None = None,
        device_fraction: float = DEVICE_FRACTION,
    ) -> None:
        assert order.count == dataset.split(split).count, (order.count, dataset.split(split).count)
        assert 0 <= virtual_ranks.start < virtual_ranks.stop <= order.virtual_ranks, virtual_ranks
        self.targets, texts = dataset.manifest.targets, dataset.manifest.texts
        self.row = row or row_of(dataset.manifest, config)
        self._split = split
        self.device = exact_device(device)
        self._dataset, self._order, self._virtual_ranks, self._seed = dataset, order, virtual_ranks, seed
        self._memory_bytes, self._on_read_wait = memory_bytes, on_read_wait

        samples = sum(split.count for split in dataset.manifest.splits.values())
        values_bytes = sum(target.blank(1).nbytes for target in self.targets)
        decoded_bytes = samples * (self.row.nbytes + values_bytes)
        self.cache = choose_cache(
            config,
            self.device,
            decoded_bytes=decoded_bytes,
            memory_bytes=self._memory_bytes,
            free_device_bytes=torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0,
            device_fraction=device_fraction,
        )
        step_samples = order.batch_per_virtual_rank * len(virtual_ranks)
        self._steps_a_block = steps_a_block(self.cache, step_samples * self.row.nbytes)
        self._new_codec: Callable[[], Codec] = partial(
            make_codec,
            self.row,
            config,
            texts=texts,
            device=self.device,
            cache=self.cache,
            threads=threads,
            batch_size=step_samples * self._steps_a_block,
            table_bytes=max(0, self._memory_bytes - decoded_bytes) // 4 if self.cache == "host" else 0,
        )
        self.backend_name = self._new_codec().name
        self._supplies: dict[tuple[str, str], Supply] = {}
        self._report = _Once(on_bad)
        self._side_stream = _side_stream(self.device)
        self.wait_seconds = 0.0
        """Total time that the consumer of `train` waited."""
        self.tokens = Tokens()
        """Of the texts that `train` has yielded; 0 of images."""
        self.evaluation_wait_seconds = 0.0
        encoded_bytes = sum(shard.size_bytes for shard in dataset.manifest.splits[split].shards)
        if self.cache == "none" and order.window == 0 and encoded_bytes > self._memory_bytes * TRAIN_PART:
            _log.warning(
                "data.shuffle_window=0 shuffles all of a data set of %.1f GB, of which %.1f GB fit in memory: each sample costs a row "
                "group's read; set --data.shuffle-window (e.g. 16384)",
                encoded_bytes / 1e9,
                self._memory_bytes * TRAIN_PART / 1e9,
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width) of a row of images, (tokens,) of a row of texts: the most that there are."""
        return self.row.shape[:2]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a row of images."""
        height, width, _ = self.row.shape
        return height, width

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the only target that has any."""
        return self._dataset.manifest.classes

    @property
    def decode_seconds(self) -> float:
        """Time spent on reading and decoding, in any thread; where samples are cached, all of it is at the start."""
        return sum(supply.decode_seconds for supply in self._supplies.values())

    @property
    def memory_held_bytes(self) -> int:
        """Memory of samples, decoded (on the host or the device) or encoded (row groups held or being read), over all splits in use."""
        return sum(supply.held_bytes for supply in self._supplies.values())

    @property
    def groups_read(self) -> int:
        """Row groups read so far; a group read twice counts twice."""
        return sum(supply.groups_read for supply in self._supplies.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of those row groups in memory."""
        return sum(supply.bytes_read for supply in self._supplies.values())

    @property
    def read_wait_seconds(self) -> float:
        """Time that the making of batches waited for reads. Only a streamed data set has any, and only where storage is slow."""
        return sum(supply.read_wait_seconds for supply in self._supplies.values())

    def load(self, *splits: str, on_group: Callable[[], None] = lambda: None) -> None:
        """Decodes these splits now if they are to stay in memory; otherwise a split is decoded when it is first used. `on_group` is called
        after each row group."""
        for split in splits:
            self._supply(split, "train", on_group)

    def train(self, start_step: int, stop_step: int) -> Generator[tuple[Batch, ...], None, None]:
        """Yields global steps start..stop-1: for each step a tuple with a Batch for each carried virtual rank, in their order.

        A background thread prepares ahead.STEPS_AHEAD blocks of steps. It ends with the iterator, so close the iterator
        (`contextlib.closing`) when leaving early. One training iterator at a time.
        """
        supply = self._supply(self._split, "train")

        def wait(seconds: float) -> None:
            self.wait_seconds += seconds

        def plan() -> Iterator[tuple[_Block, Ids]]:
            step = start_step
            while step < stop_step:
                epoch, step_in_epoch = divmod(step, self._order.steps_per_epoch)
                count = min(self._steps_a_block, self._order.steps_per_epoch - step_in_epoch, stop_step - step)
                steps = range(step_in_epoch, step_in_epoch + count)
                lanes = [self._order.lane(epoch, steps, virtual_rank) for virtual_rank in self._virtual_ranks]
                parts = list(zip(*lanes, strict=True))  # for each step, the ids of each virtual rank
                yield (step, epoch, parts), np.concatenate([ids for each in parts for ids in each])
                step += count

        window_steps = -(-self._order.window // self._order.batch_per_virtual_rank)
        fetches = supply.fetch(plan(), horizon=2 * window_steps + STEPS_PLANNED)
        with closing(self._ahead((self._block(supply.codec, fetched) for fetched in fetches), wait, "train", fetches, supply)) as ahead:
            yield from self._counted(ahead, self._order) if isinstance(self._order, LengthOrder) else ahead

    def _counted(self, steps: Iterator[tuple[Batch, ...]], order: LengthOrder) -> Iterator[tuple[Batch, ...]]:
        for batches in steps:
            self.tokens.given += sum(int(order.lengths[batch.ids].sum()) for batch in batches)
            self.tokens.padded += sum(batch.samples.shape[0] * batch.samples.shape[1] for batch in batches)
            yield batches

    def evaluate(self, split: str, ids: range | Ids, batch_size: int) -> Generator[Batch, None, None]:
        """Yields the given samples of a split in the given order, without augmentation, `batch_size` at a time (the last batch may be
        smaller). Raises ValueError for a split that the data set does not have."""
        supply = self._supply(split, "evaluate")
        wanted, lengths = np.asarray(ids, dtype=np.int64), self._lengths(split)

        def wait(seconds: float) -> None:
            self.evaluation_wait_seconds += seconds

        def plan() -> Iterator[tuple[int, Ids]]:
            for number, start in enumerate(range(0, len(wanted), batch_size)):
                yield number, wanted[start : start + batch_size]

        fetches = supply.fetch(plan(), horizon=STEPS_PLANNED)

        def batches() -> Iterator[list[tuple[Batch, ...]]]:
            for got in fetches:
                samples = supply.codec.batch(got.store, got.rows, got.ids, seed=self._seed, epoch=None)
                batch = Batch(
                    samples=samples if lengths is None else samples[:, : padded(int(lengths[got.ids].max(initial=1)))],
                    targets={name: upload(column, self.device) for name, column in got.targets.items()},
                    ids=got.ids,
                    epoch=0,
                    step=got.tag,
                    virtual_rank=0,
                )
                yield [(batch,)]

        with closing(self._ahead(batches(), wait, "evaluate", fetches, supply)) as ahead:
            for (batch,) in ahead:
                yield batch

    def padding_least(self, split: str, ids: range) -> range | Ids:
        """These samples of a split in the order in which batches of them pad least: texts by their length, images as they are. Texts that
        are streamed stay as they are too: they are read in order."""
        lengths = self._lengths(split)
        if lengths is None or self.cache == "none":
            return ids
        return ids.start + np.argsort(lengths[ids.start : ids.stop], kind="stable").astype(np.int64)

    def _block(self, codec: Codec, got: "Fetched[_Block]") -> list[tuple[Batch, ...]]:
        """Makes all steps and all carried virtual ranks at once: one gather, and one upload of each target, then slices."""
        first_step, epoch, steps = got.tag
        samples = codec.batch(got.store, got.rows, got.ids, seed=self._seed, epoch=epoch)
        targets = {name: upload(column, self.device) for name, column in got.targets.items()}
        block, start = [], 0
        for step, parts in enumerate(steps, start=first_step):
            batches = []
            some = samples[:, : self._order.width(step)] if isinstance(self._order, LengthOrder) else samples
            for virtual_rank, part in zip(self._virtual_ranks, parts, strict=True):
                cut = slice(start, start + len(part))
                start += len(part)
                batches.append(
                    Batch(
                        samples=some[cut],
                        targets={name: column[cut] for name, column in targets.items()},
                        ids=part,
                        epoch=epoch,
                        step=step,
                        virtual_rank=virtual_rank,
                    )
                )
            block.append(tuple(batches))
        return block

    def _lengths(self, split: str) -> npt.NDArray[np.int32] | None:
        """(count,): the tokens of each text of a split; None for images."""
        found = self._dataset.split(split)
        return found.lengths() if found.holds_texts else None

    def _supply(self, split_name: str, purpose: str, on_group: Callable[[], None] = lambda: None) -> Supply:
        # With streaming, each purpose has its own supply and codec, because training's thread continues while evaluation reads.
        key = (split_name, purpose if self.cache == "none" else "")
        if key not in self._supplies:
            split, codec = self._dataset.split(split_name), self._new_codec()
            part = TRAIN_PART if purpose == "train" else 1 - TRAIN_PART
            self._supplies[key] = (
                Streamed(split, codec, self._report, int(self._memory_bytes * part))
                if self.cache == "none"
                else Resident(split, codec, self._report, self.device if self.cache == "device" else torch.device("cpu"), on_group)
            )
        return self._supplies[key]

    def _ahead(
        self,
        blocks: Iterator[list[tuple[Batch, ...]]],
        wait: Callable[[float], None],
        name: str,
        fetches: Fetches[Any],
        supply: Supply,
    ) -> Generator[tuple[Batch, ...], None, None]:
        told = False

        def on_idle() -> None:
            nonlocal told
            if supply.waits_for_read:
                told = True
                self._on_read_wait(True)

        def on_wait(seconds: float) -> None:
            nonlocal told
            if told:
                told = False
                self._on_read_wait(False)
            wait(seconds)

        return batches_ahead(
            blocks,
            side=self._side_stream,
            name=f"loader-{name}",
            on_wait=on_wait,
            on_idle=on_idle,
            on_close=fetches.stop,
            on_end=fetches.close,
        )


def choose_cache(
    config: DataConfig,
    device: torch.device,
    *,
    decoded_bytes: int,
    memory_bytes: int,
    free_device_bytes: int,
    device_fraction: float = DEVICE_FRACTION,
) -> str:
    """Resolves `data.cache` to "device", "host" or "none". Without a GPU the device's memory is the host's."""
    if config.cache != "auto":
        return "host" if config.cache == "device" and device.type == "cpu" else config.cache
    if device.type != "cpu" and config.backend != "numpy" and decoded_bytes <= free_device_bytes * device_fraction:
        return "device"
    return "host" if decoded_bytes <= memory_bytes else "none"


def steps_a_block(cache: str, step_bytes: int) -> int:
    """How many steps of `step_bytes` of decoded samples are made at once, for a resolved cache. It changes no batch. Without a cache a step
    is made by itself: it is decoded first, which costs more than the calls."""
    block_bytes = {"device": GPU_BLOCK_BYTES, "host": BLOCK_BYTES, "none": 0}[cache]
    return max(1, block_bytes // step_bytes)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


_Block = tuple[int, int, Sequence[Sequence[Ids]]]
"""(first step, epoch, for each step the ids of each carried virtual rank); all steps are of one epoch"""


class _Once:
    """Passes each bad sample on once, from whatever thread meets it."""

    def __init__(self, on_bad: Callable[[BadSample], None]) -> None:
        self._on_bad = on_bad
        self._known: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __call__(self, bad: BadSample) -> None:
        with self._lock:
            if (bad.split, bad.sample_id) in self._known:
                return
            self._known.add((bad.split, bad.sample_id))
        self._on_bad(bad)
