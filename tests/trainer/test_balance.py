"""Classes of unequal size: what they weigh, what the loss makes of it, what is refused, and what the user is told."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.balance import balanced_weights, class_counts, class_weights_of, imbalance_of, known_class_counts, log_priors, table_weights
from dataio.parquet import open_dataset
from dataio.schema import Target
from tests.trainer.report_runs import write_pictured
from trainer.drive.problems import Facts, problems_of, with_balance
from trainer.drive.start import with_balance as decided_with
from trainer.learn.balance import balanced_loss, heaviest_of
from trainer.learn.build import build_learner, task_of
from trainer.rank.guard import ENOUGH, Guard
from trainer.rank.history import History
from trainer.report.files import read_files
from trainer.report.panels import PANELS
from trainer.runs.folder import find_run
from trainer.settings.balance import Balanced, balanced
from trainer.settings.fields import replaced
from trainer.settings.identity import deciding_settings
from trainer.settings.rules import validate
from trainer.settings.tree import RunConfig
from trainer.tasks.classification import LabelEvaluation
from trainer.tasks.make import make_task

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
PETS = Target(name="label", kind="label", classes=("cat", "dog", "gnu"))
COUNTS = (36, 2, 12)
COUNTED = st.lists(st.integers(0, 10_000), min_size=2, max_size=30).filter(any)


def config_of(**flags: Any) -> RunConfig:
    config = RunConfig()
    for key, value in flags.items():
        config = replaced(config, key.replace("__", "."), value)
    return config


def said_of(counts: tuple[int, ...] = COUNTS, **flags: Any) -> Balanced:
    return balanced(config_of(**flags), (PETS,), counts)


# -- what classes weigh ---------------------------------------------------------------------------------------------------------------


@given(counts=COUNTED, data=st.data())
@settings(max_examples=50, deadline=None)
def test_weights_have_a_mean_of_one_over_the_training_images(counts: list[int], data: st.DataObject) -> None:
    table = data.draw(st.lists(st.floats(0.01, 100), min_size=len(counts), max_size=len(counts)))
    for weights in (balanced_weights(counts), table_weights(table, counts)):
        assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) == pytest.approx(sum(counts))
    there = [weight * count for weight, count in zip(balanced_weights(counts), counts, strict=True) if count]
    assert there == pytest.approx([there[0]] * len(there)), "all classes count alike"


def test_a_class_without_images_breaks_nothing() -> None:
    assert balanced_weights([4, 0, 2]) == [0.75, 1.0, 1.5]
    assert all(prior <= 0 for prior in log_priors([4, 0, 2]))
    assert imbalance_of([4, 0, 2]).ratio == 2
    assert imbalance_of([0, 0]).ratio == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cat", "'cat' is no NAME=WEIGHT"),
        ("cat=much", "'much' is no number"),
        ("cat=0", "cat=0 must be above 0 and finite"),
        ("cat=inf", "cat=inf must be above 0 and finite"),
        ("cat=1,cat=2", "names cat twice"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        class_weights_of(text)


def test_counts_come_from_the_labels_and_from_what_the_conversion_wrote_down() -> None:
    dataset = open_dataset(SAMPLE)
    assert sum(class_counts(dataset)) == dataset.split("train").count
    assert known_class_counts(dataset) == class_counts(dataset)


# -- the loss -------------------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), smoothing=st.sampled_from([0.0, 0.1]), counts=st.lists(st.integers(1, 99), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_losses_are_their_formulas_sum_over_parts_and_leave_unknown_labels_out(seed: int, smoothing: float, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(8, 3, generator=generator), torch.randint(-1, 3, (8,), generator=generator)
    known = labels >= 0
    weights, priors = torch.tensor(balanced_weights(counts)), torch.tensor(log_priors(counts))
    smooth = {"reduction": "none", "label_smoothing": smoothing}
    wanted = {
        "weights": (F.cross_entropy(logits[known], labels[known], **smooth) * weights[labels[known]]).sum(),  # type: ignore[arg-type]
        "logit_adjustment": F.cross_entropy(logits[known] + priors, labels[known], **smooth).sum(),  # type: ignore[arg-type]
    }
    for method, expected in wanted.items():
        config = config_of(data__balance=method, optim__label_smoothing=smoothing)
        task = make_task(config.task, (PETS,), label_smoothing=smoothing)
        loss_sum = balanced_loss(config, task, counts, torch.device("cpu"))
        assert loss_sum is not None
        whole = loss_sum(logits, {"label": labels})
        parts = sum(float(loss_sum(logits[i : i + 1], {"label": labels[i : i + 1]})) for i in range(8))
        assert float(whole) == pytest.approx(float(expected), abs=1e-4)
        assert parts == pytest.approx(float(whole), abs=1e-4)
        assert float(loss_sum(logits[:0], {"label": labels[:0]})) == 0


def test_weights_of_one_and_equal_classes_are_plain_cross_entropy() -> None:
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), {"label": torch.tensor([0, 1, 2, -1, 1, 0])}
    plain = make_task(RunConfig().task, (PETS,)).loss_sum(logits, targets)
    for flags in ({"data__balance": "weights"}, {"data__class_weights": "cat=3,dog=3,gnu=3"}, {"data__balance": "logit_adjustment"}):
        config = config_of(**flags)
        loss_sum = balanced_loss(config, make_task(config.task, (PETS,)), (7, 7, 7), torch.device("cpu"))
        assert loss_sum is not None
        assert float(loss_sum(logits, targets)) == pytest.approx(float(plain), rel=1e-6)


def test_off_is_the_tasks_own_loss_and_reads_no_labels() -> None:
    config = RunConfig()
    task = make_task(config.task, (PETS,))
    assert balanced_loss(config, task, (), torch.device("cpu")) is None
    assert heaviest_of(config, task, ()) == 1
    assert not {key for key in deciding_settings(config) if key in ("data.balance", "data.class_weights")}, "it renames no run"


def test_rare_classes_move_the_weights_more_in_a_real_step() -> None:
    """The gradient of the rare class's row of the head, against that of an unbalanced step."""
    dataset = open_dataset(SAMPLE)
    moved = {}
    for method in ("none", "weights"):
        config = config_of(data__balance=method, model__name="shufflenet_v2_x0_5", model__weights="none", train__channels_last="on")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32", virtual_ranks=1))
        counts = (20, *[200] * 9)
        learner = build_learner(config, task_of(config, dataset.manifest), (16, 16), torch.device("cpu"), class_counts=counts)
        batch = _batch(torch.tensor([0] + [1] * 7))
        learner.set_trainable(0)
        before = learner.model.get_submodule(learner.head_name).bias.detach().clone()  # type: ignore[union-attr, operator]
        learner.stepper().step((batch,), global_count=8, step=0)
        moved[method] = (learner.model.get_submodule(learner.head_name).bias - before).abs()  # type: ignore[operator]
        assert learner.heaviest == pytest.approx(heaviest_of(config, learner.task, counts))
    assert moved["weights"][0] > 3 * moved["none"][0]


def _batch(labels: torch.Tensor) -> Any:
    from dataio.batch import Batch

    samples = torch.randint(0, 256, (len(labels), 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = samples.contiguous(memory_format=torch.channels_last)
    return Batch(samples=samples, targets={"label": labels}, ids=labels.numpy(), epoch=0, step=0, virtual_rank=0)


def test_a_hard_image_of_a_heavy_class_is_no_spike_and_a_diverging_loss_still_is() -> None:
    """A batch in which an image counts 25 times may be 20 nats above the others."""
    for heaviest, loss, is_spike in ((1.0, 20.0, True), (25.0, 20.0, False), (25.0, 400.0, True)):
        guard = Guard(spike_factor=10, batch_size=50, samples_of=lambda step: 50, heaviest=heaviest)
        for step in range(ENOUGH):
            guard.check(step, 0.3 + step % 3 / 100)
        if is_spike:
            with pytest.raises(Exception, match="a spike"):
                guard.copy().check(ENOUGH, loss)
        else:
            guard.copy().check(ENOUGH, loss)


# -- what a run does, and says --------------------------------------------------------------------------------------------------------


def test_unequal_classes_are_told_by_name_and_number_and_with_the_flag() -> None:
    """Field trial: 36 images against 2, and not a word."""
    (line,) = said_of().said
    assert line.startswith("warning: the largest class (cat) has 36 training images, 18 times those of the smallest (dog: 2)")
    assert "--data.balance auto" in line
    assert said_of().config == RunConfig(), "the default trains as ever"
    assert said_of((5, 2, 3)).said == ()


def test_auto_becomes_what_pays_and_says_why() -> None:
    unequal, equal = said_of(data__balance="auto"), said_of((5, 2, 3), data__balance="auto")
    assert (unequal.config.data.balance, equal.config.data.balance) == ("logit_adjustment", "none")
    assert "18 times" in unequal.said[0]
    assert said_of(data__balance="logit_adjustment").config == unequal.config, "the same run, asked for in two ways"


def test_weights_are_told() -> None:
    assert said_of(data__balance="weights").said[0].endswith("dog 8.33, gnu 1.39, cat 0.463")
    assert said_of(data__class_weights="dog=9").said[0].endswith("dog 6.82, cat 0.758, gnu 0.758")


@pytest.mark.parametrize(
    ("flags", "targets", "problem"),
    [
        ({"data__class_weights": "dgo=2"}, (PETS,), "'dgo', no class of the data; did you mean dog\\? they are cat, dog, gnu"),
        ({"data__balance": "weights"}, (Target(name="t", kind="labels", classes=("a", "b")),), "--task.loss asymmetric"),
        ({"data__balance": "auto"}, (PETS, Target(name="age", kind="number")), "--task.weights weighs the targets"),
        ({"data__class_weights": "cat=2", "task__name": "mine:Task"}, (PETS,), "weigh the classes in your task's loss"),
    ],
)
def test_what_cannot_be_balanced_is_refused_with_the_fix(flags: Mapping[str, Any], targets: tuple[Target, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        balanced(config_of(**flags), targets, COUNTS)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"data__balance": "sampler"}, "each image once, and its expected gradient is that of weights"),
        ({"data__balance": "weight"}, "must be one of none, auto, weights, logit_adjustment"),
        ({"data__balance": "weights", "data__class_weights": "a=1"}, "give one of them"),
        ({"data__balance": "weights", "optim__loss": "mine:loss"}, "that optim.loss=mine:loss replaces"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        validate(config_of(**flags))


def test_a_run_and_its_dry_run_decide_alike_before_anything_is_made() -> None:
    dataset = open_dataset(SAMPLE)
    from dataio.scan import Looked

    looked = Looked(
        targets=dataset.manifest.targets, manifest=dataset.manifest, is_converted=True, class_counts={"train": class_counts(dataset)}
    )
    config = config_of(data__balance="auto", data__path=str(SAMPLE))
    facts, said = with_balance(Facts(config=config, looked=looked))
    begun = decided_with(config, dataset)
    assert (facts.config, said) == (begun.config, begun.said)
    assert facts.config.data.balance == "none", "the sample's classes are of about one size"
    wrong = config_of(data__class_weights="Boot=2", data__path=str(SAMPLE))
    assert "did you mean Ankle boot" in "".join(problems_of(Facts(config=wrong, looked=looked)))


# -- what it came to ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3).filter(lambda rows: any(map(any, rows))))
@settings(max_examples=50, deadline=None)
def test_balanced_accuracy_and_macro_f1_are_means_over_classes(rows: list[list[int]]) -> None:
    evaluation = LabelEvaluation(PETS)
    evaluation.sums[1:] = torch.tensor(rows, dtype=torch.float64).flatten()
    measures = evaluation.result().measures
    recalls = [row[c] / sum(row) for c, row in enumerate(rows) if sum(row)]
    given = [sum(row[c] for row in rows) for c in range(3)]
    f1 = [2 * rows[c][c] / (sum(rows[c]) + given[c]) for c in range(3) if sum(rows[c]) + given[c]]
    assert measures["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    assert measures["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def test_the_history_keeps_each_class_of_the_first_evaluation_beside_the_last() -> None:
    history = History()
    for step, recall in ((10, 0.25), (20, 0.75)):
        entry = {"step": step, "epoch": step / 10, "test_loss": 1.0, "per_class": [{"recall": recall, "f1": 0.5, "support": 4}]}
        history.evaluated(entry, 1.0)
    again = History.from_json(history.to_json())
    assert again.first_classes == {"step": 10, "epoch": 1.0, "recall": [0.25], "f1": [0.5]}
    assert again.evaluations[-1]["per_class"][0]["recall"] == 0.75


def test_the_report_shows_each_class_before_and_after(tmp_path: Path) -> None:
    counts = [500, 400, 300, 200, 100, 90, 80, 70, 60, 25]
    first = {"step": 40, "epoch": 1.0, "recall": [0.125] * 10, "f1": [0.1] * 10}
    for method, told in (("weights", "have weights"), ("logit_adjustment", "had the logarithm"), ("none", "--data.balance auto")):
        config = config_of(data__balance=method)
        folder = write_pictured(tmp_path / method, config=config, train_counts=counts, first_classes=first)
        html = PANELS["classes"](read_files(find_run(str(folder)), pictures=False))
        assert "20 times the training images of the smallest" in html
        assert told in html
        assert "recall after 1 epoch" in html
        assert html.count("12.5 %") >= 10
        assert ("each counts" in html) == (method == "weights")
    assert f"{balanced_weights(counts)[-1]:.3g}" in PANELS["classes"](read_files(find_run(str(tmp_path / "weights")), pictures=False))


def test_a_run_of_an_older_release_has_its_classes_as_before(tmp_path: Path) -> None:
    html = PANELS["classes"](read_files(find_run(str(write_pictured(tmp_path / "old"))), pictures=False))
    assert "recall after" not in html
    assert "training images" not in html
    assert "<table" in html
