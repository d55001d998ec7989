"""A file of weights is read under whatever names it was saved, and its head is kept for the same classes alone; all that is said."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.learn.state import weights_sha256
from trainer.models.vision import build_model
from trainer.models.weights import output_names, without_prefix
from trainer.settings.packages import lacking
from trainer.settings.tree import ModelConfig

NAME = "shufflenet_v2_x0_5"


def build(*, seed: int, weights: str = "none") -> nn.Module:
    return build_model(ModelConfig(name=NAME, weights=weights), classes=3, seed=seed, image_hw=(32, 32))


def saved(prefix: str, *, more: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    state = build(seed=5).state_dict()
    return {**(more or {}), **{f"{prefix}{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize(
    ("prefix", "under"),
    [
        ("module.", "state_dict"),
        ("model.", "state_dict"),
        ("backbone.", ""),
        ("_orig_mod.", "model"),
        ("module.model.", "model_state_dict"),
        ("net._orig_mod.encoder.", "net"),
    ],
)
def test_a_common_prefix_is_stripped_and_said(prefix: str, under: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trainer.models")
    state = saved(prefix, more={"loss.weight": torch.ones(1)})
    torch.save({"epoch": 3, under: state} if under else state, tmp_path / "w.pth")
    built = build(seed=9, weights=str(tmp_path / "w.pth"))
    assert weights_sha256(built) == weights_sha256(build(seed=5))
    assert f"its names begin with {prefix}, which is stripped; left out, as not of the model: loss.weight" in caplog.text


def test_a_backbone_of_a_larger_model_gets_a_new_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trainer.models")
    state = {name: tensor for name, tensor in saved("backbone.").items() if ".fc." not in name}
    torch.save(state | {"head.fc.weight": torch.ones(9, 1024)}, tmp_path / "w.pth")
    built = build(seed=9, weights=str(tmp_path / "w.pth")).state_dict()
    assert torch.equal(built["conv5.0.weight"], state["backbone.conv5.0.weight"])
    assert torch.equal(built["fc.weight"], build(seed=9).state_dict()["fc.weight"])
    assert "left out, as not of the model: head.fc.weight" in caplog.text
    assert "has no fc: a new head of 3 outputs is trained" in caplog.text


def test_of_two_copies_of_the_model_the_first_is_taken() -> None:
    own = ["a.weight", "b.weight"]
    state = {f"{which}.{name}": torch.full((1,), float(number)) for number, which in enumerate(("model", "ema")) for name in own}
    assert {name: value.item() for name, value in without_prefix(state, own, source="x").items()} == {"a.weight": 0.0, "b.weight": 0.0}


def test_names_that_are_the_models_own_are_left_alone() -> None:
    own = ["conv1.weight", "layer1.conv1.weight", "layer1.bn.weight"]
    state = {name: torch.zeros(1) for name in own}
    assert without_prefix(state, own, source="x") == state
    other = {f"layer1.{name}": torch.zeros(1) for name in ("x", "conv1.weight")}  # one of three is not the model with a prefix
    assert without_prefix(other, own, source="x") == other


@pytest.mark.parametrize(
    ("names", "keeps", "said"),
    [
        (("ant", "bee", "cat"), True, "its head is kept, as it was trained for the same classes"),
        (("cat", "bee", "ant"), False, "its head was trained for other classes (ant, bee, cat): a new one is trained"),
        (None, True, "its head of 3 outputs is kept, though nothing says for which classes it was"),
    ],
)
def test_the_head_of_an_exported_model_is_kept_for_the_same_classes_alone(
    names: tuple[str, ...] | None, keeps: bool, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trainer.models")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(saved(""), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"], "file_sha256": digest}))
    config = ModelConfig(name=NAME, weights=str(path))
    head = build_model(config, classes=3, seed=9, image_hw=(32, 32), names=names).state_dict()["fc.weight"]
    assert torch.equal(head, saved("")["fc.weight"]) == keeps
    assert said in caplog.text


def test_a_description_of_another_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(saved(""), path)
    for text in ("{", "[]", json.dumps({"classes": ["a"], "file_sha256": "ab" * 32})):
        (tmp_path / "config.json").write_text(text)
        assert output_names(path) is None


def test_all_that_is_missing_is_said_at_once_and_before_any_data_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.settings.packages._is_installed", lambda _: False)
    found = lacking(ModelConfig(name="timm/resnet18", weights="package:efficientnet_lite0"))
    words = ("use --model.name timm/tf_efficientnet_lite0", "needs the package efficientnet-lite0", "needs the package timm")
    assert len(found) == len(words)
    assert all(part in problem for part, problem in zip(words, found, strict=True))
    [problem] = lacking(ModelConfig(weights="/nowhere.pth"))
    assert "no such file; weights are imagenet" in problem
    assert lacking(ModelConfig(name="resnet18", weights="imagenet")) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ResNet-18", "resnet18"),
        ("resnet_50", "resnet50"),
        ("resnt18", "resnet18"),
        ("efficientnet", "efficientnet_b0"),
        ("mobilenet_v3", "mobilenet_v3_large"),
    ],
)
def test_a_mistyped_model_is_answered_with_the_plain_name_first(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"is not a torchvision classifier; did you mean {meant}( or |\\?)"):
        build_model(ModelConfig(name=typed, weights="none"), classes=3, seed=0, image_hw=(32, 32))


def test_a_name_that_timm_has_is_told_with_its_prefix() -> None:
    with pytest.raises(ValueError, match="timm has it: timm/tf_efficientnet_lite0"):
        build_model(ModelConfig(name="tf_efficientnet_lite0", weights="none"), classes=3, seed=0, image_hw=(32, 32))
