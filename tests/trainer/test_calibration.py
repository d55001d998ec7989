"""Confidence after calibration is closer to the share that comes true, measured on samples that the temperature did not see."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import open_storage
from dataio.schema import Target, single_label
from trainer.export.model_folder import export_model, load_export
from trainer.inference.predictor import Predictor
from trainer.models.vision import build_model
from trainer.predict import main
from trainer.rank.calibrating import calibration_record, measured_record, with_calibration
from trainer.runs.model_files import described, find_model
from trainer.settings.tree import DataConfig, ModelConfig, RunConfig, TaskConfig
from trainer.tasks.calibration import (
    COLDEST,
    FOLDS,
    Scores,
    Temperature,
    calibrated,
    calibration_error,
    confidences,
    reliability,
    stored,
    temperature_of,
    temperatures,
)
from trainer.tasks.make import make_task
from trainer.tasks.score_log import ScoreLog, calibrated_answers, parts_of
from trainer.tasks.task import Result


def drawn(count: int, *, hotter: float, classes: int = 5, seed: int = 0, start: int = 0) -> Scores:
    """Logits that are `hotter` times too large: truths are drawn from the right ones."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (count, classes))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (shares.cumsum(1) < draw.random((count, 1))).sum(1)
    return Scores(kind="label", logits=(hotter * logits).astype(np.float32), truth=truth, ids=np.arange(start, start + count))


def drawn_labels(count: int, *, hotter: float, seed: int = 0) -> Scores:
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (count, 4))
    truth = (draw.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    truth[::7, 1] = 255  # not known
    return Scores(kind="labels", logits=(hotter * logits).astype(np.float32), truth=truth, ids=np.arange(count))


@pytest.mark.parametrize("hotter", [0.4, 1.0, 3.0])
def test_the_temperature_is_by_how_much_the_logits_are_too_large(hotter: float) -> None:
    assert temperature_of(drawn(20_000, hotter=hotter)) == pytest.approx(hotter, rel=0.03)
    assert temperature_of(drawn_labels(20_000, hotter=hotter)) == pytest.approx(hotter, rel=0.03)


def test_no_other_temperature_has_a_smaller_loss() -> None:
    scores = drawn(500, hotter=2.5)

    def loss(temperature: float) -> float:
        logits = scores.logits.astype(np.float64) / temperature
        top = logits.max(1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        smooth = 1 / 502  # as in Platt scaling
        return float(-((1 - smooth) * logs[np.arange(500), scores.truth] + smooth * logs.mean(1)).mean())

    best = temperature_of(scores)
    assert all(loss(best) <= loss(best * factor) for factor in (0.9, 0.99, 0.998, 1.002, 1.01, 1.1))


def test_a_head_that_is_never_wrong_does_not_become_infinitely_sure() -> None:
    scores = drawn(200, hotter=1.0)
    right = replace(scores, truth=scores.logits.argmax(1))
    assert COLDEST < temperature_of(right) < 1
    sure, _ = confidences(right, temperature_of(right))
    assert sure.max() < 1


def test_the_error_is_guos_by_hand() -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.55])
    right = np.array([1.0, 1.0, 0.0, 1.0])
    # two bins: 3 samples 0.95 sure and 2/3 right, 1 sample 0.55 sure and right
    assert calibration_error(sure, right) == pytest.approx(3 / 4 * (0.95 - 2 / 3) + 1 / 4 * (1 - 0.55))
    assert reliability(sure, right) == [
        {"confidence": pytest.approx(0.55), "right": 1.0, "count": 1},
        {"confidence": pytest.approx(0.95), "right": pytest.approx(2 / 3), "count": 3},
    ]
    # bins of equally many samples: each of these four is one
    assert calibration_error(sure, right, adaptive=True) == pytest.approx((0.05 + 0.05 + 0.95 + 0.45) / 4)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0  # the edges have a bin


def test_a_validation_split_halves_the_error_of_the_test_split_and_knows_nothing_of_it() -> None:
    test, fit = drawn(2000, hotter=3.0), drawn(1000, hotter=3.0, seed=1)
    record = calibrated(test, fit=fit)
    assert record is not None
    assert record["calibrated_ece"] < record["ece"] / 2
    assert record["calibrated_adaptive_ece"] < record["adaptive_ece"] / 2
    assert (record["fitted_on"], record["fitted_count"], record["count"], record["cross_fitted"]) == ("validation", 1000, 2000, False)
    other = calibrated(drawn(2000, hotter=0.5, seed=2), fit=fit)
    assert other is not None
    assert other["temperature"] == record["temperature"]
    assert sum(point["count"] for point in record["calibrated_bins"]) == 2000


def test_without_one_each_sample_is_measured_at_a_temperature_that_did_not_see_it() -> None:
    test = drawn(400, hotter=3.0)
    record = calibrated(test)
    assert record is not None
    assert (record["fitted_on"], record["cross_fitted"]) == ("test", True)
    assert record["temperature"] == temperature_of(test)
    assert record["calibrated_ece"] < record["ece"] / 2
    folds = ((test.ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) * np.uint64(FOLDS) >> np.uint64(32)).astype(int)
    assert sorted(np.bincount(folds)) == pytest.approx([80] * FOLDS, abs=2)
    each = np.zeros(400)
    for fold in range(FOLDS):
        each[folds == fold] = temperature_of(test.among(folds != fold))
    assert record["calibrated_ece"] == calibration_error(*confidences(test, each))


def test_unknown_and_unreadable_samples_do_not_count_and_too_few_give_nothing() -> None:
    scores = drawn(300, hotter=2.0)
    truth, logits = scores.truth.copy(), scores.logits.copy()
    truth[:50], logits[50:60] = -1, np.nan
    record = calibrated(replace(scores, truth=truth, logits=logits))
    assert record is not None
    assert record["count"] == 240
    assert record == calibrated(scores.among(np.arange(300) >= 60))
    assert calibrated(drawn(49, hotter=2.0)) is None
    assert calibrated(drawn(300, hotter=2.0), fit=drawn(49, hotter=2.0)) is None
    assert calibration_record({"label": drawn(10, hotter=2.0)}) is None
    assert calibration_record({}) is None


KIND = Target(name="kind", kind="label", classes=("a", "b", "c"))
TRAITS = Target(name="traits", kind="labels", classes=("x", "y"))
AREA = Target(name="area", kind="number", mean=3.0, std=2.0)


def test_the_log_keeps_the_heads_that_speak_in_probabilities() -> None:
    task = make_task(TaskConfig(), (KIND, AREA, TRAITS))
    assert [(part.name, part.start, part.stop) for part in parts_of(task)] == [("kind", 0, 3), ("traits", 4, 6)]
    log = ScoreLog(task, 10)
    outputs = torch.arange(60.0).view(10, 6)
    kinds, traits = torch.arange(10) % 3, torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8).repeat(5, 1)
    for start, stop in ((0, 4), (4, 4), (4, 10)):
        rows = slice(start, stop)
        log.update(np.arange(start, stop), outputs[rows].bfloat16(), {"kind": kinds[rows], "traits": traits[rows], "area": kinds[rows]})
    found = log.gathered(0, 1)
    assert found is not None
    assert np.array_equal(found["kind"].logits, outputs[:, :3].bfloat16().float())
    assert np.array_equal(found["traits"].logits, outputs[:, 4:].bfloat16().float())
    assert np.array_equal(found["kind"].truth, kinds)
    assert np.array_equal(found["traits"].truth, traits)
    assert np.array_equal(found["kind"].ids, np.arange(10))
    empty = ScoreLog(task, 0).gathered(0, 1)
    assert empty is not None
    assert len(empty["traits"].ids) == 0


def test_of_a_large_split_every_nth_sample_is_kept_whatever_the_ranks_shares() -> None:
    task = make_task(TaskConfig(), single_label(("a", "b")))
    log = ScoreLog(task, 350_000)
    kept = [sample for share in (range(117), range(117, 300)) for sample in log.wanted(share)]
    assert kept == list(range(0, 300, 4))
    log.update(np.arange(100, 120), torch.zeros(20, 2), {"label": torch.zeros(20, dtype=torch.int64)})
    found = log.gathered(0, 1)
    assert found is not None
    assert found["label"].ids.tolist() == [100, 104, 108, 112, 116]


def test_calibrated_answers_are_the_same_with_other_probabilities() -> None:
    task = make_task(TaskConfig(threshold=0.3), (KIND, TRAITS))
    outputs = torch.tensor([[3.0, 1.0, 0.0, -0.5, -2.0]])  # the label x is given: sigmoid(-0.5) = 0.38
    found = {name: Temperature(value=2.0, split="validation", count=100) for name in ("kind", "traits")}
    (plain,), (calm,) = task.answers(outputs, top=3), calibrated_answers(task, outputs, found, top=3)
    assert [each["class"] for each in calm["heads"]["kind"]["predictions"]] == ["a", "b", "c"]
    expected = torch.tensor([1.5, 0.5, 0.0]).softmax(0).tolist()
    assert [each["probability"] for each in calm["heads"]["kind"]["predictions"]] == pytest.approx(expected)
    assert plain["heads"]["traits"]["labels"] == [{"class": "x", "probability": pytest.approx(0.3775, abs=1e-4)}]
    assert calm["heads"]["traits"]["labels"] == [{"class": "x", "probability": pytest.approx(0.4378, abs=1e-4)}]
    assert calibrated_answers(task, outputs, {}, top=3) == [plain]


def test_a_result_has_the_errors_of_its_only_target_as_numbers() -> None:
    result = Result(loss=1.0, count=500, measures={"accuracy": 0.5}, details={"confusion": []})
    record = calibration_record({"label": drawn(500, hotter=2.0)})
    assert record is not None
    entry = with_calibration(result, record).entry()
    assert entry["test_ece"] == record["heads"]["label"]["ece"] > entry["test_calibrated_ece"]
    assert entry["calibration"] == json.loads(json.dumps(record))
    assert with_calibration(result, None) == result


CONFIG = RunConfig(run="pets", data=DataConfig(path="pets"), model=ModelConfig(name="shufflenet_v2_x0_5", weights="none", image_size=32))


@cache
def weights() -> dict[str, torch.Tensor]:
    return build_model(CONFIG.model, classes=3, seed=5, image_hw=(16, 16)).state_dict()


def exported(storage: Path, calibration: dict[str, object] | None) -> Path:
    task = make_task(CONFIG.task, single_label(("cat", "dog", "bird")))
    export_model(
        storage=open_storage(storage),
        run="pets",
        tensors=weights(),
        config=CONFIG,
        task=task,
        data_image_size=(16, 16),
        summary={},
        calibration=calibration,
    )
    return storage / "pets"


def test_a_model_folder_keeps_its_temperature_and_predict_applies_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = calibration_record({"label": drawn(500, hotter=2.0)})
    folder = exported(tmp_path, stored(record))
    model = load_export(find_model(str(folder)), torch.device("cpu"))
    assert record is not None
    assert model.temperatures["label"].value == record["heads"]["label"]["temperature"]
    assert "bins" not in described(find_model(str(folder)))["calibration"]["heads"]["label"]
    assert "divide the outputs by" in (folder / "model" / "README.md").read_text()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    said = {}
    for flags in ((), ("--raw",)):
        assert main([str(folder), str(tmp_path / "a.png"), "--device", "cpu", "--json", *flags]) == 0
        said[flags] = [each["probability"] for each in json.loads(capsys.readouterr().out)["predictions"]]
    logs = np.log(said[("--raw",)]) / model.temperatures["label"].value
    assert said[()] == pytest.approx((np.exp(logs) / np.exp(logs).sum()).tolist(), rel=1e-4)
    assert said[()] != said[("--raw",)]


def test_a_model_folder_without_a_temperature_answers_as_before_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, None)
    file = folder / "model" / "config.json"
    description = json.loads(file.read_text())
    assert "calibration" not in description
    assert Predictor(find_model(str(folder)), device=torch.device("cpu")).task.info.name == "classification"
    for wrong in (0, -1, 1e9, "hot", None):
        damaged = {"heads": {"label": {"temperature": wrong, "fitted_on": "test", "fitted_count": 5}}}
        file.write_text(json.dumps(description | {"calibration": damaged}))
        with pytest.raises(ValueError, match=r"config\.json: the calibration of 'label' is damaged"):
            load_export(find_model(str(folder)), torch.device("cpu"))
    assert temperatures(None) == temperatures({}) == temperatures({"heads": []}) == {}


def test_a_temperature_found_elsewhere_is_measured_as_it_is() -> None:
    scores = drawn(500, hotter=2.0)
    record = measured_record({"label": scores}, {"label": Temperature(value=2.0, split="validation", count=9)})
    assert record is not None
    head = record["heads"]["label"]
    assert (head["temperature"], head["fitted_on"], head["cross_fitted"]) == (2.0, "validation", False)
    assert head["calibrated_ece"] == calibration_error(*confidences(scores, 2.0))
    plain = measured_record({"label": scores}, {})
    assert plain is not None
    assert plain["heads"]["label"]["ece"] == plain["heads"]["label"]["calibrated_ece"] == head["ece"]
