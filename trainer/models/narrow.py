"""Makes a built model narrower: the layers that `model.widths` names keep fewer channels, and what reads them follows. `build_model` calls
it before it loads weights, so a pruned model (trainer.prune) is an ordinary one for everything that builds models.

Only the layers that choose a number of channels are named. What the others take is what arrives at them: one blank image goes through
the model, and each layer is cut to it right before it runs. So nothing here knows how an architecture is wired.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.architecture import one_line
from trainer.models.stem import FoldedConv2d
from trainer.settings.words import did_you_mean

Wide = nn.Conv2d | nn.Linear | FoldedConv2d
"""Layers that have a number of output channels of their own, unless they are depthwise."""


def narrow(model: nn.Module, widths: Mapping[str, int], *, head: str, seen: tuple[int, int]) -> None:
    """Cut `model` in place. `widths`: output channels by the qualified name of a layer; the first ones stay, with their weights. `head`
    keeps its outputs. `seen`: (height, width) of the images. ValueError, with the layer's name, if a width does not fit."""
    layers = dict(model.named_modules())
    for name, width in widths.items():
        _check(name, width, layers, head)
    ran: list[str] = []

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def cut(layer: nn.Module, arguments: Any) -> None:
            ran.append(name)
            _follow(name, layer, arguments[0])
            if name in widths:
                _keep_outputs(layer, widths[name])

        return cut

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items() if _is_cut(layer)]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *seen))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        after = f" after {ran[-1]}" if ran else ""
        raise ValueError(f"model.widths does not fit the model: its pass ends{after} ({one_line(error)}); {_FIX}") from error
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if unused := [name for name in widths if name not in ran]:
        raise ValueError(f"model.widths names {', '.join(unused)}, which no image goes through; {_FIX}")


def widths_between(wide: nn.Module, narrower: nn.Module) -> dict[str, int]:
    """The widths by which `narrow` makes `wide` the shape of `narrower`, the same network with fewer channels."""
    layers = dict(narrower.named_modules())
    return {
        name: len(layers[name].weight)
        for name, layer in wide.named_modules()
        if isinstance(layer, Wide) and not _is_depthwise(layer) and len(layers[name].weight) != len(layer.weight)
    }


_FIX = "take the widths that finetune prune wrote for this model.name and model.stem"


def _check(name: str, width: int, layers: Mapping[str, nn.Module], head: str) -> None:
    layer = layers.get(name)
    if layer is None:
        known = [each for each, found in layers.items() if isinstance(found, Wide)]
        raise ValueError(f"model.widths: the model has no layer {name};{did_you_mean(name, known)} {_FIX}")
    if not isinstance(layer, Wide):
        raise ValueError(f"model.widths: {name} is a {type(layer).__name__}; convolutions and linear layers have a width of their own")
    if name == head:
        raise ValueError(f"model.widths: {name} makes the outputs, of which the data say how many there are; leave it out")
    if _is_depthwise(layer):
        raise ValueError(f"model.widths: {name} is a depthwise convolution, which has as many channels as it gets; leave it out")
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if not 1 <= width <= len(layer.weight) or width % groups:
        of = f"a multiple of its {groups} groups" if groups > 1 else "1"
        raise ValueError(f"model.widths: {name}={width}; the layer has {len(layer.weight)} channels, and can keep from {of} up to them")


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _is_cut(layer: nn.Module) -> bool:
    return isinstance(layer, Wide | _BatchNorm | nn.GroupNorm)


# --- one layer --------------------------------------------------------------------------------------------------------------------------


def _follow(name: str, layer: nn.Module, given: Tensor) -> None:
    """Cut the layer to the channels that arrive."""
    match layer:
        case nn.Linear():
            _narrow(name, layer, "weight", given.shape[-1], axis=1)
            layer.in_features = layer.weight.shape[1]
        case nn.Conv2d() if _is_depthwise(layer):
            channels, each = given.shape[1], layer.out_channels // layer.in_channels
            for parameter in ("weight", "bias"):
                _narrow(name, layer, parameter, channels * each)
            layer.in_channels = layer.groups = channels
            layer.out_channels = channels * each
        case nn.Conv2d():
            if given.shape[1] % layer.groups:
                raise ValueError(f"{name} gets {given.shape[1]} channels for its {layer.groups} groups")
            _narrow(name, layer, "weight", given.shape[1] // layer.groups, axis=1)
            layer.in_channels = given.shape[1]
        case FoldedConv2d():
            pass  # it sees the image, whose channels are three
        case _BatchNorm():
            for parameter in ("weight", "bias", "running_mean", "running_var"):
                _narrow(name, layer, parameter, given.shape[1])
            layer.num_features = given.shape[1]
        case nn.GroupNorm():
            if given.shape[1] % layer.num_groups:
                raise ValueError(f"{name} gets {given.shape[1]} channels for its {layer.num_groups} groups")
            for parameter in ("weight", "bias"):
                _narrow(name, layer, parameter, given.shape[1])
            layer.num_channels = given.shape[1]


def _keep_outputs(layer: nn.Module, width: int) -> None:
    for parameter in ("weight", "bias"):
        _narrow("", layer, parameter, width)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = width
    elif isinstance(layer, nn.Linear):
        layer.out_features = width


def _narrow(name: str, layer: nn.Module, attribute: str, length: int, *, axis: int = 0) -> None:
    """The first `length` entries of a parameter or buffer; nothing if the layer has none."""
    tensor = getattr(layer, attribute)
    if tensor is None or tensor.shape[axis] == length:
        return
    if tensor.shape[axis] < length:
        raise ValueError(f"{name} takes {tensor.shape[axis]} channels and gets {length}")
    cut = tensor.detach().narrow(axis, 0, length).clone(memory_format=torch.contiguous_format)
    setattr(layer, attribute, nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)
