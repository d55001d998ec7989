"""From a converted data set to batches on the device: order, decode, augment and backend put together, two steps ahead of training.

Called by the trainer's worker (`train`) and by evaluation (`evaluate`). What a batch holds follows from order and augment alone: the same
bits whatever the cache, the backend, the number of workers, and the step that training resumed at. Normalisation, losses and metrics are
the trainer's; what a bad sample means for the run is decided by whoever is called back (`quarantine.Quarantine`).

Three places for decoded images (`data.cache`):
- device, host: each split is decoded once, when it is first used, and stays; a batch is a gather.
- none: a step decodes its own samples and keeps no pixels, so each image is decoded once an epoch whatever the order. What is kept are
  encoded row groups, the least recently used dropped beyond `memory_bytes`: with a `shuffle_window` that holds the few groups of each
  lane's window, a group is read once an epoch; without a window every step touches groups all over the data set, which is only cheap while
  all of it fits.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dataio import augment
from dataio.backends import Backend, Store, choose_backend, exact_device, gather, make_backend, upload
from dataio.config import DataConfig
from dataio.decode import Decoder, decode_split
from dataio.manifest import Manifest
from dataio.order import Order
from dataio.parquet import Dataset, RowGroup, Split
from dataio.quarantine import BadSample

Ids = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]
T = TypeVar("T")

STEPS_AHEAD = 2
DEVICE_FRACTION = 0.4
"""Part of the free device memory that decoded images may take; the rest is the model's, its activations' and the allocator's."""
TRAIN_PART = 0.75
"""Part of the memory for encoded row groups that is training's; evaluation, which reads in order, gets the rest."""
BAD = -1
"""Label of a sample that could not be decoded: no weight in the loss, not counted in evaluation."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one virtual rank sees in one step; n may be 0 in the last step of an epoch."""

    images: torch.Tensor  # (n, 3, H, W) uint8 channels_last, on the device
    labels: torch.Tensor  # (n,) int64 on the device; -1 where the sample is bad and its image zeros
    ids: Ids  # (n,)
    epoch: int
    step: int
    """Global step; in evaluation the batch's number."""
    virtual_rank: int


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
        self.cache = choose_cache(
            config,
            self.device,
            decoded_bytes=samples * (height * width * 3 + 8),
            memory_bytes=self._memory_bytes,
            free_device_bytes=free_bytes,
        )
        self.backend_name = choose_backend(config.backend, self.device, self.cache)
        self._backend: Backend = make_backend(
            self.backend_name,
            height=height,
            width=width,
            pad=config.pad,
            batch_size=order.batch_per_virtual_rank * len(virtual_ranks),
            device=self.device,
            threads=threads,
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

    def load(self, *splits: str) -> None:
        """Decodes these splits now, if they are to stay in memory; without it that happens when they are first used."""
        for split in splits:
            self._source(split, "train")

    def train(self, start_step: int, stop_step: int) -> Generator[tuple[Batch, ...], None, None]:
        """Global steps start..stop-1: a tuple a step, with a Batch for each carried virtual rank, in their order.

        A background thread prepares STEPS_AHEAD steps; it ends with the iterator, so close that (`contextlib.closing`) when leaving early.
        One training iterator at a time.
        """
        source = self._source("train", "train")

        def wait(seconds: float) -> None:
            self.wait_seconds += seconds

        steps = (self._step(source, step) for step in range(start_step, stop_step))
        yield from self._ahead(steps, wait, "train")

    def evaluate(self, split: str, ids: range | Ids, batch_size: int) -> Generator[Batch, None, None]:
        """The given samples of a split in the given order, as they are, `batch_size` at a time (the last batch may be smaller)."""
        source = self._source(split, "evaluate")
        wanted = np.asarray(ids, dtype=np.int64)

        def wait(seconds: float) -> None:
            self.evaluation_wait_seconds += seconds

        def batches() -> Iterator[tuple[Batch, ...]]:
            for number, start in enumerate(range(0, len(wanted), batch_size)):
                chosen = wanted[start : start + batch_size]
                images, rows, labels = source.fetch(chosen)
                pixels = gather(images, rows, self.device).permute(0, 3, 1, 2)
                yield (Batch(images=pixels, labels=upload(labels, self.device), ids=chosen, epoch=0, step=number, virtual_rank=0),)

        with closing(self._ahead(batches(), wait, "evaluate")) as ahead:
            for (batch,) in ahead:
                yield batch

    def _step(self, source: "_Source", step: int) -> tuple[Batch, ...]:
        """All carried virtual ranks at once: one decode, one gather, then cut."""
        epoch, step_in_epoch = divmod(step, self._order.steps_per_epoch)
        parts = [self._order.samples(epoch, step_in_epoch, virtual_rank) for virtual_rank in self._virtual_ranks]
        ids = np.concatenate(parts)
        images, rows, labels = source.fetch(ids)
        drawn = augment.draw(seed=self._seed, epoch=epoch, ids=ids, pad=self._config.pad, flip=self._config.flip)
        pixels = self._backend.batch(images, rows, drawn).permute(0, 3, 1, 2)  # (n, 3, H, W) uint8, channels_last by its strides
        device_labels = upload(labels, self.device)
        batches, start = [], 0
        for virtual_rank, part in zip(self._virtual_ranks, parts, strict=True):
            cut = slice(start, start + len(part))
            start += len(part)
            batches.append(
                Batch(images=pixels[cut], labels=device_labels[cut], ids=part, epoch=epoch, step=step, virtual_rank=virtual_rank)
            )
        return tuple(batches)

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
        self, items: Iterator[tuple[Batch, ...]], wait: Callable[[float], None], name: str
    ) -> Generator[tuple[Batch, ...], None, None]:
        """`items` from a thread of its own; on a GPU that thread works on a side stream, and the consumer's stream waits for its event."""
        side = self._side_stream
        if side is None:
            yield from run_ahead(items, depth=STEPS_AHEAD, name=f"loader-{name}", on_wait=wait)
            return
        side.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # for what was put on the device so far: cached images, the backend's tables

        def on_side_stream() -> Iterator[tuple[tuple[Batch, ...], torch.cuda.Event]]:
            while True:
                with torch.cuda.device(self.device), torch.cuda.stream(side):
                    batches = next(items, None)
                    if batches is None:
                        return
                    event = side.record_event()
                yield batches, event

        with closing(run_ahead(on_side_stream(), depth=STEPS_AHEAD, name=f"loader-{name}", on_wait=wait)) as ahead:
            for batches, event in ahead:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(event)
                for batch in batches:
                    batch.images.record_stream(stream)
                    batch.labels.record_stream(stream)
                yield batches


def image_size_of(manifest: Manifest, config: DataConfig) -> tuple[int, int]:
    """(height, width) of the decoded images: `data.image_size`, or the size that all images share."""
    if config.image_size > 0:
        return config.image_size, config.image_size
    if len(manifest.image_sizes) == 1:
        height, _, width = next(iter(manifest.image_sizes)).partition("x")
        return int(height), int(width)
    common = sorted(manifest.image_sizes.items(), key=lambda item: (-item[1], item[0]))
    seen = ", ".join(f"{size} ({count:,} images)" for size, count in common[:3])
    raise ValueError(
        f"data.image_size=0 takes the size that all images share, but there are {len(common)} sizes (HxW): {seen}"
        f"{', ...' if len(common) > 3 else ''}; choose one and how to get there, e.g. --data.image-size 224 --data.fit crop"
    )


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


def run_ahead(items: Iterator[T], *, depth: int, name: str, on_wait: Callable[[float], None]) -> Generator[T, None, None]:
    """The same items, made by a thread that keeps at most `depth` of them ready.

    What `items` raises is raised here, after the items before it; `on_wait` gets the seconds waited for each. The thread ends when the
    items do, and when this generator is closed.
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
        thread.join()


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class _Source(Protocol):
    """Where the pixels of a split come from."""

    decode_seconds: float

    def fetch(self, ids: Ids) -> tuple[Store, Ids, Labels]:
        """A store, the rows of it that are these samples, and their labels (BAD where a sample is)."""
        ...


class _Resident:
    """All decoded images of a split, on the host or the device."""

    def __init__(self, split: Split, decoder: Decoder, report: Callable[[BadSample], None], device: torch.device) -> None:
        started = time.perf_counter()
        self._labels = np.array(split.labels())  # (count,) int64, our own copy

        def on_bad(bad: BadSample) -> None:
            self._labels[bad.sample_id] = BAD
            report(bad)

        with decoder:
            images = decode_split(split, decoder, on_bad=on_bad)  # (count, H, W, 3) uint8
        self._images: Store = images
        if device.type == "cuda":
            self._images = torch.from_numpy(images).to(device)
            torch.cuda.synchronize(device)  # once: other streams read it from here on
        self.decode_seconds = time.perf_counter() - started

    def fetch(self, ids: Ids) -> tuple[Store, Ids, Labels]:
        return self._images, ids, self._labels[ids]


class _Streamed:
    """Reads and decodes what is asked for. Encoded row groups stay, the least recently used leaving first, up to `memory_bytes`."""

    def __init__(self, split: Split, decoder: Decoder, report: Callable[[BadSample], None], memory_bytes: int) -> None:
        self._split, self._decoder, self._report, self._memory_bytes = split, decoder, report, memory_bytes
        self._groups: OrderedDict[int, RowGroup] = OrderedDict()
        self._held_bytes = 0
        self.decode_seconds = 0.0

    def fetch(self, ids: Ids) -> tuple[Store, Ids, Labels]:
        started = time.perf_counter()
        n = len(ids)
        groups = np.searchsorted(self._split.group_offsets, ids, side="right") - 1  # (n,)
        by_group = np.argsort(groups, kind="stable")  # (n,) places in the batch, those of a group together
        encoded: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)] * n
        labels = np.empty(n, np.int64)
        keys = [""] * n
        for group, places in _runs(groups[by_group], by_group):
            held = self._group(group)
            rows = ids[places] - self._split.group_offsets[group]
            labels[places] = held.labels[rows]
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                # A copy, as a view would keep the row group it lies in alive until the batch is decoded.
                encoded[place] = held.encoded[row].copy()
                keys[place] = held.keys[row]
        decoded = self._decoder.decode(encoded)
        for place, reason in decoded.bad:
            labels[place] = BAD
            self._report(BadSample(key=keys[place], reason=reason, split=self._split.name, sample_id=int(ids[place])))
        self.decode_seconds += time.perf_counter() - started
        return decoded.images, np.arange(n, dtype=np.int64), labels

    def _group(self, group: int) -> RowGroup:
        held = self._groups.get(group)
        if held is None:
            held = self._split.read_group(group)
            self._groups[group] = held
            self._held_bytes += _size(held)
            while self._held_bytes > self._memory_bytes and len(self._groups) > 1:
                _, dropped = self._groups.popitem(last=False)
                self._held_bytes -= _size(dropped)
        self._groups.move_to_end(group)
        return held


def _runs(sorted_groups: Ids, places: Ids) -> Iterator[tuple[int, Ids]]:
    """(group, its places) for each run of equal groups."""
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=-1))
    pieces: Sequence[Ids] = np.split(places, starts[1:]) if len(starts) else []
    for start, piece in zip(starts.tolist(), pieces, strict=True):
        yield int(sorted_groups[start]), piece


def _size(group: RowGroup) -> int:
    return sum(view.nbytes for view in group.encoded)
