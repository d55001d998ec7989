"""The first layers of a ResNet-like model, chosen for small images. Called by `trainer.model.build_model`, before weights are loaded.

A ResNet opens with a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2, which leave 8x8 positions of a 32x32 image. `article` puts
in their place a random 3x3 convolution and no pool (the tutorial's way: the pretrained filters are thrown away). `folded` keeps the
pretrained filters and computes, at the price of `article`, exactly what the untouched network would see if the image were first enlarged 4x
by repeating pixels. `native` changes nothing. Which weights fill the layers is `trainer.model`'s business.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig, Stem

FOLD_LIMIT_PIXELS = 64  # folding shows the network 4x the size: 64 px become 256, about what ResNets are trained on


def is_resnet_like(model: nn.Module) -> bool:
    """Whether the model opens with `conv1`, 7x7 of stride 2 and padding 3, and a 3x3 `maxpool` of stride 2."""
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == ((7, 7), (2, 2), (3, 3), (1, 1), 1)
        and isinstance(pool, nn.MaxPool2d)
        and (pool.kernel_size, pool.stride, pool.padding) in ((3, 2, 1), ((3, 3), (2, 2), (1, 1)))
    )


def resolve_stem(config: ModelConfig, model: nn.Module, image_hw: tuple[int, int]) -> Stem:
    """The stem that `config.stem` means for this (untouched) model; never `auto`.

    `image_hw` is the size of the images in the data; `config.image_size`, where set, is what the network sees. ValueError where a stem is
    asked for that the model cannot have.
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
    """Change the model's first layers in place. `generator` fills the new 3x3 convolution of `article`."""
    assert stem != "auto", "resolve_stem comes first"
    if stem == "native":
        return
    assert is_resnet_like(model)
    conv = model.conv1
    assert isinstance(conv, nn.Conv2d)
    if stem == "folded":
        model.conv1 = FoldedConv2d(conv)
        return
    shape: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False}
    where: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    # skip_init: the constructor would draw from the global state.
    small = nn.utils.skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, **shape, **where)  # type: ignore[no-untyped-call]
    assert isinstance(small, nn.Conv2d)
    nn.init.kaiming_uniform_(small.weight, a=math.sqrt(5), generator=generator)  # nn.Conv2d's own distribution
    model.conv1 = small
    model.maxpool = nn.Identity()


class FoldedConv2d(nn.Module):
    """A 7x7 convolution of stride 2 and padding 3 over the input enlarged 4x by repeating pixels, without enlarging it.

    Output rows 2q and 2q+1 of such a convolution touch the enlarged rows 4q-3..4q+3 and 4q-1..4q+5, which are copies of the rows q-1, q
    and q+1 of the input: rows of the kernel that meet the same copy may be added up first. So both come from one 3-row kernel each, four
    3x3 kernels with columns, computed by one convolution of stride 1 and put into place by a pixel shuffle. Zero padding of 1 stands for
    the enlarged image's padding of 3.

    The parameter stays the 7x7 kernel (its name and shape too, so that state_dicts fit the original model) and is folded in each
    forward, a 192 x 49 by 49 x 36 product for a ResNet: the equality holds through training, not only at its start.
    """

    taps: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # (O, C, 7, 7), (O,) or None
        rows = torch.zeros(2, 3, 7)  # (phase, input row q-1..q+1, kernel row): 1 where the kernel's row meets a copy of the input's row
        rows[0, 0, 0:3] = rows[0, 1, 3:7] = 1
        rows[1, 0, 0:1] = rows[1, 1, 1:5] = rows[1, 2, 5:7] = 1
        flat = rows.view(6, 7)
        self.register_buffer("taps", torch.kron(flat, flat).to(conv.weight), persistent=False)  # (36, 49)

    def folded_weight(self) -> Tensor:
        """(4 * O, C, 3, 3); the phases (even and odd row, even and odd column) are outermost, then O."""
        out, channels = self.weight.shape[:2]
        with torch.autocast(self.weight.device.type, enabled=False):  # sums of weights stay in their own precision
            folded = F.linear(self.weight.flatten(2), self.taps)  # (O, C, 36)
        return folded.view(out, channels, 2, 3, 2, 3).permute(2, 4, 0, 1, 3, 5).reshape(4 * out, channels, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, O, 2H, 2W) channels_last."""
        bias = None if self.bias is None else self.bias.repeat(4)
        phases = F.conv2d(images, self.folded_weight(), bias, padding=1)  # (n, 4 * O, H, W)
        n, channels, height, width = phases.shape
        # A pixel shuffle that keeps channels_last: in NHWC order it moves runs of O values.
        spread = phases.permute(0, 2, 3, 1).reshape(n, height, width, 2, 2, channels // 4).permute(0, 1, 3, 2, 4, 5)
        return spread.reshape(n, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)
