"""The folded stem is the untouched network seen at four times the size; the tutorial's stem is the tutorial's."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.models.stem import FoldedConv2d, apply_stem, fit_stem, is_resnet_like, resolve_stem
from trainer.settings.tree import ModelConfig, Stem


def resnet18(seed: int = 0) -> nn.Module:
    """In float64, with BatchNorm that does something."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=4, mode="nearest")


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 3),
    out=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folded_convolution_equals_the_7x7_one_on_the_enlarged_image_borders_included(
    n: int, height: int, width: int, channels: int, out: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, out, 7, stride=2, padding=3, bias=bias).double()
    images = torch.randn(n, channels, height, width, dtype=torch.float64)
    folded = FoldedConv2d(conv)(images)
    assert folded.shape == (n, out, 2 * height, 2 * width)
    assert torch.allclose(folded, conv(enlarged(images)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_resnet18_with_the_folded_stem_equals_the_untouched_one_at_four_times_the_size(training: bool) -> None:
    plain, folded = resnet18().train(training), resnet18().train(training)
    apply_stem(folded, "folded", torch.Generator())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected, actual = plain(enlarged(images)), folded(images)
    assert (expected - actual).abs().max() <= 1e-12 * expected.abs().max()
    # Training's side effects and gradients too, so that the equality outlives the first step.
    expected.square().mean().backward()
    actual.square().mean().backward()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(folded.state_dict()[name], tensor, rtol=1e-12, atol=1e-12), name
    for (name, parameter), other in zip(plain.named_parameters(), folded.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.allclose(other.grad, parameter.grad, rtol=0, atol=1e-10 * float(parameter.grad.abs().max())), name


def test_state_dicts_go_back_and_forth_between_folded_and_untouched() -> None:
    folded = resnet18(1)
    apply_stem(folded, "folded", torch.Generator())
    plain = resnet18(2)
    plain.load_state_dict(folded.state_dict(), strict=True)
    folded.load_state_dict(resnet18(3).state_dict(), strict=True)


def test_folded_output_is_channels_last_for_either_input_and_folds_in_float32_under_autocast() -> None:
    stem = FoldedConv2d(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False))
    images = torch.randn(2, 3, 8, 8)
    for format_ in (torch.contiguous_format, torch.channels_last):
        assert stem(images.contiguous(memory_format=format_)).is_contiguous(memory_format=torch.channels_last)
    outside = stem.folded_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stem.folded_weight(), outside)
        assert stem(images).dtype == torch.bfloat16


def test_article_stem_is_the_tutorials_and_depends_on_the_generator_alone() -> None:
    first, second = resnet18(), resnet18()
    apply_stem(first, "article", torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    apply_stem(second, "article", torch.Generator().manual_seed(5))
    conv = first.conv1
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(first.maxpool, nn.Identity)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert torch.equal(conv.weight, second.conv1.weight)
    bound = 1 / 27**0.5  # nn.Conv2d's: uniform within 1 / sqrt(fan in)
    assert 0.9 * bound < conv.weight.abs().max() <= bound
    assert first.double()(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "image_size", "data_hw", "expected"),
    [
        ("resnet18", 0, (32, 32), "folded"),
        ("resnet18", 0, (64, 64), "folded"),
        ("resnet18", 0, (65, 40), "native"),
        ("resnet18", 224, (32, 32), "native"),
        ("resnet18", 48, (500, 500), "folded"),
        ("squeezenet1_1", 0, (32, 32), "native"),
    ],
)
def test_auto_folds_resnets_that_see_small_images(name: str, image_size: int, data_hw: tuple[int, int], expected: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    assert resolve_stem(ModelConfig(name=name, image_size=image_size), model, data_hw) == expected


@pytest.mark.parametrize("stem", ["article", "centre_crop", "phase_mean", "folded", "folded_bilinear"])
def test_a_stem_the_model_cannot_have_is_refused_with_the_fix(stem: str) -> None:
    model = torchvision.models.squeezenet1_1()
    assert not is_resnet_like(model)
    with pytest.raises(ValueError, match=rf"model.stem={stem} .*model.name=squeezenet1_1.*--model.stem native"):
        resolve_stem(ModelConfig(name="squeezenet1_1", stem=stem), model, (32, 32))  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 3),
    out=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folded_from_bilinear_enlargement_is_exact_but_for_the_first_three_and_last_two_rows_and_columns(
    n: int, height: int, width: int, channels: int, out: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, out, 7, stride=2, padding=3, bias=bias).double()
    images = torch.randn(n, channels, height, width, dtype=torch.float64)
    wanted = conv(F.interpolate(images, scale_factor=4, mode="bilinear", align_corners=False))
    folded = FoldedConv2d(conv, "bilinear")(images)
    assert folded.shape == wanted.shape == (n, out, 2 * height, 2 * width)
    inside = (..., slice(3, 2 * height - 2), slice(3, 2 * width - 2))
    assert torch.allclose(folded[inside], wanted[inside], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("row", "differs"), [(0, True), (1, True), (2, True), (3, False), (-3, False), (-2, True), (-1, True)])
def test_the_border_that_bilinear_folding_leaves_inexact_is_no_wider_than_said(row: int, differs: bool) -> None:
    conv = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    wanted = conv(F.interpolate(images, scale_factor=4, mode="bilinear", align_corners=False))
    off = (FoldedConv2d(conv, "bilinear")(images) - wanted).abs()
    inside = slice(3, -2)
    assert (float(off[..., row, inside].max()) > 1e-6) == differs
    assert (float(off[..., inside, row].max()) > 1e-6) == differs


def test_antialiased_bilinear_resizing_is_the_enlargement_that_is_folded() -> None:
    """What model.image_size=128 would do to images of 32 pixels."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    resized = F.interpolate(images, size=(128, 128), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized, F.interpolate(images, scale_factor=4, mode="bilinear", align_corners=False), rtol=0, atol=1e-12)


def test_centre_crop_is_the_middle_of_the_pretrained_kernel_and_phase_mean_the_folded_one_averaged() -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    untouched = resnet18(4)
    kernel = untouched.conv1.weight.detach().clone()
    stems = {}
    for stem in ("centre_crop", "phase_mean"):
        model = resnet18(4)
        apply_stem(model, stem, torch.Generator())  # type: ignore[arg-type]
        assert isinstance(model.maxpool, nn.Identity)
        conv = model.conv1
        assert isinstance(conv, nn.Conv2d)
        assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
        assert conv.weight.requires_grad
        assert model(images).shape == (2, 10)
        stems[stem] = conv
    assert torch.equal(stems["centre_crop"].weight, kernel[..., 2:5, 2:5])
    folded = FoldedConv2d(untouched.conv1)(images)
    torch.testing.assert_close(stems["phase_mean"](images), F.avg_pool2d(folded, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stem", ["centre_crop", "phase_mean"])
def test_pretrained_weights_are_fitted_to_a_small_stem_and_its_own_weights_stay(stem: Stem) -> None:
    state = dict(resnet18(5).state_dict())
    fitted = fit_stem(state, stem)
    assert fitted["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    model = resnet18(5)
    apply_stem(model, stem, torch.Generator())
    assert torch.equal(model.conv1.weight, fitted["conv1.weight"])
    assert all(value is fitted[name] for name, value in state.items() if name != "conv1.weight")
    again = fit_stem(fitted, stem)
    assert again["conv1.weight"] is fitted["conv1.weight"]
    for other in ("native", "article", "folded", "folded_bilinear"):
        assert fit_stem(state, other)["conv1.weight"] is state["conv1.weight"]  # type: ignore[arg-type]
