"""Adapts the first layers of a ResNet-like model to small images. `trainer.models.vision.build_model` calls it before it loads weights.

A ResNet begins with a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2, which reduce a 32x32 image to 8x8 positions.

    native           changes nothing
    article          a random 3x3 convolution of stride 1 and no pool, as in the tutorial; the pretrained filters are lost
    centre_crop      the same, but the 3x3 is the middle of the pretrained 7x7
    phase_mean       the same, but the 3x3 is the pretrained 7x7 applied to an image enlarged 4x by repeating pixels, averaged over the
                     four positions of its stride: `folded`, averaged 2x2
    folded           exactly what the unchanged network computes on an image enlarged 4x by repeating pixels, at the price of `article`
    folded_bilinear  the same for bilinear interpolation; exact except in the outermost rows and columns (FoldedConv2d)

`trainer.models.vision` chooses the weights; `fit_stem` brings pretrained weights into a stem's shape.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.settings.tree import ModelConfig, Stem

FOLDED_TIMES = 4
FOLD_LIMIT_PIXELS = 64  # the network sees folded images 4x as large: 64 px become 256, about the size ResNets are trained on


def is_resnet_like(model: nn.Module) -> bool:
    """Whether the model begins with `conv1`, 7x7 of stride 2 and padding 3, and a 3x3 `maxpool` of stride 2."""
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == ((7, 7), (2, 2), (3, 3), (1, 1), 1)
        and isinstance(pool, nn.MaxPool2d)
        and (pool.kernel_size, pool.stride, pool.padding) in ((3, 2, 1), ((3, 3), (2, 2), (1, 1)))
    )


def resolve_stem(config: ModelConfig, model: nn.Module, image_hw: tuple[int, int]) -> Stem:
    """The stem that `config.stem` means for this unchanged model; never `auto`.

    `image_hw` is the size of the data's images. If `config.image_size` is set, the network sees that size instead. ValueError if the model
    cannot have the stem.
    """
    seen_pixels = config.image_size or max(image_hw)
    resnet_like = is_resnet_like(model)
    if config.stem == "auto":
        return "folded" if resnet_like and seen_pixels <= FOLD_LIMIT_PIXELS else "native"
    if config.stem != "native" and not resnet_like:
        raise ValueError(
            f"model.stem={config.stem} changes a 7x7 convolution of stride 2 followed by a max-pool, which model.name={config.name} "
            "does not begin with; use --model.stem native"
        )
    return config.stem


def apply_stem(model: nn.Module, stem: Stem, generator: torch.Generator) -> None:
    """Change the model's first layers in place. `generator` initialises the new 3x3 convolution of `article`. Those of `centre_crop` and
    `phase_mean` are computed from the model's 7x7."""
    assert stem != "auto", "resolve_stem comes first"
    if stem == "native":
        return
    assert is_resnet_like(model)
    conv = model.conv1
    assert isinstance(conv, nn.Conv2d)
    if stem in ("folded", "folded_bilinear"):
        model.conv1 = FoldedConv2d(conv, "nearest" if stem == "folded" else "bilinear")
        return
    shape: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False}
    where: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    # skip_init: the constructor would draw from the global random state.
    small = nn.utils.skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, **shape, **where)  # type: ignore[no-untyped-call]
    assert isinstance(small, nn.Conv2d)
    if stem == "article":
        nn.init.kaiming_uniform_(small.weight, a=math.sqrt(5), generator=generator)  # nn.Conv2d's own distribution
    else:
        with torch.no_grad():
            small.weight.copy_(_small_kernel(conv.weight, stem))
    model.conv1 = small
    model.maxpool = nn.Identity()


def enlarging_of(model: nn.Module) -> int:
    """How many times as large the model sees its images: the stems `folded` and `folded_bilinear` act as if these were enlarged."""
    return FOLDED_TIMES if any(isinstance(layer, FoldedConv2d) for layer in model.modules()) else 1


def fit_stem(state: Mapping[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """`state` with the 7x7 `conv1.weight` of an unchanged model converted to the 3x3 of `centre_crop` or `phase_mean`. A 3x3 stays."""
    fitted = dict(state)
    weight = fitted.get("conv1.weight")
    if stem in ("centre_crop", "phase_mean") and weight is not None and weight.shape[-2:] == (7, 7):
        fitted["conv1.weight"] = _small_kernel(weight, stem)
    return fitted


def _small_kernel(weight: Tensor, stem: Stem) -> Tensor:
    """(O, C, 7, 7) -> (O, C, 3, 3)."""
    if stem == "centre_crop":
        return weight[..., 2:5, 2:5].contiguous()
    assert stem == "phase_mean"
    rows = _rows("nearest").to(weight).mean(0)  # (3, 7)
    return rows @ weight @ rows.T


def _rows(enlarged_by: Literal["nearest", "bilinear"]) -> Tensor:
    """(phase, input row, kernel row) float32, (2, k, 7): the weight of an input row at a kernel row, for even (0) and odd (1) output rows.

    With the output rows 2q and 2q + 1, the input rows are q - 1 .. q + 1 for `nearest`, q - 2 .. q + 1 for `bilinear`."""
    if enlarged_by == "nearest":
        rows = torch.zeros(2, 3, 7)  # 1 where the kernel row meets a copy of the input row
        rows[0, 0, 0:3] = rows[0, 1, 3:7] = 1
        rows[1, 0, 0:1] = rows[1, 1, 1:5] = rows[1, 2, 5:7] = 1
        return rows
    rows = torch.zeros(2, 4, 7)
    for phase in range(2):
        for tap in range(7):
            # Position of the enlarged row 4q + 2 * phase - 3 + tap in input rows, relative to q (align_corners=False).
            at = (2 * phase - 3 + tap + 0.5) / 4 - 0.5
            below = math.floor(at)
            rows[phase, below + 2, tap] += 1 - (at - below)
            if at > below:
                rows[phase, below + 3, tap] += at - below
    return rows


class FoldedConv2d(nn.Module):
    """A 7x7 convolution of stride 2 and padding 3 over the input enlarged 4x, computed without enlarging it.

    Output rows 2q and 2q+1 of such a convolution read the enlarged rows 4q-3..4q+3 and 4q-1..4q+5. If pixels are repeated (`nearest`),
    these are copies of the input rows q-1, q and q+1, so kernel rows that meet the same copy can be added up first. Each of the two output
    rows then needs one 3-row kernel. With columns this gives four 3x3 kernels, which one convolution of stride 1 computes and a pixel
    shuffle puts into place. Zero padding of 1 replaces the enlarged image's padding of 3.

    Interpolated rows (`bilinear`, torch's with align_corners=False) mix two input rows each, from q-2 to q+1 altogether. The kernels are
    4x4 and cost 16/9 as much. Inside the image the result is exact. At the border it is not: interpolation repeats the outermost pixel
    outwards before the convolution pads with zeros, and one kernel cannot do both. Here zeros begin right outside the image. In the
    outermost four enlarged rows on each side, two inside and two outside, the error is 1/8, 3/8, 3/8 and 1/8 of the pixel; with repeated
    pixels, three rows would be wrong by the whole pixel. This affects the first three and the last two output rows, and the same columns.

    The parameter stays the 7x7 kernel with its name and shape, so that state_dicts fit the original model. Each forward pass folds it (a
    192 x 49 by 49 x 36 product for a ResNet), so the equality holds throughout training.
    """

    taps: Tensor

    def __init__(self, conv: nn.Conv2d, enlarged_by: Literal["nearest", "bilinear"] = "nearest") -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # (O, C, 7, 7), (O,) or None
        rows = _rows(enlarged_by)  # (2, k, 7)
        self._side = rows.shape[1]
        flat = rows.view(2 * self._side, 7)
        self.register_buffer("taps", torch.kron(flat, flat).to(conv.weight), persistent=False)  # (4 * k * k, 49)

    def folded_weight(self) -> Tensor:
        """(4 * O, C, k, k) with k = 3 or 4. The phases (even and odd row, even and odd column) are outermost, then O."""
        out, channels = self.weight.shape[:2]
        with torch.autocast(self.weight.device.type, enabled=False):  # sum weights in their own precision
            folded = F.linear(self.weight.flatten(2), self.taps)  # (O, C, 4 * k * k)
        k = self._side
        return folded.view(out, channels, 2, k, 2, k).permute(2, 4, 0, 1, 3, 5).reshape(4 * out, channels, k, k)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, O, 2H, 2W) channels_last."""
        bias = None if self.bias is None else self.bias.repeat(4)
        phases = self._conv_forward(images, self.folded_weight(), bias)
        n, channels, height, width = len(images), phases.shape[1], *images.shape[2:]
        phases = phases[..., :height, :width]  # (n, 4 * O, H, W); drops the extra row and column that a 4x4 kernel with padding 2 gives
        # A pixel shuffle that keeps channels_last: in NHWC order it moves contiguous runs of O values.
        spread = phases.permute(0, 2, 3, 1).reshape(n, height, width, 2, 2, channels // 4).permute(0, 1, 3, 2, 4, 5)
        return spread.reshape(n, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By the name that it has in nn.Conv2d (trainer.models.padded)."""
        return F.conv2d(images, weight, bias, padding=self._side - 2)
