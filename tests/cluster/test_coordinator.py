"""The coordinator: checkpoints from acks to commits, one common stop, and nothing that dies with it."""

import errno
import json
import pickle
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pyarrow import fs as pafs

from cluster import committer
from cluster.agent import RankEnd
from cluster.beat import Beat, BeatReply
from cluster.coordinator import Coordinator
from cluster.heartbeat import CoordinatorLost, Heartbeat
from cluster.journal import read_journal
from cluster.names import FILE_SD
from cluster.roster import RankInfo
from cluster.state import AttemptOver
from cluster.storage import Storage, StorageOutage, open_storage
from cluster.store import Receipt, StorageFull, Store
from cluster.targets import Discovery


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(open_storage(tmp_path), "run")


@pytest.fixture
def coordinator(tmp_path: Path, store: Store) -> Iterator[Coordinator]:
    coordinator = Coordinator(str(tmp_path), "run", store.claim_generation(), 2)
    yield coordinator
    coordinator.close()


def info(rank: int) -> RankInfo:
    return RankInfo(host="localhost", pid=100 + rank, node_id="node", metrics_address=f"127.0.0.1:{9000 + rank}")


def beat(attempt: int, rank: int, steps_done: int, stats: dict[str, float] | None = None, own_seconds: float | None = None) -> Beat:
    return Beat(attempt=attempt, rank=rank, steps_done=steps_done, steps_begun=steps_done, stats=stats or {}, own_seconds=own_seconds)


def events(store: Store, name: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(store.storage, "run") if event["event"] == name]


def save(coordinator: Coordinator, store: Store, step: int, ranks: int = 2, attempt: int = 1, generation: int = 1) -> None:
    for rank in range(ranks):
        receipt = store.stage(step, generation, f"rank-{rank:04d}.json", f"{step}/{rank}".encode(), attempt=attempt)
        coordinator.ack(attempt, rank, step, [receipt], {"world": ranks} if rank == 0 else {f"rank{rank}": rank})


def newest(store: Store) -> int | None:
    commit = store.newest_valid(lambda path, reason: None)
    return None if commit is None else commit.step


# Checkpoints


def test_a_checkpoint_is_committed_when_all_ranks_acked_and_not_before(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    receipt = store.stage(5, 1, "rank-0000.json", b"5/0", attempt=1)
    coordinator.ack(1, 0, 5, [receipt], {"world": 2})
    coordinator.ack(1, 0, 5, [receipt], {"world": 2})  # the same rank again
    assert not coordinator.wait_committed(5, 0.1)
    assert newest(store) is None
    coordinator.ack(1, 1, 5, [store.stage(5, 1, "rank-0001.json", b"5/1", attempt=1)], None)
    assert coordinator.wait_committed(5, 10)
    commit = store.newest_valid(print)
    assert commit is not None
    assert (commit.step, commit.meta, commit.read("rank-0001.json")) == (5, {"world": 2}, b"5/1")
    last = coordinator.last_commit()
    assert last is not None
    assert last.step == 5
    assert abs(last.time - time.time()) < 60
    (event,) = events(store, "checkpoint_committed")
    assert (event["step"], event["size_bytes"], event["attempt"]) == (5, 6, 1)


def test_old_checkpoints_are_pruned_after_a_commit(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    for step in range(1, 6):
        save(coordinator, store, step)
    assert coordinator.finish(20)
    assert [commit.step for commit in store.commits()] == [5, 4]


def test_acks_of_an_older_attempt_are_ignored(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    coordinator.ack(1, 0, 5, [store.stage(5, 1, "rank-0000.json", b"old", attempt=1)], {})
    coordinator.start_attempt(2, 2, 0)
    coordinator.ack(1, 1, 5, [store.stage(5, 1, "rank-0001.json", b"old", attempt=1)], {})
    coordinator.ack(2, 1, 5, [store.stage(5, 1, "rank-0001.json", b"new", attempt=2)], {})
    assert not coordinator.wait_committed(5, 0.1)
    coordinator.ack(2, 0, 5, [store.stage(5, 1, "rank-0000.json", b"new", attempt=2)], {})
    assert coordinator.wait_committed(5, 10)
    commit = store.newest_valid(print)
    assert commit is not None
    assert [commit.read(name) for name in sorted(commit.files)] == [b"new", b"new"]
    coordinator.start_attempt(2, 2, 0)  # the same again
    with pytest.raises(AttemptOver, match="attempt=2 of 3 ranks"):
        coordinator.start_attempt(2, 3, 0)
    with pytest.raises(AttemptOver, match=r"attempt=1 .* is not above the attempt before, 2"):
        coordinator.start_attempt(1, 2, 0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(StorageFull(errno.ENOSPC, "no room"), "storage_full"), (OSError("outage"), "OSError"), (RuntimeError("bug"), "RuntimeError")],
)
def test_a_failed_commit_is_told_and_the_next_one_goes_through(
    coordinator: Coordinator, store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    coordinator.start_attempt(1, 2, 0)
    save(coordinator, store, 1)
    assert coordinator.wait_committed(1, 10)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", fail)
        save(coordinator, store, 2)
        began = time.monotonic()
        assert not coordinator.wait_committed(2, 30)
        assert time.monotonic() - began < 10  # a failure is an answer
    assert newest(store) == 1
    (event,) = events(store, "checkpoint_failed")
    assert (event["step"], event["kind"]) == (2, kind)
    assert coordinator.status().checkpoints.failures == 1
    assert coordinator.status().checkpoints.problem == str(error)
    save(coordinator, store, 3)
    assert coordinator.wait_committed(3, 10)
    assert newest(store) == 3


def test_a_rank_that_cannot_stage_fails_the_checkpoint_and_nothing_else(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    coordinator.ack(1, 1, 4, [store.stage(4, 1, "rank-0001.json", b"4/1", attempt=1)], {})
    coordinator.fail_checkpoint(1, 0, 4, "no room")
    assert not coordinator.wait_committed(4, 30)
    coordinator.ack(1, 0, 4, [store.stage(4, 1, "rank-0000.json", b"4/0", attempt=1)], {})  # too late
    coordinator.fail_checkpoint(1, 1, 4, "no room here either")
    assert coordinator.drain(5)
    assert newest(store) is None
    assert coordinator.status().checkpoints.failures == 1
    save(coordinator, store, 8)
    assert coordinator.wait_committed(8, 10)


def test_a_driver_that_was_replaced_stops(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    Store.open(store.storage, "run").claim_generation()
    save(coordinator, store, 1)
    assert not coordinator.wait_committed(1, 10)
    assert coordinator.drain(10)
    assert "taken over by generation 2" in str(coordinator.status().stop.reason)
    assert newest(store) is None


def test_what_is_newer_than_the_start_of_an_attempt_is_no_answer_to_its_waits(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    for step in (2, 6):
        save(coordinator, store, step)
    assert coordinator.drain(10)
    coordinator.start_attempt(2, 2, 2)  # the driver found step 6 corrupt
    assert not coordinator.wait_committed(4, 0.05)
    last = coordinator.last_commit()
    assert last is not None
    assert last.step == 2


def test_commits_work_on_object_stores(tmp_path: Path) -> None:
    storage = Storage(fs=pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()), root="runs", is_local=False, uri="mock://bucket/runs")
    store = Store.open(storage, "run")
    coordinator = Coordinator(storage, "run", store.claim_generation(), 2)
    coordinator.start_attempt(1, 2, 0)
    coordinator.quarantine([{"key": "k", "reason": "truncated", "split": "train", "sample_id": 4}])
    save(coordinator, store, 3)
    assert coordinator.finish(10)
    assert newest(store) == 3
    assert len(events(store, "checkpoint_committed")) == 1
    assert json.loads(storage.read("run/quarantine.jsonl"))["key"] == "k"


class Away:
    """A store's commit that finds nobody for so many calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left, self.real, self.tried = calls, Store.commit, []
        monkeypatch.setattr(committer, "COMMIT_PAUSE_SECONDS", 0.005)
        monkeypatch.setattr(Store, "commit", self.bound())

    def bound(self) -> Any:
        def commit(store: Store, step: int, *rest: Any, attempt: int) -> Any:
            self.tried.append(step)
            self.left -= 1
            if self.left >= 0:
                raise StorageOutage("nobody answers")
            return self.real(store, step, *rest, attempt=attempt)

        return commit


def test_a_commit_waits_for_a_storage_that_is_away_and_the_next_ones_with_it(
    coordinator: Coordinator, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.start_attempt(1, 2, 0)
    away = Away(monkeypatch, 10)
    for step in (4, 8, 12):
        save(coordinator, store, step)
    assert coordinator.wait_committed(12, 20)
    assert away.tried == [4] * 11 + [8, 12]
    assert [event["step"] for event in events(store, "checkpoint_committed")] == [4, 8, 12]
    assert [event["step"] for event in events(store, "storage_outage")] == [4]
    assert [event["step"] for event in events(store, "storage_recovered")] == [4]
    assert coordinator.status().checkpoints.failures == 0


def test_commits_do_not_pile_up_without_end_where_ranks_reach_the_storage_and_the_coordinator_does_not(
    coordinator: Coordinator, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.start_attempt(1, 2, 0)
    away = Away(monkeypatch, 10**9)
    for step in range(1, 11):
        save(coordinator, store, step)
    assert not coordinator.wait_committed(7, 20)  # given up
    assert sorted({event["step"] for event in events(store, "checkpoint_failed")}) == list(range(1, 8))
    away.left = 0
    assert coordinator.wait_committed(10, 20)
    assert [event["step"] for event in events(store, "checkpoint_committed")] == [8, 9, 10]


def test_an_outage_that_outlasts_the_run_does_not_hold_up_its_end(
    coordinator: Coordinator, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.start_attempt(1, 2, 0)
    Away(monkeypatch, 10**9)
    save(coordinator, store, 4)
    assert not coordinator.finish(0.05)
    assert coordinator.drain(20)
    assert [event["kind"] for event in events(store, "checkpoint_failed")] == ["StorageOutage"]


# Stopping


def test_while_a_stop_is_being_agreed_on_beats_are_urgent_and_do_not_wait_for_their_turn() -> None:
    beats: list[Beat] = []
    ended = threading.Event()

    def call(beat: Beat) -> BeatReply:
        beats.append(beat)
        if len(beats) == 30:
            ended.set()
        return BeatReply(stop_at=None, confirmed=False, again_seconds=0.001 if len(beats) < 30 else None)

    heartbeat = Heartbeat(call, 0, 1, 60.0, start_step=0)
    assert ended.wait(30)
    time.sleep(0.1)
    assert len(beats) == 30  # once it is agreed on, the interval counts again
    heartbeat.close()
    assert [beat.urgent for beat in beats] == [False, *[True] * 29, True]


@pytest.mark.parametrize("ranks", [1, 3])
def test_real_ranks_with_real_heartbeats_stop_together_while_training(coordinator: Coordinator, ranks: int) -> None:
    coordinator.start_attempt(1, ranks, 7)
    barrier, stopped = threading.Barrier(ranks), {}

    def rank_main(rank: int) -> None:
        heartbeat = Heartbeat(coordinator.beat, rank, 1, 0.01 * (rank + 1), start_step=7)
        step = 7
        while True:
            barrier.wait(20)  # the all-reduce of a step
            time.sleep(0.0005)
            step += 1
            heartbeat.progress(step, {"images_per_second": 100.0, "loss": float(rank)})
            if heartbeat.should_stop(step):
                break
        stopped[rank] = step
        heartbeat.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    status = coordinator.status()
    assert status.steps_done > 7
    assert set(status.ranks) == set(range(ranks))
    assert {rank: known.stats["loss"] for rank, known in status.ranks.items()} == {rank: float(rank) for rank in range(ranks)}
    coordinator.request_stop("SIGTERM")
    for thread in threads:
        thread.join(20)
    assert len(stopped) == ranks
    assert len(set(stopped.values())) == 1
    final = coordinator.status()
    assert (final.stop.reason, final.stop.at, final.stop.confirmed) == ("SIGTERM", stopped[0], True)


def test_a_rank_does_not_wait_when_nobody_asks_it_to_stop(coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 1, 0)
    heartbeat = Heartbeat(coordinator.beat, 0, 1, 60.0, start_step=0)
    began = time.perf_counter()
    assert not any(heartbeat.should_stop(step) for step in range(1, 20_001))
    assert time.perf_counter() - began < 2.0  # 0.1 ms a step on a busy machine; no call to the coordinator
    heartbeat.close()
    assert coordinator.status().steps_done == 20_000


def test_training_goes_on_without_a_coordinator_and_a_waiting_rank_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([BeatReply(stop_at=5, confirmed=False)])

    def call(_: Beat) -> BeatReply:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("the node is gone") from None

    heartbeat = Heartbeat(call, 0, 1, 0.01, start_step=0, patience_seconds=0.2)
    time.sleep(0.1)
    assert not heartbeat.should_stop(3)
    assert not heartbeat.should_stop(4)
    with pytest.raises(CoordinatorLost, match=r"waits after 5 steps .* 0.2 s; .*the node is gone"):
        heartbeat.should_stop(5)
    heartbeat.close()


def test_beats_of_an_older_attempt_get_no_orders_and_change_nothing(coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 1, 0)
    coordinator.beat(beat(1, 0, 50))
    coordinator.start_attempt(2, 1, 10)
    coordinator.request_stop("SIGINT")
    assert coordinator.beat(beat(1, 0, 51)) == BeatReply(stop_at=None, confirmed=False)
    assert coordinator.status().ranks == {}
    orders = coordinator.beat(beat(2, 0, 12))
    assert orders.stop_at is not None
    assert orders.stop_at > 12


# What outlives it


def test_a_new_coordinator_knows_what_the_dead_one_knew(tmp_path: Path, store: Store) -> None:
    generation = store.claim_generation()
    dead = Coordinator(str(tmp_path), "run", generation, 2)
    dead.start_attempt(3, 2, 40)
    for rank in range(2):
        dead.register(3, rank, info(rank))
    save(dead, store, 44, attempt=3)
    dead.quarantine([{"key": "a", "reason": "truncated", "split": "train", "sample_id": 1}])
    assert dead.drain(10)
    dead.request_stop("SIGTERM")
    heir = Coordinator(str(tmp_path), "run", generation, 2)
    status = heir.status()
    assert (status.attempt, status.world_size, status.start_step) == (3, 2, 40)
    assert status.checkpoints.last is not None
    assert (status.checkpoints.last.step, status.stop.reason, status.quarantined) == (44, "SIGTERM", 1)
    assert {rank: known.info for rank, known in status.ranks.items()} == {0: info(0), 1: info(1)}
    assert [target["targets"] for target in heir.targets()] == [["127.0.0.1:9000"], ["127.0.0.1:9001"], [heir.discovery_address()]]
    assert json.loads((tmp_path / "run" / FILE_SD).read_text()) == heir.targets()
    save(heir, store, 48, attempt=3)
    assert heir.wait_committed(48, 10)
    for each in (dead, heir):
        each.close()


def test_the_stop_of_an_earlier_driver_does_not_stop_the_next(tmp_path: Path, store: Store) -> None:
    first = Coordinator(str(tmp_path), "run", store.claim_generation(), 2)
    first.start_attempt(1, 1, 0)
    first.request_stop("SIGTERM")
    first.close()
    second = Coordinator(str(tmp_path), "run", store.claim_generation(), 2)
    assert second.status().stop.reason is None
    second.start_attempt(2, 1, 0)
    assert second.beat(beat(2, 0, 5)) == BeatReply(stop_at=None, confirmed=False)
    second.close()


# Samples, targets, metrics


def test_a_bad_sample_counts_once_over_ranks_and_attempts(tmp_path: Path, coordinator: Coordinator, store: Store) -> None:
    def bad(split: str, sample_id: int) -> dict[str, Any]:
        return {"key": f"{split}/{sample_id}", "reason": "truncated", "split": split, "sample_id": sample_id}

    assert coordinator.quarantine([bad("train", 1), bad("train", 2)]) == 2
    assert coordinator.quarantine([bad("train", 2), bad("test", 2)]) == 3
    assert coordinator.quarantine([]) == 3
    heir = Coordinator(str(tmp_path), "run", 1, 2)
    assert heir.quarantine([bad("train", 1)]) == 3
    heir.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [bad("train", 1), bad("train", 2), bad("test", 2)]
    assert len(events(store, "sample_quarantined")) == 3


def test_prometheus_finds_the_ranks_of_the_current_attempt(tmp_path: Path, coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 2, 0)
    coordinator.register(1, 0, info(5))
    coordinator.start_attempt(2, 2, 0)
    for rank in range(2):
        coordinator.register(2, rank, info(rank))
    coordinator.register(1, 1, info(6))
    with urllib.request.urlopen(f"http://{coordinator.discovery_address()}/sd", timeout=10) as response:
        assert response.headers["Content-Type"] == "application/json"
        served = json.load(response)
    assert served == [
        {"targets": ["127.0.0.1:9000"], "labels": {"run": "run", "rank": "0", "attempt": "2"}},
        {"targets": ["127.0.0.1:9001"], "labels": {"run": "run", "rank": "1", "attempt": "2"}},
        {"targets": [coordinator.discovery_address()], "labels": {"run": "run", "rank": "coordinator", "attempt": "0"}},
    ]
    assert json.loads((tmp_path / "run" / FILE_SD).read_text()) == served
    coordinator.close()
    assert json.loads((tmp_path / "run" / FILE_SD).read_text()) == []


def exposition(coordinator: Coordinator) -> dict[str, float]:
    """Its series, without the labels that all of them have."""
    with urllib.request.urlopen(f"http://{coordinator.discovery_address()}/metrics", timeout=10) as response:
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#")]
    everywhere = ('attempt="0"', 'rank="coordinator"', 'run="run"')
    found = {}
    for name, value in lines:
        bare, _, labels = name.partition("{")
        own = [label for label in labels.rstrip("}").split(",") if label not in everywhere]
        found[bare.removeprefix("finetune_") + (f"{{{own[0]}}}" if own else "")] = float(value)
    return found


def counted(coordinator: Coordinator, name: str) -> dict[str, float]:
    return {series: value for series, value in exposition(coordinator).items() if series.startswith(name) and value}


def test_failures_restarts_and_commits_are_in_the_metrics(coordinator: Coordinator, store: Store) -> None:
    coordinator.start_attempt(1, 2, 0)
    assert exposition(coordinator)['restarts_total{kind="hang"}'] == 0  # there before it happens, so that Prometheus sees it rise
    save(coordinator, store, 6)
    assert coordinator.drain(10)
    coordinator.event("attempt_failed", kind="infrastructure", message="SIGKILL", last_step=7)
    assert counted(coordinator, "restarts_total") == {}  # no attempt has followed
    coordinator.start_attempt(2, 2, 6)
    now = exposition(coordinator)
    assert (now["checkpoint_commit_step"], now["checkpoint_commit_seconds_count"]) == (6, 1)
    assert counted(coordinator, "restarts_total") == {'restarts_total{kind="infrastructure"}': 1}
    assert counted(coordinator, "failures_total") == {'failures_total{kind="infrastructure"}': 1}
    assert [event["last_step"] for event in events(store, "attempt_failed")] == [7]


def test_a_restart_counts_under_what_ended_the_attempt_before_and_wrong_numbers_as_a_rollback(tmp_path: Path, store: Store) -> None:
    generation = store.claim_generation()
    first = Coordinator(str(tmp_path), "run", generation, 2)
    for attempt, kind in enumerate(("numbers", "hang", "numbers", "", "of the future"), start=1):
        first.start_attempt(attempt, 2, 0)
        if kind:
            first.event("attempt_failed", kind=kind, message="")
    first.start_attempt(6, 2, 0)
    first.event("attempt_paused", attempt=6, kind="grow", reason="there is room")
    first.start_attempt(7, 3, 0)
    restarts = {f'restarts_total{{kind="{kind}"}}': n for kind, n in {"numbers": 2, "hang": 1, "grow": 1, "other": 2}.items()}
    failures = {f'failures_total{{kind="{kind}"}}': n for kind, n in {"numbers": 2, "hang": 1, "other": 1}.items()}
    assert counted(first, "restarts_total") == restarts
    assert counted(first, "failures_total") == failures
    assert counted(first, "rollbacks_total") == {"rollbacks_total": 2}
    # The one that takes up its work goes on counting, and knows what ended the attempt before the next.
    first.event("attempt_failed", kind="preempted", message="")
    heir = Coordinator(str(tmp_path), "run", generation, 2)
    assert counted(heir, "restarts_total") == restarts
    heir.start_attempt(8, 2, 0)
    assert counted(heir, "restarts_total") == restarts | {'restarts_total{kind="preempted"}': 1}
    assert counted(heir, "failures_total") == failures | {'failures_total{kind="preempted"}': 1}
    assert counted(heir, "rollbacks_total") == {"rollbacks_total": 2}
    # A driver that was started anew has its own count.
    other = Coordinator(str(tmp_path), "run", store.claim_generation(), 2)
    other.start_attempt(9, 2, 0)
    assert counted(other, "restarts_total") == counted(other, "failures_total") == {}
    for each in (first, heir, other):
        each.close()


def test_what_is_gone_is_no_target_and_has_no_series(tmp_path: Path, coordinator: Coordinator) -> None:
    """Of a rank, Prometheus knows what its own server tells, and that ends with its process; what outlives it names no rank."""

    def targets() -> list[str]:
        with urllib.request.urlopen(f"http://{coordinator.discovery_address()}/sd", timeout=10) as response:
            served = json.load(response)
        assert json.loads((tmp_path / "run" / FILE_SD).read_text()) == served
        return [target["labels"]["rank"] for target in served]

    coordinator.start_attempt(1, 3, 0)
    for rank in range(3):
        coordinator.register(1, rank, info(rank))
        coordinator.beat(beat(1, rank, 5, {"loss": 1.0}, own_seconds=1.0))
    assert targets() == ["0", "1", "2", "coordinator"]
    coordinator.rank_ended(1, 1, RankEnd(status=-9, error=None, killed_by_order=False))
    assert targets() == ["0", "2", "coordinator"]  # at once, while the others are still being ended
    coordinator.event("attempt_failed", kind="infrastructure", rank=1, message="SIGKILL")
    coordinator.start_attempt(2, 2, 0)
    assert targets() == ["coordinator"]  # those of the attempt before too, before any of the new ones is up
    for rank in range(2):
        coordinator.register(2, rank, info(rank))
    assert targets() == ["0", "1", "coordinator"]
    with urllib.request.urlopen(f"http://{coordinator.discovery_address()}/metrics", timeout=10) as response:
        series = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    assert len(series) > 20
    for line in series:
        assert 'rank="coordinator"' in line
        assert 'attempt="0"' in line


def test_a_thousand_ranks_are_one_answer_of_less_than_200_kb(coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 1000, 0)
    found = {rank: replace(info(rank), metrics_address=f"worker-{rank:04d}.ray-cluster.svc:40000") for rank in range(1000)}
    with patch.object(Discovery, "write"):  # the file has the same, test_what_is_gone says; a thousand times is long
        for rank, where in found.items():
            coordinator.register(1, rank, where)
    with urllib.request.urlopen(f"http://{coordinator.discovery_address()}/sd", timeout=10) as response:
        body = response.read()
    assert len(body) < 200_000
    assert [target["labels"]["rank"] for target in json.loads(body)] == [*map(str, range(1000)), "coordinator"]


def test_what_goes_over_the_wire_can_be_pickled(coordinator: Coordinator) -> None:
    coordinator.start_attempt(1, 1, 0)
    coordinator.register(1, 0, info(0))
    coordinator.beat(beat(1, 0, 3, {"loss": 1.0}))
    for message in (coordinator.status(), BeatReply(stop_at=4, confirmed=True), Receipt(name="a", size_bytes=1, sha256="0"), info(0)):
        assert pickle.loads(pickle.dumps(message)) == message


def test_close_ends_its_threads_and_frees_its_port(tmp_path: Path, store: Store) -> None:
    before = set(threading.enumerate())
    coordinator = Coordinator(str(tmp_path), "run", store.claim_generation(), 2)
    port = int(coordinator.discovery_address().rpartition(":")[2])
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"):
        Coordinator(str(tmp_path), "run", 1, 2, "127.0.0.1", port)
    assert coordinator.finish(5)
    coordinator.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before
    again = Coordinator(str(tmp_path), "run", 1, 2, "127.0.0.1", port)
    again.close()
