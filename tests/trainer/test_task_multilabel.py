"""Several labels an image: losses against their definition, measures against counting, whatever is not known left out."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataio.schema import Target
from tests.trainer.task_ranks import over_ranks
from trainer.settings.tree import TaskConfig
from trainer.tasks.info import MULTILABEL
from trainer.tasks.losses import LabelsLoss, labels_loss_sum, labels_losses
from trainer.tasks.multilabel import Multilabel, average_precision
from trainer.tasks.task import Evaluation

CPU = torch.device("cpu")
NAMES = ("red", "round", "old", "rare", "never")


def task_of(labels: int = 5, *, label_smoothing: float = 0.0, **settings: object) -> Multilabel:
    target = Target(name="what", kind="labels", classes=NAMES[:labels])
    return Multilabel(TaskConfig(**settings), (target,), label_smoothing=label_smoothing)  # type: ignore[arg-type]


def drawn(n: int, labels: int, seed: int, *, unknown: float = 0.2) -> tuple[Tensor, Tensor]:
    """Logits with ties among them, and labels of which some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-6, 7, (n, labels), generator=generator) / 2
    values = torch.randint(0, 2, (n, labels), generator=generator, dtype=torch.uint8)
    values[torch.rand((n, labels), generator=generator) < unknown] = 255
    return logits, values


def slow_loss(logit: float, label: int, loss: LabelsLoss, smoothing: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if loss == "bce":
        wanted = label * (1 - smoothing) + smoothing / 2
        return -wanted * math.log(p) - (1 - wanted) * math.log(1 - p)
    lowered = max(p - 0.05, 0.0)
    return -math.log(p) if label else -(lowered**4) * math.log(1 - lowered)


def slow_average_precision(scores: list[float], labels: list[int]) -> float:
    """scikit-learn's: the thresholds are the distinct scores, from the highest down."""
    total, before = sum(labels), 0.0
    if not total:
        return 0.0
    result = 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall = sum(said) / total
        result += (recall - before) * sum(said) / len(said)
        before = recall
    return result


LOSSES = st.sampled_from(["bce", "asymmetric"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 10_000), LOSSES, st.sampled_from([0.0, 0.1]))
def test_a_samples_loss_is_the_mean_over_its_known_labels(n: int, labels: int, seed: int, loss: LabelsLoss, smoothing: float) -> None:
    smoothing = 0.0 if loss == "asymmetric" else smoothing
    logits, values = drawn(n, labels, seed)
    found = labels_losses(logits.double(), values, loss=loss, label_smoothing=smoothing)
    for row, theirs, one in zip(logits.tolist(), values.tolist(), found.tolist(), strict=True):
        known = [slow_loss(logit, label, loss, smoothing) for logit, label in zip(row, theirs, strict=True) if label != 255]
        assert one == pytest.approx(sum(known) / len(known) if known else 0.0, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000), LOSSES, st.lists(st.integers(0, 12), max_size=3))
@example(8, 4, 1, "asymmetric", [1])
def test_any_cut_into_micro_batches_has_the_same_losses_and_gradients(
    n: int, labels: int, seed: int, loss: LabelsLoss, cuts: list[int]
) -> None:
    logits, values = drawn(n, labels, seed)
    whole = logits.clone().requires_grad_()
    labels_loss_sum(whole, values, loss=loss).backward()  # type: ignore[no-untyped-call]
    parts = logits.clone().requires_grad_()
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    sums = [labels_loss_sum(parts[begin:end], values[begin:end], loss=loss) for begin, end in itertools.pairwise(edges)]
    torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
    # Not to the bit: the CPU's vector instructions round exp and log otherwise than the scalar ones that do the last few numbers.
    nearly = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(parts.grad, whole.grad, **nearly)
    each = labels_losses(logits, values, loss=loss)
    cut = torch.cat([labels_losses(logits[b:e], values[b:e], loss=loss) for b, e in itertools.pairwise(edges)])
    torch.testing.assert_close(cut, each, **nearly)
    assert (whole.grad[values == 255] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize(("loss", "smoothing"), [("bce", 0.0), ("bce", 0.2), ("asymmetric", 0.0)])
def test_gradients_are_those_of_finite_differences(loss: LabelsLoss, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    values = drawn(6, 4, 1)[1]
    assert torch.autograd.gradcheck(lambda some: labels_losses(some, values, loss=loss, label_smoothing=smoothing).sum(), logits)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10_000))
def test_average_precision_is_scikit_learns_ties_and_unknown_labels_included(n: int, labels: int, seed: int) -> None:
    scores, values = drawn(n, labels, seed)
    for index, found in enumerate(average_precision(scores, values).tolist()):
        known = values[:, index] != 255
        expected = slow_average_precision(scores[known, index].tolist(), values[known, index].tolist())
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_average_precision_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, values = drawn(50, 5, 0)
    whole = average_precision(scores, values)
    monkeypatch.setattr("trainer.tasks.multilabel._CELLS_AT_ONCE", 100)
    assert torch.equal(average_precision(scores, values), whole)


def test_average_precision_by_hand() -> None:
    """scikit-learn's own example: average_precision_score([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) is 0.83."""
    scores = torch.tensor([[0.1], [0.4], [0.35], [0.8]])
    assert average_precision(scores, torch.tensor([[0], [0], [1], [1]], dtype=torch.uint8)).item() == pytest.approx(5 / 6, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.9]))
def test_measures_are_those_of_counting_one_by_one(n: int, labels: int, seed: int, threshold: float) -> None:
    logits, values = drawn(n, labels, seed)
    values[0, 0] = 1
    task = task_of(labels, threshold=threshold)
    evaluation = task.evaluation(CPU)
    for begin in range(0, n, 7):
        evaluation.update(logits[begin : begin + 7], {"what": values[begin : begin + 7]})
    result = evaluation.result()
    said = [[1 / (1 + math.exp(-logit)) >= threshold for logit in row] for row in logits.tolist()]
    truth = values.tolist()
    rows = [row for row in range(n) if any(label != 255 for label in truth[row])]
    assert result.count == len(rows)
    right = [all(truth[row][k] in (255, said[row][k]) for k in range(labels)) for row in rows]
    assert result.measures["exact_match"] == sum(right) / len(rows)
    hits = support = predicted = 0
    for k, entry in enumerate(result.details["labels"]):
        known = [row for row in range(n) if truth[row][k] != 255]
        own_hits = sum(1 for row in known if truth[row][k] and said[row][k])
        own_support, own_predicted = sum(truth[row][k] for row in known), sum(said[row][k] for row in known)
        hits, support, predicted = hits + own_hits, support + own_support, predicted + own_predicted
        assert (entry["name"], entry["support"], entry["predicted"], entry["threshold"]) == (
            NAMES[k],
            own_support,
            own_predicted,
            threshold,
        )
        assert entry["precision"] == (own_hits / own_predicted if own_predicted else None)
        assert entry["recall"] == (own_hits / own_support if own_support else None)
        assert entry["f1"] == (2 * own_hits / (own_support + own_predicted) if own_support + own_predicted else None)
        assert (entry["average_precision"] is None) == (own_support == 0)
    occurring = [entry for entry in result.details["labels"] if entry["support"]]
    assert result.measures["map"] == pytest.approx(sum(entry["average_precision"] for entry in occurring) / len(occurring))
    assert result.measures["macro_f1"] == pytest.approx(sum(entry["f1"] for entry in occurring) / len(occurring))
    assert result.measures["micro_f1"] == (2 * hits / (support + predicted) if support + predicted else 0)
    assert result.loss == pytest.approx(float(labels_losses(logits.double(), values).sum()) / len(rows), rel=1e-12)
    assert set(result.measures) == {measure.name for measure in MULTILABEL.measures}
    json.loads(json.dumps(result.entry(), allow_nan=False))


def test_labels_that_never_occur_have_no_part_in_the_means() -> None:
    evaluation = task_of(2).evaluation(CPU)
    evaluation.update(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), {"what": torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8)})
    result = evaluation.result()
    assert (result.measures["map"], result.measures["macro_f1"]) == (1.0, 1.0)
    assert result.details["labels"][1]["average_precision"] is None
    assert result.measures["exact_match"] == 0.5


@pytest.mark.parametrize("count", [0, 3])
def test_an_evaluation_of_nothing_known_is_an_error_with_the_fix(count: int) -> None:
    evaluation = task_of().evaluation(CPU)
    evaluation.update(torch.zeros(count, 5), {"what": torch.full((count, 5), 255, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"--data\.test-fraction"):
        evaluation.result()


def evaluations() -> Sequence[Evaluation]:
    return [task_of().evaluation(CPU), task_of(loss="asymmetric", threshold=0.7).evaluation(CPU)]


def test_three_ranks_say_bit_for_bit_what_one_says(tmp_path: Path) -> None:
    logits, values = drawn(40, 5, 7)
    expected = []
    for evaluation in evaluations():
        evaluation.update(logits, {"what": values})
        expected.append(evaluation.result())
    assert over_ranks(evaluations, logits, {"what": values}, tmp_path) == [expected] * 3


def test_rows_hold_probabilities_and_truth_and_the_worst_is_that_of_the_largest_loss() -> None:
    logits, values = drawn(20, 5, 3)
    values[4] = 255
    task = task_of()
    rows = task.rows(logits, {"what": values})
    assert list(rows.columns) == list(task.columns)
    assert torch.equal(rows.columns["probabilities"], logits.sigmoid())
    assert torch.equal(rows.columns["labels"], torch.where(values == 255, -1, values.to(torch.int8)))
    assert rows.known.tolist() == [index != 4 and bool((row != 255).any()) for index, row in enumerate(values)]
    assert torch.equal(rows.badness.float(), rows.columns["loss"])


def test_answers_are_the_labels_from_the_threshold_on() -> None:
    task = task_of(3)
    logits = torch.tensor([[2.0, -1.0, 1.0], [-2.0, -1.0, -3.0]])
    first, second = task.answers(logits, top=3)
    assert [found["class"] for found in first["labels"]] == ["red", "old"]
    assert first["labels"][0]["probability"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert second == {"labels": []}
    assert (task.sentence(first), task.sentence(second)) == ("red 88.1 %  old 73.1 %", "no label")
    assert [found["class"] for found in task.answers(logits, top=1)[0]["labels"]] == ["red"]


def test_smoothing_does_not_go_with_the_asymmetric_loss() -> None:
    with pytest.raises(ValueError, match=r"optim.label_smoothing=0.1 does not go with task.loss=asymmetric"):
        task_of(loss="asymmetric", label_smoothing=0.1)


def test_a_batch_of_nothing_costs_nothing() -> None:
    task = task_of()
    blank = task.blank(0, CPU)
    assert task.loss_sum(torch.zeros(0, 5), blank).item() == 0.0
    assert blank["what"].shape == (0, 5)
    assert task.blank(4, CPU)["what"].dtype == torch.uint8
