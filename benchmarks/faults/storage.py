"""The campaign's faults of storage: death at every call of a commit, damaged files, a full disk, an outage. Each uses the real code.

    python -m benchmarks.faults.storage [NAME ...] [--trials N] [--json]

A row says how often the fault was injected (`trials`) and how often the promise did not hold (`violations`; `detail` has the first one).
Called by benchmarks.faults; the unit tests run a short version of each.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from pyarrow import fs as pafs

from cluster import committer as committer_module
from cluster import journal as journal_module
from cluster import store as store_module
from cluster.checkpointer import Checkpointer, Files
from cluster.coordinator import Coordinator
from cluster.failures import is_refusal
from cluster.journal import read_journal
from cluster.spill import Spill
from cluster.storage import RetryPolicy, Storage, open_storage
from cluster.store import CorruptCheckpoint, NoValidCheckpoint, Store

Row = dict[str, Any]

MODES = ("kill", "torn-data", "power")


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults of storage.")
    parser.add_argument("names", nargs="*", choices=[[], *CAMPAIGN], help="which; all of them if none is named")
    parser.add_argument("--trials", type=int, default=0, help="of each; 0 takes the campaign's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for name in options.names or CAMPAIGN for row in CAMPAIGN[name](options.trials)]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['fault']:45} {row['trials']:>5} trials {row['violations']:>3} violations {row['seconds']:6.1f} s  {row['detail']}")
    sys.exit(any(row["violations"] for row in rows))


# -- death at every call of a commit -----------------------------------------------------------------------------------------------------


def kill_at_every_syscall(mode: str, *, rank_files: int = 16, chunk_bytes: int = 64) -> Row:
    """A process stages `rank_files` + 1 files in pieces of `chunk_bytes`, commits and prunes. It is killed (SIGKILL) at each call that
    changes the disk, one call after the other. `mode`: kill; torn-data also cuts unsynced data in half; power also removes names that were
    not synced into their folder.

    Promised: every acknowledged checkpoint is there; whatever is there is complete; if it is not there, the one before it is; a new process
    can continue."""
    assert mode in MODES
    began = time.perf_counter()
    # In memory if possible: Disk models the losses, and the survivors' own fsyncs would take 90 % of the time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    base = tempfile.mkdtemp(prefix="finetune-kill-", dir=memory)
    problems, seen = [], []
    try:
        with mock.patch.object(store_module, "CHUNK_BYTES", chunk_bytes):
            store = Store.open(open_storage(f"{base}/base"), "run")
            store.claim_generation()
            for step in (10, 20):
                _save_files(store, step, rank_files)
            fatal, finished = 0, False
            while not finished:
                fatal += 1
                shutil.copytree(f"{base}/base", f"{base}/try")
                finished, acknowledged = _die(f"{base}/try", mode, fatal, rank_files)
                step, problem = _survive(f"{base}/try", rank_files, acknowledged)
                problems += [f"killed at call {fatal}: {problem}"] if problem else []
                seen.append(step)
                shutil.rmtree(f"{base}/try")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if seen != sorted(seen) or seen[0] != 20 or seen[-1] != 30:
        problems.append(f"the newest checkpoint over the calls was {seen}")
    detail = f"old checkpoint {seen.count(20)} times, new one {seen.count(30) - 1} times"
    return _row(f"kill at every call of a commit ({mode})", fatal - 1, problems, detail, began)


def _save_files(store: Store, step: int, rank_files: int) -> None:
    receipts = [store.stage(step, 1, name, [data], attempt=1) for name, data in _contents(step, rank_files).items()]
    store.commit(step, 1, receipts, {}, attempt=1)


def _contents(step: int, rank_files: int) -> dict[str, bytes]:
    ranks = {f"rank-{rank:05d}.json": json.dumps({"cursor": step}).encode() for rank in range(rank_files)}
    return {"model.safetensors": random.Random(step).randbytes(500), **ranks}


def _die(folder: str, mode: str, fatal: int, rank_files: int) -> tuple[bool, bool]:
    """(whether the process reached its end, whether it was told that its checkpoint is committed)"""
    reading, acknowledge = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store = Store.open(open_storage(folder), "run")
            Disk(mode, fatal).install()
            _save_files(store, 30, rank_files)
            Disk.real["write"](acknowledge, b"1")
            store.prune(2, 1)
            os._exit(0)
        except BaseException:  # one of ours; it must not look like the end of the parent
            traceback.print_exc()
            os._exit(1)
    os.close(acknowledge)
    acknowledged = os.read(reading, 1) == b"1"
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the process was to be killed and ended with {status}"
    return status == 0, acknowledged


def _survive(folder: str, rank_files: int, acknowledged: bool) -> tuple[int, str]:
    """(step of the newest checkpoint, what is wrong with it)"""
    store, reports = Store.open(open_storage(folder), "run"), []
    try:
        commit = store.newest_valid(lambda path, reason: reports.append(f"{path} {reason}"))
        if commit is None or reports:
            return -1, f"{reports or 'no checkpoint'}"
        if {name: commit.read(name) for name in commit.files} != _contents(commit.step, rank_files):
            return commit.step, "other bytes than were committed"
        if acknowledged and commit.step != 30:
            return commit.step, "an acknowledged checkpoint is gone"
        for other in store.commits():  # a half-deleted checkpoint no longer counts
            store.load(other.step, other.generation)
        _save_files(store, 40, rank_files)
        newest = store.newest_valid(lambda path, reason: None)
        return commit.step, "" if newest and newest.step == 40 else "the next process cannot save"
    except (OSError, CorruptCheckpoint, NoValidCheckpoint) as error:
        return -1, f"{type(error).__name__}: {error}"


class Disk:
    """Counts this process's calls that change the disk, kills it at the `fatal`-th, and models what a disk loses with its power: `paths` of
    open descriptors, `dirty` files written but not synced, `log` of name changes that are not synced, with a way to undo each."""

    real: ClassVar = {
        name: getattr(os, name) for name in ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")
    }

    def __init__(self, mode: str, fatal: int) -> None:
        self.mode, self.fatal, self.calls = mode, fatal, 0
        self.paths: dict[int, str] = {}
        self.dirty: set[str] = set()
        self.log: list[tuple[str, str, Callable[[str], object]]] = []

    def install(self) -> None:
        """Patches permanently: only for a process that is to die."""
        shutil._use_fd_functions = False  # so that rmtree calls os.unlink with whole paths
        acts = {"open": self._open, "write": self._write, "fsync": self._fsync, "mkdir": self._mkdir, "rename": self._rename}
        acts |= {"replace": self._rename, "unlink": self._unlink, "rmdir": self._rmdir, "close": self._close}
        for name, act in acts.items():
            setattr(os, name, self._counted(name, act))

    def _counted(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fatal:
                if name == "write":
                    self.real["write"](args[0], args[1][: len(args[1]) // 2])
                    self.dirty.add(self.paths[args[0]])
                if self.mode != "kill":
                    self._power_cut()
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return call

    def _power_cut(self) -> None:
        for path in self.dirty:
            if os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
        for _, path, undo in reversed(self.log if self.mode == "power" else []):
            undo(path)

    def _open(self, path: str, flags: int, *rest: Any, **kwargs: Any) -> int:
        descriptor: int = self.real["open"](path, flags, *rest, **kwargs)
        self.paths[descriptor] = path
        if flags & os.O_CREAT:
            self.log.append((os.path.dirname(path), path, lambda now: os.path.exists(now) and self.real["unlink"](now)))
        return descriptor

    def _write(self, descriptor: int, data: bytes) -> int:
        self.dirty.add(self.paths[descriptor])
        return int(self.real["write"](descriptor, data))

    def _fsync(self, descriptor: int) -> None:  # the model replaces the disk
        self.dirty.discard(self.paths[descriptor])
        self.log = [entry for entry in self.log if entry[0] != self.paths[descriptor]]

    def _mkdir(self, path: str, *rest: Any) -> None:
        self.real["mkdir"](path, *rest)
        self.log.append((os.path.dirname(path), path, lambda now: _remove_tree(now, self.real)))

    def _rename(self, old: str, new: str) -> None:
        self.real["rename"](old, new)

        def moved(path: str) -> str:
            return new + path[len(old) :] if path == old or path.startswith(old + "/") else path

        self.dirty = {moved(path) for path in self.dirty}
        self.log = [(moved(folder), moved(path), undo) for folder, path, undo in self.log]
        self.log.append((os.path.dirname(new), new, lambda now: os.path.exists(now) and self.real["rename"](now, old)))

    def _unlink(self, path: str) -> None:
        data = Path(path).read_bytes()
        self.real["unlink"](path)
        self.log.append((os.path.dirname(path), path, lambda now: os.path.isdir(os.path.dirname(now)) and Path(now).write_bytes(data)))

    def _rmdir(self, path: str) -> None:
        self.real["rmdir"](path)
        self.log.append((os.path.dirname(path), path, lambda now: self.real["mkdir"](now)))

    def _close(self, descriptor: int) -> None:
        self.paths.pop(descriptor, None)
        self.real["close"](descriptor)


def _remove_tree(path: str, real: dict[str, Any]) -> None:
    """Uses the original calls, which are not counted."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path, real)
            else:
                real["unlink"](entry.path)
        real["rmdir"](path)


# -- damage ------------------------------------------------------------------------------------------------------------------------------


def corruptions(trials: int = 1000, *, seed: int = 0, storage: Storage | None = None) -> Row:
    """Flips one bit, or cuts off the end, of a random file of the newest checkpoint; in every second trial after it was verified and before
    it is read. Promised: a load gives the committed bytes, those of the checkpoint before, or an error."""
    began, draw = time.perf_counter(), random.Random(seed)
    storage = storage or memory_storage()
    store = Store.open(storage, "run")
    generation = store.claim_generation()
    written = {step: _contents(step, 4) for step in (1, 2)}
    for step, contents in written.items():
        receipts = [store.stage(step, generation, name, data, attempt=1) for name, data in contents.items()]
        store.commit(step, generation, receipts, {"step": step}, attempt=1)
    path = store.commits()[0].path
    names = [entry.name for entry in storage.list(path)]
    problems, outcomes = [], {"fell back": 0, "refused": 0, "not read any more": 0}
    for trial in range(trials):
        name = draw.choice(names)
        whole = storage.read(f"{path}/{name}")
        damaged, what = _damaged(whole, draw)
        early = store.newest_valid(lambda path, reason: None, mark=False) if trial % 2 else None
        storage.write_atomic(f"{path}/{name}", damaged)
        reader = Store.open(storage, "run")
        commit = early or reader.newest_valid(lambda path, reason: None, mark=False)
        assert commit is not None
        try:
            loaded = {file: commit.read(file) for file in commit.files}
        except CorruptCheckpoint:
            outcomes["refused"] += 1
        else:
            # Damage to COMMIT or the manifest after their verification changes nothing that is read.
            if commit.step == 1:
                outcomes["fell back"] += 1
            elif early is None or name in loaded:
                problems.append(f"{what} of {name} was loaded")
            else:
                outcomes["not read any more"] += 1
            if loaded != written[commit.step]:
                problems.append(f"{what} of {name} gave other bytes")
        storage.write_atomic(f"{path}/{name}", whole)
    detail = ", ".join(f"{what} {count} times" for what, count in outcomes.items())
    return _row(f"bit flips and truncations ({'local' if storage.is_local else 'objects'})", trials, problems, detail, began)


def _damaged(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    if draw.random() < 0.3:
        length = draw.randrange(len(whole))
        return whole[:length], f"truncation to {length} of {len(whole)} bytes"
    bit = draw.randrange(8 * len(whole))
    flipped = bytes([whole[bit // 8] ^ (1 << bit % 8)])
    return whole[: bit // 8] + flipped + whole[bit // 8 + 1 :], f"flip of bit {bit}"


# -- a full disk -------------------------------------------------------------------------------------------------------------------------


def disk_full(trials: int = 20, *, seed: int = 0) -> Row:
    """A tmpfs with a random number of free bytes, through checkpointer and coordinator. Promised: saving raises nothing, the newest
    acknowledged checkpoint loads, and the next one is committed once there is space. Needs the right to mount."""
    began, draw, problems = time.perf_counter(), random.Random(seed), []
    size_bytes, refused = 1 << 20, 0
    folder = tempfile.mkdtemp(prefix="finetune-full-")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size_bytes}".encode()) != 0:
        reason = os.strerror(ctypes.get_errno())
        os.rmdir(folder)
        return _row("disk full", 0, [], f"skipped: a tmpfs cannot be mounted here ({reason})", began)
    try:
        with Group(open_storage(folder), ranks=1) as group:
            for trial in range(trials):
                before = group.save()
                if not group.settle(before):
                    problems.append(f"trial {trial}: with room, step {before} was not committed")
                free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                Path(folder, "filler").write_bytes(bytes(max(0, free_bytes - draw.choice((0, 4096, 40_000, 80_000, 110_000)))))
                step = group.save()
                committed = group.settle(step)
                refused += not committed
                problems += group.problems()
                newest = group.newest()
                if newest != (step if committed else before):
                    problems.append(f"trial {trial}: the newest checkpoint is of step {newest}, acknowledged was {before}")
                os.unlink(f"{folder}/filler")
    finally:
        libc.umount2(folder.encode(), 2)  # MNT_DETACH
        os.rmdir(folder)
    return _row("disk full", trials, problems, f"{refused} checkpoints had no room, the one before stayed", began)


# -- an outage ---------------------------------------------------------------------------------------------------------------------------


def outage(*, seconds: float = 600.0, speed: float = 200.0, ranks: int = 2, storage: Storage | None = None) -> Row:
    """The storage is away for `seconds` on a clock that runs `speed` times faster; `ranks` save every 60 s of that clock.

    Promised: steps continue; at most two checkpoints of a rank wait on its disk, and they leave nothing there; commits come in the order of
    steps; no acknowledged checkpoint is lost; the newest checkpoint is committed afterwards; the journal has every event."""
    began, problems = time.perf_counter(), []
    clock = FastClock(speed)
    place = storage or memory_storage()
    weather = Weather(place.fs)
    retry = RetryPolicy(seconds=20.0, clock=clock, sleep=clock.sleep)
    real = Storage(fs=weather, root=place.root, is_local=False, uri=place.uri, retry=retry)
    patience = {"FIRST_PAUSE_SECONDS": 0.5 / speed, "LONGEST_PAUSE_SECONDS": 5.0 / speed}
    most_spilled, during = 0, 0
    with (
        mock.patch.object(committer_module, "COMMIT_PAUSE_SECONDS", 1.0 / speed),
        mock.patch.multiple(journal_module, **patience),
        Group(real, ranks=ranks, clock=clock, pause=clock.sleep) as group,
    ):
        start = clock()
        while clock() - start < 120 + seconds + 180:
            elapsed = clock() - start
            weather.is_down = 120 <= elapsed < 120 + seconds
            group.save()
            during += weather.is_down
            most_spilled = max(most_spilled, group.spilled())
            clock.sleep(60)
        weather.is_down = False
        last = group.step
        if not group.settle(last):
            problems.append(f"the last checkpoint, of step {last}, was not committed after the outage")
        problems += group.problems()
        if group.newest() != last:
            problems.append(f"the newest checkpoint is of step {group.newest()}, not {last}")
    events = read_journal(real, "run")
    names = [event["event"] for event in events]
    committed = [event["step"] for event in events if event["event"] == "checkpoint_committed"]
    failed = {event["step"] for event in events if event["event"] == "checkpoint_failed"}
    if committed != sorted(committed):
        problems.append(f"committed out of order: {committed}")
    if set(committed) | failed != set(range(1, last + 1)):
        problems.append(f"steps without an answer: {set(range(1, last + 1)) - set(committed) - failed}")
    for name in ("storage_outage", "checkpoint_spilled", "storage_recovered"):
        if name not in names:
            problems.append(f"the journal has no {name}")
    if during < 0.5 * seconds / 60:
        problems.append(f"only {during} checkpoints were saved in {seconds:.0f} s: the steps waited for the storage")
    if most_spilled > 2 * ranks + ranks:  # two that wait, and one being written
        problems.append(f"{most_spilled} checkpoints waited on the disk")
    if os.path.exists(group.spill_dir):
        problems.append(f"left behind: {group.spill_dir}")
    times = [event["time"] for event in events if event["event"] == "checkpoint_committed"]
    gap = max(after - before for before, after in itertools.pairwise(times)) * speed
    detail = (
        f"{seconds:.0f} s away, {during} of {last} checkpoints saved meanwhile, {len(failed)} gave way to newer ones, "
        f"{gap:.0f} s without a commit"
    )
    return _row("outage of the storage", 1, problems, detail, began)


class FastClock:
    """time.monotonic and time.sleep at `speed` times the normal pace."""

    def __init__(self, speed: float) -> None:
        self._speed = speed

    def __call__(self) -> float:
        return time.monotonic() * self._speed

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / self._speed)


class Weather:
    """A pyarrow file system that fails while `is_down`, also for uploads in progress. An interrupted upload is published as far as it got:
    worse than S3, which publishes nothing."""

    def __init__(self, fs: Any) -> None:
        self._fs, self.is_down, self.refused = fs, False, 0

    def check(self) -> None:
        if self.is_down:
            self.refused += 1
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect to server")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.check()
            result = found(*args, **kwargs)
            return _Stream(result, self.check) if name.startswith("open_") else result

        return call


class _Stream:
    def __init__(self, stream: Any, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)

        def call(*args: Any) -> Any:
            self._check()
            return found(*args)

        return call


# -- what the faults are injected into ---------------------------------------------------------------------------------------------------


class Group:
    """A coordinator and `ranks` checkpointers as in a run, without the training between two saves."""

    def __init__(
        self,
        storage: Storage,
        *,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._storage, self._ranks, self.step = storage, ranks, 0
        self._store = Store.open(storage, "run")
        self._generation = self._store.claim_generation()
        self._coordinator = Coordinator(storage, "run", self._generation, 2)
        self._coordinator.start_attempt(1, ranks, 0)
        self.spill_dir = tempfile.mkdtemp(prefix="finetune-spill-")
        self._checkpointers = [self._checkpointer(rank, clock, pause) for rank in range(ranks)]
        self._errors: list[str] = []

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for checkpointer in self._checkpointers:
            checkpointer.close()
        self._coordinator.finish(20)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.spill_dir)  # fails if anything is left

    def save(self) -> int:
        """Saves the next checkpoint of every rank; returns its step."""
        self.step += 1
        for rank, checkpointer in enumerate(self._checkpointers):
            try:
                checkpointer.save(self.step, lambda rank=rank, step=self.step: _files(rank, step), {})  # type: ignore[misc]
            except Exception as error:
                self._errors.append(f"step {self.step}, rank {rank}: {type(error).__name__}: {error}")
        return self.step

    def settle(self, step: int) -> bool:
        """Waits for all pending work; returns whether `step` is committed."""
        for checkpointer in self._checkpointers:
            try:
                checkpointer.wait(30)
            except Exception as error:
                self._errors.append(f"{type(error).__name__}: {error}")
        return self._coordinator.wait_committed(step, 30)

    def newest(self) -> int:
        """The newest checkpoint that loads completely, read as by a new process."""
        commit = Store.open(self._storage, "run").newest_valid(lambda path, reason: self._errors.append(f"{path}: {reason}"), mark=False)
        if commit is None:
            return 0
        for rank in range(self._ranks):
            if commit.read(f"rank-{rank:05d}.bin") != _state(rank, commit.step):
                self._errors.append(f"step {commit.step}: rank {rank} has other bytes than it saved")
        return commit.step

    def spilled(self) -> int:
        """Number of checkpoints on the node's disk."""
        return len(list(Path(self.spill_dir).glob("*/*/rank-*/step-*")))

    def problems(self) -> list[str]:
        errors, self._errors = self._errors, []
        return errors

    def _checkpointer(self, rank: int, clock: Callable[[], float], pause: Callable[[float], object] | None) -> Checkpointer:
        checkpointer = Checkpointer(
            stage=lambda step, name, buffers: self._store.stage(
                step, self._generation, name, buffers, attempt=1, give_up=lambda: checkpointer.hurried()
            ),
            ack=lambda step, receipts, meta: self._coordinator.ack(1, rank, step, receipts, meta),
            on_failed=lambda step, error: self._coordinator.fail_checkpoint(1, rank, step, str(error), is_refusal(error)),
            on_event=lambda event, fields: self._coordinator.event(event, rank=rank, **fields),
            spill=None if self._storage.is_local else Spill(self.spill_dir, "run", self._generation, rank, self._storage),
            clock=clock,
            pause=pause,
        )
        return checkpointer


def _state(rank: int, step: int) -> bytes:
    return random.Random(1000 * step + rank).randbytes(50_000)


def _files(rank: int, step: int) -> Files:
    state = _state(rank, step)
    return lambda: [(f"rank-{rank:05d}.bin", [state[:20_000], state[20_000:]]), (f"rank-{rank:05d}.json", [b"{}"])]


def memory_storage() -> Storage:
    """An object store in this process's memory."""
    filesystem = pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem())
    return Storage(fs=filesystem, root="runs", is_local=False, uri="mock://bucket/runs")


def _row(fault: str, trials: int, problems: list[str], detail: str, began: float) -> Row:
    told = f"{detail}; first violation: {problems[0]}" if problems else detail
    return {"fault": fault, "trials": trials, "violations": len(problems), "detail": told, "seconds": time.perf_counter() - began}


def _local_corruptions(trials: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="finetune-flips-") as folder:
        return corruptions(trials, seed=1, storage=open_storage(folder))


def _merged(rows: list[Row]) -> Row:
    """Merges rows of one fault into one, with the detail of the first failure or, if there is none, of the last row."""
    told = next((row for row in rows if row["violations"]), rows[-1])
    sums = {key: sum(row[key] for row in rows) for key in ("trials", "violations", "seconds")}
    return {**told, **sums}


CAMPAIGN: dict[str, Callable[[int], list[Row]]] = {
    "kill_at_every_syscall": lambda trials: [kill_at_every_syscall(mode, rank_files=trials or 16) for mode in MODES],
    "corruptions": lambda trials: [_local_corruptions(trials or 1000), corruptions(trials or 1000)],
    "disk_full": lambda trials: [disk_full(trials or 20)],
    "outage": lambda trials: [_merged([outage() for _ in range(trials or 3)])],
}

if __name__ == "__main__":
    main()
