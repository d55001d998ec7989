"""Evaluation counts every sample once, however it is cut into batches and ranks."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataio.schema import Target
from trainer.tasks.classification import LabelEvaluation


def evaluation_of(classes: int) -> LabelEvaluation:
    return LabelEvaluation(Target(name="label", kind="label", classes=tuple("abcdef"[:classes])))


def slow_reference(logits: Tensor, labels: Tensor, classes: int) -> tuple[float, list[list[int]]]:
    """One sample at a time: summed loss and confusion matrix."""
    loss, confusion = 0.0, [[0] * classes for _ in range(classes)]
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label == -1:
            continue
        top = max(row)
        loss += math.log(sum(math.exp(value - top) for value in row)) + top - row[label]
        confusion[label][row.index(top)] += 1
    return loss, confusion


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, list[int]]:
    classes = draw(st.integers(2, 6))
    n = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = torch.randn(n, classes, generator=generator) * 3
    labels = torch.randint(-1, classes, (n,), generator=generator)
    labels[0] = 0
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return logits, labels, classes, cuts


@settings(max_examples=100, deadline=None)
@given(cases())
def test_equals_counting_one_by_one_for_any_split_over_batches_and_ranks(case: tuple[Tensor, Tensor, int, list[int]]) -> None:
    logits, labels, classes, cuts = case
    ranks = [evaluation_of(classes), evaluation_of(classes)]
    edges = [0, *cuts, len(labels)]
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        ranks[index % 2].update(logits[begin:end], {"label": labels[begin:end]})  # some are empty
    ranks[0].sums += ranks[1].sums  # what combine does between processes
    result = ranks[0].result()
    loss, confusion = slow_reference(logits, labels, classes)
    count = int((labels >= 0).sum())
    assert result.details["confusion"] == confusion
    assert result.count == count
    assert result.loss == pytest.approx(loss / count, rel=1e-12)
    assert result.measures["accuracy"] == sum(confusion[c][c] for c in range(classes)) / count
    for c, score in enumerate(result.details["per_class"]):
        actual, claimed, hit = sum(confusion[c]), sum(row[c] for row in confusion), confusion[c][c]
        assert score["support"] == actual
        assert score["recall"] == (hit / actual if actual else 0)
        assert score["precision"] == (hit / claimed if claimed else 0)
        both = score["precision"] + score["recall"]
        assert score["f1"] == pytest.approx(2 * score["precision"] * score["recall"] / both if both else 0)


def test_counts_stay_exact_far_beyond_what_float32_holds() -> None:
    evaluation = evaluation_of(2)
    evaluation.sums[1] = 2.0**40
    evaluation.update(torch.tensor([[1.0, 0.0]]), {"label": torch.tensor([0])})
    assert evaluation.result().details["confusion"][0][0] == 2**40 + 1


def test_bfloat16_logits_are_taken_as_they_are() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16)
    evaluation = evaluation_of(2)
    evaluation.update(logits, {"label": torch.tensor([1, 1])})
    loss, confusion = slow_reference(logits, torch.tensor([1, 1]), 2)
    assert evaluation.result().loss == pytest.approx(loss / 2, rel=1e-12)
    assert evaluation.result().details["confusion"] == confusion


def test_a_nan_shows_in_the_loss() -> None:
    evaluation = evaluation_of(2)
    evaluation.update(torch.tensor([[math.nan, 0.0]]), {"label": torch.tensor([1])})
    assert math.isnan(evaluation.result().loss)


def test_an_entry_is_json_with_the_keys_of_summary() -> None:
    evaluation = evaluation_of(2)
    evaluation.update(torch.tensor([[1.0, 0.0]]), {"label": torch.tensor([0])})
    again = json.loads(json.dumps(evaluation.result().entry()))
    assert again["confusion"] == [[1, 0], [0, 0]]
    assert again["per_class"][0] == {"recall": 1.0, "precision": 1.0, "f1": 1.0, "support": 1}
    assert list(again) == ["test_loss", "test_accuracy", "test_balanced_accuracy", "test_macro_f1", "test_count", "per_class", "confusion"]


def test_an_evaluation_of_nothing_is_an_error_with_the_fix() -> None:
    evaluation = evaluation_of(3)
    evaluation.update(torch.zeros(2, 3), {"label": torch.tensor([-1, -1])})
    with pytest.raises(ValueError, match=r"--data.test-fraction"):
        evaluation.result()
