"""What the benchmark of the audit plants, and how it judges what was found."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.audit import (
    ALIKE,
    CHANGES,
    Picture,
    changed,
    corrections_of,
    flipped,
    judged_copies,
    lay_out,
    pictures,
    place_of,
    plant_copies,
    recovered,
    targets_of,
)
from dataio.schema import single_label
from dataio.sources.corrected import read_corrections

NAMES = ["T-shirt-top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def test_a_twentieth_of_the_labels_is_wrong_and_confusable_ones_are_of_classes_alike() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1000).tolist()
    for case in ("random", "confusable"):
        wrong = flipped(labels, case, 10)
        assert len(wrong) == 50
        assert wrong == flipped(labels, case, 10)
        assert all(labels[place] != label for place, label in wrong.items())
        if case == "confusable":
            assert all(ALIKE[labels[place]] == label for place, label in wrong.items())


def test_real_images_are_laid_out_under_their_planted_labels(tmp_path: Path) -> None:
    found = {"train": pictures("train", 30), "test": pictures("test", 5)}
    wrong = {3: (found["train"][3].label + 1) % 10}
    lay_out(tmp_path, found, NAMES, wrong)
    files = {path.stem: path.parent.name for path in (tmp_path / "train").rglob("*.png")}
    assert files == {f"{place:05d}": NAMES[wrong.get(place, picture.label)] for place, picture in enumerate(found["train"])}
    assert len(list((tmp_path / "test").rglob("*.png"))) == 5
    with pytest.raises(ValueError, match="ask for fewer"):
        pictures("test", 1_000_000)


def test_copies_are_of_all_kinds_and_are_judged_by_the_group_with_their_original(tmp_path: Path) -> None:
    train = pictures("train", 60)
    rows = plant_copies(tmp_path, train, NAMES, copies=30, leaks=20)
    assert {row["how"] for row in rows} == {"file", "pixels", *CHANGES}
    assert [row["split"] for row in rows] == ["train"] * 30 + ["test"] * 20
    assert len(list(tmp_path.rglob("copy-of-*"))) == 50

    def group(*names: str) -> dict[str, list[dict[str, str]]]:
        return {"images": [{"split": name.split("/")[0], "key": f"x/{name.split('/')[1]}.png"} for name in names]}

    groups = [group(f"train/{row['place']:05d}", f"{row['split']}/copy-of-{row['place']:05d}") for row in rows[1:]]
    found = judged_copies({"copies": [*groups, group("train/00001x", "train/00002x")]}, rows, 1000)
    exact = sum(row["how"] in ("file", "pixels") for row in rows)
    assert rows[0]["how"] == "file"
    assert (found["exact_found"], found["others_found"], found["false"]) == ((exact - 1) / exact, 1.0, 0.002)
    assert found["missed"] == [rows[0]]


def test_a_changed_image_is_another_file_with_the_same_picture() -> None:
    data = pictures("train", 1)[0].data
    rng = np.random.default_rng(0)
    assert changed(data, "file", rng) == (data, "png")
    assert changed(data, "pixels", rng)[0] != data
    assert changed(data, "resized compressed", rng)[1] == "jpg"


def test_what_is_won_back_is_a_part_of_what_was_lost_and_the_claims_are_judged() -> None:
    accuracies = {"clean": [0.9, 0.92], "noisy": [0.86, 0.88], "corrected": [0.89, 0.89]}
    assert recovered(accuracies) == pytest.approx(0.5)
    assert recovered({"clean": [0.8], "noisy": [0.8], "corrected": [0.9]}) is None
    rows = targets_of(
        {
            "random": {"of_judged_planted": 0.85, "recovered": 0.6},
            "confusable": {"of_judged_planted": 0.4, "recovered": None},
            "copies": {"exact_found": 1.0, "others_found": 0.95, "false": 0.02},
        }
    )
    assert [row["met"] for row in rows] == [True, True, False, None, True, True, False]


def test_corrections_are_read_by_the_runs_that_they_are_for(tmp_path: Path) -> None:
    file = tmp_path / "corrections.csv"
    file.write_text(corrections_of({"Bag/00003.png": 9}, NAMES))
    (change,) = read_corrections(str(file), single_label(NAMES), ("train", "test")).changes["Bag/00003.png"]
    assert (change.action, change.values, change.split) == ("relabel", (9,), "train")
    assert place_of("Bag/00003.png") == 3
    assert Picture(data=b"", label=1).label == 1
