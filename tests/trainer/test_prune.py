"""`finetune prune`: what it writes answers as torch-pruning's own network to the bit, and is an ordinary model for training, resuming,
evaluating and exporting."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dataio.parquet import open_dataset
from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE, SAMPLE
from trainer.evaluate import main as evaluate_main
from trainer.export.model_folder import load_export
from trainer.learn.build import Learner, build_learner, task_of
from trainer.learn.state import TrainState, weights_sha256
from trainer.models.vision import build_model, head_of
from trainer.prune.__main__ import main
from trainer.rank.worker import make_repeatable
from trainer.runs.model_files import find_model
from trainer.settings.fields import as_begun
from trainer.settings.fields import settings as flat
from trainer.settings.toml import load
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.values import widths_of, widths_text

package = pytest.importorskip("torch_pruning")
from trainer.prune.choose import MULTIPLE, cost_of, pruned  # noqa: E402

NETWORK = ModelConfig(name="timm/test_efficientnet", weights="none", stem="native", image_size=40)
MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "timm/tf_efficientnet_lite0", "timm/test_efficientnet", "resnext50_32x4d"),
    *("mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf"),
)
NO_MODELS = ("shufflenet_v2_x0_5", "convnext_tiny", "timm/vit_tiny_patch16_224")


pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(BASE, run="wide", model=NETWORK, train=replace(BASE.train, precision="fp32"))
    return train(tmp_path_factory.mktemp("runs"), config, 40)


@pytest.fixture(scope="module")
def narrow(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "narrow"
    assert main([str(run), "--multiple", "1", "--out", str(folder)]) == 0
    return folder


def built(name: str, *, stem: Any = "auto", widths: str = "") -> nn.Module:
    config = ModelConfig(name=name, weights="none", stem=stem, widths=widths)
    return build_model(config, classes=7, seed=3, image_hw=(32, 32)).eval()


def trained_a_little(model: nn.Module) -> nn.Module:
    """Statistics and weights of normalisation that differ from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@torch.no_grad()
def answers(model: nn.Module, side: int = 32) -> Tensor:
    found: Tensor = model.eval()(torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2)))
    return found


# --- the network ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_widths_with_the_weights_answers_exactly_as_torch_prunings_own(name: str) -> None:
    """Asked of the package itself, not through trainer.prune: its network, its weights, its answers."""
    wide = trained_a_little(built(name, stem="native"))
    own = copy.deepcopy(wide)
    package.pruner.BasePruner(
        own,
        torch.zeros(1, 3, 32, 32),
        importance=package.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.4,
        ignored_layers=[head_of(own)[1]],
        round_to=MULTIPLE,
    ).step()
    found = pruned(wide, lambda: built(name, stem="native"), name=name, fraction=0.4, seen=(32, 32))
    rebuilt = built(name, stem="native", widths=widths_text(found.widths))
    rebuilt.load_state_dict(own.state_dict(), strict=True)
    assert torch.equal(answers(rebuilt), answers(own))
    assert torch.equal(answers(found.model), answers(own))
    assert weights_sha256(found.model) == weights_sha256(own)
    assert cost_of(found.model, (32, 32)).parameters < cost_of(wide, (32, 32)).parameters


@given(fraction=st.floats(0.05, 0.95), multiple=st.sampled_from([1, 4, 8]), stem=st.sampled_from(["folded", "article", "native"]))
@settings(max_examples=4, deadline=None)
def test_any_fraction_of_any_stem_is_an_ordinary_model_and_the_choice_is_the_same_each_time(
    fraction: float, multiple: int, stem: Any
) -> None:
    wide = trained_a_little(built("resnet18", stem=stem))
    before = weights_sha256(wide)
    one, two = (
        pruned(wide, lambda: built("resnet18", stem=stem), name="resnet18", fraction=fraction, seen=(32, 32), multiple=multiple)
        for _ in range(2)
    )
    assert weights_sha256(wide) == before, "the model itself stays as it is"
    assert (one.widths, weights_sha256(one.model)) == (two.widths, weights_sha256(two.model))
    rebuilt = built("resnet18", stem=stem, widths=widths_text(one.widths))
    rebuilt.load_state_dict(one.model.state_dict(), strict=True)
    assert torch.equal(answers(rebuilt), answers(one.model))
    assert answers(rebuilt).shape == (3, 7)
    assert all(width % multiple == 0 for width in one.widths.values())


def test_the_channels_of_the_smallest_norm_go() -> None:
    wide = trained_a_little(built("resnet18"))
    layer, norm = wide.get_submodule("layer1.0.conv1"), wide.get_submodule("layer1.0.bn1")
    reader = wide.get_submodule("layer1.0.conv2")
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(reader, nn.Conv2d)
    small = range(0, 64, 2)
    with torch.no_grad():
        for part in (layer.weight, norm.weight, norm.bias, reader.weight.transpose(0, 1)):
            part[list(small)] *= 0.001
    found = pruned(wide, lambda: built("resnet18"), name="resnet18", fraction=0.5, seen=(32, 32))
    kept = found.model.get_submodule("layer1.0.bn1").weight
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, norm.weight[1::2])


@pytest.mark.parametrize("name", NO_MODELS)
def test_an_architecture_that_cannot_be_pruned_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"model.name={name} cannot be pruned"):
        pruned(built(name), lambda: built(name), name=name, fraction=0.5, seen=(32, 32))


def test_a_fraction_that_takes_no_channel_is_refused() -> None:
    wide = built("resnet18")
    with pytest.raises(ValueError, match=r"takes no channel from model\.name=x; use a larger fraction, or a smaller multiple"):
        pruned(wide, lambda: built("resnet18"), name="x", fraction=0.5, seen=(32, 32), multiple=1024)


# --- what is written ----------------------------------------------------------------------------------------------------------------------


def tuned(folder: Path, name: str = "tuned") -> RunConfig:
    return replace(load(str(folder / "finetune.toml"), RunConfig()), run=name)


def test_its_settings_are_the_runs_with_the_narrow_weights(narrow: Path, run: Path) -> None:
    before, now = flat(as_begun(load(str(run / "config.toml"), RunConfig()))), flat(tuned(narrow))
    assert {key for key in before if before[key] != now[key]} == {"run", "model.weights", "model.widths"}
    assert now["model.weights"] == str(narrow / "model" / "model.safetensors")
    described = json.loads((narrow / "model" / "config.json").read_text())
    assert described["model"]["widths"] == now["model.widths"]
    assert "architecture" not in described, "timm would build the whole network"


def test_the_folder_is_a_model_that_is_asked_and_that_teaches(narrow: Path, run: Path) -> None:
    found, wide = (load_export(find_model(str(folder)), torch.device("cpu")) for folder in (narrow, run))
    widths = widths_of(tuned(narrow).model.widths)
    assert {name: len(found.model.get_submodule(name).weight) for name in widths} == widths  # type: ignore[arg-type]
    assert found.task.targets == wide.task.targets
    assert answers(found.model, 40).shape == answers(wide.model, 40).shape
    teaching = replace(BASE.train, precision="fp32", teacher=str(narrow / "model"))
    dataset = open_dataset(SAMPLE)
    learner = build_learner(replace(BASE, train=teaching), task_of(BASE, dataset.manifest), found.image_size, torch.device("cpu"))
    assert learner.teacher is not None


def test_it_is_fine_tuned_evaluated_and_exported_as_any_run(narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path, tuned(narrow), 20)
    capsys.readouterr()
    assert evaluate_main([str(folder), "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["accuracy"] == json.loads((folder / "summary.json").read_text())["test_accuracy"]
    found = load_export(find_model(str(folder)), torch.device("cpu"))
    assert weights_sha256(found.model) != weights_sha256(load_export(find_model(str(narrow)), torch.device("cpu")).model)

    from trainer.formats.__main__ import main as export_main

    assert export_main([str(folder), "--to", "torch", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "torch" / "manifest.json").read_text())["compared"]["answers_changed"] == 0
    assert "all answers are the model's on 500 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export_main([str(folder), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert "and this is a pruned one; use --to onnx or --to torch" in capsys.readouterr().err


def test_a_run_of_it_goes_on_to_the_same_bits(narrow: Path) -> None:
    """Three steps in one life or in two, the second of which builds the model anew from the settings and reads the first one's snapshot."""
    make_repeatable(1)
    config, dataset = tuned(narrow), open_dataset(SAMPLE)

    def made() -> tuple[Learner, TrainState]:
        learner = build_learner(config, task_of(config, dataset.manifest), (28, 28), torch.device("cpu"))
        return learner, TrainState(learner.model, learner.optimizer, learner.ema)

    def step(learner: Learner, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (8, 3, 28, 28), generator=generator, dtype=torch.uint8)
        learner.optimizer.zero_grad()
        learner.model(learner.preprocess(images)).square().mean().backward()
        learner.optimizer.step()
        assert learner.ema is not None
        learner.ema.update()

    one, state = made()
    step(one, 0)
    snapshot = state.snapshot({})
    files = {name: b"".join(map(bytes, parts)) for name, parts in snapshot.files().items()}
    snapshot.release()
    step(one, 1)
    two, second = made()
    second.load(files.__getitem__)
    step(two, 1)
    assert weights_sha256(one.model) == weights_sha256(two.model)
    assert one.ema is not None
    assert two.ema is not None
    assert weights_sha256(one.ema.weights()) == weights_sha256(two.ema.weights())
    assert len(one.model.get_submodule(head_of(one.model)[0]).weight) == 10  # type: ignore[arg-type]


def test_what_was_pruned_and_trained_can_be_pruned_again(narrow: Path, tmp_path: Path) -> None:
    folder = train(tmp_path, tuned(narrow), 1)
    assert main([str(folder), "--fraction", "0.25", "--multiple", "1"]) == 0  # into the run's folder
    first, second = (widths_of(tuned(each).model.widths) for each in (narrow, folder / "pruned"))
    assert first.keys() <= second.keys()
    assert all(second[name] < width for name, width in first.items())
    load_export(find_model(str(folder / "pruned")), torch.device("cpu"))


def test_given_again_it_writes_the_same_bytes(narrow: Path, run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "narrow"
    assert main([str(run), "--multiple", "1", "--out", str(copied)]) == 0
    name = "model/model.safetensors"
    assert (copied / name).read_bytes() == (narrow / name).read_bytes()
    before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main([str(run), "--multiple", "1", "--out", str(copied)]) == 0
    assert {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_it_says_what_was_saved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "  parameters: 101,766 to " in out
    assert "MACs for an image" in out
    assert f"trainer.run --config {tmp_path / 'a' / 'finetune.toml'}" in out
    assert main([str(run), "--out", str(tmp_path / "a"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["after"]["parameters"] < said["before"]["parameters"] == 101_766
    assert said["after"]["bytes"] == (tmp_path / "a" / "model" / "model.safetensors").stat().st_size
    assert said["before"]["bytes"] == (run / "model" / "model.safetensors").stat().st_size
    assert said["after"]["macs"] < said["before"]["macs"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--fraction", "0"], "--fraction 0 must be above 0 and below 1"),
        (["--fraction", "1"], "--fraction 1 must be above 0 and below 1"),
        (["--fraction", "nan"], "--fraction nan must be above 0 and below 1"),
        (["--multiple", "0"], "--multiple 0: channels that stay are a multiple of it; use 1 or more"),
        (["--out", "{run}"], "is a run's folder, whose model would be replaced; give another one"),
        (["--out", "s3://bucket/x"], "is on another machine, and model.weights is a file of this one"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_written(
    argv: list[str], problem: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "run"), *(word.format(run=tmp_path / "run") for word in argv)])
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_folder_that_holds_another_model_is_refused_and_one_that_was_left_half_is_written_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "model", tmp_path / "out" / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "holds something that finetune prune has not written; give another folder, or empty that one" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    (tmp_path / "out" / ".finetune-prune").touch()  # as a kill leaves it
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["finetune.toml", "model"]


def test_a_model_folder_without_its_run_is_refused(narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(narrow)])
    assert stop.value.code == 2
    assert "has no config.toml, which says how the model was trained; give the folder that the run wrote" in capsys.readouterr().err
