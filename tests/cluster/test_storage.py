"""Storage: the same few operations on local files and on pyarrow file systems."""

import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from cluster.storage import Storage, open_storage


@pytest.fixture(params=["local", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "runs")
    return Storage(fs=pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()), root="runs", is_local=False, uri="mock://bucket/runs")


def test_what_was_written_is_read_and_listed(storage: Storage) -> None:
    storage.write_atomic("a/b/one", b"1")
    storage.write_atomic("a/b/two", b"22")
    storage.write_atomic("a/b/one", b"333")
    assert storage.read("a/b/one") == b"333"
    assert b"".join(storage.read_chunks("a/b/one", 2)) == b"333"
    assert [(entry.name, entry.is_dir, entry.size_bytes) for entry in storage.list("a/b")] == [("one", False, 3), ("two", False, 2)]
    assert [(entry.name, entry.is_dir) for entry in storage.list("a")] == [("b", True)]
    assert storage.exists("a/b/one")


def test_what_is_not_there_is_not_there(storage: Storage) -> None:
    assert storage.list("nothing/here") == []
    assert not storage.exists("nothing")
    storage.delete_file("nothing")
    storage.delete_dir("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_below_a_file_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert open_storage(tmp_path).list("file") == []


def test_deleted_is_gone(storage: Storage) -> None:
    storage.write_atomic("a/one", b"1")
    storage.write_atomic("a/b/two", b"2")
    storage.delete_file("a/one")
    assert [entry.name for entry in storage.list("a")] == ["b"]
    storage.delete_dir("a")
    assert not storage.exists("a")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write_atomic("file", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomic("file", b"new")
    assert storage.read("file") == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_relative_folders_and_file_uris_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = open_storage("runs")
    relative.write_atomic("x", b"1")
    monkeypatch.chdir("/")
    assert relative.read("x") == b"1"
    uri = open_storage(f"file://{tmp_path}/runs")
    assert uri.is_local
    assert uri.read("x") == b"1"


def test_object_stores_open_without_a_request() -> None:
    storage = open_storage("s3://bucket/runs?region=eu-central-1")
    assert (storage.is_local, storage.root, storage.fs.type_name) == (False, "bucket/runs", "s3")


@pytest.mark.parametrize("uri", ["ftp://host/x", "http://host/x", "s4://bucket", ""])
def test_an_unknown_scheme_is_refused_with_the_known_ones(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        open_storage(uri)
