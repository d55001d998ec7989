"""Builds a model of torchvision or timm by its name, as its library has it: with the library's number of classes and random weights. Called
by trainer.models.vision, which adds stem, weights and head, and by trainer.models.weights.
"""

from collections.abc import Sequence
from typing import Any

import torchvision.models
from torch import nn

from trainer.models.own import OwnCodeError, called, own_function
from trainer.settings.tree import ModelConfig
from trainer.settings.words import closest


def architecture(config: ModelConfig, seen: tuple[int, int], *, classes: int = 1000) -> nn.Module:
    """The unchanged model with its library's own number of classes and random weights. A model of the user's own is told `classes`, and has
    the weights that it comes with."""
    if ":" in config.name:
        return _own_architecture(config, seen, classes)
    if config.name.startswith("timm/"):
        return timm_architecture(config, seen)
    names = torchvision.models.list_models(torchvision.models)
    if config.name not in names:
        raise ValueError(f"model.name={config.name} is not a torchvision classifier{_instead_of(config.name, names)}")
    options = torchvision_options(config, seen)
    try:
        model: nn.Module = torchvision.models.get_model(config.name, weights=None, **options)
    except ValueError as error:
        raise ValueError(
            f"model.name={config.name} cannot be built for {seen[0]}x{seen[1]} images: {one_line(error)}; {size_fix()}"
        ) from error
    return model


def _own_architecture(config: ModelConfig, seen: tuple[int, int], classes: int) -> nn.Module:
    function = own_function("model.name", config.name)
    model = called("model.name", config.name, function, classes=classes, image_size=seen)
    if not isinstance(model, nn.Module):
        raise OwnCodeError(f"model.name={config.name} is to return a torch.nn.Module; it returned {type(model).__name__}")
    return model.float()


def torchvision_options(config: ModelConfig, seen: tuple[int, int]) -> dict[str, Any]:
    """What torchvision's own constructor of the model is told besides the number of classes. ValueError for a size it cannot see."""
    if config.name in ("googlenet", "inception_v3"):
        # No auxiliary heads, and no normalisation inside the model: its weights want mean .5 and std .5, the default of data.mean.
        return {"aux_logits": False, "transform_input": False, "init_weights": config.weights == "none"}
    if config.name.startswith("vit_"):
        patch = int(config.name.rsplit("_", 1)[1])
        if seen[0] != seen[1] or seen[0] % patch:
            side = max(patch, round(max(seen) / patch) * patch)
            raise ValueError(
                f"model.name={config.name} cuts images into patches of {patch} pixels and would see {seen[0]}x{seen[1]}: the "
                f"side must be a multiple of {patch}; use --model.image-size {side} (or 224, the size it was trained with)"
            )
        return {"image_size": seen[0]}
    if config.name.startswith("maxvit"):
        return {"input_size": seen}
    return {}


def timm_architecture(config: ModelConfig, seen: tuple[int, int], *, pretrained: bool = False) -> nn.Module:
    timm, name = _timm(config), config.name.removeprefix("timm/")
    if not timm.is_model(name):
        raise ValueError(f"model.name={config.name} is not one of timm's models{_instead_of(name, timm.list_models(), prefix='timm/')}")
    try:
        model = timm.create_model(name, pretrained=False)
        options: dict[str, Any] = {}
        if model.pretrained_cfg.get("fixed_input_size") and model.pretrained_cfg["input_size"][1:] != seen:
            options = {"img_size": seen}  # with pretrained weights timm interpolates their position embeddings
        if options or pretrained:
            model = timm.create_model(name, pretrained=pretrained, **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"model.name={config.name} cannot be built for {seen[0]}x{seen[1]} images: {one_line(error)}; {size_fix()}"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _timm(config: ModelConfig) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f'model.name={config.name} needs the package timm; install the extra: pip install "timm>=1.0" (extra `timm`)'
        ) from error
    return timm


def _instead_of(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    if not prefix and _is_timms(name):
        return f"; timm has it: timm/{name}"
    close = [prefix + match for match in closest(name, known)]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return "; torchvision's are named as on its web page (resnet18, convnext_tiny, ...), timm's with a prefix (timm/NAME)"


def _is_timms(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name))


def size_fix() -> str:
    return "set --model.image-size to a size it takes (224 suits most)"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
