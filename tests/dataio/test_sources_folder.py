"""Claims about folders of images by class."""

import os
from collections import Counter
from pathlib import Path

import pytest
from corpus import encode, picture
from made import former_identity, read, write_folder

from dataio.schema import Target
from dataio.sources import SourceError


def images_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.*") if path.suffix.lower() in (".png", ".jpg") and not path.name.startswith(".")]


def test_an_image_folder_is_read_by_class_in_sorted_order(tmp_path: Path):
    write_folder(tmp_path / "train", {"dog": 3, "cat": 2})
    write_folder(tmp_path / "test", {"dog": 1}, first=9)
    (tmp_path / "train" / "cat" / "deep").mkdir()
    (tmp_path / "train" / "cat" / "deep" / "a.JPG").write_bytes(encode(picture(5, 4, 4), "JPEG"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden")
    source = read(tmp_path)
    assert (source.kind, source.classes, source.ignored) == ("folder", ("cat", "dog"), ("1 .txt",))
    train = [(sample.key, sample.label) for sample in source.samples("train")]
    assert train == [
        ("train/cat/0.png", 0),
        ("train/cat/1.png", 0),
        ("train/cat/deep/a.JPG", 0),
        ("train/dog/0.png", 1),
        ("train/dog/1.png", 1),
        ("train/dog/2.png", 1),
    ]
    ((test),) = source.samples("test")
    assert (test.key, test.label, test.data) == ("test/dog/0.png", 1, encode(picture(9, 4, 4)))
    assert (source.splits(), source.count("train"), source.count("test")) == (("train", "test"), 6, 1)
    assert source.targets == (Target(name="label", kind="label", classes=("cat", "dog")),)
    assert source.identities == (former_identity(tmp_path, images_in(tmp_path), ""),)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_validation_is_a_split_of_its_own_and_test_is_held_out_of_train(tmp_path: Path, name: str):
    write_folder(tmp_path / "train", {"dog": 10, "cat": 5})
    write_folder(tmp_path / name, {"dog": 2}, first=9)
    source = read(tmp_path)
    assert source.splits() == ("train", "validation", "test")
    assert [sample.key for sample in source.samples("validation")] == [f"{name}/dog/0.png", f"{name}/dog/1.png"]
    assert Counter(sample.label for sample in source.samples("test")) == {0: 1, 1: 2}
    assert all(sample.key.startswith("train/") for sample in source.samples("test"))
    assert source.count("train") == 12
    assert source.identities[1:] == (former_identity(tmp_path, images_in(tmp_path), ""),)
    write_folder(tmp_path / "test", {"cat": 1}, first=20)
    source = read(tmp_path)
    assert [source.count(split) for split in source.splits()] == [15, 2, 1]
    formerly = [path for path in images_in(tmp_path) if f"/{name}/" not in str(path)]
    assert source.identities[1:] == (former_identity(tmp_path, formerly, ""),)


@pytest.mark.parametrize("alone", [False, True])
def test_images_in_unlabelled_need_no_class_folder(tmp_path: Path, alone: bool):
    for split in ("",) if alone else ("train", "test"):
        write_folder(tmp_path / split, {"dog": 4, "cat": 4})
    (tmp_path / "unlabelled" / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/a.png", "notes.txt"):
        (tmp_path / "unlabelled" / name).write_bytes(encode(picture(len(name), 4, 4)))
    source = read(tmp_path)
    assert (source.classes, source.splits()) == (("cat", "dog"), ("train", "test", "unlabelled"))
    assert [(sample.key, sample.values) for sample in source.samples("unlabelled")] == [
        ("unlabelled/b.png", (-1,)),
        ("unlabelled/deep/a.png", (-1,)),
    ]
    assert source.ignored == ("1 .txt",)
    formerly = [path for path in images_in(tmp_path) if alone or "unlabelled" not in path.parts]
    assert source.identities[1:] == (former_identity(tmp_path, formerly, "0.2" if alone else ""),)
    several = read(tmp_path, targets="label:labels")
    assert [sample.values[0].tolist() for sample in several.samples("unlabelled")] == [[255, 255]] * 2


def write_several(root: Path) -> None:
    """beach: 1 2, sunset: 2 3, _none: 4; image 2 has both labels."""
    for name, numbers in {"beach": [1, 2], "sunset": [2, 3], "_none": [4]}.items():
        (root / name / "deep").mkdir(parents=True)
        for number in numbers:
            (root / name / "deep" / f"{number}.png").write_bytes(encode(picture(number, 4, 4)))


def test_an_image_in_several_class_folders_has_all_their_labels(tmp_path: Path):
    write_several(tmp_path / "train")
    write_several(tmp_path / "test")
    source = read(tmp_path, targets="scene:labels")
    assert source.targets == (Target(name="scene", kind="labels", classes=("beach", "sunset")),)
    for split in ("train", "test"):
        assert source.count(split) == 4
        assert [(sample.key, sample.data, sample.values[0].tolist()) for sample in source.samples(split)] == [
            (f"deep/{number}.png", encode(picture(number, 4, 4)), value) for number, value in enumerate([[1, 0], [1, 1], [0, 1], [0, 0]], 1)
        ]
    assert read(tmp_path).classes == ("_none", "beach", "sunset")  # of one label an image it is a class


def test_several_labels_are_held_out_by_the_rarest(tmp_path: Path):
    for number in range(40):
        for name in ["often"] + ["rare"] * (number % 10 == 0):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.png").write_bytes(encode(picture(number, 4, 4)))
    source = read(tmp_path, targets="label:labels", test_fraction=0.25)
    assert Counter(tuple(sample.values[0].tolist()) for sample in source.samples("test")) == {(1, 0): 9, (1, 1): 1}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("sunset/deep/1.png", r"beach/deep/1\.png and .*sunset/deep/1\.png have one name.*their bytes differ; rename one of the two"),
        ("_none/deep/1.png", r"_none/deep/1\.png is said to have no label, .*beach/deep/1\.png to have one; remove one of the two"),
    ],
)
def test_files_of_one_name_that_contradict_each_other_are_named(tmp_path: Path, made: str, message: str):
    write_several(tmp_path)
    (tmp_path / made).write_bytes(encode(picture(9, 4, 4)))
    with pytest.raises(SourceError, match=message):
        read(tmp_path, targets="label:labels")


def test_files_of_one_name_that_cannot_be_read_are_named(tmp_path: Path):
    write_several(tmp_path)
    (tmp_path / "sunset" / "deep" / "1.png").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"cannot be compared: .*sunset/deep/1\.png: No such file or directory; mend or remove it"):
        read(tmp_path, targets="label:labels")


def test_a_folder_has_one_target_that_has_classes(tmp_path: Path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    assert read(tmp_path, targets="scene").targets == (Target(name="scene", kind="label", classes=("a", "b")),)
    for targets in ("a:number", "a,b"):
        with pytest.raises(
            SourceError, match=f"data.targets='{targets}': a folder of class folders has one target, of kind label or labels"
        ):
            read(tmp_path, targets=targets)
    write_folder(tmp_path / "other", {"_none": 2})
    with pytest.raises(SourceError, match="holds no class folder but _none; there must be a class to learn"):
        read(tmp_path / "other", targets="label:labels")


def test_class_folders_alone_are_split_by_class_and_other_classes_change_nothing(tmp_path: Path):
    write_folder(tmp_path, {"a": 60, "b": 7, "lonely": 1})
    source = read(tmp_path)
    train, test = ({sample.key for sample in source.samples(split)} for split in ("train", "test"))
    assert len(train) + len(test) == 68
    assert Counter(sample.label for sample in source.samples("test")) == {0: 12, 1: 1}
    assert source.identities[1:] == (former_identity(tmp_path, images_in(tmp_path), "0.2"),)
    write_folder(tmp_path, {"c": 10})
    later = read(tmp_path)
    assert {sample.key for sample in later.samples("test") if not sample.key.startswith("c/")} == test
    assert {sample.key for sample in later.samples("train") if not sample.key.startswith("c/")} == train
    assert later.identity != source.identity
    assert read(tmp_path, test_fraction=0.3).identity != later.identity


def test_a_file_that_cannot_be_read_keeps_its_place_with_a_reason(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 2})
    write_folder(tmp_path / "test", {"a": 1})
    (tmp_path / "train" / "a" / "0b.png").symlink_to(tmp_path / "gone.png")
    samples = list(read(tmp_path).samples("train"))
    assert [(sample.key, sample.refusal) for sample in samples] == [
        ("train/a/0.png", None),
        ("train/a/0b.png", "unreadable: No such file or directory"),
        ("train/a/1.png", None),
    ]


def test_names_that_are_not_utf8_become_printable_keys(tmp_path: Path):
    write_folder(tmp_path / "test", {"a": 1})
    os.makedirs(os.fsencode(tmp_path / "train" / "a"))
    with open(os.fsencode(tmp_path / "train" / "a") + b"/\xff.png", "wb") as file:
        file.write(encode(picture(1, 4, 4)))
    (sample,) = read(tmp_path).samples("train")
    assert sample.key == "train/a/\\xff.png"
    assert sample.refusal is None


def test_a_test_class_that_training_lacks_is_an_error(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 1})
    write_folder(tmp_path / "test", {"b": 1})
    with pytest.raises(SourceError, match=r"classes that .*train lacks: b"):
        read(tmp_path)
