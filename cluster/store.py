"""Checkpoints that exist only once they are committed: stage, commit, newest_valid, prune.

Ranks stage (trainer/rank/saving.py), the coordinator commits and prunes, driver and workers read. This module knows bytes and hashes.
trainer decides what the bytes mean and when to save.

    <run>/generations/g0001                          one driver's claim; a newer one fences off the older ones
    <run>/checkpoints/step-00001200.g0001/           model.safetensors, ..., MANIFEST.json, COMMIT

Writing on a local file system; every file and every changed folder is fsynced before the next step:
  1. the caller has its state in private buffers;
  2. each rank writes with O_EXCL into `step-N.gG.tmp/` and hashes what it writes;
  3. MANIFEST.json: size and SHA-256 of every file;
  4. `step-N.gG.tmp` is renamed to `step-N.gG`;
  5. COMMIT, the manifest's SHA-256, through COMMIT.tmp and a rename. Only now does the checkpoint exist.
Object stores cannot rename. There the files go under a prefix that no other driver uses (its name contains the claim's random token), then
the manifest, then the object COMMIT.

Only one driver wins: before and after writing COMMIT, a driver checks whether a newer one has claimed the run. commit() returns only if
none had after COMMIT was written. A newer driver reads after its claim, so it sees every acknowledged checkpoint. A driver that stalls
between its check and COMMIT leaves a complete checkpoint under its own name, and gets Fenced.

On a remote storage all of this may be repeated after a failure, in part or in whole, with the same result.

Reading trusts no pointer: newest first, COMMIT -> manifest -> every hash, before anything is parsed. A bad checkpoint is reported and
set aside."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.storage import CHUNK_BYTES, Entry, Storage, make_dirs, sync_dir, write_all, write_new

Chunks = bytes | bytearray | memoryview | Iterable[bytes | bytearray | memoryview]

MANIFEST = "MANIFEST.json"
COMMIT = "COMMIT"
CORRUPT = "CORRUPT"
VERSION = 1

_FOLDER = re.compile(r"step-(\d{8,})\.g(\d{4,})(?:-[0-9a-f]{8})?(\.tmp|\.corrupt(?:-\d+)?)?")
_CLAIM = re.compile(r"g(\d{4,})")
_BID = re.compile(r"bid-(\d{4,})-[0-9a-f]{8}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_FIX = "free some space, lower --cluster.keep-checkpoints or move --storage"


class StorageFull(OSError):
    """No room for a checkpoint; existing ones are intact."""

    failure_kind = "user"


class Fenced(RuntimeError):
    """A newer driver has claimed the run: this one must no longer commit."""

    failure_kind = "user"


class CorruptCheckpoint(ValueError):
    """A committed checkpoint whose bytes differ from those committed."""

    failure_kind = "user"


class NoValidCheckpoint(RuntimeError):
    """The run has checkpoints but none can be trusted. Starting from zero instead would lose them silently."""

    failure_kind = "user"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a rank staged: a file's name, size and SHA-256 (hex)."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A committed checkpoint that was verified."""

    step: int
    generation: int
    path: str
    """Its folder, relative to the storage's root."""
    manifest: dict[str, Any]
    storage: Storage = field(repr=False, compare=False)

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata that the caller of commit() passed in."""
        meta: dict[str, Any] = self.manifest["meta"]
        return meta

    @property
    def files(self) -> dict[str, Receipt]:
        return {name: Receipt(name=name, **entry) for name, entry in self.manifest["files"].items()}

    @property
    def size_bytes(self) -> int:
        return sum(receipt.size_bytes for receipt in self.files.values())

    def read(self, name: str) -> bytes:
        """A file's bytes, with size and hash checked (CorruptCheckpoint)."""
        receipt = self.files.get(name)
        if receipt is None:
            raise ValueError(f"{self.path} has no file {name!r}; it has {', '.join(sorted(self.files))}")
        try:
            data = self.storage.read(f"{self.path}/{name}")
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{name} is missing") from error
        _check(receipt, len(data), hashlib.sha256(data).hexdigest())
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitName:
    """A committed checkpoint, not verified."""

    step: int
    generation: int
    path: str
    modified: float
    """Unix time of its COMMIT in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folder:
    name: str
    step: int
    generation: int
    state: Literal["staging", "committed", "corrupt"]
    committed_at: float


class Store:
    """The checkpoints of one run. Reading needs no generation and, with `mark=False`, no write access."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage = storage
        self.run = run
        self._checkpoints = f"{run}/checkpoints"
        self._generations = f"{run}/generations"
        self._tokens: dict[int, str] = {}
        self._sound: set[str] = set()  # folders that this process committed or verified

    @classmethod
    def open(cls, storage: Storage, run: str) -> "Store":
        """Open the run's checkpoints without reading or writing anything yet."""
        if not _FILE.fullmatch(run):
            raise ValueError(f"run={run!r} is not a name; use letters, digits, '.', '_' and '-'")
        return cls(storage, run)

    # Generations: one for each driver, numbered upwards; only the newest may commit.

    def claim_generation(self) -> int:
        """Claim the next generation, which fences off every older driver."""
        if not self.storage.is_local:
            return self._claim_by_bids()
        make_dirs(self.storage.at(self._generations))
        while True:
            generation = self.newest_generation() + 1
            try:
                write_new(self.storage.at(f"{self._generations}/g{generation:04d}"), _claim_note(""))
            except FileExistsError:
                continue
            sync_dir(self.storage.at(self._generations))
            return generation

    def newest_generation(self) -> int:
        """The newest claim, 0 if there is none."""
        names = (_CLAIM.fullmatch(entry.name) for entry in self.storage.list(self._generations))
        return max((int(match[1]) for match in names if match), default=0)

    def _claim_by_bids(self) -> int:
        # A remote storage has no exclusive create. So write a bid, then list: a driver that sees another bid with its number or a higher
        # one bids again, higher. Of two bidders with the same number the later one sees the earlier, if a listing shows everything written
        # before it (as S3, GCS and Azure do). So each number has one holder.
        while True:
            counters = [(entry.name, _BID.fullmatch(entry.name)) for entry in self.storage.list(self._generations)]
            generation = 1 + max([self.newest_generation(), *(int(match[1]) for _, match in counters if match)])
            token = secrets.token_hex(4)
            mine = f"bid-{generation:04d}-{token}"
            self.storage.write_atomic(f"{self._generations}/{mine}", b"")
            bids = [entry.name for entry in self.storage.list(self._generations) if _BID.fullmatch(entry.name)]
            if all(bid == mine or int(bid.split("-")[1]) < generation for bid in bids):
                self.storage.write_atomic(f"{self._generations}/g{generation:04d}", _claim_note(token))
                self._tokens[generation] = token
                return generation
            time.sleep(secrets.randbelow(200) / 1000)

    def _check_fence(self, generation: int) -> None:
        newest = self.newest_generation()
        if newest > generation:
            raise Fenced(f"run {self.run!r} was taken over by generation {newest}; generation {generation} must not commit any more")
        if newest < generation:
            raise ValueError(
                f"generation={generation} of run {self.run!r} was never claimed, the newest is {newest}; use claim_generation()"
            )

    def _folder(self, step: int, generation: int) -> str:
        if self.storage.is_local:
            return f"step-{step:08d}.g{generation:04d}"
        if generation not in self._tokens:
            claim = json.loads(self.storage.read(f"{self._generations}/g{generation:04d}"))
            self._tokens[generation] = str(claim["token"])
        return f"step-{step:08d}.g{generation:04d}-{self._tokens[generation]}"

    # Writing

    def stage(self, step: int, generation: int, name: str, data: Chunks, *, give_up: Callable[[], bool] = lambda: False) -> Receipt:
        """Write one file of a checkpoint, which stays invisible until commit().

        `data` is a buffer or an iterable of buffers, written and hashed without a copy. StorageFull if the disk has less than twice the
        room. A file left by a dead attempt is replaced. A failing remote storage is retried, unless `give_up()` (storage.RetryPolicy)."""
        _check_name(name)
        buffers = buffers_of(data)
        if self.storage.is_local:
            folder = self.storage.at(f"{self._checkpoints}/{self._folder(step, generation)}.tmp")
            return write_file(folder, name, buffers, fix=_FIX)

        def fill(write: Callable[[memoryview], None]) -> str:
            digest = hashlib.sha256()
            for piece in _pieces(buffers):
                digest.update(piece)
                write(piece)
            return digest.hexdigest()

        path = f"{self._checkpoints}/{self._folder(step, generation)}/{name}"
        sha256 = self.storage.write_stream(path, fill, give_up)
        return Receipt(name=name, size_bytes=sum(buffer.nbytes for buffer in buffers), sha256=sha256)

    def commit(self, step: int, generation: int, receipts: Sequence[Receipt], meta: Mapping[str, Any]) -> Commit:
        """Make the staged files of all ranks one checkpoint. `meta` is JSON-able and comes back in Commit.meta.

        Fenced if a newer driver has claimed the run. OSError if the storage fails: older checkpoints are intact, this one does not
        exist."""
        names = [receipt.name for receipt in receipts]
        if len(set(names)) != len(names):
            raise ValueError(f"two ranks staged the same file: {sorted(name for name in set(names) if names.count(name) > 1)}")
        for name in names:
            _check_name(name)
        self._check_fence(generation)
        manifest = {
            "version": VERSION,
            "step": step,
            "generation": generation,
            "files": {r.name: {"size_bytes": r.size_bytes, "sha256": r.sha256} for r in sorted(receipts, key=lambda r: r.name)},
            "meta": dict(meta),
        }
        encoded = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
        path = f"{self._checkpoints}/{self._folder(step, generation)}"
        if self.storage.is_local:
            self._commit_local(path, generation, receipts, encoded)
        else:
            self._commit_objects(path, generation, receipts, encoded)
        return Commit(step=step, generation=generation, path=path, manifest=json.loads(encoded), storage=self.storage)

    def _commit_local(self, path: str, generation: int, receipts: Sequence[Receipt], manifest: bytes) -> None:
        parent, final, staging = (self.storage.at(p) for p in (self._checkpoints, path, f"{path}.tmp"))
        if not os.path.lexists(staging) and os.path.lexists(f"{final}/{MANIFEST}") and self.storage.read(f"{path}/{MANIFEST}") == manifest:
            # The process that made this commit died on the way, or before it could say so; another one goes on.
            if self._is_sealed(path, _check_staged(self.storage.list(path), receipts, final), manifest):
                return self._check_fence(generation)
            os.rename(final, staging)
            sync_dir(parent)
        for stray in _check_staged(self.storage.list(f"{path}.tmp"), receipts, staging):
            os.unlink(f"{staging}/{stray}")
        try:
            write_new(f"{staging}/{MANIFEST}", manifest)
            sync_dir(staging)
            if os.path.lexists(final):  # from an earlier attempt that was rolled back
                self._delete(path)
            os.rename(staging, final)
            sync_dir(parent)
            self._check_fence(generation)
            write_new(f"{final}/{COMMIT}.tmp", _seal(manifest))
            os.rename(f"{final}/{COMMIT}.tmp", f"{final}/{COMMIT}")
            sync_dir(final)
            self._check_fence(generation)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(error.errno, _no_room(len(manifest), "the disk filled up on the way", _FIX), final) from error
            raise
        return None

    def _commit_objects(self, path: str, generation: int, receipts: Sequence[Receipt], manifest: bytes) -> None:
        strays = _check_staged(self.storage.list(path), receipts, path)
        if not self._is_sealed(path, strays, manifest):
            for stray in sorted(strays, key=lambda name: name != COMMIT):  # COMMIT first
                self.storage.delete_file(f"{path}/{stray}")
            self.storage.write_atomic(f"{path}/{MANIFEST}", manifest)
            once = self.storage.without_retries()

            def seal() -> None:
                self._check_fence(generation)  # as shortly before COMMIT as possible, also after an outage
                once.write_atomic(f"{path}/{COMMIT}", _seal(manifest))

            self.storage.retry.call(seal, self.storage.at(f"{path}/{COMMIT}"))
        self._check_fence(generation)
        self._sound.add(path)  # uploads are checksummed on the way; reading them back would double the traffic

    def _is_sealed(self, path: str, names: Sequence[str], manifest: bytes) -> bool:
        """True if exactly this commit was made before and its answer was lost. A driver that came meanwhile may have started from it."""
        return (
            {COMMIT, MANIFEST} == set(names)
            and self.storage.read(f"{path}/{MANIFEST}") == manifest
            and self.storage.read(f"{path}/{COMMIT}") == _seal(manifest)
        )

    def prune(self, keep: int, generation: int, *, staged_below: int = 0) -> list[str]:
        """Delete all checkpoints but the newest `keep` that verify, and what dead drivers and dead attempts left half staged.

        Of this generation, only folders below step `staged_below` count as half staged; ranks may still be writing above. Returns the
        names of the deleted folders. To verify a local checkpoint, the pruning process reads it back, once."""
        if keep < 2:
            raise ValueError(f"keep={keep} is below 2: one bad checkpoint would lose the run; keep at least 2")
        self._check_fence(generation)
        sound, deleted = 0, []
        for folder in self._scan():
            path = f"{self._checkpoints}/{folder.name}"
            if folder.state == "staging":
                garbage = folder.generation < generation or (folder.generation == generation and folder.step < staged_below)
            elif garbage := sound >= keep:
                pass
            elif folder.state == "committed":
                sound += self._is_sound(folder, path)
            if garbage:
                self._delete(path)
                deleted.append(folder.name)
        return deleted

    def _is_sound(self, folder: _Folder, path: str) -> bool:
        if path not in self._sound:
            try:
                self._verify(folder)
            except CorruptCheckpoint:
                return False  # newest_valid() reports it and sets it aside when needed
        return True

    def _delete(self, path: str) -> None:
        # COMMIT first: an interrupted deletion then leaves garbage, not a checkpoint.
        self._sound.discard(path)
        self.storage.delete_file(f"{path}/{COMMIT}")
        if self.storage.is_local:
            sync_dir(self.storage.at(path))
        self.storage.delete_dir(path)

    # Reading

    def commits(self) -> list[CommitName]:
        """All commits, newest first, not verified."""
        return [
            CommitName(step=f.step, generation=f.generation, path=f"{self._checkpoints}/{f.name}", modified=f.committed_at)
            for f in self._scan()
            if f.state == "committed"
        ]

    def load(self, step: int, generation: int) -> Commit:
        """One checkpoint by its step and generation, verified (CorruptCheckpoint), for a worker that was told which to load."""
        for folder in self._scan():
            if folder.state == "committed" and (folder.step, folder.generation) == (step, generation):
                return self._verify(folder)
        raise ValueError(f"run {self.run!r} has no committed checkpoint of step {step}, generation {generation}")

    def newest_valid(self, on_corrupt: Callable[[str, str], None], *, mark: bool = True) -> Commit | None:
        """The newest checkpoint whose every byte is as committed; None if the run never committed one.

        Each bad one found on the way is reported to `on_corrupt(path, reason)` and set aside unless `mark` is off. NoValidCheckpoint if
        there are commits but none verifies. A storage that does not answer raises its OSError: an outage is not corruption."""
        found: list[str] = []
        for folder in self._scan():
            if folder.state == "staging":
                continue
            reason = "was marked corrupt earlier"
            if folder.state == "committed":
                try:
                    return self._verify(folder)
                except CorruptCheckpoint as error:
                    reason = str(error)
                    on_corrupt(f"{self._checkpoints}/{folder.name}", reason)
                    if mark:
                        self._mark_corrupt(folder, reason)
            found.append(f"  {folder.name}: {reason}")
        if not found:
            return None
        undo = "rename its folder without `.corrupt`" if self.storage.is_local else f"delete its {CORRUPT} object"
        raise NoValidCheckpoint(
            f"run {self.run!r} has {len(found)} checkpoint(s) in {self.storage.at(self._checkpoints)} and none is intact:\n"
            + "\n".join(found)
            + "\nIt was not restarted from zero, that would hide the loss. Restore one of them from a backup and "
            + f"{undo}, or start a new run under another name (--run NAME)."
        )

    def _verify(self, folder: _Folder) -> Commit:
        path = f"{self._checkpoints}/{folder.name}"
        try:
            seal, encoded = self.storage.read(f"{path}/{COMMIT}"), self.storage.read(f"{path}/{MANIFEST}")
            if seal != _seal(encoded):
                raise CorruptCheckpoint(f"{COMMIT} does not hold the SHA-256 of {MANIFEST}")
            manifest = json.loads(encoded)
            if manifest["version"] != VERSION:
                raise RuntimeError(
                    f"{path} has format {manifest['version']} and this program reads {VERSION}; use the version that wrote it"
                )
            if (manifest["step"], manifest["generation"]) != (folder.step, folder.generation):
                raise CorruptCheckpoint(
                    f"{MANIFEST} is of step {manifest['step']}, generation {manifest['generation']}: the folder was renamed"
                )
            commit = Commit(step=folder.step, generation=folder.generation, path=path, manifest=manifest, storage=self.storage)
            for receipt in commit.files.values():
                _check_name(receipt.name)
                digest, size_bytes = hashlib.sha256(), 0
                for chunk in self.storage.read_chunks(f"{path}/{receipt.name}"):
                    digest.update(chunk)
                    size_bytes += len(chunk)
                _check(receipt, size_bytes, digest.hexdigest())
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"a file is missing: {error}") from error
        except OSError as error:
            if error.errno == errno.EIO:
                raise CorruptCheckpoint(f"the disk cannot read it: {error}") from error
            raise
        self._sound.add(path)
        return commit

    def _mark_corrupt(self, folder: _Folder, reason: str) -> None:
        # On a read-only storage it keeps its name, and is found bad again next time.
        path = f"{self._checkpoints}/{folder.name}"
        self._sound.discard(path)
        with contextlib.suppress(OSError):
            if not self.storage.is_local:
                return self.storage.write_atomic(f"{path}/{CORRUPT}", reason.encode())
            aside, number = f"{path}.corrupt", 1
            while self.storage.exists(aside):
                number += 1
                aside = f"{path}.corrupt-{number}"
            os.rename(self.storage.at(path), self.storage.at(aside))
            sync_dir(self.storage.at(self._checkpoints))
        return None

    def _scan(self) -> list[_Folder]:
        """All folders of checkpoints, newest first."""
        folders = []
        for entry in self.storage.list(self._checkpoints):
            match = _FOLDER.fullmatch(entry.name)
            if not entry.is_dir or match is None:
                continue
            state, committed_at = self._state(entry.name, match[3] or "")
            folders.append(
                _Folder(name=entry.name, step=int(match[1]), generation=int(match[2]), state=state, committed_at=committed_at),
            )
        return sorted(folders, key=lambda folder: (folder.step, folder.generation), reverse=True)

    def _state(self, name: str, suffix: str) -> tuple[Literal["staging", "committed", "corrupt"], float]:
        if suffix == ".tmp":
            return "staging", 0.0
        if suffix:
            return "corrupt", 0.0
        files = {entry.name: entry for entry in self.storage.list(f"{self._checkpoints}/{name}")}
        if COMMIT not in files:
            return "staging", 0.0
        return ("corrupt" if CORRUPT in files and not self.storage.is_local else "committed"), files[COMMIT].modified


def write_file(folder: str, name: str, buffers: Sequence[memoryview], *, fix: str) -> Receipt:
    """Write a new durable file into a local `folder`, replacing any that is there. StorageFull, which names `fix`, if the disk has less
    than twice the room."""
    size_bytes = sum(buffer.nbytes for buffer in buffers)
    make_dirs(folder)
    _check_room(folder, size_bytes, fix)
    path = f"{folder}/{name}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    digest = hashlib.sha256()
    try:
        for piece in _pieces(buffers):
            digest.update(piece)
            write_all(descriptor, piece)
        os.fsync(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(error.errno, _no_room(size_bytes, "the disk filled up on the way", fix), path) from error
        raise
    finally:
        os.close(descriptor)
    sync_dir(folder)
    return Receipt(name=name, size_bytes=size_bytes, sha256=digest.hexdigest())


def _claim_note(token: str) -> bytes:
    return json.dumps({"token": token, "host": socket.gethostname(), "pid": os.getpid()}).encode()


def _seal(manifest: bytes) -> bytes:
    """The content of COMMIT. It is compared byte for byte, so every flipped bit is detected."""
    return hashlib.sha256(manifest).hexdigest().encode() + b"\n"


def _check(receipt: Receipt, size_bytes: int, sha256: str) -> None:
    if size_bytes != receipt.size_bytes:
        raise CorruptCheckpoint(f"{receipt.name} has {size_bytes} bytes, {receipt.size_bytes} were committed")
    if sha256 != receipt.sha256:
        raise CorruptCheckpoint(f"{receipt.name} has SHA-256 {sha256[:16]}..., {receipt.sha256[:16]}... was committed")


def _check_name(name: str) -> None:
    if not _FILE.fullmatch(name) or name in (MANIFEST, COMMIT, CORRUPT) or name.endswith(".tmp"):
        raise ValueError(
            f"{name!r} cannot be a checkpoint's file; use letters, digits, '.', '_' and '-', and not {MANIFEST}, {COMMIT} or *.tmp"
        )


def _check_staged(entries: Iterable[Entry], receipts: Sequence[Receipt], where: str) -> list[str]:
    """Check that every file with a receipt exists in its size (OSError); returns the other files, left by attempts that died."""
    sizes = {entry.name: entry.size_bytes for entry in entries if not entry.is_dir}
    for receipt in receipts:
        if sizes.get(receipt.name) != receipt.size_bytes:
            found = f"{sizes[receipt.name]} bytes" if receipt.name in sizes else "nothing"
            raise OSError(
                f"{where}/{receipt.name}: {receipt.size_bytes} bytes were staged and {found} is there; is the storage shared by all nodes?"
            )
    return sorted(set(sizes) - {receipt.name for receipt in receipts})


def _check_room(folder: str, size_bytes: int, fix: str) -> None:
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < 2 * size_bytes:
        raise StorageFull(errno.ENOSPC, _no_room(size_bytes, f"{free_bytes / 1e6:.1f} MB are free and twice its size must be", fix), folder)


def _no_room(size_bytes: int, why: str, fix: str) -> str:
    return f"no room for a file of {size_bytes / 1e6:.1f} MB: {why}; {fix}"


def buffers_of(data: Chunks) -> list[memoryview]:
    try:
        views = [memoryview(data)]  # type: ignore[arg-type]
    except TypeError:
        views = [memoryview(buffer) for buffer in data]  # type: ignore[arg-type]
    return [view.cast("B") for view in views if view.nbytes]


def _pieces(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """Pieces small enough that they are hashed and then written while still in the cache."""
    for buffer in buffers:
        for start in range(0, buffer.nbytes, CHUNK_BYTES):
            yield buffer[start : start + CHUNK_BYTES]
