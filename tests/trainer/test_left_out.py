"""Nothing that was left out is lost from the report: neither what the conversion refused nor what the run met, with reason and picture."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.names import QUARANTINE
from cluster.quarantined import Quarantined
from cluster.storage import open_storage
from dataio.config import DataConfig
from dataio.parquet import Dataset
from dataio.prepared import open_prepared
from tests.trainer.report_runs import write_pictured
from tests.trainer.test_report import Page
from trainer.drive.data import record_left_out
from trainer.report.files import read_files
from trainer.report.left_out import CONVERSION, with_pictures
from trainer.report.sections import rendered
from trainer.runs.folder import find_run
from trainer.settings.tree import RunConfig


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of two classes; four more cannot be used: a torn JPEG, a GIF, a text, and one named with a stray byte."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(40):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    whole = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(whole, "JPEG", quality=90)
    (root / "cat" / "torn.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    frames = [Image.fromarray(np.full((30, 30), shade, np.uint8)) for shade in (40, 200)]
    frames[0].save(root / "dog" / "moving.jpg", "GIF", save_all=True, append_images=frames[1:])
    (root / "dog" / "page.png").write_bytes(b"<html>404</html>")
    Path(root, "dog", "caf\udce9.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(path=str(photos), root=str(tmp_path_factory.mktemp("root")), max_bad_fraction=0.2)


@pytest.fixture(scope="module")
def dataset(data: DataConfig) -> Dataset:
    found = open_prepared(data)[1]
    assert found.manifest.quarantined == 4
    return found


OWN = {"key": "cat/00.png", "reason": "undecodable: as a test", "split": "train", "sample_id": 0}


def run_in(folder: Path, data: DataConfig, dataset: Dataset, lines: bytes, **changes: Any) -> Path:
    """A finished run on these data."""
    said = {"quarantined": 5, "dataset_fingerprint": dataset.manifest.fingerprint} | changes
    run = write_pictured(folder, config=RunConfig(run=folder.name, data=data), **said)
    (run / QUARANTINE).write_bytes(lines)
    return run


def quarantine_section(run: Path, dataset: Dataset | None = None) -> Page:
    html, problems = rendered(read_files(find_run(str(run)), dataset))
    assert problems == []
    [section] = re.findall(r"<section><h2>Images that could not be used</h2>.*?</section>", html, re.DOTALL)
    return Page(section)


def test_the_run_s_folder_lists_what_the_conversion_left_out(tmp_path: Path, dataset: Dataset) -> None:
    storage = open_storage(str(tmp_path))
    told: list[str] = []
    record_left_out(storage, "run", dataset, told.append)
    first = storage.read(f"run/{QUARANTINE}")
    records = [json.loads(line) for line in first.splitlines()]
    assert sorted(record["key"] for record in records) == ["cat/torn.jpg", "dog/caf\\xe9.png", "dog/moving.jpg", "dog/page.png"]
    assert {record["stage"] for record in records} == {CONVERSION}
    record_left_out(storage, "run", dataset, told.append)  # the same command again
    assert storage.read(f"run/{QUARANTINE}") == first
    assert told == []


def test_a_run_that_an_older_release_began_gets_them_above_its_own(tmp_path: Path, dataset: Dataset) -> None:
    storage = open_storage(str(tmp_path))
    own = Quarantined([OWN]).to_lines()
    storage.write_atomic(f"run/{QUARANTINE}", own)
    record_left_out(storage, "run", dataset, print)
    lines = storage.read(f"run/{QUARANTINE}")
    assert lines.endswith(own)
    assert len(lines.splitlines()) == 5


def test_the_coordinator_keeps_them_and_counts_its_own_only(tmp_path: Path, dataset: Dataset) -> None:
    storage = open_storage(str(tmp_path))
    record_left_out(storage, "run", dataset, print)
    lines = storage.read(f"run/{QUARANTINE}")
    known = Quarantined.from_lines(lines)
    assert len(known) == 0, "the conversion's do not count towards the run's limit, nor twice in its summary"
    first = json.loads(lines.splitlines()[0])
    same_place = {**OWN, "split": first["split"], "sample_id": first["sample_id"]}
    assert known.add([same_place]) == [same_place], "a place in the converted data is not one in the source"
    assert known.to_lines() == lines + Quarantined([same_place]).to_lines()
    assert known.to_lines(since=1) == b""
    assert Quarantined.from_lines(known.to_lines()).to_lines() == known.to_lines()


def test_a_data_set_without_refusals_leaves_no_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    sample = open_prepared(DataConfig(path=str(Path("dataio/samples/fashion_mnist").resolve())))[1]
    record_left_out(storage, "run", sample, print)
    assert not storage.exists(f"run/{QUARANTINE}")


def test_the_report_shows_each_with_reason_and_what_can_be_seen_of_it(tmp_path: Path, data: DataConfig, dataset: Dataset) -> None:
    storage = open_storage(str(tmp_path))
    record_left_out(storage, "run", dataset, print)
    lines = storage.read(f"run/{QUARANTINE}") + Quarantined([OWN]).to_lines()
    page = quarantine_section(run_in(tmp_path / "runs" / "run", data, dataset, lines))
    text = re.sub(r"\s+", " ", page.text)
    assert text.startswith("Images that could not be used 5 images left out: ")
    for words in ("cat/torn.jpg truncated", "dog/moving.jpg animated", "dog/page.png unknown format", "dog/caf\\xe9.png empty"):
        assert words in text
    assert "cat/00.png undecodable: as a test train the run" in text
    seen = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert sorted(seen) == ["cat/00.png, left out", "cat/torn.jpg, left out", "dog/moving.jpg, left out"]


def test_a_run_of_an_older_release_is_told_from_its_data_set(tmp_path: Path, data: DataConfig, dataset: Dataset) -> None:
    page = quarantine_section(run_in(tmp_path / "run", data, dataset, Quarantined([OWN]).to_lines()))
    assert "dog/page.png" in page.text
    assert page.elements.count("img") == 3


def test_what_is_not_known_any_more_is_counted(tmp_path: Path, data: DataConfig, dataset: Dataset) -> None:
    gone = DataConfig(path=str(tmp_path / "gone"), root=str(tmp_path / "empty"))
    text = quarantine_section(run_in(tmp_path / "run", gone, dataset, b"")).text
    assert "5 images left out. Of 5 images it is not recorded any more which and why." in text


def test_no_record_leads_out_of_the_source_s_folder(tmp_path: Path, dataset: Dataset) -> None:
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (20, 20)).save(source / "huge.png")
    keys = ("../secret.png", str(tmp_path / "secret.png"), "link.png", "huge.png")
    records = [{"key": key, "reason": "damaged", "split": "train", "sample_id": 0, "stage": CONVERSION} for key in keys]
    (source / "scans.jpg").write_bytes(b"\xff\xd8\xff" + b"\xff\xda" * 201)
    found = with_pictures([*records, records[0] | {"key": "scans.jpg"}], dataset, DataConfig(path=str(source)))
    assert list(found.pictures) == [3]
    strange = [{"key": 3, "split": None, "sample_id": "x"}, {"stage": CONVERSION}, {"key": "a", "split": "train", "sample_id": 10**30}]
    assert len(with_pictures(strange, dataset, DataConfig(path="gs2://nowhere")).pictures) == 0
