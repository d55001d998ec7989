"""Builds models by name, with their weights and a new head. Tasks build their networks here; `learn`, `drive` and `export` use the helpers.

A model's name is a torchvision classifier (`resnet18`) or a timm model (`timm/NAME`, extra `timm`). Weights come from the library
(`imagenet`), a Python package (`package:efficientnet_lite0`, extra `quickstart`) or a file, or are random (`none`).
trainer.models.architecture builds what the libraries have, trainer.models.weights finds and fits the weights, trainer.models.stem adapts
the first layers, trainer.models.narrow cuts it to the widths of a pruned model.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.models.architecture import architecture, one_line, size_fix
from trainer.models.narrow import narrow
from trainer.models.random_state import derived_seed, random_state
from trainer.models.stem import apply_stem, fit_stem, resolve_stem
from trainer.models.weights import WeightsError, fitted_to, load_into
from trainer.settings.tree import ModelConfig
from trainer.settings.values import widths_of

__all__ = ["Head", "Preprocess", "WeightsError", "build_model", "has_depthwise", "head_of", "replace_head"]

Head = nn.Linear | nn.Conv2d


def build_model(
    config: ModelConfig, *, classes: int, seed: int, image_hw: tuple[int, int], names: Sequence[str] | None = None
) -> nn.Module:
    """Build the model on the CPU in float32, in train mode: (n, 3, H, W) -> (n, classes).

    `image_hw` is the size of the data's images; `config.image_size` overrides it. `names` of the outputs, if known, decide whether a file's
    head is kept. The result depends only on the arguments: the global random state is neither read nor changed. ValueError (WeightsError
    for weights) if the configuration cannot be met.
    """
    seen = (config.image_size, config.image_size) if config.image_size else image_hw
    with random_state(derived_seed(seed, "architecture")):
        model = architecture(config, seen, classes=classes)
    old_head, layer = head_of(model)
    if is_own := ":" in config.name:
        config = dataclasses.replace(config, stem="native" if config.stem == "auto" else config.stem)
    state = fitted_to(model, config, seen, head=old_head, outputs=classes, names=names)
    stem = resolve_stem(config, model, image_hw)
    apply_stem(model, stem, torch.Generator().manual_seed(derived_seed(seed, "stem")))
    if is_own and layer.weight.shape[0] == classes:
        head_name = old_head
    else:
        head_name = replace_head(model, classes, torch.Generator().manual_seed(derived_seed(seed, "head")))
    if widths := widths_of(config.widths):
        narrow(model, widths, head=head_name, seen=seen)
    if state is not None:
        may_differ = [f"{head_name}.weight", f"{head_name}.bias"]
        if stem == "article":
            may_differ.append("conv1.weight")
        state = fit_stem(state, stem)
        load_into(model, state, may_differ=may_differ, source=config.weights)
    _check_forward(model, config, seen, classes)
    return model.train()


def has_depthwise(model: nn.Module) -> bool:
    """Whether the model has depthwise convolutions: one filter per channel."""
    return any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules())


def least_momentum(model: nn.Module) -> float:
    """The smallest momentum with which one of the model's BatchNorms follows its statistics; 0 if it has none that does so."""
    momenta = [norm.momentum for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    return min((each for each in momenta if each is not None), default=0.0)


def head_of(model: nn.Module) -> tuple[str, Head]:
    """The classifier's qualified name and layer: the last Linear or Conv2d before the output.

    It is looked up by the names that libraries use, else found by running the model on a blank image. ValueError if there is none or more
    than one.
    """
    for attribute in _classifier_names(model):
        part = model.get_submodule(attribute)
        inside = [(name, module) for name, module in part.named_modules(prefix=attribute) if isinstance(module, nn.Linear | nn.Conv2d)]
        if inside:
            return inside[-1]
    return _head_by_running(model)


def replace_head(model: nn.Module, classes: int, generator: torch.Generator) -> str:
    """Give the model a new random classifier with `classes` outputs, in place. Returns its qualified name."""
    if classes < 1:
        raise ValueError(f"{classes} outputs: a model says at least one number of an image")
    name, old = head_of(model)
    options: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    # skip_init: the constructors would draw from the global random state.
    if isinstance(old, nn.Linear):
        new = nn.utils.skip_init(nn.Linear, old.in_features, classes, **options)  # type: ignore[no-untyped-call]
    else:
        options |= {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding, "dilation": old.dilation}
        new = nn.utils.skip_init(nn.Conv2d, old.in_channels, classes, **options)  # type: ignore[no-untyped-call]
    assert isinstance(new, nn.Linear | nn.Conv2d)
    # The distribution that nn.Linear and nn.Conv2d use, drawn from our generator.
    nn.init.kaiming_uniform_(new.weight, a=math.sqrt(5), generator=generator)
    if new.bias is not None:
        bound = 1 / math.sqrt(new.weight[0].numel())
        nn.init.uniform_(new.bias, -bound, bound, generator=generator)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = classes  # type: ignore[assignment]  # timm and squeezenet store the number next to the layer
    return name


class Preprocess(nn.Module):
    """Converts uint8 images to the network's input on the images' device: resizes them, then computes (x / 255 - mean) / std in float32.

    These three operations in this order equal torchvision's ToTensor and Normalize bit for bit. A difference in the last place would grow
    to 2.7e-3 of the loss within 20 steps (measured against the tutorial, benchmarks/parity.py).

    Resizing is torchvision's (antialias, like PIL), clamped to [0, 255] because bicubic overshoots. The module has no parameters and saves
    nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int = 0,
        interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if min(std) <= 0:
            raise ValueError(f"data.std={tuple(std)}: images are divided by it; each value must be above 0")
        self._image_size, self._interpolation = image_size, interpolation
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Scaling by a power of two does not round: y / std - mean / std has the same bits as (y - mean) / std, in one pass instead of two.
        self._scale = 1 / std[0] if len(set(std)) == 1 and math.frexp(std[0])[0] == 0.5 else 0.0
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def resizing(self, side: int) -> "Preprocess":
        """This one if it resizes already; else one that brings all images to `side`."""
        if self._image_size:
            return self
        resizes = Preprocess(
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            image_size=side,
            interpolation=self._interpolation,
            channels_last=self._memory_format is torch.channels_last,
        )
        return resizes.to(self.mean.device)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> (n, 3, S, S) float32 with S = image_size, or (n, 3, H, W) if that is 0."""
        pixels = images.float()
        side = self._image_size
        if side and images.shape[-2:] != (side, side):
            if self._interpolation == "nearest":
                pixels = F.interpolate(pixels, size=(side, side), mode="nearest-exact")
            else:
                pixels = F.interpolate(pixels, size=(side, side), mode=self._interpolation, antialias=True)
                if self._interpolation == "bicubic":
                    pixels = pixels.clamp_(0, 255)
        rows = pixels.permute(0, 2, 3, 1)  # (n, H, W, 3)
        if self._memory_format is torch.channels_last and rows.is_contiguous() and not rows.is_cuda:
            # The same operations on lines of W * 3 numbers: 2 us per image of 32 px. Over channels the loops have length 3 and take 5 us.
            width = rows.shape[2]
            mean, std = self.mean.view(3), self.std.view(3)
            lines = rows.flatten(2).div_(255)  # (n, H, W * 3)
            if self._scale:
                torch.add((mean * -self._scale).repeat(width), lines, alpha=self._scale, out=lines)
            else:
                lines.sub_(mean.repeat(width)).div_(std.repeat(width))
            pixels = lines.view(rows.shape).permute(0, 3, 1, 2)
        else:
            pixels = pixels.div_(255).sub_(self.mean).div_(self.std)
        return pixels.contiguous(memory_format=self._memory_format)


# -- checks -----------------------------------------------------------------------------------------------------------------------------


def _check_forward(model: nn.Module, config: ModelConfig, seen: tuple[int, int], classes: int) -> None:
    """Run one blank image through the model, so that a size that does not fit fails here with a clear message, before the first step."""
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, *seen))
    except (RuntimeError, ValueError, AssertionError) as error:
        what = f"model.name={config.name} with model.stem={config.stem}"
        raise ValueError(f"{what} does not take images of {seen[0]}x{seen[1]} pixels ({one_line(error)}); {size_fix()}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model.name={config.name} returns {got} for one image, not one row of {classes} logits; it is not a classifier we can train"
        )


# -- head -----------------------------------------------------------------------------------------------------------------------------


def _classifier_names(model: nn.Module) -> list[str]:
    """Attributes that may hold the classifier, most certain first."""
    declared = getattr(model, "default_cfg", None)  # timm's
    if isinstance(declared, Mapping) and declared.get("classifier"):
        names = declared["classifier"]
        if not isinstance(names, str):
            raise ValueError(f"the model has {len(names)} classifiers ({', '.join(names)}); use its variant without distillation")
        return [names]
    children = dict(model.named_children())
    return [name for name in ("fc", "classifier", "heads", "head") if name in children]


def _head_by_running(model: nn.Module) -> tuple[str, Head]:
    """The Linear or Conv2d that ran last, if it has as many outputs as the model."""
    ran: list[tuple[str, Head]] = []

    def remember(name: str) -> Callable[..., None]:
        return lambda module, *_: ran.append((name, module))

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [module.register_forward_hook(remember(name)) for name, module in layers]
    was_training = model.training
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            output = model.eval()(torch.zeros(1, 3, 224, 224, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    outputs = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    if not ran or ran[-1][1].weight.shape[0] != outputs:
        raise ValueError(f"no classifier found in {type(model).__name__}: its last layer is not a Linear or Conv2d that makes the output")
    return ran[-1]
