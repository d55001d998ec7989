"""How sure numbers are: intervals that hold the truth as often as they say, and no number where nothing was measured."""

import io
import re
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dataio.manifest import Manifest, ShardInfo, SplitInfo
from dataio.schema import single_label
from tests.trainer.report_runs import MULTITASK, predictions_of, write_multitask, write_pictured
from tests.trainer.test_report import Page
from trainer.report.compare import conclusion, different_tests, disagreement, render_comparison
from trainer.report.files import RunFiles, read_files
from trainer.report.sections import render
from trainer.runs.certainty import class_warnings, given_of, in_percent, interval_of, measured_scores, wilson
from trainer.runs.folder import find_run
from trainer.runs.progress import final_table, summary_rows
from trainer.tasks.info import CLASSIFICATION, MULTILABEL, Measure

# --- the interval ---------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_wilson_s() -> None:
    assert wilson(0.884, 500) == pytest.approx((0.85296, 0.90919), abs=1e-5)  # R: prop.test(442, 500, correct = FALSE)
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)


@given(st.integers(1, 5000), st.data())
def test_the_interval_holds_the_share_and_stays_a_share(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = wilson(hits / count, count)
    assert 0.0 <= low <= hits / count <= high <= 1.0
    assert low < high, "not even where all or none are right is chance ruled out"
    mirrored = wilson(1 - hits / count, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert wilson(hits / count, 4 * count)[1] - wilson(hits / count, 4 * count)[0] < high - low


@pytest.mark.parametrize("truth", [Fraction(1, 2), Fraction(4, 5), Fraction(19, 20)])
def test_it_holds_the_truth_as_often_as_it_says(truth: Fraction) -> None:
    count = 100
    chances = [comb(count, hits) * truth**hits * (1 - truth) ** (count - hits) for hits in range(count + 1)]
    held = sum(chance for hits, chance in enumerate(chances) if wilson(hits / count, count)[0] <= truth <= wilson(hits / count, count)[1])
    assert 0.93 < held < 0.98


def test_only_shares_of_samples_have_one() -> None:
    said = {"test_accuracy": 0.5, "test_count": 10, "test_map": 0.5, "test_exact_match": 0.5}
    accuracy = CLASSIFICATION.headline
    assert interval_of(said, accuracy) == wilson(0.5, 10)
    by_name = {measure.name: interval_of(said, measure) for measure in MULTILABEL.measures}
    assert by_name == {"map": None, "micro_f1": None, "macro_f1": None, "exact_match": wilson(0.5, 10)}
    assert interval_of({"test_accuracy": 0.5, "confusion": [[5, 5], [5, 5]]}, accuracy) == wilson(0.5, 20), "runs of older releases"
    assert interval_of({"test_accuracy": 0.5}, accuracy) is None
    heads = {"heads": {"kind": {"count": 40}, "weight": {"count": 30}}, "test_kind_accuracy": 0.9, "test_weight_mae": 0.9}
    assert interval_of(heads, Measure(name="kind_accuracy", title="kind accuracy")) == wilson(0.9, 40)
    assert interval_of(heads, Measure(name="weight_mae", title="weight MAE")) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda each: (
            st.lists(each, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["test_count", "confusion", "heads", "per_class", "classes", "labels", "support", "details", "count", "test_accuracy"]
                ),
                each,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_summary_is_too_strange(said: Any) -> None:
    summary = said if isinstance(said, dict) else {"heads": said, "per_class": said, "labels": said, "confusion": said}
    interval_of(summary, CLASSIFICATION.headline)
    class_warnings(summary, "images")


# --- classes that the test does not show ----------------------------------------------------------------------------------------------


def test_what_no_sample_measured_is_no_zero() -> None:
    absent = {"recall": 0.0, "precision": 0.0, "f1": 0.0, "support": 0}
    assert measured_scores(absent, 0) == {"recall": None, "precision": None, "f1": None}
    assert measured_scores(absent, 3) == {"recall": None, "precision": 0.0, "f1": None}, "three answers were wrong: that is measured"
    never_said = absent | {"support": 5}
    assert measured_scores(never_said, 0) == {"recall": 0.0, "precision": None, "f1": 0.0}
    assert measured_scores(never_said, None) == {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    assert given_of([[1, 2], [0, 3]], 2) == [1, 5]
    assert given_of([[1, 2]], 2) is None


def thin_run(folder: Path, **changes: Any) -> Path:
    """Ten classes; the test has no image of the last, and three of the one before."""
    predictions = predictions_of()
    keep = (predictions.labels != 9) & ((predictions.labels != 8) | (np.cumsum(predictions.labels == 8) <= 3))
    confusion = predictions.confusion(10)
    confusion[9] = 0
    confusion[8] = np.bincount(predictions.answers[keep & (predictions.labels == 8)], minlength=10)
    hits, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    per_class = [
        {"recall": float(h / max(1, s)), "precision": float(h / max(1, c)), "f1": float(2 * h / max(1, s + c)), "support": int(s)}
        for h, s, c in zip(hits, support, claimed, strict=True)
    ]
    said = {"per_class": per_class, "confusion": confusion.tolist(), "test_accuracy": float(hits.sum() / support.sum())}
    return write_pictured(folder, predictions, **said, **changes)


def files_of(folder: Path) -> RunFiles:
    return read_files(find_run(str(folder)), pictures=False)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def test_the_report_warns_of_thin_classes_and_invents_no_zero(tmp_path: Path) -> None:
    run = files_of(thin_run(tmp_path / "thin"))
    text = text_of(render(run))
    names = run.summary["classes"]
    assert f"No test image of {names[9]}: nothing is measured there." in text
    assert f"Fewer than 10 test images of {names[8]} (3): what is measured there may be off by tens of points." in text
    [row] = re.findall(rf"{re.escape(names[9])} - ([^%]*% )- 0 ", text)
    assert row == "0.0 % ", "it was said of some images, each time wrongly"
    assert "0.0 % 0.0 % 0.0 %" not in text
    rows = text[text.index("F1 images") :]
    assert rows.index(f"{names[9]} -") > max(rows.index(name) for name in names[:8]), "what was not measured is not the weakest"


def test_the_terminal_says_the_interval_and_the_warning(tmp_path: Path) -> None:
    summary = files_of(thin_run(tmp_path / "thin")).summary
    for width in (80, 120):
        sink = io.StringIO()
        Console(file=sink, width=width).print(final_table(summary))
        shown = re.sub(r"[│\s]+", " ", sink.getvalue())
        interval = interval_of(summary, CLASSIFICATION.headline)
        assert interval is not None
        assert f"% (95 % interval: {in_percent(interval)})" in shown
        assert f"warning: No test image of {summary['classes'][9]}" in shown
        assert all(len(line) <= width for line in sink.getvalue().splitlines())


def test_each_share_in_the_report_has_its_interval(tmp_path: Path) -> None:
    html = render(files_of(write_pictured(tmp_path / "run")))
    text = text_of(html)
    summary = files_of(tmp_path / "run").summary
    overall = wilson(summary["test_accuracy"], 500)
    assert text.count(in_percent(overall)) == 2, "in the verdict and in the key numbers"
    for name, entry in zip(summary["classes"], summary["per_class"], strict=True):
        assert f"{name} {100 * entry['recall']:.1f} % {in_percent(wilson(entry['recall'], entry['support']))}" in text
    several = files_of(write_multitask(tmp_path / "several")).summary
    accuracy = several[MULTITASK.measures[1].key]
    assert ("Test kind accuracy", f"{100 * accuracy:.2f} % (95 % interval: {in_percent(wilson(accuracy, 500))})") in summary_rows(several)


# --- no winner on different data ------------------------------------------------------------------------------------------------------


def compared(first: Path, second: Path) -> tuple[str, str]:
    one, other = files_of(first), files_of(second)
    return conclusion(one, other, *disagreement(one, other))[1], text_of(render_comparison(one, other))


def test_no_winner_is_named_on_different_test_data(tmp_path: Path) -> None:
    first = write_pictured(
        tmp_path / "first", predictions_of(right=0.9), weights_sha256="a", dataset_fingerprint="aa", test_fingerprint="11"
    )
    second = write_pictured(
        tmp_path / "second", predictions_of(right=0.6), weights_sha256="b", dataset_fingerprint="bb", test_fingerprint="22"
    )
    sentence, text = compared(first, second)
    assert sentence == "The two were tested on different data (11 and 22). No number says which is better."
    assert "is better by" not in text
    assert re.search(r"Test accuracy [0-9.]+ % [0-9.]+ to [0-9.]+ % [0-9.]+ % [0-9.]+ to [0-9.]+ % other data", text)
    assert "Test data 11 22 differs" in text


def test_the_same_test_data_compare_though_the_training_data_differ(tmp_path: Path) -> None:
    same = {"test_fingerprint": "11"}
    first = files_of(write_pictured(tmp_path / "first", predictions_of(right=0.9), weights_sha256="a", dataset_fingerprint="aa", **same))
    second = files_of(write_pictured(tmp_path / "second", predictions_of(right=0.6), weights_sha256="b", dataset_fingerprint="bb", **same))
    assert different_tests(first, second) == ""
    assert "A is better by" in conclusion(first, second, None, "")[1]


def test_runs_of_older_releases_compare_if_their_data_sets_are_the_same(tmp_path: Path) -> None:
    first = write_pictured(tmp_path / "first", predictions_of(right=0.9), weights_sha256="a")
    second = write_pictured(tmp_path / "second", predictions_of(right=0.6), weights_sha256="b")
    assert different_tests(files_of(first), files_of(second)) == ""
    other = write_pictured(tmp_path / "other", predictions_of(right=0.6), weights_sha256="b", dataset_fingerprint="bb")
    sentence = conclusion(files_of(first), files_of(other), None, "")[1]
    assert sentence.startswith("The two were tested on different data, or may have been")


def manifest_of(train: str, test: str, classes: tuple[str, ...] = ("cat", "dog")) -> Manifest:
    def split(name: str, sha256: str) -> SplitInfo:
        shard = ShardInfo(
            name=f"{name}-00000.parquet", rows=5, row_group_rows=(5,), size_bytes=9, sha256=sha256 * 64, footer_sha256="0" * 64
        )
        return SplitInfo(count=5, shards=(shard,))

    return Manifest(
        targets=single_label(classes),
        splits={"train": split("train", train), "test": split("test", test)},
        fingerprint="0" * 64,
        image_sizes={"8x8": 10},
        quarantined=0,
        source="folder",
        identity="0" * 64,
    )


def test_a_split_s_fingerprint_is_of_it_alone_and_of_the_classes() -> None:
    one = manifest_of("a", "b").fingerprint_of("test")
    assert one == manifest_of("c", "b").fingerprint_of("test")
    assert one != manifest_of("a", "c").fingerprint_of("test")
    assert one != manifest_of("a", "b", classes=("cat", "cow")).fingerprint_of("test")
    assert manifest_of("a", "b").fingerprint_of("validation") == ""
