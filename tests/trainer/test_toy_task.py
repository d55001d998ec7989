"""A task of a person's own is a short file, and the whole program takes it by name."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

import tests.trainer.toy_task
from dataio.schema import Target
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.tasks.make import make_task
from trainer.tasks.prediction_log import PredictionLog
from trainer.tasks.predictions import About, Predictions, Recorded
from trainer.tasks.task import Task

NAME = "tests.trainer.toy_task:Toy"
SCALE = Target(name="label", kind="label", classes=tuple("abcde"))
CPU = torch.device("cpu")
OUTPUTS = torch.tensor([[-2.0], [0.0], [2.0], [1.0]])  # guesses 0, 2, 4, 3
TARGETS = {"label": torch.tensor([0, 4, 3, -1])}


def toy() -> Task:
    return make_task(TaskConfig(name=NAME), [SCALE])


def recorded() -> Recorded:
    log = PredictionLog(toy().columns, 100)
    log.update(torch.arange(4).numpy(), toy().rows(OUTPUTS, TARGETS))
    found = log.gathered(0, 1)
    assert found is not None
    return found


def test_it_is_short() -> None:
    assert len(Path(tests.trainer.toy_task.__file__).read_text().splitlines()) < 60


def test_it_is_built_trained_and_evaluated() -> None:
    task = toy()
    model = task.build(ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native"), shape=(32, 32), seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1)
    task.bind(model)
    samples, ready = task.prepare(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), TARGETS)
    assert len(samples) == 4
    assert task.loss_sum(OUTPUTS, ready).item() == 0 + 4 + 1
    assert task.loss_sum(torch.zeros(3, 1), task.blank(3, CPU)).item() == 3 * 2.0**2
    evaluation = task.evaluation(CPU)
    evaluation.update(OUTPUTS, TARGETS)
    evaluation.combine(0, 1)
    assert evaluation.result().entry() == {"test_loss": 5 / 3, "test_within_one": 2 / 3, "test_count": 3}


def test_its_predictions_are_a_file_with_its_columns() -> None:
    found = recorded()
    about = About(step=1, split="test", dataset_fingerprint="ab", count=3)
    again = Predictions.from_parquet(Predictions(about=about, ids=found.ids, keys=list("abc"), columns=found.columns).to_parquet())
    assert {name: column.tolist() for name, column in again.columns.items()} == {
        "step": [0, 4, 3],
        "guess": [0.0, 2.0, 4.0],
        "loss": [0.0, 4.0, 1.0],
    }
    assert {name: pa.from_numpy_dtype(column.dtype) for name, column in again.columns.items()} == toy().columns


def test_it_answers_in_words() -> None:
    assert [toy().sentence(answer) for answer in toy().answers(OUTPUTS[:2], top=3)] == ["step 0.0 of 4", "step 2.0 of 4"]


def test_data_that_it_cannot_learn_from_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.name=scale learns one target of the kind label"):
        make_task(TaskConfig(name=NAME), [Target(name="age", kind="number")])
