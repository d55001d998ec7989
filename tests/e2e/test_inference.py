"""Answers to any number of images on real Ray: whatever is killed, each image is answered once, in files that are the same to the byte."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import tyro

from cluster.process import process_stat
from tests.answering import parts_in, put_noise
from tests.e2e.running import PROJECT, kill_session
from tests.s3 import SECRET, Server, answering, serving
from trainer import predict
from trainer.inference.job import begin
from trainer.inference.plan import PLAN, SUMMARY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
COUNT, SHARD = 600, 30
ROWS = 90
"""Of each of two Parquet files, in row groups of a shard."""


def children_of(pid: int) -> list[int]:
    """All processes below this one."""
    parents = {int(name): stat.parent for name in os.listdir("/proc") if name.isdigit() and (stat := process_stat(int(name))) is not None}
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {pid})


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def words_of(run: Path, images: object, out: Path) -> list[str]:
    return [str(run), str(images), "--out", str(out), "--shard-images", str(SHARD), "--workers", "2", "--json"]


class Command:
    """One `trainer.predict` process, in a session of its own."""

    def __init__(self, run: Path, images: object, out: Path) -> None:
        self.out, self.log = out, out.parent / f"{out.name}.{time.monotonic_ns()}.log"
        words = words_of(run, images, out)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.predict", *words],
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ},
                start_new_session=True,
            )

    def parts(self) -> set[str]:
        return {path.name for path in self.out.glob("predictions-*.parquet")}

    def wait_for_parts(self, count: int) -> None:
        self._wait(lambda: len(self.parts()) >= count)

    def kill_worker(self) -> None:
        """SIGKILL to a process that answers."""
        found: list[int] = []

        def look() -> bool:
            found.extend(pid for pid in children_of(self.process.pid) if "ray::MapWorker" in title_of(pid))
            return bool(found)

        self._wait(look)
        os.kill(found[0], signal.SIGKILL)

    def _wait(self, is_there: Callable[[], bool], timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if is_there():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def finish(self, timeout: float = 900) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        kill_session(self.process.pid)
        self.process.wait()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    put_noise(folder / f"{index:05d}.png" for index in range(COUNT))
    (folder / "00400.png").write_bytes(b"damaged")
    return folder


def test_killed_in_every_way_each_image_is_answered_once_in_the_same_bytes(exported_run: Path, photos: Path, tmp_path: Path) -> None:
    whole = Command(exported_run, photos, tmp_path / "whole")
    assert whole.finish() == 1, whole.log.read_text()
    expected = parts_in(whole.out)
    assert len(expected) == COUNT // SHARD

    killed = Command(exported_run, photos, tmp_path / "killed")
    killed.wait_for_parts(3)
    killed.kill()
    assert len(killed.parts()) < COUNT // SHARD

    interrupted = Command(exported_run, photos, tmp_path / "killed")
    interrupted.wait_for_parts(len(killed.parts()) + 1)
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.finish() == 130, interrupted.log.read_text()
    assert "SIGINT: stopped; the same command goes on" in interrupted.log.read_text()
    assert "Traceback" not in interrupted.log.read_text()

    last = Command(exported_run, photos, tmp_path / "killed")
    last.wait_for_parts(len(interrupted.parts()) + 1)
    last.kill_worker()
    assert last.finish() == 1, last.log.read_text()
    assert parts_in(last.out) == expected
    assert {path.name for path in last.out.iterdir()} == {*expected, PLAN, SUMMARY}

    found = pads.dataset(last.out).to_table()
    assert found.column("row").to_pylist() == list(range(COUNT))
    assert found.column("key").to_pylist() == sorted(str(path) for path in photos.iterdir())
    counts = json.loads((last.out / SUMMARY).read_text())["counts"]
    assert (counts["images"], counts["bad"]) == (COUNT, 1)
    assert counts == json.loads((whole.out / SUMMARY).read_text())["counts"]


def put_rows(images: Path, folder: Path) -> tuple[Path, Path]:
    """Two Parquet files of images."""
    folder.mkdir()
    paths = sorted(images.iterdir())
    table = pa.table({"image": [path.read_bytes() for path in paths[: 2 * ROWS]], "key": [path.name for path in paths[: 2 * ROWS]]})
    for name, start in (("one", 0), ("two", ROWS)):
        pq.write_table(table.slice(start, ROWS), folder / f"{name}.parquet", row_group_size=SHARD)
    return folder / "one.parquet", folder / "two.parquet"


def plan_for(run: Path, images: object, out: Path) -> None:
    """Write the list, as the command does before Ray starts."""
    begin(predict._asked(tyro.cli(predict.Arguments, args=words_of(run, images, out))), lambda line: None)


def test_a_file_that_changed_after_the_plan_ends_the_job_in_its_words_and_put_back_it_goes_on(
    exported_run: Path, photos: Path, tmp_path: Path
) -> None:
    _, changed = put_rows(photos, tmp_path / "rows")
    as_listed = changed.read_bytes()
    plan_for(exported_run, tmp_path / "rows", tmp_path / "out")
    pq.write_table(pq.read_table(changed).slice(0, ROWS - 1), changed, row_group_size=SHARD)
    refused = Command(exported_run, tmp_path / "rows", tmp_path / "out")
    assert refused.finish() == 2, refused.log.read_text()
    told = refused.log.read_text()
    assert f"error: {changed} is not the file any more that was listed; put that one back, and the same command goes on" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out" / SUMMARY).exists()
    assert {pq.read_table(refused.out / name).num_rows for name in refused.parts()} <= {SHARD}, "what has a name is whole"

    changed.write_bytes(as_listed)
    last = Command(exported_run, tmp_path / "rows", tmp_path / "out")
    assert last.finish() == 0, last.log.read_text()
    names = [path.name for path in sorted(photos.iterdir())]
    assert pads.dataset(last.out).to_table().column("key").to_pylist() == names[: 2 * ROWS]


def test_an_object_store_that_refuses_ends_the_job_with_its_words(exported_run: Path, photos: Path, tmp_path: Path) -> None:
    with serving(Server()) as server:
        client = server.client()
        client.create_bucket(Bucket="pets")
        for path in sorted(photos.iterdir())[:3]:
            client.upload_file(str(path), "pets", f"photos/{path.name}")
        uri = server.uri("pets/photos")
        plan_for(exported_run, uri, tmp_path / "out")
        server.stop()
        with answering(403, "AccessDenied", "pets", server.port):
            refused = Command(exported_run, uri, tmp_path / "out")
            assert refused.finish() == 2, refused.log.read_text()
    told = refused.log.read_text()
    assert "error: the storage refuses" in told
    assert "the credentials may not do this" in told
    assert SECRET not in told.replace("secrets", "")
    assert "Traceback" not in told
    assert refused.parts() == set()
