"""A model, a loss and an augmentation of the user's own are named by a setting, tried before a run starts, and part of its identity."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.trainer.own_functions as own
from dataio.batch import Batch
from dataio.schema import Target, single_label
from trainer.drive.check import Checked, Question, Refused, built
from trainer.drive.identity import automatic_name, run_prefix
from trainer.learn.gradients import PassConfig, PlainGradients
from trainer.learn.objectives import supervised
from trainer.learn.own import own_augment, own_loss
from trainer.models.own import OwnCodeError
from trainer.models.vision import build_model
from trainer.settings.identity import deciding_settings
from trainer.settings.rules import validate
from trainer.settings.sources import source_sha256
from trainer.settings.tree import DataConfig, ModelConfig, OptimConfig, RunConfig
from trainer.tasks.make import make_task

HERE = "tests.trainer.own_functions"
CLASSES = ("ant", "bee", "cat")
TASK = make_task(RunConfig().task, single_label(CLASSES))
IMAGES = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8)


def question(model: str = f"{HERE}:small_network", *, loss: str = "", augment: str = "") -> Question:
    return Question(
        task=RunConfig().task,
        targets=single_label(CLASSES),
        label_smoothing=0.0,
        model=ModelConfig(name=model, weights="none"),
        shape=(16, 16),
        seed=0,
        loss=f"{HERE}:{loss}" if loss else "",
        augment=f"{HERE}:{augment}" if augment else "",
    )


# --- what they do -----------------------------------------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_built_by_the_seed_and_keeps_its_head() -> None:
    config = ModelConfig(name=f"{HERE}:small_network", weights="none")
    model, again = (build_model(config, classes=3, seed=4, image_hw=(16, 16)) for _ in range(2))
    other = build_model(config, classes=3, seed=5, image_hw=(16, 16))
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    weights = [dict(each.named_parameters())["4.weight"] for each in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_loss_is_summed_over_the_samples_that_are_known() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]], requires_grad=True)
    loss = own_loss(f"{HERE}:focal_loss", TASK)
    assert loss is not None
    value = loss(logits, {"label": torch.tensor([0, 2, -1])})
    expected = own.focal_loss(logits[:2], torch.tensor([0, 2])).sum()
    assert value.item() == pytest.approx(expected.item())
    value.backward()
    assert logits.grad is not None
    assert logits.grad[2].tolist() == [0.0, 0.0, 0.0]
    assert own_loss("", TASK) is None


def test_the_step_minimises_it_and_augments_each_virtual_ranks_batch_by_seed_step_and_rank() -> None:
    seen: list[Tensor] = []

    def preprocess(images: Tensor) -> Tensor:
        seen.append(images)
        return images.float() / 255

    model = build_model(ModelConfig(name=f"{HERE}:small_network", weights="none"), classes=3, seed=0, image_hw=(4, 4))
    labels = {"label": torch.tensor([1, 2])}
    loss = own_loss(f"{HERE}:focal_loss", TASK)
    objective = supervised(TASK, preprocess, torch.autocast("cpu", enabled=False), loss)  # type: ignore[arg-type]
    passes = PassConfig(seed=7, augment=own_augment(f"{HERE}:darken", 7))
    gradients = PlainGradients(model, TASK, objective, passes)

    def step(number: int, virtual_rank: int) -> float:
        batch = Batch(samples=IMAGES, targets=labels, ids=np.arange(2), epoch=0, step=number, virtual_rank=virtual_rank)
        return float(gradients.compute([batch], global_count=2, step=number, observer=NOBODY))

    first = step(3, 0)
    darkened = seen[-1]
    assert first == pytest.approx(own.focal_loss(model(darkened.float() / 255), labels["label"]).mean().item(), rel=1e-5)
    assert not torch.equal(darkened, IMAGES)
    assert step(3, 0) == first
    assert torch.equal(seen[-1], darkened)
    for other in ((4, 0), (3, 1)):
        step(*other)
        assert not torch.equal(seen[-1], darkened)


class Nobody:
    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


NOBODY = Nobody()


# --- mistakes, before a run starts ------------------------------------------------------------------------------------------------------


def test_all_three_are_tried_before_a_run_starts() -> None:
    found = built(question(loss="focal_loss", augment="darken"))
    assert isinstance(found, Checked), found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            question("nowhere.at:all"),
            "model.name=nowhere.at:all: nowhere.at cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (question(f"{HERE}:big_network"), f"{HERE} has no function big_network; it has small_network, focal_loss, darken, fails"),
        (question(f"{HERE}:no_network"), "is to return a torch.nn.Module; it returned int"),
        (question(f"{HERE}:fails"), "own_functions.py, line 28: raise KeyError"),
        (question(loss="fails"), f"optim.loss={HERE}:fails failed: KeyError: 'no such thing' ("),
        (question(loss="mean_loss"), "is to return one loss for each sample, of shape (3,); it returned a tensor () of torch.float32"),
        (question(loss="constant_loss"), "returns a loss that does not depend on the logits"),
        (question(augment="fails"), f"data.augment={HERE}:fails failed: KeyError: 'no such thing' ("),
        (
            question(augment="to_float"),
            "the type torch.uint8 that it got, on their device; it returned a tensor (3, 3, 16, 16) of torch.float32",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(asked: Question, said: str) -> None:
    found = built(asked)
    assert isinstance(found, Refused)
    assert (found.kind, said in found.message) == ("value", True), found.message


def test_a_syntax_error_is_told_by_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("def build(classes, image_size):\n    return (\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = built(question("halfway:build"))
    assert isinstance(found, Refused)
    assert "halfway cannot be imported: SyntaxError: '(' was never closed" in found.message
    assert f"({tmp_path}/halfway.py, line 2)" in found.message


def test_a_loss_is_for_a_classification() -> None:
    task = make_task(RunConfig().task, [Target(name="age", kind="number")])
    with pytest.raises(ValueError, match="takes logits and labels of a classification, but the task is multitask"):
        own_loss(f"{HERE}:focal_loss", task)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RunConfig(model=ModelConfig(name="my.module:")), "model.name='my.module:' names no function; write module:function"),
        (RunConfig(optim=OptimConfig(loss="focal")), "optim.loss='focal' names no function"),
        (RunConfig(data=DataConfig(augment="a b:c")), "data.augment='a b:c' names no function"),
        (RunConfig(model=ModelConfig(name="m:f")), "model.weights=imagenet belongs to a library's model, but model.name=m:f is your own"),
        (RunConfig(optim=OptimConfig(loss="m:f", label_smoothing=0.1)), "optim.label_smoothing=0.1 belongs to the cross-entropy"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: RunConfig, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        validate(config)


# --- identity ---------------------------------------------------------------------------------------------------------------------------


def test_the_source_is_part_of_the_name_and_nothing_is_imported_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ours_x"
    (package / "deep").mkdir(parents=True)
    for name in ("__init__.py", "deep/__init__.py", "deep/model.py"):
        (package / name).write_text("raise ImportError('nobody is to import this')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = RunConfig(model=ModelConfig(name="ours_x.deep.model:build", weights="none"))
    before = automatic_name(config, "ab", "x")
    assert automatic_name(config, "ab", "x") == before
    assert deciding_settings(config)["model.name"] == f"ours_x.deep.model:build sha256:{source_sha256('ours_x.deep.model:build')}"
    (package / "deep" / "model.py").write_text("pass\n")
    assert automatic_name(config, "ab", "x") != before
    whole = source_sha256("ours_x:build")
    (package / "deep" / "model.py").write_text("pass  # changed\n")
    assert source_sha256("ours_x:build") != whole, "a package counts by all its files"
    assert source_sha256("nowhere.at:all") == source_sha256("a b:c") == ""


def test_runs_without_functions_of_their_own_keep_their_settings_and_names() -> None:
    counted = deciding_settings(RunConfig())
    assert not {"optim.loss", "data.augment", "model.normalise"} & counted.keys()
    assert counted["model.name"] == "resnet18"
    assert run_prefix(replace(RunConfig(), model=ModelConfig(name="my.module:build")), ()) == "my.module-build"


def test_it_is_a_mistake_of_the_users() -> None:
    assert OwnCodeError("x").failure_kind == "user"
