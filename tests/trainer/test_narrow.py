"""`model.widths` makes a built model narrower: only the named layers and what reads them change, and what does not fit is told by name."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.models.narrow import narrow, widths_between
from trainer.models.vision import build_model, head_of
from trainer.settings.rules import validate
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.values import widths_of, widths_text

# BasicBlocks whose inner convolution stands alone, so that each may have any width.
INNER = {f"layer{stage}.{block}.conv1": 64 * 2 ** (stage - 1) for stage in range(1, 5) for block in range(2)}


def build(name: str = "resnet18", *, classes: int = 10, **fields: Any) -> nn.Module:
    return build_model(ModelConfig(name=name, weights="none", **fields), classes=classes, seed=0, image_hw=(32, 32))


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    return build()


@given(chosen=st.fixed_dictionaries({}, optional={name: st.integers(1, width) for name, width in INNER.items()}))
@settings(max_examples=6, deadline=None)
def test_a_narrower_model_keeps_the_first_channels_and_nothing_else_changes(whole: nn.Module, chosen: dict[str, int]) -> None:
    model = build(widths=widths_text(chosen))
    assert model.training
    assert widths_between(whole, model) == {name: width for name, width in chosen.items() if width != INNER[name]}
    for (name, own), (same, full) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
        assert name == same
        inner = {f"{layer}{part}": width for layer, width in chosen.items() for part in (".weight",)}
        norms = {layer.replace("conv1", "bn1"): width for layer, width in chosen.items()}
        reads = {layer.replace("conv1", "conv2"): width for layer, width in chosen.items()}
        expected = full
        if name in inner:
            expected = full[: inner[name]]
        elif (layer := name.rpartition(".")[0]) in norms and full.ndim:
            expected = full[: norms[layer]]
        elif layer in reads:
            expected = full[:, : reads[layer]]
        assert torch.equal(own, expected), name
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_folded_stem_a_depthwise_convolution_and_a_linear_layer_after_flattening_follow() -> None:
    residual = dict.fromkeys(("conv1", "layer1.0.conv2", "layer1.1.conv2"), 24)
    folded = build(widths=widths_text(residual))
    assert folded.get_submodule("conv1").weight.shape == (24, 3, 7, 7)
    assert folded.get_submodule("layer2.0.conv1").weight.shape == (128, 24, 3, 3)
    mobile = build("mobilenet_v2", widths="features.2.conv.0.0=40")
    depthwise = mobile.get_submodule("features.2.conv.1.0")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels, len(depthwise.weight)) == (40, 40, 40, 40)
    dense = build("vgg11", widths="features.18=96,classifier.0=100", image_size=64)
    assert dense.get_submodule("classifier.0").weight.shape == (100, 96 * 7 * 7)
    assert dense.get_submodule("classifier.3").weight.shape == (4096, 100)


def test_no_widths_are_no_change(whole: nn.Module) -> None:
    model = build(widths="")
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    narrow(model, {}, head=head_of(model)[0], seen=(32, 32))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(not layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    ("name", "widths", "problem"),
    [
        ("resnet18", "layer1.0.cnv1=8", "the model has no layer layer1.0.cnv1; did you mean layer1.0.conv1?"),
        ("resnet18", "layer1.0.bn1=8", "layer1.0.bn1 is a BatchNorm2d; convolutions and linear layers have a width"),
        ("resnet18", "fc=8", "fc makes the outputs, of which the data say how many there are; leave it out"),
        ("resnet18", "layer1.0.conv1=65", "layer1.0.conv1=65; the layer has 64 channels, and can keep from 1 up to them"),
        ("resnet18", "layer1.0.conv2=32", "model.widths does not fit the model: its pass ends after layer1.0.bn2"),
        ("mobilenet_v2", "features.2.conv.1.0=8", "features.2.conv.1.0 is a depthwise convolution, which has as many channels as it gets"),
        ("resnext50_32x4d", "layer1.0.conv2=100", "layer1.0.conv2=100; the layer has 128 channels, and can keep from a multiple of its 32"),
        ("resnext50_32x4d", "layer1.0.conv1=100", "layer1.0.conv2 gets 100 channels for its 32 groups"),
        ("googlenet", "aux1.fc1=8", "the model has no layer aux1.fc1"),
        ("convnext_tiny", "features.0.0=48", "model.widths does not fit the model: its pass ends after features.0.0"),
    ],
)
def test_a_width_that_does_not_fit_is_told_by_its_layer(name: str, widths: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(name, widths=widths)
    assert problem in str(caught.value)


def test_a_layer_through_which_nothing_goes_is_told() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.used(images)
            return found

    with pytest.raises(ValueError, match="names left, which no image goes through"):
        narrow(Unused(), {"left": 2}, head="", seen=(4, 4))


@given(st.dictionaries(st.from_regex(r"[a-z0-9_.]{1,20}", fullmatch=True), st.integers(1, 10**8)))
def test_widths_as_text_and_back(widths: dict[str, int]) -> None:
    assert widths_of(widths_text(widths)) == widths


@pytest.mark.parametrize("text", ["conv1", "conv1=", "=8", "conv1=0", "conv1=-3", "conv1=x", "conv1=8,", "conv1=8,conv1=9", "conv1=1e3"])
def test_a_text_that_is_no_widths_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"model\.widths"):
        validate(RunConfig(model=ModelConfig(weights="none", widths=text)))


@pytest.mark.parametrize("weights", ["imagenet", "package:efficientnet_lite0"])
def test_a_librarys_weights_are_refused_before_anything_is_built(weights: str) -> None:
    with pytest.raises(ValueError, match=f"model.weights={weights} are of a model whose layers have all their channels"):
        validate(RunConfig(model=ModelConfig(weights=weights, widths="layer1.0.conv1=32")))
    validate(RunConfig(model=ModelConfig(weights="none", widths="layer1.0.conv1=32")))
