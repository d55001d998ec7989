"""Where runs live: a local folder or any pyarrow file system, behind the few operations that runs need.

Used by store, journal and coordinator, and by trainer for the run's other files. What a checkpoint is, and when it counts, is store's
business."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")

CHUNK_BYTES = 8 << 20

# Object stores have no directories: making them costs requests, and rights that a bucket's user may lack.
_WITHOUT_DIRECTORIES = {"s3", "gcs", "abfs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_dir: bool
    size_bytes: int
    modified: float
    """Unix time of the last change in seconds, 0.0 where the file system does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """The folder that holds the runs' folders. Paths are relative to it, with `/` between parts."""

    fs: Any
    """A pyarrow.fs.FileSystem; local files are read and written with `os` instead, as pyarrow cannot fsync."""
    root: str
    is_local: bool
    uri: str

    def at(self, path: str) -> str:
        """The file system's own path of `path`."""
        return f"{self.root}/{path}" if path else self.root

    def read(self, path: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""
        if self.is_local:
            return Path(self.at(path)).read_bytes()
        with self.fs.open_input_stream(self.at(path)) as stream:
            return bytes(stream.read())

    def read_chunks(self, path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """A file piece by piece, for those that need not be in memory at once."""
        stream = open(self.at(path), "rb", buffering=0) if self.is_local else self.fs.open_input_stream(self.at(path))  # noqa: SIM115
        with stream:
            while chunk := stream.read(chunk_bytes):
                yield chunk

    def write_atomic(self, path: str, data: bytes) -> None:
        """Create or replace a file: a reader sees the old bytes or the new ones. Object stores publish an upload when it ends."""
        if self.is_local:
            return write_atomic_local(self.at(path), data)
        self.make_dir(path.rpartition("/")[0])
        with self.fs.open_output_stream(self.at(path)) as stream:
            stream.write(data)
        return None

    def exists(self, path: str) -> bool:
        if self.is_local:
            return os.path.lexists(self.at(path))
        return bool(self.fs.get_file_info(self.at(path)).type != pafs.FileType.NotFound)

    def list(self, path: str) -> list[Entry]:
        """Names in a folder, sorted; none where there is no such folder (or a file in its place)."""
        if self.is_local:
            try:
                with os.scandir(self.at(path)) as found:
                    return sorted((_local_entry(entry) for entry in found), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                return []
        infos = self.fs.get_file_info(pafs.FileSelector(self.at(path), allow_not_found=True))
        return sorted((_entry(info) for info in infos), key=lambda entry: entry.name)

    def make_dir(self, path: str) -> None:
        if self.is_local:
            make_dirs(self.at(path))
        elif self.fs.type_name not in _WITHOUT_DIRECTORIES:
            self.fs.create_dir(self.at(path), recursive=True)

    def delete_file(self, path: str) -> None:
        """Delete a file if it is there."""
        try:
            if self.is_local:
                os.unlink(self.at(path))
            else:
                self.fs.delete_file(self.at(path))
        except FileNotFoundError:
            pass

    def delete_dir(self, path: str) -> None:
        """Delete a folder and what is in it, if it is there."""
        try:
            if self.is_local:
                shutil.rmtree(self.at(path))
            else:
                self.fs.delete_dir(self.at(path))
        except FileNotFoundError:
            pass


def open_storage(uri: str | Path) -> Storage:
    """A local path (made absolute), file://, or a URI of pyarrow's: s3://, gs://, abfs://, hdfs://. ValueError for anything else."""
    text = str(uri)
    if not text:
        raise ValueError("storage is empty; give a folder or a URI, such as --storage runs or --storage s3://bucket/runs")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        root = os.path.abspath(os.path.expanduser(text))
        return Storage(fs=pafs.LocalFileSystem(), root=root, is_local=True, uri=root)
    if scheme[1] not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"storage={text!r} has the unknown scheme {scheme[1]!r}; use a local folder or one of {known}")
    try:
        filesystem, root = pafs.FileSystem.from_uri(text)
    except (ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"storage={text!r} cannot be opened: {error}") from error
    return Storage(fs=filesystem, root=root.rstrip("/"), is_local=isinstance(filesystem, pafs.LocalFileSystem), uri=text)


def make_dirs(path: str) -> None:
    """mkdir -p that survives a power cut: each new name is synced into its parent."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise
        sync_dir(os.path.dirname(folder))


def sync_dir(path: str) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: str, data: bytes | memoryview) -> None:
    """Create a file that must not exist yet (FileExistsError) with durable bytes; its name is durable once the folder is synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """os.write until everything is written."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def write_atomic_local(path: str, data: bytes) -> None:
    """Create or replace a local file durably, through a name of its own beside it."""
    folder, name = os.path.split(os.path.abspath(path))
    make_dirs(folder)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    sync_dir(folder)


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    status = entry.stat(follow_symlinks=False)
    return Entry(name=entry.name, is_dir=entry.is_dir(), size_bytes=status.st_size, modified=status.st_mtime)


def _entry(info: Any) -> Entry:
    is_dir = info.type == pafs.FileType.Directory
    return Entry(
        name=info.base_name,
        is_dir=is_dir,
        size_bytes=0 if is_dir else int(info.size or 0),
        modified=0.0 if info.mtime_ns is None else info.mtime_ns / 1e9,
    )
