"""Convolutions as products: the same sums, and only where they are meant."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.models import im2col as small_maps
from trainer.models.im2col import (
    MOST_WINDOW_BYTES,
    Im2colConv2d,
    Layer,
    result_of,
    takes_gradient,
    takes_result,
    use_im2col,
    weight_gradient_of,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which products were made."""
    made: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Tensor:
            made.append(name)
            result: Tensor = function(*args)
            return result

        return call

    for name in ("result_of", "weight_gradient_of"):
        monkeypatch.setattr(small_maps, name, counted(name, getattr(small_maps, name)))
    return made


def trits(generator: torch.Generator, *shape: int) -> Tensor:
    """-1, 0 or 1 in bf16, channels_last: sums of up to 256 products of them are exact."""
    values = torch.randint(-1, 2, shape, generator=generator).to(torch.bfloat16)
    return values.contiguous(memory_format=torch.channels_last)


@given(
    n=st.integers(1, 4),
    channels=st.integers(1, 6),
    out_channels=st.integers(1, 6),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 2**32),
)
def test_products_are_the_convolution_to_the_bit_where_nothing_is_rounded(
    n: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = trits(generator, n, channels, *size), trits(generator, out_channels, channels, *kernel)
    leaf = weight.float().requires_grad_()
    expected = F.conv2d(x.float(), leaf, stride=stride, padding=padding)
    gradient = trits(generator, *expected.shape)
    expected.backward(gradient.float())
    assert leaf.grad is not None
    found, of_weight = result_of(x, weight, stride, padding), weight_gradient_of(x, gradient, weight.shape[2:], stride, padding)
    assert torch.equal(found.float(), expected)
    assert torch.equal(of_weight.float(), leaf.grad)
    for tensor in (found, of_weight):
        assert tensor.dtype is torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def network(*, width: int = 512) -> nn.Sequential:
    """A wide layer on 4 x 4, one with a stride on to it, a narrow one that only its gradient's product is for, and one on a large map."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1, bias=False),  # 16 x 16: the convolution
        nn.Conv2d(128, 256, 3, stride=2, padding=1, bias=False),  # 8 x 8, a stride: the gradient
        nn.Conv2d(256, width, 3, stride=2, padding=1, bias=False),  # 4 x 4: both
        nn.Conv2d(width, 64, 3, padding=1, bias=False),  # 4 x 4, narrow: the gradient
    ).to(memory_format=torch.channels_last)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(leaf)
    out.float().square().sum().backward()
    assert leaf.grad is not None
    return out.detach(), [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_step_makes_the_products_it_should_and_its_gradients_are_those_of_convolutions_but_for_rounding(calls: list[str]) -> None:
    plain, changed = network(), network()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
    expected, expected_gradients = gradients(plain, x)
    assert use_im2col(changed) == 4
    found, found_gradients = gradients(changed, x)
    assert calls == ["result_of", *["weight_gradient_of"] * 3]
    for ours, theirs in zip([found, *found_gradients], [expected, *expected_gradients], strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 0.02  # bf16 has 8 bits, four layers and the square of what comes out of them
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
    assert list(plain.state_dict()) == list(changed.state_dict())


def test_without_gradients_without_bf16_and_for_what_is_frozen_it_is_the_convolution(calls: list[str]) -> None:
    plain, changed = network(), network()
    use_im2col(changed)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), changed(x))
    with torch.no_grad():
        assert torch.equal(plain(x), changed(x))
    assert torch.equal(plain(x), changed(x))  # float32
    with torch.autocast("cpu", torch.bfloat16):
        for model in (plain, changed):
            model.requires_grad_(False)
        assert torch.equal(plain(x), changed(x))
    assert calls == []


def test_only_plain_convolutions_are_changed() -> None:
    class Own(nn.Conv2d):
        pass

    left_alone = [
        nn.Conv2d(4, 4, 3, bias=True),
        nn.Conv2d(4, 4, 3, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"),
        nn.Conv2d(4, 4, 3, bias=False, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, bias=False, stride=(1, 2)),
        Own(4, 4, 3, bias=False),
        nn.Linear(4, 4),
    ]
    types = [type(module) for module in left_alone]
    assert use_im2col(nn.ModuleList(left_alone)) == 0
    assert [type(module) for module in left_alone] == types
    resnet = torchvision.models.resnet18()
    assert use_im2col(resnet) == 17  # all but the three of 1 x 1
    assert isinstance(resnet.layer4[0].conv1, Im2colConv2d)
    assert use_im2col(resnet) == 0  # they are already


@given(
    images=st.integers(1, 512),
    in_channels=st.sampled_from([64, 128, 256, 512]),
    out_channels=st.sampled_from([64, 128, 256, 512]),
    stride=st.integers(1, 2),
    map_pixels=st.integers(1, 256),
)
def test_no_layer_takes_the_product_forward_only_and_none_lays_out_more_than_the_cache_holds(
    images: int, in_channels: int, out_channels: int, stride: int, map_pixels: int
) -> None:
    layer = Layer(images=images, in_channels=in_channels, out_channels=out_channels, kernel=(3, 3), stride=stride, map_pixels=map_pixels)
    taken = takes_gradient(layer)
    assert not taken or (layer.window_bytes <= MOST_WINDOW_BYTES and map_pixels <= 64)
    assert not taken or map_pixels <= 16 or stride == 2
    assert not takes_result(layer) or map_pixels <= 16
