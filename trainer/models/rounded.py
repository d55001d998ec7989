"""Quantisation-aware training (`train.quantise`): layers that compute, while they are trained, with the numbers that an int8 export will
have. Called by trainer.learn.build.

Post-training quantisation (trainer/formats/quantise.py) rounds a finished model: weights to 129 steps for each output channel, what goes
into a layer to 256 steps over its extremes. Here both are rounded in the forward pass and the gradient goes through as if they were not
(the straight-through estimator, Bengio et al. 2013; Jacob et al. 2018), so the weights learn to be where rounding does little harm.

Nothing is remembered: the extremes are those of the weight, and of the batch at hand. So there is no state to save, and a pass depends
on its batch alone. BatchNorm, which the export folds into the weights, multiplies each output channel by one number, and a scale for each
channel follows it: rounding before the folding and after it are the same.
"""

import torch
from torch import Tensor, nn

WEIGHT_STEPS = 64
"""To either side of 0: the 7 bits that the export uses (`reduce_range`)."""
INPUT_STEPS = 255
_TINY = torch.finfo(torch.float32).tiny


def round_layers(model: nn.Module) -> int:
    """Let each Conv2d and Linear of `model` (and layers derived from them) round while it is trained. Returns how many.

    Names and parameters stay, and so does what they compute in eval mode: evaluation, export."""
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.__class__ = _rounded(type(module))  # type: ignore[assignment]
            changed += 1
    return changed


class Rounded(nn.Module):
    """What `round_layers` puts before a layer's own class."""

    @property
    def weight(self) -> Tensor:
        """The parameter; while the layer is trained, rounded. Whatever class the layer has reads its weight here."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return rounded_weight(parameter) if self.training else parameter

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Module's
        result: Tensor = super().forward(rounded_input(input) if self.training else input)
        return result


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _rounded(own: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer that is `own` and rounds; one for each class, as torch.compile compiles by it."""
    if issubclass(own, Rounded):
        return own
    if own not in _CLASSES:
        _CLASSES[own] = type(f"Rounded{own.__name__}", (Rounded, own), {"__module__": __name__})
    return _CLASSES[own]


def rounded_weight(weight: Tensor) -> Tensor:
    """(O, ...) -> the same shape: multiples of a 64th of the largest magnitude of each output channel. The gradient is that of `weight`."""
    with torch.no_grad():
        largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)  # (O, 1, ...)
        step = (largest / WEIGHT_STEPS).clamp_min(_TINY)
        change = torch.round(weight / step) * step - weight
    return weight + change


def rounded_input(given: Tensor) -> Tensor:
    """Any shape, floating -> the same: 256 values from the smallest to the largest number in it, 0 being one of them. The gradient is that
    of `given`."""
    with torch.no_grad():
        exact = given.float()
        low, high = torch.aminmax(exact)
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = ((high - low) / INPUT_STEPS).clamp_min(_TINY)
        zero = torch.round(-low / step)
        change = (torch.round(exact / step).clamp(-zero, INPUT_STEPS - zero) * step - exact).to(given.dtype)
    return given + change
