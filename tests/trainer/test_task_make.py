"""The task follows the data, or is the one that the settings name; what cannot be is said with the fix."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dataio.schema import Target
from trainer.settings.tree import TaskConfig
from trainer.tasks.info import CLASSIFICATION, TaskInfo
from trainer.tasks.make import make_task

LABEL = Target(name="label", kind="label", classes=("cat", "dog"))
LABELS = Target(name="traits", kind="labels", classes=("old", "wet", "big"))
NUMBER = Target(name="age", kind="number")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("targets", "name", "outputs"),
    [([LABEL], "classification", 2), ([LABELS], "multilabel", 3), ([NUMBER], "multitask", 1), ([LABEL, LABELS, NUMBER], "multitask", 6)],
)
def test_auto_follows_the_targets(targets: Sequence[Target], name: str, outputs: int) -> None:
    task = make_task(TaskConfig(), targets)
    assert (task.info.name, task.outputs, task.targets) == (name, outputs, tuple(targets))
    assert TaskInfo.from_json(task.info.to_json()) == task.info


def test_one_label_is_what_it_always_was() -> None:
    assert make_task(TaskConfig(), [LABEL]).info is CLASSIFICATION


@pytest.mark.parametrize("targets", [[LABEL], [LABELS], [NUMBER], [LABEL, LABELS, NUMBER]])
@pytest.mark.parametrize("count", [0, 3])
def test_blank_targets_have_the_shapes_and_types_of_what_the_loader_gives(targets: Sequence[Target], count: int) -> None:
    task = make_task(TaskConfig(), targets)
    blank = task.blank(count, CPU)
    for target in targets:
        given = torch.from_numpy(target.blank(count))
        assert (blank[target.name].shape, blank[target.name].dtype) == (given.shape, given.dtype)
    samples, ready = task.prepare(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), blank)
    assert samples.shape == (count, 3, 4, 4)
    assert {name: (values.shape, values.dtype) for name, values in ready.items()} == {
        name: (values.shape, values.dtype) for name, values in blank.items()
    }
    loss = task.loss_sum(torch.zeros(count, task.outputs), ready)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.isfinite()
    assert bool(loss == 0) == (count == 0 or targets == [NUMBER])


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("classification", [LABELS], r"learns one target of the kind label; the data's targets are: traits \(labels\)"),
        ("classification", [LABEL, NUMBER], r"label \(label\), age \(number\). Use --task.name auto"),
        ("multilabel", [LABEL], "learns one target of the kind labels"),
        ("auto", [], "the data have no target"),
        ("auto", [Target(name="label", kind="label", classes=("cat",))], "there is only one class, 'cat', and nothing to tell it from"),
        ("auto", [NUMBER, Target(name="x", kind="label", classes=("cat",))], "target x: there is only one class, 'cat'"),
        ("auto", [Target(name="x", kind="labels")], "target x has no labels"),
        (
            "clasification",
            [LABEL],
            "did you mean classification",
        ),
        ("no_such_module:Task", [LABEL], "no_such_module cannot be imported"),
        ("trainer.tasks.info:Task", [LABEL], "has no class Task; its classes are Measure, TaskInfo"),
        ("pathlib:Path", [LABEL], "is not made as a task is"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(name: str, targets: Sequence[Target], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_task(TaskConfig(name=name), targets)


def test_a_class_that_is_no_task_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_task.py").write_text(
        "from trainer.tasks.image import ImageTask\n\n\nclass Half(ImageTask):\n    def rows(self, outputs, targets): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="it lacks answers, columns, evaluation, info, loss_sum, sentence"):
        make_task(TaskConfig(name="half_a_task:Half"), [LABEL])
