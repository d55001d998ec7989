"""Real Parquet, real DALI: the loader's batches are those that order and augment name, whatever the cache, the backend and the worker."""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio.ahead import STEPS_AHEAD, run_ahead
from dataio.batch import Batch
from dataio.codecs.image import augment
from dataio.codecs.image.codec import ImageCodec
from dataio.config import DataConfig
from dataio.loader import BLOCK_BYTES, GPU_BLOCK_BYTES, Loader, choose_cache, steps_a_block
from dataio.manifest import Manifest, SplitInfo, image_size_of
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import Dataset, ShardWriter, Split, open_dataset
from dataio.quarantine import BadSample, Quarantine, TooManyBadSamples
from dataio.schema import single_label

CPU = torch.device("cpu")
HEIGHT, WIDTH = 6, 5
GROUP = 16
COUNTS = {"train": 90, "test": 21}
BAD = {17: b"not an image", 40: b""}
SAMPLE = Path(__file__).parents[2] / "dataio" / "samples" / "fashion_mnist"


def pixels(split: str) -> np.ndarray:
    """(count, H, W, 3) uint8: what the PNGs of a split hold."""
    return np.random.default_rng(len(split)).integers(0, 256, (COUNTS[split], HEIGHT, WIDTH, 3), dtype=np.uint8)


def label(split: str, sample: int) -> int:
    return (sample * 7 + len(split)) % 10


def write_dataset(folder: Path, bad: dict[int, bytes]) -> Dataset:
    """Shards of 32 rows in groups of 16, with `bad` bytes in place of some training images: convert would have dropped those."""
    folder.mkdir()
    splits = {}
    for split, count in COUNTS.items():
        shards = []
        images = pixels(split)
        for first in range(0, count, 2 * GROUP):
            writer = ShardWriter(folder / f"{split}-{first:05d}.parquet")
            for start in range(first, min(first + 2 * GROUP, count), GROUP):
                ids = range(start, min(start + GROUP, count))
                data = [bad[i] if split == "train" and i in bad else png(images[i]) for i in ids]
                writer.write_group(data, {"label": [label(split, i) for i in ids]}, [f"{split}/{i}" for i in ids], [bytes(32)] * len(ids))
            shards.append(writer.close())
        splits[split] = SplitInfo(count=count, shards=tuple(shards))
    manifest = Manifest(
        targets=single_label("abcdefghij"),
        splits=splits,
        fingerprint="ab" * 32,
        image_sizes={f"{HEIGHT}x{WIDTH}": sum(COUNTS.values())},
        quarantined=0,
        source="folder",
        identity="cd" * 32,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_dataset(folder)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("good") / "data", {})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("damaged") / "data", BAD)


def no_bad_sample(bad: BadSample) -> None:
    raise AssertionError(bad)


def make(
    dataset: Dataset,
    *,
    cache: str = "host",
    backend: str = "auto",
    ranks: range = range(4),
    window: int = 0,
    batch_size: int = 16,
    spread: bool = False,
    on_bad: Callable[[BadSample], None] = no_bad_sample,
    memory_bytes: int = 1 << 30,
) -> Loader:
    config = DataConfig(cache=cache, backend=backend, batch_size=batch_size, pad=2, shuffle_window=window)  # type: ignore[arg-type]
    order = Order(
        seed=3,
        fingerprint=dataset.manifest.fingerprint,
        count=dataset.split("train").count,
        batch_size=batch_size,
        virtual_ranks=4,
        window=window,
        group=GROUP,
        spread=spread,
    )
    return Loader(
        dataset, config, order=order, virtual_ranks=ranks, device=CPU, seed=3, on_bad=on_bad, memory_bytes=memory_bytes
    )  # fmt: skip


def content(batch: Batch) -> tuple[object, ...]:
    ids = tuple(batch.ids.tolist())
    return batch.step, batch.epoch, batch.virtual_rank, ids, tuple(batch.targets["label"].tolist()), batch.samples.numpy().tobytes()


def contents(steps: Iterator[tuple[Batch, ...]]) -> list[tuple[object, ...]]:
    return [content(batch) for step in steps for batch in step]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]


@pytest.mark.parametrize("cache", ["host", "none", "device"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "dali"])
def test_batches_are_the_samples_of_the_order_augmented_by_their_draw(good: Dataset, cache: str, backend: str) -> None:
    loader = make(good, cache=cache, backend=backend)
    order = loader._order
    images = pixels("train")
    assert order.steps_per_epoch == 6
    expected_steps = iter(range(4, 9))  # across the end of an epoch
    for step in loader.train(4, 9):
        number = next(expected_steps)
        assert [batch.virtual_rank for batch in step] == [0, 1, 2, 3]
        for batch in step:
            ids = order.samples(number // 6, number % 6, batch.virtual_rank)
            drawn = augment.draw(seed=3, epoch=number // 6, ids=ids, pad=2, flip=True)
            assert (batch.step, batch.epoch) == (number, number // 6)
            assert np.array_equal(batch.ids, ids)
            assert batch.targets["label"].dtype == torch.int64
            assert batch.targets["label"].tolist() == [label("train", i) for i in ids.tolist()]
            assert batch.samples.shape == (len(ids), 3, HEIGHT, WIDTH)
            assert batch.samples.dtype == torch.uint8
            assert batch.samples.is_contiguous(memory_format=torch.channels_last)
            assert np.array_equal(batch.samples.permute(0, 2, 3, 1).numpy(), augment.reference(images[ids], drawn, 2))
    assert next(expected_steps, None) is None


@pytest.mark.parametrize("window", [0, 32])
def test_every_cache_and_backend_gives_the_same_bits(good: Dataset, window: int) -> None:
    expected = contents(make(good, window=window).train(0, 8))
    for cache in ("host", "none"):
        for backend in ("numpy", "torch", "dali"):
            assert contents(make(good, window=window, cache=cache, backend=backend).train(0, 8)) == expected


@settings(max_examples=12, deadline=None)
@given(
    start=st.integers(0, 13),
    cache=st.sampled_from(["host", "none"]),
    window=st.sampled_from([0, 32]),
    workers=st.integers(1, 4),
    spread=st.booleans(),
)
def test_resumed_at_any_step_by_any_number_of_workers_batches_are_those_of_the_uninterrupted_run(
    good: Dataset, start: int, cache: str, window: int, workers: int, spread: bool
) -> None:
    expected = sorted(contents(make(good, window=window, spread=spread).train(0, 13)))[start * 4 :]  # sorted by step, then virtual rank
    resumed = []
    for rank in range(workers):
        carried = blocks_of_virtual_ranks(4, workers, rank)
        resumed += contents(make(good, cache=cache, window=window, spread=spread, ranks=carried).train(start, 13))
    assert sorted(resumed) == sorted(expected)


@pytest.mark.parametrize("cache", ["host", "none"])
def test_an_epoch_shows_each_sample_once_and_its_last_step_may_be_empty_for_some(good: Dataset, cache: str) -> None:
    seen: Counter[int] = Counter()
    sizes = []
    for step in make(good, cache=cache, batch_size=88, window=32).train(0, 2):  # lanes of 23, 23, 22, 22 in steps of 22
        sizes.append([len(batch.ids) for batch in step])
        assert all(batch.samples.shape == (len(batch.ids), 3, HEIGHT, WIDTH) for batch in step)
        seen.update(sample for batch in step for sample in batch.ids.tolist())
    assert sizes == [[22, 22, 22, 22], [1, 1, 0, 0]]
    assert seen == Counter(range(90))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_steps_decoded_into_a_tensor_as_on_a_gpu_are_those_decoded_into_an_array(
    damaged: Dataset, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    found: list[list[BadSample]] = [[], []]
    expected = contents(make(damaged, cache="none", backend=backend, window=32, on_bad=found[0].append).train(0, 9))
    monkeypatch.setattr(ImageCodec, "room", lambda codec, n: torch.full((n, *codec.row.shape), 7, dtype=torch.uint8))
    assert contents(make(damaged, cache="none", backend=backend, window=32, on_bad=found[1].append).train(0, 9)) == expected
    assert found[0] == found[1]
    assert len(found[0]) == len(BAD)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    original = Split.read_group

    def counting(self: Split, group: int) -> object:
        read.append(group)
        return original(self, group)

    monkeypatch.setattr(Split, "read_group", counting)
    return read


def test_streaming_with_a_window_reads_each_row_group_once_an_epoch_in_bounded_memory(
    good: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_reads(monkeypatch)
    group_bytes = max(shard.size_bytes for shard in good.manifest.splits["train"].shards) // 2
    loader = make(good, cache="none", window=GROUP, ranks=range(1), memory_bytes=4 * group_bytes)
    list(loader.train(0, loader._order.steps_per_epoch))
    assert len(read) == len(set(read)) == 2  # a lane of 23 samples in windows of one group
    whole = make(good, cache="none", window=0, memory_bytes=1 << 30)
    read.clear()
    list(whole.train(0, 12))
    assert sorted(read) == list(range(6))  # all fits: read once for two epochs


def test_streaming_in_next_to_no_memory_still_gives_the_same_bits(good: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(make(good).train(0, 7))
    monkeypatch.setattr(Split, "targets", lambda self: pytest.fail("a streaming loader reads targets with their row groups"))
    loader = make(good, cache="none", memory_bytes=1)
    assert contents(loader.train(0, 7)) == expected
    groups = [good.split("train").group_bytes(group) for group in range(6)]
    assert loader.memory_held_bytes in groups  # one group, as there must be one
    assert loader._supplies["train", "train"].shelf.peak_bytes == max(groups)  # type: ignore[attr-defined]


def test_streaming_a_large_shuffled_data_set_without_a_window_is_warned_about(good: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    make(good, cache="none", memory_bytes=1 << 30)
    make(good, cache="none", memory_bytes=1, window=32)
    assert not caplog.records
    make(good, cache="none", memory_bytes=1)
    assert "set --data.shuffle-window" in caplog.text


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize("backend", ["numpy", "dali"])
def test_a_bad_sample_keeps_its_place_as_zeros_without_a_label_and_is_reported_once(damaged: Dataset, cache: str, backend: str) -> None:
    reported: list[BadSample] = []
    loader = make(damaged, cache=cache, backend=backend, on_bad=reported.append)
    seen: Counter[int] = Counter()
    for step in loader.train(0, 12):  # two epochs
        for batch in step:
            for place, sample in enumerate(batch.ids.tolist()):
                seen[sample] += 1
                if sample in BAD:
                    assert batch.targets["label"][place] == -1
                    assert not batch.samples[place].any()
                else:
                    assert batch.targets["label"][place] == label("train", sample)
                    assert batch.samples[place].any()
    assert seen == Counter(dict.fromkeys(range(90), 2))
    evaluated = list(loader.evaluate("train", range(90), 50))
    assert torch.cat([batch.targets["label"] for batch in evaluated]).eq(-1).nonzero().flatten().tolist() == sorted(BAD)
    assert sorted((bad.split, bad.sample_id, bad.key, bad.kind) for bad in reported) == [
        ("train", 17, "train/17", "unknown format"),
        ("train", 40, "train/40", "empty"),
    ]


@pytest.mark.parametrize("cache", ["host", "none"])
def test_too_many_bad_samples_end_the_run_where_batches_are_consumed(damaged: Dataset, cache: str) -> None:
    quarantine = Quarantine(0.0, 90)
    loader = make(damaged, cache=cache, on_bad=lambda bad: void(quarantine.add(bad.key, bad.reason, bad.split, bad.sample_id)))
    with pytest.raises(TooManyBadSamples, match=r"1 of 90 samples"):
        list(loader.train(0, 6))
    assert not loader_threads()


def void(_: object) -> None:
    """For callbacks whose result nobody wants."""


@pytest.mark.parametrize("cache", ["host", "none"])
def test_evaluation_shows_the_given_samples_in_order_as_they_are(good: Dataset, cache: str) -> None:
    loader = make(good, cache=cache)
    for split, ids in (("test", range(21)), ("test", np.array([20, 3, 3, 11])), ("train", range(7, 80, 9)), ("test", range(0))):
        batches = list(loader.evaluate(split, ids, 8))
        assert [len(batch.ids) for batch in batches] == [min(8, len(ids) - start) for start in range(0, len(ids), 8)]
        wanted = np.asarray(ids, np.int64)
        shown = np.concatenate([np.empty((0, HEIGHT, WIDTH, 3), np.uint8), *(b.samples.permute(0, 2, 3, 1).numpy() for b in batches)])
        assert np.array_equal(np.concatenate([np.empty(0, np.int64), *(batch.ids for batch in batches)]), wanted)
        assert np.array_equal(shown, pixels(split)[wanted])
        assert [value for batch in batches for value in batch.targets["label"].tolist()] == [label(split, i) for i in wanted.tolist()]
        assert all(batch.samples.is_contiguous(memory_format=torch.channels_last) for batch in batches)


@pytest.mark.parametrize("cache", ["host", "none"])
def test_evaluating_between_steps_leaves_training_as_it_is(good: Dataset, cache: str) -> None:
    expected = contents(make(good).train(0, 7))
    loader = make(good, cache=cache, backend="dali")
    seen = []
    for step in loader.train(0, 7):
        seen += [content(batch) for batch in step]
        for split in ("train", "test"):
            assert sum(len(batch.ids) for batch in loader.evaluate(split, range(20), 6)) == 20
    assert seen == expected


def test_no_thread_outlives_its_iterator(good: Dataset) -> None:
    loader = make(good, cache="none")
    list(loader.train(0, 3))
    assert not loader_threads()
    with closing(loader.train(0, 1000)) as steps:
        next(steps)
        assert loader_threads() == ["loader-train"]
    assert not loader_threads()
    with closing(loader.evaluate("test", range(21), 2)) as batches:
        next(batches)
        assert loader_threads() == ["loader-evaluate"]
    assert not loader_threads()
    loader.train(0, 3)  # never started: no thread, nothing to close
    assert not loader_threads()
    steps = loader.train(0, 1000)
    next(steps)
    del steps  # forgotten rather than closed
    assert not loader_threads()


def test_an_exception_in_the_background_surfaces_after_the_steps_before_it(good: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataio.loader.BLOCK_BYTES", 1)  # each step by itself
    loader = make(good)
    original = Order.lane

    def failing(self: Order, epoch: int, steps: range, virtual_rank: int) -> list[np.ndarray]:
        if 3 in steps:
            raise OSError("the disk is gone")
        return original(self, epoch, steps, virtual_rank)

    monkeypatch.setattr(Order, "lane", failing)
    steps = loader.train(0, 6)
    assert [next(steps)[0].step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert not loader_threads()


@pytest.mark.parametrize("backend", ["numpy", "torch", "dali"])
def test_steps_made_in_blocks_are_those_made_one_by_one(good: Dataset, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    made = []
    for block_bytes in (1, 3000, 2**21):
        monkeypatch.setattr("dataio.loader.BLOCK_BYTES", block_bytes)
        loader = make(good, backend=backend, cache="host")
        with closing(loader.train(1, 2 * loader._order.steps_per_epoch + 2)) as steps:
            made.append(
                [
                    (b.step, b.epoch, b.virtual_rank, b.ids.tolist(), b.targets["label"].tolist(), b.samples.clone())
                    for each in steps
                    for b in each
                ]
            )
    for others in made[1:]:
        assert [each[:-1] for each in others] == [each[:-1] for each in made[0]]
        assert all(torch.equal(one[-1], other[-1]) for one, other in zip(made[0], others, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cache=st.sampled_from(["host", "none"]),
    start=st.integers(0, 12),
    steps=st.lists(st.integers(1, 40), min_size=2, max_size=2, unique=True),
    window=st.sampled_from([0, 32]),
    spread=st.booleans(),
    ranks=st.sampled_from([range(4), range(1, 3)]),
)
def test_order_and_batches_do_not_depend_on_how_many_steps_are_made_at_once(
    good: Dataset, cache: str, start: int, steps: list[int], window: int, spread: bool, ranks: range
) -> None:
    made = []
    for number in steps:
        loader = make(good, cache=cache, window=window, spread=spread, ranks=ranks)
        loader._steps_a_block = number
        made.append(contents(loader.train(start, 13)))  # more than two epochs
    assert made[0] == made[1]


def test_a_block_is_sized_for_where_samples_stay() -> None:
    cifar = 512 * 32 * 32 * 3
    assert steps_a_block("device", cifar) == 10
    assert steps_a_block("host", cifar) == 1
    assert steps_a_block("host", 100 * 32 * 32 * 3) == 6
    assert steps_a_block("none", 1) == 1


@given(cache=st.sampled_from(["device", "host", "none"]), step_bytes=st.integers(1, 2**30))
def test_a_block_has_as_many_steps_as_fit_and_one_at_least(cache: str, step_bytes: int) -> None:
    limit = {"device": GPU_BLOCK_BYTES, "host": BLOCK_BYTES, "none": 0}[cache]
    steps = steps_a_block(cache, step_bytes)
    assert steps >= 1
    assert steps == 1 or steps * step_bytes <= limit
    assert (steps + 1) * step_bytes > limit


def test_the_thread_works_two_steps_ahead_and_no_further() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(run_ahead(items(), depth=STEPS_AHEAD, name="loader-test", on_wait=void)) as ahead:
        for taken in range(5):
            assert next(ahead) == taken
            deadline = time.monotonic() + 10
            while len(made) < taken + 1 + STEPS_AHEAD and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(made) == taken + 1 + STEPS_AHEAD


def test_waiting_for_a_slow_source_is_measured_and_a_ready_batch_costs_none() -> None:
    waits: list[float] = []

    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    assert list(run_ahead(slow(), depth=2, name="loader-test", on_wait=waits.append)) == [0, 1, 2]
    assert 0.14 <= sum(waits) < 5
    waits.clear()
    with closing(run_ahead(iter(range(3)), depth=2, name="loader-test", on_wait=waits.append)) as quick:
        next(quick)
        time.sleep(0.1)
        next(quick)
    assert waits[1] < 0.09


def test_the_loader_names_what_it_chose_and_measures_decoding_and_waiting(good: Dataset) -> None:
    loader = make(good, cache="auto")
    assert (loader.cache, loader.backend_name, loader.image_size, loader.classes) == ("host", "numpy", (HEIGHT, WIDTH), tuple("abcdefghij"))
    assert (loader.decode_seconds, loader.wait_seconds) == (0, 0)
    loader.load("train", "test")
    decoded = loader.decode_seconds
    assert decoded > 0
    list(loader.train(0, 6))
    list(loader.evaluate("test", range(21), 8))
    assert loader.decode_seconds == decoded  # once
    assert loader.wait_seconds > 0
    assert loader.evaluation_wait_seconds > 0
    assert make(good, cache="auto", memory_bytes=1000).cache == "none"


@pytest.mark.parametrize(
    ("cache", "backend", "device", "memory_bytes", "free_device_bytes", "chosen"),
    [
        ("auto", "auto", "cuda", 100, 250, "device"),
        ("auto", "auto", "cuda", 100, 249, "host"),
        ("auto", "auto", "cuda", 99, 249, "none"),
        ("auto", "numpy", "cuda", 100, 1000, "host"),
        ("auto", "auto", "cpu", 100, 0, "host"),
        ("auto", "auto", "cpu", 99, 0, "none"),
        ("device", "auto", "cpu", 0, 0, "host"),
        ("device", "auto", "cuda", 0, 0, "device"),
        ("none", "auto", "cuda", 1000, 1000, "none"),
        ("host", "auto", "cpu", 0, 0, "host"),
    ],
)
def test_auto_caches_where_the_decoded_images_fit(
    cache: str, backend: str, device: str, memory_bytes: int, free_device_bytes: int, chosen: str
) -> None:
    config = DataConfig(cache=cache, backend=backend)  # type: ignore[arg-type]
    found = choose_cache(
        config, torch.device(device), decoded_bytes=100, memory_bytes=memory_bytes, free_device_bytes=free_device_bytes
    )  # fmt: skip
    assert found == chosen


def test_the_image_size_is_the_shared_or_the_chosen_one_and_mixed_sizes_are_an_error(good: Dataset) -> None:
    assert image_size_of(good.manifest, DataConfig()) == (HEIGHT, WIDTH)
    assert image_size_of(good.manifest, DataConfig(image_size=24)) == (24, 24)
    values = {name: getattr(good.manifest, name) for name in ("targets", "splits", "fingerprint", "quarantined", "source", "identity")}
    mixed = Manifest(**values, image_sizes={"32x32": 10, "28x30": 900, "64x64": 5, "1x1": 1})
    message = r"there are 4 sizes \(HxW\): 28x30 \(900 images\), 32x32 \(10 images\), 64x64 .*--data\.image-size 224 --data\.fit crop"
    with pytest.raises(ValueError, match=message):
        image_size_of(mixed, DataConfig())


def test_the_shipped_sample_gives_the_same_bits_from_memory_and_from_disk() -> None:
    dataset = open_dataset(SAMPLE)
    count = dataset.split("train").count
    order = Order(seed=0, fingerprint=dataset.manifest.fingerprint, count=count, batch_size=100, virtual_ranks=2, window=512)
    labels = dataset.split("train").labels()
    streams = []
    for cache in ("host", "none"):
        config = DataConfig(cache=cache)  # type: ignore[arg-type]
        loader = Loader(dataset, config, order=order, virtual_ranks=range(2), device=CPU, seed=0, on_bad=no_bad_sample)
        streams.append(loader.train(0, order.steps_per_epoch))
    seen = []
    for host, none in zip(*streams, strict=True):
        assert [content(batch) for batch in host] == [content(batch) for batch in none]
        seen += [sample for batch in host for sample in batch.ids.tolist()]
        assert all(np.array_equal(batch.targets["label"].numpy(), labels[batch.ids]) for batch in host)
    assert sorted(seen) == list(range(count))
