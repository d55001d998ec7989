"""From a converted data set to batches on the device: order, decode, augment and backend put together, two steps ahead of training.

Called by the trainer's worker (`train`) and by evaluation (`evaluate`). What a batch holds follows from order and augment alone: the same
bits whatever the cache, the backend, the number of workers, and the step that training resumed at. Normalisation, losses and metrics are
the trainer's; what a bad sample means for the run is decided by whoever is called back (`quarantine.Quarantine`).

Three places for decoded images (`data.cache`):
- device, host: each split is decoded once, when it is first used, and stays; a batch is a gather.
- none: a step decodes its own samples and keeps no pixels, so each image is decoded once an epoch whatever the order. What is kept are
  encoded row groups within `memory_bytes`, read ahead by threads (`stream`): with a `shuffle_window` that holds the few groups of each
  lane's window, a group is read once an epoch; without a window every step touches groups all over the data set, which is only cheap while
  all of it fits.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dataio.batch import Batch, Ids
from dataio.codecs.image import augment
from dataio.codecs.image.backends import Backend, Store, choose_backend, exact_device, gather, make_backend, upload
from dataio.codecs.image.decode import Decoded, Decoder, decode_split
from dataio.config import DataConfig
from dataio.manifest import image_size_of
from dataio.order import Order
from dataio.parquet import Dataset, Split
from dataio.quarantine import BadSample
from dataio.stream import Reading, Shelf

Labels = npt.NDArray[np.int64]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

STEPS_AHEAD = 2
"""Steps, or blocks of steps, that are made in advance."""
BLOCK_BYTES = 2 * 2**20
"""Where images stay in memory, steps are made in blocks of about these pixels: of a small batch the calls cost more than the pixels, 2.3 us
an image of 32 px in batches of 100 alone and 1.2 us six at a time."""
DEVICE_FRACTION = 0.4
"""Part of the free device memory that decoded images may take; the rest is the model's, its activations' and the allocator's."""
TRAIN_PART = 0.75
"""Part of the memory for encoded row groups that is training's; evaluation, which reads in order, gets the rest."""
STEPS_PLANNED = 64
"""Steps whose row groups are known in advance, where no window says how far it is of use."""
BAD = -1
"""Label of a sample that could not be decoded: no weight in the loss, not counted in evaluation."""

_log = logging.getLogger(__name__)


class Loader:
    """Batches of one worker. `order` is the training split's; `virtual_ranks` are those this worker carries.

    `on_bad` is called once a bad sample, from whatever thread meets it; what it raises surfaces where batches are consumed.
    `memory_bytes` is what this worker may use of the host's memory, by default half of what is available.
    Batches are asked for from one thread.
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
        memory_bytes: int | None = None,
    ) -> None:
        assert order.count == dataset.split("train").count, (order.count, dataset.split("train").count)
        assert 0 <= virtual_ranks.start < virtual_ranks.stop <= order.virtual_ranks, virtual_ranks
        self.image_size = image_size_of(dataset.manifest, config)
        self.classes = dataset.manifest.classes
        self.device = exact_device(device)
        self._dataset, self._config, self._order, self._virtual_ranks = dataset, config, order, virtual_ranks
        self._seed, self._threads, self._on_bad = seed, threads, on_bad
        self._memory_bytes = available_memory_bytes() // 2 if memory_bytes is None else memory_bytes

        height, width = self.image_size
        samples = sum(split.count for split in dataset.manifest.splits.values())
        free_bytes = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        decoded_bytes = samples * (height * width * 3 + 8)
        self.cache = choose_cache(
            config,
            self.device,
            decoded_bytes=decoded_bytes,
            memory_bytes=self._memory_bytes,
            free_device_bytes=free_bytes,
        )
        step_images = order.batch_per_virtual_rank * len(virtual_ranks)
        self._steps_a_block = 1 if self.cache == "none" else max(1, BLOCK_BYTES // (step_images * height * width * 3))
        self.backend_name = choose_backend(config.backend, self.device, self.cache)
        self._backend: Backend = make_backend(
            self.backend_name,
            height=height,
            width=width,
            pad=config.pad,
            batch_size=step_images * self._steps_a_block,
            device=self.device,
            threads=threads,
            table_bytes=max(0, self._memory_bytes - decoded_bytes) // 4 if self.cache == "host" else 0,
        )
        self._sources: dict[tuple[str, str], _Source] = {}
        self._reported: set[tuple[str, int]] = set()
        self._reporting = threading.Lock()
        self._side_stream = _side_stream(self.device)
        self.wait_seconds = 0.0
        """Total time that `train` let its consumer wait."""
        self.evaluation_wait_seconds = 0.0
        encoded_bytes = sum(shard.size_bytes for shard in dataset.manifest.splits["train"].shards)
        if self.cache == "none" and order.window == 0 and encoded_bytes > self._memory_bytes * TRAIN_PART:
            _log.warning(
                "data.shuffle_window=0 shuffles all of a data set of %.1f GB, of which %.1f GB fit in memory: each sample costs a row "
                "group's read; set --data.shuffle-window (e.g. 16384)",
                encoded_bytes / 1e9,
                self._memory_bytes * TRAIN_PART / 1e9,
            )

    @property
    def decode_seconds(self) -> float:
        """Time spent on reading and decoding, by whatever thread: all of it at the start where images are cached."""
        return sum(source.decode_seconds for source in self._sources.values())

    @property
    def memory_held_bytes(self) -> int:
        """Of images, decoded (on the host or the device) or encoded (row groups held or being read), over all splits in use."""
        return sum(source.held_bytes for source in self._sources.values())

    @property
    def groups_read(self) -> int:
        """Row groups read so far; one that is read again counts again."""
        return sum(source.groups_read for source in self._sources.values())

    @property
    def bytes_read(self) -> int:
        """What memory those row groups took."""
        return sum(source.bytes_read for source in self._sources.values())

    @property
    def read_wait_seconds(self) -> float:
        """Time for which the making of batches waited for reads: of a streamed data set, and no part of it unless storage is slow."""
        return sum(source.read_wait_seconds for source in self._sources.values())

    def load(self, *splits: str) -> None:
        """Decodes these splits now, if they are to stay in memory; without it that happens when they are first used."""
        for split in splits:
            self._source(split, "train")

    def train(self, start_step: int, stop_step: int) -> Generator[tuple[Batch, ...], None, None]:
        """Global steps start..stop-1: a tuple a step, with a Batch for each carried virtual rank, in their order.

        A background thread prepares STEPS_AHEAD blocks of steps; it ends with the iterator, so close that (`contextlib.closing`) when
        leaving early.
        One training iterator at a time.
        """
        source = self._source("train", "train")

        def wait(seconds: float) -> None:
            self.wait_seconds += seconds

        def plan() -> Iterator[tuple[_Block, Ids]]:
            step = start_step
            while step < stop_step:
                epoch, step_in_epoch = divmod(step, self._order.steps_per_epoch)
                count = min(self._steps_a_block, self._order.steps_per_epoch - step_in_epoch, stop_step - step)
                steps = range(step_in_epoch, step_in_epoch + count)
                lanes = [self._order.lane(epoch, steps, virtual_rank) for virtual_rank in self._virtual_ranks]
                parts = list(zip(*lanes, strict=True))  # of each step, the ids of each virtual rank
                yield (step, epoch, parts), np.concatenate([ids for each in parts for ids in each])
                step += count

        window_steps = -(-self._order.window // self._order.batch_per_virtual_rank)
        fetches = source.fetch(plan(), horizon=2 * window_steps + STEPS_PLANNED)
        with closing(self._ahead((self._block(*fetched) for fetched in fetches), wait, "train", fetches)) as ahead:
            yield from ahead

    def evaluate(self, split: str, ids: range | Ids, batch_size: int) -> Generator[Batch, None, None]:
        """The given samples of a split in the given order, as they are, `batch_size` at a time (the last batch may be smaller)."""
        source = self._source(split, "evaluate")
        wanted = np.asarray(ids, dtype=np.int64)

        def wait(seconds: float) -> None:
            self.evaluation_wait_seconds += seconds

        def plan() -> Iterator[tuple[int, Ids]]:
            for number, start in enumerate(range(0, len(wanted), batch_size)):
                yield number, wanted[start : start + batch_size]

        fetches = source.fetch(plan(), horizon=STEPS_PLANNED)

        def batches() -> Iterator[list[tuple[Batch, ...]]]:
            for number, chosen, images, rows, labels in fetches:
                pixels = gather(images, rows, self.device).permute(0, 3, 1, 2)
                batch = Batch(
                    samples=pixels, targets={"label": upload(labels, self.device)}, ids=chosen, epoch=0, step=number, virtual_rank=0
                )
                yield [(batch,)]

        with closing(self._ahead(batches(), wait, "evaluate", fetches)) as ahead:
            for (batch,) in ahead:
                yield batch

    def _block(self, of: "_Block", ids: Ids, images: Store, rows: Ids, labels: Labels) -> list[tuple[Batch, ...]]:
        """All steps and all carried virtual ranks at once: one gather, then cut."""
        first_step, epoch, steps = of
        drawn = augment.draw(seed=self._seed, epoch=epoch, ids=ids, pad=self._config.pad, flip=self._config.flip)
        pixels = self._backend.batch(images, rows, drawn).permute(0, 3, 1, 2)  # (n, 3, H, W) uint8, channels_last by its strides
        device_labels = upload(labels, self.device)
        block, start = [], 0
        for step, parts in enumerate(steps, start=first_step):
            batches = []
            for virtual_rank, part in zip(self._virtual_ranks, parts, strict=True):
                cut = slice(start, start + len(part))
                start += len(part)
                batches.append(
                    Batch(
                        samples=pixels[cut],
                        targets={"label": device_labels[cut]},
                        ids=part,
                        epoch=epoch,
                        step=step,
                        virtual_rank=virtual_rank,
                    )
                )
            block.append(tuple(batches))
        return block

    def _source(self, split_name: str, purpose: str) -> "_Source":
        # Streaming keeps a source for each purpose, as training's thread goes on while evaluation reads.
        key = (split_name, purpose if self.cache == "none" else "")
        if key not in self._sources:
            split = self._dataset.split(split_name)
            part = TRAIN_PART if purpose == "train" else 1 - TRAIN_PART
            self._sources[key] = (
                _Streamed(split, self._decoder(), self._report, int(self._memory_bytes * part))
                if self.cache == "none"
                else _Resident(split, self._decoder(), self._report, self.device if self.cache == "device" else torch.device("cpu"))
            )
        return self._sources[key]

    def _decoder(self) -> Decoder:
        height, width = self.image_size
        return Decoder(
            height=height,
            width=width,
            fit=self._config.fit,
            threads=self._threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            max_pixels=self._config.max_image_pixels,
        )

    def _report(self, bad: BadSample) -> None:
        with self._reporting:
            if (bad.split, bad.sample_id) in self._reported:
                return
            self._reported.add((bad.split, bad.sample_id))
        self._on_bad(bad)

    def _ahead(
        self, items: Iterator[list[tuple[Batch, ...]]], wait: Callable[[float], None], name: str, fetches: "_Fetches[Any]"
    ) -> Generator[tuple[Batch, ...], None, None]:
        """`items` from a thread of its own; on a GPU that thread works on a side stream, and the consumer's stream waits for its event."""
        side = self._side_stream
        if side is None:
            made = run_ahead(items, depth=STEPS_AHEAD, name=f"loader-{name}", on_wait=wait, on_close=fetches.stop, on_end=fetches.close)
            with closing(made) as blocks:
                for block in blocks:
                    yield from block
            return
        side.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # for what was put on the device so far: cached images, the backend's tables

        def on_side_stream() -> Iterator[tuple[list[tuple[Batch, ...]], torch.cuda.Event]]:
            while True:
                with torch.cuda.device(self.device), torch.cuda.stream(side):
                    block = next(items, None)
                    if block is None:
                        return
                    event = side.record_event()
                yield block, event

        made_aside = run_ahead(
            on_side_stream(), depth=STEPS_AHEAD, name=f"loader-{name}", on_wait=wait, on_close=fetches.stop, on_end=fetches.close
        )
        with closing(made_aside) as ahead:
            for block, event in ahead:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(event)
                for batches in block:
                    for batch in batches:
                        batch.samples.record_stream(stream)
                        for target in batch.targets.values():
                            target.record_stream(stream)
                yield from block


def choose_cache(config: DataConfig, device: torch.device, *, decoded_bytes: int, memory_bytes: int, free_device_bytes: int) -> str:
    """What `data.cache` means here: "device", "host" or "none". Without a GPU the device's memory is the host's."""
    if config.cache != "auto":
        return "host" if config.cache == "device" and device.type == "cpu" else config.cache
    if device.type != "cpu" and config.backend != "numpy" and decoded_bytes <= free_device_bytes * DEVICE_FRACTION:
        return "device"
    return "host" if decoded_bytes <= memory_bytes else "none"


def available_memory_bytes() -> int:
    """What this process could still allocate: the machine's available memory, or less where a control group sets a limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(int(text) - int(used.read_text()), 0))
    return available


def run_ahead(
    items: Iterator[T],
    *,
    depth: int,
    name: str,
    on_wait: Callable[[float], None],
    on_close: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """The same items, made by a thread that keeps at most `depth` of them ready.

    What `items` raises is raised here, after the items before it; `on_wait` gets the seconds waited for each. The thread ends when the
    items do, and when this generator is closed: then `on_close` tells whatever the thread waits for, and `on_end` is called after it.
    """
    ready: deque[T] = deque()
    changed = threading.Condition()
    closed = ended = False
    failure: BaseException | None = None

    def work() -> None:
        nonlocal ended, failure
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: closed or len(ready) < depth)
                    if closed:
                        return
                item = next(items)
                with changed:
                    ready.append(item)
                    changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            failure = error
        finally:
            with changed:
                ended = True
                changed.notify_all()

    # A daemon, so that an iterator that nobody closed does not keep the process from exiting.
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            asked = time.perf_counter()
            with changed:
                changed.wait_for(lambda: ready or ended)
                item = ready.popleft() if ready else None
                changed.notify_all()
            on_wait(time.perf_counter() - asked)
            if item is None:
                break
            yield item
        if failure is not None:
            raise failure
    finally:
        with changed:
            closed = True
            changed.notify_all()
        on_close()
        thread.join()
        on_end()


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


_Block = tuple[int, int, Sequence[Sequence[Ids]]]
"""(first step, epoch, of each step the ids of each carried virtual rank); all of one epoch"""


class _Fetches(Protocol[T_co]):
    """What a plan wants, step after step: (tag, ids, a store, the rows of it that are these samples, their labels or BAD)"""

    def __iter__(self) -> Iterator[tuple[T_co, Ids, Store, Ids, Labels]]: ...

    def stop(self) -> None:
        """Ends the iteration, from another thread."""
        ...

    def close(self) -> None:
        """Ends what works for it; after the iteration."""
        ...


class _Source(Protocol):
    """Where the pixels of a split come from."""

    decode_seconds: float

    @property
    def held_bytes(self) -> int: ...
    @property
    def groups_read(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def read_wait_seconds(self) -> float: ...

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> _Fetches[T]:
        """Begins to get what `plan` wants, (tag, ids) a step; no more than `horizon` steps of it are asked for in advance."""
        ...


class _Resident:
    """All decoded images of a split, on the host or the device."""

    def __init__(self, split: Split, decoder: Decoder, report: Callable[[BadSample], None], device: torch.device) -> None:
        started = time.perf_counter()
        self._labels = np.empty(split.count, np.int64)

        def on_bad(bad: BadSample) -> None:
            self._labels[bad.sample_id] = BAD
            report(bad)

        with decoder:
            images = decode_split(split, decoder, on_bad=on_bad, labels=self._labels)  # (count, H, W, 3) uint8
        self.held_bytes = images.nbytes
        self.groups_read = split.groups
        self.bytes_read = sum(split.group_bytes(group) for group in range(split.groups))
        self.read_wait_seconds = 0.0  # all of it is in decode_seconds
        self._images: Store = images
        if device.type == "cuda":
            self._images = torch.from_numpy(images).to(device)
            torch.cuda.synchronize(device)  # once: other streams read it from here on
        self.decode_seconds = time.perf_counter() - started

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> "_ResidentFetches[T]":
        return _ResidentFetches(self._images, self._labels, plan)


class _ResidentFetches(Generic[T]):
    def __init__(self, images: Store, labels: Labels, plan: Iterable[tuple[T, Ids]]) -> None:
        self._images, self._labels, self._plan = images, labels, plan

    def __iter__(self) -> Iterator[tuple[T, Ids, Store, Ids, Labels]]:
        for tag, ids in self._plan:
            yield tag, ids, self._images, ids, self._labels[ids]

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Streamed:
    """Decodes what is asked for, each time anew, out of row groups that are read ahead and held within `memory_bytes`."""

    def __init__(self, split: Split, decoder: Decoder, report: Callable[[BadSample], None], memory_bytes: int) -> None:
        self.shelf = Shelf(split, memory_bytes)
        self.decoder, self.report = decoder, report
        self.decode_seconds = 0.0
        self._pixels = np.empty((0, decoder.height, decoder.width, 3), np.uint8)

    def decode(self, encoded: list[npt.NDArray[np.uint8]]) -> Decoded:
        """The images are valid until the next call: a backend has gathered them by then."""
        if len(encoded) > len(self._pixels):
            self._pixels = np.empty((len(encoded), *self._pixels.shape[1:]), np.uint8)
        return self.decoder.decode(encoded, out=self._pixels)

    @property
    def held_bytes(self) -> int:
        return self.shelf.held_bytes

    @property
    def groups_read(self) -> int:
        return self.shelf.groups_read

    @property
    def bytes_read(self) -> int:
        return self.shelf.bytes_read

    @property
    def read_wait_seconds(self) -> float:
        return self.shelf.wait_seconds

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> "_StreamedFetches[T]":
        return _StreamedFetches(self, self.shelf.read(plan, horizon=horizon))


class _StreamedFetches(Generic[T]):
    def __init__(self, source: _Streamed, reading: Reading[T]) -> None:
        self._source, self._reading = source, reading

    def __iter__(self) -> Iterator[tuple[T, Ids, Store, Ids, Labels]]:
        source = self._source
        started = time.perf_counter()
        source.decoder.warm_up()  # while the first row groups are read
        for samples in self._reading:
            decoded = source.decode(samples.encoded)
            for place, reason in decoded.bad:
                samples.labels[place] = BAD
                bad = BadSample(key=samples.keys[place], reason=reason, split=source.shelf.split.name, sample_id=int(samples.ids[place]))
                source.report(bad)
            source.decode_seconds += time.perf_counter() - started
            yield samples.tag, samples.ids, decoded.images, np.arange(len(samples.ids), dtype=np.int64), samples.labels
            started = time.perf_counter()

    def stop(self) -> None:
        self._reading.stop()

    def close(self) -> None:
        self._reading.close()
