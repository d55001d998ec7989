"""Claims about folders of images by class."""

import os
from collections import Counter
from pathlib import Path

import pytest
from corpus import encode, picture
from made import former_identity, read, write_folder

from dataio.schema import Target
from dataio.sources import Source, SourceError


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


def labelled(source: Source, split: str = "train") -> dict[str, str]:
    """Key -> class of a split's images."""
    return {sample.key: source.classes[sample.label] for sample in source.samples(split)}


@pytest.mark.parametrize(
    ("made", "splits"),
    [
        ({"Training": "train", "Testing": "test"}, ("train", "test")),
        ({"Train": "train", "Validation": "validation"}, ("train", "validation", "test")),
        ({"TRAIN": "train", "Valid": "validation", "TEST": "test"}, ("train", "validation", "test")),
        ({"seg_train/seg_train": "train", "seg_test/seg_test": "test"}, ("train", "test")),
        ({"flowers-train": "train", "flowers-val": "validation"}, ("train", "validation", "test")),
        ({"archive/images/train": "train", "archive/images/test": "test"}, ("train", "test")),
        ({"train/animals": "train", "test/animals": "test"}, ("train", "test")),
        ({"train_set": "train", "test set": "test"}, ("train", "test")),
    ],
)
def test_splits_under_another_name_or_nested_are_recognised(tmp_path: Path, made: dict[str, str], splits: tuple[str, ...]):
    for number, (name, split) in enumerate(made.items()):
        write_folder(tmp_path / name, {"cat": 3, "dog": 3} if split == "train" else {"cat": 1}, first=10 * number)
    source = read(tmp_path)
    assert (source.classes, source.splits()) == (("cat", "dog"), splits)
    for name, split in made.items():
        keys = list(labelled(source, split))
        assert keys
        assert all(key.startswith(f"{name}/") for key in keys)
    assert source.ignored == ()


def test_class_folders_below_folders_that_only_wrap_them_are_the_classes(tmp_path: Path):
    write_folder(tmp_path / "archive" / "flowers", {"daisy": 3, "rose": 3})
    assert read(tmp_path).classes == ("daisy", "rose")
    write_folder(tmp_path / "mine" / "deep", {"old": 2, "new": 2})
    assert read(tmp_path / "mine", targets="scene:labels").classes == ("deep",)  # one label may be all that there is to learn


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"Training": 2, "Testing": 2}, "are Testing, Training splits.*each class.*labels.csv"),
        ({"seg_train": 2, "seg_pred": 2, "test": 2}, None),
        (
            {"cat": 2, "dog": 2, "test/cat": 1, "test/dog": 1},
            "is test a class.*If it is a split, put the class folders beside it into .*/train",
        ),
        ({"cat": 2, "dog": 2, "copy/cat": 1, "copy/dog": 1}, "is copy a class.*if it is a copy, move it away"),
        ({"test/cat": 2, "test/dog": 2}, "holds test, but no folder to train with.*to evaluate a run on it.*--data.path .*/test"),
        ({"Train/cat": 2, "training/cat": 2}, "Train and training, which both look like its train split"),
        ({"plane": 2, "train": 2, "bus": 2}, None),  # vehicles
        ({"test_tube": 2, "train_station": 2, "beaker": 2}, None),
    ],
)
def test_what_looks_like_a_split_is_asked_about_and_never_a_class_in_silence(tmp_path: Path, made: dict[str, int], message: str | None):
    for name, count in made.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (tmp_path / name / f"{index}.png").write_bytes(encode(picture(index, 4, 4)))
    if message is None:
        assert read(tmp_path).classes == tuple(sorted(made))
    else:
        with pytest.raises(SourceError, match=message):
            assert read(tmp_path).targets


def test_content_decides_what_an_image_is_and_what_is_not_read_is_listed(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 2, "b": 1})
    write_folder(tmp_path / "test", {"a": 1})
    jpeg = encode(picture(7, 4, 4), "JPEG")
    for name in ("0", "x.jpg_large", "x.jpeg~"):
        (tmp_path / "train" / "b" / name).write_bytes(jpeg)
    for name, data in {"notes": b"BMI of all", "y.heic": b"\0\0\0\x18ftypheic", "1.xml": jpeg, "Thumbs.db": b"\xd0\xcf"}.items():
        (tmp_path / "train" / "b" / name).write_bytes(data)
    (tmp_path / "train" / "loose.png").write_bytes(jpeg)
    (tmp_path / "README.md").write_text("# cats")
    write_folder(tmp_path / "other", {"c": 2})
    source = read(tmp_path)
    assert [key for key in labelled(source) if "/b/" in key] == [f"train/b/{name}" for name in ("0", "0.png", "x.jpeg~", "x.jpg_large")]
    assert source.ignored == (
        "1 .heic",
        "1 .md",
        "1 .xml",
        "1 outside of class folders",
        "1 without suffix",
        "other/ (2 images)",
    )


def test_a_folder_without_an_image_is_no_class(tmp_path: Path):
    write_folder(tmp_path, {"cat": 2, "dog": 2, "@eaDir/cat": 3, "__MACOSX/dog": 1, "cat/@eaDir": 2, "old": 0})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("of cats")
    (tmp_path / "thumbs").mkdir()
    (tmp_path / "thumbs" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    source = read(tmp_path)
    assert source.classes == ("cat", "dog")
    assert set(labelled(source)) | set(labelled(source, "test")) == {f"{name}/{index}.png" for name in ("cat", "dog") for index in (0, 1)}
    folders = (
        "@eaDir/ (3 files)",
        "__MACOSX/ (1 file)",
        "cat/@eaDir/ (2 files)",
        "notes/ (no image)",
        "old/ (no image)",
        "thumbs/ (no image)",
    )
    assert source.ignored == folders


def test_a_class_whose_images_cannot_be_decoded_here_does_not_vanish(tmp_path: Path):
    write_folder(tmp_path, {"cat": 2, "dog": 2, "phone": 0})
    for index in range(3):
        (tmp_path / "phone" / f"{index}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(SourceError, match=r"phone holds no image that can be decoded here, but 3 \.heic; convert them to JPEG or PNG"):
        assert read(tmp_path).targets


def test_a_folder_that_is_read_as_before_keeps_its_identity_and_another_one_knows_its_former_one(tmp_path: Path):
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    plain = read(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert read(tmp_path).identities == plain.identities
    (tmp_path / "cat" / "extra").write_bytes(encode(picture(50, 4, 4)))
    grown = read(tmp_path)
    assert sum(len(labelled(grown, split)) for split in ("train", "test")) == 9
    assert grown.identity not in plain.identities
    assert grown.identities[1:] == plain.identities  # of what the earlier rule read: all but the file without suffix


def test_what_is_refused_now_is_still_found_where_it_was_converted_before(tmp_path: Path):
    for name in ("Training", "Testing"):
        write_folder(tmp_path, {name: 3})
    former = former_identity(tmp_path, images_in(tmp_path), "0.2")
    source = read(tmp_path)
    assert former in source.identities[1:]
    with pytest.raises(SourceError, match="splits"):
        source.splits()


def test_a_class_that_training_lacks_is_a_class(tmp_path: Path):
    write_folder(tmp_path / "train", {"a": 2, "c": 1})
    write_folder(tmp_path / "test", {"b": 1, "c": 1})
    source = read(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert labelled(source, "test") == {"test/b/0.png": "b", "test/c/0.png": "c"}


@pytest.mark.timeout(60)
def test_links_are_followed_where_classes_may_be_and_never_in_circles_or_out_of_a_class(tmp_path: Path):
    write_folder(tmp_path / "elsewhere", {"cat": 2})
    write_folder(tmp_path / "data" / "train", {"dog": 2})
    write_folder(tmp_path / "data" / "test", {"dog": 1})
    (tmp_path / "data" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "data" / "train" / "dog" / "all").symlink_to("/")
    (tmp_path / "elsewhere" / "cat" / "back").symlink_to(tmp_path / "data")
    source = read(tmp_path / "data")
    assert list(labelled(source)) == [
        *(f"train/cat/{index}.png" for index in (0, 1)),
        *(f"train/dog/{index}.png" for index in (0, 1)),
    ]
    assert "train/dog/all/ (a link)" in source.ignored


@pytest.mark.timeout(60)
def test_folders_nested_without_end_are_told_and_end_nothing(tmp_path: Path):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    deep = tmp_path / "cat" / "/".join("d" * 200)
    deep.mkdir(parents=True)
    (deep / "lost.png").write_bytes(encode(picture(9, 4, 4)))
    source = read(tmp_path)
    assert source.classes == ("cat", "dog")
    (told,) = source.ignored
    assert told.endswith("/ (deeper than 64 folders)")
