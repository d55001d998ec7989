"""Distillation: the divergence, the teacher's answers, and whole runs in this process that learn from a teacher."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataio.config import PIN
from dataio.schema import Target, single_label
from tests.trainer.lives import TINY, Killed, Lives, write_images
from trainer.drive.check import Refused, built
from trainer.drive.identity import identity
from trainer.drive.stages import question_of_facts
from trainer.drive.survey import survey
from trainer.learn.build import views_are_fixed
from trainer.learn.teacher import ANSWERS, Teacher, check_answers, divergence_sum, load_teacher, taught_loss
from trainer.rank import teaching
from trainer.rank.teaching import ANSWERS_FILE
from trainer.runs.model_files import pinned, pinned_model
from trainer.settings.cli import parse
from trainer.settings.rules import validate
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.make import make_task
from trainer.tasks.task import Task

BATCHES = ("--data.batch-size", "20", "--train.virtual-ranks", "2", "--optim.lr", "0.1")
FIXED = ("--data.pad", "0", "--data.no-flip")
MIXED = ("--data.rotate", "20", "--train.mixup", "0.3")
TARGETS = (
    Target(name="kind", kind="label", classes=("ant", "bee", "cat")),
    Target(name="marks", kind="labels", classes=("big", "red")),
    Target(name="mass", kind="number", mean=10.0, std=4.0),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), {"train": 60, "val": 30, "test": 30})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """The folder of a finished run."""
    threads = torch.get_num_threads()
    lives = run_of(tmp_path_factory.mktemp("teacher"), photos, *FIXED, "--train.epochs", "4")
    assert lives.live()
    torch.set_num_threads(threads)
    return lives.folder


def run_of(folder: Path, photos: Path, *flags: str) -> Lives:
    lives = Lives.of(folder, "--data.path", str(photos), *BATCHES, *TINY, *flags)
    if lives.config.train.teacher:  # as the driver does
        train = dataclasses.replace(lives.config.train, teacher=pinned(lives.config.train.teacher, lives.config.storage))
        lives.config = dataclasses.replace(lives.config, train=train)
    return lives


def task_of(*targets: Target, label_smoothing: float = 0.0) -> Task:
    return make_task(TaskConfig(), targets, label_smoothing=label_smoothing)


def known(task: Task, count: int) -> dict[str, Tensor]:
    """Prepared targets, all known."""
    blank = {target.name: torch.zeros(count, *target.shape, dtype=torch.from_numpy(target.blank(1)).dtype) for target in task.targets}
    return dict(task.prepare(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), blank)[1])


# --- the divergence -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20.0), count=st.integers(1, 9))
def test_the_divergence_is_that_of_its_definition_and_nothing_where_both_agree(seed: int, temperature: float, count: int) -> None:
    random = torch.Generator().manual_seed(seed)
    task = task_of(*TARGETS)
    student, wanted = (3 * torch.randn(count, task.outputs, generator=random) for _ in range(2))
    found = divergence_sum(task, student, wanted, known(task, count), temperature=temperature)
    p, q = (each.double()[:, :3].div(temperature).softmax(1) for each in (wanted, student))
    label = (p * (p.log() - q.log())).sum()
    yes, said = (each.double()[:, 3:5].div(temperature).sigmoid() for each in (wanted, student))
    labels = (yes * (yes / said).log() + (1 - yes) * ((1 - yes) / (1 - said)).log()).mean(1).sum()
    errors = (student - wanted).double()[:, 5].abs()
    number = torch.where(errors < 1, errors**2 / 2, errors - 0.5).sum()
    torch.testing.assert_close(found.double(), (label + labels) * temperature**2 + number, rtol=1e-3, atol=1e-3 * temperature**2)
    assert found > 0
    same = divergence_sum(task, wanted, wanted, known(task, count), temperature=temperature)
    assert abs(float(same)) <= 1e-5 * temperature**2 * count


def test_samples_of_which_nothing_is_known_add_nothing_to_loss_and_gradient() -> None:
    task = task_of(*TARGETS)
    student = torch.randn(4, task.outputs, requires_grad=True)
    targets = known(task, 4)
    targets["kind"] = torch.tensor([0, -1, -1, -1])
    targets["marks"] = torch.tensor([[255, 255], [255, 1], [255, 255], [255, 255]], dtype=torch.uint8)
    targets["mass"] = torch.tensor([0.0, float("nan"), 0.3, float("nan")])
    divergence_sum(task, student, torch.randn(4, task.outputs), targets, temperature=2.0).backward()
    assert student.grad is not None
    assert student.grad[:3].ne(0).any(1).all()
    assert student.grad[3].eq(0).all()


def test_weights_of_heads_weigh_the_teachers_part_too() -> None:
    light = make_task(TaskConfig(weights="mass=0.25"), TARGETS[1:])
    heavy = make_task(TaskConfig(), TARGETS[1:])
    student, wanted = torch.zeros(2, 3), torch.zeros(2, 3)
    wanted[:, 2] = 0.5
    whole = divergence_sum(heavy, student, wanted, known(heavy, 2), temperature=3.0)
    assert float(divergence_sum(light, student, wanted, known(light, 2), temperature=3.0)) == pytest.approx(float(whole) / 4)


def test_the_loss_is_shared_between_labels_and_teacher() -> None:
    task = task_of(*single_label(("ant", "bee")), label_smoothing=0.1)
    outputs, wanted, targets = torch.randn(5, 2), torch.randn(5, 2), {"label": torch.tensor([0, 1, 1, 0, -1])}
    both = {**targets, ANSWERS: wanted}
    labels = float(task.loss_sum(outputs, targets))
    apart = float(divergence_sum(task, outputs, wanted, targets, temperature=2.0))
    for weight in (0.25, 1.0):
        taught = taught_loss(task.loss_sum, task, weight=weight, temperature=2.0)
        assert float(taught(outputs, both)) == pytest.approx((1 - weight) * labels + weight * apart, rel=1e-6)
        assert float(taught(outputs, targets)) == labels, "a blank batch has no answers"


# --- who may teach ------------------------------------------------------------------------------------------------------------------------


def test_a_teacher_of_other_classes_is_refused_by_name() -> None:
    ants = task_of(*single_label(("ant", "bee")))
    check_answers(ants, task_of(*single_label(("ant", "bee"))))
    for other in (
        single_label(("bee", "ant")),
        single_label(("ant", "bee", "cat")),
        (Target(name="x", kind="label", classes=("ant", "bee")),),
    ):
        with pytest.raises(ValueError, match="the teacher has learned label \\(label: ant, bee\\), but the data have "):
            check_answers(ants, task_of(*other))


def test_numbers_are_brought_from_the_teachers_units_to_the_students() -> None:
    from trainer.learn.teacher import _to_students

    theirs, ours = TARGETS[2], dataclasses.replace(TARGETS[2], mean=2.0, std=8.0)
    scale, shift = _to_students(task_of(TARGETS[0], theirs), task_of(TARGETS[0], ours))
    output = torch.tensor([1.0, -1.0, 0.5, 3.0])  # 3 deviations of 4 above 10: 22, which is 2.5 deviations of 8 above 2
    assert (output * scale + shift).tolist() == [1.0, -1.0, 0.5, 2.5]


def test_a_teacher_is_known_by_its_content(teacher: Path, photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "kept"
    shutil.copytree(teacher / "model", moved)
    first, second = pinned(str(teacher), ""), pinned(str(moved), "")
    assert first != second
    assert first.rpartition(PIN)[2] == second.rpartition(PIN)[2]
    assert pinned(first, "") == first

    def named(teacher: str, *flags: str) -> Mapping[str, object]:
        return identity(parse(["--train.teacher", teacher, *flags]).config, "data")

    assert named(first) == named(second)
    assert named(first) != named(first, "--train.teacher-weight", "0.6") != identity(RunConfig(), "data")
    assert "train.teacher_weight" not in identity(RunConfig(), "data")
    description = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**description, "calibration": None, "since": "a later release"}))
    pinned_model(second)
    (moved / "config.json").write_text(json.dumps({**description, "file_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="holds another model"):
        pinned_model(second)
    shutil.rmtree(moved)
    with pytest.raises(ValueError, match="there is no model any more"):
        pinned_model(second)


def test_a_run_says_before_it_starts_what_stands_against_its_teacher(teacher: Path, photos: Path, tmp_path: Path) -> None:
    def wrong(given: str, data: Path) -> str:
        config = parse(["--data.path", str(data), *BATCHES, *TINY, "--train.teacher", given, "--storage", str(tmp_path)]).config
        facts = survey(config, workers=lambda: 1, in_job=False)
        answer = built(question_of_facts(facts))
        return "\n".join([*facts.found_wrong, answer.message if isinstance(answer, Refused) else ""]).strip()

    assert wrong(str(teacher), photos) == ""
    assert wrong(str(teacher / "model"), photos) == ""
    assert "train.teacher=nobody: there is no run nobody" in wrong("nobody", photos)
    others = write_images(tmp_path / "others", {"train": 8, "test": 8}, classes=2)
    assert wrong(str(teacher), others).startswith("train.teacher: the teacher has learned label (label: class-0, class-1, class-2), but")
    weights = teacher / "model" / "model.safetensors"
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher / "model", damaged)
    (damaged / "model.safetensors").write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "model.safetensors is damaged" in wrong(str(damaged), photos)
    with pytest.raises(ValueError, match=r"train\.teacher_weight is set, but there is no teacher"):
        validate(dataclasses.replace(RunConfig(), train=dataclasses.replace(RunConfig().train, teacher_weight=0.9)))


def test_a_teacher_of_other_sizes_sees_images_of_its_own(teacher: Path, photos: Path) -> None:
    task = task_of(*single_label(("class-0", "class-1", "class-2")))

    def asked(height: int, width: int) -> Tensor:
        loaded = load_teacher(
            pinned(str(teacher), ""),
            task,
            image_hw=(height, width),
            device=torch.device("cpu"),
            precision="fp32",
            channels_last=False,
        )
        flat = torch.full((1, 3, height, width), 90, dtype=torch.uint8)
        return loaded.answers(flat)

    torch.testing.assert_close(asked(8, 8), asked(20, 12))


# --- whole runs ---------------------------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_its_teacher_and_a_kill_changes_no_bit(teacher: Path, photos: Path, tmp_path: Path) -> None:
    flags = (*MIXED, "--train.epochs", "3", "--train.teacher", str(teacher), "--train.teacher-weight", "0.8")
    whole = run_of(tmp_path / "whole", photos, *flags)
    assert whole.live()
    assert not (whole.folder / ANSWERS_FILE).exists(), "its views change"
    alone = run_of(tmp_path / "alone", photos, *MIXED, "--train.epochs", "3")
    assert alone.live()
    assert whole.result["weights_sha256"] != alone.result["weights_sha256"]

    killed = run_of(tmp_path / "killed", photos, *flags)

    def once(step: int, where: str) -> None:
        if (where, killed.attempts) == ("evaluating", 2):
            raise Killed
        if (where, killed.attempts) == ("saved", 1):
            raise Killed

    assert [killed.live(once), killed.live(once), killed.live()] == [False, False, True]
    assert killed.result["weights_sha256"] == whole.result["weights_sha256"]
    assert "- **Teacher:** `run` (0.8 of the loss, temperature 2)" in (whole.folder / "model" / "README.md").read_text()


def test_fixed_views_are_answered_once_and_by_any_number_of_workers_to_the_same_bits(
    teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*FIXED, "--train.epochs", "2", "--train.teacher", str(teacher))
    asked: list[int] = []
    answers = Teacher.answers
    monkeypatch.setattr(Teacher, "answers", lambda self, samples: asked.append(len(samples)) or answers(self, samples))
    whole = run_of(tmp_path / "whole", photos, *flags)
    assert whole.live()
    assert sum(asked) == 60 + 1, "each training image once, and one blank to try it"
    kept = (whole.folder / ANSWERS_FILE).read_bytes()

    # Gone on from a kill: nothing is asked again. Damaged: asked again, to the same bits.
    killed = run_of(tmp_path / "killed", photos, *flags)

    def first_saved(step: int, where: str) -> None:
        if where == "saved":
            raise Killed

    assert not killed.live(first_saved)
    asked.clear()
    assert not killed.live(first_saved)
    assert asked == [1]
    (killed.folder / ANSWERS_FILE).write_bytes(kept[:-7])
    assert killed.live()
    assert sum(asked) == 1 + 1 + 60
    assert (killed.folder / ANSWERS_FILE).read_bytes() == kept
    assert killed.result["weights_sha256"] == whole.result["weights_sha256"]

    words = ["--data.path", str(photos), *BATCHES, *TINY, *flags[:-1], whole.config.train.teacher]
    two = subprocess.run(
        [sys.executable, "-m", "tests.trainer.lives", str(tmp_path / "two"), *words], capture_output=True, text=True, check=False
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout.splitlines()[-1])["result"]["weights_sha256"] == whole.result["weights_sha256"]
    assert (tmp_path / "two" / "runs" / "run" / ANSWERS_FILE).read_bytes() == kept


def test_answers_that_would_take_too_much_memory_are_asked_for_in_each_step(
    teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "MOST_REMEMBERED_BYTES", 60 * 3 * 4 - 1)
    lives = run_of(tmp_path, photos, *FIXED, "--train.epochs", "1", "--train.teacher", str(teacher))
    assert lives.live()
    assert not (lives.folder / ANSWERS_FILE).exists()


def test_a_teacher_that_nobody_pinned_is_an_error_of_the_driver(teacher: Path, photos: Path, tmp_path: Path) -> None:
    lives = Lives.of(tmp_path, "--data.path", str(photos), *BATCHES, *TINY, "--train.teacher", str(teacher))
    with pytest.raises(AssertionError, match="the driver pins the teacher"):
        lives.live()


@pytest.mark.parametrize(
    ("flags", "is_fixed"),
    [
        (FIXED, True),
        (("--data.pad", "0"), False),
        (("--data.no-flip",), False),
        ((*FIXED, "--data.erase", "0.1"), False),
        ((*FIXED, "--train.cutmix", "1"), False),
        ((*FIXED, "--data.crop", "resized"), False),
        ((*FIXED, "--data.augment", "tests.trainer.own_functions:brighter"), False),
        (("--data.no-flip", "--data.crop", "resized", "--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1"), False),
    ],
)
def test_views_are_fixed_only_where_nothing_moves_them(flags: tuple[str, ...], is_fixed: bool) -> None:
    assert views_are_fixed(parse(["--train.virtual-ranks", "1", *flags]).config) is is_fixed


def test_a_good_teacher_of_few_labels_teaches_more_than_the_labels() -> None:
    """On points of two classes of which only a part has a true label: with the teacher's answers the student is right on all."""
    random = np.random.default_rng(0)
    points = torch.from_numpy(random.normal(size=(300, 2)).astype(np.float32))
    truth = (points[:, 0] > points[:, 1]).long()
    wrong = torch.from_numpy(random.random(300) < 0.45)
    labels = torch.where(wrong, 1 - truth, truth)
    answers = torch.stack([points[:, 1], points[:, 0]], 1) * 4
    task = task_of(*single_label(("ant", "bee")))

    def learned(weight: float) -> float:
        torch.manual_seed(0)
        student = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
        loss = taught_loss(task.loss_sum, task, weight=weight, temperature=2.0)
        for _ in range(200):
            optimizer.zero_grad()
            (loss(student(points), {"label": labels, ANSWERS: answers}) / 300).backward()
            optimizer.step()
        return float((student(points).argmax(1) == truth).float().mean())

    assert learned(0.9) > learned(1e-9) + 0.05
    assert learned(1.0) > 0.97
