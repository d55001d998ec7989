"""Row groups read ahead: in order, within the budget, as seldom as can be, and from S3 (moto's server, over HTTP) as from a folder."""

import functools
import gc
import io
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio import ahead
from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.manifest import Manifest, SplitInfo
from dataio.order import Order, blocks_of_virtual_ranks
from dataio.parquet import CorruptShard, Dataset, RowGroup, ShardWriter, Split, open_dataset
from dataio.prepared import is_converted, open_prepared, prepare
from dataio.quarantine import BadSample
from dataio.remote import DataOutage, DataRefused
from dataio.schema import single_label
from dataio.stream import Shelf, in_order
from tests.s3 import Server, answering, serving

GROUP = 8
COUNTS = {"train": 150, "test": 21}  # 19 groups of 8, the last of 6; shards of 3 groups
VIRTUAL_RANKS = 3


def write_dataset(folder: Path) -> Dataset:
    """Random 6x5 PNGs; those of group g are padded to a size of its own, so that budgets have something to weigh."""
    folder.mkdir(parents=True)
    splits = {}
    for split, count in COUNTS.items():
        pixels = np.random.default_rng(len(split)).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
        shards = []
        for first in range(0, count, 3 * GROUP):
            writer = ShardWriter(folder / f"{split}-{first:05d}.parquet")
            for begin in range(first, min(first + 3 * GROUP, count), GROUP):
                ids = range(begin, min(begin + GROUP, count))
                data = [png(pixels[i]) + bytes(37 * (begin // GROUP % 7)) for i in ids]  # bytes behind a PNG's end are ignored
                writer.write_group(data, {"label": [i % 10 for i in ids]}, [f"{split}/{i}" for i in ids], [bytes(32)] * len(ids))
            shards.append(writer.close())
        splits[split] = SplitInfo(count=count, shards=tuple(shards))
    manifest = Manifest(
        targets=single_label("abcdefghij"),
        splits=splits,
        fingerprint="ab" * 32,
        image_sizes={"6x5": sum(COUNTS.values())},
        quarantined=0,
        source="folder",
        identity="cd" * 32,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_dataset(folder)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "data"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    """All in memory, as a disk's speed proves nothing here."""
    files = {name: file.read_bytes() for name, file in open_dataset(folder).files().items() if isinstance(file, Path)}
    return open_dataset(files).split("train")


def reads_of(patch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda group: None) -> list[int]:
    """The groups that are read from here on, in order."""
    read: list[int] = []
    original = Split.read_group

    def counting(self: Split, group: int) -> RowGroup:
        before(group)
        read.append(group)
        return original(self, group)

    patch.setattr(Split, "read_group", counting)
    return read


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("reads-", "loader-"))]


# --- a plan, a budget ---------------------------------------------------------------------------------------------------------------------

sample_ids = st.integers(0, COUNTS["train"] - 1)
plans = st.lists(st.lists(sample_ids, max_size=12), max_size=25)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans, budget=st.integers(1, 60_000), horizon=st.integers(1, 30))
def test_any_plan_is_served_in_order_and_no_more_than_the_budget_is_ever_in_memory(
    split: Split, plan: list[list[int]], budget: int, horizon: int
) -> None:
    whole = [rows for group in range(split.groups) for rows in [split.read_group(group)]]
    images = [view.tobytes() for rows in whole for view in rows.encoded]
    del whole
    sizes = [split.group_bytes(group) for group in range(split.groups)]
    limit = max(budget, max(sizes))
    alive: dict[int, int] = {}  # by serial number: bytes of each group that anything refers to
    lock = threading.Lock()
    most = 0
    original = Split.read_group

    def watched(self: Split, group: int) -> RowGroup:
        nonlocal most
        rows = original(self, group)
        buffer = rows.encoded[0].base
        assert buffer is not None
        with lock:
            serial = len(alive) + 1 if not alive else max(alive) + 1
            alive[serial] = sizes[group]
            most = max(most, sum(alive.values()))
        weakref.finalize(buffer, lambda: alive.pop(serial, None))
        return rows

    shelf = Shelf(split, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "read_group", watched)
        with closing(shelf.read(((n, np.array(ids, np.int64)) for n, ids in enumerate(plan)), horizon=horizon)) as reading:
            number = -1
            for number, samples in enumerate(reading):
                assert samples.tag == number
                assert samples.ids.tolist() == plan[number]
                assert [view.tobytes() for view in samples.encoded] == [images[i] for i in plan[number]]
                assert samples.targets["label"].tolist() == [i % 10 for i in plan[number]]
                assert samples.keys == [f"train/{i}" for i in plan[number]]
                assert shelf.held_bytes <= limit
    assert number == len(plan) - 1
    assert shelf.peak_bytes <= limit
    assert most <= limit
    assert shelf.held_bytes == sum(alive.values())  # what is charged is what there is
    assert not threads()


def fewest_reads(uses: list[int], room: int) -> int:
    """Belady's MIN for groups of one size, `room` of them held: no strategy reads less."""
    held: set[int] = set()
    reads = 0
    for at, group in enumerate(uses):
        if group in held:
            continue
        reads += 1
        if len(held) == room:
            held.remove(max(held, key=lambda other: uses.index(other, at) if other in uses[at:] else len(uses)))
        held.add(group)
    return reads


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=30), room=st.integers(1, 10))
def test_no_strategy_reads_less(split: Split, plan: list[list[int]], room: int) -> None:
    uses = [group for step in plan for group in sorted(set(step))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "group_bytes", lambda self, group: 100)
        read = reads_of(patch)
        steps = ((None, np.array(step, np.int64) * GROUP) for step in plan)
        with closing(Shelf(split, 100 * room).read(steps, horizon=len(plan) + 1)) as reading:
            for _ in reading:
                pass
    assert len(read) == fewest_reads(uses, room)


def test_what_fits_stays_from_one_reading_to_the_next(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads_of(monkeypatch)
    shelf = Shelf(split, 1 << 30)
    for _ in range(3):
        with closing(shelf.read(((None, np.arange(40)) for _ in range(4)), horizon=3)) as reading:
            assert len(list(reading)) == 4
    assert sorted(read) == list(range(5))
    assert shelf.groups_read == 5
    assert shelf.bytes_read == shelf.held_bytes == sum(split.group_bytes(group) for group in range(5))


def test_groups_are_read_ahead_until_the_budget_is_full_and_then_no_further(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Split, "group_bytes", lambda self, group: 100)
    read = reads_of(monkeypatch)
    shelf = Shelf(split, 450)
    with closing(shelf.read(((None, np.array([group * GROUP])) for group in range(12)), horizon=12)) as reading:
        steps = iter(reading)
        for done in range(1, 9):
            next(steps)
            until(lambda done=done: len(read) == done + 3)  # the one in use and three more; the rest of the budget is too little
            time.sleep(0.01)
            assert read == list(range(done + 3))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_read_that_fails_surfaces_at_the_step_that_needs_it_after_the_steps_before(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(group: int) -> None:
        if group == 5:
            raise CorruptShard("row group 2 of shard train-00024.parquet (split train) is damaged")

    read = reads_of(monkeypatch, before)
    with closing(Shelf(split, 1 << 30).read(((group, np.array([group * GROUP])) for group in range(12)), horizon=12)) as reading:
        steps = iter(reading)
        assert next(steps).tag == 0
        until(lambda: 11 in read)  # read ahead, past the damage
        assert [next(steps).tag for _ in range(4)] == [1, 2, 3, 4]
        with pytest.raises(CorruptShard, match=r"train-00024\.parquet"):
            next(steps)
    assert not threads()


def test_whole_splits_are_read_in_order(split: Split) -> None:
    found = [(samples.tag, samples.ids.tolist(), list(samples.keys)) for samples in in_order(split, range(split.groups))]
    assert [tag for tag, _, _ in found] == list(range(split.groups))
    assert [i for _, ids, _ in found for i in ids] == list(range(COUNTS["train"]))
    assert [key for _, _, keys in found for key in keys] == [f"train/{i}" for i in range(COUNTS["train"])]
    assert not threads()


# --- the loader ---------------------------------------------------------------------------------------------------------------------------


def no_bad_sample(bad: BadSample) -> None:
    raise AssertionError(bad)


def make(
    dataset: Dataset,
    *,
    cache: str = "none",
    ranks: range = range(VIRTUAL_RANKS),
    window: int = 24,
    memory_bytes: int = 1 << 30,
    **more: Any,
) -> Loader:
    config = DataConfig(cache=cache, batch_size=12, pad=1, shuffle_window=window)  # type: ignore[arg-type]
    order = Order(
        seed=5,
        fingerprint=dataset.manifest.fingerprint,
        count=COUNTS["train"],
        batch_size=12,
        virtual_ranks=VIRTUAL_RANKS,
        window=window,
        group=GROUP,
    )
    return Loader(
        dataset,
        config,
        order=order,
        virtual_ranks=ranks,
        device=torch.device("cpu"),
        seed=5,
        on_bad=no_bad_sample,
        memory_bytes=memory_bytes,
        **more,
    )


def content(batch: Batch) -> tuple[object, ...]:
    return (
        batch.step,
        batch.virtual_rank,
        tuple(batch.ids.tolist()),
        tuple(batch.targets["label"].tolist()),
        batch.samples.numpy().tobytes(),
    )


def contents(steps: Iterator[tuple[Batch, ...]]) -> list[tuple[object, ...]]:
    return [content(batch) for step in steps for batch in step]


def needed(loader: Loader, start: int, stop: int) -> set[int]:
    order = loader._order
    ids = [
        order.samples(*divmod(step, order.steps_per_epoch), rank) for step in range(start, stop) for rank in loader._virtual_ranks
    ]  # fmt: skip
    return set((np.concatenate(ids) // GROUP).tolist())


@functools.cache
def uninterrupted(folder: Path, window: int) -> list[tuple[Any, ...]]:
    """All 31 steps from decoded images in memory, by step and virtual rank."""
    return sorted(contents(make(open_dataset(folder), cache="host", window=window).train(0, 31)))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 30),
    window=st.sampled_from([0, 8, 24, 60, 1000]),
    workers=st.integers(1, VIRTUAL_RANKS),
    memory_bytes=st.sampled_from([1, 6_000, 20_000, 1 << 30]),
)
def test_resumed_anywhere_by_any_number_of_workers_in_any_memory_the_batches_are_the_same(
    folder: Path, start: int, window: int, workers: int, memory_bytes: int
) -> None:
    dataset = open_dataset(folder)
    expected = [batch for batch in uninterrupted(folder, window) if batch[0] >= start]
    resumed = []
    for rank in range(workers):
        ranks = blocks_of_virtual_ranks(VIRTUAL_RANKS, workers, rank)
        loader = make(dataset, window=window, ranks=ranks, memory_bytes=memory_bytes)
        resumed += contents(loader.train(start, 31))
        largest = max(dataset.split("train").group_bytes(group) for group in range(19))
        assert loader.memory_held_bytes <= max(int(memory_bytes * 0.75), largest)
    assert sorted(resumed) == expected
    assert not threads()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 12), rank=st.integers(0, VIRTUAL_RANKS - 1), window=st.sampled_from([8, 16, 24]))
def test_a_group_is_read_once_an_epoch_where_two_windows_fit_and_after_a_resume_only_what_is_still_needed(
    folder: Path, start: int, rank: int, window: int
) -> None:
    dataset = open_dataset(folder)
    split = dataset.split("train")
    most = max(split.group_bytes(group) for group in range(split.groups))
    # A step may need the end of one window and the begin of the next.
    loader = make(dataset, ranks=range(rank, rank + 1), window=window, memory_bytes=int(2 * window / GROUP * most / 0.75) + 1)
    with pytest.MonkeyPatch.context() as patch:
        read = reads_of(patch)
        list(loader.train(start, loader._order.steps_per_epoch))
    assert sorted(read) == sorted(needed(loader, start, loader._order.steps_per_epoch))
    assert loader.groups_read == len(read)
    assert loader.bytes_read == sum(split.group_bytes(group) for group in read)


def test_reading_begins_with_the_first_steps_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads_of(monkeypatch)
    loader = make(open_dataset(folder), window=24)
    with closing(loader.train(7, 13)) as steps:
        next(steps)
        first = needed(loader, 7, 8)
        assert set(read[: len(first)]) == first
    assert not threads()


def test_a_batch_that_waits_for_a_read_says_so_until_that_is_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "IDLE_SECONDS", 0.01)
    gate, told = threading.Event(), list[bool]()
    reads_of(monkeypatch, before=lambda group: gate.wait(20) and None)
    with closing(make(open_dataset(folder), on_read_wait=told.append).train(0, 2)) as steps:
        taking = threading.Thread(target=next, args=(steps,))
        taking.start()
        until(lambda: len(told) > 3)
        assert set(told) == {True}
        gate.set()
        taking.join(20)
        assert told.count(False) == 1
        assert told[-1] is False


def test_a_batch_that_is_being_made_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That would hide a decoder that hangs."""
    monkeypatch.setattr(ahead, "IDLE_SECONDS", 0.01)
    begun, gate, told = threading.Event(), threading.Event(), list[bool]()
    loader = make(open_dataset(folder), on_read_wait=told.append)
    codec_class = type(loader._new_codec())
    decode = codec_class.decode

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert gate.wait(20)
        return decode(*arguments)

    monkeypatch.setattr(codec_class, "decode", slow)
    with closing(loader.train(0, 2)) as steps:
        taking = threading.Thread(target=next, args=(steps,))
        taking.start()
        assert begun.wait(20)
        said = len(told)  # of the read before
        time.sleep(0.1)
        assert len(told) == said
        gate.set()
        taking.join(20)


def test_a_loader_that_is_left_or_forgotten_ends_its_threads(folder: Path) -> None:
    loader = make(open_dataset(folder), memory_bytes=8_000)
    with closing(loader.train(0, 1000)) as steps:
        next(steps)
        assert sorted(threads()) == ["loader-train", "reads-0"]
    assert not threads()
    steps = loader.train(0, 1000)
    next(steps)
    del steps
    gc.collect()
    assert not threads()
    assert len(list(loader.evaluate("test", range(21), 4))) == 6
    assert not threads()
    assert contents(loader.train(0, 13)) == uninterrupted(folder, 24)[: 13 * VIRTUAL_RANKS]


def test_a_damaged_shard_ends_the_run_at_the_step_that_needs_it_and_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    shard = tmp_path / "data" / "train-00072.parquet"  # groups 9, 10, 11
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    loader = make(dataset)
    seen: list[tuple[Any, ...]] = []
    with pytest.raises(CorruptShard, match=r"row group 0 of shard .*train-00072\.parquet \(split train\).*CRC"):
        seen.extend(content(batch) for step in loader.train(0, 13) for batch in step)
    assert seen == uninterrupted(folder, 24)[: len(seen)]
    first = next(step for step in range(13) if 9 in needed(loader, step, step + 1))
    assert len(seen) == first * VIRTUAL_RANKS
    assert not threads()


def test_the_loader_counts_what_it_reads_and_holds(folder: Path) -> None:
    dataset = open_dataset(folder)
    size = sum(dataset.split("train").group_bytes(group) for group in range(19))
    streamed, resident = make(dataset), make(dataset, cache="host")
    assert (streamed.memory_held_bytes, streamed.groups_read, streamed.bytes_read, streamed.read_wait_seconds) == (0, 0, 0, 0.0)
    list(streamed.train(0, 26))
    assert (streamed.memory_held_bytes, streamed.groups_read, streamed.bytes_read) == (size, 19, size)
    assert streamed.read_wait_seconds > 0
    list(resident.train(0, 26))
    assert (resident.memory_held_bytes, resident.groups_read, resident.bytes_read) == (150 * 6 * 5 * 3, 19, size)


# --- S3 -----------------------------------------------------------------------------------------------------------------------------------


class LoggedServer(Server):
    """`requests` are those that it answered."""

    def __init__(self) -> None:
        super().__init__(verbose=True)
        self.requests: list[str] = []

    @property
    def pets(self) -> str:
        return self.uri("bucket/pets")


class Requests(logging.Handler):
    """Takes down `GET train-00000.parquet` and the like from the server's log."""

    def __init__(self, requests: list[str]) -> None:
        super().__init__()
        self._requests = requests

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"(GET|HEAD) /bucket/?(?:pets/)?([^? ]*)", record.getMessage()):
            self._requests.append(f"{found[1]} {found[2] or 'list'}")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LoggedServer]:
    """The data set at s3://bucket/pets."""
    with serving(LoggedServer()) as server:
        assert isinstance(server, LoggedServer)
        client = server.client()
        client.create_bucket(Bucket="bucket")
        for file in folder.iterdir():
            client.upload_file(str(file), "bucket", f"pets/{file.name}")
        client.upload_file(str(folder / "manifest.json"), "bucket", "half/manifest.json")
        client.put_object(Bucket="bucket", Key="other/readme", Body=b"no data set")
        log = logging.getLogger("werkzeug")
        handler = Requests(server.requests)
        log.addHandler(handler)
        level = log.level
        log.setLevel(logging.INFO)
        yield server
        log.setLevel(level)
        log.removeHandler(handler)


@pytest.mark.parametrize(("window", "workers", "memory_bytes"), [(0, 1, 1 << 30), (24, 2, 12_000), (60, 3, 1)])
def test_from_s3_the_batches_are_those_from_disk(folder: Path, server: LoggedServer, window: int, workers: int, memory_bytes: int) -> None:
    remote = open_dataset(server.pets)
    assert remote.manifest == open_dataset(folder).manifest
    expected = [batch for batch in uninterrupted(folder, window) if 4 <= batch[0] < 20]
    found = []
    for rank in range(workers):
        ranks = blocks_of_virtual_ranks(VIRTUAL_RANKS, workers, rank)
        found += contents(make(remote, window=window, ranks=ranks, memory_bytes=memory_bytes).train(4, 20))
    assert sorted(found) == expected
    assert sorted(contents(make(remote, cache="host", window=window).train(4, 20))) == expected
    assert not threads()


def test_a_row_group_is_one_request_and_a_shard_two(server: LoggedServer) -> None:
    server.requests.clear()
    dataset = open_dataset(server.pets)
    assert sorted(server.requests) == ["GET list", "GET manifest.json", "HEAD manifest.json"]
    server.requests.clear()
    list(make(dataset).train(0, 13))
    shards = [f"train-{first:05d}.parquet" for first in range(0, 150, 3 * GROUP)]
    assert sorted(r for r in server.requests if r.startswith("HEAD")) == [f"HEAD {shard}" for shard in shards]
    gets = [r for r in server.requests if r.startswith("GET")]
    assert len(gets) == len(shards) + 19  # a footer a shard, and a range a group
    server.requests.clear()
    list(make(dataset).train(0, 13))  # another loader of the same data set: footers are known
    assert len(server.requests) == 19
    server.requests.clear()
    assert dataset.split("test").keys([0, 20, 9]) == ["test/0", "test/20", "test/9"]
    assert dataset.split("test").labels().tolist() == [i % 10 for i in range(21)]
    assert len(server.requests) == 2 + 3 + 3
    dataset.split("train").verify()


def test_an_outage_that_heals_costs_time_and_nothing_else(folder: Path, server: LoggedServer, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(server.pets, retry_seconds=30)
    with closing(make(dataset, memory_bytes=12_000).train(0, 26)) as steps:
        seen = [content(batch) for batch in next(steps)]
        server.stop()
        healing = threading.Timer(1.0, server.start)
        healing.start()
        try:
            seen += contents(steps)
        finally:
            healing.join()
    assert seen == uninterrupted(folder, 24)[: 26 * VIRTUAL_RANKS]
    assert any("did not answer for s3://bucket/pets/train-" in record.getMessage() for record in caplog.records)


def test_an_outage_that_does_not_heal_ends_the_run_after_the_steps_that_were_read(folder: Path, server: LoggedServer) -> None:
    expected = uninterrupted(folder, 24)[: 26 * VIRTUAL_RANKS]
    dataset = open_dataset(server.pets, retry_seconds=0.3)
    loader = make(dataset, memory_bytes=12_000)
    steps = loader.train(0, 26)
    seen = [content(batch) for batch in next(steps)]
    server.stop()
    try:
        with pytest.raises(DataOutage, match=r"did not answer for s3://bucket/pets/train-\d+\.parquet, tried for \d") as outage:
            seen.extend(content(batch) for step in steps for batch in step)
        with pytest.raises(DataOutage, match="did not answer for s3://bucket/pets,"):
            open_dataset(server.pets, retry_seconds=0)
    finally:
        server.start()
    assert 0 < len(seen) < len(expected)
    assert seen == expected[: len(seen)]
    assert "secret" not in str(outage.value)
    assert not threads()
    assert contents(loader.train(0, 26)) == expected  # the same loader, once the storage is back


def test_leaving_during_an_outage_does_not_wait_for_its_end(server: LoggedServer, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(server.pets, retry_seconds=3600)
    loader = make(dataset, memory_bytes=8_000)
    steps = loader.train(0, 1000)
    next(steps)
    server.stop()
    try:
        until(lambda: "did not answer" in caplog.text)
        began = time.monotonic()
        steps.close()
        assert time.monotonic() - began < 60  # a request in flight may take its time; an hour of tries is not waited for
        assert not threads()
    finally:
        server.start()


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("nosuch/pets", DataRefused, "there is no bucket 'nosuch'"),
        ("bucket/cats", ValueError, r"s3://bucket/cats is no converted data set \(no manifest\.json\).*python -m dataio\.convert"),
        ("bucket/other", ValueError, "no manifest"),
        ("bucket/half", CorruptShard, r"shard train-00000\.parquet of s3://bucket/half is missing"),
    ],
)
def test_what_is_not_there_is_named(server: LoggedServer, path: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as failure:
        open_dataset(server.pets.replace("bucket/pets", path))
    assert "secret" not in str(failure.value)


def test_a_shard_that_vanishes_is_named_by_the_step_that_needs_it(server: LoggedServer) -> None:
    dataset = open_dataset(server.pets)
    client = server.client()
    body = client.get_object(Bucket="bucket", Key="pets/train-00072.parquet")["Body"].read()
    client.delete_object(Bucket="bucket", Key="pets/train-00072.parquet")
    try:
        with pytest.raises(CorruptShard, match=r"shard s3://bucket/pets/train-00072\.parquet \(split train\) is damaged: it is missing"):
            list(make(dataset).train(0, 13))
    finally:
        client.put_object(Bucket="bucket", Key="pets/train-00072.parquet", Body=body)


def test_the_endpoint_and_the_credentials_may_come_from_the_environment(server: LoggedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    config = DataConfig(path="s3://bucket/pets")
    location, dataset = open_prepared(config)
    assert location == "s3://bucket/pets"
    assert dataset.is_remote
    assert is_converted(location)
    assert dataset.split("test").keys([3]) == ["test/3"]
    with pytest.raises(ValueError, match="it has no folder here"):
        prepare(config)
    with pytest.raises(ValueError, match="s3://bucket/pets is remote and cannot be handed on"):
        dataset.files()


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "the credentials may not do this"),
        (403, "InvalidAccessKeyId", "the credentials are not valid"),
        (403, "SignatureDoesNotMatch", "the credentials are not valid"),
        (404, "NoSuchBucket", "bucket"),
    ],
)
def test_what_a_service_refuses_is_not_tried_again_and_says_what_to_do(status: int, code: str, remedy: str) -> None:
    with answering(status, code, "bucket/pets") as uri, pytest.raises(DataRefused, match=remedy) as failure:
        open_dataset(uri, retry_seconds=3600)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_what_may_pass_is_tried_until_the_time_is_up(status: int, code: str) -> None:
    with answering(status, code, "bucket/pets") as uri, pytest.raises(DataOutage, match="did not answer for s3://bucket/pets"):
        open_dataset(uri, retry_seconds=0.2)


def test_a_file_uri_is_its_folder_and_an_unknown_scheme_an_error(folder: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my pets"
    spaced.symlink_to(folder)
    uri = spaced.as_uri()
    assert "%20" in uri
    assert contents(make(open_dataset(uri)).train(0, 3)) == contents(make(open_dataset(folder)).train(0, 3))
    assert prepare(DataConfig(path=uri)) == spaced
    assert open_prepared(DataConfig(path=uri))[0] == os.path.realpath(folder)
    with pytest.raises(ValueError, match=r"unknown scheme 'ftp'.*s3://"):
        open_dataset("ftp://host/pets")
