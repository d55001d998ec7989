"""Several targets at once: the sum of what each would be alone, and nothing of what is not known."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dataio.batch import Targets
from dataio.schema import Target
from tests.trainer.task_ranks import over_ranks
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.tasks.classification import Classification
from trainer.tasks.multilabel import Multilabel
from trainer.tasks.multitask import LOG_VARIANCES, Multitask
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.task import Evaluation, Result

CPU = torch.device("cpu")
KIND = Target(name="kind", kind="label", classes=("cat", "dog", "bird"))
TRAITS = Target(name="Traits!", kind="labels", classes=("old", "wet"))
AGE = Target(name="age", kind="number", mean=40.0, std=8.0)
TARGETS = (KIND, TRAITS, AGE)
OUTPUTS = 3 + 2 + 1


def task_of(targets: Sequence[Target] = TARGETS, *, label_smoothing: float = 0.0, **settings: Any) -> Multitask:
    return Multitask(TaskConfig(**settings), targets, label_smoothing=label_smoothing)


def learned() -> Multitask:
    task = task_of(head_weights="learned")
    layer = nn.Linear(2, OUTPUTS)
    layer.register_parameter(LOG_VARIANCES, nn.Parameter(torch.tensor([0.5, -1.0, 0.25])))
    task.bind(nn.Sequential(layer))
    return task


def drawn(n: int, seed: int, *, unknown: float = 0.3) -> tuple[Tensor, Targets]:
    """Outputs, and targets as the loader gives them."""
    generator = torch.Generator().manual_seed(seed)

    def missing(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < unknown

    outputs = torch.randint(-4, 5, (n, OUTPUTS), generator=generator) / 2
    kind = torch.randint(0, 3, (n,), generator=generator).masked_fill(missing(n), -1)
    traits = torch.randint(0, 2, (n, 2), generator=generator, dtype=torch.uint8).masked_fill(missing(n, 2), 255)
    age = (40 + 8 * torch.randn(n, generator=generator)).masked_fill(missing(n), math.nan)
    return outputs, {"kind": kind, "Traits!": traits, "age": age}


def cut(targets: Targets, begin: int, end: int) -> Targets:
    return {name: values[begin:end] for name, values in targets.items()}


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5


def prepared(task: Multitask, targets: Targets) -> Targets:
    return task.prepare(torch.empty(0), targets)[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(0, 10_000))
def test_the_loss_is_the_weighted_sum_of_the_single_tasks_losses(n: int, seed: int) -> None:
    outputs, targets = drawn(n, seed)
    task = task_of(weights="age=0.25, kind=2", label_smoothing=0.1)
    kind = Classification(TaskConfig(), (KIND,), label_smoothing=0.1).loss_sum(outputs[:, :3], targets)
    traits = Multilabel(TaskConfig(), (TRAITS,), label_smoothing=0.1).loss_sum(outputs[:, 3:5], targets)
    age = sum(
        huber(said - (true - 40.0) / 8.0)
        for said, true in zip(outputs[:, 5].tolist(), targets["age"].tolist(), strict=True)
        if not math.isnan(true)
    )
    assert task.loss_sum(outputs, prepared(task, targets)).item() == pytest.approx(2 * kind.item() + traits.item() + 0.25 * age, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.lists(st.integers(0, 12), max_size=3), st.booleans())
def test_any_cut_into_micro_batches_has_the_same_gradients_and_what_is_unknown_has_none(
    n: int, seed: int, cuts: list[int], is_learned: bool
) -> None:
    values, targets = drawn(n, seed)
    task = learned() if is_learned else task_of(weights="age=3")
    ready = prepared(task, targets)
    whole, parts = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = task.loss_sum(whole, ready)
    loss.backward()  # type: ignore[no-untyped-call]
    edges = [0, *sorted(min(place, n) for place in cuts), n]
    sums = torch.stack([task.loss_sum(parts[begin:end], cut(ready, begin, end)) for begin, end in itertools.pairwise(edges)])
    sums.sum().backward()  # type: ignore[no-untyped-call]
    assert sums.sum().item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert whole.grad is not None
    assert torch.equal(whole.grad, parts.grad)  # type: ignore[arg-type]
    assert (whole.grad[targets["kind"] == -1, :3] == 0).all()
    assert (whole.grad[:, 3:5][targets["Traits!"] == 255] == 0).all()
    assert (whole.grad[targets["age"].isnan(), 5] == 0).all()


def test_a_sample_of_which_nothing_is_known_adds_exactly_nothing() -> None:
    task = learned()
    logs = task._log_variances
    assert isinstance(logs, nn.Parameter)
    outputs = torch.randn(3, OUTPUTS, requires_grad=True)
    nothing = {target.name: torch.from_numpy(target.blank(3)) for target in TARGETS}
    loss = task.loss_sum(outputs, prepared(task, nothing))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert (outputs.grad == 0).all()  # type: ignore[union-attr]
    assert (logs.grad == 0).all()  # type: ignore[union-attr]


def test_learned_weights_are_those_of_the_paper_and_have_its_gradients() -> None:
    outputs, targets = drawn(9, 2)
    task = learned()
    ready = prepared(task, targets)
    logs = task._log_variances
    assert isinstance(logs, nn.Parameter)
    sums = [part.head.loss_sum(part.of(outputs), ready[part.name]).item() for part in task.parts]
    counts = [int(part.head.knows(targets[part.name]).sum()) for part in task.parts]
    loss = task.loss_sum(outputs, ready)
    expected = 0.0
    for log, total, count in zip([0.5, -1.0, 0.25], sums, counts, strict=True):
        sigma = math.exp(log / 2)
        expected += total / sigma**2 + count * math.log(sigma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    for index, (log, total, count) in enumerate(zip([0.5, -1.0, 0.25], sums, counts, strict=True)):
        assert logs.grad is not None
        assert logs.grad[index].item() == pytest.approx(-math.exp(-log) * total + count / 2, rel=1e-4, abs=1e-5)
    assert task.weights() == pytest.approx([math.exp(-0.5), math.exp(1.0), math.exp(-0.25)])
    assert task.info.loss_floor is None
    assert task_of().info.loss_floor == 0.0


def test_learned_weights_are_a_parameter_of_the_head_and_start_at_one() -> None:
    task = task_of(head_weights="learned")
    model = task.build(ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native"), shape=(32, 32), seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, OUTPUTS) == (2, task.outputs)
    assert f"fc.{LOG_VARIANCES}" in model.state_dict()
    task.bind(model)
    assert task.weights() == [1.0, 1.0, 1.0]
    plain = task_of().build(ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native"), shape=(32, 32), seed=0)
    assert set(model.state_dict()) - set(plain.state_dict()) == {f"fc.{LOG_VARIANCES}"}


def evaluated(task: Multitask, outputs: Tensor, targets: Targets, batch: int = 5) -> Result:
    evaluation = task.evaluation(CPU)
    for begin in range(0, len(outputs), batch):
        evaluation.update(outputs[begin : begin + batch], cut(targets, begin, begin + batch))
    return evaluation.result()


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(0, 10_000))
def test_each_head_is_evaluated_as_its_task_alone(n: int, seed: int) -> None:
    outputs, targets = drawn(n, seed)
    for name, value in (("kind", 1), ("Traits!", 1), ("age", 44.0)):
        targets[name][0] = value
    task = task_of(weights="age=0.5")
    result = evaluated(task, outputs, targets)
    heads = result.details["heads"]
    assert list(heads) == ["kind", "Traits!", "age"]
    for single, part in (
        (Classification(TaskConfig(), (KIND,)), slice(0, 3)),
        (Multilabel(TaskConfig(), (TRAITS,)), slice(3, 5)),
    ):
        alone = single.evaluation(CPU)
        alone.update(outputs[:, part], targets)
        expected, found = alone.result(), heads[single.targets[0].name]
        assert found["count"] == expected.count
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-12)
        assert found["measures"] == expected.measures
        assert expected.details.items() <= found["details"].items()
    assert heads["kind"]["details"]["classes"] == ["cat", "dog", "bird"]
    known = [
        (5 * 0 + 8 * said + 40, true) for said, true in zip(outputs[:, 5].tolist(), targets["age"].tolist(), strict=True) if true == true
    ]
    errors, mean = [said - true for said, true in known], sum(true for _, true in known) / len(known)
    assert heads["age"]["measures"]["mae"] == pytest.approx(sum(map(abs, errors)) / len(known))
    assert heads["age"]["measures"]["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(known)))
    spread = sum((true - mean) ** 2 for _, true in known)
    if spread:
        assert heads["age"]["measures"]["r2"] == pytest.approx(1 - sum(e * e for e in errors) / spread)
    assert result.measures["age_mae"] == heads["age"]["measures"]["mae"]
    assert result.measures["traits_map"] == heads["Traits!"]["measures"]["map"]
    parts = (result.measures["kind_accuracy"], result.measures["traits_map"], max(0.0, result.measures["age_r2"]))
    assert result.measures["score"] == pytest.approx(sum(parts) / 3)
    assert set(result.measures) == {measure.name for measure in task.info.measures}
    weighted = sum(head["weight"] * head["loss"] * head["count"] for head in heads.values())
    assert result.loss == pytest.approx(weighted / result.count, rel=1e-9)
    json.loads(json.dumps(result.entry(), allow_nan=False))


def test_a_head_of_which_nothing_is_known_has_no_part_in_the_score() -> None:
    outputs, targets = drawn(8, 0, unknown=0.0)
    targets["age"].fill_(math.nan)  # type: ignore[attr-defined]
    result = evaluated(task_of(), outputs, targets)
    assert math.isnan(result.measures["age_r2"])
    assert result.details["heads"]["age"] == {"kind": "number", "weight": 1.0, "loss": None, "count": 0, "measures": {}, "details": {}}
    assert result.measures["score"] == (result.measures["kind_accuracy"] + result.measures["traits_map"]) / 2


@pytest.mark.parametrize("count", [0, 3])
def test_an_evaluation_of_nothing_known_is_an_error_with_the_fix(count: int) -> None:
    nothing = {target.name: torch.from_numpy(target.blank(count)) for target in TARGETS}
    with pytest.raises(ValueError, match=r"--data\.test-fraction"):
        evaluated(task_of(), torch.zeros(count, OUTPUTS), nothing)


def test_a_number_that_is_always_the_same_is_met_or_not() -> None:
    task = task_of([Target(name="age", kind="number", mean=3.0, std=0.0)])
    true = {"age": torch.full((4,), 3.0)}
    assert evaluated(task, torch.zeros(4, 1), true).measures["age_r2"] == 1.0
    assert evaluated(task, torch.ones(4, 1), true).measures["age_r2"] == 0.0


def evaluations() -> Sequence[Evaluation]:
    return [task_of(weights="age=0.5").evaluation(CPU)]


def test_three_ranks_say_what_one_says(tmp_path: Path) -> None:
    outputs, targets = drawn(31, 5)
    (evaluation,) = evaluations()
    evaluation.update(outputs, targets)
    alone = evaluation.result()
    for (result,) in over_ranks(evaluations, outputs, targets, tmp_path):
        assert (result.count, result.measures) == (alone.count, alone.measures)
        assert result.loss == pytest.approx(alone.loss, rel=1e-12)
        assert result.details["heads"]["kind"]["details"] == alone.details["heads"]["kind"]["details"]
        assert result.details["heads"]["Traits!"] == alone.details["heads"]["Traits!"]
        assert result.details["heads"]["age"] == alone.details["heads"]["age"]


def test_rows_hold_each_heads_columns_in_its_own_unit() -> None:
    outputs, targets = drawn(12, 1)
    task = task_of()
    log = PredictionLog(task.columns, 100)
    log.update(torch.arange(12).numpy(), task.rows(outputs, targets))
    found = log.gathered(0, 1)
    assert found is not None
    assert list(found.columns) == [
        "kind_label",
        "kind_prediction",
        "kind_confidence",
        "Traits!_labels",
        "Traits!_probabilities",
        "age_target",
        "age_prediction",
        "loss",
    ]
    assert task.columns["Traits!_labels"] == pa.list_(pa.int8(), 2)
    known = task.knows(targets)
    assert found.ids.tolist() == torch.arange(12)[known].tolist()
    assert torch.equal(torch.from_numpy(found.columns["age_prediction"]), (outputs[known, 5] * 8 + 40))
    assert torch.equal(torch.from_numpy(found.columns["loss"]), task.losses(outputs, targets)[known].float())


def test_answers_say_something_of_each_head() -> None:
    task = task_of()
    (answer,) = task.answers(torch.tensor([[3.0, 0.0, 0.0, 1.0, -1.0, 0.5]]), top=1)
    assert answer["heads"]["age"] == {"value": 44.0}
    assert [found["class"] for found in answer["heads"]["Traits!"]["labels"]] == ["old"]
    assert answer["heads"]["kind"]["predictions"][0]["class"] == "cat"
    assert task.sentence(answer) == "kind: cat 90.9 %; Traits!: old 73.1 %; age: 44"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": "size=2"}, "the data have no target size; they have kind, Traits!, age"),
        ({"weights": "age=much"}, "'much' is no number"),
        ({"weights": "age=1", "head_weights": "learned"}, "leave one of them out"),
    ],
)
def test_weights_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task_of(**settings)


def test_targets_whose_measures_would_have_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'Age' and 'age' would both be measured as age_mae"):
        task_of([Target(name="Age", kind="number"), AGE])
