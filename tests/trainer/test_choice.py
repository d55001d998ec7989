"""The choice of the best evaluation and the end by patience: pure functions of the history."""

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.runs.choice import LOSS, Choice, Rule, choose, rule_of, selection_of
from trainer.runs.chosen import early_words, kept_in_brief, kept_words
from trainer.settings.tree import TrainConfig
from trainer.tasks.info import CLASSIFICATION, MULTILABEL

ACCURACY = CLASSIFICATION.headline
NUMBERS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan, math.inf, -math.inf])
HISTORIES = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8)
RULES = st.builds(
    Rule,
    measure=st.sampled_from([ACCURACY, LOSS]),
    patience=st.integers(0, 4),
    min_delta=st.sampled_from([0.0, 0.25, 0.3]),
)


def history(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    """Evaluations of the validation split: (accuracy, loss) after 10, 20, ... steps, three an epoch."""
    return [
        {"step": 10 * (n + 1), "epoch": (n + 1) / 1, "validation_accuracy": accuracy, "validation_loss": loss, "validation_count": 100}
        for n, (accuracy, loss) in enumerate(pairs)
    ]


def accuracies(*values: float) -> list[dict[str, Any]]:
    return history(*((value, 1.0) for value in values))


@given(RULES, HISTORIES)
def test_no_evaluation_is_better_than_the_best_and_of_equal_ones_it_is_the_first(rule: Rule, pairs: list[tuple[float, float]]) -> None:
    entries = history(*pairs)
    best = choose(rule, entries).best
    assert (best is None) == (not entries)
    if best is None:
        return

    def goodness(entry: dict[str, Any]) -> tuple[float, float]:
        value, loss = entry[rule.key], entry["validation_loss"]
        sign = 1 if rule.measure.higher_is_better else -1
        return (sign * value if math.isfinite(value) else -math.inf), (-loss if math.isfinite(loss) else -math.inf)

    most = max(map(goodness, entries))
    assert best is next(entry for entry in entries if goodness(entry) == most)


@given(RULES, HISTORIES)
def test_the_choice_of_a_history_is_reached_from_every_part_of_it(rule: Rule, pairs: list[tuple[float, float]]) -> None:
    """A run that goes on from any checkpoint has written its history through JSON, and adds to it."""
    entries = history(*pairs)
    steps = [choose(rule, entries[:count]).step for count in range(len(entries) + 1)]
    for count, (before, now) in enumerate(itertools.pairwise(steps)):
        assert now in (before, entries[count]["step"]), "only the newest evaluation can replace the best: the weights of others are gone"
    assert choose(rule, json.loads(json.dumps(entries))).step == steps[-1]


@given(RULES, HISTORIES)
def test_the_run_ends_at_the_first_evaluation_that_patience_ends_it_at(rule: Rule, pairs: list[tuple[float, float]]) -> None:
    entries = history(*pairs)
    ends = [count for count in range(len(entries) + 1) if choose(rule, entries[:count]).stops]
    if not rule.patience:
        assert not ends
    elif ends:
        waited = choose(rule, entries[: ends[0]]).waited
        assert waited == rule.patience  # and at none before
    else:
        assert choose(rule, entries).waited < rule.patience


def test_patience_counts_from_the_last_improvement_and_small_steps_add_up() -> None:
    rule = Rule(measure=ACCURACY, patience=3, min_delta=0.02)
    climbing = accuracies(0.50, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56)
    assert not choose(rule, climbing).stops
    assert choose(rule, climbing).step == 70
    flat = accuracies(0.50, 0.51, 0.515, 0.519)
    assert choose(rule, flat) == Choice(best=flat[-1], waited=3, stops=True)  # the best counts any improvement


def test_of_equally_accurate_evaluations_the_one_of_lower_loss_is_chosen_and_does_not_renew_patience() -> None:
    entries = history((1.0, 0.9), (1.0, 0.5), (1.0, 0.7), (1.0, 0.5))
    assert choose(Rule(measure=ACCURACY, patience=3), entries) == Choice(best=entries[1], waited=3, stops=True)


def test_the_loss_chooses_downwards() -> None:
    assert choose(Rule(measure=LOSS), history((0.9, 0.5), (0.8, 0.3), (0.95, 0.6))).step == 20


def test_a_measure_that_is_no_number_is_better_than_nothing_and_worse_than_any_number() -> None:
    assert choose(Rule(measure=ACCURACY), accuracies(math.nan)).step == 10
    assert choose(Rule(measure=ACCURACY), accuracies(math.nan, 0.1, math.nan)).step == 20


def test_evaluations_of_the_test_split_choose_nothing() -> None:
    """Those that an older release made of a run that goes on."""
    tested = {"step": 5, "epoch": 0.5, "test_accuracy": 1.0, "test_loss": 0.0}
    assert choose(Rule(measure=ACCURACY), [tested]).best is None
    assert choose(Rule(measure=ACCURACY), [tested, *accuracies(0.5)]).step == 10


def test_the_rule_takes_the_tasks_headline_or_the_measure_that_is_named() -> None:
    assert rule_of(TrainConfig(select="best"), MULTILABEL).key == "validation_map"
    assert rule_of(TrainConfig(select="best", select_measure="macro_f1"), MULTILABEL).key == "validation_macro_f1"
    assert rule_of(TrainConfig(select="last", select_measure="loss"), CLASSIFICATION) == Rule(measure=LOSS, keeps_best=False)
    with pytest.raises(ValueError, match=r"select_measure='f1' is no measure .* one of map, micro_f1, macro_f1, exact_match, loss"):
        rule_of(TrainConfig(select_measure="f1"), MULTILABEL)


def summary_of(rule: Rule, entries: list[dict[str, Any]], *, is_early: bool = False) -> dict[str, Any]:
    kept = choose(rule, entries).best if rule.keeps_best else entries[-1]
    assert kept is not None
    return {"selection": json.loads(json.dumps(selection_of(rule, entries, kept=kept, is_early=is_early)))}


def test_a_run_says_which_epoch_was_kept_by_what_and_whether_the_last_is_within_noise() -> None:
    near = summary_of(Rule(measure=ACCURACY), accuracies(0.5, 0.9, 0.88))
    assert kept_words(near) == (
        "epoch 2 of 3, the best by validation accuracy: 90.00 % (95 % interval: 82.6 to 94.5 %); the last epoch's 88.00 % is within noise "
        "of it"
    )
    far = summary_of(Rule(measure=ACCURACY), accuracies(0.867, 0.333))
    assert kept_words(far).endswith("the last epoch's 33.30 % is worse by more than noise")
    assert kept_in_brief(far) == "epoch 1 of 2"
    assert kept_words(summary_of(Rule(measure=ACCURACY), accuracies(0.5, 0.9))).endswith("(95 % interval: 82.6 to 94.5 %)")
    loss = summary_of(Rule(measure=LOSS), history((0.5, 0.3), (0.9, 0.4)))
    assert kept_words(loss) == "epoch 1 of 2, the best by validation loss: 0.3; the last epoch's 0.4"
    last = summary_of(Rule(measure=ACCURACY, keeps_best=False), accuracies(0.9, 0.5))
    assert kept_words(last).startswith("epoch 2 of 2, the last: validation accuracy 50.00 %")


def test_a_run_says_that_it_ended_early_only_if_it_did() -> None:
    rule = Rule(measure=ACCURACY, patience=2)
    entries = accuracies(0.9, 0.8, 0.8)
    assert early_words(summary_of(rule, entries, is_early=True)) == "after epoch 3: 2 evaluations without a better one (train.patience)"
    assert early_words(summary_of(rule, entries)) == ""  # there were no more epochs
    assert early_words({}) == kept_words({}) == kept_in_brief({}) == ""


@pytest.mark.parametrize(
    "broken", [{}, {"measure": 3}, {"select": "best", "measure": {"name": "a", "title": "A"}, "kept": 1, "last": None}]
)
def test_a_selection_that_makes_no_sense_costs_its_sentence_only(broken: dict[str, Any]) -> None:
    assert kept_words({"selection": broken}) == "?"
