"""Two runs on one page: what differs, and whether it is more than chance."""

import re
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.config import DataConfig
from tests.trainer.report_runs import MANIFEST, SAMPLE, STEPS, predictions_of, story, write_pictured
from tests.trainer.test_report import HOSTILE, Page
from trainer.report.compare import chance_of, conclusion, disagreement, render_comparison
from trainer.report.sections import RunFiles, main, read_files
from trainer.runs.folder import find_run
from trainer.settings.tree import OptimConfig, RunConfig
from trainer.tasks.predictions import Predictions


def run_of(folder: Path, predictions: Predictions | None = None, **changes: Any) -> RunFiles:
    write_pictured(folder, predictions, **{"weights_sha256": folder.name, **changes})
    return read_files(find_run(str(folder)), pictures=False)


def text_of(first: RunFiles, second: RunFiles) -> str:
    return re.sub(r"\s+", " ", Page(render_comparison(first, second)).text)


def wrong_in(rows: list[int]) -> Predictions:
    """All answers right, but for these."""
    found = predictions_of(right=1.1)
    answers = found.labels.copy()
    answers[rows] = (answers[rows] + 1) % 10
    return replace(found, columns={**found.columns, "prediction": answers.astype(np.int32)})


@given(st.integers(0, 120), st.integers(0, 120))
def test_chance_is_the_exact_binomial_tail(first: int, second: int) -> None:
    tosses, fewer = first + second, min(first, second)
    exact = min(Fraction(1), Fraction(2 * sum(comb(tosses, heads) for heads in range(fewer + 1)), 2**tosses))
    assert chance_of(first, second) == pytest.approx(float(exact), rel=1e-9)
    assert chance_of(first, second) == chance_of(second, first)


def test_chance_holds_where_its_terms_are_below_what_a_float_holds() -> None:
    assert chance_of(5_000_000, 5_000_000) == 1.0
    assert chance_of(499_000, 501_000) == pytest.approx(0.0456, abs=0.0002)  # two standard deviations: 0.0455
    assert chance_of(0, 2000) == 0.0


def test_a_clear_difference_is_called_one_and_a_small_one_chance(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", wrong_in(list(range(60))))
    second = run_of(tmp_path / "second", wrong_in(list(range(30, 45))))
    found, unknown = disagreement(first, second)
    assert found is not None
    assert (found.both, found.only_first, found.only_second, found.neither, unknown) == (440, 0, 45, 15, "")
    assert found.count == 500
    mood, sentence = conclusion(first, second, found, unknown)
    assert (mood, sentence[:75]) == ("good", "B is better by 9.00 percentage points (88.00 % and 97.00 %). That is more t")
    third = run_of(tmp_path / "third", wrong_in(list(range(56))))
    found, unknown = disagreement(first, third)
    mood, sentence = conclusion(first, third, found, unknown)
    assert mood == "warn"
    assert sentence.endswith("(88.00 % and 88.80 %). That may be chance: equally good models differ so much 12 % of the time.")
    text = text_of(first, third)
    assert "a split as uneven as 0 to 4 then has a probability of 0.12 (McNemar's exact test, two-sided)" in text
    assert "Both right 440 Only A right 0 Only B right 4 Both wrong 56" in text


def test_equal_weights_are_said_to_be_equal(tmp_path: Path) -> None:
    first, second = (run_of(tmp_path / name, weights_sha256="ab" * 32) for name in ("first", "second"))
    text = text_of(first, second)
    assert "The two have the same weights, to the last bit." in text
    assert "No image is right in one and wrong in the other." in text
    assert "Weights abababababab abababababab equal" in text
    assert "None: but for their names, the two were told the same." in text


def test_settings_results_and_classes_are_told_with_their_differences(tmp_path: Path) -> None:
    sure, unsure = predictions_of(right=0.9), predictions_of(right=0.7)
    first = run_of(tmp_path / "first", sure, test_loss=0.5, restarts=0, versions={"torch": "2.15.0"})
    config = RunConfig(run="second", data=DataConfig(path=str(SAMPLE), batch_size=64), optim=OptimConfig(lr=0.5))
    second = run_of(tmp_path / "second", unsure, config=config, test_loss=0.75, restarts=3, versions={"torch": "2.16.0"})
    text = text_of(first, second)
    assert "Test loss 0.5 0.75 +0.25 (+50.0 %)" in text
    assert "Restarts 0 3 +3" in text
    assert "optim.lr 0.02 0.5" in text
    assert "data.batch_size" in text
    assert "version of torch 2.15.0 2.16.0" in text
    assert "data.path" not in text
    recalls = [found.confusion(10).diagonal() / found.confusion(10).sum(1) for found in (sure, unsure)]
    largest = int(np.argmax(np.abs(recalls[1] - recalls[0])))
    name = MANIFEST.classes[largest]
    assert f"class A B B − A images {name} {100 * recalls[0][largest]:.1f} % {100 * recalls[1][largest]:.1f} %" in text
    page = Page(render_comparison(first, second))
    assert page.elements.count("svg") == 4
    assert not {"script", "img", "link"} & set(page.elements)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first")
    stale = run_of(tmp_path / "stale", predictions_of(step=STEPS - 1))
    assert "Of B: predictions.parquet is not used: they are of step 159" in text_of(first, stale)
    elsewhere = predictions_of(seed=3)
    elsewhere = replace(elsewhere, about=replace(elsewhere.about, dataset_fingerprint="cd"))
    text = text_of(run_of(tmp_path / "elsewhere", elsewhere, dataset_fingerprint="cd"), first)
    assert "The two were tested on different data" in text
    assert "more than chance:" not in text
    some = predictions_of(seed=4)
    text = text_of(first, run_of(tmp_path / "some", replace(some, about=replace(some.about, count=9999))))
    assert "Not every answer is recorded" in text
    failed = run_of(tmp_path / "failed", events=story()[:9], status="failed", test_accuracy=None)
    assert "There is no test accuracy of B" in text_of(first, failed)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text("nonsense = [")
    text = text_of(first, read_files(find_run(str(bare)), pictures=False))
    assert "There is no test accuracy of B" in text
    assert "Those of B cannot be read" in text


def test_names_from_the_data_stay_text(tmp_path: Path) -> None:
    harmless = Page(render_comparison(run_of(tmp_path / "a"), run_of(tmp_path / "b", predictions_of(seed=1))))
    names = [f"{HOSTILE}{index}" for index in range(10)]
    hostile = [run_of(tmp_path / f"h{seed}", predictions_of(seed=seed), classes=names, versions={HOSTILE: str(seed)}) for seed in (0, 1)]
    page = Page(render_comparison(*hostile))
    assert set(page.elements) <= set(harmless.elements)
    assert {key for _, key, _ in page.attributes} <= {key for _, key, _ in harmless.attributes}
    assert page.text.count("<script>alert(1)</script>") == 11


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_pictured(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert main(["--compare", "a", "b", "--storage", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.strip() == "compare-a-b.html"
    assert main(["--compare", str(tmp_path / "runs" / "a"), "runs/b", "--out", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text() == (tmp_path / "compare-a-b.html").read_text()
    assert not (tmp_path / "runs" / "a" / "report.html").exists()
    for argv, said in (
        (["--compare", "a", "nosuch", "--storage", str(tmp_path / "runs")], "there is no run nosuch"),
        (["a", "--compare", "a", "b"], "--compare takes two runs; a is one more"),
        (["runs/a", "--out", "x.html"], "--out x.html goes with --compare"),
        ([], "RUN is empty"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
