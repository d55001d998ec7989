"""A learning rate is found by the run's own steps, picked by a stated rule, and nothing but a drawing is kept."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.texts import make_model, rows, write_csv
from trainer.find_rate import Asked, asked_rates, main, own_flags
from trainer.rank.range_test import FEWEST, RangeTest, growing_rates, judged, picked, rounded
from trainer.settings.fields import replaced
from trainer.settings.tree import RunConfig

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
RATES = growing_rates(1e-5, 1.0, 101)


def valley(rates: list[float]) -> Iterator[float]:
    """Falls to its lowest value at 0.1, and diverges."""
    for rate in rates:
        yield 3 - 2 / (1 + (math.log10(rate) + 1) ** 2) if rate <= 0.1 else 1.0 + 200 * (rate - 0.1)


def test_rates_grow_by_the_same_factor() -> None:
    assert (RATES[0], RATES[-1], len(RATES)) == (1e-5, pytest.approx(1.0), 101)
    assert RATES[20] / RATES[0] == pytest.approx(10)


def test_the_test_ends_where_the_loss_diverges_and_a_tenth_of_the_lowest_is_picked() -> None:
    found = judged(RATES, valley(RATES))
    best = picked(found)
    assert found.end == "diverged"
    assert len(found.losses) < len(RATES)
    assert best.lowest == pytest.approx(0.1, rel=0.5)
    assert best.rate == pytest.approx(best.lowest / 10)
    assert 0.01 < best.steepest < best.lowest
    assert best.is_bounded


def test_smoothing_begins_without_bias() -> None:
    assert RangeTest(rates=(1.0,) * 3, losses=(2.0, 2.0, 2.0), end="all steps done").smoothed == pytest.approx((2.0, 2.0, 2.0))


def test_a_loss_that_still_falls_is_told() -> None:
    assert not picked(judged(RATES, iter(3 - number / 50 for number in range(101)))).is_bounded


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ([2.0] * 101, "never fell"),
        ([2.0 + number / 100 for number in range(101)], "never fell"),
        ([2.0] * (FEWEST - 1) + [math.nan], "not finite after 9 steps"),
    ],
)
def test_losses_that_speak_for_no_rate_are_an_error_with_the_fix(losses: list[float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        picked(judged(RATES, iter(losses)))


def test_rates_are_told_to_two_digits() -> None:
    assert [rounded(rate) for rate in (0.012345, 1.96e-4, 3.0)] == [0.012, 2e-4, 3.0]


def test_own_flags_are_taken_out_and_the_rest_is_the_runs() -> None:
    asked, rest = own_flags(["pets", "--first", "1e-4", "--last=2", "--data.flip", "--steps", "50", "--json", "--train.seed", "3"])
    assert asked == Asked(first=1e-4, last=2.0, steps=50, json=True)
    assert rest == ["pets", "--data.flip", "--train.seed", "3"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--first", "x"], "--first x: that is no number"),
        (["--first", "2"], "both above 0"),
        (["--steps", "3"], "fewer than 20 steps"),
        (["--steps"], "--steps needs a value"),
        (["--out", "nowhere/page.html"], "there is no folder nowhere"),
        (["--data.batch-size", "0"], "data.batch_size=0"),
        (["--config", "quickstart", "--data.class-weights", "Boot=2"], "did you mean Ankle boot"),
    ],
)
def test_what_is_wrong_is_refused_as_by_the_run(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_it_finds_a_rate_for_real_images_and_leaves_only_its_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 2 virtual ranks, with classes weighed and a decay by layers: flags of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.find_rate.usable_cpus", lambda: 1)
    status = main(
        [
            *("--data.path", str(SAMPLE), "--data.root", str(tmp_path / "root"), "--storage", str(tmp_path / "runs")),
            *("--data.batch-size", "16", "--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--train.precision", "fp32"),
            *("--train.virtual-ranks", "2", "--data.balance", "weights", "--optim.layer-decay", "0.9", "--data.cache", "none"),
            *("--steps", "40", "--first", "1e-3", "--last", "30", "--json"),
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert status == (0 if told["rate"] else 1)
    assert len(told["losses"]) == len(told["rates"]) > FEWEST
    assert told["losses"][0] == pytest.approx(math.log(10), rel=0.3)
    assert "<svg" in (tmp_path / "find-rate.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {"find-rate.html", "root"}, "no run, no checkpoint"


def test_texts_are_tried_at_the_rates_of_encoders() -> None:
    texts = replaced(RunConfig(), "model.name", "hf/encoder")
    for config, ends in ((RunConfig(), (1e-5, 1.0)), (texts, (1e-6, 0.1))):
        rates = asked_rates(Asked(steps=20), config)
        assert (len(rates), rates[0], rates[-1]) == (20, pytest.approx(ends[0]), pytest.approx(ends[1]))
    assert asked_rates(Asked(first=1e-4, steps=20), texts)[0] == 1e-4


def test_it_finds_a_rate_for_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, table = make_model(tmp_path / "model"), write_csv(tmp_path / "texts.csv", rows(range(400)))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.find_rate.usable_cpus", lambda: 1)
    words = [
        *(str(table), "--model.name", f"hf/{model}", "--data.root", str(tmp_path / "root"), "--storage", str(tmp_path / "runs")),
        *("--data.max-tokens", "32", "--data.batch-size", "32", "--train.virtual-ranks", "2", "--train.precision", "fp32"),
        *("--optim.layer-decay", "0.9", "--steps", "60", "--first", "1e-5", "--last", "1"),
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "steps of 32 texts in 2 virtual ranks on one cpu, fp32" in said.out
    assert "image" not in said.out + said.err
    flag = said.out.splitlines()[-1]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["flag"] == flag
    assert told["losses"][0] == pytest.approx(math.log(2), rel=0.3)
    assert not (tmp_path / "runs").exists(), "no run, no checkpoint"
