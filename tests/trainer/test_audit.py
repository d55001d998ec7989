"""An audit finds what was planted in real images, leaks first, and proposes what a person would do; what it does not know, it says."""

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.config import DataConfig
from dataio.parquet import open_dataset
from dataio.prepared import prepared
from dataio.schema import single_label
from tests.trainer.planted import SAMPLE, Plant, changed, groups_of, real
from trainer.audit import copies, folds
from trainer.audit.__main__ import main, write
from trainer.audit.asked import asked_of
from trainer.audit.copies import Pair, find_copies, grouped, mirror, neighbours
from trainer.audit.findings import ACTIONS, Change, Copies, Doubt, Findings, Oddity, Sample, changes_of, to_csv, with_labels
from trainer.audit.folds import cost, folds_of, prepare, remaining_seconds
from trainer.audit.gather import THUMB_SIDE, area_weights, blur_weights, decoded_size, gather, halved_images
from trainer.audit.labels import Answers, agreed, doubts_of, joined, judge
from trainer.audit.looks import Overlap, odd_images, overlaps, robust_scores
from trainer.audit.page import render
from trainer.audit.shown import PAGE_BYTES, chosen
from trainer.settings.tree import RunConfig

PROJECT = Path(__file__).resolve().parents[2]
HOW = ("stored", "resized", "compressed", "mirrored", "mirrored resized", "resized compressed", "mirrored resized compressed")


# --- copies ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit, without folds, of 280 real images with copies planted among them."""
    folder = tmp_path_factory.mktemp("audit")
    plant = Plant(root=folder / "images").fill({"train": 220, "test": 60})
    for number, (encoded, label) in enumerate(real("train", 28)):
        how = HOW[number % len(HOW)]
        split = "test" if number % 2 else "train"
        plant.add(split, f"copy-of-{number:04d}", changed(encoded, how, seed=number), label)
    same, label = real("test", 50)[49]
    plant.add("train", "same-as-0049", same, label)
    wrong, label = real("train", 60)[59]
    plant.add("train", "wrong-0059", wrong, "Bag" if label != "Bag" else "Coat")
    plant.converted()
    assert (
        main(
            [
                str(plant.root),
                "--data.root",
                str(folder / "converted"),
                "--data.fit",
                "stretch",
                "--folds",
                "0",
                "--out",
                str(folder / "out"),
            ]
        )
        == 0
    )
    return folder / "out"


def test_copies_resized_compressed_and_mirrored_are_found_and_leaks_come_first(audited: Path) -> None:
    groups = groups_of((audited / "findings.json").read_text())
    found = [names for names, _ in groups]
    planted = [{f"train/{number:04d}", f"{'test' if number % 2 else 'train'}/copy-of-{number:04d}"} for number in range(28)]
    hits = sum(any(pair <= names for names in found) for pair in planted)
    assert hits >= 0.95 * len(planted)
    assert {"test/0049", "train/same-as-0049"} in found
    assert sum(not any("-" in name for name in names) for names in found) <= 2, "real images that are too much alike"
    leaks = [group["is_leak"] for _, group in groups]
    assert leaks == sorted(leaks, reverse=True)
    assert sum(map(bool, leaks)) >= 14


def test_copies_say_how_they_are_ones(audited: Path) -> None:
    by_name = {
        name: image["how"]
        for names, group in groups_of((audited / "findings.json").read_text())
        for name, image in ((f"{image['split']}/{Path(image['key']).stem}", image) for image in group["images"])
    }  # type: ignore[index,attr-defined]
    assert by_name["train/same-as-0049"] == "bytes"
    for number in range(0, 28, len(HOW)):
        assert by_name[f"{'test' if number % 2 else 'train'}/copy-of-{number:04d}"] == "pixels"
    assert {by_name[f"{'test' if number % 2 else 'train'}/copy-of-{number:04d}"] for number in (3, 10, 17)} == {"mirrored"}


def test_what_is_sure_is_to_be_dropped_and_the_test_split_stays(audited: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((audited / "changes.csv").read_text())))
    actions = {Path(row["key"]).stem if "-" in Path(row["key"]).stem else row["key"]: row["action"] for row in rows}
    reasons = {Path(row["key"]).stem: row["reason"] for row in rows if "-" in Path(row["key"]).stem}
    assert actions["same-as-0049"] == "drop"
    assert "the same file as" in reasons["same-as-0049"]
    assert "test split" in reasons["same-as-0049"]
    assert actions["wrong-0059"] == "drop"
    assert "which is labelled" in reasons["wrong-0059"]
    assert actions["copy-of-0000"] == "drop", "the same pixels twice in train"
    assert actions["copy-of-0002"] == "keep", "nearly the same within train is for a person to judge"
    assert not any(row["action"] == "drop" and row["split"] == "test" for row in rows)
    assert [row["action"] for row in rows] == sorted((row["action"] for row in rows), key=ACTIONS.index)


def test_what_is_proposed_can_be_given_to_a_run_as_it_is(audited: Path) -> None:
    """By `data.corrections`: what was to be dropped is not in the data any more, and all else is."""
    rows = list(csv.DictReader(io.StringIO((audited / "changes.csv").read_text())))
    source, root = str(audited.with_name("images")), str(audited.with_name("converted"))
    before, after = (
        prepared(DataConfig(path=source, root=root, fit="stretch", corrections=corrections)).dataset
        for corrections in ("", str(audited / "changes.csv"))
    )
    dropped = {(row["split"], row["key"]) for row in rows if row["action"] == "drop"}
    keys = [
        {(name, key) for name in ("train", "test") for key in of.split(name).keys(range(of.split(name).count))} for of in (before, after)
    ]
    assert len(dropped) > 10
    assert keys[1] == keys[0] - dropped


def test_it_says_what_it_did_not_do_and_leaves_no_working_files(audited: Path) -> None:
    found = json.loads((audited / "findings.json").read_text())
    assert found["left_out"] == ["Whether labels are wrong was not looked into (--folds 0)."]
    assert {path.name for path in audited.iterdir()} == {"audit.html", "findings.json", "changes.csv", ".changes.sha256"}


@given(st.integers(3, 60), st.integers(2, 9), st.integers(0, 2**32 - 1), st.integers(2, 50), st.integers(2, 50))
def test_blocks_find_the_neighbours_that_all_distances_at_once_show(n: int, k: int, seed: int, rows: int, columns: int) -> None:
    k = min(k, n - 1)
    thumbs = np.random.default_rng(seed).integers(0, 256, (n, THUMB_SIDE**2)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "ROWS", rows)
        patch.setattr(copies, "COLUMNS", columns)
        found = neighbours(thumbs, np.arange(n), k)
    every = thumbs.astype(np.float64)
    plain, turned = (((every[:, None] - other[None]) ** 2).sum(2) for other in (every, mirror(thumbs).astype(np.float64)))
    away = np.minimum(plain, turned)
    np.fill_diagonal(away, np.inf)
    nearest = np.sqrt(np.sort(away, axis=1)[:, :k])
    assert np.allclose(found.distances, nearest, rtol=1e-4)
    assert np.allclose(np.sqrt(np.take_along_axis(away, found.places, axis=1)), nearest, rtol=1e-6)  # or one as near
    assert all(len(set(row)) == k for row in found.places.tolist())
    assert np.array_equal(found.mirrored, np.take_along_axis(turned < plain, found.places, axis=1))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda pair: pair[0] < pair[1]), max_size=20))
def test_groups_are_what_pairs_link(pairs: list[tuple[int, int]]) -> None:
    groups = grouped(Pair(first=first, second=second, how="near", ratio=0.1) for first, second in pairs)
    members = [image for group in groups for image in group.samples]
    assert sorted(members) == sorted({image for pair in pairs for image in pair})
    where = {image: number for number, group in enumerate(groups) for image in group.samples}
    assert all(where[first] == where[second] for first, second in pairs)
    for group in groups:  # no group falls apart without a pair across
        for cut in range(1, len(group.samples)):
            left = set(group.samples[:cut])
            assert any((first in left) != (second in left) for first, second in pairs if where[first] == where[group.samples[0]])


def test_three_copies_are_one_group_and_two_images_are_none(tmp_path: Path) -> None:
    plant = Plant(root=tmp_path / "images").fill({"train": 60, "test": 10})
    encoded, label = real("train", 6)[5]
    for number, how in enumerate(("resized", "compressed", "mirrored")):
        plant.add("train", f"copy-{number}", changed(encoded, how, seed=number), label)
    dataset = plant.converted()
    gathered = gather(dataset, DataConfig(), tmp_path, threads=1)
    (group,) = (group for group in find_copies(gathered) if len(group.samples) > 2)
    keys = dataset.split("train").keys([gathered.place(image)[1] for image in group.samples])
    assert {Path(key).stem for key in keys} == {"0005", "copy-0", "copy-1", "copy-2"}
    assert copies.near_pairs(gathered.details, gathered.thumbs, np.array([0, 1])) == []


# --- what is kept of an image -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_line_is_averaged_over_equal_parts_and_nothing_of_it_is_lost(to: int, side: int) -> None:
    weights = area_weights(to, side)
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    assert np.allclose(weights.sum(0), to / side, atol=1e-4), "each pixel counts as much as every other"
    assert np.allclose(blur_weights(side).sum(1), 1, atol=1e-5)


def test_images_are_halved_exactly() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    expected = np.floor(images.reshape(3, 4, 2, 3, 2, 3).mean((2, 4)) + 0.5)
    assert np.array_equal(halved_images(images), expected)


def test_it_keeps_of_each_image_what_there_is(tmp_path: Path) -> None:
    plant = Plant(root=tmp_path / "images").fill({"train": 30, "test": 5})
    big = changed(real("train", 1)[0][0], "stored")
    plant.add("train", "big", _enlarged(big, 80, 40), "Bag")
    dataset = plant.converted()
    assert decoded_size(dataset.manifest) == (128, 128)
    found = gather(dataset, DataConfig(), tmp_path, threads=1)
    assert (found.count, found.details.shape) == (36, (36, 64, 64, 3))
    assert found.splits == ("train", "test")
    assert (found.place(0), found.place(31)) == (("train", 0), ("test", 0))
    assert not found.is_native
    keys = dataset.split("train").keys(range(31))
    place = next(row for row, key in enumerate(keys) if "big" in key)
    assert found.sizes[place].tolist() == [80, 40]
    assert np.array_equal(found.labels[:31], dataset.split("train").labels())
    assert np.array_equal(found.labels[31:], dataset.split("test").labels())


def _enlarged(encoded: bytes, height: int, width: int) -> bytes:
    from PIL import Image as Picture

    sink = io.BytesIO()
    with Picture.open(io.BytesIO(encoded)) as opened:
        opened.resize((width, height)).save(sink, "PNG")
    return sink.getvalue()


# --- looks ------------------------------------------------------------------------------------------------------------------------------


def test_odd_images_are_found_among_real_ones(tmp_path: Path) -> None:
    """All images but the planted ones are shirts and the like, of one size; a planted one is odd in its own way alone."""
    from PIL import Image as Picture

    plant = Plant(root=tmp_path / "images").fill({"train": 200, "test": 10})
    flat = io.BytesIO()
    Picture.new("RGB", (28, 28), (90, 20, 200)).save(flat, "PNG")
    plant.add("train", "flat", flat.getvalue(), "Bag")
    plant.add("train", "wide", _enlarged(real("train", 3)[2][0], 28, 140), "Bag")
    plant.add("train", "large", _enlarged(real("train", 4)[3][0], 300, 300), "Bag")
    dataset = plant.converted()
    found = gather(dataset, DataConfig(), tmp_path, threads=1)
    keys = [Path(key).stem for split in found.splits for key in dataset.split(split).keys(range(dataset.split(split).count))]
    odd = [(keys[each.sample], each.what) for each in odd_images(found)]
    assert odd[0] == ("flat", "of one colour")
    assert ("wide", "wide") in odd
    assert ("large", "large") in odd
    assert {name for name, what in odd if what in ("wide", "tall", "small", "large", "of one colour")} == {"flat", "wide", "large"}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.1, 100), st.floats(-1e3, 1e3))
def test_scores_do_not_depend_on_units_and_origin(values: list[float], factor: float, shift: float) -> None:
    plain = np.array(values)
    moved = plain * factor + shift
    apart = np.abs(plain - np.median(plain))
    if apart.max() > 0 and (apart[apart > 0].min() > 1e-3):
        assert np.allclose(robust_scores(plain), robust_scores(moved), rtol=1e-3, atol=1e-3)


def test_nothing_is_odd_where_all_are_equal_and_one_that_differs_is() -> None:
    assert not robust_scores(np.full(50, 3.0)).any()
    one = np.full(1000, 28.0)
    one[7] = 30.0
    assert np.flatnonzero(np.abs(robust_scores(one)) > 5).tolist() == [7]


# --- labels -----------------------------------------------------------------------------------------------------------------------------


def simulated(n: int, classes: int, *, noise: float, seed: int) -> tuple[Answers, np.ndarray]:
    """Answers of a model that is right in 99 of 100 and says how sure it is, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    wrong = rng.random(n) < noise
    given = np.where(wrong, (true + rng.integers(1, classes, n)) % classes, true)
    logits = rng.normal(0, 1, (n, classes))
    logits[np.arange(n), true] += 5
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    answers = probabilities.argmax(1)
    rows = np.arange(n)
    found = Answers(
        keys=[f"image-{row}" for row in rows],
        given=given,
        answers=answers,
        of_answer=probabilities[rows, answers],
        of_given=probabilities[rows, given],
    )
    return found, wrong


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.03, 0.1, 0.2]))
def test_planted_wrong_labels_are_ranked_first(seed: int, noise: float) -> None:
    found, wrong = simulated(2000, 10, noise=noise, seed=seed)
    judged = judge(found, 10)
    first = judged.order[: int(wrong.sum())]
    assert wrong[first].mean() > 0.8
    assert wrong[judged.doubted].mean() > 0.7
    assert len(judged.doubted) > 0.3 * wrong.sum()  # a threshold is a mean: about half are surer


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_the_ranking_is_a_permutation_of_all_with_other_answers_in_front(seed: int, classes: int) -> None:
    found, _ = simulated(200, classes, noise=0.2, seed=seed)
    judged = judge(found, classes)
    assert sorted(judged.order.tolist()) == list(range(200))
    differs = found.answers != found.given
    count = int(differs.sum())
    assert differs[judged.order[:count]].all()
    assert np.all(np.diff(doubts_of(found.of_answer, found.of_given)[judged.order[:count]]) <= 0)
    assert np.all(np.diff(found.of_given[judged.order[count:]]) >= 0)
    assert differs[judged.doubted].all()
    assert judged.doubted.tolist() == [place for place in judged.order.tolist() if judged.is_doubted[place]]


def test_a_label_is_the_more_doubtful_the_surer_the_answer_and_the_less_probable_the_label() -> None:
    of_answer, of_given = np.array([0.9, 0.9, 0.6, 0.6, 0.9]), np.array([0.001, 0.05, 0.001, 0.05, 0.0])
    assert np.argsort(-doubts_of(of_answer, of_given)).tolist() == [4, 0, 2, 1, 3]


def test_a_class_of_which_models_are_seldom_sure_has_a_lower_threshold() -> None:
    """Both images of the hard class were answered by the other; only one so surely as that class usually is."""
    found = Answers(
        keys=["a", "b", "c", "d"],
        given=np.array([0, 0, 1, 1]),
        answers=np.array([0, 0, 0, 0]),
        of_answer=np.array([0.9, 0.8, 0.95, 0.6]),
        of_given=np.array([0.9, 0.8, 0.05, 0.4]),
    )
    judged = judge(found, 3)
    assert judged.thresholds[:2].tolist() == [pytest.approx(0.85), pytest.approx(0.225)]
    assert math.isnan(judged.thresholds[2])
    assert [found.keys[place] for place in judged.doubted] == ["c"]


def test_models_agree_by_the_probability_that_they_give() -> None:
    def vote(answers: list[int], sure: list[float], given: list[float]) -> Answers:
        return Answers(
            keys=["a", "b"], given=np.array([0, 1]), answers=np.array(answers), of_answer=np.array(sure), of_given=np.array(given)
        )

    found = agreed([vote([2, 1], [0.9, 0.6], [0.1, 0.6]), vote([2, 0], [0.5, 0.9], [0.3, 0.1]), vote([1, 1], [0.8, 0.4], [0.2, 0.4])], 3)
    assert found.answers.tolist() == [2, 1]
    assert found.of_answer.tolist() == [pytest.approx(1.4 / 3), pytest.approx(1.0 / 3)]
    assert found.of_given.tolist() == [pytest.approx(0.2), pytest.approx(1.1 / 3)]
    other = Answers(keys=["a", "c"], given=np.array([0, 1]), answers=np.array([0, 1]), of_answer=np.ones(2), of_given=np.ones(2))
    with pytest.raises(ValueError, match="different samples"):
        agreed([found, other], 3)
    assert joined([found, other]).keys == ["a", "b", "a", "c"]


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_overlaps_count_each_confusion_once(seed: int, classes: int) -> None:
    found, _ = simulated(300, classes, noise=0.3, seed=seed)
    pairs = overlaps(found.given, found.answers, classes)
    counted = sum(pair.first_as_second + pair.second_as_first for pair in pairs)
    assert counted <= int((found.given != found.answers).sum())
    assert len({(pair.first, pair.second) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.first_as_second == int(((found.given == pair.first) & (found.answers == pair.second)).sum())
        assert pair.samples == int(np.isin(found.given, [pair.first, pair.second]).sum())
    assert [pair.share for pair in pairs] == sorted((pair.share for pair in pairs), reverse=True)


# --- findings and changes ---------------------------------------------------------------------------------------------------------------


def image_of(split: str, row: int, label: str | None = "cat") -> Sample:
    return Sample(split=split, row=row, key=f"{split}/{row}.png", label=label)


def findings_of(**parts: object) -> Findings:
    return Findings(data="pets", fingerprint="f" * 64, counts={"train": 9, "test": 3}, unit="images", classes=("cat", "dog"), **parts)  # type: ignore[arg-type]


def test_an_image_has_one_row_with_the_strongest_action_and_all_reasons() -> None:
    both = image_of("train", 1)
    findings = findings_of(
        copies=(Copies(samples=(both, image_of("test", 2)), how=("near", "near"), ratio=0.2),),
        doubts=(
            Doubt(sample=both, answer="dog", of_answer=0.9, of_label=0.05),
            Doubt(sample=image_of("train", 4), answer="dog", of_answer=0.6, of_label=0.3),
        ),
        oddities=(Oddity(sample=both, what="dark", far=7.0), Oddity(sample=image_of("train", 3), what="blurred", far=6.0)),
        folds=5,
    )
    rows = {change.key: change for change in changes_of(findings)}
    assert (rows["train/1.png"].action, rows["train/1.png"].reason.count(";")) == ("drop", 2)
    assert rows["train/3.png"] == Change(split="train", key="train/3.png", action="keep", reason="it is blurred")
    assert rows["train/4.png"].action == "keep", "a small margin is for a person to judge"
    assert "test/2.png" not in rows


def test_a_sure_doubt_is_to_be_relabelled_and_csv_is_read_back_as_written() -> None:
    odd = Sample(split="train", row=0, key='a "b",\nc.png', label="cat")
    findings = findings_of(doubts=(Doubt(sample=odd, answer="dog", of_answer=0.9, of_label=0.05),), folds=5)
    (row,) = csv.DictReader(io.StringIO(to_csv(changes_of(findings), single_label(["cat", "dog"]))))
    assert (row["key"], row["split"], row["action"], row["label"]) == (odd.key, "train", "relabel", "dog")
    assert row["reason"] == "models that have not seen it say dog (90.0 %), not cat"


def test_doubts_are_of_images_the_surest_first_and_classes_that_overlap_are_told() -> None:
    found = Answers(
        keys=["a", "b", "c"],
        given=np.array([0, 0, 1]),
        answers=np.array([1, 1, 1]),
        of_answer=np.array([0.9, 0.9, 0.8]),
        of_given=np.array([0.1, 0.05, 0.8]),
    )
    findings = with_labels(findings_of(), {"train": found}, {"train": {"a": 6, "b": 7, "c": 8}}, folds=3)
    doubt, other = findings.doubts
    assert other.sample.row == 6
    assert findings.right == 1 / 3
    assert doubt.sample == Sample(split="train", row=7, key="b", label="cat")
    assert findings.overlaps == (Overlap(first=0, second=1, first_as_second=2, second_as_first=0, samples=3),)


def test_an_edited_file_of_changes_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(SAMPLE)
    first = findings_of(oddities=(Oddity(sample=image_of("train", 1), what="dark", far=7.0),))
    second = findings_of(oddities=(Oddity(sample=image_of("train", 2), what="dark", far=7.0),))
    write(first, dataset, tmp_path)
    write(second, dataset, tmp_path)
    assert "train/2.png" in (tmp_path / "changes.csv").read_text(), "nobody has edited it"
    (tmp_path / "changes.csv").write_text("key,action,label,reason\nmine,drop,,\n")
    write(first, dataset, tmp_path)
    assert (tmp_path / "changes.csv").read_text() == "key,action,label,reason\nmine,drop,,\n"
    assert "train/1.png" in (tmp_path / "changes-proposed.csv").read_text()
    assert "was edited, and stays" in capsys.readouterr().out


# --- the page ---------------------------------------------------------------------------------------------------------------------------


def test_the_page_escapes_what_comes_from_the_data_and_says_what_it_does_not_show() -> None:
    evil = Sample(split="train", row=0, key='<script>alert("x")</script>\u202e.png', label="<b>lion</b>")
    many = tuple(
        Doubt(sample=Sample(split="train", row=row, key=f"{row}", label="cat"), answer="<i>dog</i>", of_answer=0.9, of_label=0.0)
        for row in range(200)
    )
    findings = findings_of(
        copies=(Copies(samples=(evil, image_of("test", 1)), how=("near", "mirrored"), ratio=0.3),),
        doubts=many,
        oddities=(Oddity(sample=evil, what="dark", far=9.0),),
        left_out=("Not looked into.",),
        folds=5,
    )
    text = render(findings, {}, changes="<out>/changes.csv")
    assert "<script" not in text
    assert "<b>lion" not in text
    assert "<i>dog" not in text
    assert "\u202e" not in text
    assert "104 more are in findings.json" in text
    assert "Not looked into." in text
    assert "is in several splits" in text
    assert len(chosen(findings)) == 2 + 96
    assert PAGE_BYTES < 10_000_000


# --- folds ------------------------------------------------------------------------------------------------------------------------------


def test_folds_take_a_runs_settings_and_nothing_that_has_seen_what_they_are_asked_about(tmp_path: Path) -> None:
    from dataclasses import replace

    config = RunConfig()
    config = replace(config, run="mine", train=replace(config.train, teacher="there", patience=3, select="best", epochs=7))
    job = folds_of(config, tmp_path / "folds", 4)
    train = job.config.train
    assert (train.teacher, train.patience, train.select, train.epochs, train.eval_every_epochs) == ("", 0, "last", 7, 7)
    assert (job.config.optim, job.config.model, job.config.run) == (config.optim, config.model, "")
    assert job.arguments(2)[2:] == ["--run", "fold-2-of-4", "--data.fold", "2/4"]
    assert folds.notes_on(config, "images") == [
        "the folds learn without train.teacher, which has seen the images that they are asked about"
    ]


def test_folds_of_other_settings_or_data_are_not_mixed(tmp_path: Path) -> None:
    from dataclasses import replace

    job = folds_of(RunConfig(), tmp_path / "folds", 3)
    prepare(job, "a" * 64)
    prepare(job, "a" * 64)
    with pytest.raises(ValueError, match="other data; give another --out"):
        prepare(job, "b" * 64)
    other = folds_of(replace(RunConfig(), optim=replace(RunConfig().optim, lr=0.5)), tmp_path / "folds", 3)
    with pytest.raises(ValueError, match=r"optim.lr was 0.02 and is 0.5"):
        prepare(other, "a" * 64)
    free = folds_of(replace(RunConfig(), workers="2"), tmp_path / "folds", 3)
    prepare(free, "a" * 64)


def test_the_cost_and_the_time_left_are_told(tmp_path: Path) -> None:
    job = folds_of(RunConfig(), tmp_path, 5)
    said = cost(job, open_dataset(SAMPLE).manifest, run_seconds=100.0)
    assert said == (
        "5 runs of 10 epochs, each on 1,600 of 2,000 training images: 80,000 images to train on, as many as 4 runs on all of them; "
        "about 6:40 min to go"
    )
    assert remaining_seconds(job) is None
    for fold, seconds in ((1, 30.0), (2, 50.0)):
        (tmp_path / job.name(fold)).mkdir()
        (tmp_path / job.name(fold) / "summary.json").write_text(json.dumps({"status": "finished", "seconds": seconds}))
    (tmp_path / job.name(3)).mkdir()
    (tmp_path / job.name(3) / "summary.json").write_text(json.dumps({"status": "stopped", "seconds": 5.0}))
    assert remaining_seconds(job) == 3 * 40.0
    assert folds.finished(job) == [1, 2]


def test_a_fold_is_an_ordinary_run_and_its_status_is_the_childs() -> None:
    """The child is a real `trainer.run`, which refuses at once."""
    words = ["-m", "trainer.run", "--data.batch-size", "0"]
    code = f"from trainer.series.child import run_child; print('status', run_child({words!r}).status, flush=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "status 2"
    assert "data.batch_size=0" in done.stderr


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """By SIGTERM from the kernel, which a run takes as a wish to save and end: here it is read from a child that only writes it down."""
    mark, script = tmp_path / "mark", tmp_path / "run.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        f"mark = pathlib.Path({str(mark)!r})\n"
        "def heard(number, frame):\n    mark.write_text(signal.Signals(number).name); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, heard)\nmark.write_text('started')\ntime.sleep(600)\n"
    )
    code = f"from trainer.series.child import run_child; run_child([{str(script)!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    wait_for(mark, "started")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(mark, "SIGTERM")


def wait_for(mark: Path, text: str) -> None:
    for _ in range(1200):
        if mark.exists() and mark.read_text() == text:
            return
        time.sleep(0.05)
    raise AssertionError(f"{mark} never said {text}")


# --- the command ------------------------------------------------------------------------------------------------------------------------


def test_a_run_stands_for_its_data_and_settings(tmp_path: Path) -> None:
    from dataclasses import replace

    from trainer.settings.toml import to_toml

    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    config = replace(RunConfig(), run="mine", data=replace(RunConfig().data, path=str(SAMPLE), batch_size=32))
    (run / "config.toml").write_text(to_toml(config))
    (run / "summary.json").write_text(json.dumps({"status": "finished", "seconds": 12.5}))
    for words in ([str(run)], ["mine", "--storage", str(tmp_path / "runs")]):
        asked = asked_of([*words, "--train.epochs", "3", "--folds", "4"])
        assert (asked.config.data.path, asked.config.data.batch_size, asked.config.train.epochs) == (str(SAMPLE), 32, 3)
        assert (asked.config.run, asked.line.folds, asked.run_seconds) == ("", 4, 12.5)
    data = asked_of([str(SAMPLE)])
    assert (data.config.data.path, data.run_seconds) == (str(SAMPLE), None)


def test_a_dry_run_tells_the_cost_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--config", "quickstart", "--data.path", str(SAMPLE), "--out", str(out), "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "would read each image once: 2,000 train, 500 test" in said
    assert "would train 5 runs of 4 epochs, each on 1,600 of 2,000 training images: 32,000 images" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folds", "1"], "--folds 1 cannot be; use 2 to 20, or 0"),
        (["--folds", "21"], "--folds 21 cannot be"),
        (["--data.fold", "1/3"], "data.fold=1/3: the audit has folds of its own"),
        (["--data.batch-size", "0"], "data.batch_size=0"),
    ],
)
def test_what_is_wrong_is_refused_with_the_way_out(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--data.path", str(SAMPLE), "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
