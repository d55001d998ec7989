"""Claims about IDX files."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import picture
from made import former_identity, pixels, read, write_idx

from dataio.sources import SourceError


@pytest.mark.parametrize("pattern", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_exactly(tmp_path: Path, pattern: str, packed: bool):
    write_idx(tmp_path, pattern=pattern, packed=packed)
    source = read(tmp_path)
    assert (source.kind, source.classes) == ("idx", tuple("0123456789"))
    for split, count in (("train", 30), ("test", 10)):
        samples = list(source.samples(split))
        assert source.count(split) == len(samples) == count
        for index, sample in enumerate(samples):
            assert (sample.key, sample.label) == (f"{split}/{index:05d}", index % 10)
            assert np.array_equal(pixels(sample)[..., 1], picture(index, 8, 9)[..., 0])
        assert list(source.samples(split, 4)) == samples[4:]
    assert source.identities == (former_identity(tmp_path, list(tmp_path.iterdir()), ""),)
    source = read(tmp_path, validation_fraction=0.3)
    assert {split: source.count(split) for split in source.splits()} == {"train": 20, "validation": 10, "test": 10}
    assert sorted(sample.label for sample in source.samples("validation")) == list(range(10))


def test_idx_without_a_test_pair_is_split_and_names_come_from_classes_txt(tmp_path: Path):
    write_idx(tmp_path, counts={"train": 50})
    (tmp_path / "classes.txt").write_text("\n".join(f"class {number}" for number in range(10)) + "\n")
    source = read(tmp_path)
    assert source.classes[3] == "class 3"
    train, test = list(source.samples("train")), list(source.samples("test"))
    assert (source.count("train"), source.count("test")) == (len(train), len(test))
    assert sorted(sample.label for sample in test) == list(range(10))
    assert sorted(sample.key for sample in train + test) == [f"train/{row:05d}" for row in range(50)]
    assert all(np.array_equal(pixels(sample)[..., 1], picture(int(sample.key[-5:]), 8, 9)[..., 0]) for sample in train + test)
    for split, samples in (("train", train), ("test", test)):
        assert list(source.samples(split, 3)) == samples[3:]
    assert source.identities[1:] == (former_identity(tmp_path, list(tmp_path.iterdir()), "0.2"),)
    (tmp_path / "classes.txt").write_text("only one\n")
    with pytest.raises(SourceError, match="names 1 classes, the labels go up to 9"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "ends in number 29"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "more bytes"),
        ("train-images-idx3-ubyte", lambda raw: b"\0\0\x09" + raw[3:], "does not begin like an IDX file"),
        ("train-images-idx3-ubyte", lambda raw: raw[:4] + struct.pack(">I", 29) + raw[8:], "29 images, its labels file 30"),
        ("train-images-idx3-ubyte", lambda raw: raw[:8] + struct.pack(">II", 2**31, 2**31) + raw[16:], "2147483648x2147483648"),
        ("train-images-idx3-ubyte", lambda raw: raw[:10], "does not begin"),
        ("train-labels-idx1-ubyte", lambda raw: raw[:-1], "30 labels; it has 29"),
        ("train-labels-idx1-ubyte", lambda raw: raw + b"x", "30 labels; it has more"),
        ("train-labels-idx1-ubyte", lambda raw: gzip.compress(raw)[:-12], "damaged"),
        ("train-images-idx3-ubyte", lambda raw: gzip.compress(raw)[:-12], "damaged|ends in number"),
    ],
)
def test_an_idx_file_whose_header_and_length_disagree_is_refused(tmp_path: Path, name: str, change: Any, message: str):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(SourceError, match=message):
        list(read(tmp_path).samples("train"))


def test_a_missing_half_of_an_idx_pair_is_named(tmp_path: Path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SourceError, match="for test, but not its labels"):
        read(tmp_path)
