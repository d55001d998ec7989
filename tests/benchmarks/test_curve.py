"""The benchmark of the curve: its cases are drawn once and for all, its heads learn, it counts what lies in the interval. No network."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.curve import PARTS, REPEATS, Pictures, cases_of, errors_of, judged, lines_of, summed

TESTED = 5000


def pictures(count: int = 600, dimensions: int = 8) -> Pictures:
    """Ten classes around points of their own, so that a head finds them from enough images."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((10, dimensions))
    splits = {}
    for name in ("train", "test"):
        labels = np.arange(count) % 10
        splits[name] = (centres[labels] + random.standard_normal((count, dimensions))).astype(np.float32), labels.astype(np.int64)
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    of_both = {split: {"network": each, "pixels": each} for split, each in (("train", train), ("test", test))}
    return Pictures(train=of_both["train"], train_labels=train_labels, test=of_both["test"], test_labels=test_labels)


def test_cases_are_the_same_each_time_and_fit_the_images_that_there_are() -> None:
    first, again = (list(cases_of(40, train=16_000, test=3000)) for _ in range(2))
    assert first == again
    assert list(cases_of(10, train=16_000, test=3000)) == first[:10], "more cases change none"
    assert {case.features for case in first} == {"network", "pixels"}
    assert all(2 * case.images <= 2000 * len(case.classes) / 10 for case in cases_of(40, train=2000, test=300))


def test_a_case_has_three_runs_of_each_size_and_one_at_twice_the_labels_and_more_images_are_better() -> None:
    (case,) = cases_of(1, train=600, test=600)
    found = errors_of(case, pictures())
    assert {size: len(errors) for size, errors in found.items()} == {
        **{round(part * case.images): REPEATS for part in PARTS}, 2 * case.images: 1
    }  # fmt: skip
    assert found == errors_of(case, pictures())
    sizes = sorted(found)
    assert np.mean(found[sizes[-1]]) < np.mean(found[sizes[0]])


def test_a_run_that_comes_as_foretold_lies_inside_and_one_that_learns_nothing_more_does_not() -> None:
    def errors(at_twice: float) -> dict[int, list[float]]:
        return {size: [2 * size**-0.5] * 3 for size in (125, 250, 500, 1000)} | {2000: [at_twice]}

    right, wrong, better = (judged(errors(at_twice), TESTED) for at_twice in (2 * 2000**-0.5, 2 * 1000**-0.5, 0.0))
    assert [row["inside"] for row in (right, wrong, better)] == [True, False, False]
    told = summed([right, wrong, better, judged({size: [0.1] * 3 for size in (125, 250, 500, 1000)} | {2000: [0.1]}, TESTED)])
    assert (told["cases"], told["told"], told["inside"], told["above"], told["below"]) == (4, 3, pytest.approx(1 / 3), 1, 1)
    line = lines_of({"series": {"features": told, "runs": summed([])}})[0]
    assert line.startswith("features: 33.3% of 3 cases inside")
    assert "1 better than the interval, 1 worse; 1 could not be told" in line


def test_the_page_and_the_result_tell_the_same() -> None:
    """What docs/curve.md says was measured stands in benchmarks/results/curve.json."""
    project = Path(__file__).resolve().parents[2]
    result = json.loads((project / "benchmarks" / "results" / "curve.json").read_text())
    found = result["series"]["features"]
    page = " ".join((project / "docs" / "curve.md").read_text().split())
    assert f"{found['told']} held-out cases" in page
    assert f"{100 * found['inside']:.1f} %" in page
