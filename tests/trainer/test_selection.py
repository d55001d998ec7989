"""What the splits decide of the settings, what counts of them in a run's identity, and what follows for a run that has ended."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataio.manifest import Manifest, SplitInfo
from dataio.parquet import open_dataset
from tests.trainer.report_runs import SAMPLE
from trainer.drive.check import Checked
from trainer.drive.identity import Found, as_it_began
from trainer.drive.problems import Facts, selection
from trainer.rank.evaluation import share_of
from trainer.runs.certainty import difference_interval, is_within_noise
from trainer.runs.events import words_of
from trainer.runs.measures import headline_of
from trainer.settings.fields import as_begun, replaced
from trainer.settings.identity import deciding_changes, deciding_settings
from trainer.settings.length import length_of
from trainer.settings.selection import about_selection, selected, watched_split
from trainer.settings.toml import from_toml
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.sums import SummedEvaluation

WITHOUT = open_dataset(SAMPLE).manifest
WITH = dataclasses.replace(WITHOUT, splits={**WITHOUT.splits, "validation": WITHOUT.splits["test"]})


def config_of(**train: Any) -> RunConfig:
    return dataclasses.replace(RunConfig(), train=dataclasses.replace(RunConfig().train, **train))


@pytest.mark.parametrize(
    ("asked", "manifest", "decided"),
    [("auto", WITH, "best"), ("auto", WITHOUT, "last"), ("last", WITH, "last"), ("best", WITH, "best")],
)
def test_a_validation_split_decides_what_auto_keeps(asked: str, manifest: Manifest, decided: str) -> None:
    assert selected(config_of(select=asked), manifest).train.select == decided
    assert length_of(config_of(select=asked), manifest, workers=2).config.train.select == decided


def test_a_validation_split_without_a_usable_image_is_none() -> None:
    empty = dataclasses.replace(WITHOUT, splits={**WITHOUT.splits, "validation": SplitInfo(count=0, shards=())})
    assert (watched_split(empty), watched_split(WITH)) == ("test", "validation")
    assert selected(RunConfig(), empty).train.select == "last"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"select": "best"}, "train.select=best needs a validation split, and .* has train, test; .*--data.validation-fraction 0.1"),
        ({"patience": 3}, "train.patience=3 needs a validation split"),
        ({"select": "best", "patience": 3}, "train.select=best and train.patience=3 needs"),
    ],
)
def test_a_choice_without_a_validation_split_is_refused_by_the_run_and_its_dry_run(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        length_of(config_of(**train), WITHOUT, workers=2)
    assert list(about_selection(RunConfig(), WITHOUT)) == []


def test_a_measure_that_the_task_does_not_have_is_refused_before_the_run_starts() -> None:
    model = Checked(has_depthwise=False, task=CLASSIFICATION, weights_bytes=1)

    class Looked:
        manifest, class_counts = WITH, None

    facts = Facts(config=config_of(select="best", select_measure="map"), looked=Looked(), model=model)  # type: ignore[arg-type]
    assert "select_measure='map' is no measure of the task classification; it must be one of accuracy, " in str(selection(facts))
    assert selection(dataclasses.replace(facts, config=config_of(select="best", select_measure="loss"))) is None


def test_a_user_is_told_what_the_splits_are_for() -> None:
    (line,) = about_selection(config_of(select="best", patience=3), WITH)
    assert line == (
        "the validation split is scored during training: its best epoch is kept (by the task's first measure), and 3 evaluations without a "
        "better one end the run; the test split is read once, at the end"
    )
    (line,) = about_selection(config_of(select="last"), WITH)
    assert "the last weights are kept (train.select=last)" in line


def test_a_run_begun_before_there_was_a_choice_keeps_its_last_weights() -> None:
    before = as_begun(from_toml("[train]\nepochs = 3\n", origin="config.toml"))
    assert before.train.select == "last"
    now = as_it_began(RunConfig(), before)
    assert selected(now, WITH).train.select == "last"
    assert deciding_changes(replaced(before, "train.epochs", 10), now) == {}


def test_the_new_settings_rename_no_run_and_count_when_they_are_set() -> None:
    names = {"train.select", "train.select_measure", "train.patience", "train.min_delta", "train.eval_every_epochs"}
    assert not names & deciding_settings(config_of(eval_every_epochs=5)).keys()
    chosen = deciding_settings(selected(config_of(patience=2, eval_every_epochs=5), WITH))
    assert {name: chosen[name] for name in names & chosen.keys()} == {
        "train.select": "best",
        "train.patience": 2,
        "train.eval_every_epochs": 5,
    }


def test_how_often_is_evaluated_may_change_only_where_it_decides_nothing() -> None:
    def changed(select: str) -> dict[str, tuple[Any, Any]]:
        return deciding_changes(config_of(select=select), config_of(select=select, eval_every_epochs=2))

    assert changed("last") == {}
    assert changed("best") == {"train.eval_every_epochs": (1, 2)}


@pytest.mark.parametrize(
    ("summary", "has_finished"),
    [
        ({"status": "finished", "epochs": 4.0, "stopped_early": True}, True),
        ({"status": "finished", "epochs": 4.0, "stopped_early": False}, False),
        ({"status": "finished", "epochs": 4.0}, False),
        ({"status": "stopped", "epochs": 4.0, "stopped_early": True}, False),
    ],
)
def test_a_run_that_ended_early_has_finished_however_many_epochs_it_had(summary: dict[str, Any], has_finished: bool) -> None:
    found = Found(saved=RunConfig(), summary=summary)
    assert found.has_finished_as(config_of(epochs=10)) is has_finished


def test_an_evaluation_says_of_which_split_it_is() -> None:
    event = {"event": "evaluation", "step": 40, "split": "validation", "validation_accuracy": 0.5, "validation_loss": 1.25}
    assert words_of(event) == "step 40: validation accuracy 50.0 %, loss 1.2500"
    assert headline_of(event, CLASSIFICATION) == (0.5, "validation")
    assert headline_of({**event, "test_accuracy": 0.4}, CLASSIFICATION) == (0.4, "test")
    assert headline_of({}, CLASSIFICATION) == (None, "test")
    early = {"event": "stopped_early", "step": 40, "epoch": 4.0, "patience": 3}
    assert words_of(early) == "ends at step 40, epoch 4: 3 evaluations without a better one (train.patience)"


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """56 of 70 against 48 of 80: the paper's example (Newcombe 1998, method 10)."""
    low, high = difference_interval((56 / 70, 70), (48 / 80, 80))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert not is_within_noise((56 / 70, 70), (48 / 80, 80))
    assert is_within_noise((0.9, 100), (0.88, 100))
    assert is_within_noise((0.5, 10), (0.5, 10))


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 8), st.randoms())
def test_sums_over_parts_have_the_same_bits_for_any_number_of_ranks(
    losses: list[float], parts: int, ranks: int, order: random.Random
) -> None:
    """And in whatever order an all-reduce adds them."""

    def rank_of(number: int, world_size: int) -> torch.Tensor:
        evaluation = SummedEvaluation(2)
        for part in share_of(parts, number, world_size):
            for index in share_of(len(losses), part, parts):
                evaluation.sums += torch.tensor([losses[index], 1.0], dtype=torch.float64)
            evaluation.end_part()
        evaluation.combine(0, 1)
        return evaluation.sums

    def over(world_size: int) -> list[float]:
        sums = [rank_of(number, world_size) for number in range(world_size)]
        order.shuffle(sums)
        total = torch.zeros(2, dtype=torch.float64)
        for each in sums:
            total += each
        return total.tolist()

    assert over(1) == over(min(ranks, parts))
    assert over(1)[1] == len(losses)
    assert over(1)[0] == pytest.approx(sum(losses), abs=1e-5)
