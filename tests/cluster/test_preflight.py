"""Claims about preflight, on a real cluster of two nodes, and about data that travel through Ray's object store.

Both nodes are processes of this machine, so they share its disks and its packages. What the second one lacks is simulated in the task that
runs there: it looks for the storage under another path, or reports another version. All else is the real thing."""

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import preflight as module
from cluster.launch import ClusterHardware
from cluster.preflight import check_node, preflight
from cluster.storage import open_storage
from dataio.parquet import open_dataset
from tests.e2e.running import PROJECT
from trainer.drive.data import ship
from trainer.drive.survey import check_storage_outlives_job
from trainer.settings.tree import RunConfig

SAMPLES = PROJECT / "dataio" / "samples" / "fashion_mnist"
ALONE = ClusterHardware(local=True, nodes=1, cpus=2, gpus=0)
TWO = ClusterHardware(local=False, nodes=2, cpus=2, gpus=0)


@pytest.fixture(scope="module")
def second_node() -> Iterator[str]:
    """Two nodes with one CPU each; the id of the one that is not the driver's."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    try:
        ray.init(
            address=cluster.address,
            runtime_env={"env_vars": {"PYTHONPATH": f"{PROJECT}{os.pathsep}{Path(__file__).parent}"}},
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield other.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


def fingerprint() -> str:
    return open_dataset(SAMPLES).manifest.fingerprint


def on_node(node: str, **changes: Any) -> Any:
    """check_node that behaves differently on `node`: `uri` it looks at another storage, `versions` it reports others."""

    def check(uri: str, run: str, token: str, data_probe: Any) -> module.NodeReport:
        if ray.get_runtime_context().get_node_id() != node:
            return check_node(uri, run, token, data_probe)
        report = check_node(changes.get("uri", uri), run, token, data_probe)
        return replace(report, node="node-b", versions=report.versions | changes.get("versions", {}))

    return check


# Two nodes


def test_a_shared_folder_and_readable_data_pass_and_nothing_is_left_in_the_folder(second_node: str, tmp_path: Path) -> None:
    assert preflight(open_storage(tmp_path), "run", TWO, fingerprint)
    assert list((tmp_path / "run").iterdir()) == []


def test_every_node_is_checked(second_node: str, tmp_path: Path) -> None:
    def probe() -> str:
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        return ""

    assert preflight(open_storage(tmp_path / "runs"), "run", TWO, probe)
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {node["NodeID"] for node in ray.nodes()}
    assert len(ray.nodes()) == 2


def test_a_folder_that_is_not_shared_is_an_error_that_names_node_and_fix(
    second_node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_node", on_node(second_node, uri=str(tmp_path / "other-disk")))
    with pytest.raises(ValueError, match=r"is not shared: node node-b cannot use it \(.*No such file.*give --storage a network mount"):
        preflight(open_storage(tmp_path / "disk"), "run", TWO, fingerprint)


def test_a_folder_that_a_node_cannot_write_is_an_error_that_names_it(
    second_node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(uri: str, run: str, token: str, data_probe: Any) -> module.NodeReport:
        from cluster import storage

        if ray.get_runtime_context().get_node_id() != second_node:
            return check_node(uri, run, token, data_probe)

        def refuse(path: str, data: bytes) -> None:
            raise PermissionError(13, "Permission denied", path)

        real, storage.write_atomic_local = storage.write_atomic_local, refuse
        try:
            return check_node(uri, run, token, data_probe)
        finally:
            storage.write_atomic_local = real

    monkeypatch.setattr(module, "check_node", read_only)
    with pytest.raises(ValueError, match=rf"node {platform.node()} cannot use it \(.*Permission denied"):
        preflight(open_storage(tmp_path), "run", TWO, fingerprint)


def test_different_versions_are_an_error_that_names_both(second_node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_node", on_node(second_node, versions={"torch": "2.0.1"}))
    ours = module.versions()["torch"]
    with pytest.raises(ValueError, match=rf"versions differ between nodes: torch .*(2.0.1|{ours}).* but .*constraints.txt on every node"):
        preflight(open_storage(tmp_path), "run", TWO, fingerprint)


def test_data_that_only_the_driver_can_read_are_seen_and_travel_bit_by_bit(second_node: str, tmp_path: Path) -> None:
    driver = os.getpid()

    def probe() -> str:
        if os.getpid() != driver:
            raise FileNotFoundError("no such folder on this node")
        return fingerprint()

    assert not preflight(open_storage(tmp_path), "run", TWO, probe)

    shipped = ship(open_dataset(SAMPLES), RunConfig())

    @ray.remote(num_cpus=0)
    def read(refs: dict[str, Any]) -> tuple[str, dict[str, str], int]:
        files = {name: memoryview(ray.get(ref)) for name, ref in refs.items()}
        dataset = open_dataset(files)
        images = sum(len(dataset.split("train").read_group(group).encoded) for group in range(dataset.split("train").groups))
        return dataset.manifest.fingerprint, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, images

    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(second_node, soft=False)
    seen, hashes, images = ray.get(read.options(scheduling_strategy=there).remote(shipped))
    assert seen == fingerprint()
    assert hashes == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in SAMPLES.iterdir() if file.name in shipped}
    assert set(shipped) == set(open_dataset(SAMPLES).files())
    assert images == open_dataset(SAMPLES).split("train").count


# One node


def test_data_above_the_limit_do_not_travel_and_the_error_says_what_to_do() -> None:
    config = RunConfig()
    config = replace(config, cluster=replace(config.cluster, object_store_limit_bytes=1000))
    with pytest.raises(ValueError, match=r"object_store_limit_bytes=1,000; put it on storage that every node mounts .* or raise the limit"):
        ship(open_dataset(SAMPLES), config)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*; give a folder or URI that can"):
        preflight(open_storage(tmp_path / "file"), "run", ALONE, fingerprint)


@pytest.mark.parametrize("storage", ["runs", "./runs", "../runs"])
def test_a_relative_storage_dies_with_its_job(storage: str) -> None:
    with pytest.raises(ValueError, match="give an absolute path that every node mounts"):
        check_storage_outlives_job(storage)


@pytest.mark.parametrize("storage", ["/mnt/runs", "~/finetune-runs", "s3://bucket/runs", "file:///mnt/runs"])
def test_an_absolute_storage_outlives_its_job(storage: str) -> None:
    check_storage_outlives_job(storage)


def test_a_node_with_little_shared_memory_is_named_where_several_gpus_will_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shared_memory_problem", lambda: "/dev/shm has 17 MB free")
    storage, told = open_storage(tmp_path), list[str]()
    assert preflight(storage, "run", replace(ALONE, gpus=1), lambda: "x", tell=told.append)
    assert told == []
    assert preflight(storage, "run", replace(ALONE, gpus=2), lambda: "x", tell=told.append)
    assert told == [f"warning: on node {platform.node()} /dev/shm has 17 MB free"]
