"""A first convolution that reads eight channels in place of three (`train.pad_channels`). Called by trainer.learn.build.

A pixel of three channels is badly aligned for the kernels that a GPU has for channels_last, worst in the gradient of the weight. Five
channels of zeros more, with weights of zero, make it 16 bytes in bf16; they add zeros to each sum, so the result is the same but for the
order in which a kernel adds. Names and parameters stay: the zeros are added in the forward pass, and their gradient is dropped. A model in
eval mode computes as it always did.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.stem import FoldedConv2d

CHANNELS = 8
COLOURS = 3


def pad_channels(model: nn.Module, name: str) -> int:
    """Let each convolution of three channels read eight while it is trained. Returns how many. ValueError if the model, which `model.name`
    calls `name`, has none."""
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | FoldedConv2d) and module.weight.shape[1] == COLOURS and getattr(module, "groups", 1) == 1:
            module.__class__ = _padded(type(module))  # type: ignore[assignment]
            changed += 1
    if not changed:
        raise ValueError(
            f"train.pad_channels=true pads the input of a convolution of {COLOURS} channels, and model.name={name} has none; leave it out"
        )
    return changed


class Padded(nn.Module):
    """What `pad_channels` puts before a convolution's own class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # the name is nn.Conv2d's
        if self.training:
            input, weight = with_zeros(input), with_zeros(weight)
        result: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        return result


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _padded(own: type[nn.Module]) -> type[nn.Module]:
    """The class of a convolution that is `own` and pads; one for each class, as torch.compile compiles by it."""
    if issubclass(own, Padded):
        return own
    if own not in _CLASSES:
        _CLASSES[own] = type(f"Padded{own.__name__}", (Padded, own), {"__module__": __name__})
    return _CLASSES[own]


def with_zeros(given: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, 8, H, W) with zeros behind, in the memory order of `given` and in the type in which a convolution computes."""
    kind = given.device.type
    if torch.is_autocast_enabled(kind):
        given = given.to(torch.get_autocast_dtype(kind))  # as autocast would do, on fewer bytes
    return F.pad(given, (0, 0, 0, 0, 0, CHANNELS - COLOURS))
