"""The benchmark of learning features: what its data are, that variants are trained once each, and what its intervals say. No training."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import mean_interval
from benchmarks.learning.features import FEATURES, LISTED, Feature
from benchmarks.learning.measure import cases_of, lines_of, measure, target_of, variants_of, verdict_of
from benchmarks.learning.tasks import NAMES, NOISE, SMALL, TASKS, Arrays, Sizes, longtail_counts, longtailed, noisy, write_idx
from dataio.balance import class_counts, imbalance_of
from dataio.config import DataConfig
from dataio.prepared import prepared
from trainer.settings.cli import parse

SIZES = Sizes(largest_class=100, train=500, test=50, flags=())


def made(each: int = 120) -> Arrays:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(10, dtype=np.uint8), each)
    return {split: (random.integers(0, 256, (len(labels), 28, 28), np.uint8), labels) for split in ("train", "t10k")}


def test_every_features_flags_are_settings_that_differ() -> None:
    assert len(FEATURES) == len(LISTED)
    for feature in LISTED:
        flags = TASKS[feature.tasks[0]].at(SMALL)
        assert set(feature.tasks) <= set(TASKS)
        taught = [] if feature.teacher is None else ["--train.teacher", "a run"]
        assert parse([*flags, *feature.on, *taught]).config != parse([*flags, *feature.off]).config, feature.name


def test_a_long_tail_shrinks_by_its_factor_and_is_another_one_for_each_seed() -> None:
    assert longtail_counts(6000, 10)[::9] == [6000, 60]
    assert longtail_counts(5, 10)[-1] == 1
    first, again, other = (longtailed(made(), seed, SIZES)["train"][1] for seed in (0, 0, 1))
    assert sorted(np.bincount(first, minlength=10).tolist(), reverse=True) == longtail_counts(100, 10)
    assert np.array_equal(first, again)
    assert not np.array_equal(np.bincount(first, minlength=10), np.bincount(other, minlength=10))


def test_a_fifth_of_the_labels_is_wrong_in_training_and_none_in_the_test() -> None:
    arrays = made()
    found = noisy(arrays, 3, SIZES)
    images, labels = found["train"]
    true = {image.tobytes(): label for image, label in zip(*arrays["train"], strict=True)}
    wrong = sum(true[image.tobytes()] != label for image, label in zip(images, labels, strict=True))
    assert wrong / len(labels) == pytest.approx(NOISE, abs=0.06)
    assert np.array_equal(found["t10k"][1], arrays["t10k"][1][:50])


def test_what_is_written_is_what_a_run_reads(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "tail", longtailed(made(), 0, SIZES))
    dataset = prepared(DataConfig(path=str(folder), root=str(tmp_path / "root"))).dataset
    assert dataset.manifest.classes == NAMES
    assert sorted(class_counts(dataset), reverse=True) == longtail_counts(100, 10)
    assert imbalance_of(class_counts(dataset)).ratio == 100


def test_what_several_features_compare_with_is_trained_once() -> None:
    features = [Feature(name="a", on=("--x",), tasks=("noise",)), Feature(name="b", on=("--y",), tasks=("noise", "longtail"))]
    found = [(each.task, each.flags) for each in variants_of(features, ["noise"])]
    assert found == [("noise", ()), ("noise", ("--x",)), ("noise", ("--y",))]


def test_an_interval_is_students_and_one_that_holds_nothing_decides_nothing() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] == pytest.approx(2 + 4.303 * statistics.stdev([1, 2, 3]) / 3**0.5)
    assert [verdict_of(mean_interval(values)) for values in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [-1.0, 2.0, 0.5], [1.0])] == [
        "pays",
        "costs",
        "undecided",
        "not repeated",
    ]


def test_differences_are_paired_by_seed_in_points() -> None:
    feature = Feature(name="a", on=("--x",), tasks=("longtail",))
    rows = {
        "longtail: as it is": [{"balanced_accuracy": 0.5}, {"balanced_accuracy": 0.7}],
        "longtail: --x": [{"balanced_accuracy": 0.52}, {"balanced_accuracy": 0.72}],
    }
    (case,) = cases_of([feature], {"longtail": "balanced_accuracy"}, rows)
    assert (case["points"]["mean"], case["verdict"]) == (pytest.approx(2.0), "pays")
    assert target_of(case)["met"] is True
    assert "pays" in lines_of({"cases": [case], "not_installed": ["folder"]})[1]


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(flags: list[str], *, seed: int, threads: int) -> dict[str, float]:
        trained.append(seed)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"loss": 1.0, "accuracy": 0.5 + ("--x" in flags) / 10 + seed / 100}

    monkeypatch.setattr("benchmarks.learning.measure.trained", train)
    feature, task = Feature(name="a", on=("--x",), tasks=("quickstart",)), {"quickstart": TASKS["quickstart"]}
    asked = {"seeds": 2, "sizes": SIZES, "threads": 1, "folder": tmp_path, "given": None, "keep": tmp_path / "rows.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        measure([feature], task, **asked)
    result = measure([feature], task, **asked)
    assert len(trained) == 3 + 2, "the one that was cut short, and the one after it"
    assert result["cases"][0]["points"]["mean"] == pytest.approx(10)
    again = measure([feature], task, **asked)
    assert (len(trained), again["cases"]) == (5, result["cases"])
