"""Checkpoints that exist only once they are committed: stage, commit, newest_valid, prune.

Ranks stage (trainer/rank/saving.py), the coordinator commits and prunes, driver and workers read. This module knows bytes and hashes.
trainer decides what the bytes mean and when to save. claims.py says which driver a run belongs to.

    <run>/generations/g0001                          one driver's claim, with its note; a newer one fences off the older ones
    <run>/checkpoints/step-00001200.g0001/           model.safetensors, ..., MANIFEST.json, COMMIT

An attempt is one life of the ranks. Its number is in the name of what it stages, so no attempt writes where another one has committed.

Writing on a local file system; every file and every changed folder is fsynced before the next step:
  1. the caller has its state in private buffers;
  2. each rank writes with O_EXCL into `step-N.gG.aA.tmp/` and hashes what it writes;
  3. MANIFEST.json: size and SHA-256 of every file;
  4. `step-N.gG.aA.tmp` is renamed to `step-N.gG`, or to `step-N.gG.aA` where an earlier attempt of this driver has committed that step;
  5. COMMIT, the manifest's SHA-256, through COMMIT.tmp and a rename. Only now does the checkpoint exist.
Object stores cannot rename. There the files go under the prefix `step-N.gG-TOKEN.aA`, which no other driver uses (the token is the claim's,
and random), then the manifest, then the object COMMIT.

A commit deletes no other. Of several commits of one step, the one of the newest generation counts, then the one of the newest attempt.

Only one driver wins: before and after writing COMMIT, a driver checks whether a newer one has claimed the run. commit() returns only if
none had after COMMIT was written. A newer driver reads after its claim, so it sees every acknowledged checkpoint. A driver that stalls
between its check and COMMIT leaves a complete checkpoint under its own name, and gets Fenced.

All of this may be repeated after a failure, in part or in whole, with the same result.

Reading trusts no pointer: newest first, COMMIT -> manifest -> every hash, before anything is parsed. A checkpoint is bad only if bytes were
read that differ from those committed, if a file is not there, or if a file system that checks what it reads says so. It is reported and set
aside. What cannot be read at the moment is an OSError, and nothing is known of it. The names are the same wherever a run lies: its folder
may be copied between a disk and an object store."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.claims import Claim, Claims
from cluster.storage import CHUNK_BYTES, Entry, Storage, is_unreadable_now, make_dirs, sync_dir, write_all, write_new

Chunks = bytes | bytearray | memoryview | Iterable[bytes | bytearray | memoryview]

MANIFEST = "MANIFEST.json"
COMMIT = "COMMIT"
CORRUPT = "CORRUPT"
VERSION = 1

# step, generation, token of the claim (object stores), attempt (not in the names of older releases), state
_FOLDER = re.compile(r"step-(\d{8,})\.g(\d{4,})(?:-([0-9a-f]{8}))?(?:\.a(\d{4,}))?(\.tmp|\.corrupt(?:-\d+)?)?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_FIX = "free some space, lower --cluster.keep-checkpoints or move --storage"


class StorageFull(OSError):
    """No room for a checkpoint; existing ones are intact."""

    failure_kind = "storage"


class Fenced(RuntimeError):
    """A newer driver has claimed the run: this one must no longer commit."""

    failure_kind = "user"


class CorruptCheckpoint(ValueError):
    """A committed checkpoint whose bytes differ from those committed."""

    failure_kind = "infrastructure"


class NoValidCheckpoint(RuntimeError):
    """The run has checkpoints but none can be trusted. Starting from zero instead would lose them silently."""

    failure_kind = "user"


class UnknownFormat(ValueError):
    """A committed checkpoint of a format that this version cannot read."""

    failure_kind = "user"


class AlreadyCommitted(OSError):
    """Another attempt has committed the step, or the same one other content."""

    failure_kind = "infrastructure"


class StagedFileLost(OSError):
    """A file that a rank staged is not where the commit looks for it."""

    failure_kind = "infrastructure"


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
    def attempt(self) -> int:
        """The attempt that staged it, 0 if an older release did."""
        return int(self.manifest.get("attempt", 0))

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
    attempt: int
    """0 if the name does not say it."""
    state: Literal["staging", "committed", "corrupt"]
    committed_at: float


class Store:
    """The checkpoints of one run. Reading needs no generation and, with `mark=False`, no write access."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage = storage
        self.run = run
        self._checkpoints = f"{run}/checkpoints"
        self._claims = Claims(storage, run)
        self._sound: set[str] = set()  # folders that this process committed or verified

    @classmethod
    def open(cls, storage: Storage, run: str) -> "Store":
        """Open the run's checkpoints without reading or writing anything yet."""
        if not _FILE.fullmatch(run):
            raise ValueError(f"run={run!r} is not a name; use letters, digits, '.', '_' and '-'")
        return cls(storage, run)

    # Generations: one for each driver, numbered upwards; only the newest may commit.

    def claim_generation(self, note: Mapping[str, Any] | None = None, check: Callable[[Claim], None] = lambda claim: None) -> int:
        """Claim the next generation, which fences off every older driver. See Claims.make()."""
        return self._claims.make(note or {}, check, floor=self._newest_saved)

    def newest_generation(self) -> int:
        """The newest claim, 0 if there is none."""
        return self._claims.newest()

    def claim(self, generation: int) -> Claim:
        """What the claim of this generation says."""
        return self._claims.read(generation)

    def _newest_saved(self) -> int:
        """The newest generation among the checkpoints."""
        matches = (_FOLDER.fullmatch(entry.name) for entry in self.storage.list(self._checkpoints))
        return max((int(match[2]) for match in matches if match), default=0)

    def _check_fence(self, generation: int) -> None:
        newest = self.newest_generation()
        if newest > generation:
            raise Fenced(f"run {self.run!r} was taken over by generation {newest}; generation {generation} must not commit any more")
        if newest < generation:
            raise ValueError(
                f"generation={generation} of run {self.run!r} was never claimed, the newest is {newest}; use claim_generation()"
            )

    def _staging(self, step: int, generation: int, attempt: int) -> str:
        """Where the ranks of an attempt write."""
        if attempt < 1:
            raise ValueError(f"attempt={attempt}: attempts are numbered from 1")
        if self.storage.is_local:
            return f"{self._checkpoints}/step-{step:08d}.g{generation:04d}.a{attempt:04d}.tmp"
        token = self._claims.token(generation)
        return f"{self._checkpoints}/step-{step:08d}.g{generation:04d}{token and '-'}{token}.a{attempt:04d}"

    # Writing

    def stage(
        self, step: int, generation: int, name: str, data: Chunks, *, attempt: int, give_up: Callable[[], bool] = lambda: False
    ) -> Receipt:
        """Write one file of a checkpoint, which stays invisible until commit().

        `data` is a buffer or an iterable of buffers, written and hashed without a copy. StorageFull if the disk has less than twice the
        room. A file that this attempt staged before is replaced. A failing remote storage is retried, unless `give_up()`
        (storage.RetryPolicy)."""
        _check_name(name)
        buffers = buffers_of(data)
        if self.storage.is_local:
            return write_file(self.storage.at(self._staging(step, generation, attempt)), name, buffers, fix=_FIX)

        def fill(write: Callable[[memoryview], None]) -> str:
            digest = hashlib.sha256()
            for piece in _pieces(buffers):
                digest.update(piece)
                write(piece)
            return digest.hexdigest()

        path = f"{self._staging(step, generation, attempt)}/{name}"
        sha256 = self.storage.write_stream(path, fill, give_up)
        return Receipt(name=name, size_bytes=sum(buffer.nbytes for buffer in buffers), sha256=sha256)

    def commit(self, step: int, generation: int, receipts: Sequence[Receipt], meta: Mapping[str, Any], *, attempt: int) -> Commit:
        """Make the files that all ranks of `attempt` staged one checkpoint. `meta` is JSON-able and comes back in Commit.meta. Doing it
        again changes nothing.

        Fenced if a newer driver has claimed the run. OSError if the storage fails, or if a newer attempt has committed this step: older
        checkpoints are intact, this one does not exist."""
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
            "attempt": attempt,
            "files": {r.name: {"size_bytes": r.size_bytes, "sha256": r.sha256} for r in sorted(receipts, key=lambda r: r.name)},
            "meta": dict(meta),
        }
        encoded = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
        staging = self._staging(step, generation, attempt)
        if self.storage.is_local:
            path = self._commit_local(staging, generation, attempt, receipts, encoded)
        else:
            path = staging
            self._commit_objects(path, generation, receipts, encoded)
        return Commit(step=step, generation=generation, path=path, manifest=json.loads(encoded), storage=self.storage)

    def _commit_local(self, staging: str, generation: int, attempt: int, receipts: Sequence[Receipt], manifest: bytes) -> str:
        """Returns the checkpoint's folder."""
        try:
            path, is_there = self._place(staging, attempt, manifest)
            if not is_there:
                for stray in _check_staged(self.storage.list(staging), receipts, staging):
                    os.unlink(self.storage.at(f"{staging}/{stray}"))
                write_new(self.storage.at(f"{staging}/{MANIFEST}"), manifest)
                sync_dir(self.storage.at(staging))
                os.rename(self.storage.at(staging), self.storage.at(path))
                sync_dir(self.storage.at(self._checkpoints))
            final = self.storage.at(path)
            self._check_fence(generation)
            if not self.storage.exists(f"{path}/{COMMIT}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{final}/{COMMIT}.tmp")
                write_new(f"{final}/{COMMIT}.tmp", _seal(manifest))
                os.rename(f"{final}/{COMMIT}.tmp", f"{final}/{COMMIT}")
                sync_dir(final)
                self._check_fence(generation)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                where = self.storage.at(staging)
                raise StorageFull(error.errno, _no_room(len(manifest), "the disk filled up on the way", _FIX), where) from error
            raise
        return path

    def _place(self, staging: str, attempt: int, manifest: bytes) -> tuple[str, bool]:
        """The folder that the staged one is to become, and whether it has become that already, in a call that was cut short. A folder
        without COMMIT that is not this checkpoint is deleted; one with COMMIT is never touched."""
        own = staging.removesuffix(".tmp")
        for path in (own.rpartition(".a")[0], own):
            if not self.storage.exists(path):
                return path, False
            try:
                found = self.storage.read(f"{path}/{MANIFEST}")
            except FileNotFoundError:
                found = b""
            if found == manifest:
                return path, True
            if not self.storage.exists(f"{path}/{COMMIT}"):
                self._delete(path)
                return path, False
            if (other := _attempt_of(found)) > attempt:
                raise AlreadyCommitted(f"attempt {other} has committed {path} already: what attempt {attempt} staged comes too late")
        raise AlreadyCommitted(f"attempt {attempt} has committed {own} already, with other content")

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

    def prune(self, keep: int, generation: int, *, attempt: int = 0, staged_below: int = 0) -> list[str]:
        """Delete all checkpoints but the newest `keep` that verify, and what dead drivers and dead attempts left half staged.

        Of this generation, only what attempts before `attempt` staged counts as half staged, and what `attempt` itself staged below step
        `staged_below`; ranks may still be writing above. Returns the names of the deleted folders. To verify a local checkpoint, the
        pruning process reads it back, once. OSError if one cannot be read at the moment; what is older than it is then kept."""
        if keep < 2:
            raise ValueError(f"keep={keep} is below 2: one bad checkpoint would lose the run; keep at least 2")
        self._check_fence(generation)
        sound: set[int] = set()  # steps
        deleted = []
        for folder in self._scan():
            if folder.state == "staging":
                is_of_older_attempt = 0 < folder.attempt < attempt
                is_older = folder.generation == generation and (
                    is_of_older_attempt or (folder.attempt in (0, attempt) and folder.step < staged_below)
                )
                garbage = folder.generation < generation or is_older
            elif garbage := len(sound) >= keep or (folder.state == "committed" and folder.step in sound):
                pass
            elif folder.state == "committed" and self._is_sound(folder):
                sound.add(folder.step)
            if garbage:
                self._delete(f"{self._checkpoints}/{folder.name}")
                deleted.append(folder.name)
        return deleted

    def _is_sound(self, folder: _Folder) -> bool:
        if f"{self._checkpoints}/{folder.name}" in self._sound:
            return True
        try:
            return self._verify(folder) is not None
        except (CorruptCheckpoint, UnknownFormat):
            return False  # newest_valid() reports it and sets it aside when needed

    def _delete(self, path: str) -> None:
        # COMMIT first: an interrupted deletion then leaves garbage, not a checkpoint.
        self._sound.discard(path)
        self.storage.delete_file(f"{path}/{COMMIT}")
        if self.storage.is_local:
            with contextlib.suppress(FileNotFoundError):
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

    def peek(self) -> Commit | None:
        """The newest commit whose manifest is as committed; None if there is none. Its files are not read. For a look at a run that
        this process has not claimed."""
        for folder in self._scan():
            if folder.state == "committed":
                with contextlib.suppress(CorruptCheckpoint, FileNotFoundError):
                    return self._opened(folder)
        return None

    def load(self, step: int, generation: int, *, path: str | None = None) -> Commit:
        """One checkpoint by its step and generation, verified (CorruptCheckpoint), for a worker that was told which to load. `path`, its
        folder, says which one where several attempts have committed that step; without it, the newest attempt's."""
        for folder in self._scan():
            is_it = (folder.step, folder.generation) == (step, generation) and path in (None, f"{self._checkpoints}/{folder.name}")
            if is_it and folder.state == "committed" and (commit := self._verify(folder)) is not None:
                return commit
        raise FileNotFoundError(errno.ENOENT, f"run {self.run!r} has no committed checkpoint of step {step}, generation {generation}")

    def newest_valid(self, on_corrupt: Callable[[str, str], None], *, mark: bool = True) -> Commit | None:
        """The newest checkpoint whose every byte is as committed; None if the run never committed one.

        Each bad one found on the way is reported to `on_corrupt(path, reason)` and set aside unless `mark` is off: only a driver that has
        claimed the run may do that. NoValidCheckpoint if there are commits but none verifies. UnknownFormat if the newest was written by
        another version of this program. A storage that does not answer, or a file that cannot be read, raises an OSError: nothing is
        known then."""
        found: dict[str, str] = {}  # the bad ones
        names, looked_at = self._names(), None
        while looked_at != (unknown := {name for name in names if ".corrupt" not in name} - found.keys()):
            looked_at = unknown
            for folder in self._scan(names):
                if folder.state == "staging" or folder.name in found:
                    continue
                reason = "was marked corrupt earlier"
                if folder.state == "committed":
                    try:
                        commit = self._verify(folder)
                    except CorruptCheckpoint as error:
                        reason = str(error)
                        on_corrupt(f"{self._checkpoints}/{folder.name}", reason)
                        if mark:
                            self._mark_corrupt(folder, reason)
                    else:
                        if commit is not None:
                            return commit
                        continue
                found[folder.name] = f"  {folder.name}: {reason}"
            looked_at -= found.keys()
            names = self._names() if names else []  # another driver may have deleted what was looked at: then there are newer ones
        if not found:
            return None
        undo = "rename its folder without `.corrupt`" if self.storage.is_local else f"delete its {CORRUPT} object"
        raise NoValidCheckpoint(
            f"run {self.run!r} has {len(found)} checkpoint(s) in {self.storage.at(self._checkpoints)} and none is intact:\n"
            + "\n".join(found.values())
            + "\nIt was not restarted from zero, that would hide the loss. Restore one of them from a backup and "
            + f"{undo}, or start a new run under another name (--run NAME)."
        )

    def _verify(self, folder: _Folder) -> Commit | None:
        """The checkpoint, if every byte is as committed; None if it was deleted meanwhile. CorruptCheckpoint, UnknownFormat, or OSError."""
        path = f"{self._checkpoints}/{folder.name}"
        for is_last_look in (False, True):
            try:
                return self._verified(folder)
            except FileNotFoundError as error:
                if not self.storage.exists(f"{path}/{COMMIT}"):
                    return None
                if is_last_look:
                    raise CorruptCheckpoint(f"a file is missing: {error}") from error
            except OSError as error:
                if not is_unreadable_now(error):
                    raise CorruptCheckpoint(f"the disk cannot read it: {error}") from error
                if not self.storage.is_local or error.errno is None:
                    raise
                raise OSError(
                    error.errno,
                    f"checkpoint {self.storage.at(path)} cannot be read now ({error.strerror}); that does not make it a bad one. If "
                    "it stays so, mend the disk or the rights, or move the folder away to go on from the checkpoint before it",
                ) from error
        raise AssertionError("unreachable")

    def _verified(self, folder: _Folder) -> Commit:
        commit = self._opened(folder)
        for receipt in commit.files.values():
            _check_name(receipt.name)
            digest, size_bytes = hashlib.sha256(), 0
            for chunk in self.storage.read_chunks(f"{commit.path}/{receipt.name}"):
                digest.update(chunk)
                size_bytes += len(chunk)
            _check(receipt, size_bytes, digest.hexdigest())
        self._sound.add(commit.path)
        return commit

    def _opened(self, folder: _Folder) -> Commit:
        """The checkpoint with its manifest verified, but not its files."""
        path = f"{self._checkpoints}/{folder.name}"
        seal, encoded = self.storage.read(f"{path}/{COMMIT}"), self.storage.read(f"{path}/{MANIFEST}")
        if seal != _seal(encoded):
            raise CorruptCheckpoint(f"{COMMIT} does not hold the SHA-256 of {MANIFEST}")
        manifest = _parsed(encoded)
        if manifest.get("version") != VERSION:
            raise UnknownFormat(
                f"checkpoint {path} has format {manifest.get('version')}, and this program reads format {VERSION}; go on with the "
                "release that wrote it, or start a new run under another name (--run NAME)"
            )
        name = (manifest["step"], manifest["generation"], manifest.get("attempt", 0) if folder.attempt else 0)
        if name != (folder.step, folder.generation, folder.attempt):
            raise CorruptCheckpoint(
                f"{MANIFEST} is of step {manifest['step']}, generation {manifest['generation']}: the folder was renamed"
            )
        return Commit(step=folder.step, generation=folder.generation, path=path, manifest=manifest, storage=self.storage)

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

    def _names(self) -> list[str]:
        return [entry.name for entry in self.storage.list(self._checkpoints) if entry.is_dir]

    def _scan(self, names: Iterable[str] | None = None) -> Iterator[_Folder]:
        """All folders of checkpoints, or of those with these names, newest first. Each is listed when it is asked for: who wants the newest
        pays for one."""
        named = [
            ((int(match[1]), int(match[2]), int(match[4] or 0)), name, match[5] or "")
            for name in (self._names() if names is None else names)
            if (match := _FOLDER.fullmatch(name))
        ]
        for (step, generation, attempt), name, suffix in sorted(named, reverse=True):
            state, committed_at = self._state(name, suffix)
            yield _Folder(name=name, step=step, generation=generation, attempt=attempt, state=state, committed_at=committed_at)

    def _state(self, name: str, suffix: str) -> tuple[Literal["staging", "committed", "corrupt"], float]:
        if suffix == ".tmp":
            return "staging", 0.0
        if suffix:
            return "corrupt", 0.0
        files = {entry.name: entry for entry in self.storage.list(f"{self._checkpoints}/{name}")}
        if COMMIT not in files:
            return "staging", 0.0
        return ("corrupt" if CORRUPT in files else "committed"), files[COMMIT].modified


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


def _parsed(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _attempt_of(manifest: bytes) -> int:
    attempt = _parsed(manifest).get("attempt")
    return attempt if isinstance(attempt, int) else 0


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
    """Check that every file with a receipt exists in its size (StagedFileLost); returns the other files, left by attempts that died."""
    sizes = {entry.name: entry.size_bytes for entry in entries if not entry.is_dir}
    for receipt in receipts:
        if sizes.get(receipt.name) != receipt.size_bytes:
            found = f"{sizes[receipt.name]} bytes" if receipt.name in sizes else "nothing"
            raise StagedFileLost(
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
