"""Convolutions on small maps as matrix products, for CPUs that multiply bf16 matrices but have no AMX (`train.small_maps`). Called by
trainer.learn.build.

oneDNN's kernels go along the rows of a map. In a ResNet's last stage a row has four pixels, and the kernels spend their time on its ends:
the weight gradient of 512 channels on 4 x 4 takes 12.1 ms, a matrix product of the same size 8.6 ms (AMD EPYC, two cores, batch 100). For
such layers this file lays out the windows (im2col; a few MB, which stay in cache) and computes the weight gradient as one product with
them. For wide layers it computes the result as a product too. A product sums in float32 and rounds to bf16 once, as oneDNN does. oneDNN
still computes the input's gradient. benchmarks/small_maps.py measured which way is faster for which layer; `takes_gradient` and
`takes_result` encode it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

TINY_MAP_PIXELS = 16
SMALL_MAP_PIXELS = 64
SMALL_MAP_CHANNELS = 128
WIDE_CHANNELS = (256, 512)
"""Channels in and out; with fewer, the convolution's own kernel is faster."""
MOST_WINDOW_BYTES = 20 * 2**20
"""Larger windows do not fit the last-level cache, and the product waits for memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A convolution and its batch."""

    images: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: int
    map_pixels: int
    """Pixels of an output map."""

    @property
    def window_bytes(self) -> int:
        """Bytes of all windows laid out in bf16."""
        return 2 * self.images * self.map_pixels * self.in_channels * self.kernel[0] * self.kernel[1]


def takes_gradient(layer: Layer) -> bool:
    """Whether a product computes the weight gradient faster."""
    if layer.window_bytes > MOST_WINDOW_BYTES:
        return False
    is_small = layer.stride > 1 and layer.map_pixels <= SMALL_MAP_PIXELS and layer.out_channels >= SMALL_MAP_CHANNELS
    return layer.map_pixels <= TINY_MAP_PIXELS or is_small


def takes_result(layer: Layer) -> bool:
    """Whether a product computes the result faster too. Ask only for layers that pass `takes_gradient`."""
    return layer.map_pixels <= TINY_MAP_PIXELS and layer.in_channels >= WIDE_CHANNELS[0] and layer.out_channels >= WIDE_CHANNELS[1]


def use_im2col(model: nn.Module) -> int:
    """Replace the class of each convolution in `model` that may gain from products; it then decides in each training pass. Returns how
    many.

    Names and weights stay, and so does what the layers compute without gradients (evaluation, prediction, export)."""
    changed = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and _may_gain(module):
            module.__class__ = Im2colConv2d
            changed += 1
    return changed


def _may_gain(conv: nn.Conv2d) -> bool:
    return (
        conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and min(conv.kernel_size) > 1
        and conv.stride[0] == conv.stride[1]
    )


class Im2colConv2d(nn.Conv2d):
    """nn.Conv2d that uses products where they are faster, under bf16 autocast on a CPU. `use_im2col` makes it."""

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Module's
        layer = self._layer(input)
        if layer is None or not takes_gradient(layer):
            return super().forward(input)
        result: Tensor = _Im2colConvolution.apply(
            input.to(torch.bfloat16), self.weight.to(torch.bfloat16), self.stride, self.padding, takes_result(layer)
        )
        return result

    def _layer(self, x: Tensor) -> Layer | None:
        """The layer for this input; None if products cannot be used."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad) or torch.compiler.is_compiling():
            return None
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") is not torch.bfloat16:
            return None
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, _pair(self.padding)
        rows, columns = (x.shape[2] + 2 * ph - kh) // sh + 1, (x.shape[3] + 2 * pw - kw) // sw + 1
        return Layer(
            images=len(x),
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=(kh, kw),
            stride=sh,
            map_pixels=rows * columns,
        )


def _pair(padding: str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(padding, str), "use_im2col leaves such ones alone"
    rows, columns = padding
    return rows, columns


class _Im2colConvolution(torch.autograd.Function):
    """conv2d(x, weight) of bf16 tensors, x channels_last."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], is_product: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding  # type: ignore[attr-defined]
        return result_of(x, weight, stride, padding) if is_product else torch.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
            )[0]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient_of(x, gradient, weight.shape[2:], ctx.stride, ctx.padding)
        return of_x, of_weight, None, None, None


def result_of(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """conv2d of x (n, C, H, W) channels_last with weight (O, C, kh, kw): (n, O, H', W') channels_last."""
    windows, (n, rows, columns) = _windows(x, weight.shape[2:], stride, padding)
    product = windows @ weight.permute(0, 2, 3, 1).reshape(len(weight), -1).t()
    return product.view(n, rows, columns, -1).permute(0, 3, 1, 2)


def weight_gradient_of(x: Tensor, gradient: Tensor, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """(O, C, kh, kw) channels_last, from conv2d's input (n, C, H, W) and its result's gradient (n, O, H', W')."""
    windows, _ = _windows(x, kernel, stride, padding)
    out_channels = gradient.shape[1]
    product = gradient.permute(0, 2, 3, 1).reshape(-1, out_channels).t() @ windows
    return product.view(out_channels, *kernel, -1).permute(0, 3, 1, 2)


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """The input window of each result pixel, (n H' W', kh kw C); and (n, H', W')."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))  # (n, H + 2 ph, W + 2 pw, C) in memory
    n, height, width, channels = padded.shape
    rows, columns = (height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1
    per_image, per_row, per_column, per_channel = padded.stride()
    strides = (per_image, per_row * stride[0], per_column * stride[1], per_row, per_column, per_channel)
    views = padded.as_strided((n, rows, columns, *kernel, channels), strides)  # (n, H', W', kh, kw, C)
    return views.reshape(n * rows * columns, kernel[0] * kernel[1] * channels), (n, rows, columns)
