"""Storage: the same few operations on local files and on pyarrow file systems."""

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from benchmarks.faults.storage import Weather
from cluster.storage import (
    RetryPolicy,
    Storage,
    StorageOutage,
    StorageRefused,
    is_outage,
    is_transient,
    is_unreadable_now,
    join_uri,
    open_storage,
)


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


def test_a_folder_that_others_delete_from_is_listed_with_all_that_stays(tmp_path: Path) -> None:
    """A scan for the newest checkpoint meets another process's pruning. It once found nothing then: a run would have begun at zero."""
    storage = open_storage(tmp_path)
    storage.write_atomic("checkpoints/stays/COMMIT", b"")
    ended = threading.Event()

    def delete() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            folder = tmp_path / "checkpoints" / f"goes-{number}"
            folder.mkdir()
            folder.rmdir()

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        for _ in range(3000):
            assert "stays" in {entry.name for entry in storage.list("checkpoints")}
    finally:
        ended.set()
        deleting.join()


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


@pytest.mark.parametrize("uri", ["s3:/bucket/runs", "s3:bucket/runs", "gs:/bucket", Path("s3://bucket/runs")])
def test_a_uri_that_lost_a_slash_is_no_folder(uri: str | Path) -> None:
    with pytest.raises(ValueError, match=r"lacks a slash of its scheme.*write (s3|gs)://BUCKET"):
        open_storage(uri)


def test_a_file_of_this_machine_is_never_made_of_a_remote_path(tmp_path: Path) -> None:
    assert open_storage(tmp_path).local_path("run/ledger", "a ledger") == f"{tmp_path}/run/ledger"
    with pytest.raises(ValueError, match=r"a ledger needs a storage on a disk, and s3://bucket/runs.* is none"):
        open_storage("s3://bucket/runs?region=x").local_path("run/ledger", "a ledger")


@pytest.mark.parametrize("uri", ["ftp://host/x", "http://host/x", "s4://bucket", ""])
def test_an_unknown_scheme_is_refused_with_the_known_ones(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        open_storage(uri)


def test_credentials_are_not_shown() -> None:
    storage = open_storage("s3://user:pa%2Fss@bucket/runs?endpoint_override=localhost%3A1&scheme=http&region=x")
    assert storage.address == "s3://bucket/runs"
    assert open_storage("/tmp/x").address == "/tmp/x"
    with pytest.raises(ValueError, match="s4://bucket/x") as failure:
        open_storage("s4://user:pass@bucket/x?secret_key=1")
    assert "pass" not in str(failure.value)
    assert "secret_key" not in str(failure.value)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_to_retry_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"cluster.storage_retry_seconds=.*from 0 up"):
        open_storage("runs", seconds)


# Retries


class Clock:
    """Stands still but for those who sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def retry(self, seconds: float, draw: Callable[[], float] = lambda: 0.5) -> RetryPolicy:
        return RetryPolicy(seconds=seconds, clock=self, sleep=self.sleep, draw=draw)


class Failing:
    """Raises `error` so many times, then answers."""

    def __init__(self, times: int, error: OSError) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


@given(seconds=st.floats(0, 1000), draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20), times=st.integers(0, 60))
def test_tries_end_within_the_time_and_come_ever_later(seconds: float, draws: list[float], times: int) -> None:
    clock, drawn = Clock(), iter(draws * 1000)
    operation = Failing(times, OSError("gone"))
    try:
        assert clock.retry(seconds, lambda: next(drawn)).call(operation, "there") == "done"
        assert operation.calls == times + 1
    except StorageOutage:
        assert operation.calls <= times
        assert clock.now - 100 + 5 > seconds - 1e-6  # it was not given up with time left for one more
    assert clock.now - 100 <= seconds + 1e-6
    for number, slept in enumerate(clock.sleeps):
        full = min(0.1 * 2**number, 5.0)
        assert full / 2 <= slept <= full


def test_who_has_no_time_gives_up_after_a_failure_and_not_before() -> None:
    clock = Clock()
    assert clock.retry(60).call(Failing(0, OSError("gone")), "there", lambda: True) == "done"
    operation = Failing(1, OSError("gone"))
    with pytest.raises(StorageOutage):
        clock.retry(60).call(operation, "there", lambda: True)
    assert operation.calls == 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no"), FileExistsError(17, "yes"), StorageRefused("no")])
def test_answers_are_not_failures(error: OSError) -> None:
    operation = Failing(1, error)
    with pytest.raises(type(error)) as failure:
        Clock().retry(60).call(operation, "there")
    assert failure.value is error
    assert operation.calls == 1


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect to server"), True),
        (OSError("AWS Error SLOW_DOWN during CreateMultipartUpload operation: slow"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."), True),
        (OSError("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response body."), True),
        (OSError("AWS Error NO_SUCH_UPLOAD during UploadPart operation: gone"), True),
        (OSError("google::cloud::Status(UNAVAILABLE: try again)"), True),
        (OSError("Azure Error: [ServerBusy] 503 The server is busy."), True),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (OSError("something new"), True),
        (StorageOutage("gone"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
        (OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: x"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body."), False),
        (OSError("AWS Error UNKNOWN (HTTP status 507) during HeadObject operation: No response body."), False),
        (OSError("google::cloud::Status(PERMISSION_DENIED: no)"), False),
        (OSError("Azure Error: [AuthorizationFailure] 403 This request is not authorized."), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "no"), False),
        (StorageRefused("no"), False),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(error: OSError, transient: bool) -> None:
    assert is_transient(error) == transient


class Flaky(Weather):
    """Fails at two calls of five."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self._draw = random.Random(0)

    def check(self) -> None:
        self.is_down = self._draw.random() < 0.4
        super().check()


def test_every_operation_is_done_once_in_effect_where_many_calls_fail() -> None:
    flaky = Flaky(pafs.SubTreeFileSystem("bucket", pafs._MockFileSystem()))
    storage = Storage(fs=flaky, root="runs", is_local=False, uri="mock://bucket/runs", retry=Clock().retry(1e9))
    data = os.urandom(1000)
    storage.make_dir("a")
    storage.write_atomic("a/file", data)
    assert storage.read("a/file") == data
    assert b"".join(storage.read_chunks("a/file", 10)) == data
    assert [entry.name for entry in storage.list("a")] == ["file"]
    assert storage.exists("a/file")
    storage.delete_file("a/file")
    assert not storage.exists("a/file")
    storage.delete_dir("a")
    assert storage.list("") == []
    assert flaky.refused > 50


# Places


@pytest.mark.parametrize("name", ["a b", "100%", "50%25", "run#1", "what?", "größe", "a%20b", "a+b&c=d"])
def test_a_folder_of_any_name_is_a_storage_by_its_path_and_by_its_uri(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "runs"
    storage = open_storage(folder)
    storage.write_atomic("mine/file", b"1")
    assert (folder / "mine" / "file").read_bytes() == b"1"
    escaped = open_storage(folder.as_uri())
    assert escaped.is_local
    assert escaped.read("mine/file") == b"1"
    for again in (storage.uri, escaped.uri, join_uri(storage.uri, "mine")):  # what other processes and later commands are told
        assert open_storage(again).root.startswith(str(folder))
    assert open_storage(join_uri(escaped.uri, "mine")).read("file") == b"1"


@pytest.mark.parametrize("name", ["a b", "100%", "run#1", "größe", "a%20b"])
def test_what_people_write_in_a_remote_uri_is_taken_as_they_mean_it(name: str) -> None:
    storage = open_storage(f"s3://bucket/{name}?region=us-east-1")
    assert storage.root == f"bucket/{name.replace('%20', ' ')}"
    assert open_storage(storage.uri).root == storage.root


def test_a_file_uri_is_of_this_machine() -> None:
    assert open_storage("file://localhost/tmp/x").root == "/tmp/x"
    for uri in ("file://elsewhere/x", "file://x"):
        with pytest.raises(ValueError, match="three slashes: file:///folder"):
            open_storage(uri)


names_of_folders = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/\0"), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(name=names_of_folders, query=st.sampled_from(["", "?region=eu", "?endpoint_override=localhost%3A9000&scheme=http&region=eu"]))
def test_a_name_is_joined_before_the_query_and_comes_out_as_it_is(name: str, query: str) -> None:
    for base in ("s3://bucket/runs", "s3://bucket/runs/"):
        joined = join_uri(base + query, name)
        assert joined.startswith("s3://bucket/runs/")
        assert joined.endswith(query)
        assert open_storage(joined if query else f"{joined}?region=eu").root == f"bucket/runs/{name}".rstrip("/")
    assert join_uri("/a?b/runs", name) == f"/a?b/runs/{name}"


# What an error on reading says


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN])
def test_what_a_network_file_system_says_while_it_is_away_passes_and_is_no_damage(number: int) -> None:
    assert is_outage(OSError(number, "away"))
    assert is_unreadable_now(OSError(number, "away"))


def test_a_refusal_is_no_outage_and_no_damage_and_what_is_gone_is_neither() -> None:
    for refusal in (PermissionError(errno.EACCES, "no"), PermissionError(errno.EPERM, "no"), StorageRefused("no")):
        assert (is_outage(refusal), is_unreadable_now(refusal)) == (False, True)
    assert (is_outage(StorageOutage("gone")), is_unreadable_now(StorageOutage("gone"))) == (True, True)
    for answer in (FileNotFoundError(errno.ENOENT, "no"), IsADirectoryError(errno.EISDIR, "no"), OSError(errno.EUCLEAN, "damaged")):
        assert (is_outage(answer), is_unreadable_now(answer)) == (False, False)


def test_a_file_that_cannot_be_looked_at_now_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path / "runs")
    storage.write_atomic("run/config.toml", b"")

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, stale)
    for act in (lambda: storage.exists("run/config.toml"), lambda: storage.make_dir("run/new")):
        with pytest.raises(OSError, match="Stale"):
            act()
