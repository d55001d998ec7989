"""`trainer.evaluate` and `trainer.predict` on models of every task: what was trained is what answers, whatever the outputs mean."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import trainer.evaluate
import trainer.predict
from dataio.config import DataConfig
from dataio.conversion import convert
from dataio.parquet import open_dataset
from dataio.schema import Target
from dataio.sources import Sample
from tests.trainer.small_run import train
from trainer.export.model_folder import load_export
from trainer.runs.model_files import find_model
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig
from trainer.tasks.multitask import Multitask
from trainer.tasks.predictions import Predictions

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
SHOES = ("Sandal", "Sneaker", "Ankle boot")
CLASSES = open_dataset(SAMPLE).manifest.classes
KIND = Target(name="kind", kind="label", classes=CLASSES)
TRAITS = Target(name="traits", kind="labels", classes=("shoe", "late in the alphabet", "`odd`"))
AREA = Target(name="area", kind="number")
COUNTS = {"train": 400, "test": 60}


class Described:
    """Images of the sample, each with a kind, some traits, and how many bytes it takes: some of it not known."""

    kind, ignored, identity = "given", (), "given"
    held_out: ClassVar = {}

    def __init__(self, targets: tuple[Target, ...]) -> None:
        self.targets = targets
        self.classes, self.identities = targets[0].classes, (self.identity,)

    def splits(self) -> tuple[str, ...]:
        return tuple(COUNTS)

    def count(self, split: str) -> int | None:
        return COUNTS[split]

    def samples(self, split: str, start: int = 0) -> Iterator[Sample]:
        group = open_dataset(SAMPLE).split(split).read_group(0)
        labels = open_dataset(SAMPLE).split(split).labels()
        for index in range(start, COUNTS[split]):
            data = group.encoded[index].tobytes()
            values = [self._value(target, int(labels[index]), len(data), index) for target in self.targets]
            yield Sample(key=f"{split}/{index}", data=data, values=tuple(values))

    def _value(self, target: Target, label: int, size: int, index: int) -> Any:
        match target.name:
            case "kind":
                return target.classes.index(CLASSES[label]) if index % 7 else -1
            case "traits":
                by_name = {"shoe": CLASSES[label] in SHOES, "late in the alphabet": CLASSES[label] > "P", "`odd`": label % 2 == 1}
                known = {name: value for name, value in by_name.items() if name != "shoe" or index % 5 != 3}
                return np.array([known.get(name, 255) for name in target.classes], np.uint8)
            case _:
                return math.nan if index % 11 == 2 else float(size)


def data(folder: Path, *targets: Target) -> Path:
    convert(Described(targets), folder, max_bad_fraction=0.2, max_image_pixels=1000)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Path]]:
    """A finished run of each task, by name."""
    threads, root = torch.get_num_threads(), tmp_path_factory.mktemp("tasks")
    base = RunConfig(
        data=DataConfig(batch_size=50, pad=2),
        model=ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native", image_size=32),
        optim=OptimConfig(name="adamw", lr=0.01),
        train=TrainConfig(virtual_ranks=2, precision="fp32", channels_last="on", ema=0.5),
    )
    all_three = data(root / "all", KIND, TRAITS, AREA)
    wanted = {
        "multitask": (all_three, TaskConfig()),
        "learned": (all_three, TaskConfig(head_weights="learned")),
        "multilabel": (data(root / "traits", TRAITS), TaskConfig(loss="asymmetric", threshold=0.4)),
        "toy": (SAMPLE, TaskConfig(name="tests.trainer.toy_task:Toy")),
    }
    yield {
        name: train(root / "runs", replace(base, run=name, task=task, data=replace(base.data, path=str(path))), steps=8)
        for name, (path, task) in wanted.items()
    }
    torch.set_num_threads(threads)


NAMES = pytest.mark.parametrize("name", ["multitask", "learned", "multilabel", "toy"])


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert trainer.evaluate.main([*arguments, "--device", "cpu", "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@NAMES
def test_the_runs_own_test_split_gives_the_numbers_of_its_summary(
    runs: Mapping[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((runs[name] / "summary.json").read_text())
    answer = asked(capsys, str(runs[name]), "--predictions", str(tmp_path / "said.parquet"))
    measured = {key: value for key, value in summary.items() if key.startswith("test_") or key in ("labels", "heads")}
    if name == "learned":  # the run's own weights go on, the exported ones are their average
        measured["heads"] = answer["heads"]
    assert {key: answer[key.removeprefix("test_")] for key in measured} == measured
    headline = load_export(find_model(str(runs[name])), torch.device("cpu")).task.info.headline
    assert answer[f"recorded_{headline.name}"] == summary[headline.key]
    found = Predictions.from_parquet((tmp_path / "said.parquet").read_bytes())
    assert len(found.ids) == answer["count"] == found.about.count
    assert found.losses.astype(np.float64).mean() == pytest.approx(answer["loss"], rel=1e-5)


@NAMES
def test_tables_show_every_measure(runs: Mapping[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert trainer.evaluate.main([str(runs[name]), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    task = load_export(find_model(str(runs[name])), torch.device("cpu")).task
    assert "(as in summary.json)" in shown
    assert all(measure.in_words in shown for measure in task.info.measures)
    if name != "toy":
        assert "late in the alphabet" in shown


@NAMES
def test_an_image_is_answered_in_words_and_as_json(
    runs: Mapping[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(image)
    capsys.readouterr()
    assert trainer.predict.main([str(runs[name]), str(image), "--device", "cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert trainer.predict.main([str(runs[name]), str(image), "--device", "cpu"]) == 0
    exported = load_export(find_model(str(runs[name])), torch.device("cpu"))
    assert capsys.readouterr().out == f"{image}: {exported.task.sentence(answer)}\n"
    assert answer.pop("image") == str(image)
    pixels = torch.from_numpy(np.asarray(Image.open(image)).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        assert exported.task.answers(exported.model(exported.preprocess(pixels)), top=3) == [answer]


@NAMES
def test_the_export_says_which_task_it_is(runs: Mapping[str, Path], name: str) -> None:
    description = json.loads((runs[name] / "model" / "config.json").read_text())
    card = (runs[name] / "model" / "README.md").read_text()
    assert "classes" not in description
    assert description["task"]["name"] == {"learned": "multitask", "toy": "tests.trainer.toy_task:Toy"}.get(name, name)
    assert [target["name"] for target in description["targets"]] == {"multilabel": ["traits"], "toy": ["label"]}.get(
        name, ["kind", "traits", "area"]
    )
    assert f"(task `{'scale' if name == 'toy' else description['task']['name']}`) that says" in card
    assert "`odd`" not in card.partition("```json")[2]
    if name != "toy":
        assert "in the order of the outputs" in card


def test_learned_weights_come_back_with_the_model(runs: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    task = load_export(find_model(str(runs["learned"])), torch.device("cpu")).task
    assert isinstance(task, Multitask)
    weights = [head["weight"] for head in asked(capsys, str(runs["learned"]))["heads"].values()]
    assert weights == task.weights()
    assert all(weight != start for weight, start in zip(weights, [1.0, 1.0, 0.5], strict=True))


def test_targets_and_classes_are_matched_by_name(runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = (replace(TRAITS, classes=TRAITS.classes[::-1]), AREA, replace(KIND, classes=CLASSES[::-1]))
    other = data(tmp_path / "mixed", *mixed)
    whole, same = asked(capsys, str(runs["multitask"])), asked(capsys, str(runs["multitask"]), "--data.path", str(other))
    assert same["dataset_fingerprint"] != whole["dataset_fingerprint"]
    for key in ("score", "kind_accuracy", "traits_map", "area_mae", "count", "loss", "heads"):
        assert same[key] == whole[key]


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("multitask", [KIND, TRAITS], "the model was trained on the target area (number), and"),
        ("multilabel", [KIND], "the model was trained on the target traits (labels), and"),
        (
            "multitask",
            [replace(KIND, classes=(*CLASSES, "hat")), TRAITS, AREA],
            "target kind, are not the model's: the model does not know 'hat'",
        ),
        ("multilabel", [replace(TRAITS, classes=(*TRAITS.classes[:2], "new"))], "the model does not know 'new'"),
    ],
)
def test_data_without_the_models_targets_are_refused(
    runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, targets: list[Target], said: str
) -> None:
    data(tmp_path / "other", *targets)
    with pytest.raises(SystemExit) as stop:
        trainer.evaluate.main([str(runs[name]), "--data.path", str(tmp_path / "other"), "--device", "cpu"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
