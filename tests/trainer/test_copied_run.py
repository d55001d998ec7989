"""A run's folder, copied file by file from a disk to an object store and back, is the same run: it is listed, reported, and goes on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from cluster.journal import Journal, read_journal
from cluster.storage import Storage, open_storage
from cluster.store import Store
from dataio.parquet import open_dataset
from tests.s3 import Server, serving
from trainer.drive.identity import check_same_commit, check_same_run, find, newest_start, resolved
from trainer.drive.record import bit_changes, identity_of
from trainer.report.__main__ import main as report
from trainer.runs.__main__ import main as runs
from trainer.settings.tree import RunConfig

ROOT = Path(__file__).resolve().parents[2]
(STOPPED,) = (ROOT / "tests" / "golden" / "run_of_86cc2bf").iterdir()
"""By a release that knew neither attempts in names nor identity records."""
DATA = open_dataset(ROOT / "dataio" / "samples" / "fashion_mnist")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Storage]:
    with serving(Server()) as server:
        server.client().create_bucket(Bucket="copies")
        yield open_storage(server.uri("copies/runs"))


def copy(source: Storage, target: Storage) -> None:
    """As `aws s3 sync` and `cp -r` do."""
    infos = source.fs.get_file_info(pafs.FileSelector(source.at(STOPPED.name), recursive=True))
    for path in (info.path[len(source.root) + 1 :] for info in infos if info.type == pafs.FileType.File):
        target.write_atomic(path, source.read(path))


def never(*said: str) -> None:
    raise AssertionError(said)


def go_on(storage: Storage, step: int) -> bytes:
    """What the driver, the ranks and the coordinator do when the same command is given again, up to the commit of `step`. Returns the
    weights that they began from."""
    run = STOPPED.name
    saved = find(storage, run).saved
    assert saved is not None
    asked = replace(saved, run="", storage=storage.uri, train=replace(saved.train, channels_last="auto", small_maps="auto", select="auto"))
    asked = replace(
        asked,
        data=replace(asked.data, remainder="auto", background="auto", augment_backend="auto"),
        optim=replace(asked.optim, warmup_fraction=-1.0),
    )
    fingerprint = DATA.manifest.fingerprint
    there = resolved(asked, storage, workers=2, fingerprint=fingerprint, weights="", prefix="timm-test_efficientnet", shape=(28, 28))
    assert there.config.run == run  # the same command means the same run
    check_same_run(there.config, there.found, "")
    now = identity_of(there.config, DATA.manifest, weights="", device="cpu", threads=1)
    store = Store.open(storage, run)
    generation = store.claim_generation({"identity": now.record()})
    start = newest_start(store, never, never)
    assert start is not None
    check_same_commit(there.config, start.meta, now)
    assert "threads" not in bit_changes(start.meta, now, workers=2)
    weights = start.read("model.safetensors")
    receipts = [store.stage(step, generation, name, start.read(name), attempt=2) for name in start.files]
    store.commit(step, generation, receipts, {**start.meta, "identity": now.record()}, attempt=2)
    store.prune(2, generation, attempt=2, staged_below=step)
    Journal.open(storage, run, "driver-1").write("checkpoint_committed", step=step, attempt=2)
    return weights


def test_a_run_goes_on_wherever_it_was_copied_to(bucket: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").mkdir()
    shutil.copytree(STOPPED, tmp_path / "disk" / STOPPED.name)
    disk, elsewhere = open_storage(tmp_path / "disk"), open_storage(tmp_path / "elsewhere")
    copy(disk, bucket)
    weights = go_on(disk, 20)
    assert go_on(bucket, 20) == weights
    copy(bucket, elsewhere)
    assert go_on(elsewhere, 40) == weights
    newest = Store.open(elsewhere, STOPPED.name).newest_valid(never)
    assert newest is not None
    assert (newest.step, newest.generation, newest.attempt) == (40, 3, 2)
    events = [event for event in read_journal(elsewhere, STOPPED.name) if event["event"] == "checkpoint_committed"]
    assert [event["step"] for event in events][-2:] == [20, 40]  # of the segments of the object store, and of the file
    for storage in (bucket, elsewhere):
        assert runs(["--storage", storage.uri, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["run"], said["checkpoint_step"]) == (STOPPED.name, 20 if storage is bucket else 40)
    assert report([STOPPED.name, "--storage", bucket.uri]) == 0
    assert b"<html" in bucket.read(f"{STOPPED.name}/report.html")


def test_the_golden_run_s_settings_are_those_of_a_run_here() -> None:
    """Were they not, the test above would compare nothing."""
    found = find(open_storage(STOPPED.parent), STOPPED.name)
    assert found.saved is not None
    assert found.record is None
    assert found.saved != RunConfig()
