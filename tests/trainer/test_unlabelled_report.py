"""What the report says of images without labels, and which run it takes for the control."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.report_runs import SAMPLE, STEPS, at, predictions_of, story, write_pictured
from trainer.report.control import Gain, command_for, gain_of
from trainer.report.files import read_files
from trainer.report.sections import rendered
from trainer.report.unlabelled import sentences, starved
from trainer.runs.certainty import difference_interval, paired_interval
from trainer.runs.folder import located
from trainer.settings.cli import parse
from trainer.settings.tree import DataConfig, RunConfig, TrainConfig

CONFIG = RunConfig(data=DataConfig(path=str(SAMPLE), unlabelled="/more@sha256:abc"), train=TrainConfig(semi="freematch", epochs=4))
WITHOUT = replace(CONFIG, data=replace(CONFIG.data, unlabelled=""), train=replace(CONFIG.train, semi="softmatch"))
SEEN: dict[str, Any] = {
    "unlabelled_count": 1000.0,
    "unlabelled_used": 0.75,
    "unlabelled_weight": 0.8,
    "unlabelled_guesses": [100.0] * 10,
    "unlabelled_used_guesses": [100.0] * 8 + [10.0, 0.0],
}
GUESSED = [at(9, "evaluation", step=40, epoch=1.0, test_accuracy=0.5, test_loss=1.0, unlabelled_used=0.25, unlabelled_weight=0.3)]


def write(folder: Path, config: RunConfig, *, right: float = 0.8, **changes: Any) -> Path:
    config = replace(config, run=folder.name)
    changes = {"test_count": 500, "unlabelled": SEEN} | changes if config.data.unlabelled else {"test_count": 500} | changes
    events = [*story(), *GUESSED] if config.data.unlabelled else story()
    return write_pictured(folder, predictions_of(right=right, seed=int(100 * right)), config=config, events=events, **changes)


def gained(folder: Path) -> tuple[Gain | None, str]:
    return gain_of(read_files(located(str(folder)), pictures=False))


@given(both=st.integers(0, 300), one=st.integers(0, 80), other=st.integers(0, 80), neither=st.integers(1, 90))
def test_a_paired_interval_holds_the_difference_and_turns_round_with_it(both: int, one: int, other: int, neither: int) -> None:
    count = both + one + other + neither
    low, high = paired_interval(one, other, count)
    assert -1 <= low <= (one - other) / (count + 2) <= high <= 1
    back = paired_interval(other, one, count)
    assert (-back[1], -back[0]) == pytest.approx((low, high))


def test_pairing_tells_more_than_two_shares_alone() -> None:
    paired, apart = paired_interval(30, 10, 1000), difference_interval((0.85, 1000), (0.83, 1000))
    assert paired[0] > 0 > apart[0]
    # (31 - 11) / 1002 -+ 1.96 * sqrt(((31 + 11) / 1002 - (20 / 1002) ** 2) / 1002)
    half = 1.959963984540054 * math.sqrt((42 / 1002 - (20 / 1002) ** 2) / 1002)
    assert paired == pytest.approx((20 / 1002 - half, 20 / 1002 + half))


def test_the_report_says_what_the_images_gained_over_the_same_run_without_them(tmp_path: Path) -> None:
    run = write(tmp_path / "with", CONFIG, right=0.9)
    write(tmp_path / "without", WITHOUT, right=0.6)
    found, problem = gained(run)
    assert problem == ""
    assert found is not None
    assert (found.control, found.is_paired, found.steps) == ("without", True, STEPS)
    said = json.loads((run / "summary.json").read_text())["test_accuracy"], json.loads((tmp_path / "without/summary.json").read_text())
    assert (found.with_them, found.without) == (said[0], said[1]["test_accuracy"])
    low, high = found.interval
    assert low < found.with_them - found.without < high
    assert found.sentence().startswith(f"With unlabelled images {100 * found.with_them:.1f} %, without {100 * found.without:.1f} %: ")
    html, problems = rendered(read_files(located(str(run)), pictures=False))
    assert problems == []
    assert found.sentence() in html
    assert "Compared with without, which did the same 160 steps" in html
    assert "75.0 % of the images were used, and an image counted 0.80 on average" in html
    assert "Guesses at unlabelled images" in html
    assert "How many guesses were right is not known" in html
    assert "Unlabelled images" not in rendered(read_files(located(str(tmp_path / "without")), pictures=False))[0]


def test_a_difference_that_may_be_chance_is_called_so() -> None:
    gain = Gain(control="c", steps=9, with_them=0.842, without=0.801, interval=(0.02, 0.062), is_paired=True)
    assert gain.sentence() == "With unlabelled images 84.2 %, without 80.1 %: 4.1 points (2.0 to 6.2)."
    assert replace(gain, interval=(-0.01, 0.062)).sentence().endswith("(-1.0 to 6.2). That may be chance.")


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        (replace(WITHOUT, train=replace(WITHOUT.train, seed=1)), {}, "it has other settings (train.seed)"),
        (WITHOUT, {"steps": STEPS - 40}, "it did 120 steps, and this run 160"),
        (WITHOUT, {"dataset_fingerprint": "ef" * 32}, "it was trained on other data"),
        (WITHOUT, {"status": "stopped"}, "it has not finished"),
        (CONFIG, {}, "it has unlabelled images too"),
    ],
)
def test_a_run_that_differs_in_more_is_no_control(tmp_path: Path, config: RunConfig, changes: dict[str, Any], problem: str) -> None:
    write(tmp_path / "other", config, **changes)
    run = write(tmp_path / "with", CONFIG)
    assert gained(run) == (None, "No finished run beside this one did the same without them.")
    named = write(tmp_path / "named", replace(CONFIG, train=replace(CONFIG.train, control="other")))
    found, why = gained(named)
    assert found is None
    assert why == f"train.control=other is not this run without unlabelled images: {problem}."


def test_without_a_control_the_report_gives_the_command_that_makes_one(tmp_path: Path) -> None:
    run = write(tmp_path / "with", CONFIG)
    html, problems = rendered(read_files(located(str(run)), pictures=False))
    assert problems == []
    assert "Whether they helped is not known." in html
    command = command_for(read_files(located(str(run)), pictures=False))
    assert f"{run}/config.toml --run with-without --data.unlabelled '' --train.semi softmatch" in command
    made = parse(["--config", f"{run}/config.toml", "--run", "with-without", "--data.unlabelled", "", "--train.semi", "softmatch"]).config
    assert made == replace(WITHOUT, run="with-without")


def test_what_is_known_of_guesses_is_told_and_starved_classes_are_named() -> None:
    classes, even = [f"class {index}" for index in range(10)], [0.1] * 10
    assert starved(SEEN, classes, even) == ["class 9", "class 8"]
    assert starved(SEEN, classes, [0.11] * 8 + [0.06, 0.06]) == ["class 9"] + (["class 8"] if 10 / 810 / 0.06 < 0.2 else [])
    assert starved({**SEEN, "unlabelled_used_guesses": [0.0] * 10}, classes, even) == [], "nothing was used, so nothing is left out"
    known = {**SEEN, "unlabelled_known": 800.0, "unlabelled_right": 0.5, "unlabelled_used_right": 0.9}
    told = sentences(known, classes, even)
    assert "Of 800 guesses at images whose class is known, 50.0 % were right; of those that were used, 90.0 %." in told
    assert told[-1].startswith("Hardly guessed: class 9, class 8. ")
