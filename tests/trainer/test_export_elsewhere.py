"""An exported model opens without this program, by the very lines of its card, and gives the same numbers."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.storage import open_storage
from dataio.schema import Target, single_label
from trainer.export.model_folder import export_model, load_export
from trainer.models.stem import enlarging_of
from trainer.predict import main
from trainer.runs.model_files import find_model
from trainer.settings.tree import DataConfig, ModelConfig, RunConfig
from trainer.tasks.make import make_task

CLASSES = ("ant", "bee", "cat")
DATA = DataConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
SIDE = 32


def export(storage: Path, model: ModelConfig, side: int = SIDE) -> tuple[Path, nn.Module]:
    """A model folder, and the model in it."""
    config = RunConfig(run="run", data=DATA, model=replace(model, weights="none"))
    task = make_task(config.task, single_label(CLASSES))
    built = task.build(config.model, shape=(side, side), seed=3).eval()
    export_model(
        storage=open_storage(storage),
        run="run",
        tensors=built.state_dict(),
        config=config,
        task=task,
        data_image_size=(side, side),
        summary={},
        enlarged=enlarging_of(built),
    )
    return storage / "run" / "model", built


def opened_by_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's lines of Python leave, run beside the model folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def images(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))  # as a network sees them


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (ModelConfig(name="timm/test_efficientnet"), 40),
        (ModelConfig(name="timm/test_efficientnet", image_size=48, interpolation="bicubic"), 32),
        (ModelConfig(name="timm/test_vit", image_size=64), 32),  # a network of one size
    ],
)
def test_timm_opens_the_folder_by_local_dir(model: ModelConfig, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, built = export(tmp_path, model, side)
    found = opened_by_the_card(folder, monkeypatch)
    sees = model.image_size or side
    with torch.no_grad():
        assert torch.equal(found["model"](images(sees)), built(images(sees)))
    prepared = found["timm"].data.resolve_model_data_config(found["model"])
    assert [tuple(prepared[key]) for key in ("mean", "std", "input_size")] == [DATA.mean, DATA.std, (3, sees, sees)]
    assert (prepared["interpolation"], prepared["crop_pct"]) == (model.interpolation, 1.0)
    assert tuple(found["model"].pretrained_cfg["label_names"]) == CLASSES


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (ModelConfig(name="shufflenet_v2_x0_5"), 40),
        (ModelConfig(name="resnet18", stem="folded"), 24),
    ],
)
def test_torchvision_opens_it_by_name_and_file(model: ModelConfig, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, built = export(tmp_path, model, side)
    opened = opened_by_the_card(folder, monkeypatch)["model"]
    seen = images(model.image_size or side)
    card = (folder / "README.md").read_text()
    enlarged = F.interpolate(seen, scale_factor=4, mode="nearest") if "first enlarged 4 times" in card else seen
    assert (enlarged is not seen) == (model.stem == "folded")
    with torch.no_grad():
        torch.testing.assert_close(opened(enlarged), built(seen), rtol=1e-4, atol=1e-5)
    assert "architecture" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("stem", ["article", "phase_mean"])
def test_layers_that_no_library_has_are_said(stem: Any, tmp_path: Path) -> None:
    folder, _ = export(tmp_path, ModelConfig(name="resnet18", stem=stem))
    card = (folder / "README.md").read_text()
    assert f"Only this program opens it: its first layers (stem `{stem}`) are not the library's." in card
    assert "```python" not in card


def test_the_keys_that_were_there_before_are_there(tmp_path: Path) -> None:
    keys = {"model", "classes", "mean", "std", "data_image_size", "fit", "max_image_pixels", "weights_sha256", "file_sha256"}
    for name in ("timm/test_efficientnet", "shufflenet_v2_x0_5"):
        folder, _ = export(tmp_path / name.rpartition("/")[2], ModelConfig(name=name))
        assert keys <= json.loads((folder / "config.json").read_text()).keys()


def test_several_targets_are_exported_without_names_of_outputs(tmp_path: Path) -> None:
    config = RunConfig(run="run", model=ModelConfig(name="timm/test_efficientnet", weights="none"))
    task = make_task(config.task, [*single_label(CLASSES), Target(name="age", kind="number")])
    built = task.build(config.model, shape=(32, 32), seed=0)
    export_model(
        storage=open_storage(tmp_path),
        run="run",
        tensors=built.state_dict(),
        config=config,
        task=task,
        data_image_size=(32, 32),
        summary={},
    )
    description = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert description["num_classes"] == 4
    assert "label_names" not in description


# --- a copy of the folder ---------------------------------------------------------------------------------------------------------------


def test_a_model_folder_is_found_by_itself_by_its_run_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = export(tmp_path, ModelConfig(name="shufflenet_v2_x0_5"))
    copy = tmp_path / "elsewhere" / "ants"
    shutil.copytree(folder, copy)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given, location in (
        (str(folder), folder),
        (str(folder.parent), folder),
        ("run", folder),
        (str(copy), copy),
        ("ants", copy),
        ("./ants/", copy),
        (f"file://{copy}", copy),
    ):
        found = find_model(given, str(tmp_path))
        assert Path(found.location) == location, given
    assert load_export(find_model("ants"), torch.device("cpu")).task.targets[0].classes == CLASSES
    with pytest.raises(ValueError, match="there is no run bees"):
        find_model("bees", str(tmp_path))


def test_predict_asks_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = export(tmp_path, ModelConfig(name="shufflenet_v2_x0_5"))
    from PIL import Image

    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "red.png")
    lines = []
    for given in (folder, folder.parent):
        assert main([str(given), str(tmp_path / "red.png"), "--json"]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] != ""
