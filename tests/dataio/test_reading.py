"""Claims about what a conversion says of its source: what it found and did not read, copies, classes of no use."""

import json
from pathlib import Path

import pytest
from corpus import MAX_PIXELS, encode, picture
from made import write_folder, write_table

from dataio.config import DataConfig
from dataio.conversion import convert
from dataio.convert import main
from dataio.manifest import Manifest
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import prepared
from dataio.reading import READING_NAME, REPEATS_NAME, Reading, described, names_alike, warnings
from dataio.schema import Target, single_label
from dataio.sources import open_source


def made(source: Path, dest: Path, **options: object) -> Dataset:
    found = open_source(str(source), root=dest.parent, **({"test_fraction": 0.25} | options))  # type: ignore[arg-type]
    convert(found, dest, max_bad_fraction=0.5, max_image_pixels=MAX_PIXELS)
    return open_dataset(dest)


def said(dataset: Dataset) -> list[str]:
    return list(warnings(dataset.manifest, dataset.reading, "DEST"))


def test_a_line_says_which_classes_and_how_many_images_and_what_was_not_read(tmp_path: Path):
    write_folder(tmp_path / "source", {"ant": 8, "bee": 4})
    (tmp_path / "source" / "notes.txt").write_text("insects")
    (tmp_path / "source" / "bee" / "broken.png").write_bytes(b"no image")
    dataset = made(tmp_path / "source", tmp_path / "dest")
    assert described(dataset.manifest, dataset.reading) == (
        "2 classes (ant, bee): 10 train, 2 test images (4 to 6 of a class to train); test held out of train (25%); "
        "1 could not be used; not read: 1 .txt"
    )
    (tmp_path / "dest" / READING_NAME).unlink()  # as in a folder made before
    older = open_dataset(tmp_path / "dest")
    assert older.reading is None
    assert described(older.manifest, older.reading) == "2 classes (ant, bee): 10 train, 2 test images; 1 could not be used"
    assert said(older) == []


def test_test_images_that_are_copies_of_training_images_are_counted_and_listed(tmp_path: Path):
    write_folder(tmp_path / "source" / "train", {"ant": 6, "bee": 6})
    write_folder(tmp_path / "source" / "test", {"ant": 2, "bee": 3}, first=4)
    dataset = made(tmp_path / "source", tmp_path / "dest")
    # write_folder numbers the pictures of each class from the same one on, so ant/0 and bee/0 are one image under two labels
    assert dataset.reading is not None
    assert dataset.reading.copies == {"test": 4}
    copies, contradictions = said(dataset)
    assert copies.startswith("4 of 5 test images are copies of training images")
    assert "test/ant/0.png = train/ant/4.png" in copies
    assert contradictions.startswith("8 images occur with two labels")
    lines = [json.loads(line) for line in (tmp_path / "dest" / REPEATS_NAME).read_text().splitlines()]
    assert {line["key"]: line["same_as"] for line in lines if line["split"] == "test"} == {
        "test/ant/0.png": "train/ant/4.png",
        "test/ant/1.png": "train/ant/5.png",
        "test/bee/0.png": "train/ant/4.png",
        "test/bee/1.png": "train/ant/5.png",
    }
    assert sum(line["labels_differ"] for line in lines) == 8


def test_data_without_a_fault_are_not_warned_of(tmp_path: Path):
    write_folder(tmp_path / "source" / "train", {"ant": 3})
    write_folder(tmp_path / "source" / "train", {"bee": 3}, first=10)
    write_folder(tmp_path / "source" / "test", {"ant": 1}, first=20)
    write_folder(tmp_path / "source" / "test", {"bee": 1}, first=30)
    dataset = made(tmp_path / "source", tmp_path / "dest")
    assert said(dataset) == []
    assert not (tmp_path / "dest" / REPEATS_NAME).exists()


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_class_without_a_training_or_a_test_image_is_told_of_every_kind_of_source(tmp_path: Path, kind: str):
    if kind == "folder":
        for number, (split, name) in enumerate([("train", "ant"), ("train", "bee"), ("test", "ant"), ("test", "wasp")]):
            write_folder(tmp_path / "source" / split, {name: 1}, first=10 * number)
        source = tmp_path / "source"
    else:
        rows = "".join(f"{{{number}}},{row}\n" for number, row in enumerate(["train,ant", "train,bee", "test,ant", "test,wasp"]))
        source = write_table(tmp_path, f"image,split,label\n{rows}")
    dataset = made(source, tmp_path / "dest")
    assert dataset.manifest.classes == ("ant", "bee", "wasp")
    assert said(dataset) == [
        "no training image shows class wasp, so each of them in test will be answered wrongly",
        "no test image shows class bee, so the results say nothing of it",
    ]


def test_names_that_may_mean_one_class_are_told(tmp_path: Path):
    assert names_alike(single_label(["ant", "ant ", "bee", "Bee", "cat"])) == [("ant", "ant "), ("bee", "Bee")]
    assert names_alike(single_label(["red fox", "red_fox", "-", "_"])) == [("red fox", "red_fox")]
    assert names_alike([Target(name="age", kind="number")]) == []
    write_folder(tmp_path / "source", {"ant": 2, "Ant": 2})
    dataset = made(tmp_path / "source", tmp_path / "dest")
    assert said(dataset)[0] == "the classes 'Ant' and 'ant' differ only in case, spaces or dashes; if they are one, give it one name"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"copies": 3}', '{"held_out": {"test": "much"}}', '{"class_counts": {"train": 1}}', "[" * 9999]
)
def test_a_damaged_reading_is_none_and_ends_nothing(text: str):
    assert Reading.from_json(text) is None


def test_a_reading_comes_back_and_a_later_versions_keys_are_ignored():
    reading = Reading(held_out={"test": 0.1}, not_read=("1 .txt",), class_counts={"train": (1, 2)}, copies={"test": 3}, copied=("a = b",))
    later = json.dumps({**json.loads(reading.to_json()), "mood": "good"})
    assert Reading.from_json(later) == reading


def test_a_manifest_keeps_its_form(tmp_path: Path):
    write_folder(tmp_path / "source", {"ant": 4, "bee": 4})
    made(tmp_path / "source", tmp_path / "dest")
    keys = set(json.loads((tmp_path / "dest" / "manifest.json").read_text()))
    assert keys == {"classes", "splits", "fingerprint", "image_sizes", "quarantined", "source", "identity", "version"}


def test_nothing_is_held_out_of_data_that_are_there_to_be_evaluated(tmp_path: Path):
    write_folder(tmp_path / "alone", {"ant": 1, "bee": 3})
    config = DataConfig(path=str(tmp_path / "alone"), root=str(tmp_path / "root"))
    whole = prepared(config, whole=True).dataset.manifest
    assert {name: split.count for name, split in whole.splits.items()} == {"train": 4}
    divided = prepared(config).dataset.manifest
    assert divided.splits["test"].count == 1
    assert prepared(config, whole=True).dataset.manifest == whole
    for split in ("train", "test"):
        write_folder(tmp_path / "split" / split, {"ant": 2})
    config = DataConfig(path=str(tmp_path / "split"), root=str(tmp_path / "root"))
    assert prepared(config, whole=True).location == prepared(config).location


def test_a_conversion_by_an_earlier_rule_is_used_and_said_to_be_one(tmp_path: Path):
    write_folder(tmp_path / "source", {"ant": 8, "bee": 8})
    config = DataConfig(path=str(tmp_path / "source"), root=str(tmp_path / "root"))
    before = prepared(config)
    assert not before.by_earlier_rule
    (tmp_path / "source" / "ant" / "without_suffix").write_bytes(encode(picture(99, 4, 4)))  # the earlier rule did not see it
    after = prepared(config)
    assert after.by_earlier_rule
    assert after.dataset.manifest == before.dataset.manifest


def test_the_command_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path / "source", {"ant": 4, "bee": 4})
    (tmp_path / "source" / "README").write_text("insects")
    assert main([str(tmp_path / "source"), str(tmp_path / "dest")]) == 0
    shown = capsys.readouterr()
    assert "2 classes (ant, bee): 6 train, 2 test images" in shown.out
    assert "not read: 1 without suffix" in shown.out
    assert "warning: 2 images occur with two labels" in shown.err or "warning: 4 images occur with two labels" in shown.err


def test_a_data_set_to_train_alone_is_one(tmp_path: Path):
    write_folder(tmp_path / "source", {"ant": 2})
    manifest = made(tmp_path / "source", tmp_path / "dest", whole=True).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
