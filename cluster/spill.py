"""Keeps a rank's checkpoints on its node's own disk while the storage does not take them. Called by checkpointer, which decides when.

    <spill_dir>/finetune-spill-<user>/<run>.g0001-<storage>.rank-00000-xxxxxxxx/step-00001200/model.safetensors, ...

Every file is fsynced and hashed when it is written, and hashed again when it is read, so damage on the disk is not uploaded. Only the
process that wrote these checkpoints can finish them, because an acknowledgement belongs to one attempt. So each process has a folder of
its own, which it keeps locked (owned_folder), and any rank on the node removes those of dead ones: other containers may share the disk."""

import contextlib
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Sequence
from glob import escape
from typing import Any

from cluster.owned_folder import OwnedFolder, create, remove_abandoned
from cluster.storage import Storage, make_dirs
from cluster.store import Receipt, buffers_of, write_file

_FIX = "free some space there or set --cluster.spill-dir to a larger disk"


class SpillDamaged(OSError):
    """A spilled file whose content is not what was written."""

    failure_kind = "infrastructure"


class ForeignSpillFolder(PermissionError):
    """The folder for spilled checkpoints is another user's, or a link."""

    failure_kind = "storage"


class Spilled:
    """One checkpoint of one rank. `staged`: its files that reached the storage, first those from before the outage."""

    def __init__(self, folder: str, step: int, staged: Sequence[Receipt], meta: dict[str, Any]) -> None:
        self.step, self.meta, self.staged = step, meta, list(staged)
        self._folder = folder
        self._waiting: list[Receipt] = []

    @property
    def waiting(self) -> list[Receipt]:
        """Files that still have to be uploaded, in order."""
        return self._waiting[:]

    @property
    def size_bytes(self) -> int:
        return sum(receipt.size_bytes for receipt in self._waiting)

    def add(self, name: str, buffers: Iterable[bytes | bytearray | memoryview]) -> None:
        """Store a file durably; StorageFull if there is no room."""
        assert os.path.basename(name) == name, name
        self._waiting.append(write_file(self._folder, name, buffers_of(buffers), fix=_FIX))

    def read(self, receipt: Receipt) -> memoryview:
        """A file's bytes, checked to be as written (SpillDamaged). They stay valid when the file is removed."""
        try:
            with open(f"{self._folder}/{receipt.name}", "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if receipt.size_bytes else b"")
        except (OSError, ValueError) as error:
            raise SpillDamaged(f"{self._folder}/{receipt.name} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != receipt.sha256:
            raise SpillDamaged(f"{self._folder}/{receipt.name} is not what was written there; is that disk sound?")
        return data

    def uploaded(self, receipt: Receipt) -> None:
        """A file of `waiting` has reached the storage."""
        self._waiting = [other for other in self._waiting if other.name != receipt.name]
        self.staged.append(receipt)

    def remove(self) -> None:
        """Delete what is left of it here."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Spill:
    """The folder of one rank in one driver's run. Nothing is created before the first checkpoint is spilled."""

    def __init__(self, base: str, run: str, generation: int, rank: int, storage: Storage) -> None:
        self._base = spill_base(base)
        # Runs with the same name on two storages may share a node.
        place = hashlib.sha256(f"{storage.address}/{run}".encode()).hexdigest()[:8]
        self._prefix = f"{run}.g{generation:04d}-{place}.rank-{rank:05d}-"
        self._owned: OwnedFolder | None = None
        remove_abandoned(f"{escape(self._base)}/*.rank-*")

    @property
    def folder(self) -> str:
        """Where the checkpoints are, or will be, for a message."""
        return self._owned.path if self._owned is not None else f"{self._base}/{self._prefix}*"

    def begin(self, step: int, staged: Sequence[Receipt], meta: dict[str, Any]) -> Spilled:
        """Create the folder for the checkpoint of `step`, whose files `staged` have already reached the storage."""
        if self._owned is None:
            self._make_base()
            self._owned = create(self._prefix, self._base)
        folder = f"{self._owned.path}/step-{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        make_dirs(folder)
        return Spilled(folder, step, staged, meta)

    def close(self) -> None:
        """Remove everything."""
        if self._owned is not None:
            self._owned.remove()
        with contextlib.suppress(OSError):  # holds those of other ranks and runs, or was never created
            os.rmdir(self._base)

    def _make_base(self) -> None:
        # The folder's name can be guessed, and everybody can write to the system's temporary folder.
        os.makedirs(self._base, mode=0o700, exist_ok=True)
        found = os.lstat(self._base)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise ForeignSpillFolder(f"{self._base} is not this user's own folder; remove it or give another with --cluster.spill-dir")


def spill_base(setting: str) -> str:
    """The folder that `cluster.spill_dir` stands for on this node."""
    return os.path.abspath(os.path.join(os.path.expanduser(setting) or tempfile.gettempdir(), f"finetune-spill-{os.getuid()}"))


def is_another_disk(setting: str, storage: Storage) -> bool:
    """Whether a checkpoint that does not fit into the storage, or that the storage does not take, may fit into the spill folder."""
    return not storage.is_local or _device(spill_base(setting)) != _device(storage.root)


def _device(path: str) -> int:
    """The device of a path, or of the nearest folder above it that exists."""
    while True:
        try:
            return os.stat(path).st_dev
        except OSError:
            if path == os.path.dirname(path):
                raise
            path = os.path.dirname(path)
