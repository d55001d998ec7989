"""An S3-compatible service over HTTP (moto's server): commits, fences, refusals and outages as pyarrow's client sees them."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.storage import Group
from cluster.journal import Journal, read_journal
from cluster.storage import Storage, StorageOutage, StorageRefused, open_storage
from cluster.store import Fenced, Store
from tests.ports import free_ports
from tests.s3 import Server, answering, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.fixture
def storage(server: Server) -> Iterator[Storage]:
    """A bucket with nothing in it."""
    client = server.client()
    client.create_bucket(Bucket="bucket")
    yield open_storage(server.uri("bucket/runs"), retry_seconds=5.0)
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])


def save(store: Store, step: int, generation: int) -> None:
    receipts = [
        store.stage(step, generation, "model.safetensors", [f"weights of {step}".encode(), memoryview(bytearray(1000))], attempt=1),
        store.stage(step, generation, "rank-00000.json", b"{}", attempt=1),
    ]
    store.commit(step, generation, receipts, {"step": step}, attempt=1)


def newest_step(storage: Storage) -> int:
    commit = Store.open(storage, "run").newest_valid(lambda path, reason: None)
    if commit is None:
        return -1
    assert commit.read("model.safetensors") == f"weights of {commit.step}".encode() + bytes(1000)
    return commit.step


def test_commits_are_found_pruned_and_read_by_another_process(storage: Storage) -> None:
    store = Store.open(storage, "run")
    assert newest_step(storage) == -1
    generation = store.claim_generation()
    for step in (1, 2, 3, 4):
        save(store, step, generation)
    assert [commit.step for commit in store.commits()] == [4, 3, 2, 1]
    assert len(store.prune(2, generation)) == 2
    assert [commit.step for commit in Store.open(storage, "run").commits()] == [4, 3]
    assert Store.open(storage, "run").load(3, generation).meta == {"step": 3}
    assert newest_step(storage) == 4


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(storage: Storage) -> None:
    store = Store.open(storage, "run")
    generation = store.claim_generation()
    data = os.urandom(1 << 20) * 23
    receipt = store.stage(1, generation, "model.safetensors", [memoryview(data)[: 12 << 20], memoryview(data)[12 << 20 :]], attempt=1)
    store.commit(1, generation, [receipt], {}, attempt=1)
    commit = Store.open(storage, "run").newest_valid(lambda path, reason: None)
    assert commit is not None
    assert commit.read("model.safetensors") == data
    assert b"".join(storage.read_chunks(f"{commit.path}/model.safetensors", 5 << 20)) == data


def test_a_damaged_object_falls_back_and_is_marked(storage: Storage) -> None:
    store = Store.open(storage, "run")
    generation = store.claim_generation()
    save(store, 1, generation)
    save(store, 2, generation)
    storage.write_atomic(f"{store.commits()[0].path}/model.safetensors", b"something else")
    reports: list[str] = []
    for _ in range(2):
        commit = Store.open(storage, "run").newest_valid(lambda path, reason: reports.append(reason))
        assert commit is not None
        assert commit.step == 1
    assert len(reports) == 1


def test_generations_are_unique_however_many_drivers_start_at_once(storage: Storage) -> None:
    claimed: list[int] = []
    for trial in range(1, 4):
        together(*[lambda: claimed.append(Store.open(storage, "run").claim_generation())] * 4)
        assert len(set(claimed)) == 4 * trial


def test_a_commit_that_was_acknowledged_is_seen_by_the_driver_that_took_over_meanwhile(storage: Storage) -> None:
    """Both at once, many times: the old driver is told that it committed, and the new one begins from that; or that it was fenced off."""
    for trial in range(25):
        run = f"run-{trial}"
        old, new = Store.open(storage, run), Store.open(storage, run)
        first = old.claim_generation()
        save(old, 10, first)
        receipt = old.stage(20, first, "model.safetensors", b"20", attempt=1)
        outcome: dict[str, Any] = {}

        def commit(old: Store = old, first: int = first, receipt: Any = receipt, outcome: dict[str, Any] = outcome) -> None:
            try:
                outcome["acknowledged"] = old.commit(20, first, [receipt], {}, attempt=1).step
            except Fenced:
                outcome["fenced"] = True

        def take_over(new: Store = new, outcome: dict[str, Any] = outcome, delay: float = trial / 1000) -> None:
            time.sleep(delay)
            outcome["generation"] = new.claim_generation()
            found = new.newest_valid(lambda path, reason: None)
            assert found is not None
            outcome["start"] = found.step

        together(commit, take_over)
        assert outcome["generation"] == 2
        assert ("acknowledged" in outcome) != ("fenced" in outcome)
        if "acknowledged" in outcome:
            assert outcome["start"] == 20, trial
        with pytest.raises(Fenced):
            old.commit(20, first, [receipt], {}, attempt=1)


def test_an_outage_of_the_service_costs_no_checkpoint(server: Server, storage: Storage, tmp_path: Path) -> None:
    impatient = open_storage(server.uri("bucket/runs"), retry_seconds=0.3)
    with Group(impatient, ranks=2) as group:
        assert group.settle(group.save())
        server.stop()
        try:
            for _ in range(4):
                group.save()
                time.sleep(0.2)
        finally:
            server.start()
        assert group.settle(group.step)
        assert group.newest() == group.step
        assert group.problems() == []
        assert group.spilled() == 0
    assert not os.path.exists(group.spill_dir)
    events = read_journal(storage, "run")
    names = [event["event"] for event in events]
    assert names.index("storage_outage") < names.index("checkpoint_spilled") < names.index("storage_recovered")
    committed = [event["step"] for event in events if event["event"] == "checkpoint_committed"]
    assert committed == sorted(committed)


def test_journal_events_of_an_outage_arrive_in_order(server: Server, storage: Storage) -> None:
    journal = Journal.open(open_storage(server.uri("bucket/runs"), retry_seconds=0.0), "run", "driver")
    journal.write("before")
    server.stop()
    try:
        for number in range(5):
            journal.write("during", number=number)
        assert not journal.flush(0.1)
    finally:
        server.start()
    assert journal.flush(20)
    journal.write("after")
    events = read_journal(storage, "run")
    assert [event["event"] for event in events] == ["before", *["during"] * 5, "after"]
    assert [event["number"] for event in events[1:6]] == list(range(5))


# What other services say


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (403, "AccessDenied", "the credentials may not do this"),
        (403, "", "the credentials may not do this"),
        (403, "InvalidAccessKeyId", "the credentials are not valid"),
        (403, "SignatureDoesNotMatch", "the credentials are not valid"),
        (400, "ExpiredToken", "the credentials are not valid"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (507, "", "trying again would not help"),
    ],
)
def test_what_a_service_refuses_is_not_tried_again_and_says_what_to_do(status: int, code: str, fix: str) -> None:
    with answering(status, code, "bucket/runs") as uri, pytest.raises(StorageRefused, match=fix) as failure:
        open_storage(uri, retry_seconds=3600.0).write_atomic("run/file", b"x")
    assert "bucket/runs/run/file" in str(failure.value)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (503, ""), (500, "InternalError"), (429, "")])
def test_what_may_pass_is_tried_until_the_time_is_up(status: int, code: str) -> None:
    with answering(status, code, "bucket/runs") as uri, pytest.raises(StorageOutage, match="did not answer for bucket/runs/run/file"):
        open_storage(uri, retry_seconds=0.2).write_atomic("run/file", b"x")


def test_nobody_listening_is_an_outage() -> None:
    [port] = free_ports(1)
    storage = open_storage(f"s3://user:secret@bucket/runs?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1", 0.0)
    for act in (lambda: storage.read("x"), lambda: storage.list("x"), lambda: storage.exists("x"), lambda: storage.delete_dir("x")):
        with pytest.raises(StorageOutage):
            act()


def together(*acts: Any) -> None:
    """All at once, each in a thread; the first error is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(acts))

    def run(act: Any) -> None:
        try:
            barrier.wait(30)
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
