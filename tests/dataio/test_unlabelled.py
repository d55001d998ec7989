"""Images without labels: what is read of which source, and that a pin names them by their content."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encode, picture
from made import hf_rows, write_folder, write_hf, write_idx

from dataio.config import DataConfig
from dataio.prepared import prepared
from dataio.schema import UNLABELLED
from dataio.sources import SourceError
from dataio.sources.unlabelled import open_unlabelled
from dataio.unlabelled import (
    UnlabelledError,
    is_resized,
    known_classes,
    look_at_unlabelled,
    open_pinned,
    pin,
    prepare_unlabelled,
    problem_of_sizes,
)


def read(path: Path) -> dict[str, int]:
    """Key -> label of what is read at `path`."""
    source = open_unlabelled(str(path), root=Path("/nonexistent"))
    assert source.splits() == (UNLABELLED,)
    found = {sample.key: sample.label for sample in source.samples(UNLABELLED)}
    assert source.count(UNLABELLED) == len(found)
    assert list(found)[1:] == [sample.key for sample in source.samples(UNLABELLED, 1)]
    return found


def config_of(path: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(unlabelled=str(path), root=str(tmp_path / "root"), max_bad_fraction=0.5)


def test_all_images_below_a_folder_are_read_and_its_folders_are_their_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "more" / "deep", {"cat": 2, "ant": 1})
    (tmp_path / "more" / "0.png").write_bytes(encode(picture(0, 4, 4)))
    (tmp_path / "more" / "notes.txt").write_text("no image")
    assert read(tmp_path / "more") == {"0.png": -1, "deep/ant/0.png": 0, "deep/cat/0.png": 1, "deep/cat/1.png": 1}


def test_a_folder_with_splits_gives_its_unlabelled_images_or_those_to_train_on_and_never_a_test_image(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "set" / split, {"cat": 2, "ant": 1})
    assert set(read(tmp_path / "set")) == {"train/ant/0.png", "train/cat/0.png", "train/cat/1.png"}
    (tmp_path / "set" / "unlabelled").mkdir()
    (tmp_path / "set" / "unlabelled" / "x.png").write_bytes(encode(picture(0, 4, 4)))
    assert read(tmp_path / "set") == {"unlabelled/x.png": -1}


def test_parquet_needs_no_column_of_labels_and_uses_one_that_is_there(tmp_path: Path) -> None:
    rows = pa.table({"image": pa.array([encode(picture(index, 4, 4)) for index in range(3)], pa.binary())})
    (tmp_path / "bare").mkdir()
    pq.write_table(rows, tmp_path / "bare" / "part.parquet")
    assert list(read(tmp_path / "bare").values()) == [-1] * 3
    assert list(read(tmp_path / "bare" / "part.parquet").values()) == [-1] * 3
    write_hf(tmp_path / "hf" / "train-0.parquet", hf_rows(5), names=["a", "b", "c"])
    write_hf(tmp_path / "hf" / "test-0.parquet", hf_rows(4, first=9), names=["a", "b", "c"])
    assert list(read(tmp_path / "hf").values()) == [0, 1, 2, 0, 1]


def test_a_source_of_another_kind_gives_the_images_to_train_on(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", counts={"train": 30, "t10k": 10})
    assert list(read(tmp_path / "idx").values()) == [index % 10 for index in range(30)]


@pytest.mark.parametrize(
    ("path", "problem"), [("nowhere", "data.unlabelled=.*does not exist"), ("empty", "data.unlabelled=.*holds nothing")]
)
def test_what_cannot_be_read_is_named_by_its_setting(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=problem):
        open_unlabelled(str(tmp_path / path), root=tmp_path)


def test_a_converted_set_gives_its_unlabelled_split_or_train(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "set" / split, {"cat": 3, "ant": 2}, first=ord(split[0]))
    whole = prepared(DataConfig(path=str(tmp_path / "set"), root=str(tmp_path / "root")))
    found = prepare_unlabelled(config_of(Path(whole.location), tmp_path))
    assert list(found.dataset.manifest.splits) == [UNLABELLED]
    assert found.dataset.split(UNLABELLED).keys(range(5)) == whole.dataset.split("train").keys(range(5))
    assert found.dataset.split(UNLABELLED).name == UNLABELLED, "bad images are told apart from those of train"


def test_bad_images_are_left_out_by_key_and_a_look_sees_them_before_anything_is_converted(tmp_path: Path) -> None:
    write_folder(tmp_path / "more", {"cat": 3})
    (tmp_path / "more" / "bad.png").write_bytes(b"no image at all")
    config = config_of(tmp_path / "more", tmp_path)
    looked = look_at_unlabelled(config)
    assert (looked.is_converted, looked.samples, [bad.key for bad in looked.bad]) == (False, 4, ["bad.png"])
    assert not (tmp_path / "root").exists()
    found = prepare_unlabelled(config)
    assert [(bad.key, bad.split) for bad in found.dataset.left_out()] == [("bad.png", UNLABELLED)]
    assert found.dataset.split(UNLABELLED).count == 3
    assert look_at_unlabelled(config).is_converted
    assert prepare_unlabelled(config).location == found.location, "converted once"


def test_a_pin_opens_the_same_images_and_no_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "more", {"cat": 3})
    found = prepare_unlabelled(config_of(tmp_path / "more", tmp_path))
    pinned = replace(config_of(tmp_path / "more", tmp_path), unlabelled=pin(found))
    assert np.array_equal(open_pinned(pinned.unlabelled).split(UNLABELLED).labels(), found.dataset.split(UNLABELLED).labels())
    assert pin(prepare_unlabelled(pinned)) == pinned.unlabelled
    other = f"{pinned.unlabelled[:-1]}{'0' if pinned.unlabelled[-1] != '0' else '1'}"
    with pytest.raises(UnlabelledError, match="holds other images"):
        open_pinned(other)


def test_sizes_have_to_come_to_that_of_the_labelled_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "more", {"cat": 3})
    config = config_of(tmp_path / "more", tmp_path)
    manifest = prepare_unlabelled(config).dataset.manifest
    assert problem_of_sizes(manifest, config, (4, 4)) is None
    assert "holds images of 4x4 pixels (height x width), and the run's are of 8x4" in str(problem_of_sizes(manifest, config, (8, 4)))
    crop = replace(config, fit="crop")
    assert problem_of_sizes(manifest, crop, (8, 8)) is None
    assert (is_resized(manifest, crop, (8, 8)), is_resized(manifest, crop, (4, 4))) == (True, False)
    assert known_classes(manifest.targets[0], ("ant", "cat")) == (1,)
