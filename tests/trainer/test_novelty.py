"""Images unlike anything seen in training are told from those that are not, by a model that was really trained, on real images."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import open_storage
from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.parquet import open_dataset
from dataio.schema import Target, single_label
from tests.trainer.report_runs import SAMPLE
from trainer.export.model_folder import REMEMBERED_FILE, export_model, load_export
from trainer.learn.build import Learner, build_learner, task_of
from trainer.learn.step import train_steps
from trainer.models.features import features_of
from trainer.models.vision import build_model
from trainer.predict import main
from trainer.push import files_of
from trainer.rank.data import RankData
from trainer.rank.evaluation import Evaluator
from trainer.rank.explain import explain
from trainer.rank.history import History, LossMean
from trainer.rank.novelty import MOST_HELD_OUT, novelty_of
from trainer.rank.step_plan import StepPlan
from trainer.rank.this_rank import ThisRank
from trainer.runs.model_files import find_model
from trainer.settings.spec import make_order
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig
from trainer.tasks.explanations import EXPLANATIONS_FILE, Explanations
from trainer.tasks.make import make_task
from trainer.tasks.novelty import (
    FALSE_ALARMS,
    FEWEST,
    MOST_BYTES,
    NEIGHBOUR,
    Novelty,
    Thresholds,
    distances,
    energies,
    most_remembered,
    thresholds_of,
)
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

CONFIG = RunConfig(
    run="sample",
    data=DataConfig(path=str(SAMPLE), batch_size=50, pad=2),
    model=ModelConfig(name="timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0", stem="native", image_size=48),
    optim=OptimConfig(name="adamw", lr=0.0003),
    train=TrainConfig(virtual_ranks=1, precision="fp32", channels_last="on", ema=0.5),
)
STEPS = 8
"""From pretrained weights. What a network from random weights takes for unlike anything is another thing on each kind of CPU."""


@pytest.fixture(scope="module")
def trained() -> tuple[Learner, RankData]:
    torch.set_num_threads(1)
    dataset, device = open_dataset(SAMPLE), torch.device("cpu")
    order = make_order(CONFIG, dataset)
    loader = Loader(
        dataset, CONFIG.data, order=order, virtual_ranks=range(1), device=device, seed=0, on_bad=lambda bad: pytest.fail(str(bad))
    )
    learner = build_learner(CONFIG, task_of(CONFIG, dataset.manifest), loader.image_size, device)
    learner.set_trainable(0)
    for _ in train_steps(
        learner.stepper(),
        loader.train(0, STEPS),
        start_step=0,
        stop_step=STEPS,
        steps_per_epoch=order.steps_per_epoch,
        batch_count=order.batch_count,
        set_learning_rate=lambda step: CONFIG.optim.lr,
        device=device,
        sum_over_ranks=False,
    ):
        pass
    return learner, cast(RankData, SimpleNamespace(dataset=dataset, loader=loader, order=order))


@pytest.fixture(scope="module")
def run(trained: tuple[Learner, RankData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    learner, data = trained
    storage = tmp_path_factory.mktemp("runs")
    assert learner.ema is not None
    export_model(
        storage=open_storage(storage),
        run="sample",
        tensors=learner.ema.weights(),
        config=CONFIG,
        task=learner.task,
        data_image_size=data.loader.image_size,
        summary={},
        novelty=novelty_of(learner, data, ema=learner.ema, most=300),
    )
    return storage / "sample"


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def save(folder: Path, images: np.ndarray) -> str:
    folder.mkdir()
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return str(folder)


def test_photographs_and_noise_are_told_and_new_images_of_the_kind_are_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = open_dataset(SAMPLE).split("test")
    (tmp_path / "clothes").mkdir()
    for index, encoded in enumerate(split.read_group(0).encoded[1:400:4]):  # the thresholds know every second one
        (tmp_path / "clothes" / f"{index}.png").write_bytes(encoded.tobytes())
    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    parts = [photograph.crop((x, y, x + 84, y + 84)).resize((28, 28)) for x in range(0, 420, 42) for y in range(0, 500, 83)]
    noise = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)

    def share(folder: str) -> float:
        told = [each["unlike_training"] for each in asked(capsys, str(run), folder)]
        return sum(told) / len(told)

    usual = share(str(tmp_path / "clothes"))
    assert usual < 0.1
    # A smooth part of a photograph may pass for a coat.
    assert share(save(tmp_path / "photographs", np.stack([np.asarray(part) for part in parts]))) > max(0.25, 4 * usual)
    assert share(save(tmp_path / "noise", noise)) > max(0.25, 4 * usual)
    assert main([str(run), str(tmp_path / "noise" / "000.png"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("  (unlike anything seen in training)\n")


def test_the_model_folder_keeps_what_it_remembers_and_notices_damage(run: Path) -> None:
    exported = load_export(find_model(str(run)), torch.device("cpu"))
    assert exported.novelty is not None
    assert exported.novelty.remembered.shape == (286, 1280)  # every 7th of 2,000
    assert exported.novelty.remembered.dtype == torch.float16
    thresholds = exported.novelty.thresholds
    assert (thresholds.split, thresholds.count) == ("test", 250)
    assert 0 < thresholds.false_alarms <= FALSE_ALARMS
    assert REMEMBERED_FILE in files_of(find_model(str(run)))
    file = run / "model" / REMEMBERED_FILE
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{REMEMBERED_FILE} is damaged"):
            load_export(find_model(str(run)), torch.device("cpu"))
        file.unlink()
        with pytest.raises(ValueError, match=f"{REMEMBERED_FILE} is missing; copy the whole model folder"):
            load_export(find_model(str(run)), torch.device("cpu"))
    finally:
        file.write_bytes(whole)


def this_rank() -> ThisRank:
    """What the last evaluation and the end need of a rank that is alone."""
    quiet = SimpleNamespace(during=lambda phase: nullcontext(), tick=lambda *phase: None)
    counted = SimpleNamespace(declare=lambda *given: None, set=lambda *given, **labels: None, add=lambda *given: None)
    waits = SimpleNamespace(call=lambda action, name: action())
    given = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "config": CONFIG, "heartbeat": quiet, "metrics": counted}
    return cast(ThisRank, SimpleNamespace(**given, waits=waits, tell=lambda event, **fields: None))


def test_the_last_evaluation_calibrates_and_the_end_explains(trained: tuple[Learner, RankData], tmp_path: Path) -> None:
    learner, data = trained
    me, storage, history = this_rank(), open_storage(tmp_path), History()
    plan = StepPlan(start_step=0, total_steps=STEPS, steps_per_epoch=STEPS // 2, eval_every_epochs=1)
    evaluator = Evaluator(
        me, data, learner, plan, history=history, mean=LossMean(history, lambda step: 50), storage=storage, on_begin=lambda: None
    )
    evaluator.run(STEPS // 2)
    assert "calibration" not in history.evaluations[-1]  # only of the finished model
    evaluator.run(STEPS)
    head = history.evaluations[-1]["calibration"]["heads"]["label"]
    assert (head["count"], head["fitted_on"], head["cross_fitted"]) == (500, "test", True)
    assert head["ece"] == history.evaluations[-1]["test_ece"]
    assert head["calibrated_ece"] < max(head["ece"], 0.05)
    found = Predictions.from_parquet((tmp_path / "sample" / PREDICTIONS_FILE).read_bytes())
    mean_sure = sum(point["confidence"] * point["count"] for point in head["bins"]) / 500
    assert float(found.confidence.mean()) == pytest.approx(mean_sure, rel=1e-4)
    explain(me, storage, learner, data, ema=learner.ema, step=STEPS + 1)
    assert not (tmp_path / "sample" / EXPLANATIONS_FILE).exists()  # the predictions are of another step
    explain(me, storage, learner, data, ema=learner.ema, step=STEPS)
    made = Explanations.from_parquet((tmp_path / "sample" / EXPLANATIONS_FILE).read_bytes())
    assert len(made.ids) == CONFIG.train.explain
    assert made.about.step == STEPS


def test_none_are_remembered_where_none_are_asked_for(trained: tuple[Learner, RankData]) -> None:
    assert novelty_of(*trained, ema=None, most=0) is None


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_tell_at_most_the_stated_share_of_held_out_images(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distance, energy = torch.rand(500, generator=generator), torch.randn(500, generator=generator)
    found = thresholds_of(distance, energy, split="validation")
    assert found is not None
    told = (distance > found.distance) | (energy < found.energy)
    assert float(told.float().mean()) == pytest.approx(found.false_alarms)
    assert FALSE_ALARMS / 2 < found.false_alarms <= FALSE_ALARMS
    assert (distance > found.distance).any()
    assert (energy < found.energy).any()
    assert thresholds_of(distance[: FEWEST - 1], energy[: FEWEST - 1], split="test") is None
    alone = thresholds_of(distance, torch.zeros(500), split="test")  # a task of numbers has no energy
    assert alone is not None
    assert alone.false_alarms == pytest.approx(FALSE_ALARMS)
    assert Thresholds.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_damaged_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="the thresholds of novelty are damaged"):
        Thresholds.from_json({"distance": 1})


def test_the_distance_is_to_the_fifth_nearest() -> None:
    remembered = torch.tensor([[float(n), 0.0] for n in range(10)]).half()
    assert distances(torch.tensor([[0.0, 0.0], [-1.0, 0.0]]), remembered).tolist() == [NEIGHBOUR - 1, NEIGHBOUR]
    assert distances(torch.tensor([[0.0, 0.0]]), remembered[:2]).tolist() == [1.0]
    assert most_remembered(1280) == MOST_BYTES // 2560
    assert MOST_HELD_OUT >= FEWEST


def test_the_energy_is_of_the_heads_that_speak_in_logits() -> None:
    targets = (
        Target(name="kind", kind="label", classes=("a", "b")),
        Target(name="area", kind="number"),
        Target(name="traits", kind="labels", classes=("x",)),
    )
    outputs = torch.tensor([[1.0, 2.0, 99.0, 0.0]])
    expected = np.log(np.e + np.e**2) + np.log(2)
    assert energies(make_task(TaskConfig(), targets), outputs).tolist() == pytest.approx([expected])
    alone = make_task(TaskConfig(), targets[1:2])
    assert energies(alone, outputs[:, 2:3]).tolist() == [0.0]
    novelty = Novelty(
        remembered=torch.eye(2).half(),
        thresholds=Thresholds(distance=1.5, energy=0.0, false_alarms=0.02, split="test", count=100),
    )
    assert novelty.told(alone, outputs[:, 2:3].repeat(2, 1), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [False, True]


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_features_are_of_length_one_whatever_the_head(name: str) -> None:
    model = build_model(ModelConfig(name=name, weights="none"), classes=3, seed=0, image_hw=(64, 64)).eval()
    with features_of(model) as features, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    taken = features.taken()
    assert taken.shape[0] == 2
    assert taken.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    assert make_task(TaskConfig(), single_label(("a", "b"))).outputs == 2
