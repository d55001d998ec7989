"""A compression of a real run: killed with SIGKILL in the middle of its fine-tuning, the same command goes on and ends in the same weights
and the same answers to the bit."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.series import count, driver_of, finished, kill_alone, started
from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE, SAMPLE
from trainer.runs.folder import located
from trainer.runs.started import started_with
from trainer.settings.tree import ModelConfig

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")

NETWORK = ModelConfig(name="timm/test_efficientnet", weights="none", stem="native", image_size=40)
KILLED = "pruned"


def words_of(run: Path, storage: Path) -> list[str]:
    return [
        *(str(run), "--storage", str(storage), "--run", "job", "--workers", "1"),
        *("--prune", "0.5", "--multiple", "1", "--teach", "--int8", "--max-drop", "100", "--calls", "3"),
        *("--train.max-steps", "60", "--train.checkpoint-every", "2", "--cluster.threads-per-worker", "1"),
    ]


def compressed(run: Path, storage: Path) -> dict[str, Any]:
    log, result = storage.parent / f"{storage.name}.log", storage / "job" / "compress.json"
    return finished("trainer.compress", words_of(run, storage), log, result)


def answers(job: Path) -> dict[str, bytes]:
    """All that is a function of the weights."""
    return {str(path.relative_to(job)): path.read_bytes() for path in sorted((job / "stages").iterdir())} | {
        name: (job / name).read_bytes()
        for name in ("pruned/model/model.safetensors", "exports/pruned/model.onnx", "exports/int8/model.onnx")
    }


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_compression_killed_in_the_middle_goes_on_and_ends_in_the_same_weights_and_answers(tmp_path: Path) -> None:
    run = train(tmp_path, replace(BASE, run="wide", model=NETWORK, train=replace(BASE.train, precision="fp32")), 20)
    killed = tmp_path / "killed"
    tuning, log = killed / "job" / KILLED, tmp_path / "killed.log"
    process = started("trainer.compress", words_of(run, killed), log)
    kill_alone(process, driver_of(process, tuning, log))
    assert not (killed / "job" / "compress.json").exists()
    asked_before = (killed / "job" / "stages" / "whole.json").stat().st_mtime_ns

    found = compressed(run, killed)
    assert count(tuning, "run_started") == 2
    assert (killed / "job" / "stages" / "whole.json").stat().st_mtime_ns == asked_before, "it was not asked again"

    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    for folder in (KILLED, "stages", "exports", "channels"):
        shutil.rmtree(whole / "job" / folder)
    (whole / "job" / "compress.json").unlink()
    assert compressed(run, whole)["stages"] == found["stages"], "as with one that was not killed"
    assert count(whole / "job" / KILLED, "run_started") == 1
    assert answers(whole / "job") == answers(killed / "job")

    stages = {row["stage"]: row for row in found["stages"]}
    assert list(stages) == ["whole", "pruned", "int8"]
    assert stages["int8"]["bytes"] < stages["pruned"]["bytes"] < stages["whole"]["bytes"]
    assert all(row["count"] == 500 and row["interval_95_percent"] for row in stages.values())
    assert all(found["measured"][stage]["milliseconds"].keys() == {"1", "32"} for stage in stages)
    assert "<svg" in (killed / "job" / "compress.html").read_text()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_images_are_enough_and_a_smaller_model_is_taught_and_trained_for_int8(tmp_path: Path) -> None:
    """The form without a run: it trains one, teaches a smaller one, and trains that one with the rounding."""
    storage = tmp_path / "runs"
    words = [
        *("--data.path", str(SAMPLE), "--storage", str(storage), "--run", "job", "--workers", "1"),
        *("--model.name", NETWORK.name, "--model.weights", "none", "--model.image-size", "40"),
        *("--distil", "shufflenet_v2_x0_5", "--distil-weights", "none", "--int8", "--aware", "always", "--max-drop", "100", "--calls", "3"),
        *("--train.max-steps", "6", "--train.precision", "fp32", "--cluster.threads-per-worker", "1"),
    ]
    found = finished("trainer.compress", words, tmp_path / "log", storage / "job" / "compress.json")
    assert [row["stage"] for row in found["stages"]] == ["whole", "distilled", "int8", "int8-aware"]
    settings = {name: started_with(located(str(storage / "job" / name))) for name in ("whole", "distilled", "aware")}
    assert settings["distilled"].train.teacher.startswith(str(storage / "job" / "whole"))
    assert settings["aware"].train.quantise == "int8"
    assert settings["aware"].model.weights == str(storage / "job" / "distilled" / "model" / "model.safetensors")
    assert settings["aware"].train.teacher == settings["distilled"].train.teacher
    assert settings["aware"].model.name == "shufflenet_v2_x0_5"
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["int8"]["weights_sha256"] == rows["distilled"]["weights_sha256"] != rows["int8-aware"]["weights_sha256"]
